"""Plain data that the planner takes and gives. Nothing here knows of tensors, files or devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class ExpertKey(NamedTuple):
    """One expert of the model."""

    layer: int
    expert: int


class SliceKey(NamedTuple):
    """One slice of one expert: slice 0 is the base width, each further one raises it."""

    layer: int
    expert: int
    slice: int


class RoutedExpert(NamedTuple):
    """The request of the router to one expert in one layer of one step.

    tokens: how many tokens are routed to it. weight: sum of their router weights. slices: how many slices the
    precision policy wants it to be computed with (at least 1). waiting: for each of these slices, how many of the
    tokens need it; empty where all do.
    """

    expert: int
    tokens: int
    weight: float
    slices: int
    waiting: tuple[int, ...] = ()


class RouterPrediction(Protocol):
    """Experts that the router of a layer to come will probably choose, the likeliest first, and its softmax."""

    @property
    def layer(self) -> int: ...
    @property
    def experts(self) -> Sequence[int]: ...
    @property
    def weights(self) -> Sequence[float]: ...


class Prediction(NamedTuple):
    """Somebody expects that `layer` will want the first `slices` slices of an expert in the coming step."""

    layer: int
    expert: int
    probability: float
    slices: int


class Load(NamedTuple):
    """Read slices first ... last - 1 of an expert: they lie next to each other, so this is one read."""

    layer: int
    expert: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Wave:
    """Part of a plan whose experts are in memory together.

    In order: evict, submit the loads, compute `resident` at once, compute the others as their slices arrive: those of
    `loads`, and `awaited`, of which slices are on their way already because they were predicted.
    """

    evictions: tuple[SliceKey, ...]
    loads: tuple[Load, ...]
    resident: tuple[int, ...]
    awaited: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The plan of what happens in one layer of one step. Every routed expert is computed in exactly one wave.

    slices: for each routed expert, with how many slices it computes at most (0: it is left out).
    """

    layer: int
    slices: dict[int, int]
    waves: tuple[Wave, ...]


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Loads that nobody waits for yet, to start while the disk is idle, after evicting."""

    evictions: tuple[SliceKey, ...]
    loads: tuple[Load, ...]
