"""Copies between device memory and host memory that is not page-locked, through a few chunks that are."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from moert.device.cuda_api import Cuda


class StagingPool:
    """Chunks of page-locked memory, used in turn: the next one once the copy out of it, or into it, has ended.

    All memory is contiguous uint8. For one thread at a time.
    """

    def __init__(self, cuda: Cuda, chunk_bytes: int, chunks: int) -> None:
        self._cuda = cuda.module
        self.chunk_bytes = chunk_bytes
        with torch.inference_mode(False):  # else nothing could be written to them outside of that mode
            self._free = deque((cuda.pinned(chunk_bytes), cuda.module.Event()) for _ in range(chunks))

    def send(self, source: Tensor, target: Tensor, stream: Any) -> None:
        """Host memory to device memory, behind what `stream` does; the source may be overwritten at once.

        Blocks while all chunks are on their way.
        """
        for part, place in self._pieces(source, target):
            chunk, event = self._next()
            event.synchronize()
            chunk[: len(part)].copy_(part)
            with self._cuda.stream(stream):
                place.copy_(chunk[: len(part)], non_blocking=True)
                event.record(stream)

    def fetch(self, source: Tensor, target: Tensor, stream: Any) -> None:
        """Device memory to host memory, behind what `stream` does; comes back when it is there."""
        under_way: deque[tuple[Tensor, Tensor, Any]] = deque()
        for part, place in self._pieces(source, target):
            if len(under_way) == len(self._free):
                _take(*under_way.popleft())
            chunk, event = self._next()
            event.synchronize()
            with self._cuda.stream(stream):
                chunk[: len(part)].copy_(part, non_blocking=True)
                event.record(stream)
            under_way.append((chunk, place, event))
        while under_way:
            _take(*under_way.popleft())

    def _next(self) -> tuple[Tensor, Any]:
        self._free.rotate(-1)  # one step, so that Ctrl-C cannot lose a chunk
        return self._free[-1]

    def _pieces(self, source: Tensor, target: Tensor) -> zip[tuple[Tensor, Tensor]]:
        return zip(torch.split(source, self.chunk_bytes), torch.split(target, self.chunk_bytes), strict=True)


def _take(chunk: Tensor, place: Tensor, event: Any) -> None:
    event.synchronize()
    place.copy_(chunk[: len(place)])
