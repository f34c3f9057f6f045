"""Looks ahead: what the layers to come will probably want, how often that was right, and whether it pays.

Plain data in and out; the runtime and the simulator run the same. It knows no clock: it is told what time it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from moert.scheduler.predictor import Predictor, PredictorStats, likely
from moert.scheduler.rank_precision import RankPrecision
from moert.scheduler.trial import Trial
from moert.scheduler.types import Prediction, RouterPrediction

_MIN_PRECISION = 0.3  # measured: from 0.3 to 0.5 makes no difference; at 0.3 a quarter of what is read is never used
_MIN_PROBABILITY = 0.05  # what a predictor holds to be less likely is not even ranked


class LookAhead:
    """Turns what routers are predicted to choose into predictions of slices.

    horizons: how many layers to look ahead; of several numbers the fastest is found by trials, so that prefetching ends
    where it does not pay. predictor: ranks experts anew where a store has a trained one; without it the routers' own
    order counts. share: of the experts that are named, those that a router is expected to choose: twice as many are
    named as it chooses, if nothing else is said.
    """

    def __init__(self, horizons: tuple[int, ...], predictor: Predictor | None = None, share: float = 0.5) -> None:
        self._trial, self._rank_precision, self._predictor = Trial(horizons), RankPrecision(), predictor
        self._share = share
        self.stats = PredictorStats()  # of what was named for the very next layer
        self._named: dict[int, Sequence[int]] = {}
        self.horizon = self._trial.choice
        self.guesses: Sequence[RouterPrediction] = ()
        self._began = 0.0

    def step(self, now: float) -> None:
        """Learn that a token begins at this time."""
        if self._began:
            self.horizon = self._trial.step(now - self._began)
        self._began = now

    def pause(self) -> None:
        """Learn that what comes is no single token: its time tells nothing."""
        self._began = 0.0

    def tokens(self, ids: Sequence[int]) -> None:
        """Learn that a pass over these tokens begins."""
        if self._predictor is not None:
            self._predictor.begin(ids)

    def on_router_prediction(self, layer: int, guesses: Sequence[RouterPrediction]) -> None:
        """Learn what, behind `layer` (-1: before the first), the routers of the next layers will probably choose."""
        self.guesses = guesses
        if self._predictor is not None:
            self._predictor.on_router_prediction(layer, guesses)

    def learn(self, layer: int, experts: Sequence[int]) -> None:
        """Learn what a single token was routed to in the end."""
        self._rank_precision.learn(layer, experts)
        if layer in self._named:
            self.stats.count(self._named.pop(layer), experts)
        if self._predictor is not None:
            self._predictor.used(layer, np.array([experts]))

    def predictions(
        self,
        wanted: Callable[[int, Sequence[int], Sequence[float]], Sequence[int]],
        missing: Callable[[int, Sequence[int], Sequence[int]], Sequence[int]],
    ) -> list[Prediction]:
        """Return the predictions that follow from what was told last, layer by layer, and forget it.

        wanted: slices of experts in a layer, for their weights. missing: positions of those not in memory.
        """
        result: list[Prediction] = []
        guesses, self.guesses = self.guesses, ()
        for ahead, guess in enumerate(guesses):
            experts, weights = self._ranked(guess)
            expected = len(experts) * self._share
            if ahead == 0:
                self._named[guess.layer] = experts[: int(expected)]
            counts = wanted(guess.layer, experts, weights)
            lacking = set(missing(guess.layer, experts, counts))
            self._rank_precision.watch(ahead, guess.layer, [(rank, experts[rank]) for rank in sorted(lacking)])
            for rank, expert in enumerate(experts):
                if rank not in lacking:
                    if rank < expected:
                        result.append(Prediction(guess.layer, expert, 1.0, 0))
                elif (probability := self._rank_precision.of(ahead, rank)) >= _MIN_PRECISION:
                    result.append(Prediction(guess.layer, expert, probability, counts[rank]))
        return result

    def line(self) -> str:
        """Say in one line what looking ahead came to; empty where nobody looked."""
        if self.stats.recall is None:
            return ""
        trial = ", ".join(f"{1000 * s:.1f} ms/token with {n}" for n, s in sorted(self._trial.seconds.items()))
        return (
            f"looking ahead: {self.stats.recall:.1%} of the next layer's experts were named; layers ahead now: "
            f"{self.horizon}" + (f" (last trial: {trial})" if trial else "")
        )

    def _ranked(self, guess: RouterPrediction) -> tuple[Sequence[int], Sequence[float]]:
        found = None if self._predictor is None else self._predictor.probabilities(guess.layer)
        if found is None:
            return guess.experts, guess.weights
        weights = dict(zip(guess.experts, guess.weights, strict=True))
        least = min(guess.weights)
        experts = likely(found, _MIN_PROBABILITY)[: len(guess.experts)]
        return experts, [weights.get(e, least) for e in experts]
