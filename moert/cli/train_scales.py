"""Train the scales of a store's experts, of all widths, so that the whole model comes closer to the lossless one. It
writes a new store: the one that is read stays as it is, and Ctrl-C leaves nothing behind."""

from __future__ import annotations

import argparse
from pathlib import Path

from moert.cli import training
from moert.cli.progress import line_progress
from moert.cli.status import Status
from moert.errors import UsageError

MOST_TOKENS = 1 << 22  # of a longer text windows at even distances are used


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", metavar="STORE", help="a store of 2 to 8 bits, best a calibrated one")
    parser.add_argument("--out", metavar="STORE", type=Path, help="folder to make; must not exist")
    training.add_options(parser, "scales", steps=600, of="4 windows of 512 tokens each, at one precision", minutes=60)


def main(args: argparse.Namespace) -> int:
    status = Status.of(args)
    if args.out is None:
        raise UsageError("Name the folder to write the new store to with --out.")
    content = training.check(args)
    with status.spinner("Loading"):
        from moert.train import scales as train_scales  # loads torch
        from moert.train.rescale import check_out, rescale

        store, lossless, text, windows = training.load(args, content, MOST_TOKENS)
        check_out(store, args.out)
        trainer = train_scales.Trainer(store, lossless, windows, args.seed)
    with line_progress(status) as progress:
        steps = trainer.train(args.steps, 60 * args.minutes, progress)
        found = trainer.compare(progress)
        for row in found:
            print(
                f"{row.precision}: KL {row.after:.5f} nats per token, {row.before:.5f} with the scales of the store"
                " (text that was not trained on)"
            )
        if sum(row.after / row.before for row in found) >= len(found):
            status.show("This is no better, so no store is written: try more --steps or a longer --text.")
            return 1
        about = f"{steps} steps on {text.name}, seed {args.seed}"
        rescale(store, args.out, trainer.result, trainer.sensitivity(progress), about, progress)
    status.show(f"Stored in {args.out} after {steps} steps.")
    if store.meta.sensitivity is not None:
        status.show(f"For routed precision, moert train-router -m {args.out} now learns what its widths cost.")
    return 0
