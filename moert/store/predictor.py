"""predictor.safetensors: what training found out about routes, beside moert.json. A store is whole without it.

Tensors: those of PathWeights in scheduler/predictor.py, by name
metadata  format, format_version, about: how it was trained, for people, model: name of the checkpoint, config: CRC-32
          of the config.json that it belongs to, crc32: of the tensors' bytes in the order of their names. Routes hardly
          depend on how experts were rounded: a predictor fits every store of its checkpoint.
"""

# L MoE layers, E experts, V vocabulary

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from moert.errors import StoreError
from moert.store.fileio import atomic_file
from moert.store.layout import CONFIG_FILE, EMBEDDING
from moert.store.reader import Store

PREDICTOR_FILE = "predictor.safetensors"
_FORMAT = {"format": "moert-predictor", "format_version": "1"}
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class TrainedPredictor:
    """tensors: by name. about: how it was trained."""

    tensors: Arrays
    about: str

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def _shapes(store: Store, found: Arrays) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors, from the model and from those sizes that training may choose."""
    rows = len(store.moe_layers) * store.num_experts
    vocabulary = next(tensor.shape[0] for tensor in store.meta.dense if tensor.name == EMBEDDING)
    width, (inputs, hidden) = found["tokens"].shape[1], found["context"].shape
    routes, rates = found["routes"].shape[1], found["recent"].shape[1]
    return {
        "tokens": (vocabulary, width),
        "token_scales": (vocabulary,),
        "context": (inputs // width * width, hidden),
        "routes": (rows, routes),
        "summary": (routes, hidden),
        "hidden_bias": (hidden,),
        "out": (rows, hidden),
        "out_bias": (rows,),
        "recent": (len(store.moe_layers), rates),
    }


def _checksum(tensors: Arrays) -> str:
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].tobytes(), crc)
    return str(crc)


def _config(store: Store) -> str:
    return str(store.meta.copies[CONFIG_FILE].crc32)


def write_predictor(store: Store, predictor: TrainedPredictor) -> None:
    """Put it into the folder of a store, in place of one that is there: it appears whole or not at all."""
    tensors = dict(predictor.tensors)
    about = {"about": predictor.about, "model": store.meta.source_name, "config": _config(store)}
    with atomic_file(store.path / PREDICTOR_FILE) as file:
        file.write(safetensors.numpy.save(tensors, {**_FORMAT, **about, "crc32": _checksum(tensors)}))


def read_predictor(store: Store) -> TrainedPredictor | None:
    """Read the predictor of a store; None where there is none. StoreError where it is damaged or of another model."""
    path = store.path / PREDICTOR_FILE
    if not path.exists():
        return None
    advice = "delete it (its store works without), or run moert train-predictor again."
    try:
        with safe_open(path, "np") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        known = {key: metadata[key] for key in _FORMAT} == _FORMAT
        about, model, config = metadata["about"], metadata["model"], metadata["config"]
        whole = metadata["crc32"] == _checksum(tensors)
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged: {advice}") from error
    if not known:
        raise StoreError(f"{path} has a format that this moert does not read: {advice}")
    if config != _config(store):
        raise StoreError(f"{path} was trained for {model}, not for {store.meta.source_name}: {advice}")
    if not whole or not _fits(store, tensors):
        raise StoreError(f"{path} is damaged: {advice}")
    return TrainedPredictor(tensors, about)


def _fits(store: Store, tensors: Arrays) -> bool:
    try:
        right = {name: tensor.shape for name, tensor in tensors.items()} == _shapes(store, tensors)
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        return False
    types = {name: np.int8 if name == "tokens" else np.float32 for name in tensors}
    return right and all(t.dtype == types[name] and np.isfinite(t).all() for name, t in tensors.items())
