"""Converting small checkpoints: what arrives in the store, resuming, and what is left of the source."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moert.convert import parallel
from moert.convert import source_model as source_module
from moert.convert.convert import ConvertProgress, RoundToNearest, convert
from moert.errors import StoreError, UsageError
from moert.models.stored_model import StoredModel
from moert.quant import nested
from moert.quant.format import ExpertLayout, MatrixLayout
from moert.quant.matmul import PackedMatrix

from .checkpoints import (
    FAMILIES,
    folder_bytes,
    legacy_names,
    make_checkpoint,
    make_config,
    make_weights,
    save_checkpoint,
)
from .child import ENVIRONMENT, PYTHON

ROOT = Path(__file__).parents[1]


def expert_bytes(store: StoredModel, layer: int, e: int) -> list[bytes]:
    file, offset = store.location(layer, e)
    data = file.read_bytes()
    pieces = []
    for size in store.layout.slice_sizes:
        pieces.append(data[offset : offset + size])
        offset += size
    return pieces


def expert_weights(weights: dict[str, torch.Tensor], layer: int, e: int) -> list[torch.Tensor]:
    prefix = f"model.layers.{layer}.mlp.experts."
    if prefix + "gate_up_proj" in weights:
        gate, up = weights[prefix + "gate_up_proj"][e].chunk(2)
        return [gate, up, weights[prefix + "down_proj"][e]]
    return [weights[f"{prefix}{e}.{m}_proj.weight"] for m in ("gate", "up", "down")]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_store_holds_the_weights_of_every_family(tmp_path: Path, family: str, fused: bool) -> None:
    config = make_config(family, tie_word_embeddings=fused)
    weights = make_weights(config, fused=fused)
    named = legacy_names(weights) if family == "mixtral" and not fused else weights
    source = save_checkpoint(tmp_path / "src", config, named, shards=1 + fused)
    store = convert(source, tmp_path / "out", widths=[16], dense_bits=16)
    dense = store.load_dense()
    assert set(dense) == {name for name in weights if ".experts." not in name}
    for name, tensor in dense.items():
        assert isinstance(tensor, torch.Tensor)
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, weights[name]), name
    assert store.dense_bytes == sum(t.nbytes for t in dense.values() if isinstance(t, torch.Tensor))
    assert store.layout.raw_dtype == "bfloat16"
    for layer in store.moe_layers:
        for e in range(store.num_experts):
            (data,) = expert_bytes(store, layer, e)
            offsets = store.layout.offsets(0)
            for start, w in zip(offsets, expert_weights(weights, layer, e), strict=False):
                assert data[start : start + w.nbytes] == w.contiguous().view(torch.uint8).numpy().tobytes()
    store.verify()


# Root mean square error of rounding a Gaussian, relative to it, and a margin.
@pytest.mark.parametrize(("bits", "error"), [(4, 0.11), (6, 0.03), (8, 0.008)])
def test_dense_weights_at_fewer_bits(tmp_path: Path, bits: int, error: float) -> None:
    config = make_config("qwen3_moe", tie_word_embeddings=False)
    weights = make_weights(config)
    source = save_checkpoint(tmp_path / "src", config, weights)
    dense = convert(source, tmp_path / "out", dense_bits=bits, group_size=32).load_dense()
    for name, tensor in dense.items():
        if not isinstance(tensor, PackedMatrix):
            assert torch.equal(tensor, weights[name]), name
            continue
        head = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert tensor.layout.widths == (max(bits, 6) if head else bits,)
        want = weights[name].double()
        got = tensor.rows(0, len(want)).double()
        assert (got - want).norm() <= error * want.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_both_layouts_that_transformers_writes_give_the_same_store(
    tmp_path: Path, family: str, tiny_checkpoint: Callable[..., Path], reference_model: Callable[[Path], Any]
) -> None:
    settings: dict[str, Any] = {"widths": (16,), "dense_bits": 16, "source_name": family}
    checkpoint = tiny_checkpoint(family, max_shard_size="50KB")
    store = convert(checkpoint, tmp_path / "per-expert", **settings)
    convert(tiny_checkpoint(family, fused=True), tmp_path / "fused", **settings)
    assert folder_bytes(tmp_path / "fused") | {"config.json": b"", "moert.json": b""} == (
        folder_bytes(tmp_path / "per-expert") | {"config.json": b"", "moert.json": b""}
    )
    state = reference_model(checkpoint).state_dict()
    for name, tensor in store.load_dense().items():
        assert isinstance(tensor, torch.Tensor)
        assert torch.equal(tensor.float(), state[name]), name
    sizes = [n * k for n, k in store.layout.shapes]
    for layer in store.moe_layers:
        for e in range(store.num_experts):
            data = torch.frombuffer(bytearray(expert_bytes(store, layer, e)[0]), dtype=torch.bfloat16).float()
            starts = [offset // 2 for offset in store.layout.offsets(0)]
            found = [data[start : start + size] for start, size in zip(starts, sizes, strict=False)]
            for part, expected in zip(found, expert_weights(state, layer, e), strict=True):
                assert torch.equal(part, expected.reshape(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_are_kept_and_recorded(tmp_path: Path, dtype: torch.dtype) -> None:
    config = make_config()
    weights = make_weights(config, dtype)
    store = convert(save_checkpoint(tmp_path / "src", config, weights), tmp_path / "out", widths=(16,), dense_bits=16)
    assert store.layout.raw_dtype == str(dtype).removeprefix("torch.")
    head = store.load_dense()["lm_head.weight"]
    assert isinstance(head, torch.Tensor)
    assert torch.equal(head, weights["lm_head.weight"])


def test_nested_store_holds_what_the_quantiser_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "CHUNK_ELEMENTS", 48 * 16)  # several parts per dense matrix
    config = make_config(mlp_only_layers=[0])
    weights = make_weights(config)
    source = save_checkpoint(tmp_path / "src", config, weights, shards=3)
    store = convert(source, tmp_path / "out", widths=(2, 3, 5), group_size=32)
    assert store.moe_layers == (1,)
    layout = ExpertLayout(48, 40, 32, (2, 3, 5), "bfloat16")
    assert store.layout == layout
    for e in range(4):
        expected = nested.pack_expert(*expert_weights(weights, 1, e), layout)
        assert expert_bytes(store, 1, e) == [piece.numpy().tobytes() for piece in expected]
    dense = store.load_dense()
    for name, tensor in dense.items():
        if isinstance(tensor, PackedMatrix):
            whole = nested.quantise(weights[name].float(), MatrixLayout(*tensor.shape, 32, (8,)))
            assert torch.equal(tensor.slices[0], whole[0]), name
        else:
            assert torch.equal(tensor, weights[name]), name
    specs = store.architecture.dense_tensors()
    assert {name for name, t in dense.items() if isinstance(t, PackedMatrix)} == {n for n in specs if specs[n].quantise}
    assert store.meta.source_name == "src"
    assert store.meta.quantiser == "round-to-nearest"
    assert (tmp_path / "out" / "LICENSE").exists()
    assert (tmp_path / "out" / "generation_config.json").exists()


def test_progress_reaches_the_total_and_never_goes_back(tmp_path: Path) -> None:
    seen: list[ConvertProgress] = []
    convert(make_checkpoint(tmp_path / "src"), tmp_path / "out", progress=seen.append)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert [p.share for p in seen] == sorted(p.share for p in seen)
    files = (tmp_path / "out").glob("*.safetensors")
    assert seen[-1].done == seen[-1].total == sum(f.stat().st_size for f in files)
    assert {p.stage for p in seen} == {"dense weights", "experts of layer 1 of 2", "experts of layer 2 of 2"}
    assert not (tmp_path / "out.partial").exists()


def test_a_redundant_tied_head_is_accepted(tmp_path: Path) -> None:
    config = make_config(tie_word_embeddings=True)
    weights = make_weights(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    store = convert(save_checkpoint(tmp_path / "src", config, weights), tmp_path / "out")
    assert "lm_head.weight" not in store.load_dense()


def test_a_hub_cache_of_symbolic_links_works(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "plain", shards=2)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    source.rename(blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    store = convert(snapshot, tmp_path / "out", source_name="org/model")
    assert store.meta.source_name == "org/model"
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


def test_source_is_untouched_and_results_repeat(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "src", shards=2)
    before = folder_bytes(source)
    times = {p: p.stat().st_mtime_ns for p in [source, *source.iterdir()]}
    convert(source, tmp_path / "a")
    convert(source, tmp_path / "b")
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    assert folder_bytes(source) == before
    assert {p: p.stat().st_mtime_ns for p in [source, *source.iterdir()]} == times


def test_existing_output_is_never_overwritten(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "src")
    (tmp_path / "out").mkdir()
    with pytest.raises(StoreError, match="exists already"):
        convert(source, tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="exists already"):
        convert(source, tmp_path / "link")
    with pytest.raises(StoreError, match="inside the checkpoint"):
        convert(source, source / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": (4, 2)}, "do not ascend"),
        ({"widths": (1, 2)}, "not all from 2 to 8"),
        ({"group_size": 48}, "Group size 48"),
        ({"dense_bits": 5}, "4, 6, 8 or 16 bits, not 5"),
    ],
)
def test_impossible_settings_are_usage_errors(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    source = make_checkpoint(tmp_path / "src")
    with pytest.raises(UsageError, match=message):
        convert(source, tmp_path / "out", **settings)
    assert not list(tmp_path.glob("out*"))


def interrupt_after_first_layer(source: Path, out: Path, **settings: Any) -> None:
    def stop(progress: ConvertProgress) -> None:
        if "layer 2" in progress.stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, progress=stop, **settings)


def test_interrupted_conversion_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    source, out = make_checkpoint(tmp_path / "src"), tmp_path / "out"
    convert(source, tmp_path / "reference")
    interrupt_after_first_layer(source, out)
    assert not out.exists()
    with pytest.raises(StoreError, match=r"out\.partial is left .* --resume or delete it"):
        convert(source, out)
    seen: list[ConvertProgress] = []
    convert(source, out, resume=True, progress=seen.append)
    assert {p.stage for p in seen} == {"experts of layer 2 of 2", "dense weights"}
    assert 0 < seen[0].resumed < seen[0].done
    assert (seen[-1].share, seen[-1].seconds_left) == (1.0, 0.0)
    assert folder_bytes(out) == folder_bytes(tmp_path / "reference")
    assert not (tmp_path / "out.partial").exists()


def test_resuming_refuses_other_settings_and_a_changed_source(tmp_path: Path) -> None:
    source, out = make_checkpoint(tmp_path / "src"), tmp_path / "out"
    interrupt_after_first_layer(source, out)
    with pytest.raises(StoreError, match=r"other settings \(widths, group_size\)"):
        convert(source, out, resume=True, widths=(2, 4), group_size=32)
    os.utime(source / "model.safetensors", (1, 1))
    with pytest.raises(StoreError, match="checkpoint has changed"):
        convert(source, out, resume=True)
    (tmp_path / "out.partial" / "progress.json").write_text("{")
    with pytest.raises(StoreError, match=r"progress\.json is damaged"):
        convert(source, out, resume=True)


def test_lost_files_of_an_unfinished_conversion_are_written_again(tmp_path: Path) -> None:
    source, out = make_checkpoint(tmp_path / "src"), tmp_path / "out"
    convert(source, tmp_path / "reference")
    interrupt_after_first_layer(source, out)
    (tmp_path / "out.partial" / "store" / "experts-00000.safetensors").unlink()
    convert(source, out, resume=True)
    assert folder_bytes(out) == folder_bytes(tmp_path / "reference")


def test_two_conversions_to_one_place_do_not_mix(tmp_path: Path) -> None:
    source, out = make_checkpoint(tmp_path / "src"), tmp_path / "out"

    def second(progress: ConvertProgress) -> None:
        with pytest.raises(StoreError, match="Another conversion"):
            convert(source, out, resume=True)

    convert(source, out, progress=second).verify()


def test_foreign_files_in_the_partial_folder_survive(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "letter.txt").write_text("mine")
    convert(make_checkpoint(tmp_path / "src"), tmp_path / "out", resume=True)
    assert [p.name for p in partial.iterdir()] == ["letter.txt"]


def test_the_quantiser_is_a_choice_and_is_recorded(tmp_path: Path) -> None:
    class Halved(RoundToNearest):
        name = "halved"

        def __call__(self, layer: int, expert: int, *rest: Any) -> Any:
            gate, up, down, layout = rest
            return super().__call__(layer, expert, gate / 2, up, down, layout)

    source = make_checkpoint(tmp_path / "src")
    store = convert(source, tmp_path / "out", quantiser=Halved(source_module.SourceModel.open(source)))
    assert store.meta.quantiser == "halved"
    assert expert_bytes(store, 0, 0) != expert_bytes(convert(source, tmp_path / "plain"), 0, 0)


CHILD = """
import sys, time
from pathlib import Path
from moert.convert.convert import convert

