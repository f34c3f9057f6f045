"""Steps that break off after any line: the next ones give what a fresh run gives."""

import zlib
from types import SimpleNamespace

import pytest
import torch

from moert.device.backend import EmulatedDevice
from moert.device.hybrid import HybridRunner
from moert.hardware.devices import load_device
from moert.quant import nested
from moert.quant.format import ExpertLayout
from moert.runtime import residency as residency_module
from moert.runtime.executor import ExpertRunner, Policies
from moert.runtime.transfer import SliceReader
from moert.scheduler.assign import CostModel
from moert.scheduler.precision import ElasticPrecision, FixedPrecision
from moert.scheduler.replay import ForetoldRouting

from .interrupts import interrupt_after

LAYERS, EXPERTS, SLICES = 2, 5, 3
LAYOUT = ExpertLayout(64, 32, 32, (2, 3, 4))
SIZES = LAYOUT.slice_sizes


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Experts of two layers in a file, without the rest of a store."""
    g = torch.Generator().manual_seed(0)
    experts = [
        nested.pack_expert(*(torch.randn(*shape, generator=g) for shape in LAYOUT.shapes), LAYOUT)
        for _ in range(LAYERS * EXPERTS)
    ]
    file = tmp_path_factory.mktemp("residency") / "experts.bin"
    file.write_bytes(b"".join(p.numpy().tobytes() for pieces in experts for p in pieces))
    return SimpleNamespace(
        layout=LAYOUT,
        kept=dict.fromkeys(range(LAYERS), (SLICES,) * EXPERTS),
        location=lambda layer, e: SimpleNamespace(file=file, offset=(layer * EXPERTS + e) * sum(SIZES)),
        checksum=lambda layer, e, index: zlib.crc32(experts[layer * EXPERTS + e][index].numpy()),
    )


def token(runner, layer, seed):
    """One layer of one token, with what its router foresees of the other layer."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(1, EXPERTS, generator=g)
    weights, experts = scores.topk(2)
    x = torch.randn(1, 64, generator=g)
    guess = torch.rand(EXPERTS, generator=g).topk(4)
    other = ForetoldRouting((layer + 1) % LAYERS, tuple(guess.indices.tolist()), tuple(guess.values.tolist()))
    runner.on_router_prediction(layer - seed % 2, [other])
    out = torch.zeros(1, 64)
    if seed % 5 == 0:
        return runner(layer, x.repeat(3, 1), experts.repeat(3, 1), weights.repeat(3, 1))
    runner.forward_token(layer, x, experts[0].tolist(), weights[0].tolist(), out)
    return out


def broken_off(make, fresh, same):
    """Break off steps of a runner all over; every step that is not gives what a fresh runner gives."""
    runner, struck = make(), 0
    try:
        for number in range(90):
            layer, seed = number % LAYERS, number
            if number % 3:
                with_lines = 1 + (number * 37) % 700
                try:
                    with interrupt_after(with_lines):
                        token(runner, layer, seed)
                except KeyboardInterrupt:
                    struck += 1
            assert same(token(runner, layer, seed), token(fresh, layer, seed)), number
    finally:
        runner.close()
    assert struck > 20


@pytest.mark.parametrize("capacity", [(2, 2, 2), (6, 4, 3)])
@pytest.mark.parametrize("reader", ["as built", "python"])
def test_results_after_steps_that_broke_off_are_those_of_a_fresh_run(store, monkeypatch, capacity, reader):
    if reader == "python":
        monkeypatch.setattr(residency_module, "make_reader", SliceReader)
    fresh = ExpertRunner(store, (LAYERS * EXPERTS,) * SLICES, FixedPrecision(4), "silu")
    policies = Policies(horizons=(1,))
    broken_off(
        lambda: ExpertRunner(store, capacity, FixedPrecision(4), "silu", policies),
        fresh,
        lambda a, b: torch.equal(a, b),
    )
    fresh.close()


def test_an_elastic_budget_is_kept_through_steps_that_broke_off(store):
    runner = ExpertRunner(store, (4, 3, 2), ElasticPrecision(3.0, None, 0.0, 0.0), "silu", Policies(horizons=(1,)))
    for number in range(60):
        try:
            with interrupt_after(1 + (number * 41) % 700):
                token(runner, number % LAYERS, number)
        except KeyboardInterrupt:
            pass
        budget = runner.scheduler.error_budget
        assert budget.used <= budget.allowed * (1 + 1e-9)
    runner.close()


@pytest.mark.parametrize("on_device", [3, None])
def test_results_with_a_device_are_those_of_a_fresh_run(store, on_device):
    def make():
        device = EmulatedDevice(1 << 24, integrated=on_device is None)
        profile = load_device("laptop-rtx-4060-8gb")
        slots = None if on_device is None else (on_device,) * SLICES
        return HybridRunner(
            store,
            (4,) * SLICES,
            FixedPrecision(4),
            "silu",
            Policies(horizons=(1,)),
            device=device,
            device_slots=slots,
            cost_model=CostModel(profile, LAYOUT.widths, SIZES, device.integrated),
            hybrid=False,
        )

    fresh = ExpertRunner(store, (LAYERS * EXPERTS,) * SLICES, FixedPrecision(4), "silu")
    # The device rounds otherwise: int8 inputs leave up to 5%; a wrong expert far more.
    broken_off(make, fresh, lambda a, b: bool(((a - b).norm(dim=1) <= 0.1 * b.norm(dim=1)).all()))
    fresh.close()
