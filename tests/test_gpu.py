"""A model on a GPU, where there is one: what comes out, and how much of its memory is taken."""

import pytest
import torch

from moert import LLM
from moert.device.cuda import open_cuda
from moert.errors import DeviceError

pytestmark = pytest.mark.gpu
MIB = 1 << 20
IDS = list(range(30, 130))


@pytest.fixture(autouse=True)
def gpu():
    try:
        open_cuda().close()
    except DeviceError as error:
        pytest.skip(str(error))


def logits(**options):
    """Compute logits of a prompt and of tokens one by one, float64 [T, V], and the device's share of experts."""
    with LLM(ctx_size=256, **options) as llm:
        engine = llm.runner
        found = [engine.forward(IDS[:60], all_logits=True)]
        found += [engine.forward([token])[None] for token in IDS[60:]]
        return torch.cat(found).double(), engine.counters.device_uses / engine.counters.expert_uses


@pytest.mark.parametrize("precision", ["fixed:4", "routed:3"])
@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"dense_quant": "off", "hybrid": False}, 1e-3),
        ({"dense_quant": "off"}, 1e-3),
        ({}, 5e-3),  # what 8 bits of the dense part cost on the CPU
        ({"kv_bits": 8}, 1e-2),
    ],
)
def test_what_comes_out_is_that_of_the_cpu(precision, options, limit):
    want, _ = logits(precision=precision, device="cpu")
    got, share = logits(precision=precision, device="cuda", **options)
    p, q = want.log_softmax(-1), got.log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).mean() < limit
    assert share == 1 or options.get("hybrid", True)


@pytest.mark.parametrize("budget", [900 * MIB, 1500 * MIB])
def test_the_budget_holds(budget):
    torch.cuda.reset_peak_memory_stats()
    with LLM(ctx_size=256, device="cuda", device_budget=budget) as llm:
        llm.logits(IDS)
        # The rest of the overhead is for what torch reserves beyond what it is asked for.
        taken = llm.runner.offload.device._context + torch.cuda.max_memory_reserved()
    assert taken <= budget
