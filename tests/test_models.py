"""The model families against transformers' own implementation, on tiny random checkpoints."""

# T tokens, V vocabulary, D hidden, E experts, K experts per token

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from moert.errors import CheckpointError, MoertError, UsageError
from moert.models.architecture import Architecture
from moert.models.attention import span
from moert.models.decoder import Decoder
from moert.models.kv_cache import KVCache
from moert.models.moe import Experts, route
from moert.models.registry import architecture, family
from moert.quant import matmul
from moert.quant.format import MatrixLayout
from moert.quant.matmul import PackedMatrix
from moert.quant.nested import dequantise, quantise

MakeCheckpoint = Callable[..., Path]
Reference = Callable[[Path, list[int]], Tensor]

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
# Every variant that changes what is computed: family and overrides of its configuration
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral-tied": ("mixtral", {"tie": True}),
    "mixtral-window": ("mixtral", {"sliding_window": 24}),
    "mixtral-fp32": ("mixtral", {"dtype": "float32", "rope_theta": 10_000.0}),
    "mixtral-linear": ("mixtral", {"rope_scaling": LINEAR}),
    "mixtral-one-kv-head": ("mixtral", {"num_key_value_heads": 1, "num_experts_per_tok": 1}),
    "olmoe": ("olmoe", {}),
    "olmoe-normalised": ("olmoe", {"norm_topk_prob": True}),
    "olmoe-clipped": ("olmoe", {"clip_qkv": 0.8, "attention_bias": True}),
    "olmoe-no-gqa": ("olmoe", {"num_key_value_heads": 4, "rope_scaling": DYNAMIC}),
    "qwen2": ("qwen2_moe", {}),
    "qwen2-tied": ("qwen2_moe", {"tie": True, "norm_topk_prob": True, "qkv_bias": False}),
    "qwen2-dense-layers": ("qwen2_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    "qwen2-windows": (
        "qwen2_moe",
        {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2},
    ),
    "qwen2-layer-types": (
        "qwen2_moe",
        {
            "use_sliding_window": True,
            "sliding_window": 150,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "qwen2-yarn": ("qwen2_moe", {"rope_scaling": YARN, "rope_theta": 5000.0}),
    "qwen3": ("qwen3_moe", {}),
    "qwen3-not-normalised": ("qwen3_moe", {"norm_topk_prob": False, "attention_bias": True}),
    "qwen3-dense-layer": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "qwen3-window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 16}),
    "qwen3-yarn": ("qwen3_moe", {"rope_scaling": {**YARN, "beta_fast": 16, "truncate": False}}),
    "qwen3-yarn-mscale": ("qwen3_moe", {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}}),
    "qwen3-llama3": ("qwen3_moe", {"rope_scaling": LLAMA3}),
    "qwen3-gelu": ("qwen3_moe", {"hidden_act": "gelu_pytorch_tanh"}),
}
PROMPT = torch.randint(0, 320, (300,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose time to a second thread, seconds where another process is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class ReferenceExperts(Experts):
    """Plain float32 experts from canonically named weights, per expert or fused."""

    def __init__(self, weights: dict[str, Tensor], activation: str) -> None:
        self.weights, self.activation = weights, matmul.ACTIVATIONS[activation]

    def matrices(self, layer: int, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        prefix = f"model.layers.{layer}.mlp.experts"
        if f"{prefix}.gate_up_proj" in self.weights:
            gate, up = self.weights[f"{prefix}.gate_up_proj"][expert].float().chunk(2)
            return gate, up, self.weights[f"{prefix}.down_proj"][expert].float()
        gate, up, down = (self.weights[f"{prefix}.{expert}.{m}_proj.weight"].float() for m in ("gate", "up", "down"))
        return gate, up, down

    def __call__(self, layer: int, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for expert in indices.unique().tolist():
            tokens, slots = torch.where(indices == expert)
            gate, up, down = self.matrices(layer, expert)
            h = x[tokens]
            y = functional.linear(self.activation(h @ gate.T) * (h @ up.T), down)
            result.index_add_(0, tokens, y * weights[tokens, slots, None])
        return result


def load(path: Path) -> tuple[Architecture, dict[str, Tensor], ReferenceExperts]:
    """Architecture, dense tensors and experts of a checkpoint, by canonical name."""
    config = json.loads((path / "config.json").read_text())
    arch = architecture(config)
    tensors: dict[str, Tensor] = {}
    for shard in path.glob("*.safetensors"):
        tensors |= load_file(shard)
    named = {family(config["model_type"]).canonical_name(name): tensor for name, tensor in tensors.items()}
    dense = {name: tensor for name, tensor in named.items() if ".mlp.experts." not in name}
    experts = {name: tensor for name, tensor in named.items() if ".mlp.experts." in name}
    return arch, dense, ReferenceExperts(experts, arch.hidden_act)


def run(decoder: Decoder, tokens: list[int], chunk: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits [T, V] of all tokens, `chunk` at a time."""
    cache = KVCache(decoder.arch, len(tokens), dtype)
    pieces = torch.tensor(tokens).split(chunk)
    return torch.cat([decoder(piece, cache, all_logits=True) for piece in pieces])


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    assert expected.std() > 0.3, "degenerate logits would hide errors"
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("fused", [False, True], ids=["per-expert", "fused"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(
    variant: str, fused: bool, tiny_checkpoint: MakeCheckpoint, reference_logits: Reference
) -> None:
    name, overrides = VARIANTS[variant]
    path = tiny_checkpoint(name, fused=fused, **overrides)
    decoder = Decoder(*load(path))
    for count in (1, 7, 300):
        expected = reference_logits(path, PROMPT[:count])
        assert relative_error(run(decoder, PROMPT[:count], 128), expected) < 1e-4
        rounded = run(decoder, PROMPT[:count], 128, torch.float16)
        if variant in ("mixtral", "olmoe", "qwen2", "qwen3"):
            assert relative_error(rounded, expected) < 1e-3
        else:  # keys and values in float16 may tip a near tie of the router, which then changes a few tokens a lot
            assert (rounded - expected).abs().amax(-1).median() / expected.abs().max() < 1e-3


@pytest.mark.parametrize("fused", [False, True], ids=["per-expert", "fused"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_canonical_names_cover_the_checkpoint(variant: str, fused: bool, tiny_checkpoint: MakeCheckpoint) -> None:
    name, overrides = VARIANTS[variant]
    arch, dense, experts = load(tiny_checkpoint(name, fused=fused, **overrides))
    assert {n: tuple(t.shape) for n, t in dense.items()} == {n: s.shape for n, s in arch.dense_tensors().items()}
    expected: dict[str, tuple[int, ...]] = {}
    E, F, D = arch.num_experts, arch.expert_inner, arch.hidden_size
    for layer in arch.moe_layers:
        prefix = f"model.layers.{layer}.mlp.experts"
        if fused:
            expected |= {f"{prefix}.gate_up_proj": (E, 2 * F, D), f"{prefix}.down_proj": (E, D, F)}
        else:
            for e in range(E):
                expected |= {f"{prefix}.{e}.{m}_proj.weight": (F, D) for m in ("gate", "up")}
                expected[f"{prefix}.{e}.down_proj.weight"] = (D, F)
    assert {n: tuple(t.shape) for n, t in experts.weights.items()} == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_equals_prefill(variant: str, tiny_checkpoint: MakeCheckpoint) -> None:
    name, overrides = VARIANTS[variant]
    decoder = Decoder(*load(tiny_checkpoint(name, **overrides)))
    tokens = PROMPT[:40]
    expected = run(decoder, tokens, 40)
    assert relative_error(run(decoder, tokens, 1), expected) < 1e-5
    assert relative_error(run(decoder, tokens, 1, torch.float16), run(decoder, tokens, 17, torch.float16)) < 1e-4


def test_last_logits_are_the_last_row(tiny_checkpoint: MakeCheckpoint) -> None:
    decoder = Decoder(*load(tiny_checkpoint("qwen3_moe")))
    cache = KVCache(decoder.arch, 8)
    last = decoder(torch.tensor(PROMPT[:7]), cache)
    assert last.shape == (320,)
    assert last.dtype == torch.float32
    torch.testing.assert_close(last, run(decoder, PROMPT[:7], 7, torch.float16)[-1], rtol=1e-5, atol=1e-5)


def test_dynamic_rope_beyond_the_maximum(
    tiny_checkpoint: MakeCheckpoint, reference_logits: Reference, reference_model: Callable[[Path], Any]
) -> None:
    path = tiny_checkpoint("olmoe", rope_scaling=DYNAMIC, max_position_embeddings=64)
    decoder = Decoder(*load(path))
    for count in (64, 65, 300):  # in one chunk: a full forward pass of that length
        expected = reference_logits(path, PROMPT[:count])
        assert relative_error(run(decoder, PROMPT[:count], count), expected) < 1e-4
    # In chunks: what transformers computes for the same chunks over its own cache
    reference, state, expected_chunks = reference_model(path), None, []
    with torch.inference_mode():
        for piece in torch.tensor(PROMPT[:150]).split(50):
            output = reference(piece[None], past_key_values=state, use_cache=True)
            state = output.past_key_values
            expected_chunks.append(output.logits[0])
    assert relative_error(run(decoder, PROMPT[:150], 50), torch.cat(expected_chunks)) < 1e-4


@pytest.mark.parametrize("variant", ["mixtral", "qwen2-dense-layers", "qwen3"])
def test_packed_dense_weights(variant: str, tiny_checkpoint: MakeCheckpoint) -> None:
    """A decoder over packed matrices equals one over the same matrices dequantised, but for inputs rounded to int8.

    That costs about 1%; a wrong matrix or scale costs all. test_kernels.py has the kernels to the last digits.
    """
    name, overrides = VARIANTS[variant]
    arch, dense, experts = load(tiny_checkpoint(name, **overrides))
    packed: dict[str, Tensor | PackedMatrix] = dict(dense)
    unpacked: dict[str, Tensor | PackedMatrix] = dict(dense)
    for tensor_name, spec in arch.dense_tensors().items():
        if spec.quantise:
            layout = MatrixLayout(*spec.shape, 64, (8,))
            slices = quantise(dense[tensor_name].float(), layout)
            packed[tensor_name] = PackedMatrix(layout, tuple(slices))
            unpacked[tensor_name] = dequantise(slices, layout, 1)
    got = run(Decoder(arch, packed, experts), PROMPT[:40], 20)
    want = run(Decoder(arch, unpacked, experts), PROMPT[:40], 20)
    # Of the median token: rounding may tip a near-tie of a router, and then a token has other experts.
    assert ((got - want).norm(dim=1) / want.norm(dim=1)).median() < 3e-2


@pytest.mark.parametrize("window", [None, 1, 3, 5, 8, 100])
@pytest.mark.parametrize("past", [0, 1, 4, 9])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_span_shows_each_query_its_window(past: int, count: int, window: int | None) -> None:
    seen = span(past, count, window)
    assert seen.end == past + count
    for i in range(count):
        query = past + i
        expected = [k for k in range(past + count) if k <= query and (window is None or k > query - window)]
        if seen.mask is not None:
            assert seen.mask.shape == (count, seen.end - seen.start)
            visible = [seen.start + k for k in range(seen.end - seen.start) if seen.mask[i, k] == 0]
        else:
            visible = list(range(seen.start, query + 1 if seen.causal else seen.end))
        assert visible == expected


def test_route_against_float64() -> None:
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    probabilities = logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)
    for normalise in (False, True):
        indices, weights = route(logits, 3, normalise)
        assert indices.tolist() == [sorted(range(8), key=lambda e: -row[e])[:3] for row in logits.tolist()]
        expected = probabilities.gather(-1, indices)
        if normalise:
            expected = expected / expected.sum(-1, keepdim=True)
        torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=1e-7)


def test_cache_truncates_and_goes_on(tiny_checkpoint: MakeCheckpoint) -> None:
    decoder = Decoder(*load(tiny_checkpoint("qwen2_moe")))
    cache = KVCache(decoder.arch, 32, torch.float32)
    decoder(torch.tensor(PROMPT[100:130]), cache)
    cache.truncate(0)
    decoder(torch.tensor(PROMPT[:20] + PROMPT[50:55]), cache)
    cache.truncate(20)
    got = decoder(torch.tensor(PROMPT[20:30]), cache)
    assert cache.length == 30
    torch.testing.assert_close(got, run(decoder, PROMPT[:30], 30)[-1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="cannot truncate"):
        cache.truncate(31)


def test_cache_is_as_large_as_it_says() -> None:
    arch = architecture({"model_type": "qwen3_moe", "num_hidden_layers": 3, "head_dim": 128})
    assert KVCache.bytes_for(arch, 100) == 3 * 2 * 4 * 112 * 128 * 2  # rounded up to a block of positions
    assert KVCache.bytes_for(arch, 112, torch.int8) == 3 * 2 * 4 * 112 * (128 + 4)
    for dtype in (torch.float16, torch.float32, torch.int8):
        layers = KVCache(arch, 100, dtype).layers
        size = sum(c.keys.nbytes + c.values.nbytes + (0 if c.scales is None else c.scales.nbytes) for c in layers)
        assert size == KVCache.bytes_for(arch, 100, dtype)


def test_an_8_bit_cache_costs_little(tiny_checkpoint: MakeCheckpoint, reference_logits: Reference) -> None:
    """In chunks and one token at a time. The median token: rounding may tip a near-tie of a router."""
    path = tiny_checkpoint("qwen3_moe")
    decoder = Decoder(*load(path))
    want = reference_logits(path, PROMPT[:60])
    for chunk in (20, 1):
        cache = KVCache(decoder.arch, 60, torch.int8)
        parts = torch.tensor(PROMPT[:60]).split(chunk)
        got = torch.cat([decoder(part, cache, all_logits=True) for part in parts])
        assert ((got - want).norm(dim=1) / want.norm(dim=1)).median() < 0.03


def test_full_context_and_empty_input_are_refused(tiny_checkpoint: MakeCheckpoint) -> None:
    decoder = Decoder(*load(tiny_checkpoint("mixtral")))
    cache = KVCache(decoder.arch, 8)
    decoder(torch.tensor(PROMPT[:5]), cache)
    with pytest.raises(UsageError, match="9 tokens do not fit the context of 8"):
        decoder(torch.tensor(PROMPT[:4]), cache)
    with pytest.raises(ValueError, match="at least one token"):
        decoder(torch.tensor([], dtype=torch.int64), cache)
    assert cache.length == 5


def test_a_bonus_changes_which_experts_are_chosen_but_not_what_they_weigh() -> None:
    g = torch.Generator().manual_seed(0)
    logits, routing_bias = torch.randn(50, 12, generator=g), (torch.rand(12, generator=g) < 0.5) * 0.2
    indices, weights = route(logits, 4, True, routing_bias)
    moved = 0
    for row, chosen, found in zip(logits.double(), indices.tolist(), weights, strict=True):
        reach = row + routing_bias * (row.max() - row.min())
        others = sorted((e for e in range(12) if e != int(row.argmax())), key=lambda e: -reach[e])
        want = sorted([int(row.argmax()), *others[:3]], key=lambda e: -row[e])
        assert chosen == want
        torch.testing.assert_close(found.double(), row[want].softmax(-1), rtol=1e-5, atol=1e-7)
        moved += want != row.topk(4).indices.tolist()
    assert moved > 5


def test_interrupted_pass_leaves_the_cache(tiny_checkpoint: MakeCheckpoint) -> None:
    arch, dense, experts = load(tiny_checkpoint("qwen3_moe"))
    interrupt = False

    class Interruptible(Experts):
        def __call__(self, layer: int, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
            if interrupt and layer == 1:
                raise KeyboardInterrupt
            return experts(layer, x, indices, weights)

    decoder = Decoder(arch, dense, Interruptible())
    cache = KVCache(arch, 32, torch.float32)
    decoder(torch.tensor(PROMPT[:10]), cache)
    interrupt = True
    with pytest.raises(KeyboardInterrupt):
        decoder(torch.tensor(PROMPT[100:110]), cache)
    interrupt = False
    got = decoder(torch.tensor(PROMPT[10:20]), cache)
    torch.testing.assert_close(got, run(decoder, PROMPT[:20], 20)[-1], rtol=1e-4, atol=1e-4)


def test_weights_that_do_not_fit_the_configuration(tiny_checkpoint: MakeCheckpoint) -> None:
    arch, dense, experts = load(tiny_checkpoint("olmoe"))
    without = {name: tensor for name, tensor in dense.items() if name != "model.norm.weight"}
    bent = {**dense, "model.norm.weight": torch.ones(63)}
    for weights, reason in (
        (without, "model.norm.weight is missing"),
        ({**dense, "model.extra": torch.ones(1)}, "model.extra does not belong to it"),
        (bent, r"model.norm.weight has the shape \(63,\), but the configuration says \(64,\)"),
    ):
        with pytest.raises(CheckpointError, match=reason) as caught:
            Decoder(arch, weights, experts)
        assert isinstance(caught.value, MoertError)
