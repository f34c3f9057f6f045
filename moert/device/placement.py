"""Decides which part of a model besides its experts is in device memory, and how many bytes that takes.

accelerate places whole layers, and the head with the last norm, in their order (`infer_auto_device_map` over modules on
the meta device that have the sizes which they will have there); a cost model says how much of their KV cache goes with
them. Sizes are exact: `moert.device.dense_quant` and `SplitKVMemory` allocate what is said here.
"""

# T tokens, V vocabulary, D hidden, H query heads

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from moert.config import PREFILL_CHUNK, format_bytes
from moert.device.decoder import HEAD_TOKENS
from moert.device.layer import DeviceLayer, DeviceLinear, DeviceNorm
from moert.device.matrix import BLOCK_WEIGHTS, KINDS, NF4_BLOCK, DenseQuant, DeviceMatrix, dtype_of
from moert.device.split_cache import BLOCK_FLOATS, LEAST_BLOCK
from moert.models.architecture import Architecture, kv_bytes
from moert.models.moe import Experts
from moert.quant.format import KEY_BLOCK, align
from moert.scheduler.kv_split import AttentionCosts, choose, fill, slot_gain
from moert.scheduler.profile import Profile
from moert.store.layout import EMBEDDING, HEAD

ALIGN = 256  # where each tensor begins: GPUs read best from there
# Of a layer that attends on the host too: to wait for the device, and two small copies. Assumed where not measured.
EXCHANGE_S = 4e-5
_DEVICE = 1  # how accelerate's map calls the device


@dataclass(frozen=True, slots=True)
class Placement:
    """The parts of the model on the device besides experts, and their bytes there.

    layers: those whose dense part is. head: with the last norm. embed: a head that is the embedding too. kv_positions:
    how many positions of the KV cache of these layers; the others are on the host, where the CPU attends to them.
    """

    layers: tuple[bool, ...]
    embed: bool
    head: bool
    dense_bytes: int
    kv_positions: int
    kv_bytes: int
    workspace_bytes: int

    @property
    def any(self) -> bool:
        """Tell whether anything is on the device."""
        return self.head or any(self.layers)

    @property
    def device_bytes(self) -> int:
        return self.dense_bytes + self.kv_bytes + self.workspace_bytes

    def names(self, arch: Architecture) -> list[str]:
        """Return the names of the dense tensors that are on the device."""
        return [name for name in arch.dense_tensors() if self._has(name)]

    def _has(self, name: str) -> bool:
        parts = name.split(".")
        if parts[1] == "layers":
            return self.any and self.layers[int(parts[2])]
        return self.embed if parts[1] == "embed_tokens" else self.head

    def line(self, positions: int) -> str:
        """Describe what is on the device, for people, where the KV cache has so many positions."""
        head = " and the head" if self.head else ""
        line = f"{sum(self.layers)} of {len(self.layers)} layers{head} ({format_bytes(self.dense_bytes)})"
        if any(self.layers):
            some = "all" if self.kv_positions >= positions else f"the first {self.kv_positions}"
            line += f", {some} of {positions} positions of their KV cache ({format_bytes(self.kv_bytes)})"
        return f"{line}, workspace {format_bytes(self.workspace_bytes)}"


NOTHING = Placement((), False, False, 0, 0, 0, 0)


