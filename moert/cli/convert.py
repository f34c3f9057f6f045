"""Turn a Hugging Face checkpoint into a store, which can then be run. The checkpoint is only read. Experts are stored
as the codes that do least harm to their outputs for a text; of a large model that takes hours, with --fast minutes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from moert.cli import common
from moert.cli.progress import conversion_progress
from moert.cli.status import Status
from moert.config import format_bytes, parse_bytes
from moert.convert import calibration_text as calibration
from moert.errors import StoreError, UsageError
from moert.hub import resolve as source


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="checkpoint folder or hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make; must not exist")
    parser.add_argument("--resume", action="store_true", help="continue a conversion that was interrupted")
    parser.add_argument("--offline", action="store_true", help="never use the network")
    common.add_status_options(parser)
    common.add_conversion_options(parser)
    parser.add_argument(
        "--calibrate",
        metavar="TEXT",
        help="choose codes by their effect on the outputs for this text file, of which up to"
        f" {calibration.MOST_TOKENS} tokens are used; `default`: a text that comes along, of which"
        f" {calibration.DEFAULT_TOKENS} tokens are used where neither --calibrate nor --fast is given",
    )
    parser.add_argument(
        "--max-size",
        metavar="SIZE",
        help="size of the store at most, such as 9GiB: experts keep the widths that lower the errors most, as the"
        " calibration measures it (during the conversion the disk holds all widths)",
    )


def main(args: argparse.Namespace) -> int:
    status = Status.of(args)
    settings = common.conversion_of(args)
    if args.fast and (args.calibrate is not None or args.max_size is not None):
        other = "--max-size goes by" if args.calibrate is None else "--calibrate asks for"
        raise UsageError(f"--fast does without the calibration that {other}: leave one of the two out.")
    if os.path.lexists(args.out):  # said before a download, not after it
        raise StoreError(f"{args.out} exists already: delete it or choose another name.")
    max_size = None if args.max_size is None else parse_bytes(args.max_size, "max-size")
    content = calibration.read(args.calibrate) if args.calibrate is not None else None
    folder = source.checkpoint(args.src, offline=args.offline, on_status=status.say)
    status.say(f"Converting {args.src} ({settings}) into {args.out}{settings.how(args.calibrate)}.")
    with status.spinner("Starting"):
        from moert.convert.convert import convert  # loads torch

        common.check_kernel()
        text = None
        if content is not None:
            text = calibration.tokens(args.calibrate, content, folder, calibration.worth_while(folder))
        elif settings.calibrated:
            text = calibration.by_default(folder, status.say)
    with conversion_progress(status) as progress:
        store = convert(
            folder,
            args.out,
            widths=settings.widths,
            group_size=settings.group_size,
            dense_bits=settings.dense_bits,
            resume=args.resume,
            progress=progress,
            calibration=text,
            on_status=status.say,
            source_name=args.src,
            max_size=max_size,
        )
    size = sum(f.stat().st_size for f in store.path.iterdir())
    status.say(f"Done: {format_bytes(size)} in {args.out}; try moert chat -m {args.out}")
    return 0
