"""The Triton kernels against float64, in Triton's interpreter everywhere and on a GPU where there is one.

The interpreter has to be chosen before triton is imported, so it runs this file once more in a process of its own.
"""

import os
import random
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from moert.quant import placed, reference
from moert.quant.format import ExpertLayout
from moert.quant.matmul import PackedExpert
from moert.quant.nested import join_parts

from .child import ENVIRONMENT, PYTHON
from .test_kernels import SLICE_LISTS, make_matrix, weights_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUT = ExpertLayout(38, 20, 32, (2, 3, 4))
FEW, MANY = 2, 7  # tokens of an expert, for products with vectors and with blocks
SUM_ERROR = 4e-6  # of float32 sums, relative to the sum of magnitudes
outside = pytest.mark.skipif(INTERPRETED, reason="for the process that starts the interpreter")


def case(test):
    """A test of the kernels: in the interpreter, or else on a GPU."""
    return test if INTERPRETED else pytest.mark.gpu(test)


@pytest.fixture
def kernels():
    pytest.importorskip("triton", minversion="3.4", reason="no triton that can be used here")
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    from moert.quant import triton_kernels

    return triton_kernels


@outside
def test_in_the_interpreter():
    pytest.importorskip("triton", minversion="3.7", reason="no triton with an interpreter that knows numpy 2.4")
    command = [*PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    environment = {**ENVIRONMENT, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no CUDA device" not in result.stdout


def make_experts(layout, counts, device=DEVICE):
    """PlacedExperts with counts[e] slices of random codes in any order in an arena, and their matrices in float64.

    All other bytes of the arena are such that, read as a scale, they make the result NaN.
    """
    matrices, pieces = [], {}
    for e, count in enumerate(counts):
        made = [
            make_matrix(rows, cols, layout.group_size, layout.widths, seed=3 * e + m, scale=0.1)
            for m, (rows, cols) in enumerate(layout.shapes)
        ]
        matrices.append([weights_of(*parts[:3], count - 1) for parts in made])
        slices = join_parts([parts[3] for parts in made], layout)
        pieces |= {(e, i): slices[i][: layout.offsets(i)[-1]] for i in range(count)}
    arena = torch.full((64 + sum(len(p) + 64 for p in pieces.values()),), 255, dtype=torch.uint8)
    offsets, at = [[0] * count for count in counts], 64
    for e, i in random.Random(len(counts)).sample(sorted(pieces), len(pieces)):
        offsets[e][i] = at
        arena[at : at + len(pieces[e, i])] = pieces[e, i]
        at += len(pieces[e, i]) + 64
    return placed.PlacedExperts(layout, arena.to(device), offsets), matrices


def inputs(tokens, cols, dtype=torch.float32):
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def routing(tokens, experts, seed=0):
    """Each token to half of the experts: tokens of each expert, in no order, and weights."""
    g = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, experts, generator=g).argsort(1) < (experts + 1) // 2
    tokens_of = [t[torch.randperm(len(t), generator=g)] for t in (chosen[:, e].nonzero()[:, 0] for e in range(experts))]
    return tokens_of, [torch.rand(len(t), generator=g) for t in tokens_of]


def check_products(kernels, layout, counts, x, tokens_of):
    experts, matrices = make_experts(layout, counts)
    for m in (kernels.GATE, kernels.DOWN):
        rows, cols = layout.shapes[m]
        v = x[:, :cols].contiguous()
        got = kernels.products(v.to(DEVICE), experts, m, tokens_of).cpu().double()
        pairs = [(v[t].double(), w[m]) for t, w in zip(tokens_of, matrices, strict=True)]
        want = torch.cat([a @ w.T for a, w in pairs])
        size = torch.cat([a.abs() @ w.abs().T for a, w in pairs])
        assert got.shape == (sum(map(len, tokens_of)), rows)
        assert ((got - want).abs() <= SUM_ERROR * size + 1e-30).all(), (layout, m)


def check_sums(kernels, layout, counts, x, tokens_of, weights_of_):
    experts, matrices = make_experts(layout, counts)
    out = torch.ones(len(x), layout.hidden, device=DEVICE)
    kernels.add_experts(x.to(DEVICE), experts, tokens_of, weights_of_, out)
    info = torch.finfo(x.dtype)
    rounding = info.eps if INTERPRETED else info.eps / 2  # the interpreter cuts bfloat16 off
    want = torch.ones(len(x), layout.hidden, dtype=torch.float64)
    error = 1e-6 * want
    for t, weight, (gate, up, down) in zip(tokens_of, weights_of_, matrices, strict=True):
        v, w = x[t].double(), weight.double()[:, None]
        g, u = v @ gate.T, v @ up.T
        g_error, u_error = (SUM_ERROR * (v.abs() @ m.abs().T) for m in (gate, up))
        h = functional.silu(g) * u
        h_error = 1.1 * g_error * (u.abs() + u_error) + functional.silu(g).abs() * (u_error + 1e-6 * u.abs())
        h_error += rounding * (h.abs() + h_error) + info.tiny  # silu's slope is below 1.1; then h is rounded
        want[t] += w * (h @ down.T)
        error[t] += w * ((h_error + 2 * SUM_ERROR * h.abs()) @ down.abs().T)
    assert ((out.cpu().double() - want).abs() <= error).all(), (layout, (out.cpu() - want).abs().max())
    return out


@case
@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("widths", SLICE_LISTS, ids=str)
def test_every_width_in_one_launch(kernels, widths, tokens):
    layout, counts = ExpertLayout(35, 16, 32, widths), list(range(1, len(widths) + 1))
    check_sums(kernels, layout, counts, inputs(tokens, layout.hidden), *routing(tokens, len(counts)))


@case
@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize(
    ("hidden", "inner", "group_size"), [(1, 1, 64), (5, 33, 32), (32, 32, 32), (65, 17, 64), (7, 130, 128), (7, 70, 64)]
)
def test_ragged_shapes(kernels, hidden, inner, group_size, tokens):
    layout = ExpertLayout(hidden, inner, group_size, (2, 3))
    check_sums(kernels, layout, [2, 1], inputs(tokens, hidden), *routing(tokens, 2))


@case
@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(kernels, dtype, tokens):
    x, counts = inputs(tokens, LAYOUT.hidden, dtype), [3, 1]
    check_products(kernels, LAYOUT, counts, x, [torch.arange(tokens), torch.tensor([1])])
    check_sums(kernels, LAYOUT, counts, x, *routing(tokens, 2))


@case
def test_blocks_and_ranges_of_tokens(kernels, monkeypatch):
    """More tokens than a block and a range take, experts of very different load, and the same again bit for bit."""
    monkeypatch.setattr(placed, "MOST_BLOCK", 16)
    monkeypatch.setattr(placed, "RANGE_TOKENS", 24)
    layout, (tokens_of, weights) = ExpertLayout(33, 16, 32, (2, 3)), routing(50, 3)
    tokens_of[1], weights[1] = tokens_of[1][:1], weights[1][:1]
    args = kernels, layout, [1, 2, 2], inputs(50, 33), tokens_of, weights
    assert torch.equal(check_sums(*args), check_sums(*args))


@case
def test_empty_lists(kernels):
    none, x = torch.zeros(0, dtype=torch.int64), inputs(6, LAYOUT.hidden)
    for counts, tokens_of in (([], []), ([1, 2], [none, none])):
        check_sums(kernels, LAYOUT, counts, x, tokens_of, [torch.zeros(0)] * len(counts))
        experts, _ = make_experts(LAYOUT, counts)
        assert kernels.products(x.to(DEVICE), experts, kernels.GATE, tokens_of).shape == (0, LAYOUT.inner)
        check_sums(kernels, LAYOUT, counts, x[:0], tokens_of, [torch.zeros(0)] * len(counts))
    some = torch.tensor([5, 0])
    check_products(kernels, LAYOUT, [1, 3, 2], x, [none, some, none])
    check_sums(kernels, LAYOUT, [1, 3, 2], x, [none, some, none], [torch.zeros(0), torch.ones(2), torch.zeros(0)])


@case
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_the_same_bytes_as_the_reference(kernels, tokens):
    """One expert at all its widths, its slices where they are: what the torch reference makes of them."""
    experts, _ = make_experts(LAYOUT, [3])
    (offsets,), arena = experts.offsets, experts.arena
    many = placed.PlacedExperts(LAYOUT, arena, [offsets[:n] for n in (1, 2, 3)])
    x = inputs(tokens, LAYOUT.hidden)
    got = kernels.products(x.to(DEVICE), many, kernels.UP, [torch.arange(tokens)] * 3).cpu()
    slices = [arena[at : at + size].cpu() for at, size in zip(offsets, LAYOUT.slice_sizes, strict=True)]
    want = []
    for n in (1, 2, 3):
        up = PackedExpert.from_slices(slices[:n], LAYOUT).up
        want.append(x @ reference.dequantise(up.slices, up.layout, n).T)
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-5, atol=1e-5)


