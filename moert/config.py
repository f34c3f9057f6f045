"""Settings of one run, and sizes as people write them."""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Self, TypedDict, TypeVar

from moert.errors import UsageError

DEVICES = ("auto", "cpu", "cuda", "emulated", "interpreter")
DENSE_QUANTS = ("16", "int8", "nf4", "off")
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {"ki": 1024, "mi": 1024**2, "gi": 1024**3, "ti": 1024**4}
DEFAULT_CTX_SIZE = 4096
AUTO_BATCH = 16
AUTO = "auto"  # as a memory budget: moert plans for this machine, and chooses precision and context too
PREFILL_CHUNK = 512  # tokens per forward pass of a prompt: bounds the workspace
_MAX_COUNT = 2**31 - 1  # tokens
_MAX_FEW = 1024  # threads, and prompts that run together: more than any machine has use for
_MAX_SIZE = 2**63 - 1

Size = int | float | str  # bytes, or text such as "2GiB"
T = TypeVar("T")


def cache_folder() -> Path:
    """Where converted models are kept: $MOERT_CACHE, else $XDG_CACHE_HOME/moert, else ~/.cache/moert."""
    if own := os.environ.get("MOERT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moert"


def parse_bytes(value: object, what: str = "size") -> int:
    """Read a size: a number of bytes, or text such as `2GiB`, `1500MB` or `800M`. Raises UsageError for others."""
    size = None
    if isinstance(value, Integral) and not isinstance(value, bool):
        size = int(value)
    elif isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        size = int(float(value))
    elif isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", value, re.I)):
        unit = _UNITS.get(match[2].lower())
        if unit is not None:
            size = int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    if size is None:
        raise UsageError(f"{what} {value!r} is not a size; write for example 2GiB, 1500MB or a number of bytes.")
    if size <= 0:
        raise UsageError(f"{what} {value!r} must be above zero.")
    if size > _MAX_SIZE:
        raise UsageError(f"{what} {value!r} is more than any machine has.")
    return size


def parse_budget(value: object, what: str = "memory-budget") -> int | None:
    """Read a memory budget; None where it is left to moert: `auto`, or not given."""
    return None if value is None or value == AUTO else parse_bytes(value, what)


def format_bytes(size: float) -> str:
    """Write a size for people: `1.50 GiB`, `12.0 MiB`, `512 B`."""
    for unit, digits in (("B", 0), ("KiB", 1), ("MiB", 1)):
        if abs(size) < 1024:
            return f"{size:.{digits}f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """End a message on an unknown name: the nearest known one as a question, or else `otherwise`."""
    marks = "-/"  # what stands before an option or a command of the chat makes no names alike
    names, name = {n.lstrip(marks): n for n in known}, name.lstrip(marks)
    longer = [n for n in names if len(name) > 2 and n.startswith(name)]
    close = difflib.get_close_matches(name, names, n=1) or longer
    return f"; did you mean {names[close[0]]}?" if close else otherwise


@dataclass(frozen=True, slots=True)
class Setting:
    """How a field of `EngineConfig` is read, and what the command line and the documentation say of it.

    read: turns what a caller gave into the field's value, or raises UsageError; its first argument names the setting.
    group: heading that its option stands under. short: another spelling of the option.
    """

    help: str
    read: Callable[[str, Any], Any]
    group: str
    metavar: str | None
    short: str | None


def _setting(
    default: T, read: Callable[[str, Any], Any], help: str, *, group: str, metavar: str | None = None, short: str = ""
) -> T:
    """Declare a field of `EngineConfig`."""
    found: T = field(default=default, metadata={"setting": Setting(help, read, group, metavar, short or None)})
    return found


def _size(what: str, value: Any) -> int:
    return parse_bytes(value, what)


def _budget(what: str, value: Any) -> int | None:
    return parse_budget(value, what)


def _count(what: str, value: Any, most: int = _MAX_COUNT) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,20}\s*", value):
        value = int(value)
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise UsageError(f"{what} {value!r} is not a whole number.")
    count = int(value)
    if not 1 <= count <= most:
        raise UsageError(f"{what} {count} must be at {f'most {most}' if count > most else 'least 1'}.")
    return count


def _few(what: str, value: Any) -> int:
    return _count(what, value, _MAX_FEW)


def _text(what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{what} {value!r} is not text, such as 'fixed:4'.")
    return value


def _switch(what: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{what} {value!r} is neither True nor False.")
    return value


def _one_of(*choices: T) -> Callable[[str, Any], T]:
    """Make a reader of one of `choices`; a number and its digits are alike."""

    def read(what: str, value: Any) -> T:
        if isinstance(value, (str, Integral)) and not isinstance(value, bool):
            for choice in choices:
                if str(value) == str(choice):
                    return choice
        *others, last = (str(choice) for choice in choices)
        raise UsageError(f"{what} {value!r} is not known; it can be {', '.join(others)} or {last}.")

    return read


MEMORY, DEVICE, PROMPTS = "memory and speed", "device", "several prompts"
STREAMING = "streaming of experts (for experiments)"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of an engine; None means that moert chooses.

    Each field says in its metadata what it means, how it is read, and how the command line shows it: the options and
    the keyword arguments of `LLM` are made from here. Sizes are taken in bytes or as text such as "2GiB". Raises
    UsageError for bad values.
    """

    memory_budget: int | None = _setting(
        None,
        _budget,
        "memory for everything, such as 2GiB; auto also chooses precision and context for this machine",
        group=MEMORY,
        metavar="SIZE",
    )
    expert_budget: int | None = _setting(
        None, _size, "memory for experts alone (for experiments)", group=MEMORY, metavar="SIZE"
    )
    precision: str | None = _setting(
        None,
        _text,
        "bits per weight of the experts: fixed:4; routed:3 for a mean that the router divides; elastic:3 for at least "
        "the quality of 3 bits from what is in memory, not reproducible (default: the least width stored from 4 bits "
        "on). elastic takes two more: elastic:3,skip=0.05 leaves out missing experts that weigh less, "
        "elastic:3,route=0.1 prefers experts in memory, which can go below that quality",
        group=MEMORY,
        metavar="POLICY",
    )
    ctx_size: int | None = _setting(
        None,
        _count,
        f"context length in tokens (default: the model's, at most {DEFAULT_CTX_SIZE})",
        group=MEMORY,
        metavar="N",
        short="-c",
    )
    kv_bits: int | None = _setting(
        None, _one_of(8, 16), "bits of cached keys and values (default 16)", group=MEMORY, metavar="8|16"
    )
    threads: int | None = _setting(
        None, _few, "threads to compute with (default: physical cores)", group=MEMORY, metavar="N", short="-t"
    )
    batch_size: int | None = _setting(
        1,
        _few,
        "prompts that run together, each with a context of its own (default: as many as share one context, at most "
        f"{AUTO_BATCH})",
        group=PROMPTS,
        metavar="N",
    )
    cache_policy: str = _setting(
        "score",
        _one_of("score", "lru", "lfu"),
        "which experts make room for others: score, lru, lfu",
        group=STREAMING,
        metavar="NAME",
    )
    load_order: str = _setting(
        "hottest",
        _one_of("hottest", "number"),
        "order in which experts are read: hottest, number",
        group=STREAMING,
        metavar="NAME",
    )
    prefetch: str = _setting(
        "auto",
        _one_of("auto", "off", "1", "2", "3"),
        "layers to read ahead for: auto, off, 1, 2, 3",
        group=STREAMING,
        metavar="N",
    )
    overlap: bool = _setting(True, _switch, "compute experts while others are read (default yes)", group=STREAMING)
    device: str = _setting(
        "auto",
        _one_of(*DEVICES),
        "auto (a GPU if one can be used), cpu, cuda; slow, for tests: emulated, interpreter",
        group=DEVICE,
        metavar="KIND",
    )
    device_budget: int | None = _setting(
        None, _size, "memory of the device to use, such as 4GiB (default: 80% of what is free)", group=DEVICE,
        metavar="SIZE",
    )  # fmt: skip
    hybrid: bool = _setting(
        True,
        _switch,
        "let the CPU compute experts beside the device (default yes); without, slower but the same text every time",
        group=DEVICE,
    )
    dense_quant: str = _setting(
        "16",
        _one_of(*DENSE_QUANTS),
        "everything but the experts on the device: 16 (bits), int8, nf4, or off to leave it on the host",
        group=DEVICE,
        metavar="KIND",
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None or "None" not in str(f.type):
                object.__setattr__(self, f.name, f.metadata["setting"].read(f.name.replace("_", "-"), value))

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """Read settings by name. Raises UsageError for an unknown one, with the nearest that is known."""
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                raise UsageError(f"There is no setting {name!r}{did_you_mean(name, known, '; see help(moert.LLM).')}")
        return cls(**settings)


class Settings(TypedDict, total=False):
    """Keyword arguments of `LLM`: the fields of `EngineConfig`, with the types that a caller may give."""

    memory_budget: Size | None
    expert_budget: Size | None
    precision: str | None
    ctx_size: int | None
    kv_bits: int | None
    threads: int | None
    batch_size: int | None
    cache_policy: str
    load_order: str
    prefetch: str
    overlap: bool
    device: str
    device_budget: Size | None
    hybrid: bool
    dense_quant: str


def document_settings(cls: type[T]) -> type[T]:
    """List the settings of `EngineConfig` at the end of a class's docstring."""
    if cls.__doc__ is not None:  # with -OO there is none
        texts = (f"{f.name}: {f.metadata['setting'].help}" for f in fields(EngineConfig))
        lines = (textwrap.fill(t, 116, initial_indent="    ", subsequent_indent=" " * 8) for t in texts)
        cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__), "", "Settings:", *lines])
    return cls
