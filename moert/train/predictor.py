"""Trains what predicts routes before a forward pass, from recorded traces.

One hidden layer over: vectors of the last three tokens, the decayed mean of those before, and a low-rank summary of the
routes of the token before; added to it are each expert's shares of recent tokens. ExpertFlow (arXiv 2410.17954) has an
encoder and a decoder in its place: on the model that ships, an encoder of two layers over the last 64 tokens found
0.748 of the experts, this 0.767, in a quarter of the time to train. A token's vector is a learnt projection of the
model's own embedding, so that tokens which the traces lack have one too, plus what is learnt about it alone.
"""

# T tokens, L layers with experts, E experts, K experts per token, V vocabulary, D hidden size of the model, R rates,
# H hidden size of the predictor, Q summary, W width of a token's vector

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from moert.errors import UsageError
from moert.models.stored_model import StoredModel
from moert.quant.matmul import PackedMatrix, floats
from moert.scheduler.predictor import (
    CONTEXT,
    MEAN_RATE,
    RATES,
    LastToken,
    PathWeights,
    Popularity,
    Predictor,
    RoutingPath,
)
from moert.scheduler.trace import TraceStep, read_trace
from moert.store.layout import EMBEDDING

WINDOW = 512
_WIDTH, _HIDDEN, _SUMMARY = 32, 128, 32
_RATE, _TOKEN_RATE = 3e-3, 3e-2
_CHECKED_TOKENS = 4096  # that are kept from training at most


@dataclass(frozen=True, eq=False)
class Window:
    """Tokens in their order, int64 [T], and their experts, int64 [T, L, K]."""

    tokens: Tensor
    experts: Tensor


@dataclass(frozen=True, slots=True)
class Recall:
    """Share of the experts used that stand among as many named, over all layers and in each."""

    name: str
    mean: float
    layers: tuple[float, ...]


def read_windows(store: StoredModel, paths: Sequence[Path]) -> list[Window]:
    """The tokens of traces of `store`, at most WINDOW of one turn together.

    UsageError for one that cannot be read, is of another model or does not say which tokens went in.
    """
    windows = []
    for path in paths:
        try:
            trace = read_trace(path)
        except (ValueError, OSError) as error:
            raise UsageError(f"{str(error).rstrip('.')}.") from None
        arch, name = store.architecture, Path(store.meta.source_name).name
        if trace.model != name or (trace.layers, trace.num_experts) != (arch.num_layers, arch.num_experts):
            raise UsageError(f"{path} is a trace of {trace.model}, not of {name}: record one with this store.")
        for step in trace.steps:
            if step.token is None or not step.token < arch.vocab_size:
                raise UsageError(f"{path} does not say which tokens went in: record it with --record-trace.")
            if any(len(step.layers.get(layer, ((), ()))[0]) != arch.top_k for layer in store.moe_layers):
                raise UsageError(f"{path} lacks layers of some tokens: record it with --record-trace.")
        turns: dict[int, list[TraceStep]] = {}  # several may have run together
        for step in trace.steps:
            turns.setdefault(step.turn, []).append(step)
        for turn in turns.values():
            tokens = torch.tensor([step.token for step in turn])
            experts = torch.tensor([[step.layers[layer].experts for layer in store.moe_layers] for step in turn])
            cut = zip(torch.split(tokens, WINDOW), torch.split(experts, WINDOW), strict=True)
            windows += [Window(*pair) for pair in cut if len(pair[0]) > 1]
    return windows


