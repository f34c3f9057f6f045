"""Several prompts at once: each answer is the one that its prompt gets alone, whatever happens to the others."""

import json
import shutil
import subprocess

import pytest
import torch

from moert import LLM, SamplingParams
from moert.engine.model_runner import ModelRunner
from moert.engine.sequence_cache import StepInput
from moert.errors import BudgetError, StoreError, UsageError
from moert.kernels.elementwise import combine
from moert.quant import matmul
from moert.runtime import host as experts
from moert.scheduler.trace import read_trace

from .child import ENVIRONMENT, PYTHON

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")


def random_ids(length, seed=None):
    g = torch.Generator().manual_seed(length if seed is None else seed)
    return torch.randint(3, 320, (length,), generator=g).tolist()


def params_for(i, **changes):
    """Greedy and drawn by turns, each with a length and a seed of its own."""
    options = {"temperature": 0.9 * (i % 2), "seed": i, "max_tokens": 3 + 5 * (i % 4), "ignore_eos": True}
    return SamplingParams(**{**options, **changes})


def check_that_each_is_as_alone(llm, prompts, params):
    alone = [llm.generate([ids], own)[0] for ids, own in zip(prompts, params, strict=True)]
    together = llm.generate(prompts, params)
    for i, (got, want) in enumerate(zip(together, alone, strict=True)):
        assert (i, got.token_ids) == (i, want.token_ids)
        assert (got.text, got.finish_reason, got.error) == (want.text, want.finish_reason, None)
        assert got.stats.completion_tokens == len(got.token_ids)
        assert (got.stats.prompt_tokens, got.stats.seed) == (len(prompts[i]), params[i].seed)
    return together


PROMPTS = [random_ids(n) for n in (1, 30, 9, 2, 17, 70, 5)]


@pytest.mark.parametrize("batch_size", [2, None])
def test_a_batch_gives_each_prompt_the_text_it_gets_alone(store, batch_size):
    with LLM(store(), batch_size=batch_size, ctx_size=128) as llm:
        done = check_that_each_is_as_alone(llm, PROMPTS, [params_for(i) for i in range(len(PROMPTS))])
        assert all(d.stats.hit_ratio is not None and d.stats.mean_width == 4 for d in done)


# Raw weights meet few tokens in other kernels than many, so they are where a batch could differ.
STORES = {
    "packed": ((2, 3, 4), 8, "bfloat16"),
    "raw experts": ((16,), 8, "bfloat16"),
    "raw dense": ((2, 4), 16, "bfloat16"),
    "lossless": ((16,), 16, "bfloat16"),
    "lossless float32": ((16,), 16, "float32"),
}


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("family", FAMILIES)
def test_that_holds_for_every_family_and_kind_of_weights(store, family, kind):
    widths, dense_bits, dtype = STORES[kind]
    prompts = [random_ids(n) for n in (1, 20, 3, 14, 2, 6, 4, 4, 7, 5, 13, 2, 3)]
    with LLM(store(family, widths, dense_bits, dtype=dtype), ctx_size=64, batch_size=13) as llm:
        check_that_each_is_as_alone(llm, prompts, [params_for(i, max_tokens=4) for i in range(len(prompts))])


@pytest.mark.parametrize("options", [{"precision": "routed:3"}, {"precision": "fixed:2", "kv_bits": 8}])
def test_that_holds_for_every_precision_and_at_the_least_budget(calibrated, options):
    texts = []
    for budget in (None, 1):
        with LLM(calibrated) as llm:
            one = sum(llm.store.layout.slice_sizes)
        with LLM(calibrated, batch_size=3, expert_budget=budget and one, ctx_size=128, **options) as llm:
            done = check_that_each_is_as_alone(llm, PROMPTS, [params_for(i) for i in range(len(PROMPTS))])
            texts.append([d.token_ids for d in done])
    assert texts[0] == texts[1]


