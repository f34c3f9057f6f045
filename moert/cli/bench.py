"""Measure prefill and decode as llama-bench does, and what they take: bytes touched, share of the memory bandwidth,
cache hits, bytes read, peak memory. With --kernels: the kernels alone. Rows go to stdout as they are measured."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moert.cli import common
from moert.cli.figures import add_options as add_figures_options
from moert.cli.figures import figures
from moert.cli.progress import line_progress
from moert.cli.status import Status
from moert.config import DEFAULT_CTX_SIZE, format_bytes, parse_bytes
from moert.errors import UsageError

if TYPE_CHECKING:
    from moert.api import LLM
    from moert.measure.bench import Case

Columns = dict[str, Callable[[dict[str, Any]], str]]
MODEL_COLUMNS: Columns = {
    "model": lambda r: f"{r['model']} {r['precision']}",
    "size": lambda r: format_bytes(r["size_bytes"]),
    "test": lambda r: r["test"],
    "tokens": lambda r: r["tokens"],
    "t/s ± sd": lambda r: f"{r['avg_ts']:.2f} ± {r['stddev_ts']:.2f}",
    "MB/token": lambda r: f"{r['bytes_touched_per_token'] / 1e6:.3g}",
    "of bandwidth": lambda r: f"{r['bandwidth_share']:.1%}",
    "overhead": lambda r: "-" if r["overhead_share"] is None else f"{r['overhead_share']:.1%}",
    "hits": lambda r: "-" if r["hit_ratio"] is None else f"{r['hit_ratio']:.1%}",
    "read/token": lambda r: format_bytes(r["bytes_read_per_token"]),
    "peak": lambda r: format_bytes(r["peak_rss_bytes"]),
}
KERNEL_COLUMNS: Columns = {
    "kernel": lambda r: r["kernel"],
    "bits": lambda r: str(r["width"]),
    "stored": lambda r: r["widths"],
    "code": lambda r: r["code"],
    "tokens": lambda r: str(r["n_tokens"]),
    "G weights/s": lambda r: f"{r['weights_per_s'] / 1e9:.2f}",
    "GB/s": lambda r: f"{r['bytes_per_s'] / 1e9:.2f}",
    "of bandwidth": lambda r: f"{r['bandwidth_share']:.1%}",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    common.add_model_option(parser)
    for short, long, default, text in (
        ("-p", "--n-prompt", 512, "prefill of N tokens; 0: none"),
        ("-n", "--n-gen", 128, "decode of N tokens; 0: none"),
        ("-d", "--n-depth", 0, "tokens in the context before them"),
    ):
        text = f"{text} (default {default})"
        parser.add_argument(short, long, type=_counts, default=[default], metavar="N[,N...]", help=text)
    parser.add_argument(
        "-r", "--repetitions", type=int, default=5, metavar="N", help="repetitions of each test (default 5)"
    )
    parser.add_argument("--no-warmup", action="store_true", help="start measuring with the first repetition")
    parser.add_argument(
        "-o", "--output", choices=("md", "csv", "json"), default="md", help="format of the rows (default md)"
    )
    parser.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="take the tokens from this text (default: random ones)"
    )
    common.add_status_options(parser, details=True)
    group = parser.add_argument_group("kernels alone (takes -r, --no-warmup, -o and -t too)")
    group.add_argument("--kernels", action="store_true", help="time each kernel and width on experts of random bytes")
    group.add_argument(
        "--size", default="1GiB", help="memory that the experts fill (default 1GiB: more than the caches of a CPU)"
    )
    common.add_memory_options(parser)
    common.add_conversion_options(parser)
    add_figures_options(parser)


def _counts(text: str) -> list[int]:
    """Read whole numbers: "512,2048" is [512, 2048]."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 128,512") from None


def main(args: argparse.Namespace) -> int:
    if args.repetitions < 1:
        raise UsageError(f"repetitions {args.repetitions} must be at least 1.")
    if args.kernels and (args.stats or args.timeline):
        raise UsageError("--stats and --timeline need a model that runs: leave them out with --kernels.")
    status = Status.of(args)
    return _kernels(args, status) if args.kernels else _model(args, status)


