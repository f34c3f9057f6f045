"""Routing traces in files."""

import gzip

from moert.scheduler.trace import writer


def write_trace(path, trace):
    """Write a file that `read_trace` reads back; gzipped where its name ends in .gz."""
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", encoding="utf-8") as file:
        write = writer(file, trace)
        for step in trace.steps:
            write(step)
