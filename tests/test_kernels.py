"""Every kernel against float64 arithmetic on the same codes, scales and int8 inputs."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moert.quant import format as fmt
from moert.quant import matmul, nested, reference

KERNELS = matmul.available_kernels()
COMPILED = [k for k in KERNELS if k != "reference"]  # the reference leaves the order of sums, and silu, to torch
SLICE_LISTS = [(2,), (3,), (4,), (8,), (2, 3, 4), (2, 4), (3, 8), (2, 4, 8), (5, 6, 7), (2, 3, 4, 5, 6, 7, 8)]
TOKENS = [1, 2, 3, 4, 5, 8, 17, 64, 70]


@pytest.fixture(autouse=True)
def default_kernel():
    yield
    matmul.set_kernel(KERNELS[0])


def make_matrix(rows, cols, group_size, widths, seed=0, scale=1.0):
    """Random codes: layout, codes of the largest width, scales per width as stored, packed slices."""
    layout = fmt.MatrixLayout(rows, cols, group_size, widths)
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2 ** widths[-1], (rows, cols), generator=g).to(torch.uint8)
    scales = [((torch.rand(rows, layout.groups, generator=g) + 0.05) * scale).half() for _ in widths]
    return layout, codes, scales, reference.pack(codes, [s.float() for s in scales], layout)


def weights_of(layout, codes, scales, index):
    """The matrix at widths[index], float64, from the formula of format.py alone."""
    width = layout.widths[index]
    levels = (codes >> (layout.widths[-1] - width)).double() - (2**width - 1) / 2
    return levels * scales[index].double().repeat_interleave(layout.group_size, 1)[:, : layout.cols]


def int8_inputs(x, group_size):
    """x as the integer kernels see it, float64: per group round(x * (127 / peak)) * peak / 127, ties to even."""
    x = x.numpy()
    out = np.zeros(x.shape)
    for start in range(0, x.shape[1], group_size):
        part = x[:, start : start + group_size]
        peak = np.abs(part).max(axis=1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            q = np.where(peak > 0, np.rint(part * (np.float32(127) / peak)), 0)
        out[:, start : start + group_size] = q.astype(np.float64) * peak.astype(np.float64) / 127
    return torch.from_numpy(out)


def check_product(x, layout, codes, scales, pieces, kernel):
    matmul.set_kernel(kernel)
    for index in range(len(layout.widths)):
        w = matmul.PackedMatrix(layout, tuple(pieces[: index + 1]))
        exact = weights_of(layout, codes, scales, index)
        got = matmul.linear(x, w).double()
        seen = int8_inputs(x, layout.group_size)
        want, size = seen @ exact.T, seen.abs() @ exact.abs().T
        assert ((got - want).abs() <= 4e-6 * size + 1e-30).all(), (layout, index)
        # and so the whole error against unrounded inputs is that of rounding: half a step of every input
        steps = x.abs().double().view(len(x), -1)
        bound = (steps.amax(1) / 254)[:, None] * exact.abs().sum(1) + 4e-6 * size
        assert ((got - x.double() @ exact.T).abs() <= bound * (1 + 1e-6) + 1e-30).all()
        torch.testing.assert_close(w.rows(0, layout.rows).double(), exact, rtol=1e-6, atol=0)
        ids = torch.tensor([0, layout.rows - 1, layout.rows // 2])
        torch.testing.assert_close(matmul.gather_rows(w, ids).double(), exact[ids], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("group_size", fmt.GROUP_SIZES)
@pytest.mark.parametrize("widths", SLICE_LISTS, ids=str)
def test_every_width_and_group_size(kernel, group_size, widths):
    for rows, cols in ((16, group_size), (37, 3 * group_size - 5), (5, 7)):
        matrix = make_matrix(rows, cols, group_size, widths)
        for tokens in (1, 3, 18):
            x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens))
            check_product(x, *matrix, kernel)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 300),
    st.sampled_from(fmt.GROUP_SIZES),
    st.sampled_from(SLICE_LISTS),
    st.sampled_from(TOKENS),
    st.sampled_from(KERNELS),
    st.integers(0, 2**31),
)
def test_odd_shapes(rows, cols, group_size, widths, tokens, kernel, seed):
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed))
    check_product(x, *make_matrix(rows, cols, group_size, widths, seed), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", [1, 20])
def test_columns_beyond_one_panel(kernel, tokens):
    x = torch.randn(tokens, 2500, generator=torch.Generator().manual_seed(1))
    check_product(x, *make_matrix(33, 2500, 64, (2, 3, 4, 8)), kernel)


def adversarial(tokens, cols):
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(4))
    outlier = x.clone()
    outlier[:, cols // 2] = 1e6
    mixed = torch.ones(tokens, cols)
    mixed[:, ::2] = -1
    yield from {
        "zeros": torch.zeros(tokens, cols),
        "saturated": torch.ones(tokens, cols) * 3,
        "saturated, both signs": mixed,
        "outlier": outlier,
        "tiny": x * 1e-25,
        "huge": x * 1e20,
        "denormal": x * 1e-40,
    }.items()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("widths", [(2, 3, 4), (8,)], ids=str)
def test_adversarial_inputs(kernel, widths):
    layout, codes, scales, pieces = make_matrix(40, 200, 64, widths)
    extreme = torch.full_like(codes, 2 ** widths[-1] - 1)
    extreme[:, ::3] = 0
    for tokens in (1, 19):
        for _, x in adversarial(tokens, 200):
            if float(x.abs().max()) < 1e-37 and float(x.abs().max()) > 0:
                matmul.set_kernel(kernel)  # 127 / peak overflows: no accuracy is promised, but no NaN either
                assert matmul.linear(x, matmul.PackedMatrix(layout, tuple(pieces))).abs().max() < 1e-30
                continue
            check_product(x, layout, codes, scales, pieces, kernel)
            packed = reference.pack(extreme, [s.float() for s in scales], layout)
            check_product(x, layout, extreme, scales, packed, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_denormal_scales(kernel):
    check_product(torch.randn(3, 128), *make_matrix(32, 128, 32, (2, 4), scale=2e-7), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [1, 9])
def test_inputs_that_are_not_finite_do_not_pass_for_numbers(kernel, bad, tokens):
    layout, *_, pieces = make_matrix(16, 128, 64, (4,))
    x = torch.randn(tokens, 128)
    x[0, 70] = bad
    matmul.set_kernel(kernel)
    out = matmul.linear(x, matmul.PackedMatrix(layout, tuple(pieces)))
    assert not out[0].isfinite().any()
    assert out[1:].isfinite().all()


@pytest.mark.parametrize("kernel", COMPILED)
def test_one_token_or_many_and_any_number_of_threads_give_the_same_bytes(kernel):
    layout, *_, pieces = make_matrix(300, 700, 64, (2, 3, 4))
    w = matmul.PackedMatrix(layout, tuple(pieces))
    x = torch.randn(70, 700, generator=torch.Generator().manual_seed(0))
    matmul.set_kernel(kernel)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            matmul.set_num_threads(threads)
            results.append(matmul.linear(x, w))
            results.append(torch.cat([matmul.linear(x[i : i + 1], w) for i in range(70)]))
            results.append(torch.cat([matmul.linear(part, w) for part in x.split(7)]))
    finally:
        matmul.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results)


def test_kernels_agree_up_to_rounding():
    layout, *_, pieces = make_matrix(100, 512, 64, (2, 3, 4))
    w = matmul.PackedMatrix(layout, tuple(pieces))
    x = torch.randn(10, 512)
    results = []
    for kernel in KERNELS:
        matmul.set_kernel(kernel)
        results.append(matmul.linear(x, w))
    for other in results[1:]:
        assert (results[0] - other).abs().max() <= 1e-5 * results[0].abs().max()


def test_several_matrices_in_one_call_equal_one_by_one():
    matrices = []
    for rows in (48, 5, 130):
        layout, *_, pieces = make_matrix(rows, 200, 64, (8,), seed=rows)
        matrices.append(matmul.PackedMatrix(layout, tuple(pieces)))
    for kernel in KERNELS:
        matmul.set_kernel(kernel)
        for tokens in (1, 12):
            x = torch.randn(tokens, 200)
            many = matmul.linear_many(x, matrices)
            assert all(torch.equal(out, matmul.linear(x, w)) for out, w in zip(many, matrices, strict=True))


def make_expert(layout, seed):
    g = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, layout.raw_dtype)
    parts = (torch.randn(*shape, generator=g) / shape[1] ** 0.5 for shape in layout.shapes)
    return nested.pack_expert(*(p.to(dtype) if layout.raw else p for p in parts), layout)


def ffn_in_float64(x, expert):
    gate, up, down = (
        (m if isinstance(m, torch.Tensor) else m.rows(0, m.shape[0])).double()
        for m in (expert.gate, expert.up, expert.down)
    )
    g = x.double() @ gate.T
    return (g * torch.sigmoid(g) * (x.double() @ up.T)) @ down.T


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("widths", [(2, 3, 4), (3, 8), (4,), (16,)], ids=str)
def test_experts_match_float64(kernel, widths):
    """Compare experts, each with tokens of its own; int8 inputs cost about 1% of the output's size."""
    layout = fmt.ExpertLayout(96, 40, 32, widths, "float32")
    matmul.set_kernel(kernel)
    pieces = [make_expert(layout, e) for e in range(3)]
    x = torch.randn(30, 96, generator=torch.Generator().manual_seed(9))
    for count in range(1, len(widths) + 1):
        experts = [matmul.PackedExpert.from_slices(p[:count], layout) for p in pieces]
        for tokens_of in ([[0], [0], [0]], [[1, 5, 29], list(range(30)), [7]]):
            some = x if max(map(max, tokens_of)) else x[:1]
            out = torch.full((sum(map(len, tokens_of)), 96), float("nan"))
            matmul.experts_ffn(some, experts, [torch.tensor(t) for t in tokens_of], out)
            want = torch.cat([ffn_in_float64(some[t], e) for t, e in zip(tokens_of, experts, strict=True)])
            assert (out - want).norm() <= (1e-5 if layout.raw else 0.02) * want.norm()


