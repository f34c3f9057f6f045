"""Choose how much of the KV cache lies in device memory, where not all of it fits or experts would gain more there.

After APEX (arXiv 2506.03296): the times of attention on device and host are predicted from profiled bandwidths, since
decoding is bound by memory on both, and work goes to the host where the two overlap best. Here a sequence is split
within each layer: positions below a border are attended to by the device, the others by the host at the same time, and
what is exchanged costs a fixed time. Device memory is weighed against what it would save as dense weights and as slots
of experts. The baseline is `fill`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moert.scheduler.profile import Profile

_LENGTHS = 64  # of sequences that are looked at


@dataclass(frozen=True, slots=True)
class AttentionCosts:
    """Costs of attention in a model whose layers are alike, in bytes and seconds.

    position_bytes: of the keys and values of a position in one layer. device_bytes_per_s, host_bytes_per_s: as
    attention reads them. exchange_s: of a layer that asks the host: queries there, results back. layer_s, head_s: what
    it saves per token to have the dense weights of a layer, or the head, on the device. byte_s: what a byte more for
    experts saves per token. windows: of the layers, how many positions a token sees, None for all.
    """

    position_bytes: float
    device_bytes_per_s: float
    host_bytes_per_s: float
    exchange_s: float
    layer_s: float
    head_s: float
    byte_s: float
    windows: Sequence[int | None]

    def attention_s(self, border: int, seen: Sequence[int]) -> float:
        """Attention of a layer on the device, for one token: the mean over layers and over how many positions precede.

        The device's part and the host's run at the same time.
        """
        ends, times = np.asarray(seen, dtype=np.float64), []
        for window in self.windows:
            starts = np.maximum(ends - (math.inf if window is None else window), 0)
            near = np.maximum(np.minimum(ends, border) - starts, 0) * self.position_bytes / self.device_bytes_per_s
            far = np.maximum(ends - np.maximum(starts, border), 0) * self.position_bytes / self.host_bytes_per_s
            times.append(np.where(far > 0, np.maximum(near, far + self.exchange_s), near).mean())
        return float(np.mean(times))

    def host_attention_s(self, seen: Sequence[int]) -> float:
        """Return the seconds of attention in a layer that is on the host altogether."""
        ends = np.asarray(seen, dtype=np.float64)
        read = np.mean([np.minimum(ends, math.inf if window is None else window).mean() for window in self.windows])
        return float(read * self.position_bytes / self.host_bytes_per_s)


def lengths(positions: int) -> Sequence[int]:
    """Return how many positions tokens see, evenly from few to all: sequences of every length are taken to be as
    likely.
    """
    return np.linspace(0, positions, min(positions, _LENGTHS) + 1, dtype=np.int64)[1:].tolist()


def choose(
    costs: AttentionCosts, layers: int, layer_bytes: float, head_bytes: float, room: float, positions: int, block: int
) -> int:
    """Choose how many of the positions (a multiple of `block`) to have in device memory in each layer that is there.

    room: device memory for `layer_bytes` of dense weights for each of `layers`, for positions, for the head, and for
    experts. Takes the border at which a token takes least time, with all layers on the device that then fit, and behind
    them the head; of equal ones the most.
    """
    seen, best, border = lengths(positions), math.inf, 0
    on_host = costs.host_attention_s(seen) + costs.layer_s
    for candidate in range(0, positions + 1, block):
        size = layer_bytes + candidate * costs.position_bytes
        count = min(layers, int(room // size)) if size else layers
        left = room - count * size
        seconds = count * costs.attention_s(candidate, seen) + (layers - count) * on_host
        if count == layers and left >= head_bytes:
            left -= head_bytes
        else:
            seconds += costs.head_s
        seconds -= left * costs.byte_s
        if seconds <= best:
            best, border = seconds, candidate
    return border


def fill(
    position_bytes: float, layers: int, layer_bytes: float, head_bytes: float, room: float, positions: int, block: int
) -> int:
    """The baseline, which knows no times: all layers that fit, and the head, then as many positions as fit beside."""
    count = min(layers, int(room // layer_bytes)) if layer_bytes else layers
    if not count:
        return 0
    if count == layers and room - count * layer_bytes >= head_bytes:
        room -= head_bytes
    fitting = (room / count - layer_bytes) / position_bytes
    return min(positions, int(fitting) // block * block)


def slot_gain(profile: Profile, top_k: int, num_experts: int, width: int) -> float:
    """Return the seconds per token that a byte more of device memory for experts saves, where experts are alike.

    It is read by as large a share of tokens as a router chooses of the experts, by the device instead of the host.
    """
    if not profile.gpu_expert_s_per_byte:
        return 0.0
    return top_k / num_experts * max(profile.expert_cost(width) - profile.gpu_expert_cost(width), 0.0)
