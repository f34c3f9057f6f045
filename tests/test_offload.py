"""Layers and experts on a device under a budget, and what the user is told of it."""

import json
import subprocess
from itertools import pairwise

import pytest
import torch

from moert import LLM, SamplingParams
from moert.device import backend as device_module
from moert.device import offload as offload_module
from moert.device.backend import EmulatedDevice
from moert.engine import model_runner as engine_module
from moert.errors import BudgetError, DeviceError, UsageError
from moert.hardware.memory import library_bytes
from moert.runtime.residency import Residency

from .child import ENVIRONMENT, PYTHON

MIB = 1 << 20
GREEDY = SamplingParams(max_tokens=8, temperature=0)


def run(*arguments):
    return subprocess.run([*PYTHON, "-m", "moert", *arguments], capture_output=True, text=True, env=ENVIRONMENT)


class Counting(EmulatedDevice):
    """Notes how much of its memory was taken at most."""

    most = 0

    def allocate(self, nbytes):
        block = super().allocate(nbytes)
        self.most = max(self.most, self._taken)
        return block


@pytest.fixture
def device(monkeypatch):
    """The device that is used, of 256 MiB."""
    made = Counting(256 * MIB)
    monkeypatch.setattr(offload_module, "open_device", lambda kind, say: None if kind == "cpu" else made)
    return made


@pytest.mark.parametrize("budget", [14, 40, 73, 80, 120, None])
def test_the_device_budget_holds(device, budget):
    lines = []
    size = None if budget is None else budget * MIB
    with LLM(ctx_size=512, device="cuda", device_budget=size, on_status=lines.append) as llm:
        assert llm.generate("import os\n", GREEDY)[0].text
        offload = llm.runner.offload
    budget_of = offload.budget
    parts = budget_of.overhead + budget_of.dense + budget_of.kv_cache + budget_of.workspace + budget_of.arena
    assert parts <= budget_of.total <= (size or 0.8 * 256 * MIB)
    assert device.most <= budget_of.total - budget_of.workspace
    assert device.most == budget_of.dense + budget_of.kv_cache + sum(
        n * size for n, size in zip(offload.slots, llm.store.layout.slice_sizes, strict=True)
    )
    assert any(line.startswith("device budget") for line in lines)
    said = [line for line in lines if "on the device besides experts" in line or "experts alone" in line]
    assert len(said) == 1
    assert ("besides experts" in said[0]) == offload.placement.any


@pytest.mark.parametrize("integrated", [False, True])
def test_what_a_device_needs_of_the_host_is_in_its_budget(monkeypatch, integrated):
    """Its libraries are counted once it is open, and its compiler before it is used."""
    made, asked = Counting(None if integrated else 256 * MIB, integrated=integrated), []

    def library_bytes(compiles=False):
        asked.append(made in opened)
        return (500 if compiles else 400) * MIB

    opened = []
    monkeypatch.setattr(made, "compiles", True, raising=False)
    monkeypatch.setattr(engine_module, "library_bytes", library_bytes)
    monkeypatch.setattr(offload_module, "open_device", lambda *rest: opened.append(made) or made)
    with LLM(ctx_size=256, device="cuda", memory_budget="1GiB") as llm:
        assert llm.runner.budget.libraries == 500 * MIB
    assert asked == [True] * (1 + integrated)


def test_what_is_on_the_device_is_not_in_the_memory_budget(device):
    with LLM(ctx_size=512, device="cpu") as alone:
        pass
    with LLM(ctx_size=512, device="cuda") as llm:
        assert all(llm.runner.offload.placement.layers)
        assert llm.runner.budget.dense + llm.runner.budget.kv_cache < alone.runner.budget.dense


def test_one_memory_is_counted_once(monkeypatch):
    made = Counting(integrated=True)
    monkeypatch.setattr(offload_module, "open_device", lambda *rest: made)
    lines, size = [], library_bytes() + 400 * MIB
    with LLM(ctx_size=512, device="cuda", memory_budget=size, on_status=lines.append) as llm:
        assert llm.generate("import os\n", GREEDY)[0].text
        budget, offload = llm.runner.budget, llm.runner.offload
        assert offload.slots is None
        assert offload.placement.any
        assert budget.dense >= offload.placement.dense_bytes
        assert budget.kv_cache >= offload.placement.kv_bytes
        assert budget.workspace >= offload.placement.workspace_bytes
        assert budget.total == size
    assert any("one memory" in line for line in lines)
    with pytest.raises(BudgetError, match="memory budget"):
        LLM(ctx_size=512, device="cuda", memory_budget=100 * MIB)


