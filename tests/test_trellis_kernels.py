"""The trellis code: its bytes against a decoder written out here, and every kernel against float64 and the others."""

import math

import pytest
import torch

from moert.quant import format as fmt
from moert.quant import matmul, nested, reference, trellis

KERNELS = matmul.available_kernels()
COMPILED = [k for k in KERNELS if k != "reference"]
SLICE_LISTS = [(2,), (3,), (2, 3, 4), (2, 4, 6), (2, 3, 4, 5, 6), (3, 4), (5, 6)]


@pytest.fixture(autouse=True)
def default_kernel():
    yield
    matmul.set_kernel(KERNELS[0])


def make_matrix(rows, cols, group_size, widths, seed=0):
    """Random codes, those of padded columns too: layout, codes, scales per width as stored, packed slices."""
    layout = fmt.MatrixLayout(rows, cols, group_size, widths, fmt.TRELLIS)
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2 ** widths[-1], (rows, layout.groups * group_size), generator=g).to(torch.uint8)
    scales = [(torch.rand(rows, 1, generator=g) + 0.05).half() for _ in widths]
    return layout, codes, scales, reference.pack(codes, [s.float() for s in scales], layout)


def hadamard(size):
    """Sylvester's matrix, float64, of length one."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / math.sqrt(size)


def level_of(layout, pieces, index, n, k):
    """Level of one weight at widths[index], found from the words of format.py and trellis.py alone."""
    total = above = 0
    columns = layout.groups * layout.group_size
    for i in range(index + 1):
        data = pieces[i].numpy().tobytes()
        part = 0  # where the plane begins in a group
        bits_left = layout.widths[i] - (layout.widths[i - 1] if i else 0)
        while bits_left:
            bits = 2 if bits_left >= 2 else 1
            window = 0
            for back in (2, 1, 0) if bits == 2 else (3, 2, 1, 0):
                place = (k % 4 * columns // 4 + k // 4 - back) % columns  # in the ring: columns 0, 4, 8, ..., 1, 5, ...
                at = place % (columns // 4) * 4 + place // (columns // 4)
                cell = n // 16 * layout.groups + at // layout.group_size
                column, span = at % layout.group_size, 32 // bits
                byte = cell * layout.group_bytes(i) + part + column // span * 64 + n % 16 * 4 + column % 4
                code = data[byte] >> bits * (column % span // 4) & (2**bits - 1)
                window = window >> bits | code << (4 if bits == 2 else 3)
            total += int(trellis.table(bits, above)[window])
            part += 2 * layout.group_size * bits
            above, bits_left = above + bits, bits_left - bits
    return total


@pytest.mark.parametrize("widths", SLICE_LISTS, ids=str)
@pytest.mark.parametrize("group_size", fmt.GROUP_SIZES)
def test_bytes_mean_what_the_format_says(widths, group_size):
    layout, _, scales, pieces = make_matrix(19, 2 * group_size - 3, group_size, widths)
    for index in range(len(widths)):
        assert pieces[index].numel() == layout.slice_bytes(index)
        got = reference.rotated(pieces[: index + 1], layout, index + 1)
        for n in (0, 7, 18):
            want = [level_of(layout, pieces, index, n, k) * float(scales[index][n]) for k in range(2 * group_size)]
            assert got[n].tolist() == want
        # The first slices of a larger store are the store of fewer widths, bit for bit.
        fewer = fmt.MatrixLayout(19, 2 * group_size - 3, group_size, widths[: index + 1], fmt.TRELLIS)
        codes = reference._padded_codes(pieces, layout, index + 1)
        again = reference.pack(codes, [s.float() for s in scales[: index + 1]], fewer)
        assert all(torch.equal(a, b) for a, b in zip(again, pieces, strict=False))


def weights_of(layout, pieces, index):
    """The matrix at widths[index] for rotated inputs, and for inputs as they are, in float64."""
    rotated = reference.rotated(pieces[: index + 1], layout, index + 1).double()
    groups = rotated.view(layout.rows, layout.groups, layout.group_size) @ hadamard(layout.group_size)
    return rotated, groups.view(layout.rows, -1)[:, : layout.cols]


def check_products(x, layout, pieces):
    """Check all kernels at all widths; those that fuse multiply and add agree to the bit."""
    for index in range(len(layout.widths)):
        w = matmul.PackedMatrix(layout, tuple(pieces[: index + 1]))
        rotated, plain = weights_of(layout, pieces, index)
        seen = matmul._round_inputs(x, layout).double()
        want, size = seen @ rotated.T, seen.abs() @ rotated.abs().T
        products, rows = {}, {}
        for kernel in KERNELS:
            matmul.set_kernel(kernel)
            products[kernel], rows[kernel] = matmul.linear(x, w), w.rows(0, layout.rows)
            assert ((products[kernel].double() - want).abs() <= 4e-6 * size + 1e-30).all(), (kernel, layout, index)
            # every input is off by at most half a step of the rotated inputs of its group
            steps = seen.abs().view(len(x), layout.groups, -1).amax(-1).repeat_interleave(layout.group_size, 1) / 254
            bound = steps @ rotated.abs().T + 4e-6 * size
            error = (products[kernel].double() - x.double() @ plain.T).abs()
            assert (error <= bound * (1 + 1e-4) + 1e-5 * x.abs().max() * plain.abs().sum(1) + 1e-30).all()
        assert all(torch.equal(r, rows["reference"]) for r in rows.values())
        torch.testing.assert_close(rows["reference"].double(), plain, rtol=1e-6, atol=1e-6 * float(plain.abs().max()))
        fused = [products[k] for k in COMPILED if k != "generic"]
        assert all(torch.equal(fused[0], p) for p in fused)


@pytest.mark.parametrize("group_size", fmt.GROUP_SIZES)
@pytest.mark.parametrize("widths", SLICE_LISTS, ids=str)
def test_every_width_and_group_size(group_size, widths):
    shapes = {(37, 3 * group_size - 5): (1, 2, 3, 5, 17, 70), (16, group_size): (1, 17), (5, 7): (2, 5)}
    for (rows, cols), counts in shapes.items():
        layout, _, _, pieces = make_matrix(rows, cols, group_size, widths)
        for tokens in counts:
            check_products(torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens)), layout, pieces)


@pytest.mark.parametrize("tokens", [1, 20])
def test_columns_beyond_one_panel(tokens):
    layout, _, _, pieces = make_matrix(33, 2500, 64, (2, 3, 4))
    check_products(torch.randn(tokens, 2500, generator=torch.Generator().manual_seed(1)), layout, pieces)


@pytest.mark.parametrize("tokens", [1, 19])
def test_levels_and_inputs_at_their_limits(tokens):
    layout, codes, scales, _ = make_matrix(40, 200, 64, (2, 4, 6))
    for window in (trellis.table(2, 0).argmax(), trellis.table(2, 0).argmin()):
        for k in range(codes.shape[1]):  # every third weight of a sequence has this window, in all planes
            codes[:, k] = (int(window) >> 2 * (k // 4 % 3) & 3) * 0b010101
        pieces = reference.pack(codes, [s.float() for s in scales], layout)
        assert 120 <= trellis.levels(codes, layout, 3).abs().max() <= 127
        # the largest rotated inputs at all places: what one impulse in each group becomes
        impulse = torch.zeros(tokens, 200)
        impulse[:, ::64] = -5
        for x in (impulse, torch.zeros(tokens, 200), torch.ones(tokens, 200) * 3, torch.randn(tokens, 200) * 1e20):
            check_products(x, layout, pieces)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [1, 9])
def test_inputs_that_are_not_finite_do_not_pass_for_numbers(kernel, bad, tokens):
    layout, _, _, pieces = make_matrix(16, 128, 64, (4,))
    x = torch.randn(tokens, 128)
    x[0, 70] = bad
    matmul.set_kernel(kernel)
    out = matmul.linear(x, matmul.PackedMatrix(layout, tuple(pieces)))
    assert not out[0].isfinite().any()
    assert out[1:].isfinite().all()


@pytest.mark.parametrize("kernel", COMPILED)
def test_one_token_or_many_and_any_number_of_threads_give_the_same_bytes(kernel):
    layout, _, _, pieces = make_matrix(300, 700, 64, (2, 3, 4))
    w = matmul.PackedMatrix(layout, tuple(pieces))
    x = torch.randn(70, 700, generator=torch.Generator().manual_seed(0))
    matmul.set_kernel(kernel)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            matmul.set_num_threads(threads)
            results.append(matmul.linear(x, w))
            results.append(torch.cat([matmul.linear(part, w) for part in x.split(1)]))
            results.append(torch.cat([matmul.linear(part, w) for part in x.split(7)]))
    finally:
        matmul.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results)


def test_a_product_with_both_codes_is_refused():
    layout, _, _, pieces = make_matrix(16, 64, 64, (4,))
    linear = fmt.MatrixLayout(16, 64, 64, (4,))
    other = matmul.PackedMatrix(linear, tuple(nested.quantise(torch.randn(16, 64), linear)))
    matmul.set_kernel(COMPILED[0])
    with pytest.raises(ValueError, match="differ in their inputs"):
        matmul.linear_many(torch.randn(1, 64), [matmul.PackedMatrix(layout, tuple(pieces)), other])


@pytest.mark.parametrize("kernel", KERNELS)
def test_experts_match_float64(kernel):
    """Compare experts, each with tokens of its own; int8 inputs cost about 1% of the output's size."""
    layout = fmt.ExpertLayout(96, 40, 32, (2, 3, 4), code=fmt.TRELLIS)
    matmul.set_kernel(kernel)
    experts = [[make_matrix(m.rows, m.cols, 32, m.widths, 3 * e + i)[3] for i, m in enumerate(layout.matrices)]
               for e in range(3)]  # fmt: skip
    x = torch.randn(30, 96, generator=torch.Generator().manual_seed(9)) / 100
    for count in (1, 2, 3):
        packed = [
            matmul.PackedExpert(
                *(matmul.PackedMatrix(m, tuple(p[:count])) for m, p in zip(layout.matrices, e, strict=True))
            )
            for e in experts
        ]
        for tokens_of in ([[0], [0], [0]], [[1, 5, 29], list(range(30)), [7]]):
            some = x if max(map(max, tokens_of)) else x[:1]
            out = torch.full((sum(map(len, tokens_of)), 96), float("nan"))
            matmul.experts_ffn(some, packed, [torch.tensor(t) for t in tokens_of], out)
            want = []
            for tokens, expert in zip(tokens_of, packed, strict=True):
                gate, up, down = (w.double() for w in expert.floats())
                g = some[tokens].double() @ gate.T
                want.append((g * torch.sigmoid(g) * (some[tokens].double() @ up.T)) @ down.T)
            assert (out - torch.cat(want)).norm() <= 0.03 * torch.cat(want).norm()
