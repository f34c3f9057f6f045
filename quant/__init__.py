"""The nested-bit format and its arithmetic. Knows nothing of models or files."""
