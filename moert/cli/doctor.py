"""Check this machine and installation: what moert can use here, and what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from rich.console import Console

from moert import __version__
from moert.config import cache_folder, format_bytes
from moert.errors import MoertError
from moert.hardware.devices import NVIDIA, this_machine
from moert.hardware.jetson import read_jetson
from moert.hub import resolve as source

OPTIONAL = ("bitsandbytes", "triton", "matplotlib", "transformers")
CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm", "sve")


@dataclass(frozen=True)
class Finding:
    """One line. state: `ok`, `note` (works, but not as well as it could) or `broken`."""

    name: str
    value: str
    state: str = "ok"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    findings = [found for check in CHECKS if (found := check()) is not None]
    usable = all(f.state != "broken" for f in findings)
    if args.json:
        print(json.dumps({"usable": usable, "findings": [asdict(f) for f in findings]}))
        return 0 if usable else 1
    console = Console(highlight=False, soft_wrap=True)
    colours = {"ok": "green", "note": "yellow", "broken": "red"}
    for f in findings:
        console.print(f"{f.state:7}", style=colours[f.state], end="")
        console.print(f"{f.name:20}{f.value}", markup=False)
    console.print("moert is usable here." if usable else "moert is not usable here: see what is broken above.")
    return 0 if usable else 1


def _version() -> Finding:
    return Finding("moert", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")


def _torch() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("torch", f"cannot be loaded ({error}): install it again", "broken")
    return Finding("torch", torch.__version__)


def _cpu() -> Finding:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return Finding("CPU", f"{platform.processor() or platform.machine()}, instruction set not known")
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    usable = " ".join(f for f in CPU_FLAGS if f in flags) or "none of the extensions that moert knows"
    return Finding("CPU", f"{fields.get('model name', platform.machine())}: {usable}")


def _kernel() -> Finding:
    try:
        from moert.quant.dispatch import choose_kernel
    except (ImportError, OSError) as error:
        return Finding("kernel", f"cannot be loaded ({error}): install moert again", "broken")
    try:
        name = str(choose_kernel())
    except ValueError as error:
        return Finding("kernel", f"{error}: unset it or name one of these", "broken")
    slow = "reference" in name or "torch" in name
    return Finding(
        "kernel", name + (" (slow: the compiled kernels are missing)" if slow else ""), "note" if slow else "ok"
    )


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("cores", f"{usable} usable, {psutil.cpu_count(logical=False) or '?'} physical in the machine")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    return Finding("memory", f"{format_bytes(memory.total)}, {format_bytes(memory.available)} available")


def _cgroup() -> Finding:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = int(Path(path).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if limit < psutil.virtual_memory().total:
            return Finding("memory limit", f"{format_bytes(limit)} (control group)")
    return Finding("memory limit", "none")


def _cache() -> Finding:
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except (OSError, RuntimeError) as error:
        return Finding("cache", f"cannot be written ({error}): set MOERT_CACHE to a folder that can", "note")
    return Finding("cache", f"{folder}, {format_bytes(free)} free")


def _direct_reads() -> Finding:
    from moert.runtime.transfer import direct_io_works

    try:
        with tempfile.NamedTemporaryFile(dir=cache_folder()) as file:
            file.write(bytes(4096))
            file.flush()
            works = direct_io_works(Path(file.name))
    except (OSError, RuntimeError):
        return Finding("O_DIRECT", "not known: the cache folder cannot be written", "note")
    fallback = "not supported by the cache's file system: reads are buffered, and displace what other programs cached"
    return Finding("O_DIRECT", "works in the cache folder", "ok") if works else Finding("O_DIRECT", fallback, "note")


def _gpu() -> Finding:
    try:
        from moert.device.cuda import describe_cuda

        line, reason = describe_cuda()
    except (ImportError, OSError) as error:
        return Finding("GPU", f"not known: torch or the kernels cannot be loaded ({error})", "note")
    if line:
        return Finding("GPU", f"{line}: cannot be used, since {reason}", "note") if reason else Finding("GPU", line)
    if NVIDIA.exists() or read_jetson() is not None:
        return Finding("GPU", f"cannot be used, since {reason}", "note")
    return Finding("GPU", "none")


def _board() -> Finding | None:
    board = read_jetson()
    if board is None:
        return None
    pack = f" (JetPack {board.jetpack})" if board.jetpack else ""
    return Finding("board", board.model + (f", Jetson Linux {board.release}{pack}" if board.release else ""))


def _power_mode() -> Finding | None:
    board = read_jetson()
    if board is None:
        return None
    if board.mode is None or board.fastest is None:
        return Finding("power mode", "not known: sudo nvpmodel -q shows it")
    if board.mode.speed >= board.fastest.speed:
        return Finding("power mode", f"{board.mode.name}, the fastest")
    faster = f"{board.fastest.name} is faster: sudo nvpmodel -m {board.fastest.number}"
    return Finding("power mode", f"{board.mode.name}; {faster}", "note")


def _clocks() -> Finding | None:
    board = read_jetson()
    clocks = {} if board is None else {"GPU": board.gpu_hz, "memory": board.emc_hz}
    known = [f"{name} {c[0] // 10**6} of {c[1] // 10**6} MHz" for name, c in clocks.items() if c]
    return Finding("clocks", ", ".join(known)) if known else None


def _profile() -> Finding:
    profile, line = this_machine()
    speeds = f"disk {profile.disk_bytes_per_s / 1e9:.1f} GB/s, memory {profile.memory_bytes_per_s / 1e9:.1f} GB/s"
    return Finding("device profile", f"{speeds}: {line.removesuffix('.')}")


def _packages() -> Finding:
    def version(name: str) -> str:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{name} not installed"

    return Finding("optional packages", ", ".join(version(name) for name in OPTIONAL))


def _hub() -> Finding:
    from huggingface_hub.constants import HF_HOME

    token = "set" if os.environ.get("HF_TOKEN") else "not set"
    return Finding("Hugging Face", f"HF_HOME {HF_HOME}, HF_TOKEN {token}")


def _model() -> Finding:
    try:
        return Finding("shipped model", str(source.shipped_model()))
    except MoertError as error:
        return Finding("shipped model", str(error), "note")


CHECKS: tuple[Callable[[], Finding | None], ...] = (
    _version,
    _torch,
    _board,
    _power_mode,
    _clocks,
    _cpu,
    _kernel,
    _cores,
    _memory,
    _cgroup,
    _cache,
    _direct_reads,
    _gpu,
    _profile,
    _packages,
    _hub,
    _model,
)
