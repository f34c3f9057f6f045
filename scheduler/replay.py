"""Replay what a recorded trace asks of the scheduler: steps, widths, and a predictor of a stated quality."""

# L layers, E experts, K experts per token

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moert.scheduler.elastic import generic_sensitivity
from moert.scheduler.precision import BitRouter, Chooser, Precision, parse_precision
from moert.scheduler.trace import DECODE, PREFILL, Routing, Trace, TraceStep
from moert.scheduler.types import RoutedExpert

PREFILL_CHUNK = 512  # tokens of a prompt that are planned together
_QUANTILES = 513


def chunks(trace: Trace) -> Iterator[list[TraceStep]]:
    """Steps that are planned together: a token of decoding, or up to PREFILL_CHUNK of the prompt of a turn."""
    chunk: list[TraceStep] = []
    for step in trace.steps:
        together = chunk and step.phase == PREFILL == chunk[0].phase and step.turn == chunk[0].turn
        if chunk and not (together and len(chunk) < PREFILL_CHUNK):
            yield chunk
            chunk = []
        chunk.append(step)
    if chunk:
        yield chunk


class _AnyExpert:
    """A precision for a model of one expert, used for all experts of another."""

    def __init__(self, inner: Precision) -> None:
        self._inner = inner

    def __str__(self) -> str:
        return str(self._inner)

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def chooser(self, widths: Sequence[int], kept: object) -> _AnyExpert:
        return self

    def one(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> list[int]:
        return self._inner.one(0, [0] * len(experts), weights)  # type: ignore[attr-defined, no-any-return]


def read_precision(text: str, trace: Trace, widths: Sequence[int], router: BitRouter | None = None) -> Precision:
    """The precision that `text` names. Raises ValueError as `parse_precision`.

    router: what is known of the harm that each width of an expert does. That is not in a trace; without it each width
    is taken to do the harm that it does to Gaussian weights, which grows as the square of the router weight, and
    `routed` gets the mean asked for over the tokens that the trace decodes.
    """
    if router is not None or not text.startswith("routed"):
        return parse_precision(text, widths, router)
    weights = [w for s in trace.steps if s.phase == DECODE for r in s.layers.values() for w in r.weights]
    usage = {0: [[1.0, *np.quantile(weights, np.linspace(0, 1, _QUANTILES)).tolist()]]}
    router = BitRouter(tuple(widths), {0: [generic_sensitivity(widths)]}, usage)
    return _AnyExpert(parse_precision(text, widths, router))  # type: ignore[return-value]


def gather(layer: int, routings: Sequence[Routing], chooser: Chooser) -> tuple[list[RoutedExpert], list[float]]:
    """Return what the tokens of one step ask of a layer, and for each expert the sum of its squared router weights."""
    asked: dict[int, list[tuple[int, float]]] = {}
    for experts, weights in routings:
        for e, w, n in zip(experts, weights, chooser.one(layer, experts, weights), strict=True):
            asked.setdefault(e, []).append((n, w))
    routed, squares = [], []
    for e, uses in asked.items():
        counts = [n for n, _ in uses]
        most = max(counts)
        waiting = () if min(counts) == most else tuple(sum(n > i for n in counts) for i in range(most))
        routed.append(RoutedExpert(e, len(uses), sum(w for _, w in uses), most, waiting))
        squares.append(sum(w * w for _, w in uses))
    return routed, squares


@dataclass(frozen=True, slots=True)
class ForetoldRouting:
    """A `RouterPrediction` that was told: experts that `layer` will want, with the weights that it gives them."""

    layer: int
    experts: tuple[int, ...]
    weights: tuple[float, ...]


class Foreteller:
    """Stands for a predictor: a trace knows the future, so it is told, and garbled.

    recalls[i]: the probability with which an expert is named that is used i + 1 layers later. In place of each that is
    not, another is named, by how often the trace decodes with it. The same for the same seed.
    """

    def __init__(self, trace: Trace, recalls: Sequence[float], seed: int) -> None:
        self._recalls = tuple(recalls)
        self._rng = np.random.default_rng(seed)
        uses = np.full((trace.layers, trace.num_experts), 1e-3)
        for step in trace.steps:
            if step.phase == DECODE:
                for layer, routing in step.layers.items():
                    uses[layer, list(routing.experts)] += 1
        self._popularity = uses

    def guesses(self, step: TraceStep, layer: int) -> list[ForetoldRouting]:
        """Return what the next layers behind `layer` are guessed to want, the nearest first."""
        behind = [at for at in sorted(step.layers) if at > layer]
        return [self._guess(at, step.layers[at], recall) for at, recall in zip(behind, self._recalls, strict=False)]

    def _guess(self, layer: int, routing: Routing, recall: float) -> ForetoldRouting:
        named = list(routing.experts)
        missed = [slot for slot, draw in enumerate(self._rng.random(len(named))) if draw >= recall]
        others = self._popularity[layer].copy()
        others[named] = 0
        if missed:
            # Of exponential times with these rates, the earliest are a draw without replacement.
            times = self._rng.exponential(size=len(others)) / np.maximum(others, 1e-30)
            possible = min(len(missed), len(others) - len(named))
            for slot, expert in zip(missed, np.argsort(times)[:possible].tolist(), strict=False):
                named[slot] = expert
        return ForetoldRouting(layer, tuple(named), routing.weights)
