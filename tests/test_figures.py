"""--stats, --timeline and what they show: per layer and phase, against what is seen from outside."""

import json
import os
import signal
import time
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moert import LLM, SamplingParams
from moert.cli.figures import table
from moert.engine.model_runner import ModelRunner
from moert.errors import UsageError
from moert.measure import bench_kernels
from moert.runtime import residency as loading
from moert.runtime import timeline
from moert.runtime.executor import ExpertRunner
from moert.runtime.telemetry import Counters, total
from moert.runtime.timeline import Timeline
from moert.runtime.transfer import SliceReader

from .program import Program

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LAYERS = {"num_hidden_layers": 3, "num_experts": 16}
RUN = ("-n", "6", "--temp", "0", "--ignore-eos", "--ctx-size", "64")


@pytest.fixture
def moert(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_kernels, "memory_bandwidth", lambda threads: 1e10)
    return Program(capsys, monkeypatch, tmp_path)


def arena(llm_store, experts):
    with LLM(llm_store) as llm:
        return experts * llm.store.layout.bytes_at(4)


def test_layers_and_phases_are_what_was_asked_of_the_runner_and_of_the_disk(store, monkeypatch):
    path = store(**LAYERS)
    uses, reads = {True: Counter(), False: Counter()}, Counter()
    forward_token, call, submit = ExpertRunner.forward_token, ExpertRunner.__call__, SliceReader.submit

    def decoded(self, layer, x, experts, weights, out):
        uses[True][layer] += len(experts)
        forward_token(self, layer, x, experts, weights, out)

    def prompted(self, layer, x, indices, weights):
        uses[False][layer] += indices.numel()
        return call(self, layer, x, indices, weights)

    def submitted(self, read, ahead=False):
        reads[int(read.what.split()[-1]), ahead] += read.nbytes
        submit(self, read, ahead)

    monkeypatch.setattr(ExpertRunner, "forward_token", decoded)
    monkeypatch.setattr(ExpertRunner, "__call__", prompted)
    monkeypatch.setattr(SliceReader, "submit", submitted)
    monkeypatch.setattr(SliceReader, "cancel", lambda self, read: False)
    monkeypatch.setattr(loading, "make_reader", SliceReader)
    with LLM(path, expert_budget=arena(path, 10), ctx_size=64, prefetch="2") as llm:
        reads.clear()  # those of `arena`
        stats = llm.generate("Hello, who are", GREEDY)[0].stats
        phases = {decoding: llm.runner.layer_counters(decoding) for decoding in (False, True)}
        for decoding, layers in phases.items():
            assert list(layers) == [0, 1, 2]
            for layer, counters in layers.items():
                assert sum(counters.token_uses.values()) == uses[decoding][layer]
        assert total(c for layers in phases.values() for c in layers.values()) == llm.runner.counters
        for layer in range(3):
            both = total(layers[layer] for layers in phases.values())
            assert both.bytes_prefetched == reads[layer, True]
            assert both.bytes_read == reads[layer, True] + reads[layer, False]
            assert both.bytes_used + both.bytes_wasted <= both.bytes_prefetched
        decoding = total(phases[True].values())
    assert stats.bytes_on_demand_per_token == (decoding.bytes_read - decoding.bytes_prefetched) / 11
    assert stats.bytes_prefetched_used_per_token == decoding.bytes_used / 11
    assert stats.bytes_prefetched_wasted_per_token == decoding.bytes_wasted / 11
    assert stats.waited_s_per_token == decoding.waited_s / 11 > 0
    assert stats.computed_s_per_token == decoding.computed_s / 11 > 0
    assert stats.width_histogram == {4: 1.0}


def spans(path):
    """Name of each lane, and what is on it: (begin, end, event), in order."""
    events = json.loads(path.read_text())
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    lanes = defaultdict(list)
    for e in events:
        if e["ph"] == "X":
            lanes[names[e["tid"]]].append((e["ts"], e["ts"] + e["dur"], e))
    return {name: sorted(lane, key=lambda span: (span[0], -span[1])) for name, lane in lanes.items()}


