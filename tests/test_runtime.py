"""The arena, the reading threads and the experts that are computed out of them, with faults put in."""

import errno
import os
import sys
import threading
import time
import zlib
from types import SimpleNamespace

import pytest
import torch

from moert.errors import StoreError
from moert.quant import nested
from moert.quant.format import ExpertLayout
from moert.quant.matmul import PackedExpert
from moert.runtime import residency as loading
from moert.runtime import transfer
from moert.runtime.arena import Arena
from moert.runtime.executor import ExpertRunner
from moert.runtime.transfer import Read, SliceReader
from moert.scheduler.capacity import slots_for
from moert.scheduler.precision import FixedPrecision
from moert.scheduler.types import SliceKey

EXPERTS, HIDDEN, INNER = 8, 64, 32
LAYOUT = ExpertLayout(HIDDEN, INNER, 32, (2, 3, 4))


@pytest.fixture
def store(tmp_path):
    """Experts of one layer in a file, without the rest of a store."""
    g = torch.Generator().manual_seed(0)
    experts = [
        nested.pack_expert(*(torch.randn(*shape, generator=g) for shape in LAYOUT.shapes), LAYOUT)
        for _ in range(EXPERTS)
    ]
    file = tmp_path / "experts.bin"
    file.write_bytes(b"".join(p.numpy().tobytes() for pieces in experts for p in pieces))
    size = sum(LAYOUT.slice_sizes)
    return SimpleNamespace(
        layout=LAYOUT,
        kept={0: (LAYOUT.num_slices,) * EXPERTS},
        file=file,
        experts=experts,
        location=lambda layer, expert: SimpleNamespace(file=file, offset=expert * size),
        checksum=lambda layer, expert, index: zlib.crc32(experts[expert][index].numpy()),
    )


@pytest.fixture
def python_reader(monkeypatch):
    """Reading threads into which `inject` can put faults."""
    monkeypatch.setattr(loading, "make_reader", SliceReader)


@pytest.fixture
def make_runner(store):
    runners = []

    def make(capacity, width=4):
        precision = FixedPrecision(width)
        count = precision.slices(LAYOUT.widths)
        runners.append(ExpertRunner(store, (capacity,) * count + (0,) * (3 - count), precision, "silu"))
        return runners[-1]

    yield make
    for runner in runners:
        runner.close()


def routing(tokens, top_k, seed=0):
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, EXPERTS, generator=g)
    weights, indices = scores.topk(top_k)
    return torch.randn(tokens, HIDDEN, generator=g), indices, weights


