"""The compiled decode step of a layer against the same in float64, with raw float32 weights, which round nothing."""

import math

import pytest
import torch

from moert.kernels import layer_step
from moert.quant import matmul
from moert.quant.matmul import FEW_TOKENS

COMPILED = [k for k in matmul.available_kernels() if k != "reference"]
EPS = 1e-6


@pytest.fixture(autouse=True)
def default_kernel():
    yield
    matmul.set_kernel(matmul.available_kernels()[0])


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def exact_attention(q, k, v, norms, cos, sin, keys, values):
    """Attention of one token in float64: q [H, d], k and v [J, d], keys and values [J, S, d] of the tokens before."""

    def prepare(x, norm):
        x = x.double() if norm is None else rms(x.double(), norm)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    q, k = prepare(q, norms and norms[0]), prepare(k, norms and norms[1])
    keys, values = torch.cat([keys, k[:, None]], 1), torch.cat([values, v.double()[:, None]], 1)
    shared = len(q) // len(k)
    scores = torch.einsum("hd,hsd->hs", q, keys.repeat_interleave(shared, 0)) / q.shape[1] ** 0.5
    return torch.einsum("hs,hsd->hd", scores.softmax(-1), values.repeat_interleave(shared, 0))


def exact_step(step, x, rotation, keys, values):
    """Compute what `LayerStep` does, in float64: the new x, what the experts see, router logits."""
    x, d = x.double(), step.head_dim
    h = rms(x, step.norms[0])
    q, k, v = (
        h @ p.weight.double().T + (0 if p.bias is None else p.bias.double()) for p in (step.qkvo[i] for i in range(3))
    )
    kind, *norms = step.qk_norm or (None,)
    if kind == "full":
        q, k = rms(q, norms[0]), rms(k, norms[1])
    if step.clip is not None:
        q, k, v = (t.clamp(-step.clip, step.clip) for t in (q, k, v))
    per_head = tuple(norms) if kind == "head" else None
    y = exact_attention(q.view(-1, d), k.view(-1, d), v.view(-1, d), per_head, *rotation, keys, values)
    o = step.qkvo[3]
    x = x + y.view(1, -1) @ o.weight.double().T + (0 if o.bias is None else o.bias.double())
    h = rms(x, step.norms[1])
    return x, h, h @ step.router.weight.double().T if step.router else None


def make_step(g, hidden, heads, kv_heads, d, kind=None, bias=False, clip=None, experts=9, top_k=3, normalise=False):
    def make(*shape):
        return torch.randn(*shape, generator=g) / math.sqrt(shape[-1])

    def projection(rows, cols):
        return layer_step.Projection(make(rows, cols), torch.randn(rows, generator=g) / 4 if bias else None)

    def norm(n):
        return torch.rand(n, generator=g) + 0.5

    inner, kv = heads * d, kv_heads * d
    qkvo = (projection(inner, hidden), projection(kv, hidden), projection(kv, hidden), projection(hidden, inner))
    sizes = (d, d) if kind == "head" else (inner, kv)
    return layer_step.LayerStep(
        norms=(norm(hidden), norm(hidden)),
        eps=EPS,
        head_dim=d,
        qkvo=qkvo,
        qk_norm=kind and (kind, norm(sizes[0]), norm(sizes[1])),
        clip=clip,
        router=layer_step.Router(make(experts, hidden) * 3, top_k, normalise) if experts else None,
    )


def make_cache(g, bits, kv_heads, d, capacity=160):
    """A cache of random numbers, and its keys and values in float64: [2, J, C, d]."""
    dtype = {8: torch.int8, 16: torch.float16, 32: torch.float32}[bits]
    numbers, scales = torch.zeros(2, kv_heads, capacity, d, dtype=dtype), None
    if bits == 8:
        numbers.random_(-127, 128, generator=g)
        scales = torch.empty(2, kv_heads, capacity).uniform_(0.005, 0.02, generator=g)
    else:
        numbers.copy_(torch.randn(numbers.shape, generator=g))
    keys = numbers[0].view(kv_heads, capacity // 16, 16, d).transpose(-1, -2).contiguous()
    values = numbers[1].contiguous()
    return layer_step.LayerCache(keys, values, scales), numbers.double() * (1 if scales is None else scales[..., None])


def turn(g, d):
    """cos and sin of random angles [d / 2]."""
    angles = torch.rand(d // 2, generator=g) * 6
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("kernel", COMPILED)
@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(4, 2, 16), (8, 1, 128), (3, 3, 256)])
def test_attention_of_one_token_matches_float64(kernel, bits, heads, kv_heads, d):
    matmul.set_kernel(kernel)
    g = torch.Generator().manual_seed(2)
    for position, start in ((0, 0), (1, 0), (70, 0), (140, 0), (140, 33), (128, 127)):
        kind = None if position == 1 else "head"
        step = make_step(g, 32, heads, kv_heads, d, kind=kind, experts=0, top_k=0)
        cache, before = make_cache(g, bits, kv_heads, d)
        cos, sin = turn(g, d)
        x = torch.randn(1, 32, generator=g)
        window = position + 1 - start if start else None
        want, _, _ = exact_step(step, x, (cos, sin), *before[:, :, start:position])
        added = want - x
        got = x.clone()
        step(got, cache, layer_step.Place((cos[None], sin[None]), position, window))
        # The token's own key and value are rounded to the cache's numbers, the rest is float32.
        bound = {32: 1e-5, 16: 2e-3, 8: 2e-2}[bits] * added.abs().max()
        assert (got - want).abs().max() <= bound


