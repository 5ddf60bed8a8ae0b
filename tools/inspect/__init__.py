"""`python -m tools.inspect`: the way of a document, the text of a sample, what a training step saw."""
