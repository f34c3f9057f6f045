"""Predict which experts will be asked for, as probabilities, before anybody asks.

Sources, each with what it knows: `Popularity` and `LastToken` (baselines: what was used of late), `RoutingPath` (all
layers before the forward pass, from token ids and recent routes), `GateAhead` (the next layers, from the routers
themselves, while a layer's experts compute). `Mixed` weighs them against each other, layer by layer. `PredictorStats`
counts what came of it. One sequence at a time: a pass `begin`s with its tokens, then each layer says what it `used`.
"""

# T tokens, L layers with experts, E experts, K experts per token, V vocabulary, R rates, H hidden, Q summary, W width

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moert.scheduler.types import RouterPrediction

Floats = NDArray[np.float32]


class Predictor(Protocol):
    """Told of every pass; asked at any time."""

    name: str

    def begin(self, tokens: Sequence[int]) -> None:
        """A pass over these tokens begins: the next in the sequence."""

    def on_router_prediction(self, layer: int, guesses: Sequence[RouterPrediction]) -> None:
        """What the routers of the layers behind `layer` make of the hidden state there; -1: of the embedding."""

    def used(self, layer: int, experts: NDArray[np.int64]) -> None:
        """Note what `layer` asked for in this pass: [T, K]."""

    def probabilities(self, layer: int) -> Floats | None:
        """Return the probability of each expert of `layer` that the last token of this pass uses it, float32 [E]; None:
        cannot say.
        """


def likely(probabilities: Floats, least: float) -> list[int]:
    """Return the experts with at least this probability, the likeliest first."""
    found = np.flatnonzero(probabilities >= least)
    experts: list[int] = found[np.argsort(-probabilities[found], kind="stable")].tolist()
    return experts


def _sigmoid(odds: Floats) -> Floats:
    return (1 / (1 + np.exp(-np.clip(odds, -30, 30)))).astype(np.float32)


class Popularity:
    """The share of recent tokens that used each expert: a baseline."""

    name = "popularity"

    def __init__(self, layers: Sequence[int], num_experts: int, decay: float = 0.998) -> None:
        self._shares = {layer: np.zeros(num_experts, np.float32) for layer in layers}
        self._decay = np.float32(decay)

    def begin(self, tokens: Sequence[int]) -> None:
        pass

    def on_router_prediction(self, layer: int, guesses: Sequence[RouterPrediction]) -> None:
        pass

    def used(self, layer: int, experts: NDArray[np.int64]) -> None:
        shares = self._shares[layer]
        shares *= self._decay ** len(experts)
        np.add.at(shares, experts, (1 - self._decay) * self._decay ** np.arange(len(experts) - 1, -1, -1)[:, None])

    def probabilities(self, layer: int) -> Floats:
        return self._shares[layer]


class LastToken:
    """The experts of the token before, with the share of them that was used again of late: a baseline."""

    name = "last-token"

    def __init__(self, layers: Sequence[int], num_experts: int) -> None:
        self._num_experts = num_experts
        self._last = {layer: np.empty(0, np.int64) for layer in layers}
        self._again = dict.fromkeys(layers, 0.3)

    def begin(self, tokens: Sequence[int]) -> None:
        pass

    def on_router_prediction(self, layer: int, guesses: Sequence[RouterPrediction]) -> None:
        pass

    def used(self, layer: int, experts: NDArray[np.int64]) -> None:
        if len(last := self._last[layer]) and len(experts) == 1:
            again = float(np.isin(experts[0], last).mean())
            self._again[layer] += 0.02 * (again - self._again[layer])
        self._last[layer] = experts[-1]

    def probabilities(self, layer: int) -> Floats:
        result = np.zeros(self._num_experts, np.float32)
        result[self._last[layer]] = self._again[layer]
        return result


_BINS, _STEP = 32, 0.25  # of margins, in units of a router's logits


