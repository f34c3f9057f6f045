"""Measure what a width costs in quality: perplexity of a text, and against the lossless store the divergence of the
distributions, how often both would say the same, and the error of each layer. The table goes to stdout at the end."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moert.cli import common
from moert.cli.options import add_settings, settings_of
from moert.cli.progress import conversion_progress, line_progress
from moert.cli.status import Status
from moert.config import DEVICE, EngineConfig, format_bytes
from moert.errors import UsageError
from moert.hub import resolve as source

if TYPE_CHECKING:
    from moert.measure.evaluate import Evaluation, Row

LOSSLESS = {"widths": (16,), "dense_bits": 16}


def _optional(form: str) -> Callable[[float | None], str]:
    return lambda value: "-" if value is None else format(value, form)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda r: f"{r.model} {'lossless' if r.lossless else r.precision}",
    "perplexity": lambda r: f"{r.perplexity:.4f}",
    "ratio": lambda r: _optional(".4f")(r.perplexity_ratio),
    "KL, nats": lambda r: _optional(".5f")(r.mean_kl),
    "same top token": lambda r: _optional(".2%")(r.top1_agreement),
    "mean width": lambda r: f"{r.mean_width:.2f}",
    "bits/weight": lambda r: f"{r.bits_per_weight:.2f}",
    "expert MB/token": lambda r: f"{r.expert_bytes_per_token / 1e6:.4g}",
    "all MB/token": lambda r: f"{r.bytes_touched_per_token / 1e6:.4g}",
}
# In one piece a window uses nearly all experts: what it reads says nothing about answers.
READ: dict[str, Callable[[Row], str]] = {"read MB/token": lambda r: f"{r.bytes_read_per_token / 1e6:.4g}"}


def add_options(parser: argparse.ArgumentParser) -> None:
    common.add_model_option(parser)
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text (default: one that the small model was not trained on)"
    )
    parser.add_argument(
        "--against", metavar="STORE", help="the lossless store, or a checkpoint (converted once to one)"
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        default=[],
        metavar="POLICY",
        help="precisions to compare, one row each (default: all widths stored)",
    )
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens of a window (default 512)")
    parser.add_argument(
        "--tokens", type=int, default=20480, metavar="N", help="tokens of the text at most; 0: all (default 20480)"
    )
    parser.add_argument(
        "--one-by-one", action="store_true", help="compute token by token, as answers are: for precision elastic"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw perplexity against bytes per token")
    common.add_status_options(parser, details=True)
    add_settings(parser, ("memory_budget", "expert_budget", "kv_bits", "threads", DEVICE), device="cpu")
    common.add_conversion_options(parser)


def main(args: argparse.Namespace) -> int:
    status = Status.of(args)
    config = EngineConfig.of({**settings_of(args), "precision": None})
    if args.plot is not None:
        from moert.measure import plot

        plot.check(args.plot)
    path = args.text or source.shipped_model() / "heldout.txt"
    text = _read(path)
    model = common.resolve_model(args, status)
    against = None if args.against is None else _lossless(args, status)
    with status.spinner("Loading the model"):
        from moert.measure import evaluate  # loads torch
        from moert.models.stored_model import StoredModel as Store

        store = Store.open(model)
        reference = None if against is None else Store.open(against)
        windows = evaluate.cut(evaluate.encode(text, store, reference), args.window, args.tokens)
        evaluation = evaluate.Evaluation(
            store, reference, args.precision, config, args.window, status.report, args.one_by_one
        )
    code = 0
    try:
        with line_progress(status) as progress:
            evaluation.run(windows, progress)
    except KeyboardInterrupt:
        status.show("Interrupted: the table shows what was measured until then.")
        code = common.INTERRUPTED
    finally:
        evaluation.close()
    _show(evaluation, path, windows, args)
    return code


def _read(path: Path) -> str:
    if not path.is_file():
        raise UsageError(f"There is no text {path}: give --text a file of UTF-8 text.")
    return common.read_text(path, "The text")


def _lossless(args: argparse.Namespace, status: Status) -> Path:
    """The store that --against names; a checkpoint is converted."""
    options: dict[str, Any] = {} if source.is_store(Path(args.against).expanduser()) else LOSSLESS
    with conversion_progress(status) as progress:
        return source.resolve(args.against, offline=args.offline, on_status=status.say, progress=progress, **options)


def _show(evaluation: Evaluation, text: Path, windows: Sequence[Sequence[int]], args: argparse.Namespace) -> None:
    from moert.quant.dispatch import kernel_name
    from moert.runtime.telemetry import peak_rss_bytes

    rows = evaluation.rows()
    asked = sum(len(window) - 1 for window in windows)
    about = {
        "text": str(text),
        "window": args.window,
        "complete": bool(rows) and rows[0].scored_tokens == asked,
        "kernel": kernel_name(),
        "threads": evaluation.threads,
        "budget_bytes": evaluation.budget.total,
        "peak_rss_bytes": peak_rss_bytes(),
    }
    if args.json:
        print(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1))
    elif rows:
        columns = COLUMNS | (READ if args.one_by_one else {})
        _print_table([list(columns), *([cell(row) for cell in columns.values()] for row in rows)])
        _print_layers(rows)
        peak, budget = (format_bytes(about[name]) for name in ("peak_rss_bytes", "budget_bytes"))  # type: ignore[arg-type]
        of = "" if about["complete"] else f" of {asked}"
        print(
            f"\n{rows[0].scored_tokens}{of} tokens scored in windows of {args.window} of {text.name}, "
            f"kernel {about['kernel']}, {about['threads']} threads, peak memory {peak} of {budget}"
        )
    if args.plot is not None and rows:
        from moert.measure import plot

        points = [
            plot.Point(row.precision, row.model, row.expert_bytes_per_token, row.perplexity)
            for row in rows
            if not row.lossless or len(rows) == 1
        ]
        lossless = next((row.perplexity for row in rows if row.lossless), None)
        plot.draw(args.plot, points, lossless, f"{rows[-1].model} on {text.name}")


def _print_layers(rows: Sequence[Row]) -> None:
    rows = [row for row in rows if row.layer_errors]
    if not rows:
        return
    print("\nError of the hidden state after a layer if only its experts have this width (of the experts' output):")
    lines = [["layer", *(row.precision for row in rows)]]
    for errors in zip(*(row.layer_errors for row in rows), strict=True):
        lines.append([str(errors[0].layer), *(f"{e.hidden_error:.3%} ({e.output_error:.2%})" for e in errors)])
    _print_table(lines)


def _print_table(lines: list[list[str]]) -> None:
    """Markdown whose columns are aligned: the first to the left, figures to the right."""
    sizes = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for number, line in enumerate(lines):
        common.print_cells([c.rjust(n) if i else c.ljust(n) for i, (c, n) in enumerate(zip(line, sizes, strict=True))])
        if not number:
            common.print_cells([("-" * (n - 1) + ":") if i else "-" * n for i, n in enumerate(sizes)])
