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
from moert.quant.decode import LayerCache


class KVCache:
    """Per layer [2, J, C, d] in `dtype`; pages are touched only as the sequence grows.

    float16, float32, or int8: then each key and each value has a float32 scale of its own.
    """

    def __init__(self, arch: Architecture, ctx_size: int, dtype: torch.dtype = torch.float16) -> None:
        self.ctx_size, self.length = ctx_size, 0
        shape = (arch.num_layers, 2, arch.num_kv_heads, ctx_size)
        numbers = torch.empty(*shape, arch.head_dim, dtype=dtype)
        scales = torch.empty(shape) if dtype == torch.int8 else None
        self.layers = [LayerCache(n, None if scales is None else scales[i]) for i, n in enumerate(numbers)]

    @staticmethod
    def bytes_for(arch: Architecture, ctx_size: int, dtype: torch.dtype = torch.float16) -> int:
        """Bytes of a cache for `ctx_size` positions."""
        per_vector = arch.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)
        return arch.num_layers * 2 * arch.num_kv_heads * ctx_size * per_vector

    def check_room(self, count: int) -> None:
        """Raise UsageError unless `count` more positions fit."""
        if self.length + count > self.ctx_size:
            needed = self.length + count
            raise UsageError(
                f"{needed} tokens do not fit the context of {self.ctx_size}; ask for a larger context size."
            )

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write [J, T, d] each behind the current length, which `advance` moves."""
        cache, end = self.layers[layer], self.length + keys.shape[1]
        for which, x in enumerate((keys, values)):
            if cache.scales is not None:
                scale = x.abs().amax(-1, keepdim=True) / 127
                cache.scales[which, :, self.length : end] = scale[..., 0]
                x = torch.where(scale > 0, x / scale, 0.0).round_()
            cache.numbers[which, :, self.length : end] = x

    def read(self, layer: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of positions start .. end: float32 [J, S, d] each."""
        cache = self.layers[layer]
        both = cache.numbers[:, :, start:end].float()
        if cache.scales is not None:
            both *= cache.scales[:, :, start:end, None]
        return both[0], both[1]

    def advance(self, count: int) -> None:
        self.length += count

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on. ValueError if there are fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} positions to {length}")
        self.length = length
