"""Whether prefetching pays, end to end in the runtime: a disk and a clock that go as fast as the test says."""

# L layers, E experts, K experts per token, D hidden

from types import SimpleNamespace

import pytest
import torch

from moert.models.router_prediction import RouterPrediction
from moert.quant.expert_table import ExpertTable
from moert.quant.format import ExpertLayout
from moert.runtime import executor as experts_module
from moert.runtime import host as host_module
from moert.runtime import residency as loading
from moert.runtime import waves as waves_module
from moert.runtime.executor import ExpertRunner, Policies
from moert.scheduler.cost import Disk
from moert.scheduler.precision import FixedPrecision, parse_precision
from moert.scheduler.replay import Foreteller
from moert.scheduler.trace import draw_trace

L, E, K, D, INNER = 4, 16, 2, 64, 32
TOKENS = 64 + 4 * 12 + 384 + 60  # until the first trial, the trial, and what it decides
LAYOUT = ExpertLayout(D, INNER, 32, (2, 3, 4))
DENSE_S, EXPERT_S = 1e-4, 1e-4
BYTES = sum(LAYOUT.slice_sizes)


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


class Ticket:
    """The event of a read: set once the clock has passed its end; waiting for it moves the clock."""

    def __init__(self, clock, disk, read):
        self.clock, self.disk, self.read = clock, disk, read

    def is_set(self):
        self.disk.advance(self.clock.now)
        return self.read.done is not None and self.read.done <= self.clock.now

    def wait(self):
        self.clock.now = max(self.clock.now, self.disk.wait(self.read))


class ThrottledReader:
    """Reads nothing, at so many bytes per second."""

    def __init__(self, clock, bytes_per_s):
        self.clock, self.disk = clock, Disk(bytes_per_s, 0.0, 4096)

    def submit(self, read, ahead=False):
        read._done = Ticket(self.clock, self.disk, self.disk.submit(self.clock.now, read.nbytes, ahead))

    def promote(self, read):
        self.disk.promote(self.clock.now, read._done.read)

    def cancel(self, read):
        return self.disk.cancel(self.clock.now, read._done.read)

    def drain(self): ...

    def close(self): ...


@pytest.fixture
def seconds(monkeypatch):
    """Time of decoding on a disk that reads the experts of a layer in `reading` times the time that it computes."""

    def run(horizons, reading, recall, precision, seed=1):
        clock = Clock()
        computing = DENSE_S + K * EXPERT_S
        reader = ThrottledReader(clock, K * BYTES / (reading * computing))
        monkeypatch.setattr(loading, "make_reader", lambda memory: reader)
        for module in (waves_module, experts_module, host_module):
            monkeypatch.setattr(module, "time", clock)

        def add(table, layer, experts, slices, *_):
            if table.missing(layer, experts, slices):
                return False
            clock.now += len(experts) * EXPERT_S
            return True

        def compute_one(table, layer, experts, *_):
            clock.now += len(experts) * EXPERT_S

        store = SimpleNamespace(
            layout=LAYOUT,
            kept=dict.fromkeys(range(L), (LAYOUT.num_slices,) * E),
            location=lambda layer, expert: SimpleNamespace(file=None, offset=0),
            checksum=lambda layer, expert, index: -1,
        )
        trace = draw_trace(layers=L, num_experts=E, top_k=K, prompt=0, tokens=TOKENS, seed=seed)
        teller = Foreteller(trace, (recall,), 2)
        with monkeypatch.context() as patch:
            patch.setattr(ExpertTable, "add", add)
            patch.setattr(ExpertTable, "compute_one", compute_one)
            slots = (L * E // 4,) * LAYOUT.num_slices
            runner = ExpertRunner(store, slots, precision, "silu", Policies(horizons=horizons))
            with runner.begin(True, 1):
                for step in trace.steps:
                    for layer, (chosen, weights) in step.layers.items():
                        clock.now += DENSE_S
                        if runner.horizon:
                            found = teller.guesses(step, layer)
                            runner.on_router_prediction(
                                layer, [RouterPrediction(g.layer, list(g.experts), list(g.weights)) for g in found]
                            )
                        x = torch.zeros(1, D)
                        runner.forward_token(layer, x, list(chosen), list(weights), x.clone())
            runner.close()
        return clock.now

    return run


@pytest.mark.parametrize("reading", [0.1, 1.0, 8.0], ids=["idle disk", "busy disk", "saturated disk"])
def test_prefetching_never_costs_more_than_two_percent(seconds, reading):
    without = seconds((0,), reading, 0.0, FixedPrecision(4))
    for recall in (0.0, 0.5, 0.9):
        assert seconds((0, 1), reading, recall, FixedPrecision(4)) <= 1.02 * without


@pytest.mark.parametrize("reading", [0.1, 8.0], ids=["idle disk", "saturated disk"])
def test_nor_with_elastic_precision(seconds, reading):
    """In the mean of some traces: what one run does decides what the next tokens find, so that single ones vary."""
    precision = parse_precision("elastic:3", (2, 3, 4))
    without, auto = (sum(seconds(h, reading, 0.5, precision, seed) for seed in range(4)) for h in ((0,), (0, 1)))
    assert auto <= 1.02 * without


def test_prefetching_gains_where_it_can_and_always_doing_it_would_lose(seconds):
    """Otherwise the tests above would tell nothing."""
    without, auto, always = (seconds(h, 1.0, 0.9, FixedPrecision(4)) for h in ((0,), (0, 1), (1,)))
    assert always < auto < without
    assert seconds((1,), 8.0, 0.5, FixedPrecision(4)) > 1.1 * seconds((0,), 8.0, 0.5, FixedPrecision(4))
