"""This machine: memory that is available, allocator, device profile, boards; knows no models."""
