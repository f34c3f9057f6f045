"""Measure this machine in under two minutes: disk, memory, kernels, what decoding takes beside them, a GPU. The figures
are kept in a device profile, which moert uses from then on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moert.cli import common
from moert.cli.options import add_settings
from moert.cli.progress import line_progress
from moert.cli.status import Status
from moert.config import format_bytes
from moert.errors import ProfileError, UsageError
from moert.hardware.devices import own_file
from moert.hub.resolve import Conversion, find

if TYPE_CHECKING:
    from collections.abc import Mapping

STDOUT = "-"
COLUMNS = ("figure", "value", "kind", "spread")
_BUSY = 0.5  # load from which on figures suffer


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", metavar="STORE", help="measure the disk and the layout of this store")
    parser.add_argument(
        "--disk", type=Path, metavar="FOLDER", help="measure the disk of this folder, with a file that is deleted again"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="write the profile there (default: where moert finds it); -: print it"
    )
    parser.add_argument("--name", default="this-machine", help="name of the device in the profile")
    add_settings(parser, ["threads"])
    parser.add_argument("--json", action="store_true", help="print the profile instead of a table of it")
    common.add_status_options(parser)


def main(args: argparse.Namespace) -> int:
    status = Status.of(args)
    if not args.name.strip():
        raise UsageError("--name must not be empty.")
    if args.model is not None and args.disk is not None:
        raise UsageError("Give either -m or --disk, since each names the disk to measure.")
    store = None
    if args.model is not None:
        store = find(args.model, Conversion()) or find(args.model, Conversion(fast=True))
    if args.model is not None and store is None:
        raise UsageError(f"{args.model} is neither a store nor converted yet: run moert convert first.")
    with status.spinner("Loading moert"):
        from moert.engine.model_runner import default_threads
        from moert.measure import profile as measure
    common.check_kernel()
    try:
        path = None if args.out == STDOUT else own_file() if args.out is None else Path(args.out).expanduser()
    except RuntimeError as error:
        raise ProfileError(f"There is no folder to keep the profile in ({error}); name a file with --out.") from None
    if path is not None:
        measure.check_writable(path)
    _say_if_busy(status)
    with line_progress(status) as progress:
        threads = args.threads or default_threads()
        content = measure.measure_device(args.name, store, args.disk, threads, progress, status.say)
    if path is None or args.json:
        print(measure.as_text(content), end="")
    else:
        _print_table(content)
    if path is not None:
        try:
            measure.write_profile(path, content)
        except ProfileError:
            if not args.json:  # two minutes' work is not thrown away
                print(measure.as_text(content), end="")
            raise
        use = "moert uses it from now on" if path == own_file() else f"use it with --profile {path}"
        status.say(f"written to {path}: {use}")
    return 0


def _say_if_busy(status: Status) -> None:
    from moert.measure.bench_kernels import load_average

    load = load_average()
    if load is not None and load > _BUSY:
        status.say(f"other programs were busy in the last minute (load {load:.1f}), so figures may be too low")


def _print_table(content: Mapping[str, Any]) -> None:
    common.print_cells(COLUMNS)
    common.print_cells(["---", "---:", "---", "---:"])
    for name, figure in content["figures"].items():
        spread = f"{figure['spread']:.1%}" if "spread" in figure else ""
        for row, value in _values(name, figure["value"]):
            common.print_cells([row, value, figure["kind"], spread])


def _values(name: str, value: Any) -> list[tuple[str, str]]:
    """Rows of a figure: of one with several values, one for each."""
    if isinstance(value, dict):
        return [(f"{name} {width} bits", _text(name, number)) for width, number in value.items()]
    if isinstance(value, list):
        rows = []
        for item in value:
            what = f"{name} {item['readers']} x {format_bytes(item['size_bytes'])}"
            rows.append((what, f"{item['bytes_per_s'] / 1e9:.2f} GB/s, {item['latency_s'] * 1e3:.2f} ms"))
        return rows
    return [(name, _text(name, value))]


def _text(name: str, value: Any) -> str:
    """Write a figure with a unit that suits people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes_per_s"):
        return f"{value / 1e9:.2f} GB/s"
    if name.endswith("_s_per_byte"):
        return f"{1e-9 / value:.2f} GB/s"
    if name.endswith("_macs_per_s"):
        return f"{value / 1e9:.0f} G/s"
    return format_bytes(value) if name.endswith("_bytes") else f"{value * 1e6:.0f} us"
