"""The engine against a sequential reference: any arrivals, lengths, priorities and aborts give each request its tokens.

The model is a fake one that reads what it knows back out of a real KV cache: a row that is copied to a wrong place, or
belongs to another sequence, makes another token.
"""

from __future__ import annotations

import random
import zlib
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moert import LLM, SamplingParams
from moert.device.backend import EmulatedDevice
from moert.device.kv_memory import SplitKVMemory
from moert.engine import engine as engine_module
from moert.engine import sequence as sequence_module
from moert.engine.engine import Engine
from moert.engine.sequence import Request, join
from moert.engine.sequence_cache import SequenceCaches
from moert.errors import MoertError, UsageError
from moert.models.kv_cache import KVCache, KVMemory
from moert.runtime.telemetry import Counters
from moert.scheduler.batching import PATIENCE

ARCH = SimpleNamespace(num_layers=2, num_kv_heads=2, head_dim=4)
VOCABULARY, END, CHUNK = 50, 0, 8


def next_token(prefix):
    return zlib.crc32(bytes(prefix)) % VOCABULARY


def reference(prompt, max_tokens, ctx_size):
    """Compute an answer alone, without cache or chunks."""
    tokens, made = list(prompt), []
    while True:
        made.append(next_token(tokens))
        if made[-1] == END or len(made) == max_tokens or len(tokens) + 1 > ctx_size:
            return made, "stop" if made[-1] == END else "length"
        tokens.append(made[-1])


class FakeRunner:
    """Draws the next token from those that it finds in the KV cache, and checks what it is given."""

    precision, widths = "fixed:4", (2, 3, 4)
    budget = SimpleNamespace(total=1)

    def __init__(self, ctx_size, batch_size, contexts=1, dtype=torch.float16):
        self.ctx_size, self.batch_size = ctx_size, batch_size
        self.caches = SequenceCaches(ARCH, KVMemory(ARCH, contexts * ctx_size, dtype))
        self.counters = Counters()
        self.computed = 0
        self.fails = lambda tokens: False

    def step(self, inputs, decoding):
        decoded = [tokens for cache, tokens in inputs if len(tokens) == 1]
        prompts = [tokens for cache, tokens in inputs if len(tokens) > 1]
        assert len(inputs) <= self.batch_size + CHUNK
        assert sum(map(len, prompts)) <= CHUNK or len(prompts) == 1
        assert len({id(cache) for cache, _ in inputs}) == len(inputs)
        assert len(decoded) + len(prompts) == len(inputs)
        if any(self.fails(cache.tokens + tokens) for cache, tokens in inputs):
            raise MoertError("This one fails.")
        logits = torch.zeros(len(inputs), VOCABULARY)
        for row, (sequence, tokens) in zip(logits, inputs, strict=True):
            cache = sequence.cache
            cache.truncate(len(sequence.tokens))
            cache.check_room(len(tokens))
            vectors = torch.tensor(tokens).float()[None, :, None].expand(2, -1, 4)
            for layer in range(ARCH.num_layers):
                cache.append(layer, vectors, vectors + layer)
            cache.advance(len(tokens))
            sequence.tokens += tokens
            for layer in range(ARCH.num_layers):
                keys, values = cache.read(layer, 0, cache.length)
                found = [keys[head, :, d].round().int().tolist() for head in range(2) for d in range(4)]
                found += [(values - layer)[head, :, d].round().int().tolist() for head in range(2) for d in range(4)]
                assert all(each == sequence.tokens for each in found)
            row[next_token(sequence.tokens)] = 1
            self.computed += len(tokens)
        return logits


TOKENIZER = SimpleNamespace(
    eos_ids=frozenset({END}), detokenizer=lambda: SimpleNamespace(push=lambda token: chr(64 + token), flush=lambda: "")
)


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "PREFILL_CHUNK", CHUNK)
        patch.setattr(sequence_module, "PREFILL_CHUNK", CHUNK)
        yield


def request(prompt, max_tokens=5, **options):
    return Request(prompt, SamplingParams(temperature=0, max_tokens=max_tokens).resolve(), **options)


def run(engine, chunks=None, check=lambda: None):
    """All that comes of an engine, by request."""
    chunks = {} if chunks is None else chunks
    while engine.has_work:
        for number, chunk in engine.step():
            chunks.setdefault(number, []).append(chunk)
        check()
    return chunks


