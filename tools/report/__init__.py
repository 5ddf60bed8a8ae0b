"""`python -m tools.report runs=runs/demo`: one page that shows a model's life."""