class DenseArena:
    """Tensors one after the other in `memory` (uint8), or without it on the meta device: `used` bytes in all."""

    def __init__(self, memory: Tensor | None = None) -> None:
        self._memory, self.used = memory, 0

    def take(self, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        at, self.used = self.used, align(self.used + size, ALIGN)
        if self._memory is None:
            return torch.empty(tuple(shape), dtype=dtype, device="meta")
        return self._memory[at : at + size].view(dtype).view(tuple(shape))


def matrix_kind(name: str, cols: int, quant: DenseQuant) -> type[DeviceMatrix]:
    """Return the class of a large matrix on the device.

    INT8 instead of NF4 for a head, which every token passes through alone, and where rows are no multiple of a block.
    """
    head = not name.startswith("model.layers.")
    return KINDS["int8" if quant == "nf4" and (head or cols % NF4_BLOCK) else quant]


def make_dense(
    arch: Architecture, names: Iterable[str], quant: DenseQuant, dtype: torch.dtype, arena: DenseArena
) -> dict[str, Tensor | DeviceMatrix]:
    """Empty tensors and matrices of these names, in an arena: large matrices as `quant` says, others in float32."""
    specs = arch.dense_tensors()
    result: dict[str, Tensor | DeviceMatrix] = {}
    for name in names:
        shape = specs[name].shape
        if specs[name].quantise:
            result[name] = matrix_kind(name, shape[1], quant)((shape[0], shape[1]), dtype, arena.take)
        else:
            result[name] = arena.take(torch.float32, shape)
    return result


def place(
    arch: Architecture,
    quant: DenseQuant,
    room: int,
    positions: int,
    kv_dtype: torch.dtype,
    torch_device: torch.device,
    *,
    profile: Profile | None = None,
    sequences: int = 1,
    byte_gain_s: float | None = None,
    dtype: torch.dtype | None = None,
) -> Placement:
    """Choose what fits into `room` bytes of device memory: workspace, layers, the head, and of the KV cache what pays.

    positions: of the KV cache, for all `sequences` together. profile: of a machine with such a device; without it as
    much of the KV cache as fits beside the layers. byte_gain_s: what a byte more for experts saves per token, in
    seconds; None: as `slot_gain` says at 4 bits. dtype: in what the device computes (None: as `dtype_of`).
    """
    dtype, positions = dtype or dtype_of(torch_device), align(positions, KEY_BLOCK)
    workspace = workspace_bytes(arch, quant, positions, sequences)
    free = max(room - workspace, 0)
    per_position = kv_bytes(2 * arch.num_kv_heads, arch.head_dim, 8 * kv_dtype.itemsize)
    parts = _Parts(arch, quant, dtype)
    border = _border(arch, parts, per_position, free, positions, profile, byte_gain_s)
    layers, head = parts.placed(border * per_position, free)
    if not any(layers):
        return Placement(layers, False, False, 0, 0, 0, 0)
    dense = sum(size for size, there in zip(parts.layer_bytes, layers, strict=True) if there)
    return Placement(
        layers=layers,
        embed=head and arch.tie_word_embeddings,
        head=head,
        dense_bytes=dense + (parts.head_bytes if head else 0),
        kv_positions=border,
        kv_bytes=sum(layers) * border * per_position,
        workspace_bytes=workspace,
    )


class _Parts(nn.Module):
    """All that can be on the device, built on the meta device: tensors there have the sizes that they will have.

    layer_bytes, head_bytes: of each layer, and of the head with the last norm.
    """

    def __init__(self, arch: Architecture, quant: DenseQuant, dtype: torch.dtype) -> None:
        super().__init__()
        names: dict[str, list[str]] = {}
        for name in arch.dense_tensors():
            names.setdefault(".".join(name.split(".")[:3]), []).append(name)
        layers, self.layer_bytes = [], []
        for layer in range(arch.num_layers):
            dense = make_dense(arch, names[f"model.layers.{layer}"], quant, dtype, arena := DenseArena())
            layers.append(DeviceLayer(arch, dense, layer, cast(Experts, None)))
            self.layer_bytes.append(arena.used)
        self.layers = nn.ModuleList(layers)
        head = EMBEDDING if arch.tie_word_embeddings else HEAD
        dense = make_dense(arch, ["model.norm.weight", head], quant, dtype, arena := DenseArena())
        norm = DeviceNorm(dense, "model.norm", arch.rms_norm_eps)
        self.head = nn.Sequential(norm, DeviceLinear(dense, head.removesuffix(".weight")))
        self.head_bytes = arena.used

    def placed(self, kv_bytes: int, room: int) -> tuple[tuple[bool, ...], bool]:
        """Tell which layers are on the device, and whether the head is, where each layer brings so many bytes more."""
        from accelerate.utils import compute_module_sizes, infer_auto_device_map

        for module, size in zip([*self.layers, self.head], [*self.layer_bytes, self.head_bytes], strict=True):
            module.register_buffer("rest", None)
            own = compute_module_sizes(module)[""]
            # Beside the weights: what aligning them takes, and the keys and values of the layer.
            rest = size - own + (kv_bytes if isinstance(module, DeviceLayer) else 0)
            module.register_buffer("rest", torch.empty(rest, dtype=torch.uint8, device="meta"))
        # Of the first device and of the CPU accelerate keeps room for the largest layer, to compute offloaded layers
        # there. Ours are computed where they are: so the first has nothing, and the second is the device.
        memory: dict[int | str, int | str] = {0: 0, _DEVICE: room, "cpu": 1 << 62}
        logger = logging.getLogger("accelerate.utils.modeling")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it warns of devices that this machine does not have
        try:
            found = infer_auto_device_map(
                self, memory, ["DeviceLayer", "Sequential"], clean_result=False, offload_buffers=True
            )
        finally:
            logger.setLevel(level)
        there = [name for name, place in found.items() if place == _DEVICE]
        layers = tuple("layers" in there or f"layers.{layer}" in there for layer in range(len(self.layers)))
        return layers, "head" in there


def _border(
    arch: Architecture,
    parts: _Parts,
    position_bytes: int,
    room: int,
    positions: int,
    profile: Profile | None,
    byte_gain_s: float | None,
) -> int:
    """Return how many positions of the KV cache go with a layer on the device."""
    sizes = arch.num_layers, sum(parts.layer_bytes) / arch.num_layers, parts.head_bytes, room, positions, KEY_BLOCK
    if profile is None or not profile.gpu_memory_bytes_per_s:
        return fill(position_bytes, *sizes)
    bandwidth = profile.gpu_memory_bytes_per_s
    weights = {name: math.prod(spec.shape) for name, spec in arch.dense_tensors().items() if spec.quantise}
    in_layers = sum(count for name, count in weights.items() if name.startswith("model.layers."))
    head = weights[EMBEDDING if arch.tie_word_embeddings else HEAD]
    on_host = profile.dense_s_per_byte  # 8 bits each
    if byte_gain_s is None:
        byte_gain_s = slot_gain(profile, arch.top_k, arch.num_experts, 4)
    latencies = [profile.host_to_device_latency_s] * 2 + [profile.gpu_launch_overhead_s]
    costs = AttentionCosts(
        position_bytes=position_bytes,
        device_bytes_per_s=bandwidth,
        host_bytes_per_s=profile.memory_bytes_per_s,
        exchange_s=EXCHANGE_S if None in latencies else sum(cast(list[float], latencies)),
        layer_s=max((in_layers * on_host - sum(parts.layer_bytes) / bandwidth) / arch.num_layers, 0.0),
        head_s=max(head * on_host - parts.head_bytes / bandwidth, 0.0),
        byte_s=byte_gain_s,
        windows=sorted(set(arch.sliding_windows), key=lambda window: window or 0),
    )
    return choose(costs, *sizes)


def workspace_bytes(arch: Architecture, quant: DenseQuant, positions: int, sequences: int = 1) -> int:
    """Upper estimate of the temporary device memory of a forward pass, without what experts need."""
    T = min(PREFILL_CHUNK, positions) + sequences - 1
    H, d, V = arch.num_heads, arch.head_dim, arch.vocab_size
    q_size, kv_size = H * d, arch.num_kv_heads * d
    inner = max(arch.shared_inner, 0 if all(arch.is_moe_layer) else arch.dense_inner)
    floats = T * (8 * arch.hidden_size + 8 * q_size + 8 * kv_size + 4 * inner + 6 * arch.num_experts)
    scores = max(BLOCK_FLOATS, H * T * LEAST_BLOCK)
    floats += 3 * scores  # with their copies in 16 bits and masks; or keys and values in float32
    floats += 3 * HEAD_TOKENS * V
    if quant != "16":
        floats += 2 * T * max(q_size, inner, arch.hidden_size)  # integer sums beside their floats
        floats += 2 * BLOCK_WEIGHTS  # weights as they are dequantised
    return 4 * floats