def talkative(first, count):
    """A prompt whose answer has at least so many tokens."""
    prompts = ([first, i, j] for i in range(1, 50) for j in range(1, 50))
    return next(prompt for prompt in prompts if len(reference(prompt, count, 96)[0]) == count)


PROMPTS = st.builds(
    lambda common, own: [1 + i % 7 for i in range(common)] + own,
    st.integers(0, 40),
    st.lists(st.integers(0, 9), min_size=1, max_size=30),
)
PRIORITIES = ["interactive", "batch"]
EVENTS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), PROMPTS, st.integers(1, 60), st.sampled_from(["interactive", "batch"]), st.booleans()
        ),
        st.tuples(st.just("step"), st.integers(1, 12)),
        st.tuples(st.just("abort"), st.integers(0, 20)),
    ),
    max_size=25,
)


@settings(max_examples=80, deadline=None)
@given(EVENTS, st.integers(1, 4), st.sampled_from([1, 2]), st.sampled_from([torch.float16, torch.int8]))
def test_each_request_gets_the_tokens_of_a_sequential_reference(events, batch_size, contexts, dtype):
    runner = FakeRunner(96, batch_size, contexts, dtype)
    engine, chunks, wanted, aborted = Engine(runner, TOKENIZER), {}, {}, set()

    def check():
        regions = runner.caches._all
        assert all(a.end <= b.start for a, b in pairwise(regions))
        assert all(r.start % 16 == r.size % 16 == 0 and r.end <= runner.caches.positions for r in regions)
        assert sum(r.running for r in regions) == len(engine._running) <= 2 * batch_size
        for sequence in engine._running:
            if sequence.decoding:
                limit = 1 if sequence.request.priority == "interactive" else PATIENCE + 1
                assert sequence.waited <= limit, "nobody's next token waits for longer"

    for kind, *what in events:
        if kind == "add":
            prompt, max_tokens, priority, stream = what
            number = engine.add_request(request(prompt, max_tokens, priority=priority, stream=stream))
            wanted[number] = prompt, max_tokens
        elif kind == "abort":
            engine.abort(what[0])
            aborted |= {what[0]} & wanted.keys()
        else:
            for _ in range(what[0]):
                for number, chunk in engine.step():
                    chunks.setdefault(number, []).append(chunk)
                check()
    run(engine, chunks, check)
    for number, (prompt, max_tokens) in wanted.items():
        found = chunks.get(number, [])
        tokens, finish = reference(prompt, max_tokens, 96)
        if number in aborted and (not found or found[-1].finish_reason is None):
            made = [token for chunk in found for token in chunk.token_ids]
            assert made == tokens[: len(made)]
            continue
        done = join(found)
        assert (done.token_ids, done.finish_reason, done.error) == (tokens, finish, None)
        assert done.text == "".join(chr(64 + token) for token in tokens if token != END)
        assert (done.stats.prompt_tokens, done.stats.completion_tokens) == (len(prompt), len(tokens))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**32))
