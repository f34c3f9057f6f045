"""A checkpoint turned into a store, layer by layer; knows nothing of running it."""