def test_elastic_answers_of_a_batch_do_no_more_harm_than_was_granted(calibrated):
    """Their text depends on what is in memory, so only the bound can hold; what is all there is computed as alone."""
    with LLM(calibrated) as llm:
        one = sum(llm.store.layout.slice_sizes)
    params = [params_for(i) for i in range(len(PROMPTS))]
    with LLM(calibrated, batch_size=3, expert_budget=3 * one, ctx_size=128, precision="elastic:3,skip=0.1") as llm:
        done = llm.generate(PROMPTS, params)
        error_budget = llm.runner._experts.scheduler.error_budget
        assert [len(d.token_ids) for d in done] == [own.max_tokens for own in params]
        assert 0 < error_budget.used <= error_budget.allowed
    with LLM(calibrated, batch_size=3, ctx_size=128, precision="elastic:4") as llm:
        check_that_each_is_as_alone(llm, PROMPTS, params)


def test_that_holds_for_the_reference_kernel(store):
    try:
        matmul.set_kernel("reference")
        with LLM(store(), ctx_size=64) as llm:
            check_that_each_is_as_alone(llm, PROMPTS[2:4], [params_for(i, max_tokens=3) for i in range(2)])
    finally:
        matmul.set_kernel(matmul.available_kernels()[0])


def test_prompts_longer_than_a_chunk_are_read_beside_the_others(store):
    prompts = [random_ids(n) for n in (3, 1100, 5, 700)]
    with LLM(store("mixtral"), ctx_size=1200, batch_size=4) as llm:
        check_that_each_is_as_alone(llm, prompts, [params_for(i, max_tokens=8) for i in range(4)])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_batch_are_those_of_transformers(store, tiny_checkpoint, reference_logits, family):
    """Sequences that begin at different times, prompts beside tokens that are decoded."""
    texts = [random_ids(n, seed) for seed, n in enumerate((40, 33, 21))]
    with LLM(store(family, (16,), 16), batch_size=3, ctx_size=64) as llm:
        runner = llm.runner
        caches = [runner.caches.open([], 64) for _ in texts]
        got = [[] for _ in texts]
        for counts in ((30, 0, 0), (1, 20, 0), (1, 1, 1), (0, 5, 7), (3, 1, 1)):
            inputs = [
                StepInput(cache, text[len(cache.tokens) :][:count])
                for cache, text, count in zip(caches, texts, counts, strict=True)
                if count
            ]
            for sequence, row in zip(inputs, runner.step(inputs, False), strict=True):
                got[caches.index(sequence.cache)].append((len(sequence.cache.tokens) - 1, row))
    for text, rows in zip(texts, got, strict=True):
        want = reference_logits(tiny_checkpoint(family), text)
        for position, row in rows:
            assert (row - want[position]).abs().max() <= 1e-3 * want.abs().max()


def test_one_that_ends_makes_room_at_once_and_results_keep_their_order(store):
    said = []
    with LLM(store(), ctx_size=64, batch_size=2, on_status=said.append) as llm:
        order = [
            i for i, piece in llm.stream_many(PROMPTS[:5], [params_for(i) for i in range(5)]) if piece.finish_reason
        ]
        assert sorted(order) == list(range(5))
        # Lengths 3, 8, 13, 18, 3: the fifth begins when the third and fourth run, and overtakes the fourth.
        assert order == [0, 1, 2, 4, 3]
    assert said[-1] == "5 prompts, 2 at a time (KV cache of 128 positions)"


def test_prompts_share_the_kv_cache_of_one_context(store):
    said = []
    with LLM(store(), ctx_size=128, on_status=said.append) as llm:
        one = llm.runner.budget.kv_cache
        params = params_for(0, max_tokens=8)
        short, long = random_ids(8), random_ids(120)
        check_that_each_is_as_alone(llm, [short] * 12, [params] * 12)
        assert "12 prompts, 8 at a time (KV cache of 128 positions)" in said
        check_that_each_is_as_alone(llm, [long, short, long], [params] * 3)
        assert "3 prompts, 1 at a time (KV cache of 128 positions)" in said
    with LLM(store(), ctx_size=128, batch_size=3) as llm:
        assert llm.runner.budget.kv_cache == 3 * one


