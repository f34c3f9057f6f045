"""Keys and values of a layer whose attention runs through torch on a device: in its memory up to some position, and
from there on in host memory, where the CPU attends to them while the device does its part.

The split is that of APEX (arXiv 2506.03296), which leaves attention over what does not fit to the CPU, here within a
sequence; the two parts are merged by their log-sum-exp, as FlashAttention merges blocks (arXiv 2205.14135).
"""

# T tokens, S positions, H query heads, J key/value heads, C positions of a part, d head size

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moert.device.device_backend import DeviceBackend
from moert.device.matrix import products
from moert.models.kv_cache import to_int8

BLOCK_FLOATS = 1 << 20  # scores, or keys, that are looked at at a time
LEAST_BLOCK = 128
_LOWEST = torch.finfo(torch.float32).min

Attended = tuple[Tensor, Tensor]  # softmax(scores) @ values [H, T, d] and log-sum-exp of the scores [H, T], float32


@dataclass(frozen=True, eq=False)
class CacheSegment:
    """Keys and values [J, C, d] of positions start .. start + C, in one memory.

    Float16, float32, or int8 with scales float32 [2, J, C].
    """

    start: int
    keys: Tensor
    values: Tensor
    scales: Tensor | None

    @property
    def end(self) -> int:
        return self.start + self.keys.shape[1]

    def write(self, first: int, keys: Tensor, values: Tensor) -> None:
        """Write the keys and values [J, T, d] of those positions first .. first + T that lie in this part."""
        low, high = max(first, self.start), min(first + keys.shape[1], self.end)
        if low >= high:
            return
        own = slice(low - self.start, high - self.start)
        for i, (target, new) in enumerate(((self.keys, keys), (self.values, values))):
            x = new[:, low - first : high - first]
            if self.scales is not None:
                x, scale = to_int8(x)
                self.scales[i, :, own] = scale[..., 0]
            target[:, own] = x.to(target.dtype)

    def attend(self, q: Tensor, past: int, first: int, last: int, window: int | None) -> Attended:
        """Queries q [H, T, d] of positions past .. past + T over the keys of positions first .. last, all in this part.

        In blocks, so that the scores of a long prompt need little memory. A query that sees none of them gets 0 and
        -inf.
        """
        (H, T, d), J = q.shape, len(self.keys)
        q = q.reshape(J, -1, d) * d**-0.5  # the query heads that share a key head become its queries
        step = max(BLOCK_FLOATS // max(H * T, J * d), LEAST_BLOCK)
        result: Attended | None = None
        for begin in range(first, last, step):
            end = min(begin + step, last)
            block = self._attend(q, past, T, begin, end, window)
            result = block if result is None else merge(result, block)
        assert result is not None
        return result[0].view(H, T, d), result[1].view(H, T)

    def _attend(self, q: Tensor, past: int, count: int, begin: int, end: int, window: int | None) -> Attended:
        own = slice(begin - self.start, end - self.start)
        keys, values = self.keys[:, own], self.values[:, own]
        scores = products(q, keys.transpose(1, 2))
        if self.scales is not None:
            scores *= self.scales[0, :, None, own]
        if end > past + 1 or (window is not None and begin <= past + count - 1 - window):
            positions = torch.arange(begin, end, device=q.device)
            queries = torch.arange(past, past + count, device=q.device)[:, None]
            hidden = positions > queries
            if window is not None:
                hidden |= positions <= queries - window
            scores.view(len(scores), -1, count, end - begin).masked_fill_(hidden, -torch.inf)
        peak = scores.amax(-1, keepdim=True).clamp_(min=_LOWEST)
        scores = scores.sub_(peak).exp_()
        total = scores.sum(-1, keepdim=True)
        if self.scales is not None:
            scores *= self.scales[1, :, None, own]
        return products(scores, values) / total.clamp(min=1e-38), (total.log() + peak)[..., 0]

    def flash(self, q: Tensor, last: int) -> Tensor:
        """`attend` of one query, or of the first T, over all positions up to `last`: float32 [H, T, d].

        By torch's own kernels, in the cache's dtype; not for int8.
        """
        (H, T, d), J = q.shape, len(self.keys)
        keys, values = self.keys[None, :, :last], self.values[None, :, :last]
        if T == 1:
            q = q.reshape(J, H // J, d)
        elif J != H:
            keys, values = (x.repeat_interleave(H // J, 1) for x in (keys, values))
        y = functional.scaled_dot_product_attention(q[None].to(keys.dtype), keys, values, is_causal=T > 1)
        return y.float().reshape(H, T, d)


def merge(a: Attended, b: Attended) -> Attended:
    """Combine attention over two sets of positions into attention over both."""
    (x, lse_x), (y, lse_y) = a, b
    lse = torch.logaddexp(lse_x, lse_y)
    safe = lse.clamp(min=_LOWEST)
    return x * (lse_x - safe).exp()[..., None] + y * (lse_y - safe).exp()[..., None], lse


@dataclass(frozen=True, eq=False)
class SplitCache:
    """One sequence's keys and values of a layer: `near` in device memory, `far` behind it in host memory, or either."""

    near: CacheSegment | None
    far: CacheSegment | None
    link: DeviceBackend

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, past: int, window: int | None) -> Tensor:
        """Write keys and values [J, T, d] behind `past` positions; attention of q [H, T, d]: [T, H * d].

        All float32 on the device. Each query sees `window` positions up to its own, or all.
        """
        (H, T, d), J = q.shape, len(keys)
        first, end = 0 if window is None else max(0, past - window + 1), past + T
        border = 0 if self.near is None else self.near.end
        fetched: Tensor | None = None
        if self.far is not None and end > border:
            # First, so that the device goes on with its part while the CPU does its own.
            fetched = self.link.fetch(torch.cat([q, keys, values]))
        if self.near is not None:
            self.near.write(past, keys, values)
        result: Tensor
        if fetched is None:
            assert self.near is not None
            result = self._near(self.near, q, past, first, end, window)
        else:
            assert self.far is not None
            near = None
            if self.near is not None and first < border:
                near = self.near.attend(q, past, first, border, window)
            q, keys, values = torch.split(fetched, [H, J, J])
            self.far.write(past, keys, values)
            y, lse = self.far.attend(q, past, max(first, border), end, window)
            both = self.link.send(torch.cat([y, lse[..., None]], dim=-1))
            far = both[..., :-1], both[..., -1]
            result = (far if near is None else merge(near, far))[0]
        return result.transpose(0, 1).reshape(T, H * d)

    @staticmethod
    def _near(part: CacheSegment, q: Tensor, past: int, first: int, end: int, window: int | None) -> Tensor:
        plain = first == 0 and (q.shape[1] == 1 or (past == 0 and (window is None or window >= end)))
        if plain and q.is_cuda and part.scales is None:
            return part.flash(q, end)
        return part.attend(q, past, first, end, window)[0]