@case
def test_values_that_are_not_finite_stay_with_their_token(kernels):
    experts, _ = make_experts(LAYOUT, [3, 2])
    for tokens in (FEW, MANY):
        x = inputs(tokens, LAYOUT.hidden)
        x[1, 3] = float("nan")
        out = torch.zeros(tokens, LAYOUT.hidden, device=DEVICE)
        every = [torch.arange(tokens)] * 2
        kernels.add_experts(x.to(DEVICE), experts, every, [torch.ones(tokens)] * 2, out)
        assert out[1].isnan().all()
        assert out[[t for t in range(tokens) if t != 1]].isfinite().all()


class Recorder:
    """A kernel that notes its launches instead."""

    def __init__(self, kernel):
        self.kernel, self.calls = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **constants: self.calls.append((args, constants))


def recorded(kernels, monkeypatch, layout, tokens, dtype):
    """What the feed-forward of two experts, on the CPU, would launch: recorders of the two kernels."""
    both = Recorder(kernels._forward_kernel), Recorder(kernels._sum_kernel)
    monkeypatch.setattr(kernels, "_forward_kernel", both[0])
    monkeypatch.setattr(kernels, "_sum_kernel", both[1])
    experts, _ = make_experts(layout, [1, 2], device="cpu")
    x = torch.zeros(tokens, layout.hidden, dtype=dtype)
    routes = routing(tokens, 2)
    kernels.add_experts(x, experts, *routes, torch.zeros(tokens, layout.hidden))
    assert [len(r.calls) for r in both] == [1, 1]
    kernels.products(x, experts, kernels.GATE, routes[0])
    assert [len(r.calls) for r in both] == [2, 1]
    return both


