"""Keep what was in the arena in a file beside the converted models: names and scores, not the slices themselves.

These are read from the store, in the order in which they lie there. A second copy in one piece was no faster (1.00 GiB:
0.81 s against 0.75 s), takes as much disk as the arena, and 1.7 s to write at the end of each run.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from moert.errors import StoreError
from moert.scheduler.types import ExpertKey
from moert.scheduler.warm import Memory
from moert.store.fileio import atomic_file, json_bytes
from moert.store.layout import META_FILE
from moert.store.reader import Store

VERSION = 1


def write_memory(path: Path, store: Store, memory: Memory) -> None:
    """Write atomically, making the folder if need be. OSError where that is not possible."""
    path.parent.mkdir(parents=True, exist_ok=True)
    value = {
        "version": VERSION,
        "store": _identity(store),
        "resident": [[*key, count] for key, count in memory.resident.items()],
        "worth": [[*key, *(float(f"{value:.4g}") for value in row)] for key, row in memory.reuse_scores.items()],
    }
    with atomic_file(path) as file:
        file.write(json_bytes(value))


def read_memory(path: Path, store: Store) -> Memory:
    """Raises FileNotFoundError where there is none, StoreError with a reason where it cannot be used."""
    try:
        value = json.loads(path.read_bytes())
        if value["version"] != VERSION:
            raise StoreError(f"{path} was written by another version of moert.")
        if value["store"] != _identity(store):
            raise StoreError(f"{path} is of another state of the store.")
        resident = {_key(row, store): _count(row[2], row, store) for row in value["resident"]}
        reuse_scores = {_key(row, store): [_share(x) for x in row[2:]] for row in value["worth"]}
        if len(resident) < len(value["resident"]):
            raise ValueError("an expert twice")
        if any(len(row) > store.kept[key.layer][key.expert] for key, row in reuse_scores.items()):
            raise ValueError("too many slices")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        raise StoreError(f"{path} is damaged.") from None
    return Memory(resident, reuse_scores)


def _identity(store: Store) -> str:
    """Changes with every byte of the store: its description has all checksums."""
    return hashlib.sha256((store.path / META_FILE).read_bytes()).hexdigest()


def _key(row: Any, store: Store) -> ExpertKey:
    layer, expert = row[:2]
    if type(layer) is not int or type(expert) is not int or layer not in store.kept:
        raise ValueError("no such layer")
    if not 0 <= expert < len(store.kept[layer]):
        raise ValueError("no such expert")
    return ExpertKey(layer, expert)


def _count(count: Any, row: Any, store: Store) -> int:
    if type(count) is not int or not 1 <= count <= store.kept[row[0]][row[1]]:
        raise ValueError("no such slices")
    return count


def _share(x: Any) -> float:
    if type(x) not in (int, float) or not 0 <= x <= 1e6:
        raise ValueError("not a score")
    return float(x)
