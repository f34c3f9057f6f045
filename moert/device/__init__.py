"""Memory and kernels of a GPU: budget, placement, arenas, copies, dense weights; knows no requests."""