def test_logits_hardly_depend_on_where_the_dense_part_is(device):
    ids = list(range(20, 90))
    with LLM(ctx_size=128, device="cpu") as llm:
        want = llm.logits(ids).double()
    for options in ({}, {"kv_bits": 8}, {"device_budget": 74 * MIB}, {"precision": "routed:3"}):
        with LLM(ctx_size=128, device="cuda", **options) as llm:
            assert llm.runner.offload.placement.any
            got = llm.logits(ids).double()
        p, q = want.log_softmax(-1), got.log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1).mean()
        assert kl < (0.02 if "precision" in options else 0.005), options  # what 8-bit dense weights cost, and routed:3


def test_several_prompts_with_a_device(device):
    prompts = ["import os\n", "def main(", "class A:"]
    with LLM(ctx_size=256, device="cuda") as llm:
        together = [done.text for done in llm.generate(prompts, GREEDY)]
        alone = [llm.generate(prompt, GREEDY)[0].text for prompt in prompts]
    assert together == alone


def test_too_small_a_budget_says_what_would_do(device):
    with pytest.raises(BudgetError, match=r"need at least (\d+) bytes") as caught:
        LLM(ctx_size=512, device="cuda", device_budget=MIB)
    with LLM(ctx_size=512, device="cuda", device_budget=caught.value.least_bytes, dense_quant="off") as llm:
        assert llm.generate("import os\n", GREEDY)[0].text


def test_a_budget_without_a_device_is_no_silent_promise():
    lines = []
    with LLM(ctx_size=256, device="cpu", device_budget="1GiB", on_status=lines.append):
        pass
    assert any("--device-budget has no effect" in line for line in lines)


