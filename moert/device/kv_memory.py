"""A KV cache of which some layers lie in device memory, up to a position, and behind it in host memory."""

# J key/value heads, C positions, d head size

from __future__ import annotations

from collections.abc import Sequence

import torch

from moert.device.link import DeviceBackend
from moert.device.split_cache import CacheSegment, SplitCache
from moert.kernels.layer_step import LayerCache
from moert.models.architecture import Architecture, kv_bytes
from moert.models.kv_cache import FlatLayer, KVMemory, RegionParts
from moert.quant.format import KEY_BLOCK, align


class SplitKVMemory(KVMemory):
    """A `KVMemory` whose layers that are `on_device` have their first `kv_positions` in memory of `device`.

    `kv_positions` is a multiple of a block; the other positions of these layers are in host memory too.
    """

    def __init__(
        self,
        arch: Architecture,
        positions: int,
        dtype: torch.dtype,
        on_device: Sequence[bool],
        kv_positions: int,
        device: DeviceBackend,
    ) -> None:
        self._device, self._placed = device, [*on_device]
        self._border = min(kv_positions, align(positions, KEY_BLOCK))
        super().__init__(arch, positions, dtype)
        size = kv_bytes(2 * self._shape[0] * self._border, arch.head_dim, 8 * dtype.itemsize)
        arenas = iter(torch.split(device.allocate(sum(on_device) * size), size) if size else [])
        self._near: list[FlatLayer | None] = [
            self._room(self._border, next(arenas)) if near and size else None for near in self._placed
        ]

    def _host_positions(self, num_layers: int) -> list[int]:
        return [self.positions - (self._border if placed else 0) for placed in self._placed]

    @staticmethod
    def host_bytes_for(
        arch: Architecture, positions: int, dtype: torch.dtype, on_device: Sequence[bool], kv_positions: int
    ) -> int:
        """Return the bytes of host memory that it takes; the rest of `KVCache.bytes_for` is on the device."""
        positions = align(positions, KEY_BLOCK)
        held = arch.num_layers * positions - sum(on_device) * min(kv_positions, positions)
        return kv_bytes(2 * arch.num_kv_heads * held, arch.head_dim, 8 * dtype.itemsize)

    def layers(self, start: int, count: int) -> list[LayerCache]:
        """Return a cache per layer; those of layers on the device have no room, `split` has them."""
        return [
            self._layer(flat, start, 0 if placed else count)
            for flat, placed in zip(self._host, self._placed, strict=True)
        ]

    def _parts(self, index: int, start: int, size: int) -> list[RegionParts]:
        """Return what the base class does; of a layer on the device in up to two parts."""
        if not self._placed[index]:
            return super()._parts(index, start, size)
        near, border = self._near[index], min(max(self._border - start, 0), size)
        parts = [(0, self._cut(near, start, border))] if near is not None and border else []
        if border < size:
            behind = max(start - self._border, 0)
            parts.append((border, self._cut(self._host[index], behind, size - border)))
        return self._with_positions(parts)

    def split(self, start: int, count: int) -> list[SplitCache | None]:
        """Return the caches of the layers on the device, None for the others."""
        border = min(max(self._border - start, 0), count)  # of these positions, how many are in device memory
        result: list[SplitCache | None] = []
        for host, device, placed in zip(self._host, self._near, self._placed, strict=True):
            near = CacheSegment(0, *self._cut(device, start, border)) if device is not None and border else None
            behind = max(start - self._border, 0)
            far = CacheSegment(border, *self._cut(host, behind, count - border)) if placed and border < count else None
            result.append(SplitCache(near, far, self._device) if placed else None)
        return result
