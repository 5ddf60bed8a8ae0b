"""Which trials are ended early: one file each."""