def assert_nested(lane):
    """Each span lies within the one that is open, or begins after it."""
    opened = []
    for begin, end, event in lane:
        while opened and opened[-1] <= begin + 1e-4:
            opened.pop()
        assert not opened or end <= opened[-1] + 1e-4, event
        opened.append(end)


def seconds(lane, word):
    return sum(e["dur"] for _, _, e in lane if word in e["name"]) / 1e6


@pytest.mark.parametrize("prefetch", ["off", "2"])
def test_a_timeline_nests_and_agrees_with_the_counters(store, tmp_path, prefetch):
    path, file = store(**LAYERS), tmp_path / "timeline.json"
    with LLM(path, expert_budget=arena(path, 10), ctx_size=64, prefetch=prefetch) as llm:
        drawn = Timeline(file)
        llm.runner.draw(drawn)
        ids = llm.tokenizer.encode("Hello, who are")
        llm.generate("Hello, who are", GREEDY)
        llm.runner.draw(None)
        llm.runner.forward([5])
        counters = llm.runner.counters
        drawn.close()
        everything = sum(len(lane) for lane in spans(file).values())
        assert drawn.about() == f"timeline: {file}, {everything} spans"
    lanes = spans(file)
    compute = lanes.pop("compute")
    assert_nested(compute)
    passes = [e["name"] for _, _, e in compute if e["name"].startswith("token")]
    n = len(ids)
    assert passes == [f"tokens 0 to {n - 1}", *(f"token {i}" for i in range(n, n + 11))]
    assert sum("attention, layer 1" in e["name"] for _, _, e in compute) == 12
    assert sum(e["name"] == "head" for _, _, e in compute) == 12
    # The pass that was not drawn is counted.
    assert 0 < seconds(compute, "wait") <= counters.waited_s + 1e-4
    assert 0 < seconds(compute, "experts") <= counters.computed_s + 1e-4
    sizes = {"reads on demand": 0, "prefetches": 0}
    for name, lane in lanes.items():
        kind, number = name.rsplit(" ", 1)
        assert number.isdigit()
        sizes[kind] += sum(e["args"]["bytes"] for _, _, e in lane)
        assert all(before[1] <= after[0] + 1e-4 for before, after in pairwise(lane))
    assert 0 < sizes["reads on demand"] <= counters.bytes_read - counters.bytes_prefetched
    assert sizes["prefetches"] <= counters.bytes_prefetched


def test_the_sums_of_a_timeline_are_those_of_the_counters(store, tmp_path):
    path, file = store(**LAYERS), tmp_path / "timeline.json"
    with LLM(path, expert_budget=arena(path, 10), ctx_size=64, prefetch="off") as llm:
        drawn = Timeline(file)
        llm.runner.draw(drawn)
        llm.generate("Hello, who are", GREEDY)
        counters = llm.runner.counters
        drawn.close()
    lanes = spans(file)
    compute = lanes.pop("compute")
    assert seconds(compute, "wait") == pytest.approx(counters.waited_s, rel=0.01, abs=1e-4)
    assert seconds(compute, "experts") == pytest.approx(counters.computed_s, rel=0.01, abs=1e-4)
    assert sum(e["args"]["bytes"] for lane in lanes.values() for _, _, e in lane) == counters.bytes_read
    assert sum(map(len, lanes.values())) == counters.reads


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=30))
def test_reads_that_overlap_are_on_lanes_of_their_own(tmp_path_factory, times):
    """In whatever order they become known, and with as few lanes as overlap where that is the order of their begin."""
    file = tmp_path_factory.mktemp("lanes") / "t.json"
    for order in (times, sorted(times)):
        drawn = Timeline(file)
        start = drawn._start
        for begin, length in order:
            drawn.read("r", start + begin, start + begin + length, 1, False)
        drawn.close()
        lanes = spans(file)
        assert sum(map(len, lanes.values())) == len(times)
        for lane in lanes.values():
            assert all(before[1] <= after[0] + 1e-2 for before, after in pairwise(lane))
    at_once = max((sum(b <= t < b + n for b, n in times) for t in range(50)), default=0)
    assert len(lanes) == at_once


