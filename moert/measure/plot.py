"""Draws what was measured, and what a plan says. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Curve:
    """One precision: a label; memory budgets in bytes and the tokens/s there; lowest and highest ratio of perplexity to
    that of the lossless model, None where that is not known."""

    label: str
    speeds: Sequence[tuple[float, float]]
    perplexity_ratio: tuple[float, float] | None


_READING = 10.0  # tokens/s
_STYLES = (("-", "o"), ("--", "s"), ("-.", "D"), (":", "^"), ((0, (6, 1, 1, 1, 1, 1)), "v"), ((0, (1, 1)), "P"))
# Of different lightness too, so that they differ in grey.
_COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")


def draw_plan(path: Path, curves: Sequence[Curve], memory_bytes: float, device: str, model: str) -> None:
    """Write a PNG: decoding speed, and below it perplexity, against the memory budget. memory_bytes: of the device."""
    check(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    figure = Figure(figsize=(8, 7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    speed, loss = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    gib, plain = 1 << 30, FormatStrFormatter("%g")
    for number, curve in enumerate(curves):
        line, marker = _STYLES[number % len(_STYLES)]
        style: dict[str, Any] = {"color": _COLOURS[number % len(_COLOURS)], "linestyle": line, "marker": marker}
        budgets = [budget / gib for budget, _ in curve.speeds]
        speed.plot(budgets, [tokens for _, tokens in curve.speeds], label=curve.label, markersize=5, **style)
        if curve.perplexity_ratio is not None:
            low, high = (max(100 * (ratio - 1), 0.01) for ratio in curve.perplexity_ratio)
            loss.plot(budgets, [high] * len(budgets), markersize=5, **style)
            if low < high:
                loss.fill_between(budgets, low, high, color=style["color"], alpha=0.12, linewidth=0)
    speed.axhline(_READING, color="0.5", linewidth=0.8, label=f"reading speed, {_READING:g} tokens/s")
    for axes in (speed, loss):
        axes.axvline(memory_bytes / gib, color="0.3", linewidth=2, alpha=0.5)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(plain)
        axes.xaxis.set_minor_formatter("")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
    where = (memory_bytes / gib, 0.02)
    speed.annotate(
        f"memory of {device}",
        where,
        xycoords=("data", "axes fraction"),
        xytext=(-4, 0),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="bottom",
        fontsize=8,
    )
    speed.set_ylabel("decoding, tokens/s")
    loss.set_ylabel("perplexity lost, %\n(two small models)")
    loss.set_xlabel("memory budget, GiB")
    speed.set_title(f"{model} on {device}")
    speed.legend(fontsize=8)
    figure.savefig(path, format="png")
