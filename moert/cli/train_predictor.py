"""Learn from traces which experts tokens will be routed to, so that they can be read ahead. Record some ten thousand
tokens of what the model is used for with --record-trace. Ctrl-C leaves the store as it was."""

from __future__ import annotations

import argparse
from pathlib import Path

from moert.cli import common
from moert.cli.options import add_settings
from moert.cli.progress import line_progress
from moert.cli.status import Status
from moert.config import format_bytes
from moert.errors import UsageError
from moert.hub import resolve as source


def add_options(parser: argparse.ArgumentParser) -> None:
    common.add_model_option(parser)
    parser.add_argument("--trace", type=Path, action="append", metavar="FILE", help="a trace (may be given again)")
    parser.add_argument("--epochs", type=int, default=10, metavar="N", help="times through the traces (default 10)")
    parser.add_argument(
        "--minutes", type=float, default=10.0, metavar="M", help="minutes of training at most (default 10)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="same seed and epochs, same predictor (default 0)"
    )
    add_settings(parser, ["threads"])
    common.add_status_options(parser)


def main(args: argparse.Namespace) -> int:
    status = Status.of(args)
    if args.epochs < 1 or not args.minutes > 0:
        raise UsageError("--epochs must be at least 1, and --minutes above 0.")
    if not args.trace:
        raise UsageError("--trace FILE is missing: moert generate --record-trace FILE records one.")
    path = source.resolve(args.model, offline=args.offline, on_status=status.say)
    with status.spinner("Reading traces"):
        from moert.engine.model_runner import default_threads
        from moert.models.stored_model import StoredModel as Store
        from moert.quant.dispatch import set_num_threads
        from moert.store.predictor import TrainedPredictor, write_predictor
        from moert.train import predictor as train_predictor  # loads torch

        store = Store.open(path)
        common.check_kernel()
        set_num_threads(args.threads or default_threads())
        windows = train_predictor.read_windows(store, args.trace)
        trainer = train_predictor.Trainer(store, windows, args.seed)
    with line_progress(status) as progress:
        steps = trainer.train(args.epochs, 60 * args.minutes, progress)
        found = trainer.compare(progress)
    common.print_cells(["recall", "all layers", *(f"layer {layer}" for layer in store.moe_layers)])
    common.print_cells(["---", *["---:"] * (1 + len(store.moe_layers))])
    for row in found:
        common.print_cells([row.name, *(f"{share:.3f}" for share in (row.mean, *row.layers))])
    if found[0].mean <= max(row.mean for row in found[1:]):
        status.show("This is no better than the baselines, so the store stays as it was: record longer traces.")
        return 1
    tokens = sum(len(window.tokens) for window in windows)
    about = f"{steps} steps on {tokens} tokens of {', '.join(p.name for p in args.trace)}, seed {args.seed}"
    trained = TrainedPredictor(trainer.result().tensors(), about)
    write_predictor(store, trained)
    status.show(f"Stored in {store.path} after {steps} steps ({format_bytes(trained.nbytes)}).")
    return 0
