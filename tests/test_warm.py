"""Warm start: what was in memory is there again, within the budget, and the text is the same."""

import json
import os
import shutil
import signal
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moert import LLM, SamplingParams
from moert.engine.model_runner import ModelRunner
from moert.errors import StoreError
from moert.hub.resolve import warm_file
from moert.models.stored_model import StoredModel
from moert.runtime.warm import read_memory, write_memory
from moert.scheduler.cache import SliceCache
from moert.scheduler.eviction import POLICIES
from moert.scheduler.types import ExpertKey, RoutedExpert
from moert.scheduler.warm import Memory, remember, restore

from .program import Program

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
KEPT = {0: (3,) * 6, 2: (3, 1, 3, 2, 3, 3)}
ROUTES = st.lists(st.tuples(st.sampled_from([0, 2]), st.sets(st.integers(0, 5), min_size=1, max_size=2)), max_size=40)


def used(capacity, routes, name="score"):
    """A cache after decoding with these routes."""
    cache = SliceCache(capacity, POLICIES[name]([0, 2], 6, 3))
    for layer, experts in routes:
        cache.policy.used(layer, [RoutedExpert(e, 1, 0.5, KEPT[layer][e]) for e in sorted(experts)], 1)
        for e in experts:
            cache.insert(ExpertKey(layer, e), KEPT[layer][e], {ExpertKey(layer, other) for other in experts})
    return cache


@given(ROUTES, st.sampled_from(["score", "lru"]))
def test_what_is_restored_is_what_was_there_and_is_evicted_in_the_same_order(routes, name):
    before, after = used((5, 4, 4), routes, name), SliceCache((5, 4, 4), POLICIES[name]([0, 2], 6, 3))
    memory = remember(before, KEPT)
    loads = restore(after, memory, 3)
    assert after.resident_experts() == before.resident_experts()
    assert [(load.layer, load.expert) for load in loads] == sorted(before.resident_experts())
    assert all(load.first == 0 and load.last == before.resident(load.layer, load.expert) for load in loads)
    assert after.free == before.free
    for layer, counts in KEPT.items():
        for e, count in enumerate(counts):
            for index in range(count):
                key = ExpertKey(layer, e)
                assert after.policy.reuse_score(key, index) == pytest.approx(before.policy.reuse_score(key, index))
    again = remember(after, KEPT)
    if name == "lru" and routes:
        assert list(again.resident) == list(memory.resident)
    if name == "score" and routes:  # the layer of the last use counts in the order, and is not restored
        for cache in (before, after):
            cache.policy.used(routes[-1][0], [RoutedExpert(0, 1, 0.5, 3)], 1)
        scores = [[c.policy.reuse_score(key, 0) for key in remember(c, KEPT).resident] for c in (before, after)]
        assert scores[0] == pytest.approx(scores[1])


@given(ROUTES, st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), st.integers(1, 3))
def test_a_smaller_arena_takes_the_best_that_fit(routes, capacity, most):
    memory = remember(used((5, 4, 4), routes), KEPT)
    cache = SliceCache(capacity, POLICIES["score"]([0, 2], 6, 3))
    restore(cache, memory, most)
    free = list(capacity)  # the same greedy choice by hand
    for key, count in memory.resident.items():
        fits = 0
        while fits < min(count, most) and free[fits]:
            free[fits] -= 1
            fits += 1
        assert cache.resident(*key) == fits
    assert cache.free == free
    assert min(cache.free) >= 0


@pytest.fixture
def path(store, monkeypatch, tmp_path):
    monkeypatch.setenv("MOERT_CACHE", str(tmp_path / "cache"))
    return store(num_hidden_layers=3, num_experts=16)


def run(path, count=12, warm=True, **options):
    """Text, what was said, and the counters of a run with room for so many experts, beginning with what is there."""
    said = []
    with LLM(path) as llm:
        one = llm.store.layout.bytes_at(4)
    with LLM(path, expert_budget=count * one, ctx_size=64, warm=warm, on_status=said.append, **options) as llm:
        held = llm.runner._experts.residency.arena.held()
        done = llm.generate("Hello, who are", GREEDY)[0]
        counters = llm.runner.counters
        assert len(held) <= 3 * count
    return done.token_ids, [line for line in said if "warm start" in line], counters, held


def test_a_second_run_begins_with_what_the_first_had(path):
    cold, said, before, held = run(path)
    assert "warm start: from the next run on" in said[0]
    assert not held
    warm, said, after, held = run(path)
    assert [line.split(",")[0] for line in said] == [
        "warm start: reading the experts of the last run",
        said[1],
    ]
    assert len(held) == 36
    assert warm == cold == run(path, warm=False)[0]
    assert after.reads < before.reads
    assert after.expert_hits > before.expert_hits
    less, _, _, held = run(path, 5)
    assert less == cold
    assert len(held) == 15
    assert run(path, 48)[0] == cold  # more room than was written for
    assert len(run(path, 48)[3]) > 36
    assert "from the next run on" in run(path, precision="fixed:3")[1][0], "each precision has its own"


