"""Settings of one run, and sizes as people write them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from moert.errors import UsageError

DEVICES = ("auto", "cpu", "cuda", "emulated", "interpreter")
DENSE_QUANTS = ("16", "int8", "nf4", "off")
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {"ki": 1024, "mi": 1024**2, "gi": 1024**3, "ti": 1024**4}
DEFAULT_CTX_SIZE = 4096
AUTO_BATCH = 16
AUTO = "auto"  # as a memory budget: what the plan for this machine says, of precision and context too
PREFILL_CHUNK = 512  # tokens per forward pass of a prompt: bounds the workspace


def cache_folder() -> Path:
    """Where converted models are kept: $MOERT_CACHE, else $XDG_CACHE_HOME/moert, else ~/.cache/moert."""
    if own := os.environ.get("MOERT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moert"


def parse_bytes(value: int | str, what: str = "size") -> int:
    """Read a size such as `2GiB`, `1500MB`, `800M` or a number of bytes. Raises UsageError for anything else."""
    if isinstance(value, int):
        size = value
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", value, re.IGNORECASE)
        if match is None or match[2].lower() not in _UNITS:
            raise UsageError(f"{what} {value!r} is not a size; write for example 2GiB, 1500MB or a number of bytes.")
        unit = _UNITS[match[2].lower()]
        size = int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    if size <= 0:
        raise UsageError(f"{what} {value!r} must be above zero.")
    return size


def parse_budget(value: int | str | None) -> int | None:
    """The memory budget; None where it is left to moert: `auto`, or not given."""
    return None if value in (None, AUTO) else parse_bytes(value, "memory-budget")  # type: ignore[arg-type]


def format_bytes(size: float) -> str:
    """A size for people: `1.50 GiB`, `12.0 MiB`, `512 B`."""
    for unit, digits in (("B", 0), ("KiB", 1), ("MiB", 1)):
        if abs(size) < 1024:
            return f"{size:.{digits}f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The settings that the user asked for; None leaves the choice to moert.

    memory_budget: bytes for everything. expert_budget: bytes of the expert arena alone. precision: policy such as
    `fixed:4` or `routed:3`. ctx_size: tokens that the KV cache holds. threads: of the kernels. kv_bits: 8 or 16, of the
    KV cache. cache_policy, load_order: which slices go first when room is needed, and in which order they are read.
    prefetch: `auto`, `off`, or for how many layers ahead. overlap: whether experts compute while others are read.
    batch_size: sequences that are decoded together, each with a context of its own; None: up to AUTO_BATCH that share
    the KV cache of one context. token_scheduler: a policy of `moert.scheduler.batching`. device: `auto` (a GPU where
    one can be used), `cpu`, `cuda`, or without hardware `emulated` and `interpreter`. device_budget: bytes of its
    memory. hybrid: whether the host's cores compute experts beside the device. dense_quant: how everything but the
    experts lies on the device: `16` bits, `int8`, `nf4`, or `off`, which leaves it on the host. Raises UsageError for
    bad values.
    """

    memory_budget: int | None = None
    expert_budget: int | None = None
    precision: str | None = None
    ctx_size: int | None = None
    threads: int | None = None
    kv_bits: int | None = None
    cache_policy: str = "score"
    load_order: str = "hottest"
    prefetch: str = "auto"
    overlap: bool = True
    batch_size: int | None = 1
    token_scheduler: str = "first-come"
    device: str = "auto"
    device_budget: int | None = None
    hybrid: bool = True
    dense_quant: str = "16"

    def __post_init__(self) -> None:
        for name in ("memory_budget", "expert_budget", "ctx_size", "threads", "batch_size", "device_budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name.replace('_', '-')} {value} must be at least 1.")
        if self.kv_bits not in (None, 8, 16):
            raise UsageError(f"kv-bits {self.kv_bits} is not 8 or 16.")
        for name, known in (("device", DEVICES), ("dense_quant", DENSE_QUANTS)):
            if (value := getattr(self, name)) not in known:
                raise UsageError(f"{name.replace('_', '-')} {value!r} is none of {', '.join(known)}.")
        if self.prefetch not in ("auto", "off", "1", "2", "3"):
            raise UsageError(f"prefetch {self.prefetch!r} is not auto, off, 1, 2 or 3.")
