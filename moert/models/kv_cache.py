"""Keys and values of the tokens seen so far, preallocated for the whole context.

A forward pass appends its keys and values to every layer and advances the length once, at its end: a pass that is
interrupted leaves the cache as it was.
"""

# L layers, J key/value heads, C context size, T tokens, S positions read, d head size

from __future__ import annotations

import torch
from torch import Tensor

from moert.errors import UsageError
from moert.models.architecture import Architecture


class KVCache:
    """[L, 2, J, C, d] in `dtype`; pages are touched only as the sequence grows."""

    def __init__(self, arch: Architecture, ctx_size: int, dtype: torch.dtype = torch.float16) -> None:
        self.ctx_size, self.length = ctx_size, 0
        self._data = torch.empty(arch.num_layers, 2, arch.num_kv_heads, ctx_size, arch.head_dim, dtype=dtype)

    @staticmethod
    def bytes_for(arch: Architecture, ctx_size: int, dtype: torch.dtype = torch.float16) -> int:
        """Bytes of a cache for `ctx_size` positions."""
        return arch.num_layers * 2 * arch.num_kv_heads * ctx_size * arch.head_dim * dtype.itemsize

    def check_room(self, count: int) -> None:
        """Raise UsageError unless `count` more positions fit."""
        if self.length + count > self.ctx_size:
            needed = self.length + count
            raise UsageError(
                f"{needed} tokens do not fit the context of {self.ctx_size}; ask for a larger context size."
            )

    def layer(self, layer: int) -> Tensor:
        """Keys and values of one layer, [2, J, C, d]."""
        return self._data[layer]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write [J, T, d] each behind the current length, which `advance` moves."""
        end = self.length + keys.shape[1]
        self._data[layer, 0, :, self.length : end] = keys
        self._data[layer, 1, :, self.length : end] = values

    def read(self, layer: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of positions start .. end: float32 [J, S, d] each."""
        keys, values = self._data[layer, :, :, start:end].float()
        return keys, values

    def advance(self, count: int) -> None:
        self.length += count

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on. ValueError if there are fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} positions to {length}")
        self.length = length
