"""Simulations with a device beside the host: by hand on a fake clock, and what must hold on every profile of a GPU."""

import dataclasses

import pytest

from moert.hardware.devices import devices, load_device
from moert.scheduler.assign import CostModel
from moert.scheduler.cache import SliceCache
from moert.scheduler.cost import Disk
from moert.scheduler.eviction import POLICIES
from moert.scheduler.planner import Scheduler
from moert.scheduler.simulation import Settings
from moert.scheduler.tiered_replay import DeviceCosts, TieredReplay, TieredSimulator
from moert.scheduler.tiers import TieredPrefetch, Tiers
from moert.scheduler.trace import DECODE, Routing, Trace, TraceStep, draw_trace
from moert.scheduler.types import ExpertKey, Prediction, Prefetch, RoutedExpert

NOTHING = Prefetch((), ())
GPUS = [name for name in devices() if load_device(name).gpu_integrated is not None]
# An expert of 100 bytes: 1 s on the host, 0.1 s on the device, 0.25 + 2 s to move, 0.5 + 10 s to read. Dense: 0.01 s.
DEVICE = dataclasses.replace(
    load_device("laptop-rtx-4060-8gb"),
    disk_bytes_per_s=10.0,
    disk_latency_s=0.5,
    disk_chunk_bytes=10.0,
    memory_bytes_per_s=1e15,
    expert_s_per_byte={4: 0.01},
    gpu_expert_s_per_byte={4: 0.001},
    host_to_device_bytes_per_s=50.0,
    host_to_device_latency_s=0.25,
    gpu_launch_overhead_s=0.02,
    **{f"{name}_overhead_s": 0.0 for name in ("token", "layer", "miss", "load")},
)


class Demanded(Tiers):
    """Moves nothing ahead, unless something is predicted: it would fill the room that is free."""

    def prefetch(self, predictions):
        return super().prefetch(predictions) if predictions else TieredPrefetch(NOTHING, NOTHING)


def decode(wanted, *, at_host, on_device, hybrid=True, unified=False, dense=(10, 10), predicted=None, device=DEVICE):
    """Seconds of one token that wants these experts of each layer, given what the tiers hold; and the totals."""
    L = len(wanted)
    sizes = [(100,)] * L
    steps = (TraceStep(DECODE, {n: Routing(es, (1.0,) * len(es)) for n, es in enumerate(wanted)}),)
    trace = Trace("t", L, 8, 4, (100,) * L, dense[:L], steps)

    def scheduler(held):
        cache = SliceCache((800,), POLICIES["score"](range(L), 8, 1), dict(enumerate(sizes)))
        for key in held:
            cache.insert(ExpertKey(*key), 1, ())
        return Scheduler(cache, ahead=100)

    cost_model = CostModel(device, (4,), (100,), unified)
    tiers = Demanded(scheduler(at_host), None if unified else scheduler(on_device), cost_model, hybrid)
    replay = TieredReplay(
        DeviceCosts(device, sizes, trace.dense_bytes, (4,), cost_model),
        Disk(10.0, 0.5, 10.0),
        tiers,
        lambda layer, steps: ([RoutedExpert(e, 1, 1.0, 1) for e in wanted[layer]], []),
        None if predicted is None else lambda step, layer: [Prediction(1, predicted, 0.9, 1)] if layer == 0 else [],
    )
    totals = replay.run(trace)
    assert replay.now == pytest.approx(totals.computed_s + totals.stalled_s)
    return replay.now, totals


def test_a_missing_expert_is_computed_by_the_host_or_moved_whichever_ends_sooner():
    known = {"at_host": [(0, 2)], "on_device": [(0, 0), (0, 1)]}
    seconds, totals = decode([(0, 1, 2)], **known)
    assert seconds == pytest.approx(0.01 + 0.25 + 1 + 0.25)  # its input to the host, its output back
    assert (totals.at_host, totals.moved, totals.hits) == (1, 0, 3)
    seconds, totals = decode([(0, 1, 2)], **known, hybrid=False)
    assert seconds == pytest.approx(0.01 + 2.25 + 0.02 + 0.1)
    assert (totals.at_host, totals.moved, totals.hits) == (0, 100, 2)
    assert totals.computed_s == pytest.approx(0.01 + 0.2 + 0.1)
    slow = dataclasses.replace(DEVICE, expert_s_per_byte={4: 0.05})
    seconds, totals = decode([(0, 1, 2)], **known, device=slow)
    assert seconds == pytest.approx(0.01 + 2.25 + 0.02 + 0.1)
    assert (totals.at_host, totals.moved) == (0, 100)


def test_moves_and_the_host_work_side_by_side():
    """Five are in host memory: three there take 3.5 s with their inputs, two moved 4.5 s."""
    seconds, totals = decode([(0, 1, 2, 3, 4)], at_host=[(0, e) for e in range(5)], on_device=[])
    assert (totals.at_host, totals.moved) == (4, 100)  # four there: 4.5 s; one moved: 2.37 s
    assert seconds == pytest.approx(0.01 + 4.5)


