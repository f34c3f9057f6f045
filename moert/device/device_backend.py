"""The protocol by which a model uses the device that some of its layers are on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class DeviceBackend(Protocol):
    """A device, as torch computes on it; `moert.device.backend` has them."""

    torch_device: torch.device

    def allocate(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] of its memory that begin on a page. Raises DeviceError where there is not so much."""

    def send(self, x: Tensor) -> Tensor:
        """x of the host on the device; for what is computed behind it."""

    def fetch(self, x: Tensor) -> Tensor:
        """x of the device on the host, once it is computed."""

    def record(self, function: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        """`function`, which reads and writes tensors that stay where they are, for many calls.

        Where the device can record what it launches, and that is faster, it is done again from the record: what comes
        back are the same tensors each time, valid until the next call. It may be called several times here.
        """