def test_stop_strings_and_the_end_of_text_end_only_their_own_answer(store):
    with LLM(store(), ctx_size=64) as llm:
        free = [llm.generate([ids], params_for(i, max_tokens=12))[0] for i, ids in enumerate(PROMPTS[:4])]
        params = [params_for(i, max_tokens=12) for i in range(4)]
        params[1] = params[1].replace(stop=(free[1].text[3:5],))
        ends = frozenset({free[2].token_ids[4]})
        llm.tokenizer.__dict__["eos_ids"] = ends  # as if the model had this token as its end
        params[2] = params[2].replace(ignore_eos=False)
        done = check_that_each_is_as_alone(llm, PROMPTS[:4], params)
    assert [d.finish_reason for d in done] == ["length", "stop", "stop", "length"]
    assert done[1].text == free[1].text[: free[1].text.index(free[1].text[3:5])]
    assert done[2].token_ids == free[2].token_ids[: free[2].token_ids.index(min(ends)) + 1]


def test_a_full_context_ends_an_answer(store):
    with LLM(store(), ctx_size=32, batch_size=2) as llm:
        params = [params_for(i, max_tokens=100) for i in range(2)]
        done = check_that_each_is_as_alone(llm, [random_ids(20), random_ids(32 - 1)], params)
    assert [len(d.token_ids) for d in done] == [13, 2]
    assert {d.finish_reason for d in done} == {"length"}


def test_a_damaged_expert_fails_only_the_prompts_that_are_routed_to_it(store, tmp_path):
    params = SamplingParams(temperature=0, max_tokens=1)
    prompts = [[token] for token in range(3, 15)]
    with LLM(store()) as llm:
        want = llm.generate(prompts, params)
        llm.record_trace(tmp_path / "routes.csv")
        for ids in prompts:
            llm.logits(ids)
    hit = [0 in step.layers[0].experts for step in read_trace(tmp_path / "routes.csv").steps]
    assert True in hit
    assert False in hit
    folder = shutil.copytree(store(), tmp_path / "damaged")
    with LLM(folder) as llm:
        location = llm.store.location(0, 0)
        with open(location.file, "r+b") as file:
            file.seek(location.offset)
            byte = file.read(1)[0]
            file.seek(location.offset)
            file.write(bytes([byte ^ 16]))
        done = llm.generate(prompts, params)
        for got, wanted, damaged in zip(done, want, hit, strict=True):
            if damaged:
                assert (got.finish_reason, got.text, got.token_ids) == ("error", "", [])
                assert isinstance(got.error, StoreError)
            else:
                assert (got.finish_reason, got.token_ids, got.error) == ("length", wanted.token_ids, None)
        with pytest.raises(StoreError):
            llm.generate([prompts[hit.index(True)]], params)


def test_an_answer_that_cannot_be_drawn_ends_alone(store, monkeypatch):
    step = ModelRunner.step

    def nan_for_the_second(self, inputs, decoding):
        rows = step(self, inputs, decoding).clone()
        for (sequence, _), row in zip(inputs, rows, strict=True):
            if sequence.tokens[: len(PROMPTS[1])] == PROMPTS[1] and len(sequence.tokens) > len(PROMPTS[1]) + 2:
                row.fill_(torch.nan)
        return rows

    with LLM(store(), ctx_size=64) as llm:
        want = llm.generate(PROMPTS[:3], [params_for(i, max_tokens=9) for i in range(3)])
        monkeypatch.setattr(ModelRunner, "step", nan_for_the_second)
        got = llm.generate(PROMPTS[:3], [params_for(i, max_tokens=9) for i in range(3)])
    assert [g.token_ids for g in got] == [want[0].token_ids, want[1].token_ids[:3], want[2].token_ids]
    assert got[1].finish_reason == "error"
    assert "not finite" in str(got[1].error)


