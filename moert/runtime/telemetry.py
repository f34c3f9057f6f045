"""What the runtime counts about itself."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from pathlib import Path


@dataclass(slots=True)
class Counters:
    """Sums since the start. expert_uses counts (layer, step, expert); a hit had all its slices in memory when asked.

    token_uses counts (layer, token, expert), by the number of slices that the expert was computed with: what the tokens
    would take one at a time, however many of them a step had.
    """

    expert_uses: int = 0
    expert_hits: int = 0
    width_sum: int = 0
    reads: int = 0
    bytes_read: int = 0
    waited_s: float = 0.0
    computed_s: float = 0.0
    token_uses: Counter[int] = field(default_factory=Counter)

    def copy(self) -> Counters:
        return replace(self, token_uses=self.token_uses.copy())

    def since(self, earlier: Counters) -> Counters:
        """What was counted after `earlier`."""
        return Counters(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})

    @property
    def hit_ratio(self) -> float | None:
        """Share of expert uses that waited for nothing; None where there were none."""
        return self.expert_hits / self.expert_uses if self.expert_uses else None

    @property
    def mean_width(self) -> float | None:
        """Mean bits per weight over expert uses; None where there were none."""
        return self.width_sum / self.expert_uses if self.expert_uses else None


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    # ru_maxrss would include a parent's peak from before exec; the kernel's high-water mark does not.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
