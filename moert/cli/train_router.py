"""Train the bit router of a calibrated store: routed precision then costs less quality at the same mean width. Ctrl-C
leaves the store as it was."""

from __future__ import annotations

import argparse
from pathlib import Path

from moert import calibration, source
from moert.cli import common
from moert.cli.progress import line_progress
from moert.errors import UsageError


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", metavar="STORE", help="a store made with --calibrate")
    parser.add_argument("--against", metavar="STORE", help="the lossless store of the same checkpoint")
    parser.add_argument(
        "--text", default=calibration.DEFAULT, help="UTF-8 file to train on (default: one that comes along)"
    )
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="windows of 512 tokens (default 200)")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="take fewer steps then (default 10)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed and steps, same router (default 0)")
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="threads to compute with")
    common.add_quiet_option(parser)


def main(args: argparse.Namespace) -> int:
    status = common.Status(args.quiet)
    if args.steps < 1 or not args.minutes > 0:
        raise UsageError("Training needs at least one step (--steps) and more than no time (--minutes).")
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"{args.threads} threads cannot compute anything: give --threads at least 1.")
    if args.model is None or args.against is None:
        raise UsageError("Name the store to train with -m, and the lossless store of its checkpoint with --against.")
    for name in (args.model, args.against):
        if not source.is_store(Path(name).expanduser()):
            raise UsageError(f"{name} is not a store: make one with moert convert.")
    content = calibration.read(args.text)
    with status.spinner("Loading"):
        from moert import evaluate, train_router  # loads torch
        from moert.engine import default_threads
        from moert.quant.dispatch import set_num_threads
        from moert.store.bit_router import write_router
        from moert.store.reader import Store

        store, lossless = (Store.open(Path(name).expanduser()) for name in (args.model, args.against))
        evaluate.encode(content, store, lossless)  # says what is wrong with the two, if anything is
        text = calibration.tokens(args.text, content, store.path)
        set_num_threads(args.threads or default_threads())
        size = min(train_router.WINDOW, store.architecture.max_position_embeddings)
        windows = evaluate.cut(text.tokens, size, 0)
        trainer = train_router.Trainer(store, lossless, windows, args.seed)
    with line_progress(status) as progress:
        steps = trainer.train(args.steps, 60 * args.minutes, progress)
        found = trainer.compare(progress)
    for row in found:
        print(
            f"mean width {row.mean_width:g}: KL {row.after:.5f} nats per token, {row.before:.5f} with the thresholds of"
            " the conversion (text that was not trained on)"
        )
    if sum(row.after / row.before for row in found) >= len(found):
        status.show("This is no better, so the store stays as it was: try more --steps or another --text.")
        return 1
    write_router(store.path, trainer.result(f"{steps} steps on {text.name}, seed {args.seed}"))
    status.show(f"Stored in {store.path} after {steps} steps: --precision routed uses it from now on.")
    return 0