def hang(progress):
    if "layer 2" in progress.stage:
        print("first layer is finished", flush=True)
        time.sleep(600)

convert(Path(sys.argv[1]), Path(sys.argv[2]), progress=hang)
"""


def test_kill_nine_and_resume_give_the_same_bytes(tmp_path: Path) -> None:
    source, out = make_checkpoint(tmp_path / "src"), tmp_path / "out"
    before = folder_bytes(source)
    convert(source, tmp_path / "reference")
    child = subprocess.Popen(
        [*PYTHON, "-c", CHILD, str(source), str(out)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "first layer is finished\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert not out.exists()
    finished = tmp_path / "out.partial" / "store" / "experts-00000.safetensors"
    written = finished.stat().st_mtime_ns
    time.sleep(0.01)
    convert(source, out, resume=True)
    assert (out / finished.name).stat().st_mtime_ns == written  # not written again
    assert folder_bytes(out) == folder_bytes(tmp_path / "reference")
    assert folder_bytes(source) == before


MEMORY_CHILD = """
import sys
from pathlib import Path
from moert.runtime.telemetry import peak_rss_bytes
from moert.convert.convert import convert

peaks = []
for source, target in (sys.argv[1:3], sys.argv[3:5]):
    convert(Path(source), Path(target), widths=(16,), dense_bits=16)
    peaks.append(peak_rss_bytes())
