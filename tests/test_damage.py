"""Damaged stores and unsafe or unsuitable checkpoints: each is refused with one sentence; sources stay as they are."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moert.convert.convert import convert
from moert.errors import CheckpointError, MoertError, StoreError, UnsupportedModelError
from moert.models.stored_model import StoredModel

from .checkpoints import folder_bytes, make_checkpoint, make_config, make_weights, refusal, save_checkpoint

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"
GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    return convert(make_checkpoint(folder / "src"), folder / "out").path


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    """A store to damage."""
    return Path(shutil.copytree(original, tmp_path / "store"))


def flip(file: Path, offset: int) -> None:
    with open(file, "r+b") as f:
        f.seek(offset)
        byte = f.read(1)[0]
        f.seek(offset)
        f.write(bytes([byte ^ 0x10]))


def edit_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(file.read_bytes())
    change(value)
    file.write_text(json.dumps(value))


# Stores


@pytest.mark.parametrize("name", ["experts-00001.safetensors", "dense.safetensors", "config.json", "tokenizer.json"])
def test_file_cut_short_or_missing_is_found_when_opening(store: Path, name: str) -> None:
    os.truncate(store / name, (store / name).stat().st_size - 1)
    refusal(lambda: StoredModel.open(store), StoreError, name, "cut short", "convert the model again")
    (store / name).unlink()
    refusal(lambda: StoredModel.open(store), StoreError, name, "is missing")


def test_file_too_long_is_found_when_opening(store: Path) -> None:
    with open(store / "experts-00000.safetensors", "ab") as file:
        file.write(b"x")
    refusal(lambda: StoredModel.open(store), StoreError, "experts-00000.safetensors", "too long")


def test_no_store_at_all(tmp_path: Path) -> None:
    refusal(lambda: StoredModel.open(tmp_path / "nowhere"), StoreError, "There is no store")
    refusal(lambda: StoredModel.open(tmp_path), StoreError, "is not a moert store", "moert.json")


def test_flipped_byte_in_a_slice_is_named_by_verify(store: Path) -> None:
    opened = StoredModel.open(store)
    file, offset = opened.location(1, 2)
    flip(file, offset + opened.layout.slice_sizes[0] + 5)
    refusal(StoredModel.open(store).verify, StoreError, "experts-00001.safetensors", "layer 1, expert 2, slice 1")


def test_flipped_byte_in_dense_is_named_when_loading(store: Path) -> None:
    opened = StoredModel.open(store)
    flip(store / "dense.safetensors", opened.meta.weights["dense.safetensors"].size - 1)
    last = opened.meta.dense[-1].name
    refusal(StoredModel.open(store).load_dense, StoreError, "dense.safetensors", last)
    refusal(StoredModel.open(store).verify, StoreError, "dense.safetensors", last)


def test_flipped_byte_in_headers_configuration_and_tokenizer(store: Path) -> None:
    flip(store / "experts-00000.safetensors", 20)
    refusal(StoredModel.open(store).verify, StoreError, "experts-00000.safetensors", "damaged header")
    flip(store / "experts-00000.safetensors", 1)
    refusal(lambda: StoredModel.open(store), StoreError, "experts-00000.safetensors", "damaged header")
    flip(store / "experts-00000.safetensors", 1)
    flip(store / "tokenizer.json", 3)
    refusal(StoredModel.open(store).verify, StoreError, "tokenizer.json")
    flip(store / "dense.safetensors", 20)
    refusal(lambda: StoredModel.open(store), StoreError, "dense.safetensors", "damaged header")
    flip(store / "config.json", 3)
    refusal(lambda: StoredModel.open(store), StoreError, "config.json")


def test_disk_that_cannot_be_read(store: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = StoredModel.open(store)

    def failing(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", failing)
    refusal(opened.load_dense, StoreError, "Cannot read", "dense.safetensors", "Input/output error")
    refusal(opened.verify, StoreError, "Cannot read", "Input/output error")
    refusal(lambda: convert(source, tmp_path / "out"), CheckpointError, "Cannot read", SHARD, "Input/output error")


def test_unknown_format_version_says_which_are_read(store: Path) -> None:
    edit_json(store / "moert.json", lambda meta: meta.update(format_version=3))
    refusal(lambda: StoredModel.open(store), StoreError, "format version 3", "reads versions 1 to 2")
    (store / "moert.json").write_text("{")
    refusal(lambda: StoredModel.open(store), StoreError, "moert.json", "not valid JSON")


def test_meta_of_another_model_is_refused(store: Path) -> None:
    saved = (store / "moert.json").read_text()
    for change in (
        lambda meta: meta["dense"].popitem(),
        lambda meta: meta["experts"].update(layers=[0]),
        lambda meta: meta["source"].update(model_type="olmoe"),
    ):
        edit_json(store / "moert.json", change)
        refusal(lambda: StoredModel.open(store), StoreError, "does not describe the model")
        (store / "moert.json").write_text(saved)
    edit_json(store / "moert.json", lambda meta: meta["weights"]["dense.safetensors"].update(data_start=8192))
    refusal(lambda: StoredModel.open(store), StoreError, "gives sizes that are not those of dense.safetensors")
    (store / "moert.json").write_text(saved)
    edit_json(store / "moert.json", lambda meta: meta.update(widths=[2, 4, 8]))
    refusal(lambda: StoredModel.open(store), StoreError, "gives sizes that are not those of experts-00000.safetensors")


# Checkpoints


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "src", shards=2)


@pytest.fixture
def refused(source: Path, tmp_path: Path) -> Callable[..., None]:
    """Converting is refused, leaves nothing behind and does not touch the source."""

    def check(*parts: str, kind: type[MoertError] = CheckpointError, **settings: Any) -> None:
        before = folder_bytes(source)
        refusal(lambda: convert(source, tmp_path / "out", **settings), kind, *parts)
        assert folder_bytes(source) == before
        assert not list(tmp_path.glob("out*"))

    return check


def only(source: Path, *keep: str) -> None:
    for file in source.iterdir():
        if file.name not in keep:
            file.unlink()


def test_no_folder_and_no_weights(source: Path, tmp_path: Path, refused: Callable[..., None]) -> None:
    refusal(lambda: convert(tmp_path / "nowhere", tmp_path / "out"), CheckpointError, "There is no checkpoint folder")
    (source / INDEX).unlink()
    refused("neither model.safetensors nor model.safetensors.index.json")
    only(source, "config.json")
    refused("has no weights")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_the_reason(source: Path, refused: Callable[..., None], name: str) -> None:
    only(source, "config.json", "tokenizer.json")
    (source / name).write_bytes(b"\x80\x04")
    refused(name, "unpickling can run code", "convert them to safetensors")


def test_index_of_pickled_weights_is_refused(source: Path, refused: Callable[..., None]) -> None:
    edit_json(source / INDEX, lambda index: index["weight_map"].update({GATE: "pytorch_model.bin"}))
    refused("pytorch_model.bin", "unpickling can run code")


@pytest.mark.parametrize("name", ["../src/" + SHARD, "/etc/passwd", "..", "", "a\\b", "sub/x.safetensors", "x\0y"])
def test_index_that_points_outside_its_folder(source: Path, refused: Callable[..., None], name: str) -> None:
    edit_json(source / INDEX, lambda index: index["weight_map"].update({GATE: name}))
    refused(INDEX, "points outside its folder")


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 1}])
def test_malformed_index(source: Path, refused: Callable[..., None], weight_map: object) -> None:
    edit_json(source / INDEX, lambda index: index.update(weight_map=weight_map))
    refused(INDEX, "no valid weight_map")


def test_missing_and_truncated_shards(source: Path, refused: Callable[..., None]) -> None:
    shard = source / SHARD
    size = shard.stat().st_size
    os.truncate(shard, size - 10)
    refused(SHARD, "cut short")
    os.truncate(shard, 100)
    refused(SHARD, "cut short inside its header")
    os.truncate(shard, 3)
    refused(SHARD, "too short")
    shard.unlink()
    refused(SHARD, "is missing")


def test_tensor_that_the_index_promises_is_not_there(source: Path, refused: Callable[..., None]) -> None:
    edit_json(source / INDEX, lambda index: index["weight_map"].update({"model.extra.weight": SHARD}))
    refused("model.extra.weight", SHARD)


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry("U8", [8], 0, 8), "b": entry("U8", [8], 4, 12)}, "b overlaps another tensor"),
        ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [8], 8, 16)}, "b does not follow"),
        ({"a": entry("U8", [1 << 40], 0, 1 << 40)}, "cut short"),
        ({"a": entry("F32", [4], 0, 8)}, "does not follow from its shape"),
        ({"a": entry("U8", [-1], 0, 8)}, "impossible numbers"),
        ({"a": entry("U8", [8], 8, 0)}, "impossible numbers"),
        ({"a": {"dtype": "U8"}}, "is incomplete"),
        ({"a": entry("U8", [4], 0, 4)}, "bytes follow its last tensor"),
        ([1], "is not an object"),
    ],
)
def test_malformed_safetensors_headers(
    source: Path, refused: Callable[..., None], header: object, message: str
) -> None:
    text = json.dumps(header).encode()
    (source / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    refused(SHARD, message)


def test_header_that_is_no_json_or_far_too_large(source: Path, refused: Callable[..., None]) -> None:
    for text in (b"{", b'{"a":1,"a":2}', b"[" * 100_000, b"\xff"):
        (source / SHARD).write_bytes(len(text).to_bytes(8, "little") + text)
        refused(SHARD, "malformed safetensors header")
    (source / SHARD).write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    refused(SHARD, "is not a safetensors file")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_missing_configuration_or_tokenizer(source: Path, refused: Callable[..., None], name: str) -> None:
    (source / name).unlink()
    refused(f"has no {name}")


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "not hold a JSON object")])
def test_malformed_configuration(source: Path, refused: Callable[..., None], text: str, message: str) -> None:
    (source / "config.json").write_text(text)
    refused("config.json", message)


def test_unknown_model_type_and_unsupported_variant(source: Path, refused: Callable[..., None]) -> None:
    edit_json(source / "config.json", lambda config: config.update(hidden_act="xielu"))
    refused("hidden_act", "xielu", kind=UnsupportedModelError)
    edit_json(source / "config.json", lambda config: config.update(model_type="llama"))
    refused("llama", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", kind=UnsupportedModelError)


@pytest.fixture
def reweighted(source: Path) -> Callable[[Callable[[dict[str, torch.Tensor]], None]], None]:
    """Replace the weights of the source by changed ones in a single file."""

    def apply(change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        weights = make_weights(make_config())
        change(weights)
        save_file(weights, source / "model.safetensors")

    return apply


Reweighted = Callable[[Callable[[dict[str, torch.Tensor]], Any]], None]


def test_missing_misshapen_and_unknown_tensors(refused: Callable[..., None], reweighted: Reweighted) -> None:
    reweighted(lambda w: w.pop(GATE))
    refused(GATE, "is missing")
    reweighted(lambda w: w.update({GATE: w[GATE].T.contiguous()}))
    refused(GATE, "shape [48, 40] where [40, 48] is expected")
    reweighted(lambda w: w.update({"model.layers.0.self_attn.sinks": torch.zeros(4)}))
    refused("model.layers.0.self_attn.sinks", "a variant that moert does not know")
    reweighted(lambda w: w.update({GATE: w[GATE].to(torch.float8_e4m3fn)}))
    refused(GATE, "F8_E4M3", "BF16, F16, F32")


def test_tensors_that_no_model_needs_are_ignored(source: Path, tmp_path: Path, reweighted: Reweighted) -> None:
    reweighted(lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8, dtype=torch.int64)}))
    convert(source, tmp_path / "out").verify()


def test_tied_head_that_differs(tmp_path: Path) -> None:
    config = make_config(tie_word_embeddings=True)
    weights = make_weights(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 2
    source = save_checkpoint(tmp_path / "src", config, weights)
    refusal(lambda: convert(source, tmp_path / "out"), CheckpointError, "lm_head.weight", "tie_word_embeddings")


def test_two_spellings_of_one_tensor(tmp_path: Path) -> None:
    config = make_config("mixtral")
    weights = make_weights(config)
    weights["model.layers.0.block_sparse_moe.gate.weight"] = weights["model.layers.0.mlp.gate.weight"].clone()
    source = save_checkpoint(tmp_path / "src", config, weights)
    refusal(lambda: convert(source, tmp_path / "out"), CheckpointError, "means the same tensor")


def test_mixed_dtypes_cannot_be_kept_as_they_are(
    source: Path, tmp_path: Path, refused: Callable[..., None], reweighted: Reweighted
) -> None:
    reweighted(lambda w: w.update({GATE: w[GATE].float()}))
    refused("several dtypes", widths=(16,))
    convert(source, tmp_path / "out").verify()


@pytest.mark.parametrize(("name", "place"), [(GATE, "expert 3 of layer 1"), ("lm_head.weight", "lm_head.weight")])
def test_weights_that_are_not_finite(
    source: Path, tmp_path: Path, reweighted: Reweighted, name: str, place: str
) -> None:
    reweighted(lambda w: w[name][1, 2].fill_(float("nan")))
    refusal(lambda: convert(source, tmp_path / "out"), CheckpointError, place, "not finite")


def test_shards_written_by_the_library_are_what_is_read(source: Path) -> None:
    merged = {k: v for file in source.glob("*.safetensors") for k, v in load_file(file).items()}
    assert all(torch.equal(merged[name], tensor) for name, tensor in make_weights(make_config()).items())
