"""Progress on stderr: a bar or a spinner on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

    from moert.cli.status import Status
    from moert.convert.convert import ConvertProgress

PLAIN_SECONDS = 5.0  # between lines of progress where there is no terminal


class _Plain:
    def __init__(self, status: Status) -> None:
        self._status = status
        self._last = time.monotonic()

    def __call__(self, p: ConvertProgress) -> None:
        now = time.monotonic()
        if now - self._last < PLAIN_SECONDS and p.done < p.total:
            return
        self._last = now
        left = _left(p)
        self._status.say(f"{p.stage}: {p.share:.0%}" + (left and f", {left}"))


class _Bar:
    """The bar appears with the first report, so that nothing is drawn where nothing is converted."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar

    def __call__(self, p: ConvertProgress) -> None:
        if not self._bar.task_ids:
            self._bar.start()
            self._bar.add_task(p.stage, total=1.0, left="")
        self._bar.update(self._bar.task_ids[0], description=p.stage, completed=p.share, left=_left(p))


def _left(p: ConvertProgress) -> str:
    """Say how long it will take, as exactly as that is known; nothing where it is not."""
    seconds = p.seconds_left
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h left"


@contextlib.contextmanager
def conversion_progress(status: Status) -> Iterator[Callable[[ConvertProgress], None] | None]:
    """A callback for `convert`; None when the user wants no status."""
    if status.quiet:
        yield None
    elif not status.live:
        yield _Plain(status)
    else:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        left = TextColumn("{task.fields[left]}")
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), left, console=status.console
        )
        try:
            yield _Bar(bar)
        finally:
            bar.stop()


@contextlib.contextmanager
def line_progress(status: Status) -> Iterator[Callable[[str], None]]:
    """A callback that shows what is being done: a spinner on a terminal, a line every few seconds elsewhere."""
    if status.live:
        with status.console.status("") as spinner:
            yield spinner.update
        return
    last = float("-inf")

    def say(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= PLAIN_SECONDS:
            last = time.monotonic()
            status.say(text)

    yield say