def test_a_full_timeline_and_a_full_disk_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(timeline, "MOST_EVENTS", 5)
    drawn = Timeline(tmp_path / "t.json")
    for i in range(9):
        drawn.compute("x", float(i), i + 0.5)
    drawn.close()
    assert len(spans(tmp_path / "t.json")["compute"]) == 5
    assert "it is full" in drawn.about()
    monkeypatch.undo()
    try:
        drawn = Timeline("/dev/full")
    except UsageError:
        pytest.skip("there is no device that is full")
    for i in range(1000):
        drawn.compute("x" * 100, float(i), i + 0.5)
    drawn.close()
    assert drawn.about().startswith("The timeline in /dev/full breaks off: ")


@pytest.mark.parametrize("command", [("generate", "-p", "x"), ("chat",), ("bench",)])
def test_a_timeline_that_cannot_be_written_is_refused_before_anything_is_loaded(moert, tmp_path, command):
    file = tmp_path / "none" / "t.json"
    result = moert(*command, "--timeline", str(file), llm=AssertionError("loaded"))
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        f"moert: The timeline cannot be written to {file}: No such file or directory; "
        "name another file with --timeline.\n"
    )


def test_ctrl_c_leaves_a_whole_timeline_and_the_table(moert, store, tmp_path, monkeypatch):
    path, file, step, calls = store(**LAYERS), tmp_path / "t.json", ModelRunner.step, iter(range(99))

    def interrupted(self, inputs, decoding):
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C, of which this thread knows nothing
            time.sleep(0.3)
        return step(self, inputs, decoding)

    budget = str(arena(path, 10))
    monkeypatch.setattr(ModelRunner, "step", interrupted)
    options = ("--expert-budget", budget, "--stats", "--timeline", str(file), "-q")
    result = moert("generate", "-m", str(path), "-p", "Hello", *RUN, *options)
    assert result.code == 130
    assert sum(e["name"].startswith("token") for _, _, e in spans(file)["compute"]) == 4, (
        "the step that ran is the last"
    )
    assert "decoding: 2 tokens; of each token:" in result.err


def test_the_table_of_each_command(moert, store):
    path = str(store(**LAYERS))
    for command, prompts, decoded in (
        (("generate", "-p", "Hello", *RUN), 0, 5),
        (("chat", *RUN), 0, 5),
        (("bench", "-p", "8", "-n", "4", "-r", "1", "--no-warmup"), 8, 4),
    ):
        result = moert(*command, "-m", path, "--stats", "-q", stdin="Hello\n")
        assert result.code == 0, result.err
        lines = result.err.splitlines()
        heads = [line for line in lines if line.endswith("tokens; of each token:")]
        assert heads[-1] == f"decoding: {decoded} tokens; of each token:"
        assert not prompts or f"prompts: {prompts} tokens; of each token:" in heads
        names = [line.split()[0] for line in lines[lines.index(heads[-1]) + 1 :]]
        assert names == ["layer", "0", "1", "2", "all", "expert"]
        assert "tokens; of each token:" not in result.out
    assert "of each token" not in moert("generate", "-p", "Hello", *RUN, "-m", path).err


def test_the_table_is_right():
    first = Counters(6, 3, 18, 4, 5 << 20, 2 << 20, 1 << 20, 512 << 10, 0.03, 0.06, token_uses=Counter({1: 2, 3: 4}))
    second = Counters(6, 6, 24, 0, 0, 0, 0, 0, 0.0, 0.03, token_uses=Counter({3: 6}))
    assert table("decoding", {1: first, 4: second}, (2, 3, 4), 2) == [
        "decoding: 3 tokens; of each token:",
        "layer    hits     waited   computed  on demand  prefetched       used     wasted  bits",
        "    1   50.0%  10.000 ms  20.000 ms    1.0 MiB   682.7 KiB  341.3 KiB  170.7 KiB  3.00",
        "    4  100.0%   0.000 ms  10.000 ms        0 B         0 B        0 B        0 B  4.00",
        "  all   75.0%  10.000 ms  30.000 ms    1.0 MiB   682.7 KiB  341.3 KiB  170.7 KiB  3.50",
        "expert uses: 16.7% at 2 bits, 83.3% at 4 bits",
    ]
    assert table("prompts", {1: Counters()}, (2,), 2) == []
