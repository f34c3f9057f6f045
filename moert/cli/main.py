"""The entry point: finds the command, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from moert import __version__
from moert.config import did_you_mean
from moert.errors import MoertError, UsageError

COMMANDS = {
    "chat": "talk with a model",
    "generate": "continue a prompt",
    "convert": "turn a Hugging Face checkpoint into a store",
    "info": "what is in a store",
    "bench": "measure speed, bytes and memory",
    "eval": "measure what a width costs in quality",
    "train-scales": "fit a store's scales to the whole model",
    "train-predictor": "learn from traces which experts to read ahead",
    "plan": "what a memory budget buys, before anything is downloaded",
    "simulate": "predict the speed on another device from a routing trace",
    "profile": "measure this machine",
    "doctor": "check this machine and installation",
}


def main(argv: Sequence[str]) -> int:
    """Run one command and return its exit code; without a command print the help.

    Raises MoertError, OSError, KeyboardInterrupt, SystemExit.
    """
    if argv and argv[0] in COMMANDS:
        from moert.cli.options import Parser

        command = importlib.import_module(f"moert.cli.{argv[0].replace('-', '_')}")
        options = Parser(f"moert {argv[0]}", description=command.__doc__)
        command.add_options(options)
        return int(command.main(options.parse_args(argv[1:])))
    listing = "\n".join(f"  {name:17}{text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        "moert",
        description="Run Mixture-of-Experts language models larger than memory.",
        epilog=f"commands:\n{listing}\n\nmoert COMMAND --help shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action="version", version=f"moert {__version__}")
    parser.add_argument("command", metavar="COMMAND", nargs="?")
    name = parser.parse_known_args(argv)[0].command
    if not argv:
        parser.print_help()
        return 0
    if argv[0].startswith("-"):
        raise UsageError(f"Options stand after the command: moert COMMAND {argv[0]} ...")
    raise UsageError(f"There is no command {name!r}{did_you_mean(name, COMMANDS, '; moert --help lists them.')}")


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """The `moert` program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Unicode still shows the rest
    try:
        code = main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except MoertError as error:
        print(f"moert: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # Whoever read our output has had enough; keep the interpreter from complaining when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"moert: {where}{error.strerror or error}.", file=sys.stderr)
        code = 1
    sys.exit(code)
