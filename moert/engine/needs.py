"""The memory that a model needs, by its settings; before any of it is loaded."""

from __future__ import annotations

import torch

from moert.device.dense_quant import host_dense_bytes
from moert.device.kv_memory import SplitKVMemory
from moert.device.offload import Offload
from moert.models.kv_cache import KVCache
from moert.models.stored_model import StoredModel as Store
from moert.quant.format import KEY_BLOCK, align
from moert.runtime.budget import Needs, workspace_bytes


def needs_of(
    store: Store,
    kv_bits: int | None,
    ctx_size: int,
    slices: int,
    libraries: int,
    batch_size: int | None = 1,
    alive: int = 1,
    offload: Offload | None = None,
) -> Needs:
    """What a model with this context needs whose experts have up to `slices` slices, for `alive` sequences.

    Of host memory, where some of it is on a device.
    """
    arch, contexts, dtype = store.architecture, batch_size or 1, kv_dtype(store, kv_bits)
    dense, kv_cache = store.dense_bytes, contexts * KVCache.bytes_for(arch, ctx_size, dtype)
    shared = 0, 0, 0
    if offload is not None:
        placed, shared = offload.placement, offload.shared_bytes
        dense = host_dense_bytes(store, placed)
        positions = contexts * align(ctx_size, KEY_BLOCK)
        kv_cache = SplitKVMemory.host_bytes_for(arch, positions, dtype, placed.layers, placed.kv_positions)
    return Needs(
        libraries=libraries,
        dense=dense + shared[0],
        kv_cache=kv_cache + shared[1],
        workspace=workspace_bytes(arch, ctx_size, alive) + shared[2],
        one_expert=sum(size for i, size in enumerate(store.layout.slice_sizes[:slices]) if store.experts_with(i)),
        all_experts=store.experts_bytes(slices),
    )


def kv_dtype(store: Store, kv_bits: int | None) -> torch.dtype:
    """The type of cached keys and values with so many bits, None: the default of such a store."""
    if kv_bits is not None:
        return torch.int8 if kv_bits == 8 else torch.float16
    # A lossless store is the reference that others are compared with: its cache rounds nothing either.
    return torch.float32 if store.layout.raw and store.meta.dense_bits == 16 else torch.float16
