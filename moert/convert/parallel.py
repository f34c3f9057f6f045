"""Quantising on all cores, one expert or block of rows per core.

Splitting each small tensor operation over threads instead would spend most of the time at their barriers, and
forty times more where another program keeps a core busy.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

MAX_WORKERS = 8
MEMORY_BYTES = 512 << 20  # of source weights that may be held at once, before it is better to have fewer workers

T = TypeVar("T")
R = TypeVar("R")


def num_workers(item_bytes: int) -> int:
    """Return how many items of so many bytes may be worked on at once: at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, MAX_WORKERS, MEMORY_BYTES // max(1, item_bytes)))


class Workers:
    """Threads that apply a function to items; results come in the order of the items."""

    def __init__(self, pool: ThreadPoolExecutor, count: int) -> None:
        self._pool, self.count = pool, count

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Like `map`, at most one item more than there are workers ahead of what is consumed."""
        pending: deque[Future[R]] = deque()
        try:
            for item in items:
                pending.append(self._pool.submit(function, item))
                if len(pending) > self.count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


@contextmanager
def workers(item_bytes: int) -> Iterator[Workers]:
    """Threads for items of so many bytes; inside the block torch splits no operation, unless there is one worker."""
    count, before = num_workers(item_bytes), torch.get_num_threads()
    threads = 1 if count > 1 else before
    torch.set_num_threads(threads)
    try:
        with ThreadPoolExecutor(count, "convert", torch.set_num_threads, (threads,)) as pool:
            yield Workers(pool, count)
    finally:
        torch.set_num_threads(before)
