"""Carries out the waves of a plan: has slices read, and hands over experts as they can be computed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

from moert.runtime.residency import Residency
from moert.runtime.telemetry import Telemetry
from moert.scheduler.types import Wave

Compute: TypeAlias = Callable[[dict[int, int]], None]  # told which experts can be computed, and with how many slices


class WaveRunner:
    """Goes through waves one by one. overlap: whether experts compute while others are read."""

    def __init__(self, residency: Residency, num_slices: int, telemetry: Telemetry, overlap: bool = True) -> None:
        self._residency, self._num_slices = residency, num_slices
        self._telemetry, self._overlap = telemetry, overlap

    def run(self, wave: Wave, layer: int, compute: Compute, meanwhile: Callable[[], None] | None = None) -> None:
        """Do what a wave says; `compute` gets experts as they come. Raises StoreError where one cannot be read.

        meanwhile: what else to do once everything is asked for.
        """
        residency, most = self._residency, self._num_slices
        residency.carry_out()
        loads = list(wave.loads)
        ready = dict.fromkeys(wave.resident, most)
        partly = {load.expert: load.first for load in reversed(loads)}
        if wave.awaited:
            in_flight = residency.promote(layer, wave.awaited, wave.loads)
            loads = in_flight + loads
            still = {load.expert for load in in_flight}
            ready |= {e: partly.get(e, most) for e in wave.awaited if e not in still}
            partly = {e: n for e, n in partly.items() if e not in still}
        ready |= partly
        if meanwhile is not None:
            meanwhile()
        if self._overlap:
            compute(ready)
            ready = {}
        while loads:
            before = time.perf_counter()
            for load in loads[: 1 if self._overlap else None]:
                residency.wait(load)
            self._telemetry.waited(layer, before)
            behind, rest = set(), []
            for load in loads:
                if residency.done(load) and load.expert not in behind:
                    residency.arrived(load)
                    ready[load.expert] = load.last
                else:
                    behind.add(load.expert)  # a refinement is of no use before its base
                    rest.append(load)
            loads = rest
            compute(ready)
            ready = {}
        if ready:
            compute(ready)
