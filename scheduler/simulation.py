"""Settings and results of a simulation: plain data."""

from __future__ import annotations

from dataclasses import dataclass

from moert.scheduler.precision import BitRouter


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a simulation.

    budget: bytes for experts. widths: those of the store. policy: see `POLICIES`. recalls: of the predictor, one
    for each layer ahead; none: nothing is predicted. ahead: bytes of prefetches that may be on their way at a time.
    sizes: bytes of each slice of an expert; empty: what the trace says at 4 bits, divided among the widths. router: of
    a store that knows the harm of each expert's widths. device_budget: bytes for experts in the device's memory (where
    that is the host's too, `budget` counts, and this says that the device computes); None: the host alone computes.
    hybrid: whether the host computes experts beside the device.
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
    device_budget: int | None = None
    hybrid: bool = True


@dataclass(frozen=True, slots=True)
class Result:
    """The results of a simulation, for the tokens decoded.

    hit_ratio: share of the uses of experts that found all slices in memory. stall_share: share of the time in which
    nothing computed. mean_width: bits, over uses of experts. mass_at_width: by width, the share of the router weight
    that was computed at it; 0: left out. bytes_moved_per_token: to a device. host_share: of the uses of experts, those
    that the host computed.
    """

    decode_tokens_per_s: float
    hit_ratio: float
    bytes_read_per_token: float
    bytes_prefetched_per_token: float
    stall_share: float
    mean_width: float
    mass_at_width: dict[int, float]
    bytes_moved_per_token: float = 0.0
    host_share: float = 1.0


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


@dataclass(frozen=True, slots=True)
class TieredSimulation:
    """The run as asked for, with a device beside the host, and beside it:

    device: without hybrid computing: the device computes every expert. host: the host alone computes, with the memory
    for experts that it has. resident: all experts lie in the device's memory.
    """

    settings: Settings
    run: Result
    device: Result
    host: Result
    resident: Result
