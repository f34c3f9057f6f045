"""Progress on stderr: a bar or a spinner on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from moert.config import format_bytes

if TYPE_CHECKING:
    from rich.progress import Progress

    from moert.cli.status import Status
    from moert.convert.convert import ConvertProgress

PLAIN_SECONDS = 5.0  # between lines of progress where there is no terminal


class _Plain:
    def __init__(self, status: Status) -> None:
        self._status = status
        self._start = self._last = time.monotonic()

    def __call__(self, p: ConvertProgress) -> None:
        now = time.monotonic()
        if now - self._last < PLAIN_SECONDS and p.done < p.total:
            return
        self._last = now
        speed = (p.done - p.resumed) / max(now - self._start, 1e-9)
        left = f", {(p.total - p.done) / speed:.0f} s left" if speed > 0 else ""
        done = f"{format_bytes(p.done)} of {format_bytes(p.total)} ({p.done / max(p.total, 1):.0%})"
        self._status.say(f"{p.stage}: {done}, {format_bytes(round(speed))}/s{left}")


class _Bar:
    """The bar appears with the first report, so that nothing is drawn where nothing is converted."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar

    def __call__(self, p: ConvertProgress) -> None:
        if not self._bar.task_ids:
            self._bar.start()
            self._bar.add_task(p.stage, total=p.total, completed=p.resumed)
        self._bar.update(self._bar.task_ids[0], description=p.stage, total=p.total, completed=p.done)


@contextlib.contextmanager
def conversion_progress(status: Status) -> Iterator[Callable[[ConvertProgress], None] | None]:
    """A callback for `convert`; None when the user wants no status."""
    if status.quiet:
        yield None
    elif not status.live:
        yield _Plain(status)
    else:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as Speed

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), Speed())
        bar = Progress(*columns, TimeRemainingColumn(), console=status.console)
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
