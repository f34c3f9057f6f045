"""The Triton kernels against float64, in Triton's interpreter everywhere and on a GPU where there is one.

The interpreter has to be chosen before triton is imported, so it runs this file once more in a process of its own.
"""

import os
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from moert.quant import matmul, placed, reference, trellis
from moert.quant.format import TRELLIS, ExpertLayout, align
from moert.quant.nested import join_parts

from .child import ENVIRONMENT, PYTHON
from .test_kernels import int8_inputs, make_matrix, weights_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
LAYOUT = ExpertLayout(38, 20, 32, (2, 3, 4))
SLICE_LISTS = [(8,), (3, 8), (2, 4, 8), (5, 6, 7), (2, 3, 4, 5, 6, 7, 8)]  # planes of every size in every place
FEW, MANY = 2, 7  # tokens of an expert, for products with vectors and with blocks
SUM_ERROR = 1e-6  # of float32 sums over groups, relative to the sum of magnitudes
outside = pytest.mark.skipif(INTERPRETED, reason="for the process that starts the interpreter")


def case(test):
    """A test of the kernels: in the interpreter, or else on a GPU."""
    return test if INTERPRETED else pytest.mark.gpu(test)


@pytest.fixture
def kernels():
    pytest.importorskip("triton", minversion="3.4", reason="triton 3.4 or newer is not installed: it is in moert[cuda]")
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    from moert.quant import triton_kernels

    return triton_kernels


@pytest.fixture
def reference_kernel():
    """The torch reference in the place of compiled kernels."""
    matmul.set_kernel("reference")
    yield
    matmul.set_kernel(matmul.available_kernels()[0])


@outside
def test_in_the_interpreter():
    pytest.importorskip(
        "triton", minversion="3.7", reason="no triton 3.7, whose interpreter is the first that knows numpy 2.4"
    )
    command = [*PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    environment = {**ENVIRONMENT, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no CUDA device" not in result.stdout


def make_weights(layout, count, seed):
    """All slices of a matrix of random codes, and it at the width of `count` of them in float64, for inputs as they are
    `seen`.
    """
    if layout.code != TRELLIS:
        *parts, slices = make_matrix(layout.rows, layout.cols, layout.group_size, layout.widths, seed, scale=0.1)
        return slices, weights_of(*parts, count - 1)
    g = torch.Generator().manual_seed(seed)
    shape = layout.rows, reference.padded_columns(layout)
    codes = torch.randint(0, 2 ** layout.widths[-1], shape, generator=g, dtype=torch.uint8)
    scales = [torch.rand(layout.rows, 1, generator=g) * 0.01 + 0.001 for _ in layout.widths]
    slices = reference.pack(codes, scales, layout)
    return slices, reference.rotated(slices, layout, count).double()


def seen(x, layout):
    """x as the products with a matrix see it, float64."""
    cols = None if layout.code == TRELLIS else layout.cols
    return int8_inputs(reference.rotated_inputs(x, layout), layout.group_size)[:, :cols]


def make_experts(layout, counts, device=DEVICE):
    """PlacedExperts with counts[e] slices of random codes in any order in an arena, and their matrices in float64.

    All other bytes of the arena are such that, read as a scale, they make the result NaN.
    """
    matrices, pieces = [], {}
    for e, count in enumerate(counts):
        made = [make_weights(matrix, count, seed=3 * e + m) for m, matrix in enumerate(layout.matrices)]
        matrices.append([weights for _, weights in made])
        slices = join_parts([slices for slices, _ in made], layout)
        pieces |= {(e, i): slices[i][: layout.offsets(i)[-1]] for i in range(count)}
    arena = torch.full((64 + sum(len(p) + 64 for p in pieces.values()),), 255, dtype=torch.uint8)
    offsets, at = [[0] * count for count in counts], 64
    for e, i in random.Random(len(counts)).sample(sorted(pieces), len(pieces)):
        offsets[e][i] = at
        arena[at : at + len(pieces[e, i])] = pieces[e, i]
        at += len(pieces[e, i]) + 64
    return placed.PlacedExperts(layout, arena.to(device), offsets), matrices


def packed(experts):
    """Make the experts for the CPU kernels."""
    sizes = experts.layout.slice_sizes
    slices = [
        [experts.arena[at : at + size].cpu() for at, size in zip(o, sizes, strict=False)] for o in experts.offsets
    ]
    return [matmul.PackedExpert.from_slices(s, experts.layout) for s in slices]


def inputs(tokens, cols):
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens))


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
        pairs = [(seen(v, layout.matrices[m])[t], w[m]) for t, w in zip(tokens_of, matrices, strict=True)]
        want = torch.cat([a @ w.T for a, w in pairs])
        size = torch.cat([a.abs() @ w.abs().T for a, w in pairs])
        assert got.shape == (sum(map(len, tokens_of)), rows)
        assert ((got - want).abs() <= SUM_ERROR * size + 1e-30).all(), (layout, m)


