"""Mixtral (model_type `mixtral`): every layer has experts, the router's top-k weights are renormalised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moert.models.architecture import Architecture
from moert.models.config_fields import ConfigFields

_LEGACY_MATRICES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def canonical_name(name: str) -> str | None:
    """Canonical name of the checkpoint's tensor `name`, None if the tensor is not needed.

    Checkpoints have `block_sparse_moe.experts.N.w1`, newer ones written by transformers `mlp.experts.gate_up_proj`.
    """
    if name.endswith("rotary_emb.inv_freq"):
        return None
    parts = name.replace(".block_sparse_moe.", ".mlp.").split(".")
    if len(parts) > 3 and parts[-4] == "experts":
        parts[-2] = _LEGACY_MATRICES.get(parts[-2], parts[-2])
    return ".".join(parts)


def parse_config(config: Mapping[str, Any]) -> Architecture:
    """Read a config.json. Raises UnsupportedModelError for a variant that is not supported."""
    f = ConfigFields(config, "mixtral")
    f.check_unquantised()
    hidden_size = f.integer("hidden_size", 4096)
    num_layers = f.integer("num_hidden_layers", 32)
    num_heads = f.integer("num_attention_heads", 32)
    max_positions = f.integer("max_position_embeddings", 4096 * 32)
    windows = (f.optional_integer("sliding_window", None),) * num_layers
    f.check_layer_types(windows)
    inner = f.integer("intermediate_size", 14336)
    return Architecture(
        model_type="mixtral",
        vocab_size=f.integer("vocab_size", 32000),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=f.optional_integer("num_key_value_heads", 8) or num_heads,
        head_dim=f.head_dim(num_heads, hidden_size),
        rms_norm_eps=f.number("rms_norm_eps", 1e-5),
        rope=f.rope(1_000_000.0, max_positions),
        max_position_embeddings=max_positions,
        tie_word_embeddings=f.boolean("tie_word_embeddings", False),
        qkv_bias=False,
        o_bias=False,
        qk_norm="none",
        clip_qkv=None,
        sliding_windows=windows,
        is_moe_layer=(True,) * num_layers,
        num_experts=f.num_experts("num_local_experts", "num_experts", 8),
        top_k=f.integer("num_experts_per_tok", 2),
        norm_topk_prob=True,
        expert_inner=inner,
        dense_inner=inner,
        shared_inner=0,
        hidden_act=f.activation(),
    )