def test_what_is_read_is_computed_where_it_ends_sooner():
    seconds, totals = decode([(0, 1)], at_host=[], on_device=[(0, 0)])
    assert seconds == pytest.approx(0.01 + 0.5 + 10 + 1 + 0.25)
    assert totals.nbytes == 100
    seconds, totals = decode([(0, 1)], at_host=[], on_device=[(0, 0)], hybrid=False)
    assert seconds == pytest.approx(0.01 + 0.5 + 10 + 2.25 + 0.02 + 0.1)
    assert (totals.nbytes, totals.moved) == (100, 100)


def test_in_one_memory_nothing_is_moved_and_its_speed_is_shared():
    known = {"at_host": [(0, e) for e in range(4)], "on_device": [], "unified": True}
    seconds, totals = decode([(0, 1, 2, 3)], **known)
    assert seconds == pytest.approx(0.01 + 0.02 + 0.4)  # the host would take 1.5 s for one
    assert (totals.at_host, totals.moved, totals.hits) == (0, 0, 4)
    narrow = dataclasses.replace(DEVICE, memory_bytes_per_s=100.0)
    assert decode([(0, 1, 2, 3)], **known, device=narrow)[0] == pytest.approx(0.01 + 400 / 100)


def test_a_move_ahead_hides_behind_what_computes_meanwhile():
    """The second layer's dense part takes 3 s, the move of its expert 2.25 s."""
    known = {"at_host": [(1, 2)], "on_device": [(0, 0)], "dense": (10, 3000)}
    alone = decode([(0,), (2,)], **known)
    assert alone[0] == pytest.approx(0.13 + 3 + 1.5)
    seconds, totals = decode([(0,), (2,)], **known, predicted=2)
    assert seconds == pytest.approx(0.13 + 3 + 0.12)
    assert totals.moved == 100


def small_trace(**more):
    options = {"layers": 3, "num_experts": 16, "top_k": 4, "prompt": 24, "tokens": 40, "seed": 1}
    return draw_trace(**(options | {"expert_bytes": 2_801_664, "dense_bytes": 10_560_000} | more))


@pytest.mark.parametrize("precision", ["fixed:4", "routed:3", "elastic:3"])
@pytest.mark.parametrize("name", GPUS)
def test_what_must_hold_on_every_profile_of_a_gpu(name, precision):
    trace, profile = small_trace(), load_device(name)
    whole = 3 * 16 * trace.expert_bytes[0]
    settings = Settings(whole, precision, recalls=(), device_budget=whole // 4)
    found = TieredSimulator(trace, profile).compare(settings)
    speeds = {part: getattr(found, part).decode_tokens_per_s for part in ("run", "device", "host", "resident")}
    assert speeds["run"] >= 0.97 * speeds["device"]
    assert speeds["run"] >= 0.97 * speeds["host"]  # these GPUs compute what they hold faster than their hosts
    assert speeds["resident"] >= max(speeds.values()) * 0.97
    assert found.device.host_share == 0
    assert found.host.host_share == pytest.approx(1)
    if profile.gpu_integrated:
        assert found.run.bytes_moved_per_token == found.device.bytes_moved_per_token == 0
        assert speeds["device"] > speeds["host"]
    else:
        assert 0 < found.run.host_share < 1
        assert found.device.bytes_moved_per_token > 0
    if not precision.startswith("elastic"):
        assert found.run.mean_width == pytest.approx(found.host.mean_width)
        assert found.run.mass_at_width == pytest.approx(found.host.mass_at_width)


def test_the_same_for_the_same_seed_and_no_slower_than_what_the_link_allows():
    """A device that holds nothing for long: every use is a move, so without the host the link is the bound."""
    trace, profile = small_trace(), load_device("laptop-rtx-4060-8gb")
    whole = 3 * 16 * trace.expert_bytes[0]
    settings = Settings(whole, "fixed:4", policy="lru", recalls=(0.8,), device_budget=5 * trace.expert_bytes[0])
    found = TieredSimulator(trace, profile).compare(settings)
    assert found == TieredSimulator(trace, profile).compare(settings)
    result = found.device
    assert result.bytes_moved_per_token > 0
    assert 1 / result.decode_tokens_per_s >= result.bytes_moved_per_token / profile.host_to_device_bytes_per_s * 0.99
    assert found.run.decode_tokens_per_s > found.device.decode_tokens_per_s


def test_what_cannot_be_simulated_is_said():
    trace = small_trace(tokens=2)
    with pytest.raises(ValueError, match="server-2-core-amx has no figures of a GPU"):
        TieredSimulator(trace, load_device("server-2-core-amx"))
    simulator = TieredSimulator(trace, load_device("laptop-rtx-4060-8gb"))
    with pytest.raises(ValueError, match="a device budget of 1000 bytes at fixed:4 holds not one expert"):
        simulator.compare(Settings(10**9, "fixed:4", device_budget=1000))
    with pytest.raises(ValueError, match="an expert budget of 1000 bytes at fixed:4 holds not one expert"):
        simulator.compare(Settings(1000, "fixed:4", device_budget=10**9))
