"""A decode step of one layer up to its experts, for one token, where the compiled module is in use."""

# D hidden, H query heads, J key/value heads, d head size, C context size, E experts, K experts per token

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from moert.quant.dispatch import compiled, loaded
from moert.quant.matmul import PackedMatrix, native_matrix, streamable


@dataclass(frozen=True, eq=False)
class LayerCache:
    """Keys and values of one layer: numbers [2, J, C, d], float16, or int8 with scales float32 [2, J, C]."""

    numbers: Tensor
    scales: Tensor | None

    def steppable(self) -> bool:
        """Whether a `LayerStep` can run over this cache."""
        d = self.numbers.shape[-1]
        known = self.numbers.dtype == (torch.float16 if self.scales is None else torch.int8)
        return compiled() is not None and known and d % 16 == 0 and d <= 256

    @cached_property
    def native(self) -> Any:
        """What the compiled module takes; points into the cache."""
        keys, values = self.numbers
        scales = (0, 0) if self.scales is None else tuple(s.data_ptr() for s in self.scales)
        return loaded().LayerCache(keys.data_ptr(), values.data_ptr(), *scales, keys.shape[1])


@dataclass(frozen=True, eq=False)
class Place:
    """Where a token stands: at `position`, from where it sees start ... position.

    rotation: cos and sin, float32 contiguous [1, d / 2].
    """

    rotation: tuple[Tensor, Tensor]
    position: int
    start: int

    @cached_property
    def native(self) -> Any:
        """What the compiled module takes; points into the rotation."""
        cos, sin = self.rotation
        return loaded().Place(cos.data_ptr(), sin.data_ptr(), self.position, self.start)


@dataclass(frozen=True)
class Projection:
    """x [T, K] -> [T, N]: weight [N, K], bias float32 [N] or None."""

    weight: Tensor | PackedMatrix
    bias: Tensor | None = None


@dataclass(frozen=True)
class Router:
    """weight [E, D]; K experts per token; whether their weights are divided by their sum."""

    weight: Tensor | PackedMatrix
    top_k: int
    normalise: bool


@dataclass(frozen=True, eq=False)
class LayerStep:
    """What a layer does with one token before its experts: norm, attention, residual, norm, router.

    norms: float32 [D], before attention and behind it. qkvo: the four projections of attention. qk_norm: None, or
    whether q and k are normed per head ([d] each) or as a whole ([H * d] and [J * d]). clip: largest magnitude of q, k
    and v. router: None in a layer without experts.
    """

    norms: tuple[Tensor, Tensor]
    eps: float
    head_dim: int
    qkvo: tuple[Projection, Projection, Projection, Projection]
    qk_norm: tuple[Literal["head", "full"], Tensor, Tensor] | None
    clip: float | None
    router: Router | None

    @cached_property
    def supported(self) -> bool:
        """Whether the compiled module can do this: a packed or contiguous floating weight everywhere."""
        weights = [p.weight for p in self.qkvo] + ([self.router.weight] if self.router else [])
        groups = {p.weight.layout.group_size for p in self.qkvo[:3] if isinstance(p.weight, PackedMatrix)}
        return all(map(streamable, weights)) and len(groups) < 2

    @cached_property
    def native(self) -> Any:
        """What the compiled module takes; points into the weights."""
        kind, *qk_norms = self.qk_norm or ("none", None, None)
        router = self.router
        return loaded().Layer(
            hidden=self.norms[0].numel(),
            head_dim=self.head_dim,
            norms=tuple(map(_address, self.norms)),
            eps=self.eps,
            qkvo=tuple((native_matrix(p.weight), _address(p.bias)) for p in self.qkvo),
            qk_norm=kind,
            qk_norms=tuple(map(_address, qk_norms)),
            clip=math.inf if self.clip is None else self.clip,
            router=None if router is None else native_matrix(router.weight),
            top_k=0 if router is None else router.top_k,
            normalise=router is not None and router.normalise,
        )

    @cached_property
    def _normed(self) -> Tensor:
        return torch.empty(1, self.norms[0].numel())

    def __call__(self, x: Tensor, cache: LayerCache, place: Place) -> tuple[Tensor, list[int], list[float]]:
        """Add attention to x, float32 contiguous [1, D], in place, and write the token's key and value to the cache.

        Returns what the experts see, float32 [1, D], valid until the next call, and the router's choice, largest first:
        K experts and their weights, the softmax over all experts (divided by their sum over the chosen ones if it
        normalises).
        """
        normed = self._normed
        experts, weights = loaded().layer_step(self.native, cache.native, place.native, x.data_ptr(), normed.data_ptr())
        return normed, experts, weights


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