class GateAhead:
    """Predicts from what the routers of the next layers make of an earlier layer's hidden state (arXiv 2312.17238,
    section 3.2).

    A guess counts by how far its logit lies above or below those between which the router would cut off, and by how
    many layers ahead it was made; how often such a guess was right so far is its probability. Newer ones replace older.
    """

    name = "gate-ahead"

    def __init__(self, layers: Sequence[int], num_experts: int, top_k: int, horizon: int = 3) -> None:
        self._order = {layer: row for row, layer in enumerate(layers)}
        self._num_experts, self._top_k = num_experts, top_k
        middles = (np.arange(_BINS) - _BINS / 2) * _STEP
        prior = 1 / (1 + np.exp(-middles / np.arange(1, horizon + 1)[:, None]))
        self._tries = np.full((horizon, _BINS), 4.0, np.float32)
        self._hits = (4 * prior).astype(np.float32)
        # Of the pass that runs: by layer, how many layers ahead, experts and their softmax, the newest last.
        self._heard: dict[int, list[tuple[int, Sequence[int], Sequence[float]]]] = {}
        self._turn = 0

    def begin(self, tokens: Sequence[int]) -> None:
        self._heard = {}
        self._turn += 1

    def on_router_prediction(self, layer: int, guesses: Sequence[RouterPrediction]) -> None:
        for ahead, guess in enumerate(guesses[: len(self._tries)]):
            self._heard.setdefault(guess.layer, []).append((ahead, guess.experts, guess.weights))

    def _bins(self, weights: Sequence[float]) -> NDArray[np.int64]:
        scores = np.log(np.maximum(weights, 1e-30))
        cut = (scores[self._top_k - 1] + scores[min(self._top_k, len(scores) - 1)]) / 2
        return np.clip((scores - cut) / _STEP + (_BINS + 1) / 2, 0, _BINS - 1).astype(np.int64)

    def used(self, layer: int, experts: NDArray[np.int64]) -> None:
        heard = self._heard.pop(layer, None)
        if not heard:
            return
        ahead, guessed, weights = heard[self._turn % len(heard)]  # one of them: what all have to teach takes long
        asked = np.zeros(self._num_experts, bool)
        asked[experts[-1]] = True
        bins = self._bins(weights)
        self._tries[ahead] += np.bincount(bins, minlength=_BINS)
        self._hits[ahead] += np.bincount(bins, asked[np.asarray(guessed)], minlength=_BINS)
        if self._turn % 512 == 0 and self._tries[ahead].max() > 4096:  # what was seen long ago counts for less
            self._tries[ahead] /= 2
            self._hits[ahead] /= 2

    def probabilities(self, layer: int) -> Floats | None:
        heard = self._heard.get(layer)
        if not heard:
            return None
        ahead, experts, weights = heard[-1]
        bins = self._bins(weights)
        result = np.zeros(self._num_experts, np.float32)
        result[np.asarray(experts)] = self._hits[ahead, bins] / self._tries[ahead, bins]
        return result


@dataclass(frozen=True, eq=False)
class PathWeights:
    """The weights that training finds (moert/train_predictor.py says how the parts meet).

    tokens: int8 [V, W], with token_scales float32 [V]. context: [(CONTEXT + 1) * W, H]. routes: [L * E, Q].
    summary: [Q, H]. hidden_bias: [H]. out: [L * E, H]. out_bias: [L * E]. recent: [L, R]. All but tokens float32.
    """

    tokens: NDArray[np.int8]
    token_scales: Floats
    context: Floats
    routes: Floats
    summary: Floats
    hidden_bias: Floats
    out: Floats
    out_bias: Floats
    recent: Floats

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Return the tensors by name, as they are stored."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


CONTEXT = 3  # tokens whose vectors are seen one by one, the last among them
MEAN_RATE = 0.8  # of the mean of all vectors before the last
RATES = (0.0, 0.7, 0.95)  # of the shares of recent tokens that used an expert; the first: the last token alone


class RoutingPath:
    """The experts of all layers before a forward pass, from token ids and recent routes (ExpertFlow, arXiv 2410.17954).

    Its encoder and decoder are replaced by one hidden layer over: vectors of the last tokens and the decayed mean of
    those before, and a low-rank summary of the last token's routes. Each layer adds its experts' recent shares.
    """

    name = "routing-path"

    def __init__(self, layers: Sequence[int], weights: PathWeights) -> None:
        self._rows, self._w = {layer: row for row, layer in enumerate(layers)}, weights
        L = len(layers)
        self._num_experts, width = len(weights.out) // L, weights.tokens.shape[1]
        self._shares = np.zeros((len(RATES), L, self._num_experts), np.float32)
        self._vectors = np.zeros((CONTEXT, width), np.float32)  # the last token's first
        self._mean = np.zeros(width, np.float32)
        self._asked: dict[int, NDArray[np.int64]] = {}  # of the pass that runs or ran last, by row
        self._found: Floats | None = None  # [L, E]

    def begin(self, tokens: Sequence[int]) -> None:
        if self._asked:
            self._learn()
        ids = np.asarray(tokens, np.int64)
        for token in ids[-64:]:  # what was before weighs less than a millionth
            self._mean += (1 - MEAN_RATE) * (self._vectors[0] - self._mean)
            self._vectors[1:] = self._vectors[:-1]
            self._vectors[0] = self._w.tokens[token] * self._w.token_scales[token]
        self._found = None if len(ids) > 1 else self._look()

    def _learn(self) -> None:
        """Take what the last pass used into the shares."""
        for row, experts in self._asked.items():
            ages = np.arange(len(experts) - 1, -1, -1, dtype=np.float32)[:, None]
            for shares, rate in zip(self._shares[:, row], RATES, strict=True):
                shares *= rate ** len(experts)
                np.add.at(shares, experts, (1 - rate) * np.float32(rate) ** ages)
        self._asked = {}

    def _look(self) -> Floats:
        w, L = self._w, self._shares.shape[1]
        before = np.concatenate([*self._vectors, self._mean])
        last = self._shares[0].ravel().nonzero()[0]
        hidden = before @ w.context + w.routes[last].sum(0) @ w.summary + w.hidden_bias
        scores = (w.out @ np.maximum(hidden, 0) + w.out_bias).reshape(L, -1)
        scores += np.einsum("rle,lr->le", self._shares, w.recent)
        return _sigmoid(scores)

    def on_router_prediction(self, layer: int, guesses: Sequence[RouterPrediction]) -> None:
        pass

    def used(self, layer: int, experts: NDArray[np.int64]) -> None:
        self._asked[self._rows[layer]] = experts

    def probabilities(self, layer: int) -> Floats | None:
        return None if self._found is None else self._found[self._rows[layer]]


