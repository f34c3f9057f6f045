"""One number for all memory: what it is split into, and the least that would do."""

# T tokens

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from moert.config import PREFILL_CHUNK, format_bytes
from moert.errors import BudgetError

_MIB = 1 << 20
AUTO_SHARE = 0.8  # of the memory available now, where no budget is given


class Sizes(Protocol):
    """The sizes on which the workspace depends, taken from an `Architecture` or a `ModelShape`."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def moe_layers(self) -> Sequence[int]: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def expert_inner(self) -> int: ...
    @property
    def widest_inner(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes that a model needs besides its expert arena, and what the arena can use.

    one_expert: the least arena. all_experts: more would be of no use.
    """

    libraries: int
    dense: int
    kv_cache: int
    workspace: int
    one_expert: int
    all_experts: int

    @property
    def fixed(self) -> int:
        return self.libraries + self.dense + self.kv_cache + self.workspace

    @property
    def least(self) -> int:
        return self.fixed + self.one_expert


@dataclass(frozen=True, slots=True)
class Budget:
    """A split of the memory, in bytes. `total` is the promise: peak resident memory stays below it."""

    total: int
    libraries: int
    dense: int
    kv_cache: int
    workspace: int
    arena: int
    automatic: bool

    def line(self) -> str:
        """The split, for people."""
        return f"memory budget {split_line(self, 'libraries', 'dense', 'kv_cache', 'workspace', 'arena')}"


class Split(Protocol):
    """A budget that is split; `automatic` where nobody gave it."""

    @property
    def total(self) -> int: ...
    @property
    def automatic(self) -> bool: ...


def split_line(split: Split, *names: str) -> str:
    """The total and the parts of these names, for people."""
    how = " (80% of the available memory, or less if the model cannot use it)" if split.automatic else ""
    parts = (f"{name.replace('_', ' ')} {format_bytes(getattr(split, name))}" for name in names)
    return f"{format_bytes(split.total)}{how}: {', '.join(parts)}"


def workspace_bytes(sizes: Sizes, ctx_size: int, sequences: int = 1) -> int:
    """Upper estimate of the temporary memory of a forward pass, and of sampling from its logits."""
    T = min(PREFILL_CHUNK, ctx_size) + sequences - 1
    q_size, kv_size = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    floats = T * (8 * sizes.hidden_size + 4 * q_size + 6 * kv_size + 4 * sizes.widest_inner)
    # Of the experts: a place per contribution and its ordered copy, inputs side by side in int8, gate and up.
    floats += T * sizes.top_k * (2 * sizes.hidden_size + sizes.hidden_size // 4 + 3 * sizes.expert_inner)
    floats += 2 * ctx_size * (kv_size + q_size)  # keys and values in float32, repeated for each query head
    floats += 2 * T * ctx_size  # masks
    floats += (10 + 2 * sequences) * sizes.vocab_size  # logits, and copies that sampling sorts
    # Routers at 4 bits, for looking ahead.
    floats += len(sizes.moe_layers) * sizes.num_experts * sizes.hidden_size // 7
    return 4 * floats + 16 * _MIB  # blocks of unpacked weights, and what the matrix library keeps


def split_budget(needs: Needs, memory_budget: int | None, expert_budget: int | None, available: int) -> Budget:
    """Split the memory allowed. Raises BudgetError, with the least that would do, where it does not fit.

    memory_budget: bytes for everything, None to choose by what is `available` beyond what is resident already.
    expert_budget: bytes of the arena alone; then the total is what that adds up to, checked against memory_budget.
    """
    if expert_budget is not None and expert_budget < needs.one_expert:
        raise BudgetError(
            f"An expert budget of {expert_budget} bytes ({format_bytes(expert_budget)}) holds no expert; the least "
            f"that would do is {needs.one_expert} bytes ({format_bytes(needs.one_expert)}).",
            needs.one_expert,
        )
    limit = memory_budget
    if limit is None:
        limit = needs.libraries + int(available * AUTO_SHARE)
    arena = min(expert_budget or needs.all_experts, needs.all_experts)
    if expert_budget is None:
        arena = min(arena, max(limit - needs.fixed, 0))
    least = needs.fixed + (arena if expert_budget is not None else needs.one_expert)
    if limit < least:
        short = format_bytes(least - limit)
        size = f"{limit} bytes ({format_bytes(limit)})"
        what = f"80% of the available memory, {size}," if memory_budget is None else f"The memory budget of {size}"
        raise BudgetError(
            f"{what} is {short} too small: libraries "
            f"{format_bytes(needs.libraries)}, dense weights {format_bytes(needs.dense)}, KV cache "
            f"{format_bytes(needs.kv_cache)}, workspace {format_bytes(needs.workspace)} and experts "
            f"{format_bytes(least - needs.fixed)} need at least {least} bytes ({format_bytes(least)}).",
            least,
        )
    total = memory_budget if memory_budget is not None else needs.fixed + arena
    return Budget(
        total, needs.libraries, needs.dense, needs.kv_cache, needs.workspace, arena, automatic=memory_budget is None
    )
