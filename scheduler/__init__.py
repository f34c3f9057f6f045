"""Decisions as pure functions over plain data: standard library and numpy only."""