def test_no_batch_request_starves_while_interactive_ones_keep_coming(batch_size, length, max_tokens, seed):
    rng = random.Random(seed)
    engine, ended = Engine(FakeRunner(96, batch_size, 2 * batch_size), TOKENIZER), False
    batch = engine.add_request(request([3] * length, max_tokens, priority="batch"))
    alive, steps = set(), 0
    while not ended:
        while len(alive) < 2 * batch_size:
            prompt = [rng.randrange(1, 9) for _ in range(rng.randrange(1, 30))]
            alive.add(engine.add_request(request(prompt, rng.randrange(1, 9))))
        for number, chunk in engine.step():
            if chunk.finish_reason:
                ended |= number == batch
                alive.discard(number)
        steps += 1
        # It takes part within so many steps; the first time perhaps later, when those before it have ended.
        assert steps <= (PATIENCE + 8) * (-(-length // CHUNK) + max_tokens) + 60


def test_a_long_prompt_delays_no_token_of_others_and_no_interactive_request_waits_for_batch_ones():
    runner = FakeRunner(96, 4, 4)
    engine = Engine(runner, TOKENIZER)
    first = engine.add_request(request(talkative(2, 40), 40))
    engine.step()
    engine.add_request(request([5] * 90, 2))
    before = runner.computed
    for _ in range(3):
        assert first in [number for number, _ in engine.step()]
        assert runner.computed - before <= CHUNK + 1
        before = runner.computed
    run(engine, {})
    batch = {engine.add_request(request(talkative(10 + i, 30), 30, priority="batch")) for i in range(4)}
    engine.step()  # reads the prompts of two
    for _ in range(3):
        assert {number for number, _ in engine.step()} == batch
    new = engine.add_request(request(talkative(9, 3), 3))
    seen = [{number for number, _ in engine.step()} for _ in range(4)]
    assert seen == [{new}, {new}, {new}, batch], "those of batch requests yield their turns and lose nothing"


def cached(engine, prompt, **options):
    """The tokens of the answer, and how many of the prompt were found."""
    number = engine.add_request(request(prompt, **options))
    done = join(run(engine)[number])
    assert done.token_ids == reference(prompt, options.get("max_tokens", 5), engine._runner.ctx_size)[0]
    return done.token_ids, done.stats.cached_tokens


def test_a_conversation_finds_all_of_what_was_said_even_if_it_needs_the_whole_context():
    for max_tokens in (5, 96):
        engine, said, known = Engine(FakeRunner(96, 1), TOKENIZER), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 0
        for turn in range(5):
            answer, found = cached(engine, said, max_tokens=max_tokens)
            assert found == known
            known = len(said)  # and of the answer what is said again
            kept = answer[: min(len(answer) - 1, 4)]
            said, known = [*said, *kept, 40 + turn], known + len(kept)


def test_several_conversations_are_kept_side_by_side_and_the_least_recent_makes_room():
    engine = Engine(FakeRunner(96, 2), TOKENIZER)
    a, b, c = ([token] * 20 for token in (1, 2, 3))
    for prompt in (a, b):
        assert cached(engine, prompt)[1] == 0
    for prompt in (a, b, a):
        assert cached(engine, prompt)[1] == 19
    assert cached(engine, c)[1] == 0
    assert cached(engine, [4] * 20)[1] == 0  # in place of b
    assert cached(engine, a)[1] == 19
    assert cached(engine, b)[1] == 0


def test_a_prefix_is_copied_from_one_that_runs_and_from_one_that_is_worth_keeping():
    engine = Engine(FakeRunner(96, 2, 2), TOKENIZER)
    system = [1, 2, 3, 4] * 5
    ends = (end for end in range(1, 50) if len(reference([*system, end], 30, 96)[0]) == 30)
    first = engine.add_request(request([*system, next(ends)], 30))
    begun = [chunk for _ in range(5) for number, chunk in engine.step()]
    second = engine.add_request(request([*system, next(ends)], 4))
    done = {number: join(chunks) for number, chunks in run(engine).items()}
    assert done[second].stats.cached_tokens == len(system)
    assert len([token for chunk in begun for token in chunk.token_ids]) + len(done[first].token_ids) == 30
    long = [*system, *range(7, 40)]
    assert cached(engine, long)[1] == len(system)
    assert cached(engine, [*system, 41])[1] >= len(system)
    assert cached(engine, long)[1] == len(long) - 1, "the longer one was kept"


def test_a_step_that_fails_ends_only_those_that_fail_alone():
    runner = FakeRunner(96, 4, 4)
    runner.fails = lambda tokens: tokens[0] == 9 and len(tokens) > 3
    engine = Engine(runner, TOKENIZER)
    numbers = [engine.add_request(request([token, 2], 6)) for token in (1, 9, 3)]
    done = {number: join(chunks) for number, chunks in run(engine).items()}
    for number, token in zip(numbers, (1, 9, 3), strict=True):
        tokens, finish = reference([token, 2], 6, 96)
        failed = token == 9 and len(tokens) > 2
        assert done[number].token_ids == (tokens[:2] if failed else tokens)
        assert done[number].finish_reason == ("error" if failed else finish)
        assert (str(done[number].error) == "This one fails.") == failed
    runner.fails = lambda tokens: False
    assert cached(engine, [9, 2])[1] == 1


def test_a_deadline_ends_what_is_not_complete_and_an_unknown_priority_is_refused():
    engine = Engine(FakeRunner(96, 2), TOKENIZER)
    late = engine.add_request(request([1, 2], 50, deadline=0.0))
    other = engine.add_request(request([1, 3], 5, deadline=float("inf")))
    done = {number: join(chunks) for number, chunks in run(engine).items()}
    assert done[late].finish_reason == "error"
    assert "deadline" in str(done[late].error)
    assert done[other].error is None
    with pytest.raises(UsageError, match="no priority 'urgent'; there are interactive, batch"):
        request([1], priority="urgent")


@contextmanager
def memory(placed, dtype, border):
    if placed is None:
        yield KVMemory(ARCH, 160, dtype)
        return
    device = EmulatedDevice()
    try:
        yield SplitKVMemory(ARCH, 160, dtype, placed, border, device)
    finally:
        device.close()


def rows_of(cache, layer, count):
    """Keys, values and scales of a layer of a cache, wherever they are."""
    if cache.split[layer] is None:
        return torch.stack(cache.read(layer, 0, count))
    parts = [part for part in (cache.split[layer].near, cache.split[layer].far) if part is not None]
    both = []
    for i in range(2):
        rows = torch.cat([(part.keys, part.values)[i].float() for part in parts], 1)
        if parts[0].scales is not None:
            rows = rows * torch.cat([part.scales[i] for part in parts], -1)[..., None]
        both.append(rows[:, :count])
    return torch.stack(both)


@settings(max_examples=120, deadline=None)
@given(
    placed=st.sampled_from([None, (True, False), (True, True)]),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.int8]),
    border=st.integers(0, 10),
    blocks=st.tuples(st.integers(0, 8), st.integers(1, 5), st.integers(0, 8), st.integers(1, 5)),
    share=st.floats(0, 1),
)
def test_positions_move_whole_to_another_region_whatever_it_overlaps(placed, dtype, border, blocks, share):
    with memory(placed, dtype, 16 * border) as kv:
        first, size, second, room = (16 * n for n in blocks)
        size, room = min(size, 160 - first), min(room, 160 - second)
        count = round(share * min(size, room))
        old = KVCache(ARCH, size, dtype, kv, first)
        x = torch.randn(2, ARCH.num_layers, 2, count, 4)
        for layer in range(ARCH.num_layers):
            if old.split[layer] is None:
                old.append(layer, x[0, layer], x[1, layer])
            else:
                for part in filter(None, (old.split[layer].near, old.split[layer].far)):
                    part.write(0, x[0, layer], x[1, layer])
        want = [rows_of(old, layer, count).clone() for layer in range(ARCH.num_layers)]
        kv.copy((first, size), (second, room), count)
        new = KVCache(ARCH, room, dtype, kv, second)
        for layer, rows in enumerate(want):
            assert torch.equal(rows_of(new, layer, count), rows)


