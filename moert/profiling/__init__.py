"""Measuring a device: disk, memory, kernels, what decoding takes beside them, GPU. Prints nothing."""