@pytest.mark.parametrize("kernel", COMPILED)
def test_silu_is_accurate_over_its_whole_range(kernel):
    """Through an expert whose gate passes its input on, whose up is 1 and whose down adds nothing."""
    layout = fmt.ExpertLayout(32, 32, 32, (8,))
    eye, ones = torch.eye(32) * 127.5, torch.zeros(32, 32)
    ones[:, 0] = 127.5
    expert = matmul.PackedExpert.from_slices(nested.pack_expert(eye, ones, eye, layout), layout)
    matmul.set_kernel(kernel)
    for value in (-1e3, -90.0, -88.0, -20.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 30.0, 100.0, 1e4):
        x = torch.zeros(1, 32)
        x[0, 0] = value / 127.5
        out = torch.empty(1, 32)
        matmul.experts_ffn(x, [expert], [torch.tensor([0])], out)
        want = ffn_in_float64(x, expert)
        assert (out - want).abs().max() <= 0.02 * want.abs().max() + 1e-30


def test_an_empty_token_list_is_fine_beside_others():
    layout = fmt.ExpertLayout(64, 32, 32, (2, 4))
    experts = [matmul.PackedExpert.from_slices(make_expert(layout, e), layout) for e in range(2)]
    out = torch.empty(2, 64)
    matmul.experts_ffn(torch.randn(3, 64), experts, [torch.tensor([], dtype=torch.int64), torch.tensor([0, 2])], out)
    assert out.isfinite().all()
