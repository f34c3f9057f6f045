"""Rotary position embedding: inverse frequencies of each type, and the cosines and sines of a run of positions.

`dynamic` (NTK) frequencies depend on the length of the sequence once it exceeds the model's maximum. They are chosen
for the length that each forward pass reaches, and keys already cached keep theirs, as in transformers. So a prompt run
in one chunk equals a full forward pass, while chunks and single tokens beyond the maximum do not.
"""

# T tokens, d head size

from __future__ import annotations

import math

import torch
from torch import Tensor

from moert.models.architecture import Rope


def inverse_frequencies(rope: Rope, head_dim: int, seq_len: int = 0) -> Tensor:
    """float32 [d/2]: radians per position of each pair. `seq_len` matters to `dynamic` only."""
    theta, original = rope.theta, rope.original_max_positions
    if rope.type == "dynamic" and seq_len > original:
        stretch = rope.factor * seq_len / original - (rope.factor - 1)
        theta *= stretch ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "yarn":
        interpolated = _yarn_ramp(rope, head_dim)
        return frequencies * (1 - interpolated) + frequencies / rope.factor * interpolated
    if rope.type == "llama3":
        # Rotations within the original context: few of them are scaled, many are kept, between them both are mixed.
        rotations = original * frequencies / (2 * math.pi)
        kept = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = kept.clamp(0, 1)
        return frequencies * kept + frequencies / rope.factor * (1 - kept)
    return frequencies


def _yarn_ramp(rope: Rope, head_dim: int) -> Tensor:
    """float32 [d/2]: share of interpolation of each pair, from 0 (fast rotations) to 1 (slow ones)."""

    def pair_with(rotations: float) -> float:
        periods = rope.original_max_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(periods) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


_AHEAD = 64
_KEPT = 16 * _AHEAD  # sequences that are decoded together stand at different positions


class Rotation:
    """cos and sin for the positions of a forward pass.

    Computed anew for each pass, since a table for the whole context would be as large as a layer's keys; for a decoded
    token, of which that is a hundredth of the time, some positions at once.
    """

    def __init__(self, rope: Rope, head_dim: int) -> None:
        self._rope, self._head_dim = rope, head_dim
        self._frequencies = inverse_frequencies(rope, head_dim)
        self._ahead: dict[int, tuple[Tensor, Tensor]] = {}

    def cos_sin(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """float32 [T, d/2] each, for positions start .. start + count of a sequence that ends there."""
        if count > 1 or self._rope.type == "dynamic":  # which depends on where the sequence ends
            return self._compute(start, count)
        if start not in self._ahead:
            cos, sin = self._compute(start, _AHEAD)
            if len(self._ahead) >= _KEPT:
                self._ahead = {}
            self._ahead |= {start + i: (cos[i : i + 1], sin[i : i + 1]) for i in range(_AHEAD)}
        return self._ahead[start]

    def _compute(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        frequencies = self._frequencies
        if self._rope.type == "dynamic" and start + count > self._rope.original_max_positions:
            frequencies = inverse_frequencies(self._rope, self._head_dim, start + count)
        angles = torch.arange(start, start + count, dtype=torch.float32)[:, None] * frequencies
        return angles.cos() * self._rope.attention_factor, angles.sin() * self._rope.attention_factor