VARIANTS = {
    "plain": {},
    "norms per head": {"kind": "head", "normalise": True},
    "whole norms and clipping": {"kind": "full", "clip": 0.7},
    "biases": {"bias": True},
    "no experts": {"experts": 0, "top_k": 0},
    "all experts": {"experts": 5, "top_k": 5, "normalise": True},
    "one of many experts": {"experts": 60, "top_k": 1},
}


@pytest.mark.parametrize("kernel", COMPILED)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("hidden", [48, 200])
def test_the_step_of_a_layer_matches_float64(kernel, variant, hidden):
    matmul.set_kernel(kernel)
    g = torch.Generator().manual_seed(hidden)
    step = make_step(g, hidden, 4, 2, 32, **VARIANTS[variant])
    cache, before = make_cache(g, 16, 2, 32)
    position = 11
    cos, sin = turn(g, 32)
    x = torch.randn(1, hidden, generator=g)
    want_x, want_h, logits = exact_step(step, x, (cos, sin), *before[:, :, 2:position])
    assert step.most_tokens == FEW_TOKENS - 1
    h, experts, weights = step(x, cache, layer_step.Place((cos[None], sin[None]), position, 10))
    torch.testing.assert_close(x.double(), want_x, rtol=1e-3, atol=1e-3)  # the cache holds halves
    torch.testing.assert_close(h.double(), want_h, rtol=2e-3, atol=2e-3)
    if logits is None:
        assert experts == weights == []
        return
    want, chosen = logits.softmax(-1).topk(step.router.top_k)
    want = want / want.sum() if step.router.normalise else want
    assert experts == chosen[0].tolist()
    torch.testing.assert_close(torch.tensor([weights]).double(), want, rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("kernel", COMPILED)
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("strength", [0.0, 0.15, 1.0])
def test_experts_with_a_bonus_are_chosen_with_the_weights_that_they_have_without(kernel, normalise, strength):
    matmul.set_kernel(kernel)
    g = torch.Generator().manual_seed(3)
    step = make_step(g, 48, 4, 2, 32, experts=20, top_k=4, normalise=normalise)
    cos, sin = turn(g, 32)
    routing_bias = (torch.rand(20, generator=g) < 0.4) * strength
    x = torch.randn(5, 48, generator=g)
    for row in x.split(1):
        cache, before = make_cache(g, 32, 2, 32)
        place = layer_step.Place((cos[None], sin[None]), 11, None)
        _, _, (logits,) = exact_step(step, row, (cos, sin), *before[:, :, :11])
        shares = logits.softmax(-1)
        many = step.many(row.clone(), [(cache, place)], routing_bias)
        _, experts, weights = step(row.clone(), cache, place, routing_bias)
        best, *others = (
            (logits + 1e9 * (logits == logits.max()) + routing_bias * (logits.max() - logits.min())).argsort().flip(0)
        )
        chosen = sorted([int(best), *map(int, others[:3])], key=lambda e: -logits[e])
        assert experts == chosen == many[1][0].tolist()
        want = shares[chosen] / (shares[chosen].sum() if normalise else 1)
        torch.testing.assert_close(torch.tensor(weights).double(), want, rtol=5e-3, atol=1e-6)
        assert weights == many[2][0].tolist()
        if strength == 0:
            assert step(row.clone(), cache, place)[1:] == (experts, weights)


@pytest.mark.parametrize("kernel", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_any_dtype_are_read_exactly(kernel, dtype):
    matmul.set_kernel(kernel)
    g = torch.Generator().manual_seed(5)
    for rows, cols in ((1, 1), (17, 33), (40, 256)):
        w = torch.randn(rows, cols, generator=g).to(dtype)
        for tokens in (1, 3, 5):
            x = torch.randn(tokens, cols, generator=g)
            want = x.double() @ w.double().T
            got = matmul.linear(x, w).double()
            assert (got - want).abs().max() <= 4e-6 * (x.double().abs() @ w.double().abs().T).max()


@pytest.mark.parametrize("kernel", COMPILED)
@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(4, 4, 32), (6, 2, 64), (80, 2, 16)])
@pytest.mark.parametrize("window", [None, 1, 30, 100])
def test_many_tokens_are_the_same_bytes_as_one_at_a_time(kernel, bits, heads, kv_heads, d, window):
    matmul.set_kernel(kernel)
    g = torch.Generator().manual_seed(window or 0)
    step = make_step(g, 48, heads, kv_heads, d, kind="head", bias=True)
    cache, _ = make_cache(g, bits, kv_heads, d)
    other, _ = make_cache(torch.Generator().manual_seed(1), bits, kv_heads, d)
    past, T = 50, 75
    for name in ("keys", "values", "scales"):  # the same past
        if getattr(cache, name) is not None:
            getattr(other, name).copy_(getattr(cache, name))
    angles = torch.rand(T, d // 2, generator=g) * 6
    cos, sin = angles.cos(), angles.sin()
    x = torch.randn(T, 48, generator=g)
    together, experts, weights, seen = x.clone(), [], [], []
    for first, last in ((0, 9), (9, 70), (70, T)):
        place = layer_step.Place((cos[first:last], sin[first:last]), past + first, window)
        part = together[first:last]
        for kept, found in zip((seen, experts, weights), step.many(part, [(cache, place)]), strict=True):
            kept.append(found)
    experts, weights, seen = torch.cat(experts), torch.cat(weights), torch.cat(seen)
    for t in range(T):
        single = x[t : t + 1].clone()
        place = layer_step.Place((cos[t : t + 1], sin[t : t + 1]), past + t, window)
        h, its, their = step(single, other, place)
        assert torch.equal(single[0], together[t])
        assert torch.equal(h[0], seen[t])
        assert (its, their) == (experts[t].tolist(), weights[t].tolist())
    assert torch.equal(cache.keys, other.keys)
    assert torch.equal(cache.values, other.values)


@pytest.mark.parametrize("kernel", COMPILED)
@pytest.mark.parametrize("bits", [32, 16, 8])
def test_tokens_of_several_sequences_are_the_same_bytes_as_each_sequence_alone(kernel, bits):
    matmul.set_kernel(kernel)
    g = torch.Generator().manual_seed(bits)
    heads, kv_heads, d = 6, 2, 32
    step = make_step(g, 48, heads, kv_heads, d, kind="head")
    together, alone, x = [], [], []
    for i, (position, tokens, window) in enumerate(
        ((0, 1, None), (70, 1, None), (33, 1, 5), (20, 40, 16), (3, 2, None))
    ):
        for runs in (together, alone):
            cache, _ = make_cache(torch.Generator().manual_seed(i), bits, kv_heads, d)
            angles = torch.rand(tokens, d // 2, generator=torch.Generator().manual_seed(i)) * 6
            runs.append((cache, layer_step.Place((angles.cos(), angles.sin()), position, window)))
        x.append(torch.randn(tokens, 48, generator=g))
    want_x = [part.clone() for part in x]
    want = [step.many(part, [run]) for part, run in zip(want_x, alone, strict=True)]
    got_x = torch.cat(x)
    got = step.many(got_x, together)
    assert torch.equal(got_x, torch.cat(want_x))
    for ours, theirs in zip(got, zip(*want, strict=True), strict=True):
        assert torch.equal(ours, torch.cat(theirs))
    for (ours, _), (theirs, _) in zip(together, alone, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


def test_places_beyond_their_cache_are_refused():
    g = torch.Generator().manual_seed(1)
    step = make_step(g, 48, 2, 1, 16)
    cache, _ = make_cache(g, 16, 1, 16, capacity=32)
    cos, sin = (torch.zeros(2, 8) for _ in range(2))
    inside, beyond = (layer_step.Place((cos, sin), position, None) for position in (30, 31))
    step.many(torch.zeros(4, 48), [(cache, inside), (cache, inside)])
    with pytest.raises(ValueError, match="bad position"):
        step.many(torch.zeros(4, 48), [(cache, inside), (cache, beyond)])
    with pytest.raises(ValueError, match="3 tokens do not fit"):
        step.many(torch.zeros(3, 48), [(cache, inside)])


def test_what_the_compiled_step_cannot_do_is_left_to_torch():
    g = torch.Generator().manual_seed(1)
    step = make_step(g, 32, 2, 1, 16)
    halved = layer_step.Projection(torch.randn(64, 32)[::2].double())
    assert layer_step.LayerStep(step.norms, EPS, 16, (halved, *step.qkvo[1:]), None, None, None).most_tokens == 0

    def steppable(d, dtype):
        return layer_step.LayerCache(
            torch.zeros(1, 1, d, 16, dtype=dtype), torch.zeros(1, 16, d, dtype=dtype), None
        ).steppable()

    assert not steppable(24, torch.float16)
    assert not steppable(32, torch.bfloat16)
    assert steppable(32, torch.float16)
    matmul.set_kernel("reference")
    assert not steppable(32, torch.float16)