@pytest.fixture
def unusable_gpu(monkeypatch):
    """torch has a GPU, but it cannot be used."""
    from moert.device import cuda

    def refuse():
        raise DeviceError("No GPU can be used, since its driver is too old, or use --device cpu.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "open_cuda", refuse)


def test_a_gpu_that_cannot_be_used_is_left_alone_and_that_is_said(unusable_gpu):
    lines = []
    with LLM(ctx_size=256, on_status=lines.append) as llm:
        assert llm.runner.offload is None
    reason = "No GPU can be used, since its driver is too old, or use --device cpu."
    assert f"warning: the GPU is not used: {reason}" in lines
    with pytest.raises(DeviceError, match="driver is too old"):
        LLM(ctx_size=256, device="cuda")


def test_experts_that_the_device_has_no_kernels_for(device, monkeypatch):
    def experts(self, layout, activation, memory):
        raise DeviceError(f"The device has no kernels for the activation {activation}: use --device cpu.")

    monkeypatch.setattr(EmulatedDevice, "experts", experts)
    lines = []
    with LLM(ctx_size=256, on_status=lines.append) as llm:
        assert llm.runner.offload is None
    assert "warning: the GPU is not used: The device has no kernels for the activation silu: use --device cpu." in lines
    with pytest.raises(DeviceError, match="no kernels for the activation"):
        LLM(ctx_size=256, device="cuda")


def test_a_gpu_without_room_is_left_alone_and_that_is_said(monkeypatch):
    monkeypatch.setattr(offload_module, "open_device", lambda *rest: EmulatedDevice(8 * MIB))
    lines = []
    with LLM(ctx_size=256, on_status=lines.append) as llm:
        assert llm.runner.offload is None
        assert llm.generate("import os\n", GREEDY)[0].text
    assert any(line.startswith("warning: the GPU is not used: ") for line in lines)


def test_a_device_that_is_lost_meanwhile(device, monkeypatch):
    with LLM(ctx_size=512, device="cuda", device_budget=20 * MIB, hybrid=False) as llm:

        def lost(self, source, target):
            raise DeviceError("The device was lost: start again, or use --device cpu.")

        monkeypatch.setattr(EmulatedDevice, "copy", lost)
        with pytest.raises(DeviceError, match="was lost"):
            llm.generate("import os\n", GREEDY)


@pytest.mark.parametrize("where", ["experts", "dense", "KV cache"])
def test_what_fails_to_load_leaves_nothing_behind(device, monkeypatch, where):
    """Not the device's memory, locked pages or reading threads."""
    closed, close, count = [], Residency.close, {"experts": 1, "dense": 2, "KV cache": 3}[where]
    real, asked = Counting.allocate, []

    def allocate(self, nbytes):
        asked.append(nbytes)
        if len(asked) == count:
            raise DeviceError("Out of memory on the emulated device; give a smaller --device-budget.")
        return real(self, nbytes)

    monkeypatch.setattr(Counting, "allocate", allocate)
    monkeypatch.setattr(Residency, "close", lambda self: (closed.append(self), close(self)))
    with pytest.raises(DeviceError, match="Out of memory"):
        LLM(ctx_size=256, device="cuda")
    assert len(asked) == count
    assert len(closed) == 1
    assert device._taken == 0


def test_reads_end_where_the_device_is_lost(device, monkeypatch):
    """The error is that of the device, and closing leaves nothing that is on its way to the arena."""
    with LLM(ctx_size=512, device="cuda", device_budget=20 * MIB, hybrid=False) as llm:

        def lost(*rest):
            raise DeviceError("The device was lost: start again, or use --device cpu.")

        monkeypatch.setattr(EmulatedDevice, "copy", lost)
        monkeypatch.setattr(EmulatedDevice, "synchronise", lost)
        with pytest.raises(DeviceError, match="was lost"):
            llm.generate("import os\n", GREEDY)
        reads = list(llm.runner._experts._residency._reads.values())
    assert all(read.done for read in reads), "closing waits for them"


def test_what_fails_behind_it_closes_the_device(device, monkeypatch):
    closed = []
    monkeypatch.setattr(device, "close", lambda: closed.append(True))
    with pytest.raises(BudgetError, match="memory budget"):
        LLM(ctx_size=512, device="cuda", memory_budget=100 * MIB)
    assert closed == [True]
    monkeypatch.setattr(device, "allocate", lambda nbytes: (_ for _ in ()).throw(DeviceError("Out of memory.")))
    with pytest.raises(DeviceError, match="Out of memory"):
        LLM(ctx_size=512, device="cuda")
    assert closed == [True, True]


def test_bitsandbytes_missing(device, monkeypatch):
    def missing(quant):
        raise UsageError("--dense-quant int8 and nf4 need bitsandbytes: install moert[cuda].")

    monkeypatch.setattr(offload_module, "check_quant", missing)
    with pytest.raises(UsageError, match=r"install moert\[cuda\]"):
        LLM(ctx_size=256, device="cuda", dense_quant="nf4")


def test_on_the_command_line():
    options = ["--device", "emulated", "--device-budget", "20MiB", "--no-hybrid", "-c", "256"]
    done = run("generate", "-p", "import os", "-n", "4", "--json", *options)
    assert done.returncode == 0, done.stderr
    stats = json.loads(done.stdout)
    assert stats["device_share"] == 1.0
    assert stats["bytes_moved_per_token"] >= 0
    assert "emulated device" in done.stderr
    wrong = run("generate", "-p", "a", "--device", "quantum")
    assert wrong.returncode == 2
    assert "--device 'quantum' is not known; it can be auto, cpu, cuda, emulated or interpreter" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_eval_of_the_dense_part_on_a_device():
    options = ["--device", "emulated", "--device-budget", "200MiB", "--tokens", "128", "--window", "64", "--json", "-v"]
    done = run("eval", "--precision", "fixed:4", *options)
    assert done.returncode == 0, done.stderr
    assert "on the device besides experts, in 16 bits" in done.stderr
    plain = run("eval", "--precision", "fixed:4", *options[4:])
    ours, other = (json.loads(d.stdout)["rows"][0]["perplexity"] for d in (done, plain))
    assert ours != other
    assert abs(ours / other - 1) < 0.02


def test_the_timeline_shows_moves_and_the_device(device, tmp_path):
    from moert.runtime.timeline import Timeline

    timeline = Timeline(tmp_path / "t.json")
    with LLM(ctx_size=512, device="cuda", device_budget=20 * MIB, hybrid=False) as llm:
        llm.runner.draw(timeline)
        llm.generate("import os\n", GREEDY)
    timeline.close()
    events = json.loads((tmp_path / "t.json").read_text())
    lanes = {e["args"]["name"]: e["tid"] for e in events if e["ph"] == "M"}
    for lane in ("device", "moves to the device"):
        spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and e["tid"] == lanes[lane])
        assert spans
        assert all(end <= begin + 0.01 for (_, end), (begin, _) in pairwise(spans))


def test_devices_are_known_by_name():
    assert device_module.open_device("cpu", print) is None
    assert device_module.open_device("emulated", print).kind == "emulated"
