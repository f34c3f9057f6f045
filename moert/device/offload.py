"""Decide what lies in the memory of a device: how its budget is split, and what follows for the experts."""

# T tokens, D hidden, F expert inner size

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch

from moert.config import PREFILL_CHUNK, EngineConfig, format_bytes
from moert.device.backend import Device, open_device
from moert.device.dense_quant import check_quant
from moert.device.matrix import DenseQuant
from moert.device.placement import NOTHING, Placement, place
from moert.errors import BudgetError, DeviceError
from moert.hardware.devices import this_machine
from moert.models.stored_model import StoredModel as Store
from moert.runtime.budget import AUTO_SHARE, Sizes, split_line
from moert.scheduler.assign import CostModel
from moert.scheduler.capacity import slots_for
from moert.scheduler.precision import Precision

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class DeviceBudget:
    """A split of the memory of a device, in bytes; `total` is the promise. overhead: what the device takes by itself.

    On an integrated device, whose memory is the host's, there is no arena of its own.
    """

    total: int
    overhead: int
    dense: int
    kv_cache: int
    workspace: int
    arena: int
    automatic: bool

    def line(self) -> str:
        """The split, for people."""
        return f"device budget {split_line(self, 'overhead', 'dense', 'kv_cache', 'workspace', 'arena')}"


@dataclass(frozen=True, slots=True)
class Offload:
    """A device with what it is to hold. slots: of its arena; None where host and device have one memory."""

    device: Device
    budget: DeviceBudget
    slots: tuple[int, ...] | None
    cost_model: CostModel
    placement: Placement
    dense_quant: str

    def line(self, positions: int) -> str:
        """Describe what is on the device besides experts, for people, where the KV cache has so many positions."""
        if not self.placement.any:
            why = "" if self.dense_quant == "off" else ": --device-budget has no room for a layer and its workspace"
            return f"on the device: experts alone{why}"
        kind = f"{self.dense_quant} bits" if self.dense_quant == "16" else self.dense_quant.upper()
        return f"on the device besides experts, in {kind}: {self.placement.line(positions)}"

    @property
    def shared_bytes(self) -> tuple[int, int, int]:
        """Dense weights, KV cache and workspace that the device holds in the host's memory."""
        budget = self.budget
        return (budget.dense, budget.kv_cache, budget.workspace) if self.device.integrated else (0, 0, 0)


@dataclass(frozen=True, slots=True)
class OffloadRequest:
    """A description of what is to be run. positions: of the KV cache, for the `alive` sequences together. shared_room:
    of the host's memory, what is left for a device that has no other, given whether it compiles its kernels.
    """

    store: Store
    config: EngineConfig
    precision: Precision
    positions: int
    alive: int
    kv_dtype: torch.dtype
    shared_room: Callable[[bool], int]


def expert_workspace_bytes(sizes: Sizes, positions: int, sequences: int) -> int:
    """Upper estimate of the temporary device memory that a layer's experts take."""
    T, D, F = min(PREFILL_CHUNK, positions) + sequences - 1, sizes.hidden_size, sizes.expert_inner
    # Inputs and sums, their 8-bit copies with scales, gate times up in float32 and in 8 bits, and lists of tokens.
    return T * (3 * 4 * D + 2 * D) + T * sizes.top_k * (6 * F + 32) + 8 * _MIB


def plan_offload(run: OffloadRequest, on_status: Callable[[str], None]) -> Offload | None:
    """The device that is asked for and what it is to hold; None without one.

    Raises DeviceError where it cannot be used, or not for these experts, BudgetError where its memory does not suffice,
    UsageError where a kind of dense weights needs what is not installed. What was found by itself and will not do is
    not used, and that is said.
    """
    config = run.config
    device = open_device(config.device, on_status)
    if device is None:
        if config.device_budget is not None:
            on_status("warning: --device-budget has no effect, since no device is used")
        return None
    try:
        return _planned(device, run, on_status)
    except (BudgetError, DeviceError) as error:
        device.close()
        if config.device != "auto" or config.device_budget is not None:
            raise
        on_status(f"warning: the GPU is not used: {error}")
        return None
    except BaseException:
        device.close()
        raise


def _planned(device: Device, run: OffloadRequest, on_status: Callable[[str], None]) -> Offload:
    config, layout, arch = run.config, run.store.layout, run.store.architecture
    # Whether there are kernels for them, before anything is taken.
    device.experts(layout, arch.hidden_act, torch.empty(0, dtype=torch.uint8, device=device.torch_device))
    most = run.precision.slices(layout.widths)
    profile, origin = this_machine()
    cost_model = CostModel(profile, layout.widths, layout.slice_sizes, device.integrated)
    limit = _limit(device, config.device_budget, run.shared_room)  # only now that its libraries are loaded
    workspace = expert_workspace_bytes(arch, run.positions, run.alive)
    # With less than the experts of a token on the device, it would compute nothing before it is moved.
    least = 0 if device.integrated else arch.top_k * sum(layout.slice_sizes[:most])
    fits = limit - workspace - least
    if fits < 0 and not device.integrated:  # the memory budget says so there
        raise BudgetError(
            f"The device budget of {limit} bytes ({format_bytes(limit)}) is {format_bytes(-fits)} too small: workspace "
            f"{format_bytes(workspace)} and the experts of a token {format_bytes(least)} need at least "
            f"{workspace + least} bytes ({format_bytes(workspace + least)}); or use --device cpu.",
            workspace + least,
        )
    placement = NOTHING
    if config.dense_quant != "off":
        quant = cast(DenseQuant, config.dense_quant)
        check_quant(quant)
        known = None if device.integrated else profile  # in one memory nothing is gained by leaving keys to the host
        placement = place(
            arch,
            quant,
            max(fits, 0),
            run.positions,
            run.kv_dtype,
            device.torch_device,
            profile=known,
            sequences=run.alive,
        )
    every = 0 if device.integrated else run.store.experts_bytes(most)
    arena = min(limit - workspace - placement.device_bytes, every)
    used = device.overhead_bytes + workspace + placement.device_bytes + arena
    budget = DeviceBudget(
        config.device_budget or used,
        device.overhead_bytes,
        placement.dense_bytes,
        placement.kv_bytes,
        workspace + placement.workspace_bytes,
        arena,
        config.device_budget is None,
    )
    device.limit(budget.total)
    on_status(f"device: {device.name}; work is divided by {origin}")
    slots = None
    if device.integrated:
        on_status("device and host share one memory: the memory budget covers both")
    else:
        users = [run.store.experts_with(i) if i < most else 0 for i in range(layout.num_slices)]
        slots = slots_for(arena, layout.slice_sizes, users, run.precision.shares(layout.widths))
        share = f"{slots[0]} of {users[0]} experts ({slots[0] / users[0]:.0%})"
        on_status(f"{budget.line()}; the device has room for {share}")
    found = Offload(device, budget, slots, cost_model, placement, config.dense_quant)
    on_status(found.line(run.positions))
    return found


def _limit(device: Device, asked: int | None, shared_room: Callable[[bool], int]) -> int:
    """Return how much of the device's memory may be used, without what it takes by itself. BudgetError where that is
    too much.
    """
    available = shared_room(device.compiles) if device.integrated else device.available_bytes()
    if asked is None:
        return available if device.integrated else int(available * AUTO_SHARE)
    if asked - device.overhead_bytes > available:
        raise BudgetError(
            f"The device budget of {asked} bytes ({format_bytes(asked)}) is more than the device has left, "
            f"{available} bytes ({format_bytes(available)}): give a smaller --device-budget.",
            0,
        )
    return max(asked - device.overhead_bytes, 0)
