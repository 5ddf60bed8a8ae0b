"""The data card: `corpus.html` beside the manifest, one page that shows what a corpus was made of and how."""
