"""From the name of a model to a folder on this machine; knows nothing of running it."""
