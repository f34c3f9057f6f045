"""Learns the scales of the experts from the distance of the whole model to the lossless one; the codes stay.

In the manner of EfficientQAT's second phase (arXiv 2407.11062, section 3.3): after codes and scales were chosen layer
by layer, the scales alone are trained through the whole model, so that errors of one place make up for those of
another. Other than there, the loss is the KL divergence from the lossless model, and there are scales for every width:
each step computes the experts at one width, or, where the store knows how sensitive they are, at routed widths, by
turns, so that the scales serve mixtures too. Since the codes stay, widths go on being prefixes of each other.

What is learnt is the logarithm of a factor for each scale; the result is a mean over the steps that favours late ones
(Shamir and Zhang, arXiv 1212.1824, section 4). Everything is computed in float32 by torch.
"""

# N rows, K columns, G group size

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moert.errors import UsageError
from moert.models.stored_model import StoredModel
from moert.quant.matmul import PackedExpert, PackedMatrix
from moert.quant.reference import unpack_scales
from moert.scheduler.precision import FixedPrecision, Precision, RoutedPrecision
from moert.train import distil
from moert.train.distil import NestedExperts

PASSES = 6  # over the text with each precision at most: more of them fit the text rather than the model
_BATCH = 4  # windows of a step
# Of a scale's logarithm in a step, at 2 bits; half of it for each further bit, as the errors are half as large.
_RATE = 0.01
_RECENCY = 3  # step t counts about t ** 3 in the mean
_MOST_SCALE = 65504.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """Mean KL, in nats per token, to the lossless model at a precision, on windows that were not trained on."""

    precision: str
    before: float
    after: float


class _Scaled(NestedExperts):
    """Experts whose scales learn: `changes` are the logarithms of their factors, used where `learning` is set."""

    def __init__(self, store: StoredModel) -> None:
        super().__init__(store)
        self._group_size = store.meta.group_size
        self.learning = True
        self.scales: dict[tuple[int, int, int], list[Tensor]] = {}  # as stored: float32 [N, K / G] of gate, up, down
        for layer, e, n in self._weights:
            expert = PackedExpert.from_slices(store.read_expert(layer, e)[: n + 1], store.layout)
            matrices = [m for m in (expert.gate, expert.up, expert.down) if isinstance(m, PackedMatrix)]
            self.scales[layer, e, n] = [unpack_scales(m.slices[n], m.layout, n) for m in matrices]
        self.changes = {at: [nn.Parameter(torch.zeros_like(s)) for s in scales] for at, scales in self.scales.items()}

    def matrices(self, layer: int, expert: int, n: int) -> Sequence[Tensor]:
        weights = super().matrices(layer, expert, n)
        if not self.learning:
            return weights
        return [self._times(w, c.exp()) for w, c in zip(weights, self.changes[layer, expert, n], strict=True)]

    def _times(self, w: Tensor, factors: Tensor) -> Tensor:
        if factors.shape[1] == 1:  # of the trellis code
            return w * factors
        return w * factors[..., None].expand(-1, -1, self._group_size).flatten(1)[:, : w.shape[1]]

    def of_width(self, n: int) -> list[nn.Parameter]:
        return [change for at, changes in self.changes.items() if at[2] == n for change in changes]

    @torch.no_grad()
    def rounded(self, at: tuple[int, int, int]) -> list[Tensor]:
        """The scales learnt so far, in fp16; `changes` become those that lead to exactly these."""
        result = []
        for scales, change in zip(self.scales[at], self.changes[at], strict=True):
            new = (scales * change.exp()).clamp(-_MOST_SCALE, _MOST_SCALE).half()
            new = torch.where(new == 0, scales.half(), new)
            change.copy_((new.float() / scales).log().nan_to_num(0.0))
            result.append(new)
        return result


