"""Device profiles: what the simulator knows of a device. One JSON file each, every figure with where it comes from.

    {"schema_version": 1, "name": "...", "description": "...", "figures": {
        "disk_bytes_per_s": {"value": 2e9, "kind": "measured", "source": "...", "date": "2026-11-22"}, ...}}

kind: measured (on the device), datasheet (of its maker), or derived (from other figures, as `source` says). Units stand
in the names: `_s` seconds, `_bytes` bytes, `_bytes_per_s`, `_s_per_byte`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
KINDS = ("measured", "datasheet", "derived")


@dataclass(frozen=True, slots=True)
class Profile:
    """Figures of one device.

    disk_latency_s: from asking for a read until its bytes begin to come. disk_chunk_bytes: reads are cut into pieces of
    this size. expert_s_per_byte: by width, time to compute an expert for one token, per byte of its weights.
    dense_s_per_byte: the same of all other weights. layer_overhead_s: what a layer of a token takes beside that.
    load_overhead_s: time that computing loses for each read that is asked for.
    """

    name: str
    description: str
    disk_bytes_per_s: float
    disk_latency_s: float
    disk_chunk_bytes: float
    memory_bytes: float
    memory_bytes_per_s: float
    expert_s_per_byte: Mapping[int, float]
    dense_s_per_byte: float
    layer_overhead_s: float
    load_overhead_s: float

    def expert_cost(self, width: int) -> float:
        """Seconds per byte of an expert at `width`, or at the nearest width of which it is known."""
        nearest = min(self.expert_s_per_byte, key=lambda known: (abs(known - width), known))
        return self.expert_s_per_byte[nearest]


_FIGURES = [f.name for f in fields(Profile)][2:]
_MAY_BE_ZERO = ("disk_latency_s", "layer_overhead_s", "load_overhead_s")


def read_profile(path: Path) -> Profile:
    """Raises ValueError with one sentence that names the file and the field, and OSError where it cannot be read."""
    try:
        return parse_profile(json.loads(path.read_bytes()))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a device profile: it is not JSON ({error})") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a device profile: {error}") from None


def parse_profile(data: Any) -> Profile:
    """What a file says, checked. Raises ValueError with the end of a sentence that names the field."""
    content = _object(data, "the whole", {"schema_version", "name", "description", "figures"})
    if content["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version {content['schema_version']!r} is not {SCHEMA_VERSION}")
    for name in ("name", "description"):
        if not isinstance(content[name], str) or not content[name]:
            raise ValueError(f"{name} should be some text")
    figures = _object(content["figures"], "figures", set(_FIGURES))
    values: dict[str, Any] = {}
    for name in _FIGURES:
        figure = _object(figures[name], name, {"value", "kind", "source", "date"})
        if figure["kind"] not in KINDS:
            raise ValueError(f"{name}.kind {figure['kind']!r} is none of {', '.join(KINDS)}")
        if not isinstance(figure["source"], str) or not figure["source"]:
            raise ValueError(f"{name}.source should say where the figure comes from")
        if not isinstance(figure["date"], str) or not re.fullmatch(r"\d{4}-\d\d-\d\d", figure["date"]):
            raise ValueError(f"{name}.date {figure['date']!r} is not a date such as 2026-11-22")
        if name == "expert_s_per_byte":
            values[name] = _by_width(figure["value"], f"{name}.value")
        else:
            values[name] = _number(figure["value"], f"{name}.value", name in _MAY_BE_ZERO)
    return Profile(content["name"], content["description"], **values)


def _object(data: Any, name: str, keys: set[str]) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{name} should be an object")
    for key in sorted(keys - data.keys()):
        raise ValueError(f"{name} lacks {key}")
    for key in sorted(data.keys() - keys):
        raise ValueError(f"{name} has {key}, which is not known")
    return data


def _by_width(data: Any, name: str) -> dict[int, float]:
    if not isinstance(data, dict) or not data:
        raise ValueError(f"{name} should be an object with a figure for each width")
    for width in data:
        if not re.fullmatch(r"[1-9]\d?", width):
            raise ValueError(f"{name} has {width!r}, which is no width")
    return {int(width): _number(value, f"{name}.{width}", False) for width, value in data.items()}


def _number(value: Any, name: str, zero: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} should be a number, not {value!r}")
    if value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} {value:g} should be above zero")
    return float(value)
