"""Keys and values of the tokens seen so far, preallocated for the whole context.

A forward pass appends its keys and values to every layer and advances the length once, at its end: a pass that is
interrupted leaves the cache as it was.
"""

# J key/value heads, C context size rounded up to a block, T tokens, S positions read, d head size

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moert.errors import UsageError
from moert.kernels.layer_step import LayerCache
from moert.models.architecture import Architecture, kv_bytes
from moert.quant.format import KEY_BLOCK, align

FlatLayer = tuple[Tensor, Tensor, Tensor]  # keys, values and scales of a layer, each in one dimension
Region = tuple[int, int]  # the position of the memory that it begins at, and how many it has
RegionParts = list[tuple[int, Tensor]]  # keys, values or scales of a region, with the position that each part begins at


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors [..., d] as integers from -127 to 127, in float32, and the scale [..., 1] of each."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, x / scale, 0.0).round_(), scale


class KVMemory:
    """Room for the keys and values of `positions` positions (rounded up to a block), of one sequence or of several.

    float16, float32, or int8: then each key and each value has a float32 scale of its own. Pages are touched only as
    sequences grow.
    """

    def __init__(self, arch: Architecture, positions: int, dtype: torch.dtype = torch.float16) -> None:
        self.positions, self.dtype = align(positions, KEY_BLOCK), dtype
        self._shape = arch.num_kv_heads, arch.head_dim
        self._host = [self._room(held) for held in self._host_positions(arch.num_layers)]

    def _host_positions(self, num_layers: int) -> list[int]:
        """Return how many positions of each layer lie in host memory."""
        return [self.positions] * num_layers

    def _room(self, positions: int, arena: Tensor | None = None) -> FlatLayer:
        """Flat keys, values and scales of a layer, in `arena` or in host memory of their own."""
        J, d = self._shape
        sizes = [J * d * positions] * 2 + [2 * J * positions if self.dtype == torch.int8 else 0]
        dtypes = [self.dtype, self.dtype, torch.float32]
        if arena is None:
            keys, values, scales = (torch.empty(size, dtype=kind) for size, kind in zip(sizes, dtypes, strict=True))
        else:
            pieces = torch.split(arena, [size * kind.itemsize for size, kind in zip(sizes, dtypes, strict=True)])
            keys, values, scales = (piece.view(kind) for piece, kind in zip(pieces, dtypes, strict=True))
        return keys, values, scales

    def layers(self, start: int, count: int) -> list[LayerCache]:
        """Return a cache per layer in positions start .. start + count, both multiples of a block."""
        return [self._layer(flat, start, count) for flat in self._host]

    def split(self, start: int, count: int) -> Sequence[Any]:
        """Return what a decoder that knows of it keeps of each layer elsewhere, None for layers in host memory."""
        return [None] * len(self._host)

    def _layer(self, flat: FlatLayer, start: int, count: int) -> LayerCache:
        keys, values, scales = self._cut(flat, start, count)
        return LayerCache(keys.view(len(keys), count // KEY_BLOCK, self._shape[1], KEY_BLOCK), values, scales)

    def copy(self, source: Region, target: Region, count: int) -> None:
        """Copy the first `count` positions of one region into another, which may overlap it.

        A region begins at a multiple of a block and is as many blocks long; what the two share is overwritten.
        """
        count = align(count, KEY_BLOCK)  # of keys in blocks, whole blocks are whole rows
        for index in range(len(self._host)):
            for old, new in zip(self._parts(index, *source), self._parts(index, *target), strict=True):
                copy_rows(old, new, count)

    def _parts(self, index: int, start: int, size: int) -> list[RegionParts]:
        """Return the keys, the values, and the scales of both of a layer in a region, heads first."""
        return self._with_positions([(0, self._cut(self._host[index], start, size))])

    @staticmethod
    def _with_positions(parts: Sequence[tuple[int, tuple[Tensor, Tensor, Tensor | None]]]) -> list[RegionParts]:
        """Sort what `_cut` gave of parts of a region, each with the position that it begins at, by kind."""
        both = [[(first, tensors[kind]) for first, tensors in parts] for kind in (0, 1)]
        scales = [(first, tensors[2].flatten(0, 1)) for first, tensors in parts if tensors[2] is not None]
        return [*both, scales] if scales else both

    def _cut(self, flat: FlatLayer, start: int, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values [J, C, d] and scales [2, J, C] in some positions of a layer's."""
        keys, values, scales = flat
        J, d = self._shape
        numbers = slice(J * d * start, J * d * (start + count))
        own = scales[2 * J * start : 2 * J * (start + count)].view(2, J, count) if len(scales) else None
        return keys[numbers].view(J, count, d), values[numbers].view(J, count, d), own


class KVCache:
    """A `LayerCache` of one sequence for each layer: in `memory` from position `start` on, or in memory of its own.

    `split` has those of the layers on a device, which `append` and `read` do not know.
    """

    def __init__(
        self,
        arch: Architecture,
        ctx_size: int,
        dtype: torch.dtype = torch.float16,
        memory: KVMemory | None = None,
        start: int = 0,
    ) -> None:
        self.ctx_size, self.length = ctx_size, 0
        memory = memory or KVMemory(arch, ctx_size, dtype)
        self.layers = memory.layers(start, align(ctx_size, KEY_BLOCK))
        self.split = memory.split(start, align(ctx_size, KEY_BLOCK))

    @property
    def steppable(self) -> bool:
        """Tell whether a `LayerStep` can run over this cache."""
        return self.layers[0].steppable()

    @staticmethod
    def bytes_per_position(arch: Architecture, dtype: torch.dtype = torch.float16) -> int:
        """Bytes of the keys and values of a position, over all layers."""
        return kv_bytes(arch.kv_vectors, arch.kv_vector_size, 8 * dtype.itemsize)

    @staticmethod
    def bytes_for(arch: Architecture, ctx_size: int, dtype: torch.dtype = torch.float16) -> int:
        """Bytes of a cache for `ctx_size` positions."""
        return align(ctx_size, KEY_BLOCK) * KVCache.bytes_per_position(arch, dtype)

    def check_room(self, count: int) -> None:
        """Raise UsageError unless `count` more positions fit."""
        if self.length + count > self.ctx_size:
            needed = self.length + count
            raise UsageError(
                f"{needed} tokens do not fit the context of {self.ctx_size}; ask for a larger context size."
            )

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write [J, T, d] each behind the current length, which `advance` moves."""
        cache, at = self.layers[layer], torch.arange(self.length, self.length + keys.shape[1])
        if cache.scales is not None:
            (keys, of_keys), (values, of_values) = to_int8(keys), to_int8(values)
            cache.scales[:, :, at] = torch.stack((of_keys, of_values))[..., 0]
        dtype = cache.values.dtype
        cache.keys[:, at // KEY_BLOCK, :, at % KEY_BLOCK] = keys.transpose(0, 1).to(dtype)
        cache.values[:, at] = values.to(dtype)

    def read(self, layer: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of positions start .. end: float32 [J, S, d] each."""
        cache, first = self.layers[layer], start // KEY_BLOCK
        blocks = cache.keys[:, first : align(end, KEY_BLOCK) // KEY_BLOCK].float()
        keys = blocks.transpose(-1, -2).flatten(1, 2)[:, start - first * KEY_BLOCK : end - first * KEY_BLOCK]
        values = cache.values[:, start:end].float()
        if cache.scales is not None:
            keys, values = keys * cache.scales[0, :, start:end, None], values * cache.scales[1, :, start:end, None]
        return keys, values

    def advance(self, count: int) -> None:
        self.length += count

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on. ValueError if there are fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} positions to {length}")
        self.length = length


def copy_rows(source: RegionParts, target: RegionParts, count: int) -> None:
    """Copy the first `count` rows of each head from parts of a region into those of another, which may overlap it."""
    if len(source) > 1 or len(target) > 1:  # in two memories, where no order of the heads suits both
        for first, old in [(first, old.clone()) for first, old in source]:
            for begin, new in target:
                low, high = max(first, begin), min(first + old.shape[1], begin + new.shape[1], count)
                if low < high:
                    new[:, low - begin : high - begin] = old[:, low - first : high - first]
        return
    (_, old), (_, new) = source[0], target[0]
    # Heads whose rows move up go from the last to the first, and the others the other way round: so none is overwritten
    # before it is copied.
    shifts = [new[head].data_ptr() - old[head].data_ptr() for head in range(len(old))]
    rising = [head for head in reversed(range(len(old))) if shifts[head] > 0]
    for head in [*rising, *(head for head in range(len(old)) if shifts[head] < 0)]:
        rows = old[head, :count]
        overlapping = abs(shifts[head]) < rows.numel() * rows.element_size()
        new[head, :count] = rows.clone() if overlapping else rows
