"""Computes routed experts on the host's cores, out of a table of those that are in memory."""

# T tokens, K experts per token, D hidden

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from moert.kernels.elementwise import add_rows, combine
from moert.quant.expert_table import ExpertTable
from moert.runtime.routing import TokenGroups
from moert.runtime.telemetry import Telemetry
from moert.runtime.waves import Compute

Bring: TypeAlias = Callable[[Compute], None]  # has experts brought, and calls back with those that can be computed
More: TypeAlias = Callable[[], Tensor | None]  # what others computed meanwhile, float64 [T, D]


def nothing_more() -> None:
    """Stands for what nobody else computed."""


@dataclass(slots=True)
class _Step:
    """One layer of one step on its way.

    places: for each expert and each number of slices that it is wanted with, where it stands in the flattened [T, K]
    indices. outputs: float32 [T * K, D], filled from the front, `filled` rows so far. computed: the places of these.
    """

    layer: int
    slices: Mapping[int, int]
    x: Tensor
    places: TokenGroups
    outputs: Tensor
    filled: int = 0
    computed: list[Tensor] = field(default_factory=list)


class HostExperts:
    """Sums what experts of a table make of tokens, whichever of them come to be there first."""

    def __init__(self, table: ExpertTable, telemetry: Telemetry) -> None:
        self._table, self._telemetry = table, telemetry
        self._outputs = torch.empty(0)

    def sum_tokens(
        self,
        layer: int,
        slices: Mapping[int, int],
        x: Tensor,
        places: TokenGroups,
        weights: Tensor,
        bring: Bring,
        more: More = nothing_more,
    ) -> Tensor:
        """Return the weighted sum over the experts of each token: x float32 [T, D], weights [T, K] -> float32 [T, D].

        slices: with how many each expert is computed at most (0: not here). places: as of `route_tokens`. more: added
        in the end.
        """
        places = {e: groups for e, groups in places.items() if slices[e]}
        step = _Step(layer, slices, x, places, self._room(weights.numel(), x.shape[1]))
        bring(functools.partial(self._compute, step))
        # They stand in the order in which they were computed. What is not computed here has no row.
        rows = torch.full((weights.numel(),), -1)
        if step.computed:
            order = torch.cat(step.computed)
            rows[order] = torch.arange(len(order))
        return combine(step.outputs[: step.filled], rows, weights, more())

    def sum_token(
        self,
        layer: int,
        slices: Mapping[int, int],
        x: Tensor,
        experts: Sequence[int],
        weights: Sequence[float],
        out: Tensor,
        bring: Bring,
        more: More = nothing_more,
    ) -> None:
        """Add the weighted sum of a single token to `out`, without a tensor for each expert: x, out float32 [1, D]."""
        outputs = self._room(len(experts), x.shape[1])
        waiting = {e: rank for rank, e in enumerate(experts) if slices[e]}
        rows = list(waiting.values())

        def compute(ready: dict[int, int]) -> None:
            now = [e for e, there in ready.items() if e in waiting and slices[e] <= there]
            if now:
                before = time.perf_counter()
                ranks = [waiting.pop(e) for e in now]
                self._table.compute_one(layer, now, [slices[e] for e in now], ranks, x, outputs)
                self._telemetry.computed(layer, len(now), before)

        bring(compute)
        add_rows(outputs, rows, [weights[rank] for rank in rows], out, more())

    def _compute(self, step: _Step, ready: dict[int, int]) -> None:
        """Compute what waits for experts of which so many slices are there by now."""
        groups: list[tuple[int, int, Tensor]] = []
        for e, there in ready.items():
            most, waiting = step.slices[e], step.places[e]
            for n in [n for n in waiting if min(n, most) <= there]:
                groups.append((e, min(n, most), waiting.pop(n)))
        if not groups:
            return
        before = time.perf_counter()
        experts, slices, at = zip(*groups, strict=True)
        K = step.outputs.shape[0] // step.x.shape[0]
        rows = sum(map(len, at))
        out = step.outputs[step.filled : step.filled + rows]
        tokens_of = [places // K for places in at]
        self._table.compute(step.layer, experts, slices, tokens_of, step.x, out)
        step.computed += at
        step.filled += rows
        self._telemetry.computed(step.layer, len(experts), before)

    def _room(self, rows: int, size: int) -> Tensor:
        """Return float32 [rows, size], valid until the next call: kept, because new pages cost more than writing."""
        if self._outputs.numel() < rows * size:
            self._outputs = torch.empty(rows * size)
        return self._outputs[: rows * size].view(rows, size)
