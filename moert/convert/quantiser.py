"""The protocol that chooses the codes of a conversion, and a quantiser that looks at the weights alone."""

# D hidden, E experts, F expert inner size, B widths

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from moert.convert.parallel import Workers
from moert.quant import nested
from moert.quant.format import LINEAR, ExpertLayout


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements of the experts of a layer. sensitivity and router_weights: see meta.py. usage: [E], the mean over
    all tokens of the square of the router weight that they give the expert, 0 where they are not routed to it.
    """

    sensitivity: list[list[float]]
    usage: list[float]
    router_weights: list[list[float]]


class Quantiser(Protocol):
    """Chooses the codes of experts. Results of one `name`, which is recorded in the store, must always be the same.

    Called in this order: `begin`; for each layer that is not finished yet, ascending, `prepare`, the call for each of
    its experts from several threads at once, `finish`; at last `dense`. What it keeps between runs is in `files`.
    """

    name: str
    files: Sequence[str]

    def code(self, widths: Sequence[int]) -> str:
        """Return how the codes that it chooses stand for weights, for a store of these widths: see quant/format.py."""
        ...

    def begin(self, folder: Path) -> None:
        """Start, or go on from what an earlier run left in `folder`, the folder of the conversion."""
        ...

    def prepare(self, layer: int, pool: Workers, report: Callable[[str], None]) -> None:
        """Before the experts of a layer; `report` is told a stage now and then where this takes long."""
        ...

    def __call__(
        self, layer: int, expert: int, gate: Tensor, up: Tensor, down: Tensor, layout: ExpertLayout
    ) -> Sequence[Tensor]:
        """The slices of one expert, uint8 [layout.slice_sizes[i]]. gate, up: [F, D]; down: [D, F].

        Raises ValueError for weights that cannot be stored.
        """
        ...

    def finish(self, layer: int) -> Measured | None:
        """After the experts of the layer that was prepared; what it knows of them."""
        ...

    def dense(self, name: str, start: int, weights: Tensor) -> Tensor:
        """Return what is stored instead of rows `start` ... of a dense tensor: of the same shape and dtype."""
        ...


class RoundToNearest:
    """Codes from the weights alone, with a search of the clipping range."""

    name = "round-to-nearest"
    files: Sequence[str] = ()

    def code(self, widths: Sequence[int]) -> str:
        return LINEAR

    def begin(self, folder: Path) -> None:
        pass

    def prepare(self, layer: int, pool: Workers, report: Callable[[str], None]) -> None:
        pass

    def __call__(
        self, layer: int, expert: int, gate: Tensor, up: Tensor, down: Tensor, layout: ExpertLayout
    ) -> Sequence[Tensor]:
        return nested.pack_expert(gate, up, down, layout)

    def finish(self, layer: int) -> Measured | None:
        return None

    def dense(self, name: str, start: int, weights: Tensor) -> Tensor:
        return weights
