"""Source checkpoints: a folder with config.json, tokenizer.json and safetensors files, read but never written.

Tensors are read by position into fresh memory, so that resident memory is what was asked for. Knows file formats only;
what the tensors mean is in source.py. All errors are CheckpointError.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moert.errors import CheckpointError
from moert.store.fileio import as_bytes, opened, read_into
from moert.store.layout import CONFIG_FILE, LENGTH_BYTES, SAFETENSORS_DTYPES, TOKENIZER_FILE

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # what the safetensors library allows
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PICKLE_REASON = "unpickling can run code, so moert does not read them: convert them to safetensors first"
_ELEMENT_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The place of one tensor; `dtype` is the format's own name (BF16, F8_E4M3 ...)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Checkpoint:
    """The files of a checkpoint: `path`, `config` (config.json) and `tensors` by their names in the files."""

    def __init__(self, path: Path, config: dict[str, Any], files: tuple[Path, ...], tensors: dict[str, TensorInfo]):
        self.path = path
        self.config = config
        self.files = files
        self.tensors = tensors

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read all headers and check that every file is whole."""
        if not path.is_dir():
            raise CheckpointError(f"There is no checkpoint folder {path}.")
        weight_map = _find_weights(path)
        config = read_json(path / CONFIG_FILE)
        if not (path / TOKENIZER_FILE).is_file():
            raise CheckpointError(
                f"{path} has no {TOKENIZER_FILE}: save the tokenizer there in the format of the tokenizers library."
            )
        shards: dict[str, list[str]] = {}
        for name, shard in weight_map.items():
            shards.setdefault(shard, []).append(name)
        files = tuple(path / name for name in sorted(shards) or [SINGLE_FILE])
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            found = {info.name: info for info in read_header(file)}
            if shards:  # the index decides: files may hold leftovers that it does not name
                listed = shards[file.name]
                if lost := next((name for name in listed if name not in found), None):
                    raise CheckpointError(f"Tensor {lost} is not in {file}, although {INDEX_FILE} says so.")
                found = {name: found[name] for name in listed}
            tensors.update(found)
        return cls(path, config, files, tensors)

    def read(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop of the first dimension (all by default), in the tensor's own dtype. Reads nothing else."""
        dtype = torch_dtype(info)
        rows = info.shape[0] if info.shape else 1
        start, stop, _ = slice(start, stop).indices(rows)
        row_bytes = info.nbytes // rows if rows else 0
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        result = torch.empty(shape, dtype=dtype)
        try:
            offset = info.offset + start * row_bytes
            with opened(info.file, offset, max(1, result.nbytes)) as fd:
                got = read_into(fd, as_bytes(result), offset)
        except OSError as error:
            raise CheckpointError(f"Cannot read {info.file}: {error.strerror}.") from error
        if got != (stop - start) * row_bytes:
            raise CheckpointError(f"{info.file} ends inside tensor {info.name}: the file was cut short.")
        return result

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the source between two runs: names, sizes and times of its files, and its
        configuration.
        """
        stats = [(file.name, file.stat()) for file in self.files]
        config = (self.path / CONFIG_FILE).read_bytes()
        return {
            "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
            "config_sha256": hashlib.sha256(config).hexdigest(),
        }


def torch_dtype(info: TensorInfo) -> torch.dtype:
    """The dtype of a tensor that moert can read; CheckpointError names one that it cannot."""
    if info.dtype not in SAFETENSORS_DTYPES:
        raise CheckpointError(
            f"Tensor {info.name} in {info.file} has dtype {info.dtype}, but moert reads only"
            f" {', '.join(SAFETENSORS_DTYPES)}: use a checkpoint that is not quantised."
        )
    dtype: torch.dtype = getattr(torch, SAFETENSORS_DTYPES[info.dtype])
    return dtype


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object; CheckpointError where it is missing or something else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}.") from error
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.")
    return value


def _find_weights(path: Path) -> dict[str, str]:
    """The index's map from tensor to file; empty where a single file holds everything."""
    if (path / SINGLE_FILE).is_file():
        return {}
    if not (path / INDEX_FILE).is_file():
        names = sorted(entry.name for entry in path.iterdir())
        if any(name.endswith(".safetensors") for name in names):
            raise CheckpointError(f"{path} has safetensors files but neither {SINGLE_FILE} nor {INDEX_FILE}.")
        if pickled := next((name for name in names if name.endswith(PICKLE_SUFFIXES)), None):
            raise CheckpointError(f"{path} has only pickled weights ({pickled}); {_PICKLE_REASON}.")
        raise CheckpointError(f"{path} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there.")
    weight_map = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path / INDEX_FILE} has no valid weight_map from tensors to files.")
    for name in sorted(set(weight_map.values())):
        # The name alone is judged: the files of a hub cache are symbolic links out of the folder, and must work.
        if name in ("", ".", "..") or any(c in name for c in "/\\\0"):
            raise CheckpointError(f"{path / INDEX_FILE} points outside its folder, to {name!r}: it cannot be trusted.")
        if name.endswith(PICKLE_SUFFIXES):
            raise CheckpointError(f"{path / INDEX_FILE} names pickled weights ({name}); {_PICKLE_REASON}.")
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing, although {INDEX_FILE} names it: download it again.")
    return weight_map


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file, after checking that the header describes the file exactly."""
    try:
        with opened(path) as fd:
            size = os.fstat(fd).st_size
            start = bytearray(LENGTH_BYTES)
            if read_into(fd, memoryview(start), 0) < LENGTH_BYTES:
                raise CheckpointError(f"{path} is too short to be a safetensors file.")
            (length,) = struct.unpack("<Q", start)
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path} is not a safetensors file: its header would take {length} bytes.")
            text = bytearray(length)
            if read_into(fd, memoryview(text), LENGTH_BYTES) < length:
                raise CheckpointError(f"{path} is cut short inside its header: download it again.")
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    try:
        table = json.loads(bytes(text), object_pairs_hook=_unique)
        infos = [_entry(path, k, v, LENGTH_BYTES + length) for k, v in _items(table) if k != "__metadata__"]
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a malformed safetensors header: {error}.") from error
    end = LENGTH_BYTES + length
    for info in sorted(infos, key=lambda i: (i.offset, i.nbytes)):
        if info.offset != end:
            what = "overlaps another tensor" if info.offset < end else "does not follow the tensor before it"
            raise CheckpointError(f"{path} has a malformed safetensors header: {info.name} {what}.")
        end += info.nbytes
    if end != size:
        why = "it was cut short, download it again" if end > size else "bytes follow its last tensor"
        raise CheckpointError(f"{path} is {size} bytes long but its header describes {end}: {why}.")
    return infos


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _items(table: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(table, dict):
        raise ValueError("it is not an object")
    yield from table.items()


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorInfo:
    """One tensor of a header; ValueError with the reason where it is malformed."""
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"the entry of {name} is incomplete") from None
    if not isinstance(dtype, str) or any(type(n) is not int or not 0 <= n < 1 << 63 for n in numbers) or begin > end:
        raise ValueError(f"the entry of {name} has impossible numbers")
    if dtype in _ELEMENT_BYTES and end - begin != math.prod(shape) * _ELEMENT_BYTES[dtype]:
        raise ValueError(f"the size of {name} does not follow from its shape")
    return TensorInfo(name, path, dtype, tuple(shape), data_start + begin, end - begin)
