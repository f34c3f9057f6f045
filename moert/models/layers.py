"""Layers that all families share. Everything is computed in float32; raw weights are upcast exactly."""

# T tokens, D hidden, F inner size, N outputs, K inputs

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from moert.errors import CheckpointError
from moert.kernels import elementwise
from moert.models.architecture import Architecture
from moert.quant import matmul
from moert.quant.matmul import ACTIVATIONS, PackedMatrix, linear


class PlacedMatrix(Protocol):
    """A matrix that lies elsewhere and brings its own product; here only its shape counts."""

    @property
    def shape(self) -> tuple[int, ...]: ...


DenseTensors = Mapping[str, Tensor | PackedMatrix | PlacedMatrix]


def vector(dense: DenseTensors, name: str) -> nn.Parameter:
    """The one-dimensional tensor `name` in float32: small, so it is upcast once."""
    tensor = dense[name]
    assert isinstance(tensor, Tensor)
    return nn.Parameter(tensor.to(torch.float32), requires_grad=False)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, dense: DenseTensors, name: str, eps: float) -> None:
        super().__init__()
        self.weight = vector(dense, f"{name}.weight")
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return elementwise.rms_norm(x, self.weight, self.eps)


class Linear(nn.Module):
    """x [T, K] -> [T, N]; the weight is a tensor of any float dtype or a packed matrix."""

    weight: Tensor | PackedMatrix

    def __init__(self, dense: DenseTensors, name: str, bias: bool = False) -> None:
        super().__init__()
        weight = dense[f"{name}.weight"]
        # One that lies elsewhere is for subclasses that know it.
        self.weight = nn.Parameter(weight, requires_grad=False) if isinstance(weight, Tensor) else weight  # type: ignore[assignment]
        self.bias = vector(dense, f"{name}.bias") if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight)
        return y if self.bias is None else y + self.bias


def linear_many(x: Tensor, layers: Sequence[Linear]) -> list[Tensor]:
    """Apply several layers to the same x [T, K]; packed ones that are alike take it in one call."""
    packed = [layer.weight for layer in layers if isinstance(layer.weight, PackedMatrix)]
    if len(packed) < len(layers) or len({w.layout.group_size for w in packed}) > 1:
        return [layer(x) for layer in layers]
    outs = matmul.linear_many(x, packed)
    return [y if layer.bias is None else y.add_(layer.bias) for y, layer in zip(outs, layers, strict=True)]


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), [T, D] -> [T, D]; SwiGLU where the activation is silu."""

    linear: ClassVar[type[Linear]] = Linear

    def __init__(self, dense: DenseTensors, name: str, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate_proj = self.linear(dense, f"{name}.gate_proj")
        self.up_proj = self.linear(dense, f"{name}.up_proj")
        self.down_proj = self.linear(dense, f"{name}.down_proj")

    def forward(self, x: Tensor) -> Tensor:
        gate, up = linear_many(x, (self.gate_proj, self.up_proj))
        y: Tensor = self.down_proj(self.activation(gate) * up)
        return y


def check_tensors(arch: Architecture, dense: DenseTensors) -> None:
    """CheckpointError unless these are all tensors but the experts', in their shapes."""
    specs = arch.dense_tensors()
    for name in sorted(specs.keys() ^ dense.keys()):
        problem = "is missing" if name in specs else "does not belong to it"
        raise CheckpointError(
            f"The weights of this {arch.model_type} model do not match its configuration: {name} {problem}."
        )
    for name, spec in specs.items():
        if tuple(dense[name].shape) != spec.shape:
            shape = tuple(dense[name].shape)
            raise CheckpointError(f"The tensor {name} has the shape {shape}, but the configuration says {spec.shape}.")
