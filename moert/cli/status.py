"""The status stream: everything that is not data, on stderr."""

from __future__ import annotations

import argparse
import contextlib
from typing import Self

from rich.console import Console

WARNING = "warning: "  # how the lines begin by which the engine says that something deserves attention


class Status:
    """Prints lines on stderr by how much they matter.

    `show` is for answers to the user's commands and for what went wrong, and always prints. `say` and `warn` are
    silenced by `quiet`; `detail` needs `verbose`.
    """

    def __init__(self, quiet: bool = False, verbose: bool = False) -> None:
        self.quiet, self.verbose = quiet, verbose and not quiet
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """Make the one that the options -q and -v ask for."""
        return cls(args.quiet, vars(args).get("verbose", False))

    @property
    def live(self) -> bool:
        """Whether spinners and bars make sense."""
        return self.console.is_terminal and not self.quiet

    def show(self, text: str, style: str = "dim") -> None:
        self.console.print(text, style=style, markup=False)

    def say(self, text: str) -> None:
        if not self.quiet:
            self.show(text)

    def warn(self, text: str) -> None:
        if not self.quiet:
            self.show(WARNING + text.removeprefix(WARNING), style="yellow")

    def detail(self, text: str) -> None:
        if self.verbose:
            self.show(text)

    def report(self, line: str) -> None:
        """Print a line of the engine: a warning if it says so, else a detail."""
        if line.startswith(WARNING):
            self.warn(line)
        else:
            self.detail(line)

    def spinner(self, text: str) -> contextlib.AbstractContextManager[object]:
        return self.console.status(text) if self.live else contextlib.nullcontext()
