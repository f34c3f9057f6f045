"""The sizes of models against the stores that a conversion writes and the engine that opens them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from moert.convert.calibration import CalibrationText
from moert.convert.convert import convert
from moert.engine.needs import needs_of
from moert.hub.resolve import Conversion
from moert.models.kv_cache import KVCache
from moert.models.stored_model import StoredModel
from moert.planning.model_shape import read_shape
from moert.quant.matmul import PackedMatrix

from .checkpoints import FAMILIES, make_checkpoint


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOERT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("family", "widths", "group_size", "dense_bits", "calibrated", "over"),
    [
        ("qwen3_moe", (2, 3, 4), 64, 8, False, {"mlp_only_layers": [1]}),
        ("qwen3_moe", (2, 3, 4), 64, 8, True, {"mlp_only_layers": [1]}),
        ("qwen2_moe", (2, 3, 4), 32, 4, False, {}),
        ("qwen2_moe", (2, 6), 32, 4, True, {}),
        ("mixtral", (3, 8), 128, 6, False, {}),
        ("mixtral", (3, 8), 128, 6, True, {}),
        ("olmoe", (16,), 64, 16, False, {"tie_word_embeddings": True}),
    ],
)
def test_a_checkpoint_has_the_sizes_of_the_store_that_is_made_of_it(
    tmp_path: Path,
    family: str,
    widths: Sequence[int],
    group_size: int,
    dense_bits: int,
    calibrated: bool,
    over: dict[str, object],
) -> None:
    folder = make_checkpoint(tmp_path / "tiny", family, **over)
    settings = Conversion(tuple(widths), group_size, dense_bits, fast=not calibrated)
    text = CalibrationText("numbers", tuple(range(3, 40)) * 3) if calibrated else None
    sizes = {"widths": widths, "group_size": group_size, "dense_bits": dense_bits}
    store = convert(folder, tmp_path / "store", calibration=text, **sizes)
    assert store.layout.code == ("trellis" if calibrated and widths[-1] <= 6 else "linear")
    expected = read_shape(folder, settings)
    found = read_shape(store.path, settings)
    assert (found.origin, expected.origin) == ("store", "checkpoint folder")
    for shape in (found, expected):
        assert shape.runnable
        assert shape.calibrated == calibrated
        assert shape.slice_bytes == store.layout.slice_sizes
        assert shape.resident_bytes == store.dense_bytes
        files = [path.stat().st_size for path in store.path.glob("*.safetensors")]
        assert shape.store_bytes == sum(files)
        for slices in range(1, len(widths) + 1):
            for kv_bits in (None, 8, 16):
                assert shape.needs(5, 100, slices, kv_bits) == needs_of(store, kv_bits, 100, slices, 5)
        for bits, dtype in ((8, torch.int8), (16, torch.float16), (32, torch.float32)):
            assert shape.kv_bytes_per_position(bits) == KVCache.bytes_per_position(store.architecture, dtype)
        dense = store.load_dense()
        for layer, size in enumerate(shape.dense_bytes):
            own = [tensor for name, tensor in dense.items() if name.startswith(f"model.layers.{layer}.")]
            parts = [part for x in own for part in (x.slices if isinstance(x, PackedMatrix) else [x])]
            assert size == sum(part.nbytes for part in parts)
    apart = ("name", "origin", "router", "losses")
    assert {k: v for k, v in vars(found).items() if k not in apart} == {
        k: v for k, v in vars(expected).items() if k not in apart
    }


def test_a_store_that_was_cut_to_a_size(calibrated: Path, tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    limit = sum(path.stat().st_size for path in calibrated.iterdir()) - 100_000
    text = CalibrationText("numbers", tuple(range(3, 203)))
    store = convert(
        tiny_checkpoint("qwen3_moe"),
        tmp_path / "cut",
        group_size=32,
        calibration=text,
        widths=(2, 3, 4),
        max_size=limit,
    )
    shape = read_shape(store.path, Conversion())
    assert shape.slice_counts == tuple(store.experts_with(i) for i in range(3))
    assert shape.slice_counts[2] < shape.slice_counts[0]
    assert shape.calibrated
    for slices in (1, 2, 3):
        assert shape.needs(1, 64, slices) == needs_of(store, None, 64, slices, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_that_transformers_counts(
    family: str, tiny_checkpoint: Callable[..., Path], reference_model: Callable[[Path], torch.nn.Module]
) -> None:
    folder = tiny_checkpoint(family)
    shape = read_shape(folder, Conversion(group_size=32))
    assert shape.parameters == sum(p.numel() for p in reference_model(folder).parameters())
    idle = [p for name, p in reference_model(folder).named_parameters() if ".experts." in name]
    share = (shape.num_experts - shape.top_k) / shape.num_experts
    assert shape.active_parameters == shape.parameters - sum(p.numel() for p in idle) * share


def test_the_shipped_model() -> None:
    shape = read_shape(None, Conversion())
    store = StoredModel.open(Path(__file__).parents[1] / "moert" / "demo_model")
    assert shape.needs(0, 4096, 3) == needs_of(store, None, 4096, 3, 0)
