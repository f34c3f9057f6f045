"""Device profiles: what is known of a device. One JSON file each, every figure with where it comes from.

    {"schema_version": 2, "name": "...", "description": "...", "figures": {"disk_bytes_per_s":
        {"value": 2e9, "kind": "measured", "source": "...", "date": "2026-11-22", "spread": 0.1}, ...}}

kind: measured (on the device), datasheet (of its maker), or derived (from other figures, as `source` says). spread: of
the repetitions, (highest - lowest) / median; what is measured must have it. Units stand in the names and have no
prefixes: `_s` seconds, `_bytes` bytes, `_bytes_per_s`, `_s_per_byte`, `_macs_per_s` multiply-accumulates per second.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 2
KINDS = ("measured", "datasheet", "derived")


_DECODING = ("token_overhead_s", "layer_overhead_s", "miss_overhead_s", "load_overhead_s")


@dataclass(frozen=True, slots=True)
class DiskReads:
    """Random reads of `size_bytes` by so many readers at once: what they read together, and how long one read took."""

    readers: int
    size_bytes: int
    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Figures of one device. date: of the latest of them. None: not known, or the device has no such part.

    disk_bytes_per_s: as the runtime reads, two readers and pieces of disk_chunk_bytes. disk_latency_s: from asking for
    a read until its bytes begin to come. disk_direct: reads can bypass the page cache. memory_bytes: all that programs
    may use. library_bytes: interpreter and libraries, as a budget counts them (with what they will still grow by,
    rounded up). expert_s_per_byte: by width, time to compute an expert for one token, per byte of its weights, out of
    memory. dense_s_per_byte: the same of 8-bit dense weights. prefill_macs_per_s: by width, multiply-accumulates of
    experts with 512 tokens; dense_prefill_macs_per_s: of 8-bit dense weights. attention_macs_per_s: of a prompt's
    attention, where a prompt of T tokens counts for each layer heads * head_dim * T * (T + 1): queries by keys and
    weights by values, of what a token may see alone.

    Of a decoded token, beside reading weights: token_overhead_s once, layer_overhead_s for each layer,
    miss_overhead_s more for a layer in which something is missing, load_overhead_s more for each read. Of a token of an
    answer, answer_overhead_s more: choosing it, its text, the figures of the answer.

    cached_*: the same overheads, and the time per byte of weights, for a model whose weights in memory are cached_bytes
    at most, so that they stay in the processor's caches, and what Python needs beside them. All or none of these.

    gpu_integrated: one memory with the host; then gpu_memory_bytes does not add to memory_bytes. gpu_expert_s_per_byte,
    gpu_prefill_macs_per_s: what the same without gpu_ are for the host. gpu_launch_overhead_s: from asking the GPU to
    compute some experts until it begins. host_to_device_latency_s: from asking for a copy until its bytes move.
    """

    name: str
    description: str
    date: str
    disk_bytes_per_s: float
    disk_latency_s: float
    disk_chunk_bytes: float
    disk_direct: bool
    memory_bytes: float
    memory_bytes_per_s: float
    library_bytes: float
    expert_s_per_byte: Mapping[int, float]
    dense_s_per_byte: float
    prefill_macs_per_s: Mapping[int, float]
    dense_prefill_macs_per_s: float
    attention_macs_per_s: float
    token_overhead_s: float
    layer_overhead_s: float
    miss_overhead_s: float
    load_overhead_s: float
    answer_overhead_s: float | None = None
    cached_bytes: float | None = None
    cached_s_per_byte: float | None = None
    cached_token_overhead_s: float | None = None
    cached_layer_overhead_s: float | None = None
    cached_miss_overhead_s: float | None = None
    cached_load_overhead_s: float | None = None
    disk_reads: tuple[DiskReads, ...] | None = None
    gpu_memory_bytes: float | None = None
    gpu_memory_bytes_per_s: float | None = None
    host_to_device_bytes_per_s: float | None = None
    gpu_integrated: bool | None = None
    gpu_expert_s_per_byte: Mapping[int, float] | None = None
    gpu_prefill_macs_per_s: Mapping[int, float] | None = None
    gpu_launch_overhead_s: float | None = None
    host_to_device_latency_s: float | None = None

    def expert_cost(self, width: int) -> float:
        """Seconds per byte of an expert at `width`, or at the nearest width of which it is known."""
        return _nearest(self.expert_s_per_byte, width)

    def gpu_expert_cost(self, width: int) -> float:
        """Return the seconds per byte of experts on a GPU, of which it must be known."""
        assert self.gpu_expert_s_per_byte is not None
        return _nearest(self.gpu_expert_s_per_byte, width)

    def for_weights(self, nbytes: int) -> Profile:
        """Return the figures that hold for a model with so many bytes of weights in memory."""
        if self.cached_bytes is None or nbytes > self.cached_bytes:
            return self
        cost: float = self.cached_s_per_byte  # type: ignore[assignment]
        overheads: dict[str, Any] = {name: getattr(self, f"cached_{name}") for name in _DECODING}
        return replace(self, expert_s_per_byte={4: cost}, dense_s_per_byte=cost, **overheads)

    def prefill_rate(self, width: int) -> float:
        """Multiply-accumulates per second of experts at `width` with many tokens, or at the nearest width known."""
        return _nearest(self.prefill_macs_per_s, width)