class _Table:
    """Rows on stdout: md and csv as they come, json as one list at the end. Used as a context manager."""

    def __init__(self, form: str, columns: Columns, left: int) -> None:
        self._form, self._columns, self._left = form, columns, left
        self._rows: list[dict[str, Any]] = []
        self._csv: csv.DictWriter[str] | None = None

    def add(self, row: dict[str, Any]) -> None:
        first = not self._rows
        self._rows.append(row)
        if self._form == "md":
            if first:
                common.print_cells(list(self._columns))
                common.print_cells(["---" if i < self._left else "---:" for i in range(len(self._columns))])
            common.print_cells([cell(row) for cell in self._columns.values()])
        elif self._form == "csv":
            if self._csv is None:
                self._csv = csv.DictWriter(sys.stdout, list(row), lineterminator="\n")
                self._csv.writeheader()
            lists = {name: " ".join(map(str, v)) for name, v in row.items() if isinstance(v, list)}
            self._csv.writerow(row | lists)
        sys.stdout.flush()

    def close(self) -> None:
        if self._form == "json":
            print(json.dumps(self._rows, indent=1))
        elif self._form == "md" and self._rows:
            row = self._rows[0]
            load = "" if row["load_average"] is None else f", load {row['load_average']:.1f}"
            kernel = f"kernel {row['kernel']}, " if "test" in row else ""
            bandwidth = f"memory bandwidth {row['memory_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s"
            print(f"\n{kernel}{row['threads']} threads, {bandwidth}{load}, {row['timestamp']}")


def _bandwidth(args: argparse.Namespace, status: Status, threads: int) -> float:
    from moert.measure.bench_kernels import memory_bandwidth

    with status.spinner("Measuring the memory bandwidth"):
        bandwidth = memory_bandwidth(threads)
    status.say(f"memory bandwidth {bandwidth / 1e9:.1f} GB/s with {threads} threads")
    return bandwidth


def _open(args: argparse.Namespace, status: Status, cases: Sequence[Case]) -> LLM:
    """The model with a context that every case fits into."""
    needed = max(cases, key=lambda case: case.needed)
    wanted = f"{needed.name} needs a context of {needed.needed} tokens"
    if args.ctx_size is None and needed.needed > DEFAULT_CTX_SIZE:
        args.ctx_size = needed.needed
        status.say(f"context {args.ctx_size}: {wanted}")
    elif args.ctx_size is not None and args.ctx_size < needed.needed:
        raise UsageError(f"{wanted}, but --ctx-size is {args.ctx_size}.")
    llm = common.open_llm(args, status)
    if llm.ctx_size < needed.needed:  # the default, which is less for models with a short context
        llm.close()
        args.ctx_size = needed.needed
        status.say(f"context {args.ctx_size}: {wanted}")
        llm = common.open_llm(args, status)
    return llm


def _model(args: argparse.Namespace, status: Status) -> int:
    from moert.measure import bench  # loads torch

    cases = bench.make_cases(args.n_prompt, args.n_gen, args.n_depth)
    text = common.read_text(args.prompt_file, "The prompt") if args.prompt_file else None
    table = _Table(args.output, MODEL_COLUMNS, left=4)
    with figures(args, status) as taken, _open(args, status, cases) as llm:
        taken.of(llm)
        status.say(common.headline(args, llm))
        ids = None if text is None else llm.tokenizer.encode(text)
        tokens = bench.Tokens(llm.store.architecture.vocab_size, ids)
        tokens.check(max(case.needed for case in cases))
        bandwidth = _bandwidth(args, status, llm.runner.threads)
        try:
            with line_progress(status) as progress:
                for case in cases:
                    measurement = bench.Measurement(llm.store, llm.runner, case, tokens, bandwidth)
                    try:
                        llm.call(lambda runner: measurement.run(args.repetitions, not args.no_warmup, progress))  # noqa: B023
                    finally:
                        row = measurement.row()
                        if row is not None:
                            table.add(asdict(row))
        except KeyboardInterrupt:
            return _interrupted(status)
        finally:
            table.close()
    return 0


def _interrupted(status: Status) -> int:
    status.show("Interrupted: the rows above are of the repetitions that were complete.")
    return common.INTERRUPTED


def _kernels(args: argparse.Namespace, status: Status) -> int:
    from moert.engine.model_runner import default_threads
    from moert.measure import bench_kernels
    from moert.quant import dispatch

    common.check_kernel()
    size = parse_bytes(args.size, "size")
    group_size = 64 if args.group_size is None else args.group_size
    try:
        cases = bench_kernels.kernel_cases(group_size)
    except ValueError as error:
        raise UsageError(f"{error}.") from None
    threads = args.threads or default_threads()
    bandwidth = _bandwidth(args, status, threads)
    table = _Table(args.output, KERNEL_COLUMNS, left=1)
    dispatch.set_num_threads(threads)
    buffer = bench_kernels.random_buffer(size)
    try:
        with line_progress(status) as progress:
            for case in cases:
                measurement = bench_kernels.KernelMeasurement(buffer, case, threads, bandwidth)
                try:
                    measurement.run(args.repetitions, not args.no_warmup, progress)
                finally:
                    for row in measurement.rows():
                        table.add(asdict(row))
    except KeyboardInterrupt:
        return _interrupted(status)
    finally:
        table.close()
    return 0