@outside
@pytest.mark.parametrize("tokens", [FEW, 20])
def test_two_launches_that_compile_for_a_jetson_orin(monkeypatch, tmp_path, tokens):
    """What would be launched makes machine code of sm_87, for which no device is needed, within its shared memory."""
    triton = pytest.importorskip("triton", minversion="3.4", reason="no triton that can be used here")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moert.quant import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {torch.int32: "*i32", torch.int64: "*i64", torch.float16: "*fp16", torch.float32: "*fp32"}
    types[torch.bfloat16] = "*bf16"
    layout = ExpertLayout(96, 40, 32, (2, 3))
    for recorder in recorded(triton_kernels, monkeypatch, layout, tokens, torch.bfloat16):
        args, constants = recorder.calls[0]
        names = recorder.kernel.arg_names
        signature = dict(zip(names, (types[a.dtype] for a in args), strict=False)) | dict.fromkeys(
            constants, "constexpr"
        )
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(args))}
        source = ASTSource(recorder.kernel, signature, constants, aligned)
        made = triton.compile(source, target=GPUTarget("cuda", 87, 32))
        assert made.asm["cubin"][:4] == b"\x7fELF"
        assert made.metadata.shared <= 48 << 10
        assert ("mma.sync" in made.asm["ptx"]) == (tokens > placed.FEW_TOKENS)