def _nearest(figures: Mapping[int, float], width: int) -> float:
    return figures[min(figures, key=lambda known: (abs(known - width), known))]


_FIELDS = [f for f in fields(Profile) if f.name not in ("name", "description", "date")]
FIGURES = tuple(f.name for f in _FIELDS)
REQUIRED = tuple(f.name for f in _FIELDS if f.default is MISSING)
_GPU = ("gpu_memory_bytes", "gpu_memory_bytes_per_s", "host_to_device_bytes_per_s", "gpu_integrated")
# What no device is below or above, by how a name ends; the first that fits counts.
_LIMITS = {
    "disk_bytes_per_s": (1e6, 1e12),
    "_bytes_per_s": (1e6, 1e14),
    "_s_per_byte": (1e-14, 1e-5),
    "_macs_per_s": (1e6, 1e16),
    "disk_chunk_bytes": (512, 1 << 30),
    "cached_bytes": (1 << 16, 1 << 36),
    "library_bytes": (1 << 20, 1 << 36),
    "memory_bytes": (1 << 26, 1 << 44),
    "_latency_s": (1e-7, 10.0),
    "_overhead_s": (1e-9, 1.0),
}
_MAY_BE_ZERO = ("disk_latency_s", "answer_overhead_s", *_DECODING, *(f"cached_{name}" for name in _DECODING))
_OF_GPU = ("gpu_expert_s_per_byte", "gpu_prefill_macs_per_s", "gpu_launch_overhead_s", "host_to_device_latency_s")
_CACHED = ("cached_bytes", "cached_s_per_byte", *(f"cached_{name}" for name in _DECODING))
_FASTER_THAN_MEMORY = 2.0  # kernels may read faster than what the memory was measured with, but not by this


def read_profile(path: Path) -> Profile:
    """Raises ValueError with one sentence that names the file and the field, and OSError where it cannot be read."""
    try:
        return parse_profile(json.loads(path.read_bytes()))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a device profile: it is not JSON ({error})") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a device profile: {error}") from None


