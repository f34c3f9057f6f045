"""Readers of the files that models are published in; they know formats, not what a tensor means."""
