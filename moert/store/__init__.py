"""The store: a converted model on disk."""
