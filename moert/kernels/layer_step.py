"""A layer up to its experts in one call, where the compiled module is in use."""

# T tokens, D hidden, H query heads, J key/value heads, d head size, C context size, E experts, K experts per token

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from moert.kernels.native import compiled, loaded
from moert.quant.matmul import FEW_TOKENS, PackedMatrix, native_matrix, streamable

_EVERYTHING = 1 << 62


@dataclass(frozen=True, eq=False)
class LayerCache:
    """Keys [J, C / 16, d, 16] and values [J, C, d] of one layer.

    Float16, float32, or int8 with scales float32 [2, J, C], of keys and of values. C is a multiple of 16.
    """

    keys: Tensor
    values: Tensor
    scales: Tensor | None

    def steppable(self) -> bool:
        """Whether a `LayerStep` can run over this cache."""
        d = self.values.shape[-1]
        known = self.values.dtype == torch.int8 if self.scales is not None else self.values.dtype in _FLOATS
        return compiled() is not None and known and d % 16 == 0 and d <= 256

    @cached_property
    def native(self) -> Any:
        """Return what the compiled module takes; it points into the cache."""
        scales = (0, 0) if self.scales is None else tuple(s.data_ptr() for s in self.scales)
        bits = 8 * self.values.itemsize
        return loaded().LayerCache(self.keys.data_ptr(), self.values.data_ptr(), bits, *scales, self.values.shape[1])


_FLOATS = (torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class Place:
    """Where T tokens stand: the first at `position`; each sees `window` positions up to its own, or all.

    rotation: cos and sin, float32 contiguous [T, d / 2].
    """

    rotation: tuple[Tensor, Tensor]
    position: int
    window: int | None

    @cached_property
    def native(self) -> Any:
        """Return what the compiled module takes; it points into the rotation."""
        cos, sin = self.rotation
        window = _EVERYTHING if self.window is None else self.window
        return loaded().Place(cos.data_ptr(), sin.data_ptr(), len(cos), self.position, window)


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
    """A layer before its experts, for some tokens: norm, attention, residual, norm, router.

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
    def most_tokens(self) -> float:
        """For how many tokens the compiled module can do this: none, few, or any number.

        It needs packed or contiguous floating weights, and many tokens are faster through torch where these are raw.
        """
        weights = [p.weight for p in self.qkvo] + ([self.router.weight] if self.router else [])
        groups = {p.weight.layout.group_size for p in self.qkvo[:3] if isinstance(p.weight, PackedMatrix)}
        if not all(map(streamable, weights)) or len(groups) > 1:
            return 0
        return math.inf if all(isinstance(p.weight, PackedMatrix) for p in self.qkvo) else FEW_TOKENS - 1

    @cached_property
    def native(self) -> Any:
        """Return what the compiled module takes; it points into the weights."""
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

    def __call__(
        self, x: Tensor, cache: LayerCache, place: Place, bonus: Tensor | None = None
    ) -> tuple[Tensor, list[int], list[float]]:
        """Add attention to x, float32 contiguous [1, D], in place, and write the token's key and value to the cache.

        Returns what the experts see, float32 [1, D], valid until the next call, and the router's choice, largest first:
        K experts and their weights, the softmax over all experts (divided by their sum over the chosen ones if it
        normalises).

        bonus: float32 contiguous [E], or None. Each expert's logit gets so many times the range of the token's logits
        on top when the experts are chosen, the best of all excepted, which always is; the weights are those without.
        """
        normed = self._normed
        experts, weights = loaded().layer_step(
            self.native, cache.native, place.native, _address(bonus), x.data_ptr(), normed.data_ptr()
        )
        return normed, experts, weights

    def many(
        self, x: Tensor, runs: Sequence[tuple[LayerCache, Place]], bonus: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run tokens x [T, D] in place: what the experts see [T, D], indices int64 and weights [T, K].

        runs: the tokens of one sequence after those of another, with the cache of each. What becomes of a token does
        not depend on the tokens beside it. ValueError where a place lies beyond its cache.
        """
        T, K = len(x), self.router.top_k if self.router else 0
        normed, indices, weights = torch.empty_like(x), torch.empty(T, K, dtype=torch.int64), torch.empty(T, K)
        if sum(len(place.rotation[0]) for _, place in runs) != T:
            raise ValueError(f"{T} tokens do not fit the places of {len(runs)} runs")
        loaded().layer_steps(
            self.native, [(cache.native, place.native) for cache, place in runs], _address(bonus),
            x.data_ptr(), normed.data_ptr(), indices.data_ptr(), weights.data_ptr(),
        )  # fmt: skip
        return normed, indices, weights


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
