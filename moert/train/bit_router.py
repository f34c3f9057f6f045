"""Trains the bit router: what a width harms, learnt from the distance of the whole model to the lossless one.

The second router of D2MoE (arXiv 2504.15299, section 4.1): the model is frozen, the loss is the cross-entropy against
the lossless model's logits plus a price per bit. Other than there, it sees the first router's weights alone, so that a
width is a comparison; and it is trained over a range of prices, each drawn for one step, which stand for the mean
widths that can be asked for and keep all widths in use, as the paper's capacity shares do for a single mean.

What is learnt starts from the errors that the conversion measured: a factor for each layer and width, and for each
layer the power of the weight. Widths are drawn from a softmax over their costs and computed as they will be; the
gradient passes through the probabilities (straight through). Between two widths that are about equally likely, where a
threshold is moved, that is right up to the third order of the errors, since both ends of the step are seen equally
often. Everything is computed in float32 by torch.
"""

# T tokens, D hidden, K experts per token, L MoE layers, E experts, B widths

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moert.convert.calibration import weight_quantiles
from moert.errors import UsageError
from moert.models.stored_model import StoredModel
from moert.scheduler.precision import BitRouter, RoutedPrecision
from moert.store.bit_router import TrainedRouter
from moert.train import distil
from moert.train.distil import NestedExperts

_TEMPERATURE = 0.3  # bits that a width's cost may be above another's before it is rarely drawn
_RATE = 0.03
_PRICES = 16  # drawn from, at even distances of the mean width


@dataclass(frozen=True, slots=True)
class Comparison:
    """Mean KL, in nats per token, to the lossless model at a mean width, on windows that were not trained on."""

    mean_width: float
    before: float
    after: float


