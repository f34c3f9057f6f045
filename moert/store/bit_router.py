"""bit_router.safetensors: what training found out about widths, beside moert.json. A store is whole without it.

damage     float32 [L, E, B]: of each MoE layer and expert, the harm of each of the store's widths at router weight 1
exponents  float32 [L]: the power of the router weight with which the harm grows
metadata   format, format_version, about: how it was trained, for people, store: CRC-32 of the moert.json that it
           belongs to, crc32: of the two tensors, one behind the other
"""

# L MoE layers, E experts, B widths

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from moert.errors import StoreError
from moert.store.fileio import atomic_file
from moert.store.layout import META_FILE

ROUTER_FILE = "bit_router.safetensors"
_FORMAT = {"format": "moert-bit-router", "format_version": "1"}


@dataclass(frozen=True, eq=False)
class TrainedRouter:
    """damage: float32 [L, E, B]. exponents: float32 [L]. about: how it was trained."""

    sensitivity: NDArray[np.float32]
    exponents: NDArray[np.float32]
    about: str


def _checksum(sensitivity: NDArray[np.float32], exponents: NDArray[np.float32]) -> str:
    return str(zlib.crc32(exponents.tobytes(), zlib.crc32(sensitivity.tobytes())))


def _store_id(store: Path) -> str:
    return str(zlib.crc32((store / META_FILE).read_bytes()))


def write_router(store: Path, router: TrainedRouter) -> None:
    """Put it into the folder of a store, in place of one that is there: it appears whole or not at all."""
    checksum = _checksum(router.sensitivity, router.exponents)
    metadata = {**_FORMAT, "about": router.about, "store": _store_id(store), "crc32": checksum}
    tensors = {"damage": router.sensitivity, "exponents": router.exponents}
    with atomic_file(store / ROUTER_FILE) as file:
        file.write(safetensors.numpy.save(tensors, metadata))


def read_router(store: Path, shape: tuple[int, int, int]) -> TrainedRouter | None:
    """Read the router of a store with so many MoE layers, experts and widths; None where there is none. StoreError if
    damaged.
    """
    path = store / ROUTER_FILE
    if not path.exists():
        return None
    advice = "delete it (its store works without), or run moert train-router again."
    try:
        with safe_open(path, "np") as file:
            metadata, sensitivity, exponents = file.metadata(), file.get_tensor("damage"), file.get_tensor("exponents")
        known = {key: metadata[key] for key in _FORMAT} == _FORMAT
        whole = metadata["crc32"] == _checksum(sensitivity, exponents)
        about, belongs = metadata["about"], metadata["store"] == _store_id(store)
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged: {advice}") from error
    if not known:
        raise StoreError(f"{path} has a format that this moert does not read: {advice}")
    values = np.concatenate([sensitivity.ravel(), exponents.ravel()])
    right = sensitivity.shape == shape and exponents.shape == shape[:1] and values.dtype == np.dtype(np.float32)
    if not whole or not right or not (np.isfinite(values).all() and (exponents > 0).all() and (sensitivity >= 0).all()):
        raise StoreError(f"{path} is damaged: {advice}")
    if not belongs:
        raise StoreError(f"{path} was trained for another store: {advice}")
    return TrainedRouter(sensitivity, exponents, about)
