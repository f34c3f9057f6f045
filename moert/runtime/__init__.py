"""Experts out of memory and disk: where every slice is, its reads, and plans carried out; knows no model."""
