"""Writes a store anew with other scales; its codes, its dense weights and all else stay."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from moert import __version__
from moert.errors import StoreError
from moert.models.stored_model import StoredModel
from moert.quant.matmul import PackedExpert, PackedMatrix
from moert.quant.reference import put_scales
from moert.store.fileio import atomic_file, sync_folder, write_json
from moert.store.layout import META_FILE
from moert.store.meta import WeightFile
from moert.store.writer import TensorWriter


def check_out(store: StoredModel, out: Path) -> None:
    """StoreError where `out` cannot become a store."""
    if os.path.lexists(out):
        raise StoreError(f"{out} exists already: delete it or choose another name.")
    if out.resolve().is_relative_to(store.path.resolve()):
        raise StoreError(f"{out} lies inside the store that is read: choose another folder.")


def rescale(
    store: StoredModel,
    out: Path,
    scales: Callable[[int, int], Sequence[Sequence[Tensor]]],
    sensitivity: dict[int, list[list[float]]] | None,
    about: str,
    progress: Callable[[str], None],
) -> StoredModel:
    """Write `store` to the folder `out`, which appears whole or not at all, with the scales that `scales` gives.

    scales(layer, expert): for each slice that is kept of it, those of gate, up and down, float [N, K / G] each.
    sensitivity: with these, as in moert.json. about: is added to the name of the quantiser. Raises StoreError
    where `out` exists or cannot be written.
    """
    check_out(store, out)
    meta, checksums = store.meta, {}
    weights = dict(meta.weights)
    rewritten = {META_FILE, *(meta.expert_file(layer).name for layer in store.moe_layers)}
    try:
        with _folder(out) as folder:
            for path in sorted(store.path.iterdir()):
                if path.name not in rewritten and path.is_file():
                    with open(path, "rb") as source, atomic_file(folder / path.name) as target:
                        shutil.copyfileobj(source, target)
            for number, layer in enumerate(store.moe_layers, 1):
                file = meta.expert_file(layer)
                with atomic_file(folder / file.name) as target:
                    writer = TensorWriter(target, list(file.entries()))
                    rows = []
                    for e in range(store.num_experts):
                        progress(f"writing layer {number} of {len(store.moe_layers)}")
                        rows.append([writer.write([piece]) for piece in _slices(store, layer, e, scales(layer, e))])
                    writer.finish()
                checksums[layer], weights[file.name] = rows, WeightFile(writer.size, writer.data_start)
            changed = replace(
                meta,
                created_by=f"moert {__version__}",
                quantiser=f"{meta.quantiser}; scales trained: {about}",
                weights=weights,
                checksums=checksums,
                sensitivity=sensitivity,
            )
            write_json(folder / META_FILE, changed.as_json())
    except OSError as error:
        raise StoreError(f"Cannot write {out}: {error.strerror}; {store.path} is as it was.") from error
    return StoredModel.open(out)


def _slices(store: StoredModel, layer: int, expert: int, scales: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    slices = store.read_expert(layer, expert)
    packed = PackedExpert.from_slices(slices, store.layout)  # views of the slices
    for m, matrix in enumerate((packed.gate, packed.up, packed.down)):
        assert isinstance(matrix, PackedMatrix)
        for n, piece in enumerate(matrix.slices):
            put_scales(piece, matrix.layout, n, scales[n][m])
    return slices


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that becomes `out` when the block ends, and goes away after an error."""
    folder = out.with_name(out.name + ".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        raise StoreError(f"{folder} is left from a run that was cut off: delete it.") from None
    try:
        yield folder
        if os.path.lexists(out):  # rename would silently replace an empty folder
            raise StoreError(f"{out} has appeared meanwhile: choose another name.")
        os.rename(folder, out)
        sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # made by this run, so all of it is ours
        raise
