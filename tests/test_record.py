"""What is launched from a record instead of one by one."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from moert.runtime import cuda
from moert.runtime.device import EmulatedDevice

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
    """A GPU with graphs: what is done at a replay takes `replay_s`, what is done one by one `launch_s`."""
    fake = FakeCuda()
    api = fake.api()
    state = SimpleNamespace(now=0.0, replay_s=1.0, launch_s=2.0, refused=False, replays=0, recorded=0)

    class CUDAGraph:
        def replay(self):
            state.replays += 1
            state.now += state.replay_s

    @contextmanager
    def graph(it, pool):
        state.recorded += 1
        yield
        if state.refused:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    with fake:
        for name, value in (("CUDAGraph", CUDAGraph), ("graph", graph), ("graph_pool_handle", object)):
            monkeypatch.setattr(fake, name, value, raising=False)
        made = cuda.CudaDevice(api)
        monkeypatch.setattr(cuda, "time", SimpleNamespace(perf_counter=lambda: state.now))
        yield made, state


def function(state):
    result = (torch.ones(2),)

    def launch():
        state.now += state.launch_s
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
    assert state.recorded == 1
    assert not state.replays