def change(**values):
    return lambda data: json.dumps(json.loads(data) | values).encode()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "is damaged."),
        (lambda data: data[: len(data) // 2], "is damaged."),
        (lambda data: b"\xff\xfe" + data, "is damaged."),
        (lambda data: b"[1]", "is damaged."),
        (lambda data: b"[" * 100_000, "is damaged."),
        (change(resident=[[0, 99, 1]]), "is damaged."),
        (change(resident=[[7, 0, 1]]), "is damaged."),
        (change(resident=[[0, 0, 4]]), "is damaged."),
        (change(resident=[[0, 0, 0]]), "is damaged."),
        (change(resident=[[0, 0]]), "is damaged."),
        (change(resident=[[0, 0, 1], [0, 0, 1]]), "is damaged."),
        (change(resident=[["0", 0, 1]]), "is damaged."),
        (change(worth=[[0, 0, 1, 1, 1, 1]]), "is damaged."),
        (change(worth=[[0, 0, -1]]), "is damaged."),
        (change(worth=[[0, 0, float("nan")]]), "is damaged."),
        (change(worth=None), "is damaged."),
        (change(version=2), "was written by another version of moert."),
        (change(store="0" * 64), "is of another state of the store."),
    ],
)
def test_what_is_damaged_or_stale_is_refused_with_a_reason(path, tmp_path, damage, reason):
    store, file = StoredModel.open(path), tmp_path / "memory.json"
    memory = Memory({ExpertKey(0, 3): 2, ExpertKey(2, 1): 3}, {ExpertKey(0, 3): [0.25, 0.125, 0.0]})
    write_memory(file, store, memory)
    assert read_memory(file, store) == memory
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(StoreError) as caught:
        read_memory(file, store)
    assert str(caught.value) == f"{file} {reason}"


def test_what_cannot_be_used_is_said_and_replaced(path):
    file, said = warm_file(path, "fixed:4"), []
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    with LLM(path, ctx_size=64, warm=True, on_status=said.append) as llm:
        assert not llm.runner._experts.residency.arena.held()
        llm.runner.forward([5])
    assert said[-1] == f"warning: no warm start: {file} is damaged."
    assert json.loads(file.read_bytes())["version"] == 1, "the end of the run wrote it anew"


def test_a_cache_folder_that_cannot_be_written_is_no_error(path, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOERT_CACHE", str(tmp_path / "file"))
    text, said, _, _ = run(path)
    assert text
    assert "cannot be read: Not a directory." in said[0]
    assert said[-1].startswith("warning: no warm start next time, since ")


def test_a_damaged_slice_is_left_to_those_who_ask_for_it(monkeypatch, tmp_path, store):
    monkeypatch.setenv("MOERT_CACHE", str(tmp_path / "cache"))
    path = shutil.copytree(store(), tmp_path / "store")
    with LLM(path, ctx_size=64, warm=True) as llm:
        llm.runner.forward([5, 6, 7])
        key = min(llm.runner._experts.residency.arena.held())
        location = llm.store.location(key.layer, key.expert)
    with open(location.file, "r+b") as file:
        file.seek(location.offset + 7)
        old = file.read(1)[0]
        file.seek(location.offset + 7)
        file.write(bytes([old ^ 1]))
    said = []
    with LLM(path, ctx_size=64, warm=True, on_status=said.append):
        pass
    assert f"expert {key.expert} of layer {key.layer} is damaged" in said[-1]
    assert said[-1].startswith("warning: no warm start: ")


def test_ctrl_c_writes_it_too(path, capsys, monkeypatch, tmp_path):
    moert, step, calls = Program(capsys, monkeypatch, tmp_path), ModelRunner.step, iter(range(99))

    def interrupted(self, inputs, decoding):
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C, of which this thread knows nothing
            time.sleep(0.3)
        return step(self, inputs, decoding)

    monkeypatch.setattr(ModelRunner, "step", interrupted)
    assert moert("generate", "-m", str(path), "-p", "Hello", "-n", "9", "--ignore-eos", "--warm").code == 130
    file = warm_file(path, "fixed:4")
    assert json.loads(file.read_bytes())["resident"]
    assert [f.name for f in file.parent.iterdir()] == [file.name]


def test_nothing_remembered_is_nothing_restored():
    cache = SliceCache((2,), POLICIES["lfu"]([0], 4, 1))
    assert restore(cache, Memory({}, {}), 1) == []
    assert remember(cache, {0: (1,) * 4}) == Memory({}, {ExpertKey(0, e): [1.0] for e in range(4)})
