"""The protocol that chooses the codes of a conversion, and a quantiser that looks at the weights alone."""

# D hidden, E experts, F expert inner size, B widths, K experts per token, n tokens

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moert.convert.parallel import Workers
from moert.convert.source_model import SourceModel
from moert.quant import nested
from moert.quant.format import LINEAR, ExpertLayout
from moert.quant.matmul import PackedExpert
from moert.store.meta import QUANTILES

NORM, GATE = "post_attention_layernorm", "mlp.gate"  # what stands before the experts of a layer
_ROUTED = 2048  # normal inputs of a router


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements of the experts of a layer. sensitivity and router_weights: see meta.py. usage: [E], the mean over
    all tokens of the square of the router weight that they give the expert, 0 where they are not routed to it.
    """

    sensitivity: list[list[float]]
    usage: list[float]
    router_weights: list[list[float]]


class Quantiser(Protocol):
    """Chooses the codes of experts. Results of one `name`, which is recorded in the store, must always be the same.

    Called in this order: `begin`; for each layer that is not finished yet, ascending, `prepare`, the call for each of
    its experts from several threads at once, `finish`; at last `dense`. What it keeps between runs is in `files`.
    """

    name: str
    files: Sequence[str]

    def code(self, widths: Sequence[int]) -> str:
        """Return how the codes that it chooses stand for weights, for a store of these widths: see quant/format.py."""
        ...

    def begin(self, folder: Path) -> None:
        """Start, or go on from what an earlier run left in `folder`, the folder of the conversion."""
        ...

    def prepare(self, layer: int, pool: Workers, report: Callable[[str], None]) -> None:
        """Before the experts of a layer; `report` is told a stage now and then where this takes long."""
        ...

    def __call__(
        self, layer: int, expert: int, gate: Tensor, up: Tensor, down: Tensor, layout: ExpertLayout
    ) -> Sequence[Tensor]:
        """The slices of one expert, uint8 [layout.slice_sizes[i]]. gate, up: [F, D]; down: [D, F].

        Raises ValueError for weights that cannot be stored.
        """
        ...

    def finish(self, layer: int) -> Measured | None:
        """After the experts of the layer that was prepared; what it knows of them."""
        ...

    def dense(self, name: str, start: int, weights: Tensor) -> Tensor:
        """Return what is stored instead of rows `start` ... of a dense tensor: of the same shape and dtype."""
        ...


def weight_quantiles(weights: Tensor) -> list[float]:
    """Return what moert.json says of an expert's router weights [n]: their number and their quantiles."""
    if not len(weights):
        return [0.0] * (2 + QUANTILES)
    ordered = weights.sort().values
    places = torch.linspace(0, len(ordered) - 1, 1 + QUANTILES).round().long()
    return [float(len(ordered)), *(round(w, 6) for w in ordered[places].tolist())]


class RoundToNearest:
    """Codes from the weights alone, with a search of the clipping range.

    How sensitive an expert is it takes from the errors of the weights, and its router weights from what the router of
    the layer makes of normal inputs.
    """

    name = "round-to-nearest"
    files: Sequence[str] = ()

    def __init__(self, source: SourceModel) -> None:
        self._source, self._arch = source, source.architecture
        self._errors: dict[int, list[float]] = {}

    def code(self, widths: Sequence[int]) -> str:
        return LINEAR

    def begin(self, folder: Path) -> None:
        pass

    def prepare(self, layer: int, pool: Workers, report: Callable[[str], None]) -> None:
        pass

    def __call__(
        self, layer: int, expert: int, gate: Tensor, up: Tensor, down: Tensor, layout: ExpertLayout
    ) -> Sequence[Tensor]:
        slices = nested.pack_expert(gate, up, down, layout)
        if not layout.raw:
            errors = []
            for count in range(1, layout.num_slices + 1):
                found = PackedExpert.from_slices(slices[:count], layout).floats()
                pairs = [(w.float(), q) for w, q in zip((gate, up, down), found, strict=True)]
                shares = [float((q - w).square().sum() / w.square().sum().clamp_min(1e-30)) for w, q in pairs]
                errors.append(sum(shares) / len(shares))
            self._errors[expert] = errors
        return slices

    def finish(self, layer: int) -> Measured | None:
        if not self._errors:
            return None
        E, K = self._arch.num_experts, self._arch.top_k
        prefix = f"model.layers.{layer}."
        gain, gate = (self._source.dense(f"{prefix}{name}.weight").float() for name in (NORM, GATE))
        x = torch.randn(_ROUTED, len(gain), generator=torch.Generator().manual_seed(0)) * gain
        weights = (x @ gate.T).softmax(-1).topk(K).values
        if self._arch.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        usage = float(weights.square().sum(-1).mean()) / E
        sensitivity = [self._errors[e] for e in range(E)]
        self._errors = {}
        return Measured(sensitivity, [usage] * E, [weight_quantiles(weights.flatten())] * E)

    def dense(self, name: str, start: int, weights: Tensor) -> Tensor:
        return weights
