"""Compiled steps of a decoder layer around the products: attention, rotary positions, norms, router.

Knows nothing of models, files or where experts are: it gets tensors and shapes.
"""
