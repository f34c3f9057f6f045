"""Codes chosen by their effect on the outputs: against float64 products, plain rounding and frozen scales."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from moert.quant import calibrate, nested
from moert.quant.dispatch import available_kernels, set_kernel
from moert.quant.format import ExpertLayout, MatrixLayout
from moert.quant.reference import dequantise, pack, unpack_codes

WIDTHS = (2, 3, 4)


@pytest.fixture(params=["compiled", "reference"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both versions of the inner loops."""
    kernels = available_kernels()
    set_kernel(kernels[0] if request.param == "compiled" else "reference")
    yield request.param
    set_kernel(kernels[0])


def problem(rows: int = 40, cols: int = 100, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """Weights, and inputs that are correlated and of very different sizes."""
    generator = torch.Generator().manual_seed(7)
    mix = torch.randn(cols, cols, generator=generator) * torch.linspace(0.1, 2, cols)
    x = torch.randn(tokens, cols // 4, generator=generator) @ mix[: cols // 4]
    x += 0.3 * torch.randn(tokens, cols, generator=generator)
    return torch.randn(rows, cols, generator=generator), x


def output_error(w: Tensor, used: Tensor, x: Tensor) -> float:
    """Share of the outputs' energy that is lost, in float64."""
    exact = x.double() @ w.double().T
    return float((x.double() @ used.double().T - exact).square().sum() / exact.square().sum())


def matrices(result: calibrate.Nested, layout: MatrixLayout) -> list[Tensor]:
    slices = pack(result.codes[:, : layout.cols], list(result.scales), layout)
    return [dequantise(slices[: i + 1], layout, i + 1) for i in range(len(layout.widths))]


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_outputs_are_nearer_than_with_rounding_at_every_width(kernel: str, group_size: int) -> None:
    w, x = problem()
    layout = MatrixLayout(*w.shape, group_size, WIDTHS)
    chosen = matrices(calibrate.choose(w, x.T @ x, layout), layout)
    rounded = nested.quantise(w, layout)
    for i in range(len(WIDTHS)):
        plain = output_error(w, dequantise(rounded[: i + 1], layout, i + 1), x)
        assert output_error(w, chosen[i], x) < 0.6 * plain


@pytest.mark.parametrize("widths", [(2, 3, 4), (2, 4, 8), (3, 5), (4,)], ids=str)
def test_smaller_widths_are_prefixes(kernel: str, widths: tuple[int, ...]) -> None:
    w, x = problem(rows=18, cols=70)
    layout = MatrixLayout(*w.shape, 32, widths)
    result = calibrate.choose(w, x.T @ x, layout, sweeps=1)
    slices = pack(result.codes[:, :70], list(result.scales), layout)
    for i, width in enumerate(widths):
        expected = result.codes[:, :70] >> (widths[-1] - width)
        assert torch.equal(unpack_codes(slices[: i + 1], layout, i + 1), expected)
    assert torch.equal(result.scales, result.scales.half().float())
    errors = [output_error(w, used, x) for used in matrices(result, layout)]
    assert errors == sorted(errors, reverse=True)


def test_refitted_scales_are_no_worse_than_frozen_ones(kernel: str) -> None:
    w, x = problem()
    layout = MatrixLayout(*w.shape, 64, WIDTHS)
    result = calibrate.choose(w, x.T @ x, layout)
    for i, (width, refitted) in enumerate(zip(WIDTHS, matrices(result, layout), strict=True)):
        frozen = result.scales.clone()
        frozen[i] = result.scales[-1] * 2 ** (WIDTHS[-1] - width)
        other = matrices(calibrate.Nested(result.codes, frozen), layout)[i]
        assert output_error(w, refitted, x) <= output_error(w, other, x)


def test_no_sweep_raises_the_sum_of_errors(kernel: str) -> None:
    w, x = problem()
    layout = MatrixLayout(*w.shape, 32, WIDTHS)
    hessian = (x.T @ x).double()
    hessian += calibrate.DAMPING * hessian.diagonal().mean() * torch.eye(100)
    sums = []
    for sweeps in range(4):
        found = matrices(calibrate.choose(w, x.T @ x, layout, sweeps=sweeps), layout)
        rest = [w.double() - used.double() for used in found]
        weights = calibrate.width_weights(WIDTHS)
        sums.append(sum(f * float(((d @ hessian) * d).sum()) for f, d in zip(weights, rest, strict=True)))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(sums))
    assert sums[-1] < 0.9 * sums[0]


def test_both_versions_of_the_inner_loops_find_codes_as_good() -> None:
    w, x = problem()
    layout = MatrixLayout(*w.shape, 64, WIDTHS)
    found = []
    for name in (available_kernels()[0], "reference"):
        set_kernel(name)
        found.append([output_error(w, used, x) for used in matrices(calibrate.choose(w, x.T @ x, layout), layout)])
    set_kernel(available_kernels()[0])
    assert found[0] == pytest.approx(found[1], rel=0.03)


def test_a_width_alone_is_quantised_like_any_other() -> None:
    """Zeros, columns that no token uses, and one row are no special cases."""
    w, x = problem(rows=1, cols=33)
    w[:, 5], x[:, 6:] = 0, 0
    layout = MatrixLayout(1, 33, 32, (2,))
    assert output_error(w, matrices(calibrate.choose(w, x.T @ x, layout), layout)[0], x) < 0.2
    nothing = calibrate.choose(torch.zeros(1, 33), torch.zeros(33, 33), layout)
    assert float(matrices(nothing, layout)[0].abs().max()) < 1e-6


def test_balanced_channels_survive_a_spread_that_ruins_rounding() -> None:
    """Factors between the inputs and the columns change nothing but their balance, which is found again."""
    w, x = problem(rows=64, cols=64)
    layout = MatrixLayout(64, 64, 64, WIDTHS)
    spread = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(1)))
    hard_w, hard_x = w * spread, x / spread

    def errors(w: Tensor, x: Tensor, balanced: bool = True) -> list[float]:
        if balanced:
            f = calibrate.balance(x.square().mean(0).sqrt(), w.square().mean(0).sqrt())
            w, x = w * f, x / f
        return [output_error(w, used, x) for used in matrices(calibrate.choose(w, x.T @ x, layout), layout)]

    found = errors(hard_w, hard_x)
    assert found == pytest.approx(errors(w, x), rel=0.15)
    assert all(f < 0.7 * bad for f, bad in zip(found, errors(hard_w, hard_x, balanced=False), strict=True))


