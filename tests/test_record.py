"""Launches from a record instead of one by one."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from moert.device import cuda
from moert.device.backend import EmulatedDevice

from .fake_cuda import FakeCuda


def test_a_record_takes_and_gives_the_same_tensors():
    x = torch.zeros(3)
    again = EmulatedDevice().record(lambda: (x + 1, x * 2))
    first = again()
    x[:] = torch.tensor([1.0, 2.0, 3.0])
    assert again()[0] is first[0]
    assert first[0].tolist() == [2, 3, 4]
    assert first[1].tolist() == [2, 4, 6]


@pytest.fixture
def device(monkeypatch):
    """A GPU with graphs: what is done at a replay takes `replay_s`, what is done one by one `launch_s`.

    As torch does it, a capture that fails leaves its stream the current one, and its memory that of a capture.
    """
    fake = FakeCuda()
    api = fake.api()
    state = SimpleNamespace(now=0.0, replay_s=1.0, launch_s=2.0, refused=False, replays=0, recorded=0, fake=fake)

    class CUDAGraph:
        def replay(self):
            state.replays += 1
            state.now += state.replay_s

    @contextmanager
    def graph(it, pool, stream):
        if fake.capturing is not None:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        before, fake.current, fake.capturing = fake.current, stream, pool
        state.recorded += 1
        yield
        if state.refused:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        fake.current, fake.capturing = before, None

    with fake:
        for name, value in (("CUDAGraph", CUDAGraph), ("graph", graph), ("graph_pool_handle", object)):
            monkeypatch.setattr(fake, name, value, raising=False)
        made = cuda.CudaDevice(api)
        monkeypatch.setattr(cuda, "time", SimpleNamespace(perf_counter=lambda: state.now))
        yield made, state


def function(state):
    result = (torch.ones(2),)
    state.streams = []

    def launch():
        state.now += state.launch_s
        state.streams.append(state.fake.current)
        return result

    return launch


def test_a_graph_is_replayed_where_that_is_faster(device):
    device, state = device
    again = device.record(function(state))
    before = state.replays
    assert again()[0].tolist() == [1, 1]
    assert state.replays == before + 1


def test_what_is_faster_one_by_one_stays_so(device):
    device, state = device
    state.replay_s = 3.0
    launch = function(state)
    assert device.record(launch) is launch


def test_what_cannot_be_recorded_stays_as_it_is(device):
    device, state = device
    state.refused = True
    launch = function(state)
    assert device.record(launch) is launch
    assert not state.replays
    assert state.fake.current is state.fake.compute
    assert state.fake.capturing is None
    state.refused = False
    assert device.record(launch) is launch  # who knows what the first left behind
    assert state.recorded == 1


def test_what_fails_before_it_is_recorded_stays_as_it_is(device):
    device, state = device

    def launch():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert device.record(launch) is launch
    assert state.fake.current is state.fake.compute
    assert not state.recorded


def test_all_graphs_are_made_on_one_stream(device):
    """Which is not the one that computes: each has a workspace of its own in cuBLAS."""
    device, state = device
    used = set()
    for _ in range(3):
        launch = function(state)
        device.record(launch)
        used |= set(state.streams)
    assert used == {state.fake.compute, device._aside}
