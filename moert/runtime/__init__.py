"""Executes the plans of the scheduler: arena, reading threads, experts."""