def expected(store, slices, x, indices, weights):
    """Sum experts in float64, token by token, from the dequantised matrices."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(len(x)):
        for e, w in zip(indices[t].tolist(), weights[t].tolist(), strict=True):
            expert = PackedExpert.from_slices(store.experts[e][:slices], LAYOUT)
            gate, up, down = (m.rows(0, m.shape[0]).double() for m in (expert.gate, expert.up, expert.down))
            g = gate @ x[t].double()
            out[t] += w * (down @ (g * torch.sigmoid(g) * (up @ x[t].double())))
    return out


def assert_close(got, want):
    """The kernels are tested to the last digits elsewhere; int8 inputs leave about 1%, a wrong expert far more."""
    assert ((got - want).norm(dim=1) <= 0.03 * want.norm(dim=1)).all()


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("capacity", [1, 3, EXPERTS])
def test_experts_match_float64_at_every_arena_size(store, make_runner, width, tokens, capacity):
    runner = make_runner(capacity, width)
    for seed in range(3):
        x, indices, weights = routing(tokens, 3, seed)
        got = runner(0, x, indices, weights)
        want = expected(store, width - 1, x, indices, weights)
        assert_close(got, want)
    assert runner.counters.mean_width == width
    size = sum(LAYOUT.slice_sizes[: width - 1])
    assert runner.counters.bytes_read == size * (runner.counters.expert_uses - runner.counters.expert_hits)
    if capacity == EXPERTS:
        assert runner.counters.reads <= EXPERTS, "what is resident is not read again"


def test_a_token_decoded_is_a_chunk_of_one(store, make_runner):
    for capacity in (3, EXPERTS):
        runner, other = make_runner(capacity), make_runner(capacity)
        for seed in range(6):
            x, indices, weights = routing(1, 3, seed)
            out = torch.ones(1, HIDDEN)
            runner.forward_token(0, x, indices[0].tolist(), weights[0].tolist(), out)
            assert torch.equal(out, 1 + other(0, x, indices, weights))
            assert_close(out - 1, expected(store, 3, x, indices, weights))
        mine, its = runner.counters, other.counters
        assert (mine.expert_uses, mine.expert_hits, mine.bytes_read) == (18, its.expert_hits, its.bytes_read)
        assert mine.token_uses == its.token_uses == {3: 18}
        assert runner.scheduler.cache.resident_experts() == other.scheduler.cache.resident_experts()


def test_preloading_reads_everything_once_or_nothing(make_runner):
    x, indices, weights = routing(20, 4)
    runner = make_runner(EXPERTS)
    runner.preload()
    assert runner.counters.reads == EXPERTS
    runner(0, x, indices, weights)
    runner.preload()
    assert (runner.counters.reads, runner.counters.hit_ratio) == (EXPERTS, 1.0)
    small = make_runner(EXPERTS - 1)
    small.preload()
    assert small.counters.reads == 0


def test_results_do_not_depend_on_what_is_in_memory(make_runner):
    runners = [make_runner(capacity) for capacity in (1, 2, 5, EXPERTS)]
    for seed in range(6):
        for tokens in (1, 16):
            x, indices, weights = routing(tokens, 4, seed)
            first, *others = (runner(0, x, indices, weights) for runner in runners)
            assert all(torch.equal(first, other) for other in others)


def inject(monkeypatch, fault):
    """Let `fault(call number, real read)` stand in for reads of expert files."""
    real, calls = transfer.File.read, iter(range(10**9))
    monkeypatch.setattr(
        transfer.File, "read", lambda self, buffers, offset: fault(next(calls), lambda: real(self, buffers, offset))
    )


def assert_usable(store, runner):
    x, indices, weights = routing(6, 4, 99)
    want = expected(store, 3, x, indices, weights)
    for _ in range(2):
        assert_close(runner(0, x, indices, weights), want)


@pytest.mark.parametrize("capacity", [1, 4])
@pytest.mark.parametrize("failing", [0, 1, 3])
def test_a_read_error_reaches_the_caller_and_leaves_it_usable(
    store, python_reader, make_runner, monkeypatch, failing, capacity
):
    def fault(call, real):
        if call == failing:
            raise OSError(errno.EIO, "Input/output error")
        return real()

    runner = make_runner(capacity)
    inject(monkeypatch, fault)
    x, indices, weights = routing(6, 4)
    with pytest.raises(StoreError, match=r"Reading expert \d of layer 0 from .*experts.bin failed: Input/output error"):
        runner(0, x, indices, weights)
    assert_usable(store, runner)


def test_short_reads_are_continued(store, python_reader, make_runner, monkeypatch):
    def one_buffer(self, buffers, offset):
        return os.preadv(self.fd, [buffers[0][:4096]], offset)

    monkeypatch.setattr(transfer.File, "read", one_buffer)
    assert_usable(store, make_runner(2))


def test_a_file_that_ends_early_is_named(store, make_runner):
    os.truncate(store.file, 4096)
    x, indices, weights = routing(6, 4)
    with pytest.raises(StoreError, match=r"experts.bin ends before expert \d of layer 0"):
        make_runner(4)(0, x, indices, weights)


def test_a_flipped_byte_is_named(store, make_runner):
    x, indices, weights = routing(1, 1)
    with open(store.file, "r+b") as f:
        f.seek(store.location(0, int(indices)).offset + LAYOUT.slice_sizes[0] + 5)
        old = f.read(1)[0]
        f.seek(-1, 1)
        f.write(bytes([old ^ 1]))
    with pytest.raises(StoreError, match=rf"expert {int(indices)} of layer 0 is damaged"):
        make_runner(4)(0, x, indices, weights)


@pytest.mark.parametrize("capacity", [1, 3, EXPERTS])
def test_ctrl_c_in_the_middle_of_a_step_leaves_the_runner_usable(store, make_runner, monkeypatch, capacity):
    runner = make_runner(capacity)
    real, count = transfer.Read.wait, iter(range(10**9))

    def interrupted(self):
        if next(count) == 2:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(transfer.Read, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner(0, *routing(6, 4))
    assert_usable(store, runner)


@pytest.mark.parametrize("capacity", [1, 3])
def test_ctrl_c_anywhere_in_a_step_never_leaves_wrong_experts(store, make_runner, capacity):
    """An interrupt after the n-th line executed in the runtime and the scheduler, for many n."""
    runner = make_runner(capacity)
    x, indices, weights = routing(6, 4)
    want = expected(store, 3, x, indices, weights)
    struck = 0
    for line in (*range(0, 60, 3), *range(60, 1200, 61)):
        left = line

        def tracer(frame, event, argument):
            nonlocal left
            if "moert" not in frame.f_code.co_filename and "scheduler" not in frame.f_code.co_filename:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return tracer

        sys.settrace(tracer)
        try:
            runner(0, x, indices, weights)
        except KeyboardInterrupt:
            struck += 1
        finally:
            sys.settrace(None)
        assert_close(runner(0, x, indices, weights), want)
    assert struck > 20


def test_a_slow_read_delays_only_its_own_expert(store, python_reader, make_runner, monkeypatch):
    """Resident experts compute while the reads of the same layer are under way."""
    runner = make_runner(EXPERTS)
    x, indices, weights = routing(1, 3)
    runner(0, x, indices, weights)
    gate, order = threading.Event(), []
    inject(monkeypatch, lambda call, real: (gate.wait(10), real())[1])
    compute = runner.experts._compute

    def watched(step, ready):
        order.extend(e for e, slices in ready.items() if slices)
        compute(step, ready)
        if len(order) == 2:
            gate.set()

    monkeypatch.setattr(runner.experts, "_compute", watched)
    other = next(e for e in range(EXPERTS) if e not in indices)
    runner(0, x, torch.tensor([[other, *indices[0, :2].tolist()]]), weights)
    assert order[-1] == other
    assert runner.counters.waited_s > 0


def test_reads_fall_back_where_o_direct_is_refused(store, make_runner, monkeypatch):
    real = os.open

    def refuse(path, flags, *args):
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *args)

    monkeypatch.setattr(os, "open", refuse)
    assert transfer.direct_io_works(store.file) is False
    assert_usable(store, make_runner(2))


def test_unexpected_errors_in_a_reading_thread_reach_the_caller(store, monkeypatch):
    def broken(call, real):
        raise RuntimeError("boom")

    inject(monkeypatch, broken)
    reader = SliceReader(torch.zeros(4096, dtype=torch.uint8))
    read = Read(store.file, 0, [(0, 4096, -1)], "expert 0 of layer 0")
    reader.submit(read)
    with pytest.raises(RuntimeError, match="boom"):
        read.wait()
    reader.close()
    assert not any(t.name.startswith("moert-read") and t.is_alive() for t in reader._threads)


def test_close_waits_for_what_is_queued(store, monkeypatch):
    inject(monkeypatch, lambda call, real: (time.sleep(0.05), real())[1])
    # Memory for O_DIRECT must be aligned, as that of the arena is.
    reader = SliceReader(Arena((3,), (4096,)).memory, threads=1)
    reads = [Read(store.file, 0, [(4096 * i, 4096, -1)], "x") for i in range(3)]
    for read in reads:
        reader.submit(read)
    reader.close()
    assert all(r.done and r.error is None for r in reads)


def test_slots_never_exceed_the_arena():
    for budget in (0, 10**5, 10**6, 10**9):
        for experts in ((1000, 1000, 0), (1000, 700, 3), (1000, 1000, 1000)):
            slots = slots_for(budget, LAYOUT.slice_sizes, experts, [1.0] * sum(n > 0 for n in experts))
            assert sum(n * size for n, size in zip(slots, LAYOUT.slice_sizes, strict=True)) <= budget
            assert all(n <= most for n, most in zip(slots, experts, strict=True))
            # A slot of each size, or none at all: what is left over would not hold an expert.
            assert [n > 0 for n in slots] == [slots[0] > 0 and most > 0 for most in experts]
    always = [1.0, 1.0, 1.0]
    assert slots_for(10**9, LAYOUT.slice_sizes, (10, 10, 10), always) == (10, 10, 10)
    assert slots_for(10**9, LAYOUT.slice_sizes, (10, 6, 1), always) == (10, 6, 1)
    half = sum(n * size for n, size in zip((5, 5, 1), LAYOUT.slice_sizes, strict=True))
    assert slots_for(half, LAYOUT.slice_sizes, (10, 6, 1), always) == (5, 5, 1)


def test_slices_that_are_seldom_needed_get_fewer_slots():
    shares = [1.0, 0.5, 0.1]
    assert slots_for(10**9, LAYOUT.slice_sizes, (100, 100, 100), shares) == (100, 100, 100)
    for budget in (10**5, 2 * 10**5, 4 * 10**5):
        base, middle, top = slots = slots_for(budget, LAYOUT.slice_sizes, (100, 100, 90), shares)
        assert sum(n * size for n, size in zip(slots, LAYOUT.slice_sizes, strict=True)) <= budget
        assert 0 < top < middle < base
    least = sum(LAYOUT.slice_sizes)
    assert slots_for(least, LAYOUT.slice_sizes, (100, 100, 90), shares) == (1, 1, 1)


def test_arena_buffers_are_aligned_and_apart():
    arena = Arena((2, 1), (8192, 4096))
    keys = [SliceKey(0, 0, 0), SliceKey(0, 1, 0), SliceKey(0, 0, 1)]
    for number, key in enumerate(keys):
        at = arena.take(key)
        assert at == arena.offset(key)
        assert (arena.memory.data_ptr() + at) % 4096 == 0
        arena.memory[at : at + arena.sizes[key.slice]] = number + 1
    places = [(arena.offset(key), arena.sizes[key.slice]) for key in keys]
    assert [set(arena.memory[at : at + size].tolist()) for at, size in places] == [{1}, {2}, {3}]
    with pytest.raises(IndexError):
        arena.take(SliceKey(0, 2, 0))
    arena.release(keys[0])
    arena.take(SliceKey(0, 2, 0))
