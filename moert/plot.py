"""Draws perplexity against bytes of expert weights per token. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moert.errors import UsageError


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement: a label, what it belongs to (points of a series are joined), bytes per token, perplexity."""

    label: str
    series: str
    bytes_per_token: float
    perplexity: float


def check(path: Path) -> None:
    """UsageError where the drawing could not be made: better said before an hour of measuring than after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("Drawing needs matplotlib, which is not installed: pip install 'moert[plot]'.") from None
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path} cannot be drawn: there is no folder {path.absolute().parent}.")


def draw(path: Path, points: Sequence[Point], lossless: float | None, title: str) -> None:
    """Write a PNG. `lossless`: a perplexity, drawn as a line."""
    check(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no state shared with the caller
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, ScalarFormatter

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, marker in zip(dict.fromkeys(p.series for p in points), "osD^vP*Xh<>" * len(points), strict=False):
        some = sorted((p for p in points if p.series == name), key=lambda p: p.bytes_per_token)
        axes.plot(
            [p.bytes_per_token / 1e6 for p in some], [p.perplexity for p in some], marker=marker, label=name, alpha=0.8
        )
        for p in some:
            at = (p.bytes_per_token / 1e6, p.perplexity)
            axes.annotate(p.label, at, xytext=(4, 4), textcoords="offset points", fontsize=7)
    if lossless is not None:
        axes.axhline(lossless, color="grey", linestyle="--", linewidth=1, label=f"lossless ({lossless:.3f})")
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        scale("log")
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter("")
    values = [p.perplexity for p in points]
    if max(values) < 1.5 * min(values):  # a logarithmic axis would have no ticks
        axes.set_yscale("linear")
    axes.set_xlabel("expert weights, MB per token")
    axes.set_ylabel("perplexity")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, format="png")
