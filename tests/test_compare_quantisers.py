"""examples/compare_quantisers.py: what the others are given, and the bits that are counted for them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("other_quantisers")


@pytest.fixture
def compare(others: ModuleType) -> ModuleType:
    return importlib.import_module("compare_quantisers")


def test_the_table_has_the_stores_and_the_others(
    compare: ModuleType,
    tiny_checkpoint: Callable[..., Path],
    store: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The router scores the experts, and the token visits the best ones.\n" * 3)
    folders = [make("mixtral", intermediate_size=128) for make in (tiny_checkpoint, store)]
    options = ["--text", text, "--window", 50, "--calibrate", "default", "--calibration-tokens", 2048, "--shuffle", 1]
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, [*folders, *options, "--others", tmp_path / "others.json"])])
    compare.main()
    table, said = capsys.readouterr()
    rows = {cells[1].strip(): cells[2].strip() for line in table.splitlines() if (cells := line.split("|"))}
    assert rows["transformers lossless"] == "16.000"
    assert rows["rounding 4 bits"] == "4.312"
    assert rows["mixtral-4, weights alone 4 bits"] == "5.500"  # fp16 scales of three widths per group of 32
    assert rows.get("llama.cpp Q4_0") == "4.500" or "gguf is not installed" in said
    assert rows.get("GPTQ 3 bits") == "3.297" or "GPTQ is left out" in said
    compare.main()  # now from what was kept
    assert capsys.readouterr().out == table


def test_a_matrix_gets_the_format_that_its_columns_allow(
    others: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    library: Any = object()
    both = dict(others.ggml_formats({"gate": 256, "up": 256, "down": 128}, library))
    assert both["Q4_K, down Q5_0"] == {"gate": "Q4_K", "up": "Q4_K", "down": "Q5_0"}
    assert both["Q2_K, down IQ4_NL"]["down"] == "IQ4_NL"
    assert len(both) == len(others.GGML)
    assert capsys.readouterr().err == ""
    assert list(dict(others.ggml_formats({"gate": 576, "down": 192}, library))) == [
        "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL",
    ]  # fmt: skip
    assert "Blocks that 192, 576 columns cannot be cut into: Q6_K (256), Q5_K (256)" in capsys.readouterr().err
    assert list(dict(others.ggml_formats({"gate": 256}, None))) == ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]
    said = capsys.readouterr().err
    assert said == "llama-cpp-python is not installed: Q6_K, Q5_K, IQ4_NL, Q4_K, Q3_K, Q2_K left out.\n"


def test_the_bits_of_ggml_formats_are_those_of_their_blocks(others: ModuleType) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    library, w = others.ggml_library(), torch.randn(16, 512, generator=torch.Generator().manual_seed(2))
    for label, kinds in others.ggml_formats(dict.fromkeys(others.MATRICES, 512), library):
        values, bits = others.ggml(kinds, library)(0, 0, "gate", w)
        error = float((values - w).square().mean())
        assert bits / w.numel() == {
            "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_1": 6, "Q5_0": 5.5, "Q5_K": 5.5, "Q4_1": 5, "Q4_0": 4.5, "IQ4_NL": 4.5,
            "Q4_K": 4.5, "Q3_K": 3.4375, "Q2_K": 2.625,
        }[label]  # fmt: skip
        assert error < 1.5 * 4 ** (1 - bits / w.numel() + 0.5)
        if library is not None and label != "Q8_0":  # what is said to matter comes out better
            moments = {(0, 0): (torch.diag(torch.where(torch.arange(512) % 8 == 0, 50.0, 1.0)), torch.eye(512))}
            weighed, _ = others.ggml(kinds, library, moments)(0, 0, "gate", w)
            assert (weighed - w)[:, ::8].square().sum() < (values - w)[:, ::8].square().sum()


def test_shuffled_columns_come_back_in_their_places(others: ModuleType) -> None:
    w = torch.randn(4, 128, generator=torch.Generator().manual_seed(3))
    order = torch.randperm(128, generator=torch.Generator().manual_seed(4))
    values, bits = others.shuffled(others.rounding(4), {128: order})(0, 0, "gate", w)
    expected, same = others.rounding(4)(0, 0, "gate", w[:, order])
    torch.testing.assert_close(values[:, order], expected)
    assert bits == same
    assert not torch.equal(values, others.rounding(4)(0, 0, "gate", w)[0])


def test_moments_are_those_of_the_tokens_that_an_expert_gets(
    compare: ModuleType, tiny_checkpoint: Callable[..., Path], reference_model: Callable[[Path], Any]
) -> None:
    model = reference_model(tiny_checkpoint("mixtral"))
    windows = [list(range(3, 60)), list(range(200, 260))]
    # Another way to the same: from the inputs of the layer, its router, and the formula of an expert.
    found: list[torch.Tensor] = []
    block = model.model.layers[1].mlp
    hook = block.register_forward_pre_hook(lambda _, args: found.append(args[0][0]))
    with torch.inference_mode():
        for ids in windows:
            model(torch.tensor([ids]))
        hook.remove()
        x = torch.cat(found)
        scores = x @ block.gate.weight.T
        x = x[(scores.topk(2).indices == 5).any(1)]
        gate, up = (x @ block.experts.gate_up_proj[5].T).chunk(2, 1)
        inner = torch.nn.functional.silu(gate) * up
    generator = torch.Generator().manual_seed(5)
    orders = {K: torch.randperm(K, generator=generator) for K in (64, 96)}
    for given in (None, orders):
        moments = compare.moments_of(model, windows, given)
        for moment, values in zip(moments[1, 5], (x, inner), strict=True):
            values = values[:, given[values.shape[1]]] if given else values
            torch.testing.assert_close(moment, values.T @ values / len(values))


def test_gptq_loses_less_at_the_outputs_than_rounding(others: ModuleType) -> None:
    pytest.importorskip("llmcompressor", reason="llm-compressor is not installed")
    generator = torch.Generator().manual_seed(6)
    w, mix = torch.randn(32, 128, generator=generator), torch.randn(128, 128, generator=generator) / 11
    x = torch.randn(2000, 128, generator=generator) @ (mix + torch.eye(128))
    moments = {(0, 0): (x.T @ x / len(x), torch.eye(1))}
    errors = []
    for method in (others.gptq(3, moments), others.rounding(3)):
        values, bits = method(0, 0, "gate", w)
        assert bits == w.numel() * (3 + 19 / 64)
        errors.append(float((x @ (values - w).T).square().sum()))
    assert errors[0] < 0.9 * errors[1]