class _Watched(NestedExperts):
    """The lossless experts; tells `watch`, if there is one, what they are asked."""

    watch: Callable[[int, Tensor, Tensor], None] | None = None

    def __call__(self, layer: int, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        if self.watch is not None:
            self.watch(layer, x, indices)
        return super().__call__(layer, x, indices, weights)


class Trainer:
    """Trains the scales of `store`, against the `lossless` store of the same checkpoint, on windows of token ids.

    Deterministic for a seed and a number of steps. Raises UsageError for a store without scales, and where memory does
    not suffice.
    """

    def __init__(self, store: StoredModel, lossless: StoredModel, windows: Sequence[Sequence[int]], seed: int) -> None:
        if store.layout.raw:
            raise UsageError(f"{store.path} keeps its experts as they are, without scales: name one of 2 to 8 bits.")
        self._windows, self._checked = distil.set_apart(windows)
        distil.check_memory(store, lossless)
        self._store = store
        self._generator = torch.Generator().manual_seed(seed)
        self._experts = _Scaled(store)
        self._model = distil.decoder(store, self._experts)
        self._right = _Watched(lossless)
        self._lossless = distil.decoder(lossless, self._right)
        widths, router = store.meta.widths, store.bit_router()
        self._fixed: list[Precision] = [FixedPrecision(b) for b in reversed(widths)]
        self._routed: list[Precision] = []
        if router is not None and len(widths) > 1:
            least, most = (router.mean_width(router.thresholds(2.0**power)) for power in (100, -100))
            means = [least + (most - least) * part for part in (0.25, 0.5)]
            self._routed = [RoutedPrecision(mean, router) for mean in means]

    def train(self, steps: int, seconds: float, on_progress: Callable[[str], None]) -> int:
        """Take so many steps, or as many as the time or the text allow, but at least one. Returns how many it were."""
        widths, experts = self._store.meta.widths, self._experts
        by_width = [experts.of_width(n) for n in range(len(widths))]
        groups = [{"params": ps, "lr": _RATE * 2.0 ** (2 - b)} for ps, b in zip(by_width, widths, strict=True)]
        parameters = [p for ps in by_width for p in ps]
        optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
        means = [torch.zeros_like(p) for p in parameters]
        turns = len(self._fixed) + bool(self._routed)
        steps = min(steps, max(1, turns * PASSES * len(self._windows) // _BATCH))
        ends, done = time.monotonic() + seconds, 0
        order: list[int] = []
        with distil.torch_alone():
            while done < steps and not (done and time.monotonic() > ends):
                while len(order) < _BATCH:
                    order += torch.randperm(len(self._windows), generator=self._generator).tolist()
                batch = [self._windows[order.pop()] for _ in range(_BATCH)]
                kl = self._step(batch, self._turn(done, turns), optimiser)
                for mean, p in zip(means, parameters, strict=True):
                    mean.lerp_(p.detach(), (_RECENCY + 1) / (done + 1 + _RECENCY))
                done += 1
                on_progress(f"step {done} of {steps}: KL {kl:.4f} nats at {self._turn(done - 1, turns)}")
        with torch.no_grad():
            for mean, p in zip(means, parameters, strict=True):
                p.copy_(mean)
        for at in experts.changes:
            experts.rounded(at)
        return done

    def _turn(self, step: int, turns: int) -> Precision:
        cycle, turn = divmod(step, turns)
        return self._fixed[turn] if turn < len(self._fixed) else self._routed[cycle % len(self._routed)]

    def _step(self, batch: Sequence[Tensor], precision: Precision, optimiser: torch.optim.Optimizer) -> float:
        self._use(precision)
        kl = distil.divergence(self._model, self._lossless, batch)
        optimiser.zero_grad()
        torch.autograd.backward(kl)
        optimiser.step()
        return float(kl.detach())

    def _use(self, precision: Precision) -> None:
        self._experts.chooser = precision.chooser(self._store.meta.widths, self._store.kept)

    @torch.no_grad()
    def compare(self, on_progress: Callable[[str], None]) -> list[Comparison]:
        """The scales of the store and what is learnt so far, at each precision on the windows set apart."""
        result = []
        with distil.torch_alone():
            for precision in [*self._fixed, *self._routed]:
                self._use(precision)
                found = []
                for self._experts.learning in (False, True):
                    total = 0.0
                    for ids in self._checked:
                        on_progress(f"comparing with the scales of the store at {precision}")
                        total += float(distil.divergence(self._model, self._lossless, [ids])) * len(ids)
                    found.append(total / sum(map(len, self._checked)))
                result.append(Comparison(str(precision), *found))
        return result

    @torch.no_grad()
    def sensitivity(self, on_progress: Callable[[str], None]) -> dict[int, list[list[float]]] | None:
        """Return the sensitivity as in moert.json, if the store says it: by as much more or less as the outputs of the
        experts are wrong with what is learnt so far, where they see what the lossless model sees of the windows set
        apart.
        """
        known, layers = self._store.meta.sensitivity, self._store.moe_layers
        if known is None:
            return None
        # Calibration moves factors of the experts' inputs to the norm before them.
        norm = "layers.{}.post_attention_layernorm.weight"
        norms = {
            layer: [m.get_parameter(norm.format(layer)) for m in (self._model, self._lossless)] for layer in layers
        }
        factors = {layer: (here / there).nan_to_num(1.0) for layer, (here, there) in norms.items()}
        errors = {layer: torch.zeros(2, self._store.num_experts, len(self._store.meta.widths)) for layer in layers}

        def watch(layer: int, x: Tensor, indices: Tensor) -> None:
            here = x * factors[layer]
            for e in torch.unique(indices).tolist():
                tokens = (indices == e).any(-1)
                right = self._right.ffn(layer, e, 0, x[tokens])
                for n in range(self._store.kept[layer][e]):
                    for learning in (False, True):
                        self._experts.learning = learning
                        wrong = self._experts.ffn(layer, e, n, here[tokens]) - right
                        errors[layer][int(learning), e, n] += wrong.square().sum()

        self._right.watch = watch
        with distil.torch_alone():
            for ids in self._checked:
                on_progress("measuring what the widths cost")
                distil.logits(self._lossless, [ids])
        self._right.watch = None
        growth = {
            layer: torch.where(before > 0, after / before, 1.0).double() for layer, (before, after) in errors.items()
        }
        return {layer: (torch.tensor(known[layer]).double() * growth[layer]).tolist() for layer in layers}

    def result(self, layer: int, expert: int) -> list[list[Tensor]]:
        """Return the scales learnt so far: for each slice of an expert those of gate, up and down, fp16 [N, K / G]."""
        return [self._experts.rounded((layer, expert, n)) for n in range(self._store.kept[layer][expert])]
