"""Train the bit router of a calibrated store: routed precision then costs less quality at the same mean width. Ctrl-C
leaves the store as it was."""

from __future__ import annotations

import argparse

from moert.cli import training
from moert.cli.progress import line_progress
from moert.cli.status import Status
from moert.convert import calibration_text as calibration


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", metavar="STORE", help="a calibrated store")
    training.add_options(parser, "router", steps=200, of="windows of 512 tokens", minutes=10)


def main(args: argparse.Namespace) -> int:
    status = Status.of(args)
    content = training.check(args)
    with status.spinner("Loading"):
        from moert.store.bit_router import write_router
        from moert.train import bit_router as train_router  # loads torch

        store, lossless, text, windows = training.load(args, content, calibration.MOST_TOKENS)
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
