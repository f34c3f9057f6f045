"""Experts out of memory and disk: where every slice is, reads, and the plans of the scheduler carried out; knows no model."""
