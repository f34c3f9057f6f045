"""Train the scales of a store's experts, of all widths, so that the whole model comes closer to the lossless one. It
writes a new store: the one that is read stays as it is, and Ctrl-C leaves nothing behind."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from moert.cli import common
from moert.cli.options import add_settings
from moert.cli.progress import line_progress
from moert.cli.status import Status
from moert.convert import calibration_text as calibration
from moert.errors import UsageError
from moert.hub import resolve as source

if TYPE_CHECKING:
    from moert.convert.calibration import CalibrationText
    from moert.models.stored_model import StoredModel

MOST_TOKENS = 1 << 22  # of a longer text windows at even distances are used
_SAMPLE = 1 << 16  # characters that the tokenizers of both stores must understand alike


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", metavar="STORE", help="a store of 2 to 8 bits, best a calibrated one")
    parser.add_argument("--out", metavar="STORE", type=Path, help="folder to make; must not exist")
    parser.add_argument("--against", metavar="STORE", help="the lossless store of the same checkpoint")
    parser.add_argument(
        "--text", default=calibration.DEFAULT, help="UTF-8 file to train on (default: one that comes along)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=600,
        metavar="N",
        help="4 windows of 512 tokens each, at one precision (default 600)",
    )
    parser.add_argument(
        "--minutes", type=float, default=60, metavar="M", help="minutes of training at most (default 60)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed and steps, same scales (default 0)")
    add_settings(parser, ["threads"])
    common.add_status_options(parser)


def main(args: argparse.Namespace) -> int:
    status = Status.of(args)
    if args.out is None:
        raise UsageError("Name the folder to write the new store to with --out.")
    content = _check(args)
    with status.spinner("Loading"):
        from moert.train import scales as train_scales  # loads torch
        from moert.train.rescale import check_out, rescale

        store, lossless, text, windows = _load(args, content)
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
    return 0


def _check(args: argparse.Namespace) -> str:
    """The text to train on, if the options make sense; else UsageError."""
    if args.steps < 1 or not args.minutes > 0:
        raise UsageError("--steps must be at least 1, and --minutes above 0.")
    if args.model is None or args.against is None:
        raise UsageError("Name the store to train with -m, and the lossless store of its checkpoint with --against.")
    for name in (args.model, args.against):
        if not source.is_store(Path(name).expanduser()):
            raise UsageError(f"{name} is not a store: make one with moert convert.")
    return calibration.read(args.text)


def _load(args: argparse.Namespace, content: str) -> tuple[StoredModel, StoredModel, CalibrationText, list[list[int]]]:
    """The two stores, the text, and its windows. Raises UsageError, StoreError."""
    from moert.engine.model_runner import default_threads
    from moert.measure import evaluate  # loads torch
    from moert.models.stored_model import StoredModel
    from moert.quant.dispatch import set_num_threads
    from moert.train.distil import WINDOW

    store, lossless = (StoredModel.open(Path(name).expanduser()) for name in (args.model, args.against))
    evaluate.encode(content[:_SAMPLE], store, lossless)  # says what is wrong with the two, if anything is
    text = calibration.tokens(args.text, content, store.path, MOST_TOKENS)
    common.check_kernel()
    set_num_threads(args.threads or default_threads())
    size = min(WINDOW, store.architecture.max_position_embeddings)
    return store, lossless, text, evaluate.cut(text.tokens, size, 0)
