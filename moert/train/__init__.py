"""Scales and routing-path predictor learnt from a whole model, and the traces they learn from."""
