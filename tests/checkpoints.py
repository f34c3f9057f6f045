"""Small checkpoints written without transformers, and how refusals are checked, for the tests of the store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor

from moert.errors import MoertError
from moert.models import registry
from moert.models.stored_model import StoredModel
from moert.quant import reference

BASE = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "head_dim": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "intermediate_size": 56},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "intermediate_size": 56,
        "shared_expert_intermediate_size": 24,
        "head_dim": 12,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 40},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 40, "head_dim": 12},
}


def make_config(family: str = "qwen3_moe", **overrides: Any) -> dict[str, Any]:
    return {"model_type": family, **BASE, **FAMILIES[family], **overrides}


def make_weights(config: dict[str, Any], dtype: torch.dtype = torch.bfloat16, fused: bool = False) -> dict[str, Tensor]:
    """Random weights under canonical names."""
    arch = registry.architecture(config)
    generator = torch.Generator().manual_seed(0)
    shapes = {name: spec.shape for name, spec in arch.dense_tensors().items()}
    E, D, F = arch.num_experts, arch.hidden_size, arch.expert_inner
    for layer in arch.moe_layers:
        prefix = f"model.layers.{layer}.mlp.experts."
        if fused:
            shapes[prefix + "gate_up_proj"], shapes[prefix + "down_proj"] = (E, 2 * F, D), (E, D, F)
            continue
        for e in range(E):
            for matrix, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
                shapes[f"{prefix}{e}.{matrix}_proj.weight"] = shape
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def legacy_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that Mixtral's own checkpoints use."""
    table = ((".mlp.", ".block_sparse_moe."), ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
    result = {}
    for name, tensor in weights.items():
        for new, old in table:
            name = name.replace(new, old)
        result[name] = tensor
    return result


def save_checkpoint(path: Path, config: dict[str, Any], weights: dict[str, Tensor], shards: int = 1) -> Path:
    """Write a checkpoint folder; `shards` > 1 adds an index."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"w": 0}, unk_token="w")).save(str(path / "tokenizer.json"))
    (path / "generation_config.json").write_text('{"temperature": 0.7}')
    (path / "LICENSE").write_text("Do as you like.\n")
    if shards == 1:
        save_file(weights, path / "model.safetensors")
        return path
    names = list(weights)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: weights[name] for name in names[i::shards]}, path / file)
        weight_map.update(dict.fromkeys(names[i::shards], file))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def make_checkpoint(
    path: Path, family: str = "qwen3_moe", *, fused: bool = False, shards: int = 1, **over: Any
) -> Path:
    """A random checkpoint of a family; `over` overrides config.json."""
    config = make_config(family, **over)
    return save_checkpoint(path, config, make_weights(config, fused=fused), shards)


def folder_bytes(path: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def stored_matrices(store: StoredModel, layer: int, expert: int, count: int) -> Iterator[Tensor]:
    """Gate, up and down of a stored expert with its first `count` slices, in float64, from the bytes of its file."""
    path, at = store.location(layer, expert)
    data, layout = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8), store.layout
    slices = [data[at + sum(layout.slice_sizes[:i]) :][: layout.slice_sizes[i]] for i in range(count)]
    for m, matrix in enumerate(layout.matrices):
        parts = [piece[layout.offsets(i)[m] : layout.offsets(i)[m + 1]] for i, piece in enumerate(slices)]
        yield reference.dequantise(parts, matrix, count).double()


def refusal(action: Callable[[], object], kind: type[MoertError], *parts: str) -> None:
    """The action raises one sentence that has all the parts."""
    with pytest.raises(kind) as caught:
        action()
    message = str(caught.value)
    assert type(caught.value) is kind
    assert caught.value.exit_code == 1
    assert message.endswith(".")
    assert "\n" not in message
    for part in parts:
        assert part in message, message
