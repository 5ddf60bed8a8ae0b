"""A page and a picture of a sweep."""
