"""moert.json: everything about a store that its other files do not say, read with types and no silent default.

format            "moert-store"
format_version    2; version 1, without `code`, is still read
created_by        program and version
source            {name, model_type} of the checkpoint
quantiser         name of the method that chose the codes
widths            ascending bits per weight, or [16]: experts as they are in the source
code              "linear" or "trellis": how codes stand for weights (quant/format.py)
group_size        weights that share a scale in the linear code, inputs transformed together in the trellis code
dense_bits        4, 6, 8 or 16
experts           {layers: [MoE layers], count, hidden, inner, dtype of the source}
dense             canonical name -> {shape, width: 8} or {shape, dtype}, with crc32, in the file's order
weights           file -> {size, data_start: where tensor data begin}, in bytes
copies            config.json and tokenizer.json -> {size, crc32}
checksums         layer -> expert -> slice that is kept: CRC-32 of the padded slice
kept              optional; layer -> expert: how many slices are kept of it, at least 1; absent: all of all
sensitivity       optional; layer -> expert -> width, stored or not: what the expert adds to the harm of a token that
                  gives it the router weight 1 (one that gives it w suffers w^2 times as much). See convert/harm.py.
kl                optional; width -> nats per token that the whole model loses there (mean KL from its source), on the
                  calibration text
router_weights    optional; layer -> expert: how many tokens of the text are routed to it, and 17
                  quantiles, from least to largest, of the router weights that they give it (zeros where there are none)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moert.errors import StoreError
from moert.quant.format import LINEAR, RAW_DTYPE_BYTES, ExpertLayout, MatrixLayout, check_widths
from moert.store.layout import (
    CONFIG_FILE,
    DENSE_FILE,
    DENSE_WIDTHS,
    TOKENIZER_FILE,
    DenseTensor,
    ExpertFile,
    experts_file,
)

FORMAT = "moert-store"
FORMAT_VERSION = 2
QUANTILES = 16  # steps from the least router weight of an expert to the largest
_INT32 = 1 << 32


@dataclass(frozen=True, slots=True)
class WeightFile:
    """`size` of a file and where its tensor data begin, in bytes."""

    size: int
    data_start: int


@dataclass(frozen=True, slots=True)
class CopiedFile:
    size: int
    crc32: int


@dataclass(frozen=True)
class StoreMeta:
    """The contents of moert.json."""

    created_by: str
    source_name: str
    model_type: str
    quantiser: str
    group_size: int
    dense_bits: int
    moe_layers: tuple[int, ...]
    num_experts: int
    layout: ExpertLayout
    dense: tuple[DenseTensor, ...]
    dense_checksums: tuple[int, ...]
    weights: Mapping[str, WeightFile]
    copies: Mapping[str, CopiedFile]
    checksums: Mapping[int, Sequence[Sequence[int]]]
    sensitivity: dict[int, list[list[float]]] | None = None
    router_weights: dict[int, list[list[float]]] | None = None
    kept: Mapping[int, Sequence[int]] | None = None
    kl: tuple[float, ...] | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        return self.layout.widths

    def expert_file(self, layer: int) -> ExpertFile:
        """Return the layout of the file with the experts of a layer."""
        return ExpertFile(layer, self.num_experts, self.layout, tuple(self.kept[layer]) if self.kept else None)

    def as_json(self) -> dict[str, Any]:
        """The object that `parse` reads back."""
        kinds = [{"dtype": t.dtype} if t.packed is None else {"width": t.packed.widths[-1]} for t in self.dense]
        optional: dict[str, Any] = {}
        for name in ("sensitivity", "router_weights"):
            if (table := getattr(self, name)) is not None:
                optional[name] = {str(layer): rows for layer, rows in table.items()}
        if self.kl is not None:
            optional["kl"] = list(self.kl)
        if self.kept is not None:
            optional["kept"] = {str(layer): list(counts) for layer, counts in self.kept.items()}
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "created_by": self.created_by,
            "source": {"name": self.source_name, "model_type": self.model_type},
            "quantiser": self.quantiser,
            "widths": list(self.widths),
            "code": self.layout.code,
            "group_size": self.group_size,
            "dense_bits": self.dense_bits,
            "experts": {
                "layers": list(self.moe_layers),
                "count": self.num_experts,
                "hidden": self.layout.hidden,
                "inner": self.layout.inner,
                "dtype": self.layout.raw_dtype,
            },
            "dense": {
                t.name: {"shape": list(t.shape), **kind, "crc32": crc}
                for t, kind, crc in zip(self.dense, kinds, self.dense_checksums, strict=True)
            },
            "weights": {name: asdict(file) for name, file in self.weights.items()},
            "copies": {name: asdict(file) for name, file in self.copies.items()},
            "checksums": {str(layer): list(map(list, sums)) for layer, sums in self.checksums.items()},
            **optional,
        }


class _Fields:
    """Typed access to one JSON object; errors name the file and the path of the field."""

    def __init__(self, value: Any, file: Path, where: str = "") -> None:
        self.file, self.where = file, where
        if not isinstance(value, dict):
            raise self.error("", "is not an object")
        self.value: dict[str, Any] = value

    def error(self, key: str, what: str) -> StoreError:
        field = ".".join(part for part in (self.where, key) if part) or "the whole"
        return StoreError(f"{self.file} is damaged: {field} {what}; convert the model again.")

    def get(self, key: str) -> Any:
        if key not in self.value:
            raise self.error(key, "is missing")
        return self.value[key]

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str):
            raise self.error(key, "is not a string")
        return value

    def number(self, key: str, below: int = 1 << 63) -> int:
        value = self.get(key)
        if type(value) is not int or not 0 <= value < below:
            raise self.error(key, f"is not a whole number from 0 to {below - 1}")
        return value

    def numbers(self, key: str) -> tuple[int, ...]:
        value = self.get(key)
        if not isinstance(value, list) or any(type(n) is not int or n < 0 for n in value):
            raise self.error(key, "is not a list of whole numbers")
        return tuple(value)

    def fields(self, key: str) -> _Fields:
        return _Fields(self.get(key), self.file, f"{self.where}.{key}" if self.where else key)


def read_meta(file: Path) -> StoreMeta:
    """Read and check moert.json; StoreError names the field that is missing or wrong."""
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise StoreError(f"{file.parent} is not a moert store: it has no {file.name}.") from error
    except OSError as error:
        raise StoreError(f"Cannot read {file}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{file} is damaged: it is not valid JSON; convert the model again.") from error
    return parse(value, file)


def parse(value: Any, file: Path) -> StoreMeta:
    """Check the contents of moert.json; `file` is named in errors."""
    top = _Fields(value, file)
    if top.text("format") != FORMAT:
        raise top.error("format", f"is not {FORMAT}")
    version = top.number("format_version")
    if not 1 <= version <= FORMAT_VERSION:
        raise StoreError(
            f"{file} has format version {version}, but this moert reads versions 1 to {FORMAT_VERSION} only:"
            " update moert or convert the model again."
        )
    experts, source = top.fields("experts"), top.fields("source")
    group_size, dense_bits = top.number("group_size"), top.number("dense_bits")
    if dense_bits not in (*DENSE_WIDTHS, 16):
        raise top.error("dense_bits", f"is none of {', '.join(map(str, DENSE_WIDTHS))} and 16")
    try:
        widths = check_widths(top.numbers("widths"))
        hidden, inner = experts.number("hidden"), experts.number("inner")
        code = top.text("code") if version > 1 else LINEAR
        layout = ExpertLayout(hidden, inner, group_size, widths, experts.text("dtype"), code)
    except ValueError as error:
        raise top.error("widths, code, group_size or experts", f"is wrong ({error})") from error
    layers, count = experts.numbers("layers"), experts.number("count")
    if list(layers) != sorted(set(layers)):
        raise experts.error("layers", "does not ascend")
    dense = top.fields("dense")
    tensors = tuple(_dense_tensor(dense.fields(name), name, group_size) for name in dense.value)
    checksums = top.fields("checksums")
    weights, copies = top.fields("weights"), top.fields("copies")
    kept = _kept(top.fields("kept"), layers, count, len(widths)) if "kept" in value else None
    slices = {layer: kept[layer] if kept else [len(widths)] * count for layer in layers}
    return StoreMeta(
        created_by=top.text("created_by"),
        source_name=source.text("name"),
        model_type=source.text("model_type"),
        quantiser=top.text("quantiser"),
        group_size=group_size,
        dense_bits=dense_bits,
        moe_layers=layers,
        num_experts=count,
        layout=layout,
        dense=tensors,
        dense_checksums=tuple(dense.fields(t.name).number("crc32", _INT32) for t in tensors),
        weights={
            name: WeightFile(weights.fields(name).number("size"), weights.fields(name).number("data_start"))
            for name in (DENSE_FILE, *map(experts_file, layers))
        },
        copies={
            name: CopiedFile(copies.fields(name).number("size"), copies.fields(name).number("crc32", _INT32))
            for name in (CONFIG_FILE, TOKENIZER_FILE)
        },
        checksums={layer: _slice_checksums(checksums, layer, slices[layer]) for layer in layers},
        kept=kept,
        sensitivity=_table(top, "sensitivity", layers, count, len(widths), "an error"),
        router_weights=_table(top, "router_weights", layers, count, 2 + QUANTILES, "a weight"),
        kl=_kl(top, len(widths)),
    )


def _dense_tensor(fields: _Fields, name: str, group_size: int) -> DenseTensor:
    shape = fields.numbers("shape")
    if "width" not in fields.value:
        if (dtype := fields.text("dtype")) not in RAW_DTYPE_BYTES:
            raise fields.error("dtype", f"is not one of {', '.join(RAW_DTYPE_BYTES)}")
        return DenseTensor(name, shape, dtype, None)
    width = fields.number("width")
    if width not in DENSE_WIDTHS or len(shape) != 2:
        raise fields.error("width", f"is none of {', '.join(map(str, DENSE_WIDTHS))} for a matrix")
    try:
        return DenseTensor(name, shape, "uint8", MatrixLayout(shape[0], shape[1], group_size, (width,)))
    except ValueError as error:
        raise fields.error("shape", f"is wrong ({error})") from error


def _table(
    top: _Fields, key: str, layers: Sequence[int], num_experts: int, length: int, what: str
) -> dict[int, list[list[float]]] | None:
    """`length` numbers for each expert of each layer; None where there is no such object."""
    if key not in top.value:
        return None
    fields = top.fields(key)
    for layer in layers:
        rows = fields.get(str(layer))
        if not isinstance(rows, list) or len(rows) != num_experts:
            raise fields.error(str(layer), f"is not a list of {num_experts} experts")
        if any(not isinstance(row, list) or len(row) != length for row in rows):
            raise fields.error(str(layer), f"does not have {length} numbers for each expert")
        if any(type(n) is not float or not 0 <= n < math.inf for row in rows for n in row):
            raise fields.error(str(layer), f"has {what} that is not a number from 0 on")
    return {layer: fields.get(str(layer)) for layer in layers}


def _kl(top: _Fields, length: int) -> tuple[float, ...] | None:
    if "kl" not in top.value:
        return None
    found = top.get("kl")
    if not isinstance(found, list) or len(found) != length:
        raise top.error("kl", f"is not a list of {length} numbers")
    if any(type(n) is not float or not 0 <= n < math.inf for n in found):
        raise top.error("kl", "has a divergence that is not a number from 0 on")
    return tuple(found)


def _kept(fields: _Fields, layers: Sequence[int], num_experts: int, num_slices: int) -> dict[int, tuple[int, ...]]:
    kept = {layer: fields.numbers(str(layer)) for layer in layers}
    for layer, counts in kept.items():
        if len(counts) != num_experts or not all(1 <= n <= num_slices for n in counts):
            raise fields.error(str(layer), f"is not a list of {num_experts} numbers of slices from 1 to {num_slices}")
    return kept


def _slice_checksums(fields: _Fields, layer: int, counts: Sequence[int]) -> list[list[int]]:
    value = fields.get(str(layer))
    if not isinstance(value, list) or len(value) != len(counts):
        raise fields.error(str(layer), f"is not a list of {len(counts)} experts")
    for sums, count in zip(value, counts, strict=True):
        if not isinstance(sums, list) or len(sums) != count:
            raise fields.error(str(layer), f"does not have {count} checksums for each expert")
        if any(type(n) is not int or not 0 <= n < _INT32 for n in sums):
            raise fields.error(str(layer), "has a checksum that is not a 32-bit number")
    return value
