"""Decoders of which a part is on a device, from a checkpoint's tensors, for the tests of that part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moert.device.backend import EmulatedDevice
from moert.device.decoder import PlacedDecoder
from moert.device.kv_memory import SplitKVMemory
from moert.device.matrix import DenseQuant, DeviceMatrix
from moert.device.placement import DenseArena, Placement, make_dense
from moert.models.architecture import Architecture
from moert.models.kv_cache import KVCache
from moert.models.layers import DenseTensors
from moert.models.moe import Experts


class CountingDevice(EmulatedDevice):
    """Notes how much is sent and fetched."""

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__(capacity)
        self.sent: list[tuple[int, ...]] = []
        self.fetched: list[tuple[int, ...]] = []

    def send(self, x: Tensor) -> Tensor:
        self.sent.append(tuple(x.shape))
        return super().send(x)

    def fetch(self, x: Tensor) -> Tensor:
        self.fetched.append(tuple(x.shape))
        return super().fetch(x)


def on_device(
    arch: Architecture,
    dense: Mapping[str, Tensor],
    placement: Placement,
    quant: DenseQuant = "16",
    dtype: torch.dtype = torch.float32,
) -> DenseTensors:
    """The tensors of a checkpoint as the decoder takes them; in float32, unless told otherwise."""
    arena = DenseArena(torch.empty(1 << 22, dtype=torch.uint8))
    there = make_dense(arch, placement.names(arch), quant, dtype, arena)
    for name, target in there.items():
        if isinstance(target, DeviceMatrix):
            target.fill(0, dense[name].float())
        else:
            target.copy_(dense[name])
    return {**dense, **there}


def placed(
    arch: Architecture,
    dense: Mapping[str, Tensor],
    experts: Experts,
    layers: Sequence[bool],
    head: bool = True,
    device: EmulatedDevice | None = None,
    quant: DenseQuant = "16",
    dtype: torch.dtype = torch.float32,
) -> PlacedDecoder:
    placement = Placement(tuple(layers), head and arch.tie_word_embeddings, head, 0, 0, 0, 0)
    tensors = on_device(arch, dense, placement, quant, dtype)
    return PlacedDecoder(arch, tensors, experts, layers, head, device or EmulatedDevice())


def cache_of(
    decoder: PlacedDecoder, layers: Sequence[bool], size: int, near: int, dtype: torch.dtype = torch.float32
) -> KVCache:
    """A cache of which so many positions are on the device."""
    memory = SplitKVMemory(decoder.arch, size, dtype, layers, near, EmulatedDevice())
    return KVCache(decoder.arch, size, dtype, memory)
