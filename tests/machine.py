"""A machine that is measured with sizes so small that what comes out says nothing, and parts that it may have."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from moert.measure import compute, disk, gpu_kernels, overheads
from moert.measure import profile as measure
from moert.measure.figure import Measured, Progress
from moert.runtime import transfer
from moert.scheduler.profile import DiskReads


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything as small as it can be."""
    for module, values in (
        (disk, {"FILE_BYTES": 1 << 20, "SAMPLE_BYTES": 1 << 16, "STREAM_BYTES": 1 << 16, "LATENCY_READS": 4}),
        (compute, {"HIDDEN": 64, "INNER": 32, "DENSE_SHAPE": (64, 64), "BUFFER_BYTES": 1 << 18, "SAMPLE_SECONDS": 0.0}),
        (compute, {"TOKENS": 16, "DEPTH": 16, "HEADS": 2, "KEY_HEADS": 1, "HEAD_DIM": 16, "REPETITIONS": 2}),
        (overheads, {"TOKENS": 6, "SHARES": (0.5,), "SWEEP_BYTES": 4096, "LARGE_TOKENS": 24, "LARGE_READS": 0}),
        (gpu_kernels, {"BUFFER_BYTES": 1 << 18, "MANY_EXPERTS": 4, "PROMPT_TOKENS": 16, "REPETITIONS": 2}),
    ):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    # Everything is measured, but what comes out of that would be impossible, now and then: beside these no figure is.
    kernels = compute.ComputeFigures(
        {4: 1e-10}, 0.1, Measured(1e-10, 0.1), {4: 1e11}, 0.1, Measured(1e11, 0.1), Measured(1e10, 0.1)
    )
    decoding = overheads.Overheads(*[Measured(1e-4, 0.1)] * 4, "a model")

    def read(target: disk.Target, progress: Progress) -> disk.DiskFigures:
        rows = (DiskReads(1, 4096, 1e9, 1e-4),)
        return replace(
            disk.measure_disk(target, progress),
            bytes_per_s=Measured(1e9, 0.1),
            latency_s=Measured(1e-4, 0.1),
            rows=rows,
        )

    def decode(*arguments: Any) -> overheads.Overheads:
        overheads.measure_overheads(*arguments)
        return decoding

    monkeypatch.setattr(measure, "measure_compute", lambda layouts, progress: kernels)
    monkeypatch.setattr(measure, "measure_disk", read)
    monkeypatch.setattr(measure, "measure_overheads", decode)
    monkeypatch.setattr(measure, "memory_bandwidths", lambda threads: [1.1e10, 1e10, 0.9e10])


def without_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that refuses O_DIRECT."""
    real = os.open

    def refuse(path, flags, *rest, **more):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(transfer.os, "open", refuse)


class FakeGpu:
    name = "Fake"
    total_bytes = 8 << 30

    def __init__(self, clock, integrated):
        self.clock, self.integrated = clock, integrated

    def copy_within(self):
        self.clock[0] += 0.5

    def copy_from_host(self):
        self.clock[0] += 2

    def multiply(self):
        self.clock[0] += 0.25