class Mixed:
    """Several predictors as one: their log-odds are added with weights that follow what turned out, layer by layer.

    Logistic mixing, as compressors mix models (Mattern, "Mixing strategies in data compression", DCC 2012): whoever is
    right in a layer soon decides there, and who cannot say is left out: those who can have weights of their own.
    """

    name = "mixed"

    def __init__(self, sources: Sequence[Predictor], rate: float = 0.02) -> None:
        self._sources, self._rate = sources, rate
        self._weights: dict[tuple[int, ...], Floats] = {}  # by layer and who speaks
        self._said: dict[int, tuple[tuple[int, ...], Floats, Floats]] = {}  # by layer, of the pass that runs

    def begin(self, tokens: Sequence[int]) -> None:
        self._said = {}
        for source in self._sources:
            source.begin(tokens)

    def on_router_prediction(self, layer: int, guesses: Sequence[RouterPrediction]) -> None:
        for source in self._sources:
            source.on_router_prediction(layer, guesses)

    def probabilities(self, layer: int) -> Floats | None:
        said = [source.probabilities(layer) for source in self._sources]
        voices = [p for p in said if p is not None]
        if not voices:
            return None
        odds = np.clip(np.stack(voices), 1e-3, 1 - 1e-3)
        odds = np.log(odds / (1 - odds))
        key = (layer, *(i for i, p in enumerate(said) if p is not None))
        weights = self._weights.setdefault(key, np.full(len(voices), 1 / len(voices), np.float32))
        result = _sigmoid(weights @ odds)
        self._said[layer] = key, odds, result
        return result

    def used(self, layer: int, experts: NDArray[np.int64]) -> None:
        if layer in self._said and len(experts) == 1:
            key, odds, result = self._said.pop(layer)
            wrong = -result
            wrong[experts[0]] += 1
            self._weights[key] += self._rate * (odds @ wrong) / len(experts[0])
        for source in self._sources:
            source.used(layer, experts)


@dataclass
class PredictorStats:
    """Statistics of how right guesses were, since the start.

    asked, foreseen: experts that tokens were routed to, and those of them that had been named before.
    """

    asked: int = 0
    foreseen: int = 0

    def count(self, named: Collection[int], asked: Collection[int]) -> None:
        """Count the hits of one layer of a pass."""
        self.asked += len(asked)
        self.foreseen += len(set(named) & set(asked))

    @property
    def recall(self) -> float | None:
        """Return the share of the experts used that had been named; None where there were none."""
        return self.foreseen / self.asked if self.asked else None


def make_predictor(
    name: str, layers: Sequence[int], num_experts: int, top_k: int, weights: PathWeights | None
) -> Predictor:
    """Make a predictor by name; `weights`: of a trained routing path, if there is one. ValueError for a name that is
    not known.
    """
    known: list[Predictor] = [
        Popularity(layers, num_experts),
        LastToken(layers, num_experts),
        GateAhead(layers, num_experts, top_k),
    ]
    if weights is not None:
        known.append(RoutingPath(layers, weights))
    sources = {source.name: source for source in known}
    if name in sources:
        return sources[name]
    if name != Mixed.name:
        raise ValueError(f"there is no predictor {name!r} (there are: {', '.join([*sources, Mixed.name])})")
    best = sources.get(RoutingPath.name, sources[Popularity.name])
    return Mixed([sources[GateAhead.name], best])
