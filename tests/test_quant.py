"""The nested-bit format, its quantiser and its kernels, against float64 and against themselves bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moert.quant import format as fmt
from moert.quant import matmul, nested, reference

width_lists = st.lists(st.integers(2, 8), min_size=1, max_size=4, unique=True).map(lambda w: tuple(sorted(w)))
layouts = st.builds(
    fmt.MatrixLayout, st.integers(1, 70), st.integers(1, 300), st.sampled_from(fmt.GROUP_SIZES), width_lists
)


def random_codes(layout, seed):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2 ** layout.widths[-1], (layout.rows, layout.cols), generator=g).to(torch.uint8)
    scales = [torch.rand(layout.rows, layout.groups, generator=g) + 0.01 for _ in layout.widths]
    return codes, [s.half().float() for s in scales]


def bit_by_bit(layout, pieces, index, n, k):
    """Code of one weight at widths[index], found from the words of format.py's docstring alone."""
    tile, row, group, column = n // 16, n % 16, k // layout.group_size, k % layout.group_size
    code = 0
    for i in range(index + 1):
        data = pieces[i].numpy().tobytes()
        at = (tile * layout.groups + group) * layout.group_bytes(i)
        for bits in layout.planes(i):
            span = 32 // bits
            word = at + (column // span) * 64 + row * 4
            byte = data[word + column % span % 4]
            code = code << bits | byte >> bits * (column % span // 4) & (2**bits - 1)
            at += 2 * layout.group_size * bits
    return code


@settings(max_examples=60, deadline=None)
@given(layouts, st.integers(0, 2**31), st.data())
def test_packing_round_trip_and_prefixes(layout, seed, data):
    codes, scales = random_codes(layout, seed)
    pieces = reference.pack(codes, scales, layout)
    top = layout.widths[-1]
    for index, width in enumerate(layout.widths):
        assert pieces[index].numel() == layout.slice_bytes(index)
        assert layout.codes_bytes(index) % 64 == layout.slice_bytes(index) % 64 == 0
        # The code at a width is the prefix of the code at every larger width, read from the first slices alone.
        assert torch.equal(reference.unpack_codes(pieces[: index + 1], layout, index + 1), codes >> (top - width))
        assert torch.equal(reference.unpack_scales(pieces[index], layout, index), scales[index])
    n, k = data.draw(st.integers(0, layout.rows - 1)), data.draw(st.integers(0, layout.cols - 1))
    index = data.draw(st.integers(0, len(layout.widths) - 1))
    assert bit_by_bit(layout, pieces, index, n, k) == int(codes[n, k]) >> (top - layout.widths[index])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 5, 30])
def test_raw_weights_match_float64(dtype, tokens):
    w = torch.randn(37, 75).to(dtype)
    x = torch.randn(tokens, 75)
    expected = x.double() @ w.double().T
    torch.testing.assert_close(matmul.linear(x, w).double(), expected, rtol=1e-5, atol=1e-5)


def test_half_scales_convert_exactly_subnormals_included():
    layout = fmt.MatrixLayout(16, 32, 32, (2,))
    bits = np.array([0, 1, 2, 0x3FF, 0x400, 0x401, 0x3C00, 0x7BFF] * 2, dtype=np.uint16)
    piece = reference.pack(torch.full((16, 32), 3, dtype=torch.uint8), [torch.zeros(16, 1)], layout)[0]
    piece[layout.codes_bytes(0) :][:32] = torch.from_numpy(bits.view(np.uint8).copy())
    expected = torch.from_numpy(bits.view(np.float16).astype(np.float32)) * 1.5
    w = matmul.PackedMatrix(layout, (piece,))
    assert torch.equal(w.rows(0, 16)[:, 0], expected)


def brute_force_error(group, width):
    """Least squared error of a symmetric uniform quantiser with 2**width levels, over a fine grid of scales."""
    best = np.inf
    for scale in np.linspace(0.05, 1, 400) * np.abs(group).max() * 2 / (2**width - 1):
        level = np.clip(np.floor(group / scale) + 2 ** (width - 1), 0, 2**width - 1) - (2**width - 1) / 2
        best = min(best, float(((group - scale * level) ** 2).sum()))
    return best


def test_quantiser_is_close_to_brute_force_per_width_and_nested_costs_little():
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    for widths, bounds in (((2,), [1.1]), ((4,), [1.15]), ((2, 3, 4), [1.25, 1.15, 1.15])):
        layout = fmt.MatrixLayout(64, 64, 64, widths)
        pieces = nested.quantise(w, layout)
        for index, bound in enumerate(bounds):
            error = (nested.dequantise(pieces, layout, index + 1) - w).square().sum().item()
            least = sum(brute_force_error(row.numpy(), widths[index]) for row in w)
            assert error <= bound * least


@settings(max_examples=40, deadline=None)
@given(layouts, st.integers(0, 2**31), st.sampled_from([1e-9, 1e-4, 1.0, 1e3]))
def test_the_compiled_search_is_as_good_as_the_reference(layout, seed, size):
    w = torch.randn(layout.rows, layout.cols, generator=torch.Generator().manual_seed(seed)) * size
    errors = []
    try:
        for kernel in matmul.available_kernels():
            matmul.set_kernel(kernel)
            pieces = nested.quantise(w, layout)
            matmul.set_kernel("reference")
            full = [nested.dequantise(pieces, layout, i + 1) for i in range(len(pieces))]
            errors.append([float((f - w).double().square().sum()) for f in full])
    finally:
        matmul.set_kernel(matmul.available_kernels()[0])
    assert np.allclose(errors, errors[-1], rtol=2e-2, atol=1e-12 * size**2)


def test_more_bits_are_never_worse():
    layout = fmt.MatrixLayout(48, 192, 64, (2, 3, 4, 5, 8))
    w = torch.randn(48, 192) * torch.rand(48, 1) * 3
    pieces = nested.quantise(w, layout)
    errors = [(nested.dequantise(pieces, layout, i + 1) - w).square().mean().item() for i in range(5)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * errors[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_weights_that_cannot_be_stored_are_refused(bad):
    layout = fmt.MatrixLayout(16, 64, 64, (4,))
    w = torch.zeros(16, 64)
    w[3, 5] = bad
    with pytest.raises(ValueError, match="not finite or above"):
        nested.quantise(w, layout)


def test_zero_weights_stay_zero():
    layout = fmt.MatrixLayout(16, 64, 64, (2, 4))
    pieces = nested.quantise(torch.zeros(16, 64), layout)
    assert nested.dequantise(pieces, layout, 2).abs().max() == 0


@pytest.mark.parametrize("widths", [(), (1,), (9,), (3, 2), (2, 2), (4, 16)])
def test_bad_width_lists_are_refused(widths):
    with pytest.raises(ValueError):
        fmt.check_widths(widths)


@pytest.mark.parametrize("raw_dtype", ["bfloat16", "float16", "float32"])
def test_raw_experts_keep_their_bytes(raw_dtype):
    layout = fmt.ExpertLayout(48, 20, 64, (16,), raw_dtype)
    dtype = getattr(torch, raw_dtype)
    gate, up, down = (torch.randn(*shape).to(dtype) for shape in layout.shapes)
    (piece,) = nested.pack_expert(gate, up, down, layout)
    assert piece.numel() == layout.slice_sizes[0] == layout.bytes_at(16)
    expert = matmul.PackedExpert.from_slices([piece], layout)
    for view, w in ((expert.gate, gate), (expert.up, up), (expert.down, down)):
        assert torch.equal(view, w)


def test_a_kernel_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"available: .*reference"):
        matmul.set_kernel("neon9")
