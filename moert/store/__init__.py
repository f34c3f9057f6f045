"""A converted model on disk: layout, meta data, reader and writer; knows nothing of checkpoints or models."""
