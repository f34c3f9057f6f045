"""Shared code of the commands that learn from a lossless store."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from moert.cli import common
from moert.cli.options import add_settings
from moert.convert import calibration_text as calibration
from moert.errors import UsageError
from moert.hub import resolve as source

if TYPE_CHECKING:
    from moert.convert.calibration import CalibrationText
    from moert.models.stored_model import StoredModel as Store

_SAMPLE = 1 << 16  # characters that the tokenizers of both stores must understand alike


def add_options(parser: argparse.ArgumentParser, what: str, steps: int, of: str, minutes: float) -> None:
    """what: is learnt. of: what a step takes."""
    parser.add_argument("--against", metavar="STORE", help="the lossless store of the same checkpoint")
    parser.add_argument(
        "--text", default=calibration.DEFAULT, help="UTF-8 file to train on (default: one that comes along)"
    )
    parser.add_argument("--steps", type=int, default=steps, metavar="N", help=f"{of} (default {steps})")
    parser.add_argument(
        "--minutes", type=float, default=minutes, metavar="M", help=f"minutes of training at most (default {minutes:g})"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help=f"same seed and steps, same {what} (default 0)"
    )
    add_settings(parser, ["threads"])
    common.add_status_options(parser)


def check(args: argparse.Namespace) -> str:
    """The text to train on, if the options make sense; else UsageError."""
    if args.steps < 1 or not args.minutes > 0:
        raise UsageError("--steps must be at least 1, and --minutes above 0.")
    if args.model is None or args.against is None:
        raise UsageError("Name the store to train with -m, and the lossless store of its checkpoint with --against.")
    for name in (args.model, args.against):
        if not source.is_store(Path(name).expanduser()):
            raise UsageError(f"{name} is not a store: make one with moert convert.")
    return calibration.read(args.text)


def load(
    args: argparse.Namespace, content: str, most_tokens: int
) -> tuple[Store, Store, CalibrationText, list[list[int]]]:
    """The two stores, the text, and its windows, of `most_tokens` in all. Raises UsageError, StoreError."""
    from moert.engine.model_runner import default_threads
    from moert.measure import evaluate  # loads torch
    from moert.models.stored_model import StoredModel as Store
    from moert.quant.dispatch import set_num_threads
    from moert.train.distil import WINDOW

    store, lossless = (Store.open(Path(name).expanduser()) for name in (args.model, args.against))
    evaluate.encode(content[:_SAMPLE], store, lossless)  # says what is wrong with the two, if anything is
    text = calibration.tokens(args.text, content, store.path, most_tokens)
    common.check_kernel()
    set_num_threads(args.threads or default_threads())
    size = min(WINDOW, store.architecture.max_position_embeddings)
    return store, lossless, text, evaluate.cut(text.tokens, size, 0)
