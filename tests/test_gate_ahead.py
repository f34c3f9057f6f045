"""Routers of later layers on the hidden state of an earlier one: against float64, and as a model tells of them."""

import math

import pytest
import torch

from moert import LLM
from moert.kernels.gate_ahead import GateAheadRouters, fold
from moert.kernels.layer_step import LayerStep
from moert.quant import matmul

EPS = 1e-6
KERNELS = matmul.available_kernels()


@pytest.fixture(autouse=True)
def default_kernel():
    yield
    matmul.set_kernel(matmul.available_kernels()[0])


def gate(g, experts, hidden):
    """A norm and a router whose logits are a few units apart."""
    router = 3 * torch.randn(experts, hidden, generator=g) / math.sqrt(hidden)
    return torch.rand(hidden, generator=g) + 0.5, router.to(torch.bfloat16)


def exact(x, norm, router):
    """Softmax over all experts, in float64, of RMSNorm(x) times the router."""
    x = x.double()
    return (x / (x.square().mean() + EPS).sqrt() * norm.double() @ router.double().T).softmax(-1)[0]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("experts", "hidden", "count"), [(5, 48, 5), (37, 200, 8), (128, 256, 1)])
@pytest.mark.parametrize("routers", [1, 3])
def test_choices_match_float64(kernel, experts, hidden, count, routers):
    matmul.set_kernel(kernel)
    g = torch.Generator().manual_seed(hidden)
    folded = [fold(*gate(g, experts, hidden)) for _ in range(routers)]
    x = 7 * torch.randn(1, hidden, generator=g)
    found = GateAheadRouters(folded, EPS, count)(x)
    assert len(found) == routers
    for router, (chosen, weights) in zip(folded, found, strict=True):
        want = exact(x, torch.ones(hidden), matmul.floats(router))
        assert len(set(chosen)) == len(chosen) == len(weights) == count
        assert weights == sorted(weights, reverse=True)
        # What differs is the rounding of the input to 8 bits.
        torch.testing.assert_close(torch.tensor(weights).double(), want[chosen], rtol=0.1, atol=1e-4)
        assert want[chosen].min() >= 0.8 * want.topk(count).values[-1]


@pytest.mark.parametrize("hidden", [64, 200])
def test_folding_loses_little(hidden):
    g = torch.Generator().manual_seed(3)
    norm, router = gate(g, 37, hidden)
    want = router.double() * norm.double()
    error = (matmul.floats(fold(norm, router)).double() - want).square().sum() / want.square().sum()
    assert error < 0.015, "4 bits of Gaussian weights: about 0.9%"
    x = torch.randn(1, hidden, generator=g)
    chosen, _ = GateAheadRouters([fold(norm, router)], EPS, 16)(x)[0]
    best = exact(x, norm, router).topk(8).indices.tolist()
    assert set(best[:4]) <= set(chosen)


def test_every_kernel_agrees_and_routers_do_not_disturb_each_other():
    g = torch.Generator().manual_seed(4)
    routers, x = [fold(*gate(g, 37, 200)) for _ in range(3)], torch.randn(1, 200, generator=g)
    matmul.set_kernel("reference")
    want = GateAheadRouters(routers, EPS, 5)(x)
    for kernel in KERNELS:
        matmul.set_kernel(kernel)
        got = GateAheadRouters(routers, EPS, 5)(x)
        assert got == [GateAheadRouters([router], EPS, 5)(x)[0] for router in routers]
        for (chosen, weights), (expected, their) in zip(got, want, strict=True):
            assert chosen == expected
            assert weights == pytest.approx(their, rel=1e-3)


def test_routers_that_do_not_belong_together_are_refused():
    g = torch.Generator().manual_seed(5)
    small, large = fold(*gate(g, 8, 64)), fold(*gate(g, 8, 128))
    x = torch.randn(1, 64, generator=g)
    with pytest.raises(ValueError, match="differ in their inputs"):
        GateAheadRouters([small, large], EPS, 2)(x)
    with pytest.raises(ValueError, match="number of experts"):
        GateAheadRouters([small], EPS, 9)(x)


class Listener:
    def __init__(self, horizon):
        self.horizon, self.told = horizon, []

    def on_router_prediction(self, layer, guesses):
        self.told.append((layer, guesses))


@pytest.mark.parametrize("dense_layers", [[], [0, 3]])
def test_a_model_tells_what_its_next_layers_will_ask_for(store, monkeypatch, dense_layers):
    """The guesses are those of the true routers on the residual stream behind attention, or the embedding."""
    streams = []
    step = LayerStep.__call__

    def recorded(self, x, *others):
        result = step(self, x, *others)
        streams.append((x.clone(), result[1]))
        return result

    monkeypatch.setattr(LayerStep, "__call__", recorded)
    path = store(num_hidden_layers=5, num_experts=16, mlp_only_layers=dense_layers)
    moe = [layer for layer in range(5) if layer not in dense_layers]
    ids = [5, 77, 140, 9, 301, 18, 44, 230]
    with LLM(path, ctx_size=32) as llm:
        decoder = llm.runner.decoder
        plain = llm.runner.forward(ids[:1])
        for token in ids[1:]:
            plain = llm.runner.forward([token])
        llm.runner.rewind(1)
        streams.clear()
        decoder.watch(listener := Listener(2))
        for token in ids[1:]:
            told = llm.runner.forward([token])
        assert torch.equal(told, plain), "being watched changes nothing"
        shares, embedding = [], matmul.floats(decoder.embed_tokens.weight)
        for number, (layer, guesses) in enumerate(listener.told):
            assert [guess.layer for guess in guesses] == [later for later in moe if later > layer][:2]
            token = number // 5  # the last layer has nothing to tell, but the token alone has, before the first
            x = embedding[ids[1 + token], None] if layer == -1 else streams[token * 5 + layer][0]
            for guess in guesses:
                block = decoder.layers[guess.layer]
                want = exact(x, block.post_attention_layernorm.weight, block.mlp.gate.weight)
                assert len(guess.experts) == len(guess.weights) == 6
                shares.append(len(set(want.topk(3).indices.tolist()) & set(guess.experts)) / 3)
        assert [layer for layer, _ in listener.told] == [-1, 0, 1, 2, 3] * 7
        assert sum(shares) / len(shares) > 0.95, "routers rounded to 4 bits name twice as many"
        for horizon, most in ((0, 0), (9, 3)):
            listener.told, listener.horizon = [], horizon
            llm.runner.rewind(7)
            llm.runner.forward(ids[7:])
            assert max((len(guesses) for _, guesses in listener.told), default=0) == most
        listener.told, listener.horizon = [], 2
        decoder.watch(None)
        llm.runner.rewind(7)
        llm.runner.forward(ids[7:])
        assert listener.told == []
