"""What lies in the memory of a device: how its budget is split, and what follows for the experts."""

# T tokens, K experts per token, D hidden, F expert inner size

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moert.budget import AUTO_SHARE, Sizes
from moert.config import PREFILL_CHUNK, EngineConfig, format_bytes
from moert.devices import this_machine
from moert.errors import BudgetError
from moert.runtime.device import Device, open_device
from moert.scheduler.assign import Pace
from moert.scheduler.capacity import slots_for
from moert.scheduler.precision import Precision
from moert.store.reader import Store

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class DeviceBudget:
    """How the memory of a device is split, in bytes; `total` is the promise.

    On an integrated device, whose memory is the host's, there is no arena of its own.
    """

    total: int
    dense: int
    kv_cache: int
    workspace: int
    arena: int
    automatic: bool

    def line(self) -> str:
        """The split, for people."""
        parts = ("dense", "kv_cache", "workspace", "arena")
        split = ", ".join(f"{name.replace('_', ' ')} {format_bytes(getattr(self, name))}" for name in parts)
        how = " (chosen: 80% of what is available, or all that the model can use)" if self.automatic else ""
        return f"device budget {format_bytes(self.total)}{how}: {split}"


@dataclass(frozen=True, slots=True)
class Offload:
    """A device with what it is to hold. slots: of its arena; None where host and device have one memory."""

    device: Device
    budget: DeviceBudget
    slots: tuple[int, ...] | None
    pace: Pace


def device_workspace_bytes(sizes: Sizes, ctx_size: int, sequences: int = 1) -> int:
    """Upper estimate of the temporary device memory of a pass through a layer's experts."""
    T, D, F = min(PREFILL_CHUNK, ctx_size) + sequences - 1, sizes.hidden_size, sizes.expert_inner
    # Inputs and sums, their 8-bit copies with scales, gate times up in float32 and in 8 bits, and lists of tokens.
    return T * (3 * 4 * D + 2 * D) + T * sizes.top_k * (6 * F + 32) + 8 * _MIB


def split_device(
    available: int, asked: int | None, dense: int, kv_cache: int, workspace: int, one_expert: int, all_experts: int
) -> DeviceBudget:
    """Split what the device may give: `asked` bytes, or, where None, a share of what is `available`.

    Raises BudgetError, with the least that would do, where it does not fit, and where more is asked than there is.
    """
    limit = int(available * AUTO_SHARE) if asked is None else asked
    fixed = dense + kv_cache + workspace
    least = fixed + one_expert
    origin = "80% of the device memory available," if asked is None else "The device budget"
    if limit < least:
        raise BudgetError(
            f"{origin} of {limit} bytes ({format_bytes(limit)}) is {format_bytes(least - limit)} too small: dense "
            f"weights {format_bytes(dense)}, KV cache {format_bytes(kv_cache)}, workspace {format_bytes(workspace)} "
            f"and one expert {format_bytes(one_expert)} need at least {least} bytes ({format_bytes(least)}); or use "
            "--device cpu.",
            least,
        )
    if limit > available:
        raise BudgetError(
            f"The device budget of {limit} bytes ({format_bytes(limit)}) is more than the device has left: "
            f"{available} bytes ({format_bytes(available)}); give a smaller --device-budget.",
            least,
        )
    arena = min(limit - fixed, all_experts)
    return DeviceBudget(fixed + arena if asked is None else limit, dense, kv_cache, workspace, arena, asked is None)


def plan_offload(
    store: Store,
    config: EngineConfig,
    precision: Precision,
    ctx_size: int,
    alive: int,
    on_status: Callable[[str], None],
) -> Offload | None:
    """The device that `config` asks for and what it is to hold; None without one.

    Raises DeviceError where it cannot be used, BudgetError where its memory does not suffice. What was found by itself
    and does not fit is not used, and says so.
    """
    device = open_device(config.device, on_status)
    if device is None:
        if config.device_budget is not None:
            on_status("warning: --device-budget does nothing: no device is used")
        return None
    try:
        return _place(device, store, config, precision, ctx_size, alive, on_status)
    except BudgetError as error:
        device.close()
        if config.device != "auto" or config.device_budget is not None:
            raise
        on_status(f"the GPU is not used: {error}")
        return None
    except BaseException:
        device.close()
        raise


def _place(
    device: Device,
    store: Store,
    config: EngineConfig,
    precision: Precision,
    ctx_size: int,
    alive: int,
    on_status: Callable[[str], None],
) -> Offload:
    layout, arch = store.layout, store.architecture
    most = precision.slices(layout.widths)
    profile, origin = this_machine()
    pace = Pace(profile, layout.widths, layout.slice_sizes, device.integrated)
    workspace = device_workspace_bytes(arch, ctx_size, alive)
    one, every = sum(layout.slice_sizes[:most]), store.experts_bytes(most)
    if device.integrated:
        one = every = 0  # they lie in the host's arena, which is the device's too
    budget = split_device(device.available_bytes(), config.device_budget, 0, 0, workspace, one, every)
    slots: tuple[int, ...] | None = None
    on_status(f"device: {device.name}; what computes where goes by {origin}")
    if not device.integrated:
        users = [store.experts_with(i) if i < most else 0 for i in range(layout.num_slices)]
        slots = slots_for(budget.arena, layout.slice_sizes, users, precision.shares(layout.widths))
        on_status(f"{budget.line()}; it holds {_share(slots, users)}")
    return Offload(device, budget, slots, pace)


def _share(slots: Sequence[int], users: Sequence[int]) -> str:
    return f"{slots[0]} of {users[0]} experts ({slots[0] / users[0]:.0%})"
