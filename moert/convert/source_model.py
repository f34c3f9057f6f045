"""A checkpoint seen as a model: which tensor is which, and one expert or some rows at a time.

Accepts experts as one tensor per matrix, and fused as [E, 2F, D] and [E, D, F].
"""

# E experts, D hidden, F expert inner size

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from moert.checkpoints.safetensors import Checkpoint, TensorInfo, torch_dtype
from moert.errors import CheckpointError
from moert.models import registry
from moert.models.architecture import Architecture
from moert.store.layout import EMBEDDING, HEAD, SAFETENSORS_DTYPES

CHUNK_ELEMENTS = 1 << 22  # rows of large matrices are read so many elements at a time: 16 MiB as float32


def row_chunks(shape: tuple[int, ...], multiple: int = 16) -> Iterator[tuple[int, int]]:
    """Ranges of rows, each a multiple of `multiple` but the last, that hold about CHUNK_ELEMENTS elements."""
    cols = max(1, torch.Size(shape[1:]).numel())
    step = max(multiple, CHUNK_ELEMENTS // cols // multiple * multiple)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


class SourceModel:
    """`architecture`, and the tensors of a checkpoint under their canonical names, all checked when it is opened."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.architecture: Architecture = registry.architecture(checkpoint.config)
        canonical_name = registry.family(self.architecture.model_type).canonical_name
        self._tensors: dict[str, TensorInfo] = {}
        for info in checkpoint.tensors.values():
            name = canonical_name(info.name)
            if name is None:
                continue
            if name in self._tensors:
                raise CheckpointError(
                    f"{info.file} has {info.name} although {self._tensors[name].name} means the same tensor."
                )
            self._tensors[name] = info
        self._check()

    @classmethod
    def open(cls, path: Path) -> SourceModel:
        """Raises CheckpointError or UnsupportedModelError with one sentence on what is wrong."""
        try:
            return cls(Checkpoint.open(path))
        except OSError as error:
            raise CheckpointError(f"Cannot read {error.filename or path}: {error.strerror}.") from error

    def _prefix(self, layer: int) -> str:
        return f"model.layers.{layer}.mlp.experts."

    def _fused(self, layer: int) -> bool:
        return self._prefix(layer) + "gate_up_proj" in self._tensors

    def _expert_shapes(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        arch, prefix = self.architecture, self._prefix(layer)
        E, D, F = arch.num_experts, arch.hidden_size, arch.expert_inner
        if self._fused(layer):
            yield prefix + "gate_up_proj", (E, 2 * F, D)
            yield prefix + "down_proj", (E, D, F)
            return
        for e in range(E):
            yield f"{prefix}{e}.gate_proj.weight", (F, D)
            yield f"{prefix}{e}.up_proj.weight", (F, D)
            yield f"{prefix}{e}.down_proj.weight", (D, F)

    def _check(self) -> None:
        expected = {name: spec.shape for name, spec in self.architecture.dense_tensors().items()}
        for layer in self.architecture.moe_layers:
            expected.update(self._expert_shapes(layer))
        for name, info in self._tensors.items():
            if name in expected:
                torch_dtype(info)
            elif name == HEAD and self.architecture.tie_word_embeddings and EMBEDDING in self._tensors:
                self._check_tied_head(info)
            else:
                raise CheckpointError(
                    f"{info.file} has a tensor {info.name} that a {self.architecture.model_type} model of this"
                    " configuration does not have: the model may be a variant that moert does not know."
                )
        for name, shape in expected.items():
            if name not in self._tensors:
                raise CheckpointError(f"Tensor {name} is missing in {self.checkpoint.path}.")
            info = self._tensors[name]
            if info.shape != tuple(shape):
                raise CheckpointError(
                    f"Tensor {info.name} in {info.file} has shape {list(info.shape)} where {list(shape)} is expected."
                )

    def _check_tied_head(self, head: TensorInfo) -> None:
        """A head stored beside a tied embedding is redundant; one that differs means that they are not tied."""
        embed = self._tensors[EMBEDDING]
        same = (head.shape, head.dtype) == (embed.shape, embed.dtype) and all(
            torch.equal(self.checkpoint.read(head, a, b), self.checkpoint.read(embed, a, b))
            for a, b in row_chunks(head.shape)
        )
        if not same:
            raise CheckpointError(
                f"{head.file} has a {head.name} that differs from {embed.name} although the configuration ties them:"
                " set tie_word_embeddings to false in config.json if they are not tied."
            )

    @property
    def expert_dtype(self) -> str:
        """The one dtype of all expert tensors ("bfloat16" ...), or "mixed"."""
        names = (name for layer in self.architecture.moe_layers for name, _ in self._expert_shapes(layer))
        dtypes = {SAFETENSORS_DTYPES[self._tensors[name].dtype] for name in names}
        return dtypes.pop() if len(dtypes) == 1 else "mixed"

    def dense_dtype(self, name: str) -> str:
        return SAFETENSORS_DTYPES[self._tensors[name].dtype]

    def dense(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop of a dense tensor, by its canonical name, in its own dtype."""
        return self.checkpoint.read(self._tensors[name], start, stop)

    def expert(self, layer: int, e: int) -> tuple[Tensor, Tensor, Tensor]:
        """gate [F, D], up [F, D] and down [D, F] of one expert, in their own dtype."""
        prefix, read = self._prefix(layer), self.checkpoint.read
        if self._fused(layer):
            gate_up = read(self._tensors[prefix + "gate_up_proj"], e, e + 1)[0]
            gate, up = gate_up.chunk(2, dim=0)
            return gate, up, read(self._tensors[prefix + "down_proj"], e, e + 1)[0]
        parts = (read(self._tensors[f"{prefix}{e}.{m}_proj.weight"]) for m in ("gate", "up", "down"))
        gate, up, down = parts
        return gate, up, down
