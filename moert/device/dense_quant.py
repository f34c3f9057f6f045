"""Brings the dense part of a store into device memory, in 16 bits, INT8 or NF4, as a `Placement` says.

One tensor after the other, and of a large one some rows at a time: host memory never holds a second copy of more than
one tensor.
"""

# N rows (outputs), K columns (inputs)

from __future__ import annotations

import torch
from torch import Tensor

from moert.device.bitsandbytes import bitsandbytes
from moert.device.device_backend import DeviceBackend
from moert.device.matrix import DenseQuant, DeviceMatrix, dtype_of
from moert.device.placement import DenseArena, Placement, make_dense
from moert.models.layers import DenseTensors
from moert.models.stored_model import StoredModel
from moert.quant.matmul import PackedMatrix

_STEP_WEIGHTS = 1 << 22  # brought to the device at a time
_TILE = 16  # rows of a packed matrix come in tiles


def check_quant(quant: DenseQuant) -> None:
    """UsageError where weights like these need a library that is not there: best asked before anything long begins."""
    if quant != "16":
        bitsandbytes()


def load_dense(
    store: StoredModel, placement: Placement, device: DeviceBackend, quant: DenseQuant, dtype: torch.dtype | None = None
) -> DenseTensors:
    """The dense tensors of a store: those of `placement` in memory of the device, the others as `Store.load_dense`.

    dtype: in what the device computes (None: as `dtype_of`). Raises UsageError where bitsandbytes is missing,
    DeviceError where device memory does not suffice, StoreError where a tensor is damaged.
    """
    check_quant(quant)
    names = placement.names(store.architecture)
    arena = DenseArena(device.allocate(placement.dense_bytes))
    there = make_dense(store.architecture, names, quant, dtype or dtype_of(device.torch_device), arena)
    for name, source in store.read_dense(there):
        target = there[name]
        if isinstance(target, DeviceMatrix):
            _fill(target, source, device.torch_device)
        else:
            assert isinstance(source, Tensor)
            target.copy_(source)
    return {**store.load_dense(there), **there}


def _fill(target: DeviceMatrix, source: Tensor | PackedMatrix, torch_device: torch.device) -> None:
    N, K = target.shape
    step = max(_STEP_WEIGHTS // K // _TILE, 1) * _TILE
    for first in range(0, N, step):
        last = min(first + step, N)
        rows = source[first:last].float() if isinstance(source, Tensor) else source.rows(first, last)
        target.fill(first, rows.to(torch_device))


def host_dense_bytes(store: StoredModel, placement: Placement) -> int:
    """Bytes of host memory that the tensors take which stay there."""
    names = set(placement.names(store.architecture))
    return sum(tensor.nbytes for tensor in store.meta.dense if tensor.name not in names)