@outside
@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 99), st.booleans())
def test_items_hold_every_pair_once(tokens, num_experts, seed, sums):
    experts, _ = make_experts(LAYOUT, [1] * num_experts, device="cpu")
    tokens_of, weights = routing(tokens, num_experts, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placed, "RANGE_TOKENS", 16)
        work = placed.plan_work(experts, tokens_of, weights if sums else None, tokens)
    order, starts = work.order.tolist(), work.starts.tolist()
    items = work.items[: 3 * work.num_items].view(-1, 3).tolist()
    got = [(e, order[p], p) for e, first, count in items for p in range(first, first + count)]
    want = [(e, t) for e, of in enumerate(tokens_of) for t in of.tolist()]
    assert [p for *_, p in got] == list(range(len(want)))
    assert all(1 <= count <= work.block for *_, count in items)
    if not sums:
        assert [pair[:2] for pair in got] == want
        return
    assert sorted(pair[:2] for pair in got) == sorted(want)
    known = {(e, t): w for e, of in enumerate(tokens_of) for t, w in zip(of.tolist(), weights[e].tolist(), strict=True)}
    assert [known[e, t] for e, t, _ in got] == work.weights.tolist()[: len(got)]
    span = 1 if work.block == 1 else 16
    for r in range(work.num_ranges):
        for _, first, count in items[starts[r] : starts[r + 1]]:
            assert {order[p] // span for p in range(first, first + count)} == {r}
    assert starts[0] == 0
    assert starts[work.num_ranges] == len(items)


@outside
def test_experts_and_tokens_that_do_not_fit_are_refused():
    arena = torch.zeros(1 << 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="raw experts have no planes"):
        placed.PlacedExperts(ExpertLayout(64, 32, 32, (16,)), arena, [])
    for wrong in (arena[:100], arena.view(-1, 2)[:, 0], arena.view(torch.int8), arena[1:65]):
        with pytest.raises(ValueError, match="the arena is not"):
            placed.PlacedExperts(LAYOUT, wrong, [])
    for offsets in ([], [0, 4096, 8192, 12288]):
        with pytest.raises(ValueError, match=f"expert 1 has {len(offsets)} slices, not 1 to 3"):
            placed.PlacedExperts(LAYOUT, arena, [[0], offsets])
    last = len(arena) - LAYOUT.offsets(0)[-1]
    placed.PlacedExperts(LAYOUT, arena, [[last]])
    for at in (-64, 32, last + 64):
        with pytest.raises(ValueError, match=f"slice 0 of expert 0 does not lie in the arena at offset {at}"):
            placed.PlacedExperts(LAYOUT, arena, [[at]])
    experts = placed.PlacedExperts(LAYOUT, arena, [[0]])
    for tokens_of, weights, message in (
        ([], [], "tokens for 0 experts, and 1"),
        ([torch.tensor([0, 1])], [torch.ones(1)], "not one weight for each token"),
        ([torch.tensor([2])], [torch.ones(1)], "not one of the 2 inputs"),
        ([torch.tensor([-1])], [torch.ones(1)], "not one of the 2 inputs"),
        ([torch.tensor([1, 1])], [torch.ones(2)], "the same token twice"),
    ):
        with pytest.raises(ValueError, match=message):
            placed.plan_work(experts, tokens_of, weights, 2)


@case
def test_inputs_that_do_not_fit_are_refused(kernels):
    experts, _ = make_experts(LAYOUT, [1])
    tokens, x = [torch.tensor([0])], torch.zeros(2, LAYOUT.hidden, device=DEVICE)
    for wrong in (x[:, :-1], x[0], x.double(), torch.zeros(LAYOUT.hidden, 2, device=DEVICE).T):
        with pytest.raises(ValueError, match="is not contiguous floats of 38 columns"):
            kernels.products(wrong, experts, kernels.GATE, tokens)
    with pytest.raises(ValueError, match="the input is on meta"):
        kernels.products(x.to("meta"), experts, kernels.GATE, tokens)
    for wrong in (x[:1], x.half(), x.to("meta")):
        with pytest.raises(ValueError, match="is not contiguous float32 of the input's shape"):
            kernels.add_experts(x, experts, tokens, [torch.ones(1)], wrong)
