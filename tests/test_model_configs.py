"""How configurations and tensor names of the families are read: defaults, spellings, and refusals by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moert.errors import UnsupportedModelError
from moert.models import architecture as architecture_module
from moert.models.registry import FAMILIES, architecture, family
from moert.models.rope import inverse_frequencies
from moert.quant import matmul

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_transformers(name: str) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(name)
    arch = architecture({"model_type": name})
    assert arch == architecture({"model_type": name, **config.to_dict()})
    assert arch.vocab_size == config.vocab_size
    assert arch.hidden_size == config.hidden_size
    assert arch.num_layers == config.num_hidden_layers
    assert arch.num_heads == config.num_attention_heads
    assert arch.num_kv_heads == config.num_key_value_heads
    assert arch.head_dim == config.hidden_size // config.num_attention_heads
    assert arch.rms_norm_eps == config.rms_norm_eps
    assert arch.rope.theta == config.rope_parameters["rope_theta"]
    assert arch.max_position_embeddings == config.max_position_embeddings
    assert arch.num_experts == getattr(config, "num_experts", None) or config.num_local_experts
    assert arch.top_k == config.num_experts_per_tok
    assert arch.norm_topk_prob == getattr(config, "norm_topk_prob", True)
    assert arch.expert_inner == getattr(config, "moe_intermediate_size", config.intermediate_size)
    assert arch.shared_inner == getattr(config, "shared_expert_intermediate_size", 0)
    assert arch.sliding_windows == (None,) * arch.num_layers
    assert arch.moe_layers == tuple(range(arch.num_layers))


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("model.layers.3.block_sparse_moe.gate.weight", "model.layers.3.mlp.gate.weight"),
        ("model.layers.3.block_sparse_moe.experts.5.w1.weight", "model.layers.3.mlp.experts.5.gate_proj.weight"),
        ("model.layers.3.block_sparse_moe.experts.5.w2.weight", "model.layers.3.mlp.experts.5.down_proj.weight"),
        ("model.layers.3.block_sparse_moe.experts.5.w3.weight", "model.layers.3.mlp.experts.5.up_proj.weight"),
        ("model.layers.3.mlp.experts.gate_up_proj", "model.layers.3.mlp.experts.gate_up_proj"),
        ("model.layers.3.self_attn.rotary_emb.inv_freq", None),
        ("something.w1.else", "something.w1.else"),
    ],
)
def test_mixtral_names(name: str, canonical: str | None) -> None:
    assert family("mixtral").canonical_name(name) == canonical


def test_quantised_are_the_large_matrices_only() -> None:
    specs = architecture({"model_type": "qwen2_moe", "mlp_only_layers": [1], "num_hidden_layers": 2}).dense_tensors()
    for name, spec in specs.items():
        small = name.endswith(("norm.weight", "bias", "mlp.gate.weight", "shared_expert_gate.weight"))
        assert spec.quantise != small, name


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    LINEAR,
    DYNAMIC,
    YARN,
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "original_max_position_embeddings": 16, "factor": None},
    {**YARN, "beta_fast": 8, "beta_slow": 2, "attention_factor": 1.3},
    {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8, "truncate": False},
    LLAMA3,
]


@pytest.mark.parametrize("values", ROPES, ids=lambda values: "-".join(map(str, values.values())))
@pytest.mark.parametrize("top", [{}, {"original_max_position_embeddings": 96}], ids=["inside", "beside"])
def test_rope_equals_transformers_in_both_spellings(values: dict[str, Any], top: dict[str, Any]) -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    base = {"num_attention_heads": 4, "hidden_size": 256, "head_dim": 64, "max_position_embeddings": 256, **top}
    theta = {"rope_theta": 20_000.0}
    config = transformers.Qwen3MoeConfig(**base, rope_parameters={**values, **theta})
    old = {"type" if key == "rope_type" else key: value for key, value in values.items()}
    spellings = [
        {"rope_parameters": {**values, **theta}},
        {"rope_scaling": values, **theta},
        {"rope_scaling": old, "rope_parameters": None, **theta},
        {"rope_parameters": {**values, **theta}, "rope_scaling": None, "rope_theta": 7.0},
    ]
    ropes = [architecture({"model_type": "qwen3_moe", **base, **spelling}).rope for spelling in spellings]
    assert all(rope == ropes[0] for rope in ropes)
    for seq_len in (0, 256, 1000) if values["rope_type"] == "dynamic" else (0,):
        if values["rope_type"] == "default":
            expected, factor = 1 / 20_000.0 ** (torch.arange(0, 64, 2) / 64), 1.0
        else:
            expected, factor = ROPE_INIT_FUNCTIONS[values["rope_type"]](config, "cpu", seq_len=seq_len)
        torch.testing.assert_close(inverse_frequencies(ropes[0], 64, seq_len), expected, rtol=1e-6, atol=0)
        assert math.isclose(ropes[0].attention_factor, factor)


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"quantization_config": {"quant_method": "gptq"}}, "already quantised (quantization_config: gptq)"),
    ("mixtral", {"hidden_act": "xielu"}, "hidden_act 'xielu'"),
    ("mixtral", {"hidden_act": None}, "hidden_act is None, not a text"),
    ("mixtral", {"hidden_size": "4096"}, "hidden_size is '4096', not a whole number from 1"),
    ("mixtral", {"hidden_size": 4096.0}, "hidden_size is 4096.0"),
    ("mixtral", {"num_hidden_layers": True}, "num_hidden_layers is True"),
    ("mixtral", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ("mixtral", {"num_key_value_heads": 5}, "is not a multiple of num_key_value_heads (5)"),
    ("mixtral", {"num_attention_heads": 24}, "is not a multiple of num_attention_heads (24)"),
    ("mixtral", {"head_dim": 127}, "head_dim (127)"),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok (9) exceeds the number of experts (8)"),
    ("mixtral", {"num_experts": 4, "num_local_experts": 8}, "num_local_experts and num_experts differ"),
    ("mixtral", {"sliding_window": 0}, "sliding_window is 0"),
    ("mixtral", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ("mixtral", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
    ("mixtral", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1, not true or false"),
    ("mixtral", {"layer_types": ["sliding_attention"] * 32}, "layer_types do not agree"),
    ("olmoe", {"sliding_window": 128}, "sliding window"),
    ("olmoe", {"head_dim": 64}, "head_dim (64) is not hidden_size"),
    ("olmoe", {"clip_qkv": "8"}, "clip_qkv is '8'"),
    ("qwen2_moe", {"num_key_value_heads": None}, "num_key_value_heads is None"),
    ("qwen2_moe", {"mlp_only_layers": [1.0]}, "mlp_only_layers is [1.0], not a list of int"),
    ("qwen2_moe", {"mlp_only_layers": list(range(24))}, "no layer has experts"),
    ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    ("qwen2_moe", {"layer_types": ["full_attention"]}, "layer_types is not one of"),
    ("qwen2_moe", {"layer_types": ["linear_attention"] * 24}, "layer_types is not one of"),
    ("qwen2_moe", {"layer_types": ["sliding_attention"] * 24}, "use_sliding_window"),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": None}, "sliding_window is not set"),
    ("qwen3_moe", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("qwen3_moe", {"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
    ("qwen3_moe", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_scaling.rope_type is 'longrope'"),
    ("qwen3_moe", {"rope_scaling": {"rope_type": 3}}, "rope_scaling.rope_type is 3"),
    ("qwen3_moe", {"rope_scaling": [4.0]}, "rope_scaling is [4.0], not a mapping"),
    ("qwen3_moe", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
    ("qwen3_moe", {"rope_parameters": {"rope_type": "dynamic", "factor": 0.5}}, "rope_parameters.factor is 0.5"),
    ("qwen3_moe", {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor is 1.0"),
    ("qwen3_moe", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ from layer type"),
    ("qwen3_moe", {"rope_theta": "big"}, "rope_theta is 'big'"),
]


@pytest.mark.parametrize(("name", "overrides", "reason"), REFUSALS, ids=lambda value: str(value)[:40])
def test_unsupported_variants_are_refused_by_name(name: str, overrides: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        architecture({"model_type": name, **overrides})
    message = str(caught.value)
    assert message.startswith(f"This {name} variant is not supported: ")
    assert reason in message
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize("model_type", ["llama", None, 3, ["mixtral"]])
def test_unknown_model_types_are_refused(model_type: object) -> None:
    with pytest.raises(UnsupportedModelError, match="supported are mixtral, olmoe, qwen2_moe, qwen3_moe"):
        architecture({"model_type": model_type})


def test_activations_are_those_of_the_kernels() -> None:
    assert set(architecture_module.ACTIVATIONS) == set(matmul.ACTIVATIONS)
    assert architecture({"model_type": "olmoe", "hidden_act": "swish"}).hidden_act == "silu"