def test_the_real_engine_shares_prefixes_and_changes_no_token(store):
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=6, ignore_eos=True)
    system = "A mixture of experts is a layer that holds many small networks. "
    prompts = [system + end for end in ("The router", "When", "The experts", "I am")]
    with LLM(store(), ctx_size=128, batch_size=3) as llm:
        alone = []
        for prompt in prompts:
            with LLM(store(), ctx_size=128) as fresh:
                alone.append(fresh.generate(prompt, params)[0])
        for _ in range(2):
            done = llm.generate(prompts, params)
            assert [d.token_ids for d in done] == [d.token_ids for d in alone]
        assert all(d.stats.cached_tokens == d.stats.prompt_tokens - 1 for d in done[1:])


def test_requests_and_measuring_may_take_the_room_of_one_another(store):
    ids, params = [5, 77, 140, 9], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    for batch_size in (None, 2):
        with LLM(store(), ctx_size=64, batch_size=batch_size) as llm:
            want = llm.generate([ids], params)[0].token_ids
            logits = llm.call(lambda runner: runner.forward(ids))
            assert llm.call(lambda runner: list(runner.tokens)) == ids
            for length in (10, 58):
                assert len(llm.generate([[7] * length] * 2, params)) == 2
                left = llm.call(lambda runner: list(runner.tokens))
                assert left in ([], ids)
                again = llm.call(lambda runner, left=left: runner.forward(ids[-1:] if left else ids))
                assert left or torch.equal(again, logits)
                llm.call(lambda runner: (runner.rewind(0), runner.forward(ids)))
            assert torch.equal(llm.logits(ids)[-1], logits)
            assert llm.generate([ids], params)[0].token_ids == want