def parse_profile(data: Any) -> Profile:
    """Parse and check the content of a file. Raises ValueError with the end of a sentence that names the field."""
    if isinstance(data, dict) and data.get("schema_version") in range(1, SCHEMA_VERSION):
        raise ValueError(f"schema_version {data['schema_version']} is of an older moert; write it anew: moert profile")
    content = _object(data, "the whole", ("schema_version", "name", "description", "figures"))
    if content["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version {content['schema_version']!r} is not {SCHEMA_VERSION}")
    for name in ("name", "description"):
        if not isinstance(content[name], str) or not content[name].strip():
            raise ValueError(f"{name} should be some text")
    figures = _object(content["figures"], "figures", REQUIRED, FIGURES)
    values: dict[str, Any] = {}
    for name, found in figures.items():
        figure = _object(found, name, ("value", "kind", "source", "date"), (*_FIGURE, "spread"))
        _origin(figure, name)
        read: Callable[[Any, str, str], Any] = _READ.get(name, _number)
        values[name] = read(figure["value"], f"{name}.value", name)
    date = max(figure["date"] for figure in figures.values())
    profile = Profile(name=content["name"], description=content["description"], date=date, **values)
    _together(profile)
    return profile


_FIGURE = ("value", "kind", "source", "date")


def _origin(figure: Mapping[str, Any], name: str) -> None:
    if figure["kind"] not in KINDS:
        raise ValueError(f"{name}.kind {figure['kind']!r} is none of {', '.join(KINDS)}")
    if not isinstance(figure["source"], str) or not figure["source"].strip():
        raise ValueError(f"{name}.source should say where the figure comes from")
    if not isinstance(figure["date"], str) or not re.fullmatch(r"\d{4}-(0\d|1[0-2])-([0-2]\d|3[01])", figure["date"]):
        raise ValueError(f"{name}.date {figure['date']!r} is not a date such as 2026-11-22")
    if "spread" in figure:
        spread = _finite(figure["spread"], f"{name}.spread")
        if spread < 0:
            raise ValueError(f"{name}.spread {spread:g} should not be below zero")
    elif figure["kind"] == "measured":
        raise ValueError(f"{name} lacks spread: (highest - lowest) / median of what was measured")


def _object(data: Any, name: str, required: tuple[str, ...], known: tuple[str, ...] = ()) -> dict[str, Any]:
    """`data` with all `required` keys and no other than those, or than the `known` ones."""
    if not isinstance(data, dict):
        raise ValueError(f"{name} should be an object")
    known = known or required
    for key in sorted(data.keys() - set(known)):
        raise ValueError(f"{name} has {key}, which is not known{_meant(key, known)}")
    for key in required:
        if key not in data:
            raise ValueError(f"{name} lacks {key}")
    return data


_PREFIXES = {f"{prefix}{i}{b}": "bytes" for prefix in "kmgt" for i in ("", "i") for b in ("b", "byte", "bytes")}
_PREFIXES |= {"byte": "bytes", "b": "bytes", "sec": "s", "second": "s", "seconds": "s"}
_PREFIXES |= {"ms": "s", "us": "s", "ns": "s", "gmacs": "macs", "tmacs": "macs", "mmacs": "macs"}


def _meant(key: str, known: tuple[str, ...]) -> str:
    """A guess: units without prefixes, then the closest name."""
    parts = [part.lower() for part in re.split(r"[^A-Za-z0-9]+", key)]
    plain = "_".join(_PREFIXES.get(part, part) for part in parts)
    if plain in known:
        return f"; did you mean {plain}? Units have no prefixes here: bytes and seconds"
    close = difflib.get_close_matches(plain, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _finite(value: Any, name: str) -> float:
    number = float("nan")
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value) if abs(value) < 1e300 else float("inf")
    if not math.isfinite(number):
        raise ValueError(f"{name} should be a number, not {str(value)[:40]!r}")
    return number