class _Nested(NestedExperts):
    """While `price` is set the widths are drawn and learn, else `chooser` chooses them."""

    def __init__(self, store: StoredModel, sensitivity: _Sensitivity, generator: torch.Generator) -> None:
        super().__init__(store)
        self._sensitivity, self._generator = sensitivity, generator
        self._bits = torch.tensor(store.meta.widths, dtype=torch.float32)
        self._rows = {layer: row for row, layer in enumerate(store.moe_layers)}
        self.price: float | None = None
        self.widths: list[Tensor] = []  # expected ones, of the layers since it was emptied
        self.routed: list[tuple[int, Tensor, Tensor]] = []  # layers, indices and weights, likewise

    def __call__(self, layer: int, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        self.routed.append((layer, indices, weights.detach()))
        if self.price is None:
            return super().__call__(layer, x, indices, weights)
        cost = self._sensitivity.cost(self._rows[layer], indices, weights) / self.price + self._bits
        p = (cost / -_TEMPERATURE).softmax(-1)
        chosen = torch.multinomial(p.detach().flatten(0, 1), 1, generator=self._generator).view_as(indices)
        self.widths.append((p * self._bits).sum(-1).mean())
        y = self.sum(layer, x, indices, weights, chosen)
        return y + self._slopes(layer, x.detach(), indices, weights.detach(), p - p.detach())

    def _slopes(self, layer: int, x: Tensor, indices: Tensor, weights: Tensor, slopes: Tensor) -> Tensor:
        """Zeros [T, D] that bring `slopes` [T, K, B], zeros as well, the gradients of the widths."""
        out = torch.zeros_like(x)
        for e in torch.unique(indices).tolist():
            tokens, places = (indices == e).nonzero(as_tuple=True)
            for n in range(self.kept[layer][e]):
                with torch.no_grad():
                    y = self.ffn(layer, e, n, x[tokens]) * weights[tokens, places, None]
                out = out.index_add(0, tokens, y * slopes[tokens, places, n, None])
        return out


class _Sensitivity(nn.Module):
    """The parameters that are learnt.

    sensitivity: as measured, float32 [L, E, B]. absent: bool [L, E, B], where an expert lacks the width.
    """

    def __init__(self, sensitivity: Tensor, absent: Tensor) -> None:
        super().__init__()
        self._measured, self._absent = sensitivity, absent
        self.factors = nn.Parameter(torch.zeros(sensitivity.shape[0], 1, sensitivity.shape[2]))  # logarithms
        self.exponents = nn.Parameter(torch.full((len(sensitivity),), 2.0))

    def cost(self, row: int, indices: Tensor, weights: Tensor) -> Tensor:
        """[T, K, B], without the price of the bits."""
        cost = weights[..., None].clamp_min(1e-9) ** self.exponents[row] * self.sensitivity()[row, indices]
        return cost.masked_fill(self._absent[row, indices], torch.inf)

    def sensitivity(self) -> Tensor:
        """[L, E, B]"""
        return self._measured * self.factors.exp()


class Trainer:
    """Trains a router for `store`, against the `lossless` store of the same checkpoint, on windows of token ids.

    Deterministic for a seed and a number of steps. Raises UsageError for a store whose experts' sensitivities are not
    known, for stores that do not belong together, and where memory does not suffice.
    """

    def __init__(self, store: StoredModel, lossless: StoredModel, windows: Sequence[Sequence[int]], seed: int) -> None:
        thresholds = store.bit_router(trained=False)
        if thresholds is None or store.meta.sensitivity is None:
            raise UsageError(
                f"{store.path} does not say how sensitive its experts are, from which training starts: convert the"
                " checkpoint again, without --fast."
            )
        self._windows, self._checked = distil.set_apart(windows)
        distil.check_memory(store, lossless, copies=1)
        self._store, self._before = store, thresholds
        self._generator = torch.Generator().manual_seed(seed)
        rows = torch.tensor([store.meta.sensitivity[layer] for layer in store.moe_layers])
        kept = torch.tensor([store.kept[layer] for layer in store.moe_layers])
        self._sensitivity = _Sensitivity(rows, torch.arange(rows.shape[2]) >= kept[..., None])
        self._experts = _Nested(store, self._sensitivity, self._generator)
        self._model = distil.decoder(store, self._experts)
        self._lossless = distil.decoder(lossless, NestedExperts(lossless))
        least, most = (thresholds.mean_width(thresholds.thresholds(2.0**power)) for power in (100, -100))
        self._means = [least + (most - least) * part for part in (0.25, 0.5)]
        span_of_means = [least + (most - least) * (0.1 + 0.65 * i / (_PRICES - 1)) for i in range(_PRICES)]
        self._prices = [thresholds.price(mean) for mean in span_of_means]

    def train(self, steps: int, seconds: float, on_progress: Callable[[str], None]) -> int:
        """Take so many steps, or as many as the time allows, but at least one. Returns how many it were.

        What is learnt is the mean over the second half of them.
        """
        optimiser = torch.optim.Adam(self._sensitivity.parameters(), lr=_RATE)
        ends, history = time.monotonic() + seconds, []
        order: list[int] = []
        with distil.torch_alone():
            for step in range(steps):
                if step and time.monotonic() > ends:
                    break
                order = order or torch.randperm(len(self._windows), generator=self._generator).tolist()
                kl, width = self._step(self._windows[order.pop()], optimiser)
                history.append([parameter.detach().clone() for parameter in self._sensitivity.parameters()])
                on_progress(f"step {step + 1} of {steps}: KL {kl:.4f} nats at {width:.2f} bits")
        half = history[len(history) // 2 :]
        with torch.no_grad():
            for i, parameter in enumerate(self._sensitivity.parameters()):
                parameter.copy_(torch.stack([values[i] for values in half]).mean(0))
        return len(history)

    def _step(self, ids: Tensor, optimiser: torch.optim.Optimizer) -> tuple[float, float]:
        experts = self._experts
        price = self._prices[int(torch.randint(_PRICES, (), generator=self._generator))]
        experts.price, experts.widths = price, []
        kl = distil.divergence(self._model, self._lossless, [ids])
        width = torch.stack(experts.widths).mean()
        uses = len(experts.widths) * self._store.architecture.top_k  # of experts by a token
        optimiser.zero_grad()
        torch.autograd.backward(kl / (price * uses) + width)  # divided by the price, so that all prices count alike
        optimiser.step()
        experts.price, experts.routed = None, []
        return float(kl.detach()), float(width.detach())

    def result(self, about: str) -> TrainedRouter:
        """Return the router that is learnt so far."""
        exponents = self._sensitivity.exponents.detach().clamp_min(0.1)
        return TrainedRouter(self._sensitivity.sensitivity().detach().numpy(), exponents.numpy(), about)

    @torch.no_grad()
    def compare(self, on_progress: Callable[[str], None]) -> list[Comparison]:
        """The thresholds of the conversion and what is learnt so far, each at the same mean width on these windows."""
        experts, router = self._experts, self._after()
        result = []
        with distil.torch_alone():
            self._choose(self._before, self._means[0])
            for ids in self._checked:
                on_progress("comparing with the thresholds of the conversion")
                distil.logits(self._model, [ids])
            usage = self._usage()
            for mean in self._means:
                found = []
                for candidate in (self._before, router):
                    self._choose(replace(candidate, usage=usage), mean)
                    total = 0.0
                    for ids in self._checked:
                        on_progress(f"comparing with the thresholds of the conversion at {mean:g} bits")
                        total += float(distil.divergence(self._model, self._lossless, [ids])) * len(ids)
                    found.append(total / sum(map(len, self._checked)))
                result.append(Comparison(mean, *found))
        experts.routed = []
        return result

    def _after(self) -> BitRouter:
        learnt, layers, kept = self.result(""), self._store.moe_layers, self._store.kept
        sensitivity = {
            layer: [row[:n] for row, n in zip(rows, kept[layer], strict=True)]
            for layer, rows in zip(layers, learnt.sensitivity.tolist(), strict=True)
        }
        return replace(
            self._before, sensitivity=sensitivity, exponents=dict(zip(layers, learnt.exponents.tolist(), strict=True))
        )

    def _choose(self, router: BitRouter, mean: float) -> None:
        self._experts.chooser = RoutedPrecision(mean, router)

    def _usage(self) -> dict[int, list[list[float]]]:
        """Return `router_weights` as in moert.json, of all that the experts have seen."""
        result = {}
        for layer in self._store.moe_layers:
            seen = [(indices, weights) for at, indices, weights in self._experts.routed if at == layer]
            indices, weights = (torch.cat(parts) for parts in zip(*seen, strict=True))
            result[layer] = [weight_quantiles(weights[indices == e]) for e in range(self._store.num_experts)]
        return result
