"""The search of codes of the trellis code: against exhaustive search, the torch version, and plain rounding."""

import itertools
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moert.quant import format as fmt
from moert.quant import nested, reference, trellis, trellis_search
from moert.quant.matmul import available_kernels, set_kernel

KERNELS = available_kernels()


@pytest.fixture(autouse=True)
def default_kernel():
    yield
    set_kernel(KERNELS[0])


def problem(rows, cols, seed=0):
    """Gaussian weights and inputs that are correlated and differ in size."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=g) / cols**0.5
    x = torch.randn(4 * cols, cols, generator=g) @ mix + torch.randn(4 * cols, cols, generator=g) * 0.3
    return torch.randn(rows, cols, generator=g) * 0.02, x


def matrices(chosen, layout):
    """The matrix at each width, for inputs as they are."""
    slices = reference.pack(chosen.codes, chosen.scales, layout)
    return [reference.dequantise(slices[: i + 1], layout, i + 1) for i in range(layout.num_slices)]


def output_error(w, rounded, x):
    return float((x.double() @ (w - rounded).double().T).square().sum() / (x.double() @ w.double().T).square().sum())


@pytest.mark.parametrize("widths", [(2,), (3,), (2, 3, 4), (2, 4, 6)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_finds_codes_that_are_as_good(kernel, widths):
    w, x = problem(21, 70)
    layout = fmt.MatrixLayout(21, 70, 32, widths, fmt.TRELLIS)
    set_kernel("reference")
    expected = trellis_search.choose(w, x.T @ x, layout)
    set_kernel(kernel)
    found = trellis_search.choose(w, x.T @ x, layout)
    # Sums in another order: a survivor that is as good as another may win.
    for a, b in zip(matrices(found, layout), matrices(expected, layout), strict=True):
        assert output_error(w, a, x) == pytest.approx(output_error(w, b, x), rel=0.1)


@pytest.mark.parametrize("widths", [(2, 3, 4), (2, 4, 6)], ids=str)
def test_outputs_are_kept_better_than_by_rounding_and_each_width_better_than_the_one_before(widths):
    w, x = problem(64, 256)
    layout = fmt.MatrixLayout(64, 256, 64, widths, fmt.TRELLIS)
    errors = [output_error(w, m, x) for m in matrices(trellis_search.choose(w, x.T @ x, layout), layout)]
    plain = replace(layout, code=fmt.LINEAR)
    slices = nested.quantise(w, plain)
    for i, error in enumerate(errors[: widths.index(4) + 1]):  # beyond, scales of groups are worth more
        assert error < 0.95 * output_error(w, reference.dequantise(slices[: i + 1], plain, i + 1), x)
    assert all(b < 0.6 * a for a, b in itertools.pairwise(errors))


def test_white_inputs_leave_what_the_code_is_known_to_leave():
    """8.4% of the energy of Gaussian weights at 2 bits, where the best four levels leave 11.75% (Max, 1960)."""
    w, _ = problem(256, 512)
    layout = fmt.MatrixLayout(256, 512, 64, (2,), fmt.TRELLIS)
    (rounded,) = matrices(trellis_search.choose(w, torch.eye(512), layout), layout)
    assert float((w - rounded).square().sum() / w.square().sum()) < 0.088


def test_a_short_block_is_chosen_as_by_trying_all():
    g = torch.Generator().manual_seed(3)
    targets, coupling = torch.randn(5, 5, generator=g), torch.randn(5, 5, generator=g).triu(1) * 0.3 + torch.eye(5)
    table, weights = trellis.table(2, 0).float(), torch.rand(5, generator=g) + 0.5
    scale, start = torch.full((5,), 1 / 30), torch.tensor([0, 5, 9, 15, 2], dtype=torch.uint8)
    codes, ends = torch.zeros(5, 5, dtype=torch.uint8), torch.full((5,), 255, dtype=torch.uint8)
    block = trellis_search._Block(2, 5, table, coupling, weights, scale)
    left, _ = block.choose(targets, None, None, 0, (start.clone(), ends), codes)
    for row in range(5):

        def cost(path, row=row):
            target, state, total = targets[row].clone(), int(start[row]), 0.0
            for j, code in enumerate(path):
                rest = float(target[j] - table[code << 4 | state] * scale[row])
                total += float(weights[j]) * rest * rest
                target[j + 1 :] -= rest * coupling[j, j + 1 :]
                state = (code << 4 | state) >> 2
            return total

        best = min(cost(path) for path in itertools.product(range(4), repeat=5))
        # A survivor is the best way to its state so far, not the best of all ways on from there.
        assert cost(codes[row].tolist()) <= 1.5 * best
        assert cost(codes[row].tolist()) == pytest.approx(float((weights * left[row].square()).sum()), rel=1e-4)
        assert int(ends[row]) == int(codes[row, 4]) << 2 | int(codes[row, 3])


def test_columns_without_inputs_and_weights_of_zero_do_no_harm():
    w, x = problem(16, 64)
    x[:, 5:20] = 0
    w[3] = 0
    layout = fmt.MatrixLayout(16, 64, 64, (2, 3), fmt.TRELLIS)
    for matrix in matrices(trellis_search.choose(w, x.T @ x, layout), layout):
        assert bool(matrix.isfinite().all())
        assert float(matrix[3].abs().max()) < 1e-3
        assert output_error(w, matrix, x) < 0.2


def test_what_cannot_be_stored_is_refused():
    layout = fmt.ExpertLayout(32, 32, 32, (2, 3), code=fmt.TRELLIS)
    w, x = problem(32, 32)
    weights = torch.ones(len(x))
    with pytest.raises(ValueError, match="weights hold values that are not finite"):
        trellis_search.pack_expert((w, w * float("nan"), w), x, x, weights, layout)
    with pytest.raises(ValueError, match="inputs that are not finite"):
        trellis_search.pack_expert((w, w, w), x * float("inf"), x, weights, layout)
    with pytest.raises(ValueError, match="not those of the layout"):
        trellis_search.choose(w, torch.eye(31), layout.matrices[0])
    with pytest.raises(ValueError, match="more than the 6 bits of the trellis code"):
        fmt.MatrixLayout(16, 64, 64, (4, 8), fmt.TRELLIS)
    with pytest.raises(ValueError, match="is not one of linear, trellis"):
        fmt.MatrixLayout(16, 64, 64, (4,), "huffman")


def test_a_real_model_keeps_its_words(tmp_path):
    """A layer of SmolLM2 at 2 bits, on inputs that its text leads to."""
    checkpoint = os.environ.get("MOERT_REAL_CHECKPOINT")
    if not checkpoint:
        pytest.skip("MOERT_REAL_CHECKPOINT does not name a checkpoint made by examples/real_chat.py")
    from moert.convert.calibration import Calibrated
    from moert.convert.calibration_text import DEFAULT, read, tokens
    from moert.convert.parallel import workers
    from moert.convert.source_model import SourceModel

    folder = Path(checkpoint)
    source = SourceModel.open(folder)
    calibrated = Calibrated(source, tokens(DEFAULT, read(DEFAULT), folder, 2048))
    with workers(1 << 20) as pool:
        ((_, x, _),) = calibrated.inputs(3, [0], pool)
    gate, _, _ = source.expert(3, 0)
    layout = fmt.MatrixLayout(*gate.shape, 64, (2,), fmt.TRELLIS)
    (rounded,) = matrices(trellis_search.choose(gate, x.T @ x, layout), layout)
    assert output_error(gate, rounded, x) < 0.05
