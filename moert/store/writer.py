"""Writes the files of a store: safetensors in the order of their header, a checksum per tensor, moert.json."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from moert.store.fileio import as_bytes
from moert.store.layout import Entry, build_header


class TensorWriter:
    """Writes the data of one safetensors file, tensor after tensor, each in any number of parts."""

    def __init__(self, file: IO[Any], entries: Sequence[Entry]) -> None:
        header = build_header(entries)
        file.write(header)
        self._file = file
        self._entries = entries
        self._next = 0
        self.size = self.data_start = len(header)

    def write(self, parts: Iterable[Tensor]) -> int:
        """Write the next tensor from contiguous tensors whose bytes follow each other; returns the CRC-32 of all.

        Raises ValueError where their bytes do not add up to what the header says.
        """
        entry = self._entries[self._next]
        crc = size = 0
        for part in parts:
            data = as_bytes(part)
            self._file.write(data)
            crc = zlib.crc32(data, crc)
            size += len(data)
        if size != entry.nbytes:
            raise ValueError(f"{entry.name} has {size} bytes where {entry.nbytes} were planned")
        self._next += 1
        self.size += size
        return crc

    def finish(self) -> None:
        """Check that every tensor of the header was written."""
        if self._next != len(self._entries):
            raise ValueError(f"{len(self._entries) - self._next} tensors were not written")


def file_checksum(path: Path) -> tuple[int, int]:
    """Size and CRC-32 of a small file."""
    data = path.read_bytes()
    return len(data), zlib.crc32(data)