def test_an_expert_keeps_its_function_and_refuses_what_cannot_be_stored() -> None:
    generator = torch.Generator().manual_seed(3)
    gate, up, down = (torch.randn(s, generator=generator) for s in ((24, 48), (24, 48), (48, 24)))
    up *= torch.exp(torch.randn(24, 1, generator=generator))  # the factors of the inner channels have something to do
    x = torch.randn(500, 48, generator=generator)
    inner = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    layout = ExpertLayout(48, 24, 32, (4, 8))
    slices = calibrate.pack_expert((gate, up, down), x, inner, torch.ones(500), layout)
    assert tuple(len(piece) for piece in slices) == layout.slice_sizes
    used = []
    for m, matrix in enumerate(layout.matrices):
        pieces = [piece[layout.offsets(i)[m] :][: matrix.slice_bytes(i)] for i, piece in enumerate(slices)]
        used.append(dequantise(pieces, matrix, 2).double())
    xd = x.double()
    found = (torch.nn.functional.silu(xd @ used[0].T) * (xd @ used[1].T)) @ used[2].T
    exact = inner.double() @ down.double().T
    assert float((found - exact).norm() / exact.norm()) < 0.02
    with pytest.raises(ValueError, match="not finite or above 65504"):
        calibrate.pack_expert((gate * torch.nan, up, down), x, inner, torch.ones(500), layout)
    with pytest.raises(ValueError, match="inputs that are not finite"):
        calibrate.pack_expert((gate, up, down), x / 0, inner, torch.ones(500), layout)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="not those of the layout"):
        calibrate.choose(torch.zeros(2, 32), torch.zeros(31, 31), MatrixLayout(2, 32, 32, (2,)))