print(peaks[1] - peaks[0])
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 16}  # 24 MiB a layer
    small = make_checkpoint(tmp_path / "small", fused=True, num_hidden_layers=2, **sizes)
    large = make_checkpoint(tmp_path / "large", fused=True, num_hidden_layers=8, **sizes)
    arguments = [small, tmp_path / "a", large, tmp_path / "b"]
    result = subprocess.run(
        [*PYTHON, "-c", MEMORY_CHILD, *map(str, arguments)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(result.stdout) < 24 << 20, "144 MiB more, and not even a layer of it stays in memory"


def test_workers_keep_order_raise_and_give_torch_its_threads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "num_workers", lambda item_bytes: 3)
    before = torch.get_num_threads()
    ahead: list[int] = []

    def square(n: int) -> int:
        time.sleep(0.002 * (n % 3))
        assert torch.get_num_threads() == 1
        return n * n

    with parallel.workers(1) as pool:
        for n, result in enumerate(pool.map(square, (ahead.append(n) or n for n in range(20)))):  # type: ignore[func-returns-value]
            assert result == n * n
            assert len(ahead) <= n + 4
        with pytest.raises(ZeroDivisionError):
            list(pool.map(lambda n: 1 // n, [2, 1, 0, 1]))
    assert torch.get_num_threads() == before


def test_large_experts_get_fewer_workers() -> None:
    assert parallel.num_workers(parallel.MEMORY_BYTES * 2) == 1
    assert 1 <= parallel.num_workers(0) <= parallel.MAX_WORKERS