class _Path(nn.Module):
    """The predictor as `RoutingPath` computes it, for a whole window."""

    def __init__(self, store: StoredModel, popularity: Tensor) -> None:
        super().__init__()
        rows, layers = popularity.numel(), len(store.moe_layers)
        hidden, inputs = store.architecture.hidden_size, (CONTEXT + 1) * _WIDTH
        self.projection = nn.Parameter(torch.randn(hidden, _WIDTH) * hidden**-0.5)
        self.tokens = nn.Embedding(store.architecture.vocab_size, _WIDTH)
        nn.init.zeros_(self.tokens.weight)
        self.context = nn.Parameter(torch.randn(inputs, _HIDDEN) * inputs**-0.5)
        self.routes = nn.Parameter(torch.randn(rows, _SUMMARY) * 0.05)
        self.summary = nn.Parameter(torch.randn(_SUMMARY, _HIDDEN) * _SUMMARY**-0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(_HIDDEN))
        self.out = nn.Parameter(torch.randn(rows, _HIDDEN) * 0.5 * _HIDDEN**-0.5)
        self.out_bias = nn.Parameter(popularity.flatten().clamp(1e-4, 0.999).logit())
        self.recent = nn.Parameter(torch.ones(layers, len(RATES)))

    def forward(self, window: Window, embedded: Tensor) -> Tensor:
        """embedded: [T, D], the model's embedding of the tokens. Returns log-odds [T, L, E]."""
        vectors = self.tokens(window.tokens) + embedded @ self.projection
        T, L, _ = window.experts.shape
        age = torch.arange(T)[:, None] - torch.arange(T) - 1
        mean = torch.where(age >= 0, (1 - MEAN_RATE) * MEAN_RATE ** age.clamp_min(0).float(), 0.0)
        seen = [functional.pad(vectors, (0, 0, i, 0))[:T] for i in range(CONTEXT)]
        rows = (window.experts + torch.arange(L)[:, None] * (len(self.out) // L)).flatten(1)
        last = functional.embedding_bag(rows, self.routes, mode="sum")
        last = functional.pad(last, (0, 0, 1, 0))[:T]
        hidden = torch.cat([*seen, mean @ vectors], -1) @ self.context + last @ self.summary + self.hidden_bias
        scores = (hidden.relu() @ self.out.T + self.out_bias).view(T, L, -1)
        result: Tensor = scores + torch.einsum("rtle,lr->tle", recent_shares(rows, scores), self.recent)
        return result


def recent_shares(rows: Tensor, like: Tensor) -> Tensor:
    """Return for each rate, token and expert its decayed share of the tokens before: [R, T, L, E]. rows: [T, L * K]."""
    T = len(rows)
    hot = torch.zeros(T, like[0].numel()).scatter_(1, rows, 1.0)
    shares = torch.zeros(len(RATES), T, hot.shape[1])
    for t in range(1, T):
        for r, rate in enumerate(RATES):
            torch.lerp(hot[t - 1], shares[r, t - 1], rate, out=shares[r, t])
    return shares.view(len(RATES), *like.shape)


class Trainer:
    """Trains a predictor for `store` on windows; the last eighth of them is kept for `compare`.

    Deterministic for a seed and a number of epochs. UsageError for too few windows.
    """

    def __init__(self, store: StoredModel, windows: Sequence[Window], seed: int) -> None:
        if len(windows) < 2:
            raise UsageError(f"Training needs more than one text of two or {WINDOW} tokens: record longer traces.")
        count, kept = 0, len(windows)
        while kept > 1 and kept > len(windows) * 7 // 8 and count < _CHECKED_TOKENS:
            kept -= 1
            count += len(windows[kept].tokens)
        self._windows, self._checked = windows[:kept], windows[kept:]
        self._store, self._generator = store, torch.Generator().manual_seed(seed)
        self._embedding = store.load_dense()[EMBEDDING]
        used = torch.unique(torch.cat([window.tokens for window in self._windows]))
        self._place = torch.zeros(store.architecture.vocab_size, dtype=torch.int64)
        self._place[used] = torch.arange(len(used))
        self._embedded = torch.cat([_normed(self._embedding, int(t), int(t) + 1) for t in used])
        hits = torch.zeros(len(store.moe_layers), store.num_experts)
        for window in self._windows:
            flat = window.experts.transpose(0, 1).flatten(1)
            hits.scatter_add_(1, flat, torch.ones(flat.shape))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._model = _Path(store, hits / sum(len(window.tokens) for window in self._windows))

    def train(self, epochs: int, seconds: float, on_progress: Callable[[str], None]) -> int:
        """Go so many times through the windows, or as often as the time allows. Returns how many steps it were."""
        model, tokens = self._model, [self._model.tokens.weight]
        others = [p for p in model.parameters() if p is not tokens[0]]
        optimiser = torch.optim.Adam([{"params": others, "lr": _RATE}, {"params": tokens, "lr": _TOKEN_RATE}])
        total, step, begun = epochs * len(self._windows), 0, time.monotonic()
        shares = [group["lr"] for group in optimiser.param_groups]
        loss = 0.0
        for epoch in range(epochs):
            for i in torch.randperm(len(self._windows), generator=self._generator).tolist():
                passed = time.monotonic() - begun
                if step and passed > seconds:
                    return step
                left = 1 - max(step / total, passed / seconds)
                for group, rate in zip(optimiser.param_groups, shares, strict=True):
                    group["lr"] = rate * max(0.02, left)
                found = self._step(self._windows[i], optimiser)
                loss = found if not step else loss + 0.1 * (found - loss)
                step += 1
                on_progress(f"epoch {epoch + 1} of {epochs}, step {step} of {total}: loss {loss:.4f}")
        return step

    def _step(self, window: Window, optimiser: torch.optim.Optimizer) -> float:
        scores = self._model(window, self._embedded[self._place[window.tokens]])
        used = torch.zeros_like(scores).scatter_(-1, window.experts, 1.0)
        loss = functional.binary_cross_entropy_with_logits(scores, used)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        return float(loss.detach())

    @torch.no_grad()
    def result(self) -> PathWeights:
        """Return what is learnt so far, with the vectors of all tokens."""
        model, rows = self._model, self._store.architecture.vocab_size
        projected = [_normed(self._embedding, i, min(i + 4096, rows)) @ model.projection for i in range(0, rows, 4096)]
        vectors = torch.cat(projected) + model.tokens.weight
        scales = vectors.abs().amax(-1).clamp_min(1e-12) / 127
        codes = (vectors / scales[:, None]).round().to(torch.int8)
        others = {name: p.numpy().copy() for name, p in model.named_parameters(recurse=False) if name != "projection"}
        return PathWeights(tokens=codes.numpy(), token_scales=scales.numpy(), **others)

    def compare(self, on_progress: Callable[[str], None]) -> list[Recall]:
        """Compare what the predictor and the baselines name, on windows that were not trained on."""
        layers, experts = self._store.moe_layers, self._store.num_experts
        weights = self.result()
        candidates: list[Callable[[], Predictor]] = [
            lambda: RoutingPath(layers, weights),
            lambda: Popularity(layers, experts),
            lambda: LastToken(layers, experts),
        ]
        return [measure(make(), self._windows, self._checked, layers, on_progress) for make in candidates]


def measure(
    predictor: Predictor,
    before: Sequence[Window],
    windows: Sequence[Window],
    layers: Sequence[int],
    on_progress: Callable[[str], None],
) -> Recall:
    """Recall of as many experts as are used, token by token. `before`: what the predictor hears first, unmeasured."""
    for window in before[-8:]:
        predictor.begin(window.tokens.tolist())
        for row, layer in enumerate(layers):
            predictor.used(layer, window.experts[:, row].numpy())
    found, total = np.zeros(len(layers)), 0
    for window in windows:
        experts = window.experts.numpy()
        for t, token in enumerate(window.tokens.tolist()):
            predictor.begin([token])
            for row, layer in enumerate(layers):
                said, used = predictor.probabilities(layer), experts[t, row]
                assert said is not None
                named = np.argpartition(-said, len(used) - 1)[: len(used)]
                found[row] += np.isin(used, named).sum() / len(used)
            for row, layer in enumerate(layers):
                predictor.used(layer, experts[t : t + 1, row])
            total += 1
            on_progress(f"measuring {predictor.name}: token {total}")
    shares = tuple((found / total).tolist())
    return Recall(predictor.name, sum(shares) / len(shares), shares)


def _normed(embedding: Tensor | PackedMatrix, first: int, last: int) -> Tensor:
    """Rows of the embedding over their root mean square, float32 [last - first, D]."""
    if isinstance(embedding, PackedMatrix):
        start = first // 16 * 16
        rows = embedding.rows(start, min(-(-last // 16) * 16, embedding.shape[0]))[first - start : last - start]
    else:
        rows = floats(embedding[first:last])
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-12)
