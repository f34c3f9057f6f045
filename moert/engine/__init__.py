"""Requests, sequences and their KV caches: text in, tokens out, step by step; knows no command line and no HTTP."""
