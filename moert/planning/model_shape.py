"""The sizes of a model, from which is worked out what it needs and how fast it would be: no weights are read.

Of a store they stand in moert.json. Of a checkpoint, whether it lies in a folder or on the hub, they are what a
conversion with the settings given would write, worked out from config.json and the headers of the safetensors files.
"""

# L layers, E experts, D hidden, F expert inner size

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moert.checkpoints.safetensors import Checkpoint
from moert.convert.plan import ConversionPlan, check_settings
from moert.convert.source_model import SourceModel
from moert.errors import UnsupportedModelError
from moert.hub.headers import find_known, from_hub, known_model
from moert.hub.resolve import Conversion, Status, checkpoint, downloaded, find, is_hub_id
from moert.models.architecture import Architecture, kv_bytes
from moert.models.stored_model import StoredModel
from moert.planning.unsupported_model import UnsupportedModel
from moert.quant.format import KEY_BLOCK, LINEAR, RAW_WIDTH, ExpertLayout, align, calibrated_code
from moert.runtime.budget import Needs, workspace_bytes
from moert.scheduler.precision import BitRouter
from moert.store.layout import EMBEDDING, DenseTensor, ExpertFile, build_header, stored_dense


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a model. All bytes are those of a store in these widths, group size and dense bits.

    origin: where the figures come from, for people. why_not: why moert cannot run it, a sentence; empty where it can.
    moe_layers: indices of the layers with experts. widest_inner: the largest inner size of any expert or MLP.
    kv_vectors, kv_vector_size: a position takes so many vectors of so many numbers in the KV cache, over all layers.
    slice_bytes: of one expert, each slice. slice_counts: how many experts, over all layers, have each slice.
    dense_bytes: by layer, all that is resident of it, which every token reads. head_bytes: final norm and head, read by
    every token too. embedding_bytes: resident, but a token reads one row; 0 where it is the head. store_bytes: of the
    files with weights; tokenizer and moert.json come on top. parameters: of the whole model.
    losses: width -> nats per token that the conversion of the store measured, if it did.
    calibrated: the store knows how sensitive its experts are, which `routed` precision wants, or would know it if the
    checkpoint was converted. router: what it knows.
    """

    name: str
    model_type: str
    origin: str
    why_not: str = ""
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    expert_inner: int
    widest_inner: int
    vocab_size: int
    max_position_embeddings: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_vectors: int
    kv_vector_size: int
    widths: tuple[int, ...]
    group_size: int
    slice_bytes: tuple[int, ...]
    slice_counts: tuple[int, ...]
    dense_bits: int
    dense_bytes: tuple[int, ...]
    head_bytes: int
    embedding_bytes: int
    store_bytes: int
    parameters: int
    calibrated: bool = False
    router: BitRouter | None = field(default=None, repr=False, compare=False)
    losses: Mapping[int, float] | None = field(default=None, compare=False)

    @property
    def runnable(self) -> bool:
        return not self.why_not

    @property
    def active_parameters(self) -> int:
        """Parameters without those of the experts that a token is not routed to."""
        idle = len(self.moe_layers) * (self.num_experts - self.top_k)
        return self.parameters - 3 * idle * self.hidden_size * self.expert_inner

    @property
    def resident_bytes(self) -> int:
        """Return the bytes of all weights but the experts."""
        return sum(self.dense_bytes) + self.head_bytes + self.embedding_bytes

    def slices_for(self, width: int) -> int:
        """Return how many slices `width` needs. ValueError for a width that is not among `widths`."""
        return self.widths.index(width) + 1

    def expert_bytes(self, slices: int) -> int:
        """Bytes of the first `slices` slices of one expert."""
        return sum(self.slice_bytes[:slices])

    def experts_bytes(self, slices: int) -> int:
        """Return the bytes of the first `slices` slices of all experts, so far as they have them."""
        return sum(size * n for size, n in zip(self.slice_bytes[:slices], self.slice_counts, strict=False))

    def kv_bytes_per_position(self, kv_bits: int | None = None) -> int:
        """Bytes of a position in the KV cache over all layers, at 8 or 16 bits; None: as the engine chooses."""
        lossless = self.widths == (RAW_WIDTH,) and self.dense_bits == RAW_WIDTH
        return kv_bytes(self.kv_vectors, self.kv_vector_size, kv_bits or (32 if lossless else 16))

    def workspace_bytes(self, ctx_size: int, sequences: int = 1) -> int:
        """Upper estimate of the temporary memory of a forward pass."""
        return workspace_bytes(self, ctx_size, sequences)

    def needs(self, libraries: int, ctx_size: int, slices: int, kv_bits: int | None = None) -> Needs:
        """Return what an engine for one sequence needs; libraries: bytes of interpreter and libraries."""
        stored = [size for size, n in zip(self.slice_bytes[:slices], self.slice_counts, strict=False) if n]
        return Needs(
            libraries=libraries,
            dense=self.resident_bytes,
            kv_cache=align(ctx_size, KEY_BLOCK) * self.kv_bytes_per_position(kv_bits),
            workspace=self.workspace_bytes(ctx_size),
            one_expert=sum(stored),
            all_experts=self.experts_bytes(slices),
        )


def read_shape(
    model: str | Path | None, conversion: Conversion, *, offline: bool = False, on_status: Status = lambda text: None
) -> ModelShape:
    """The sizes of what `-m` may name, None for the model that ships; no weights are read or downloaded.

    Of a few public models, by hub id, NAME or `known:NAME`, the sizes come with moert; of others on the hub config.json
    and headers are read. conversion: settings for what is not converted yet; a store keeps its own. Raises StoreError,
    CheckpointError, UnsupportedModelError (no experts), UsageError (settings).
    """
    if store := find(model, conversion):
        return store_shape(store)
    assert model is not None
    name = str(model)
    folder = Path(name).expanduser()
    if not folder.exists():
        if known := find_known(name):
            return checkpoint_shape(known_model(known), conversion, known, "known sizes")
        if is_hub_id(name) and not offline:
            on_status(f"Reading the headers of {name} on the Hugging Face hub (no weights are downloaded).")
            return checkpoint_shape(from_hub(name), conversion, name, "headers on the hub")
        folder = downloaded(name) if is_hub_id(name) else folder
    return checkpoint_shape(Checkpoint.open(checkpoint(folder)), conversion, name, "checkpoint folder")


def store_shape(path: Path) -> ModelShape:
    """Return the sizes of a store. Raises StoreError where it is damaged, UnsupportedModelError."""
    store = StoredModel.open(path)
    router = store.bit_router()
    return _shape(
        store.architecture,
        store.meta.dense,
        name=store.meta.source_name,
        origin="store",
        widths=store.meta.widths,
        group_size=store.meta.group_size,
        slice_bytes=store.layout.slice_sizes,
        dense_bits=store.meta.dense_bits,
        store_bytes=sum(file.size for file in store.meta.weights.values()),
        counts=[count for counts in store.kept.values() for count in counts],
        calibrated=store.meta.quantiser.startswith("calibrated"),
        losses=dict(zip(store.meta.widths, store.meta.kl, strict=True)) if store.meta.kl else None,
        router=router,
    )


def checkpoint_shape(source: Checkpoint, settings: Conversion, name: str, origin: str) -> ModelShape:
    """Return the sizes of a checkpoint as it would be converted, from names, types and shapes of its tensors."""
    widths = check_settings(settings.most_widths, settings.group_size, settings.dense_bits)
    code = calibrated_code(widths) if settings.calibrated else LINEAR
    arch: Architecture | UnsupportedModel
    try:
        model = SourceModel(source)
    except UnsupportedModelError as error:
        arch, why_not = UnsupportedModel(name, source.config, source.tensors.values()), str(error)
        layout = ExpertLayout(arch.hidden_size, arch.expert_inner, settings.group_size, widths, code=code)
        slice_bytes = arch.slice_sizes(layout)
        dense = stored_dense(arch.dense_tensors(), arch.dense_dtype, settings.group_size, settings.dense_bits)
        biases = arch.num_experts * (sum(slice_bytes) - sum(layout.slice_sizes))
        files = (ExpertFile(layer, arch.num_experts, layout).size + biases for layer in arch.moe_layers)
        store_bytes = len(build_header(t.entry for t in dense)) + sum(t.nbytes for t in dense) + sum(files)
    else:
        plan = ConversionPlan(model, widths, settings.group_size, settings.dense_bits, "", name, code=code)
        arch, why_not, dense = model.architecture, "", plan.dense
        slice_bytes, store_bytes = plan.layout.slice_sizes, plan.total_bytes
    return _shape(
        arch,
        dense,
        name=name,
        origin=origin,
        why_not=why_not,
        widths=widths,
        group_size=settings.group_size,
        slice_bytes=slice_bytes,
        dense_bits=settings.dense_bits,
        store_bytes=store_bytes,
        counts=[len(widths)] * len(arch.moe_layers) * arch.num_experts,
        calibrated=settings.calibrated,
    )


def _shape(
    arch: Architecture | UnsupportedModel,
    dense: Sequence[DenseTensor],
    *,
    name: str,
    origin: str,
    why_not: str = "",
    widths: tuple[int, ...],
    group_size: int,
    slice_bytes: tuple[int, ...],
    dense_bits: int,
    store_bytes: int,
    counts: Sequence[int],
    calibrated: bool,
    router: BitRouter | None = None,
    losses: Mapping[int, float] | None = None,
) -> ModelShape:
    """counts: of every expert of every layer, how many slices it has."""
    by_layer, ends, embedding = [0] * arch.num_layers, 0, 0
    for tensor in dense:
        if tensor.name.startswith("model.layers."):
            by_layer[int(tensor.name.split(".")[2])] += tensor.nbytes
        elif tensor.name == EMBEDDING and not arch.tie_word_embeddings:
            embedding = tensor.nbytes
        else:
            ends += tensor.nbytes
    weights = 3 * arch.hidden_size * arch.expert_inner + (
        arch.bias_elements if isinstance(arch, UnsupportedModel) else 0
    )
    return ModelShape(
        name=name,
        model_type=arch.model_type,
        origin=origin,
        why_not=why_not,
        num_layers=arch.num_layers,
        moe_layers=arch.moe_layers,
        num_experts=arch.num_experts,
        top_k=arch.top_k,
        hidden_size=arch.hidden_size,
        expert_inner=arch.expert_inner,
        widest_inner=arch.widest_inner,
        vocab_size=arch.vocab_size,
        max_position_embeddings=arch.max_position_embeddings,
        num_heads=arch.num_heads,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        kv_vectors=arch.kv_vectors,
        kv_vector_size=arch.kv_vector_size,
        widths=widths,
        group_size=group_size,
        slice_bytes=slice_bytes,
        slice_counts=tuple(sum(n > i for n in counts) for i in range(len(widths))),
        dense_bits=dense_bits,
        dense_bytes=tuple(by_layer),
        head_bytes=ends,
        embedding_bytes=embedding,
        store_bytes=store_bytes,
        parameters=len(counts) * weights + sum(math.prod(tensor.shape) for tensor in dense),
        calibrated=calibrated,
        losses=losses,
        router=router,
    )
