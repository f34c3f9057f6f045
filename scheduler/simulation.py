"""What a simulation is asked, and what it says: plain data."""

from __future__ import annotations

from dataclasses import dataclass

from moert.scheduler.precision import BitRouter


@dataclass(frozen=True, slots=True)
class Settings:
    """What is simulated.

    budget: bytes for experts. widths: those of the store. policy: see `POLICIES`. recalls: of the predictor, one
    for each layer ahead; none: nothing is predicted. ahead: bytes of prefetches that may be on their way at a time.
    sizes: bytes of each slice of an expert; empty: what the trace says at 4 bits, divided among the widths. router: of
    a store that knows the harm of each expert's widths.
    """

    budget: int
    precision: str
    widths: tuple[int, ...] = (2, 3, 4)
    policy: str = "score"
    recalls: tuple[float, ...] = (0.8,)
    ahead: int = 12 << 20
    seed: int = 0
    sizes: tuple[int, ...] = ()
    router: BitRouter | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """Of the tokens decoded.

    hit_ratio: share of the uses of experts that found all slices in memory. stall_share: share of the time in which
    nothing computed. mean_width: bits, over uses of experts. mass_at_width: by width, the share of the router weight
    that was computed at it; 0: left out.
    """

    decode_tokens_per_s: float
    hit_ratio: float
    bytes_read_per_token: float
    bytes_prefetched_per_token: float
    stall_share: float
    mean_width: float
    mass_at_width: dict[int, float]


@dataclass(frozen=True, slots=True)
class Simulation:
    """The run as asked for, and beside it:

    belady: the same widths with evictions that know the future, and no prediction. perfect_prefetch: the same reads,
    all of them known so early that nothing waits but for the disk as a whole. lru: whole experts at the widest width,
    least recently used, nothing computes while something is read.
    """

    settings: Settings
    run: Result
    belady: Result
    perfect_prefetch: Result
    lru: Result