def rounded(h, error, layout):
    """h [P, F], known to within `error`, as `seen` by the matrix `layout`, and how far that may be from the truth.

    A code may be the next one where h lies so close to the middle of two that `error` decides; else only the scale
    is not known exactly.
    """
    (rows, cols), G = h.shape, layout.group_size
    pad = (0, align(cols, G) - cols)
    h, error = (functional.pad(a, pad).view(rows, (cols + pad[1]) // G, G) for a in (h, error))
    if layout.code == TRELLIS:
        error = ((error + 1e-6 * h.abs()).sum(-1, keepdim=True) / G**0.5).expand_as(h)
        h, cols = trellis.rotate(h, G), cols + pad[1]
    peak = h.abs().amax(-1, keepdim=True) + 1e-300
    share = error.amax(-1, keepdim=True) / peak + 3e-7  # of the scale, and of what h is multiplied with
    code = h * 127 / peak
    undecided = (code - code.floor() - 0.5).abs() <= error * 127 / peak + code.abs() * share
    step, code = peak / 127, code.round()
    result = code * step, step * undecided + code.abs() * step * share
    return [a.reshape(rows, align(cols, G))[:, :cols] for a in result]


def check_sums(kernels, layout, counts, x, tokens_of, weights_of_):
    """The whole feed-forward against float64, and the CPU kernels, held to the same bounds."""
    experts, matrices = make_experts(layout, counts)
    out = torch.ones(len(x), layout.hidden, device=DEVICE)
    kernels.add_experts(x.to(DEVICE), experts, tokens_of, weights_of_, out)
    parts, on_cpu = torch.empty(sum(map(len, tokens_of)), layout.hidden), torch.ones(len(x), layout.hidden)
    if len(parts):
        matmul.experts_ffn(x, packed(experts), tokens_of, parts)
        on_cpu.index_add_(0, torch.cat(tokens_of), parts * torch.cat(weights_of_)[:, None])
    want = torch.ones(len(x), layout.hidden, dtype=torch.float64)
    error = SUM_ERROR * want
    every = seen(x, layout.matrices[kernels.GATE])
    for t, weight, (gate, up, down) in zip(tokens_of, weights_of_, matrices, strict=True):
        v, w = every[t], weight.double()[:, None]
        g, u = v @ gate.T, v @ up.T
        g_error, u_error = (SUM_ERROR * (v.abs() @ m.abs().T) for m in (gate, up))
        h = functional.silu(g) * u
        h_error = 1.1 * g_error * (u.abs() + u_error)  # silu's slope is below 1.1
        h_error += functional.silu(g).abs() * (u_error + 1e-6 * u.abs()) + 1e-35
        h, h_error = rounded(h, h_error, layout.matrices[kernels.DOWN])
        want[t] += w * (h @ down.T)
        error[t] += w * ((h_error + 2 * SUM_ERROR * h.abs()) @ down.abs().T)
    for got in (out.cpu(), on_cpu):
        assert ((got.double() - want).abs() <= error).all(), (layout, (got - want).abs().max())
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


def extremes():
    """Rows of one group in which rounding is delicate."""
    ties = torch.arange(32) * 4.0 + 0.5
    ties[-1] = 127.0  # so that inputs are their codes
    g = torch.Generator().manual_seed(3)
    rows = [ties, -ties, torch.zeros(32), torch.full((32,), -3.0)]
    rows += [torch.randn(32, generator=g) * size for size in (1e-40, 1e-37, 1e-30, 1e-3, 1e30)]
    rows += [torch.randint(-300, 300, (32,), generator=g) / 2 for _ in range(3)]
    rows += [torch.randn(32, generator=g) for _ in range(6)]
    rows[-1][7], rows[-2][0], rows[-3][31] = float("nan"), float("inf"), float("-inf")
    return torch.stack(rows)


@case
def test_inputs_are_rounded_as_numpy_does(kernels):
    """Codes, scales and sums of x, to the bit."""
    layout, x = ExpertLayout(60, 32, 32, (4,)), extremes().repeat(1, 2)[:, :60]
    got = kernels._round(x.contiguous().to(DEVICE), kernels._matrix(layout, kernels.GATE)).cpu()
    assert got.shape == (len(x), 64 + 16)
    codes, scales, sums = got[:, :64], *got[:, 64:].contiguous().view(torch.float32).split(2, 1)
    assert not codes[:, 60:].any()
    for group in (0, 1):
        part = x[:, 32 * group : min(32 * group + 32, 60)]
        code = codes[:, 32 * group : 32 * group + part.shape[1]]
        finite = part.isfinite().all(1)
        peak = part.abs().amax(1, keepdim=True).numpy()
        with np.errstate(all="ignore"):
            want = np.where(peak > 1e-36, np.rint(part.numpy() * (np.float32(127) / peak)), 0)
        assert np.array_equal(code[finite], want[finite])
        assert np.array_equal(scales[finite, group], (peak / np.float32(127))[finite, 0])
        assert scales[~finite, group].isnan().all()
        assert torch.equal(sums[:, group], code.sum(1).float())


@case
def test_inputs_of_the_trellis_code_are_rotated_before(kernels):
    """Codes, scales and sums of x, to the bit."""
    layout, x = ExpertLayout(60, 32, 32, (4,), code="trellis"), extremes().repeat(1, 2)[:, :60].contiguous()
    got = kernels._round(x.to(DEVICE), kernels._matrix(layout, kernels.GATE)).cpu()
    codes, (scales, sums) = got[:, :64].view(-1, 2, 32), got[:, 64:].contiguous().view(torch.float32).split(2, 1)
    part = reference.rotated_inputs(x, layout.matrices[kernels.GATE]).view(-1, 2, 32)
    finite, peak = part.isfinite().all(2), part.abs().amax(2, keepdim=True).numpy()
    with np.errstate(all="ignore"):
        want = np.where(peak > 1e-36, np.rint(part.numpy() * (np.float32(127) / peak)), 0)
    assert not finite.all()
    assert np.array_equal(codes[finite], want[finite])
    assert np.array_equal(scales[finite], (peak[..., 0] / np.float32(127))[finite])
    assert scales[~finite].isnan().all()
    assert torch.equal(sums, codes.sum(2).float())


@case
@pytest.mark.parametrize("tokens", [1, 18])
def test_products_of_levels_are_exact_within_a_group(kernels, tokens):
    layout, x = ExpertLayout(32, 19, 32, (2, 4, 5), code="trellis"), extremes()[:tokens].contiguous()
    (m, *_), experts = layout.matrices, make_experts(layout, [3])[0]
    got = kernels.products(x.to(DEVICE), experts, kernels.GATE, [torch.arange(tokens)]).cpu()
    inputs = kernels._round(x.to(DEVICE), kernels._matrix(layout, kernels.GATE)).cpu()
    slices = packed(experts)[0].gate.slices
    levels = trellis.levels(reference.unpack_codes(slices, m, 3), m, 3).double()
    scales = reference.unpack_scales(slices[2], m, 2).T * inputs[:, 32:36].contiguous().view(torch.float32)
    want = (inputs[:, :32].double() @ levels.T).float() * scales
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@case
@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize(
    ("hidden", "inner", "group_size", "widths"),
    [(70, 20, 32, (2, 3, 4)), (70, 20, 64, (2, 4, 6)), (33, 17, 32, (3, 4)), (9, 130, 128, (2, 3))],
)
def test_trellis_code(kernels, reference_kernel, hidden, inner, group_size, widths, tokens):
    """Experts with different numbers of slices in one launch."""
    layout, counts = ExpertLayout(hidden, inner, group_size, widths, code="trellis"), list(range(len(widths), 0, -1))
    tokens_of = [torch.arange(tokens), *[torch.tensor([0])] * (len(widths) - 1)]
    check_products(kernels, layout, counts, inputs(tokens, max(hidden, inner)), tokens_of)
    check_sums(kernels, layout, counts, inputs(tokens, hidden), *routing(tokens, len(counts)))


@case
@pytest.mark.skipif(matmul.available_kernels()[0] == "reference", reason="no compiled kernels here")
@pytest.mark.parametrize("few", [True, False])
def test_products_of_one_group_are_those_of_the_cpu_kernels_to_the_bit(kernels, few):
    """Where no sum is left whose order could differ, also for inputs that are hard to round."""
    experts, _ = make_experts(ExpertLayout(32, 32, 32, (2, 3, 4, 8)), [1, 2, 3, 4])
    x = extremes()
    tokens_of = [torch.arange(e, len(x), 6) if few else torch.arange(len(x)) for e in range(4)]
    got = kernels.products(x.to(DEVICE), experts, kernels.UP, tokens_of).cpu()
    want = [matmul.linear(x[t], e.up) for t, e in zip(tokens_of, packed(experts), strict=True)]
    torch.testing.assert_close(got, torch.cat(want), rtol=0, atol=0, equal_nan=True)


@case
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_products(kernels, tokens):
    layout = ExpertLayout(70, 40, 32, (3, 7))
    check_products(kernels, layout, [2, 1], inputs(tokens, 70), [torch.arange(tokens), torch.tensor([1])])


@pytest.mark.skipif(not INTERPRETED, reason="for the interpreter, which knows no instructions of a GPU")
def test_products_by_the_instruction_that_takes_four(kernels, monkeypatch):
    """The loops around it; the instruction itself is put in place of."""

    def dot4(codes, inputs, total):
        for byte in range(4):
            total += (codes >> 8 * byte & 0xFF) * (inputs << 24 - 8 * byte >> 24)
        return total

    monkeypatch.setattr(kernels, "_dot4", dot4)
    monkeypatch.setattr(kernels, "_INTERPRETED", False)
    layout, x = ExpertLayout(40, 20, 32, (2, 3, 7, 8)), inputs(1, 40)
    check_products(kernels, layout, [2, 4], x, [torch.tensor([0])] * 2)
    check_products(kernels, ExpertLayout(40, 20, 32, (8,)), [1], x, [torch.tensor([0])])
    check_products(kernels, ExpertLayout(40, 140, 128, (3,)), [1], inputs(1, 140), [torch.tensor([0])])
    for group_size in (32, 64):
        layout = ExpertLayout(70, 20, group_size, (2, 3, 5), code="trellis")
        check_products(kernels, layout, [3, 1], inputs(1, 70), [torch.tensor([0])] * 2)


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
    want = [
        matmul._round_inputs(x, e.up.layout) @ reference.rotated(e.up.slices, e.up.layout, n).T
        for n, e in enumerate(packed(many), 1)
    ]
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


@case
def test_inputs_that_do_not_fit_are_refused(kernels):
    experts, _ = make_experts(LAYOUT, [1])
    tokens, x = [torch.tensor([0])], torch.zeros(2, LAYOUT.hidden, device=DEVICE)
    for wrong in (x[:, :-1], x[0], x.half(), torch.zeros(LAYOUT.hidden, 2, device=DEVICE).T):
        with pytest.raises(ValueError, match="is not contiguous float32 of 38 columns"):
            kernels.products(wrong, experts, kernels.GATE, tokens)
    with pytest.raises(ValueError, match="the input is on meta"):
        kernels.products(x.to("meta"), experts, kernels.GATE, tokens)
    for wrong in (x[:1], x.half(), x.to("meta")):
        with pytest.raises(ValueError, match="is not contiguous float32 of the input's shape"):
            kernels.add_experts(x, experts, tokens, [torch.ones(1)], wrong)
