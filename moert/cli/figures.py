"""--stats and --timeline: what a run took, layer by layer, as a table and as a file for Perfetto."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moert.cli.status import Status
from moert.config import format_bytes

if TYPE_CHECKING:
    from moert.api import LLM
    from moert.runtime.telemetry import Counters
    from moert.runtime.timeline import Timeline

COLUMNS = ("layer", "hits", "waited", "computed", "on demand", "prefetched", "used", "wasted", "bits")


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("statistics")
    group.add_argument(
        "--stats", action="store_true", help="print a table of times and bytes per layer at the end (warm-up included)"
    )
    group.add_argument("--timeline", type=Path, metavar="FILE", help="write a timeline for ui.perfetto.dev")


class Figures:
    """The figures of one model that the options ask for."""

    def __init__(self, args: argparse.Namespace, status: Status, timeline: Timeline | None) -> None:
        self._wanted, self._status, self._timeline = args.stats, status, timeline
        self._llm: LLM | None = None

    def of(self, llm: LLM) -> None:
        """Watch this model from now on."""
        self._llm = llm
        if self._timeline is not None:
            timeline = self._timeline
            llm.call(lambda runner: runner.draw(timeline))

    def show(self) -> None:
        """The table of what was done up to now."""
        if self._wanted and self._llm is not None:
            runner, top_k = self._llm.runner, self._llm.store.architecture.top_k
            for what, decoding in (("prompts", False), ("decoding", True)):
                layers = runner.layer_counters(decoding)
                for line in table(what, layers, runner.widths, top_k):
                    self._status.show(line, style="default")
            if line := runner.lookahead():
                self._status.show(line, style="default")


@contextmanager
def figures(args: argparse.Namespace, status: Status) -> Iterator[Figures]:
    """Shows and writes at the end what the options ask for, also after an error or Ctrl-C.

    Raises UsageError before anything is loaded where the timeline cannot be written.
    """
    timeline = None
    if args.timeline is not None:
        from moert.runtime.timeline import Timeline  # loads no torch

        timeline = Timeline(args.timeline)
    result = Figures(args, status, timeline)
    try:
        yield result
    finally:
        if timeline is not None:
            timeline.close()
            status.say(timeline.about())
        result.show()


def table(what: str, layers: Mapping[int, Counters], widths: tuple[int, ...], top_k: int) -> list[str]:
    """Lines: a heading, a row for each layer and one for all, the widths. Nothing where there were no tokens."""
    from moert.runtime.telemetry import total

    everything = total(layers.values())
    tokens = sum(everything.token_uses.values()) // (top_k * len(layers))
    if not tokens:
        return []
    rows = [
        COLUMNS,
        *(_row(str(layer), part, tokens) for layer, part in layers.items()),
        _row("all", everything, tokens),
    ]
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{what}: {tokens} tokens; of each token:"]
    lines += ["  ".join(cell.rjust(size) for cell, size in zip(row, sizes, strict=True)) for row in rows]
    shares = [f"{share:.1%} at {width} bits" for width, share in everything.width_histogram(widths).items()]
    if everything.device_uses:
        shares.append(f"{everything.device_uses / everything.expert_uses:.1%} on the device")
        lines.append(f"moved to the device: {format_bytes(round(everything.bytes_moved / tokens))}")
    return [*lines, f"expert uses: {', '.join(shares)}"]


def _row(name: str, part: Counters, tokens: int) -> tuple[str, ...]:
    sizes = (part.bytes_read - part.bytes_prefetched, part.bytes_prefetched, part.bytes_used, part.bytes_wasted)
    return (
        name,
        "-" if part.hit_ratio is None else f"{part.hit_ratio:.1%}",
        *(f"{seconds / tokens * 1e3:.3f} ms" for seconds in (part.waited_s, part.computed_s)),
        *(format_bytes(round(size / tokens)) for size in sizes),
        "-" if part.mean_width is None else f"{part.mean_width:.2f}",
    )