def _number(value: Any, name: str, figure: str) -> float:
    """Check a number; the name of the figure says the unit, and so what is possible."""
    number = _finite(value, name)
    if number < 0 or (number == 0 and figure not in _MAY_BE_ZERO):
        raise ValueError(f"{name} {number:g} should be above zero")
    least, most = next(limits for ending, limits in _LIMITS.items() if figure.endswith(ending))
    unit = _unit(figure)
    if 0 < number < least:
        raise ValueError(f"{name} {number:g} is less than any device has ({least:g} {unit}): is it in {unit}?")
    if number > most:
        raise ValueError(f"{name} {number:g} is more than any device has ({most:g} {unit}): is it in {unit}?")
    return number


def _unit(figure: str) -> str:
    units = {"_bytes_per_s": "bytes per second", "_s_per_byte": "seconds per byte", "_bytes": "bytes"}
    units |= {"_macs_per_s": "multiply-accumulates per second", "_s": "seconds"}
    return next(unit for ending, unit in units.items() if figure.endswith(ending))


def _truth(value: Any, name: str, figure: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} should be true or false, not {str(value)[:40]!r}")
    return value


def _by_width(data: Any, name: str, figure: str) -> dict[int, float]:
    if not isinstance(data, dict) or not data:
        raise ValueError(f"{name} should be an object with a figure for each width")
    for width in data:
        if not re.fullmatch(r"[1-9]|1[0-6]", str(width)):
            raise ValueError(f"{name} has {str(width)[:40]!r}, which is no width: bits per weight, from 1 to 16")
    return {int(width): _number(value, f"{name}.{width}", figure) for width, value in data.items()}


def _disk_reads(data: Any, name: str, figure: str) -> tuple[DiskReads, ...]:
    if not isinstance(data, list) or not data:
        raise ValueError(f"{name} should be a list of reads")
    found = []
    for number, item in enumerate(data):
        row = _object(item, f"{name}[{number}]", tuple(f.name for f in fields(DiskReads)))
        for key, most in (("readers", 1024), ("size_bytes", 1 << 34)):
            if type(row[key]) is not int or not 1 <= row[key] <= most:
                raise ValueError(
                    f"{name}[{number}].{key} {str(row[key])[:40]!r} is not a whole number from 1 to {most}"
                )
        rate = _number(row["bytes_per_s"], f"{name}[{number}].bytes_per_s", "disk_bytes_per_s")
        latency = _number(row["latency_s"], f"{name}[{number}].latency_s", "disk_latency_s")
        found.append(DiskReads(row["readers"], row["size_bytes"], rate, latency))
    return tuple(found)


_READ: dict[str, Callable[[Any, str, str], Any]] = {
    "disk_direct": _truth,
    "gpu_integrated": _truth,
    "expert_s_per_byte": _by_width,
    "prefill_macs_per_s": _by_width,
    "gpu_expert_s_per_byte": _by_width,
    "gpu_prefill_macs_per_s": _by_width,
    "disk_reads": _disk_reads,
}


def _together(profile: Profile) -> None:
    """Check what figures say of each other."""
    if profile.disk_bytes_per_s > profile.memory_bytes_per_s:
        raise ValueError("disk_bytes_per_s is more than memory_bytes_per_s: no disk is faster than the memory")
    if profile.library_bytes >= profile.memory_bytes:
        raise ValueError("library_bytes is not less than memory_bytes: nothing would be left")
    fastest = _FASTER_THAN_MEMORY * profile.memory_bytes_per_s
    every = {f"expert_s_per_byte.value.{width}": cost for width, cost in profile.expert_s_per_byte.items()}
    for name, cost in {"dense_s_per_byte": profile.dense_s_per_byte, **every}.items():
        if 1 / cost > fastest:
            raise ValueError(
                f"{name} {cost:g} would be {1 / cost:.3g} bytes per second, but memory_bytes_per_s is less"
            )
    for group, needed in (((*_GPU, *_OF_GPU), _GPU), (_CACHED, _CACHED)):
        there = [name for name in group if getattr(profile, name) is not None]
        for name in needed:
            if there and getattr(profile, name) is None:
                raise ValueError(f"figures lacks {name}, which belongs to {there[0]}")
