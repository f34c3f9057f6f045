"""Sizes of models without their weights: public ones against transformers, a hub that is stood in for, and refusals."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from moert.checkpoints.safetensors import Checkpoint
from moert.errors import CheckpointError, MoertError, UnsupportedModelError, UsageError
from moert.hub.headers import known_model
from moert.hub.resolve import Conversion
from moert.planning.model_shape import ModelShape, read_shape

from .checkpoints import make_checkpoint

SETTINGS = Conversion()
KNOWN = {
    "Qwen/Qwen3-30B-A3B": "Qwen3-30B-A3B",
    "allenai/OLMoE-1B-7B-0924": "known:OLMoE-1B-7B-0924",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral-8x7b-v0.1",
    "openai/gpt-oss-120b": "openai/gpt-oss-120b",
    "deepseek-ai/DeepSeek-V2-Lite": "known:deepseek-v2-lite",
}


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOERT_CACHE", str(tmp_path / "cache"))


def packed(rows: int, cols: int, bits: int, trellis: bool = False) -> int:
    """Bytes of a matrix at so many bits: rows in tiles of 16, columns in groups of 64, with a scale of 16 bits for each
    group, or in the trellis code one for each row.
    """
    tiles, groups = math.ceil(rows / 16), math.ceil(cols / 64)
    scales = tiles * 16 * (1 if trellis else groups)
    return tiles * 16 * groups * 64 * bits // 8 + math.ceil(scales * 2 / 64) * 64


def is_router(name: str) -> bool:
    return name.endswith((".gate.weight", ".router.weight"))


def check(shape: ModelShape, model: torch.nn.Module) -> None:
    """All sizes against the parameters of transformers' model, in widths 2, 3, 4, 6 with dense weights at 8 bits.

    What is not packed keeps the type that it has in the model: transformers has the routers of some families in float32
    whatever the rest is in.
    """
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    layers, ends = [0] * shape.num_layers, {}
    for name, p in model.named_parameters():
        if ".experts." in name:
            continue
        nbytes = packed(*p.shape, 8) if p.dim() == 2 and not is_router(name) else p.nbytes
        if ".layers." in name:
            layers[int(name.split(".")[2])] += nbytes
        else:
            ends[name] = nbytes
    assert shape.dense_bytes == tuple(layers)
    assert shape.embedding_bytes == ends.pop("model.embed_tokens.weight")
    assert shape.head_bytes == sum(ends.values())
    D, F = shape.hidden_size, shape.expert_inner
    slices = [2 * packed(F, D, bits, trellis=True) + packed(D, F, bits, trellis=True) for bits in (2, 1, 1, 2)]
    for size, exact in zip(shape.slice_bytes, slices, strict=True):
        assert size % 4096 == 0
        assert exact <= size < exact + 4096 + 2 * 2 * (2 * F + D) * (shape.model_type == "gpt_oss")
    experts = len(shape.moe_layers) * shape.num_experts * sum(shape.slice_bytes)
    headers = shape.store_bytes - experts - shape.resident_bytes
    assert 0 <= headers < 1e-3 * shape.store_bytes + 8192 * (shape.num_layers + 1)


@pytest.mark.parametrize("name", KNOWN)
def test_known_models_have_the_sizes_of_those_in_transformers(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = read_shape(KNOWN[name], SETTINGS, offline=True)
    assert (shape.name, shape.origin) == (name, "known sizes")
    config = known_model(name).config
    values = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **values))
    check(shape, model.to(torch.bfloat16))  # as all of them are published, routers included
    assert shape.runnable == (config["model_type"] in ("qwen3_moe", "mixtral", "olmoe"))
    assert shape.runnable or f"{config['model_type']!r} is not supported" in shape.why_not


def test_what_is_published_of_known_models() -> None:
    """Parameters in billions, as their makers give them; bytes of a position in the KV cache worked out by hand."""
    published = {
        "Qwen3-30B-A3B": (30.5, 48 * 2 * 4 * 128 * 2),
        "gpt-oss-120b": (116.8, 36 * 2 * 8 * 64 * 2),
        "OLMoE-1B-7B-0924": (6.9, 16 * 2 * 16 * 128 * 2),
        "Mixtral-8x7B-v0.1": (46.7, 32 * 2 * 8 * 128 * 2),
        "DeepSeek-V2-Lite": (15.7, 27 * (512 + 64) * 2),  # keys and values compressed together, and the rotated part
    }
    for name, (billions, kv) in published.items():
        shape = read_shape(name, SETTINGS)
        assert round(shape.parameters / 1e9, 1) == billions
        assert shape.kv_bytes_per_position(16) == kv
        assert shape.workspace_bytes(4096) > shape.workspace_bytes(512)
    lite = read_shape("DeepSeek-V2-Lite", SETTINGS)
    assert lite.moe_layers == tuple(range(1, 27))
    assert lite.widest_inner == 10944


def foreign(tmp_path: Path, family: str, **values: Any) -> tuple[Path, torch.nn.Module]:
    """A tiny checkpoint of a family that moert does not have, and the model that transformers wrote it from."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "max_position_embeddings": 128}
    config = AutoConfig.for_model(family, **sizes, num_attention_heads=2, num_key_value_heads=2, **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / family)
    (tmp_path / family / "tokenizer.json").write_text("{}")
    return tmp_path / family, model


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48, "head_dim": 16}),
        (
            "deepseek_v2",
            {
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_shared_experts": 2,
                "moe_intermediate_size": 40,
                "intermediate_size": 72,
                "first_k_dense_replace": 1,
                "kv_lora_rank": 16,
                "q_lora_rank": 8,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 8,
                "v_head_dim": 8,
            },
        ),
    ],
)
def test_a_checkpoint_of_an_unknown_family(tmp_path: Path, family: str, values: dict[str, Any]) -> None:
    folder, model = foreign(tmp_path, family, **values)
    shape = read_shape(folder, SETTINGS)
    check(shape, model)
    assert (shape.origin, shape.num_experts, shape.top_k) == ("checkpoint folder", 4, 2)
    assert not shape.runnable
    assert shape.why_not.count(".") == 1


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub with one repository, whose files are those of a folder; `fail` is raised instead. No weights can be had."""
    state = SimpleNamespace(folder=None, fail=None, fail_headers=None, asked=[])

    def file(repo: str, name: str, **options: object) -> str:
        state.asked.append(name)
        if state.fail:
            raise state.fail
        return str(state.folder / name)

    def headers(repo: str, **options: object) -> SimpleNamespace:
        state.asked.append("headers")
        if state.fail_headers:
            raise state.fail_headers
        found = Checkpoint.open(state.folder).tensors.values()
        files: dict[str, SimpleNamespace] = {}
        for info in found:
            tensors = files.setdefault(info.file.name, SimpleNamespace(tensors={})).tensors
            offsets = (info.offset, info.offset + info.nbytes)
            tensors[info.name] = SimpleNamespace(dtype=info.dtype, shape=list(info.shape), data_offsets=offsets)
        weight_map = {name: file for file, metadata in files.items() for name in metadata.tensors}
        leftover = SimpleNamespace(dtype="BF16", shape=[1], data_offsets=(0, 2))
        next(iter(files.values())).tensors["leftover"] = leftover
        return SimpleNamespace(files_metadata=files, weight_map=weight_map)

    def snapshot(repo: str, **options: object) -> str:
        assert options["local_files_only"]
        if state.fail:
            raise state.fail
        return str(state.folder)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", file)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", headers)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return state


@pytest.mark.parametrize("over", [{}, {"tie_word_embeddings": True}])
def test_a_hub_id_has_the_sizes_of_the_checkpoint_there(
    tmp_path: Path, hub: SimpleNamespace, over: dict[str, Any]
) -> None:
    hub.folder = make_checkpoint(tmp_path / "tiny", "olmoe", shards=2, **over)
    said: list[str] = []
    shape = read_shape("owner/tiny", SETTINGS, on_status=said.append)
    assert hub.asked == ["config.json", "headers"]
    assert said == ["Reading the headers of owner/tiny on the Hugging Face hub (no weights are downloaded)."]
    assert (shape.name, shape.origin) == ("owner/tiny", "headers on the hub")

    def figures(shape: ModelShape) -> dict[str, Any]:
        return {key: value for key, value in vars(shape).items() if key not in ("name", "origin")}

    assert figures(shape) == figures(read_shape(hub.folder, SETTINGS))
    assert figures(shape) == figures(read_shape("owner/tiny", SETTINGS, offline=True))
    assert hub.asked == ["config.json", "headers"]


def test_a_converted_store_in_the_cache_is_used(tmp_path: Path, hub: SimpleNamespace) -> None:
    from moert.convert.convert import convert
    from moert.hub.resolve import cached_store

    folder = make_checkpoint(tmp_path / "tiny", "olmoe")
    convert(folder, cached_store("owner/tiny", SETTINGS))
    assert read_shape("owner/tiny", SETTINGS, offline=True).origin == "store"
    assert not hub.asked


RESPONSE = SimpleNamespace(headers={}, request=None)


class ConnectError(Exception):
    """An error as HTTP libraries have one."""


@pytest.mark.parametrize(
    ("where", "fail", "message"),
    [
        ("fail", errors.GatedRepoError("x", response=RESPONSE), "gated: accept its terms .* set HF_TOKEN"),
        ("fail", errors.RepositoryNotFoundError("x", response=RESPONSE), "no such model, or it is private"),
        ("fail", errors.LocalEntryNotFoundError("x"), r"the hub cannot be reached \(is there a network\?\)"),
        ("fail_headers", ConnectError("no route\nfar"), r"the hub cannot be reached \(no route\)"),
        ("fail_headers", errors.NotASafetensorsRepoError("x"), "no weights in safetensors files"),
        ("fail_headers", errors.SafetensorsParsingError("too long.\nx"), r"header .* is malformed \(too long\)"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    tmp_path: Path, hub: SimpleNamespace, where: str, fail: Exception, message: str
) -> None:
    hub.folder = make_checkpoint(tmp_path / "tiny", "olmoe")
    setattr(hub, where, fail)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_shape("owner/tiny", SETTINGS)
    assert str(caught.value).startswith("Cannot get owner/tiny from the Hugging Face hub: ")
    assert "\n" not in str(caught.value)


def test_offline_without_a_copy(hub: SimpleNamespace) -> None:
    hub.fail = errors.LocalEntryNotFoundError("x")
    with pytest.raises(CheckpointError, match="--offline forbids to download it"):
        read_shape("owner/tiny", SETTINGS, offline=True)


def edited(tmp_path: Path, **config: Any) -> Path:
    """The tiny OLMoE with another configuration, which makes it a model of a family that moert does not have."""
    folder = make_checkpoint(tmp_path / "tiny", "olmoe")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "other", **config}))
    return folder


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, CheckpointError, r"is quantised \(gptq\): name"),
        ({"num_experts": None}, UnsupportedModelError, "num_experts is None, not a whole number"),
        ({"num_experts": 3}, CheckpointError, "not understood: its experts are not 3 times three matrices of 48"),
        ({"hidden_size": 47}, CheckpointError, "not understood"),
        ({"num_experts_per_tok": 5}, CheckpointError, "not understood"),
        ({"vocab_size": "many"}, UnsupportedModelError, "vocab_size is 'many'"),
    ],
)
def test_configurations_that_are_not_understood(
    tmp_path: Path, config: dict[str, Any], kind: type[MoertError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        read_shape(edited(tmp_path, **config), SETTINGS)


def test_a_variant_of_a_family_that_is_there(tmp_path: Path) -> None:
    """A variant that the family refuses cannot run; its sizes are known all the same."""
    folder = make_checkpoint(tmp_path / "tiny", "olmoe")
    fine = read_shape(folder, SETTINGS)
    shutil.copytree(folder, tmp_path / "variant")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "variant" / "config.json").write_text(json.dumps({**config, "hidden_act": "swish2"}))
    shape = read_shape(tmp_path / "variant", SETTINGS)
    assert "hidden_act" in shape.why_not
    for name in ("dense_bytes", "slice_bytes", "store_bytes", "head_bytes", "embedding_bytes", "parameters"):
        assert getattr(shape, name) == getattr(fine, name)
    assert shape.needs(0, 100, 3) == fine.needs(0, 100, 3)


def test_a_model_without_experts(tmp_path: Path) -> None:
    folder, _ = foreign(tmp_path, "llama", intermediate_size=48)
    with pytest.raises(UnsupportedModelError, match=r"\(llama\) has no routed experts .* mixtures of experts\."):
        read_shape(folder, SETTINGS)


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ("known:nothing", CheckpointError, "no known model 'nothing'; there are Qwen3-30B-A3B, "),
        ("nowhere", CheckpointError, "not a hub id"),
    ],
)
def test_what_is_no_model(model: str, kind: type[MoertError], message: str) -> None:
    with pytest.raises(kind, match=message):
        read_shape(model, SETTINGS)


@pytest.mark.parametrize("settings", [Conversion(widths=(9,)), Conversion(group_size=7), Conversion(dense_bits=5)])
def test_settings_that_no_conversion_can_have(settings: Conversion) -> None:
    with pytest.raises(UsageError):
        read_shape("known:gpt-oss-120b", settings)


def test_a_folder_goes_before_a_known_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Callable[..., Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_checkpoint("olmoe"), tmp_path / "gpt-oss-120b")
    assert read_shape("gpt-oss-120b", Conversion(group_size=32)).origin == "checkpoint folder"
