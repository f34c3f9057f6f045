"""What the layers to come will probably want: who says so, how often that was right, and whether it pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from moert.scheduler.predictor import Predictor, PredictorStats, likely
from moert.scheduler.rank_precision import RankPrecision
from moert.scheduler.trial import Trial
from moert.scheduler.types import Prediction

_LEAST_ODDS = 0.3  # measured: from 0.3 to 0.5 makes no difference; at 0.3 a quarter of what is read is never used
_NAMED = 0.05  # what a predictor holds to be less likely is not even ranked


class RouterPrediction(Protocol):
    """What is said of a layer to come: experts, the likeliest first, and their softmax over all."""

    @property
    def layer(self) -> int: ...
    @property
    def experts(self) -> Sequence[int]: ...
    @property
    def weights(self) -> Sequence[float]: ...


class LookAhead:
    """Turns guesses into predictions.

    horizons: how many layers to look ahead; of several numbers the fastest is found by trials, so that prefetching ends
    where it does not pay. predictor: ranks experts anew where a store has a trained one; without it the routers' own
    order counts.
    """

    def __init__(self, horizons: tuple[int, ...], predictor: Predictor | None = None) -> None:
        self._trial, self._rank_precision, self._predictor = Trial(horizons), RankPrecision(), predictor
        self.stats = PredictorStats()  # of what was named for the very next layer
        self._named: dict[int, Sequence[int]] = {}
        self.horizon = self._trial.choice
        self.guesses: Sequence[RouterPrediction] = ()
        self._began = 0.0

    def step(self, now: float) -> None:
        """A token begins at this time."""
        if self._began:
            self.horizon = self._trial.step(now - self._began)
        self._began = now

    def pause(self) -> None:
        """What comes is no single token: its time tells nothing."""
        self._began = 0.0

    def tokens(self, ids: Sequence[int]) -> None:
        """A pass over these tokens begins."""
        if self._predictor is not None:
            self._predictor.begin(ids)

    def on_router_prediction(self, layer: int, guesses: Sequence[RouterPrediction]) -> None:
        """Behind `layer` (-1: before the first) this is what the routers of the next layers make of what they see."""
        self.guesses = guesses
        if self._predictor is not None:
            self._predictor.on_router_prediction(layer, [(g.layer, g.experts, g.weights) for g in guesses])

    def learn(self, layer: int, experts: Sequence[int]) -> None:
        """What a single token was routed to in the end."""
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
        """What was guessed last, layer by layer.

        wanted: slices of experts in a layer, for their weights. missing: positions of those not in memory.
        """
        result: list[Prediction] = []
        guesses, self.guesses = self.guesses, ()
        for ahead, guess in enumerate(guesses):
            experts, weights = self._ranked(guess)
            if ahead == 0:
                self._named[guess.layer] = experts[: len(experts) // 2]
            counts = wanted(guess.layer, experts, weights)
            lacking = set(missing(guess.layer, experts, counts))
            self._rank_precision.watch(ahead, guess.layer, [(rank, experts[rank]) for rank in sorted(lacking)])
            for rank, expert in enumerate(experts):
                if rank not in lacking:
                    if rank < len(experts) / 2:  # twice as many are named as the router chooses
                        result.append(Prediction(guess.layer, expert, 1.0, 0))
                elif (probability := self._rank_precision.of(ahead, rank)) >= _LEAST_ODDS:
                    result.append(Prediction(guess.layer, expert, probability, counts[rank]))
        return result

    def line(self) -> str:
        """What looking ahead came to, for people; empty where nobody looked."""
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
        experts = [expert for expert, _ in likely(found, _NAMED)][: len(guess.experts)]
        return experts, [weights.get(e, least) for e in experts]