def test_a_mistake_of_ours_ends_what_runs_and_leaves_an_engine_that_can_be_used(store, monkeypatch):
    params = [params_for(i) for i in range(4)]
    with LLM(store(), ctx_size=128, expert_budget="64KiB") as llm:
        want = [d.token_ids for d in llm.generate(PROMPTS[:4], params)]
        calls = 0

        def broken(*args):
            nonlocal calls
            calls += 1
            if calls == 11:
                raise ZeroDivisionError("broken")
            return combine(*args)

        with monkeypatch.context() as patch:
            patch.setattr(experts, "combine", broken)
            done = llm.generate(PROMPTS[3::-1], params[::-1])
        assert "error" in {d.finish_reason for d in done}
        for made, whole in zip(done, want[::-1], strict=True):
            assert made.token_ids == whole[: len(made.token_ids)]
            if made.finish_reason == "error":
                assert "failed unexpectedly: ZeroDivisionError: broken" in str(made.error)
                assert isinstance(made.error.__cause__, ZeroDivisionError)
        assert [d.token_ids for d in llm.generate(PROMPTS[:4], params)] == want
        assert llm.generate([PROMPTS[2]], params[2])[0].token_ids == want[2]


def test_requests_that_are_made_while_others_run_run_beside_them(store):
    params = [params_for(i) for i in range(4)]
    with LLM(store(), ctx_size=128) as llm:
        want = [d.token_ids for d in llm.generate(PROMPTS[:4], params)]
        many = llm.stream_many(PROMPTS[:4], params)
        first = next(many)
        one = llm.stream(PROMPTS[1], params[1])
        begun = next(one)
        assert llm.generate([PROMPTS[2]], params[2])[0].token_ids == want[2]
        assert [*begun.token_ids, *(token for piece in one for token in piece.token_ids)] == want[1]
        got = {i: [] for i in range(4)}
        for index, piece in [first, *many]:
            got[index] += piece.token_ids
        assert list(got.values()) == want


def test_wrong_requests_are_refused_before_anything_starts(store):
    with LLM(store(), ctx_size=16) as llm:
        for prompts, message in (
            ([[1], [], [2]], "Prompt 2 of 3: The prompt is empty"),
            ([[1], [2], [3] * 16], "Prompt 3 of 3: The prompt of 16 tokens does not fit the context of 16"),
            ([[1], [999]], "Prompt 2 of 2: The prompt holds token ids outside the vocabulary"),
            ([[]], "^The prompt is empty"),
        ):
            with pytest.raises(UsageError, match=message):
                llm.stream_many(prompts)
        with pytest.raises(UsageError, match="There are 2 prompts, but 3 sampling parameters"):
            llm.generate([[1], [2]], [SamplingParams()] * 3)
        assert llm.runner.counters.expert_uses == 0
        assert llm.generate([]) == []
    with pytest.raises(UsageError, match="batch-size 0 must be at least 1"):
        LLM(store(), batch_size=0)


RUN = """
import json, sys
from moert import LLM, SamplingParams
llm = LLM(sys.argv[1], memory_budget=int(sys.argv[2]), ctx_size=1024, batch_size=6)
prompts = ["A mixture of experts is " * 20] * 8
done = llm.generate(prompts, SamplingParams(temperature=1, max_tokens=4, ignore_eos=True))
print(json.dumps([d.stats.as_dict() for d in done]))
"""


def test_peak_memory_of_a_batch_stays_within_the_budget(store):
    def run(budget):
        command = [*PYTHON, "-c", RUN, str(store()), str(budget)]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)

    refused = run(1 << 20).stderr
    assert "BudgetError" in refused
    least = int(refused.split("need at least ")[1].split()[0])
    done = run(least)
    assert done.returncode == 0, done.stderr
    assert all(stats["peak_rss_bytes"] <= least == stats["budget_bytes"] for stats in json.loads(done.stdout))


def test_a_batch_that_does_not_fit_is_told_which_would(store):
    with LLM(store(), ctx_size=4096, batch_size=3) as llm:
        enough = llm.runner.budget.total
    with pytest.raises(BudgetError, match=r"--batch-size \d+ or --ctx-size \d+ would fit") as caught:
        LLM(store(), ctx_size=4096, batch_size=64, memory_budget=enough + (96 << 20))
    fitting = int(str(caught.value).split("--batch-size ")[1].split()[0])
    assert 3 <= fitting < 64
    LLM(store(), ctx_size=4096, batch_size=fitting, memory_budget=enough + (96 << 20)).close()
