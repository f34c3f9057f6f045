"""Puts store, budget, experts and model together: tokens in, logits out."""

# T tokens, V vocabulary, D hidden, H query heads, J key/value heads, R sequences

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import cast

import psutil
import torch
from torch import Tensor

from moert.config import AUTO_BATCH, DEFAULT_CTX_SIZE, PREFILL_CHUNK, EngineConfig
from moert.device.decoder import PlacedDecoder
from moert.device.dense_quant import host_dense_bytes, load_dense
from moert.device.hybrid import HybridRunner
from moert.device.kv_memory import SplitKVMemory
from moert.device.matrix import DenseQuant
from moert.device.offload import Offload, OffloadRequest, plan_offload
from moert.engine.sequence_cache import Slots
from moert.errors import BudgetError, StoreError, UsageError
from moert.hardware.allocator import keep_freed_memory
from moert.hardware.memory import available_bytes, library_bytes
from moert.models.decoder import Decoder
from moert.models.kv_cache import KVCache, KVMemory
from moert.models.stored_model import StoredModel as Store
from moert.quant.dispatch import choose_kernel, kernel_name, set_num_threads
from moert.quant.format import KEY_BLOCK, align
from moert.quant.matmul import FEW_TOKENS
from moert.runtime.budget import AUTO_SHARE, Budget, Needs, split_budget, workspace_bytes
from moert.runtime.executor import ExpertRunner, Policies
from moert.runtime.telemetry import Counters
from moert.runtime.timeline import Spans
from moert.runtime.transfer import direct_io_works
from moert.runtime.warm import read_memory, write_memory
from moert.scheduler.batching import most_alive
from moert.scheduler.capacity import slots_for
from moert.scheduler.precision import ElasticPrecision, Precision, RoutedPrecision, parse_precision
from moert.scheduler.predictor import Mixed, PathWeights, Predictor, make_predictor
from moert.store.fileio import readable
from moert.store.predictor import read_predictor


def default_threads() -> int:
    """Physical cores that this process may use: a second thread of a core adds nothing to these kernels."""
    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(logical, psutil.cpu_count(logical=False) or logical))


def read_precision(text: str | None, store: Store) -> Precision:
    """The precision that `text` names, None the widest stored. UsageError where the store does not have it."""
    try:
        # What was trained has no exponent 2: the bound of elastic precision sums up squared errors.
        kind = None if text is None else text.partition(":")[0]
        router = store.bit_router(trained=kind == "routed") if kind in ("routed", "elastic") else None
        return parse_precision(text, store.layout.widths, router)
    except ValueError as error:
        raise UsageError(f"{error}.") from None


def say_what_is_kept(store: Store, slices: int, on_status: Callable[[str], None]) -> None:
    """Say it where experts have fewer than the `slices` that are asked for."""
    if min(map(min, store.kept.values())) < slices:
        on_status(f"the store was made with --max-size: its experts have {store.kept_widths()}")


def needs_of(
    store: Store,
    kv_bits: int | None,
    ctx_size: int,
    slices: int,
    libraries: int,
    batch_size: int | None = 1,
    alive: int = 1,
    offload: Offload | None = None,
) -> Needs:
    """What an engine with this context needs whose experts have up to `slices` slices, for `alive` sequences.

    Of host memory, where some of it is on a device.
    """
    arch, contexts, kv_dtype = store.architecture, batch_size or 1, _kv_dtype(store, kv_bits)
    dense, kv_cache = store.dense_bytes, contexts * KVCache.bytes_for(arch, ctx_size, kv_dtype)
    shared = 0, 0, 0
    if offload is not None:
        placed, shared = offload.placement, offload.shared_bytes
        dense = host_dense_bytes(store, placed)
        positions = contexts * align(ctx_size, KEY_BLOCK)
        kv_cache = SplitKVMemory.host_bytes_for(arch, positions, kv_dtype, placed.layers, placed.kv_positions)
    return Needs(
        libraries=libraries,
        dense=dense + shared[0],
        kv_cache=kv_cache + shared[1],
        workspace=workspace_bytes(arch, ctx_size, alive) + shared[2],
        one_expert=sum(size for i, size in enumerate(store.layout.slice_sizes[:slices]) if store.experts_with(i)),
        all_experts=store.experts_bytes(slices),
    )


class Engine:
    """A loaded model with its KV cache: a single sequence, computed in chunks, or several by way of `slots`.

    `tokens` are those in the KV cache. Raises BudgetError where memory does not suffice, UsageError for settings that
    do not fit the model, StoreError where the store is damaged.
    """

    def __init__(self, store: Store, config: EngineConfig, on_status: Callable[[str], None]) -> None:
        arch = store.architecture
        try:
            choose_kernel()
        except ValueError as error:
            raise UsageError(f"{error}.") from None
        self.precision, policies = read_precision(config.precision, store), _policies(config)
        self.ctx_size = config.ctx_size or min(DEFAULT_CTX_SIZE, arch.max_position_embeddings)
        self.batch_size = config.batch_size or AUTO_BATCH
        self.token_scheduler, self.hybrid = "first-come", config.hybrid
        self.threads = config.threads or default_threads()
        set_num_threads(self.threads)
        keep_freed_memory()
        self._widths = store.layout.widths
        slices = self.precision.slices(self._widths)
        alive = most_alive(self.batch_size, self.token_scheduler)
        positions = align(self.ctx_size, KEY_BLOCK) * (config.batch_size or 1)
        kv_dtype = _kv_dtype(store, config.kv_bits)
        shared = functools.partial(self._shared_room, store, config, slices, alive)
        run = OffloadRequest(store, config, self.precision, positions, alive, kv_dtype, shared)
        self.offload = plan_offload(run, on_status)
        with ExitStack() as undo:  # what is open goes on being so only if all goes well
            if self.offload is not None:
                undo.callback(self.offload.device.close)
            self.budget = self._split(store, config, slices)
            num_experts = len(store.moe_layers) * store.num_experts
            users = [store.experts_with(i) if i < slices else 0 for i in range(store.layout.num_slices)]
            slots = slots_for(self.budget.arena, store.layout.slice_sizes, users, self.precision.shares(self._widths))
            self.resident_share = slots[0] / num_experts
            self._describe(store, config, slots[0], num_experts, on_status)
            self._store, self._most_slices = store, slices
            predictor = self._predictor(store, on_status) if slots[0] < num_experts else None
            compiles = self.offload is not None and self.offload.device.compiles
            if compiles:
                on_status("compiling the kernels of the device: takes some seconds, and more the first time")
            self._runner = self._make_runner(store, slots, policies, predictor)
            undo.pop_all()
            undo.callback(self._runner.close)
            self._decoder, self._memory = self._load(store, config, positions, kv_dtype)
            if isinstance(self._runner, HybridRunner) and compiles:
                self._runner.prepare()
            if slots[0] < num_experts:
                self._decoder.watch(self._runner)
            self._cache = KVCache(arch, self.ctx_size, self._memory.dtype, self._memory)
            self._most_alive = alive
            # Raw weights meet many tokens through torch, whose sums then depend on how many there are.
            self._most_together = FEW_TOKENS - 1 if store.layout.raw else math.inf
            self.tokens: list[int] = []
            undo.pop_all()

    def _make_runner(
        self, store: Store, slots: Sequence[int], policies: Policies, predictor: Predictor | None
    ) -> ExpertRunner | HybridRunner:
        activation, offload = store.architecture.hidden_act, self.offload
        if offload is None:
            return ExpertRunner(store, slots, self.precision, activation, policies, predictor)
        return HybridRunner(
            store, slots, self.precision, activation, policies, predictor,
            device=offload.device, device_slots=offload.slots, cost_model=offload.cost_model, hybrid=self.hybrid,
        )  # fmt: skip

    def _load(
        self, store: Store, config: EngineConfig, positions: int, kv_dtype: torch.dtype
    ) -> tuple[Decoder, KVMemory]:
        """The dense part and the KV cache, where they are to lie."""
        arch, offload = store.architecture, self.offload
        if offload is None or not offload.placement.any:
            return Decoder(arch, store.load_dense(), self._runner), KVMemory(arch, positions, kv_dtype)
        placed, device = offload.placement, offload.device
        with device.guard():
            dense = load_dense(store, placed, device, cast(DenseQuant, config.dense_quant))
            decoder = PlacedDecoder(arch, dense, self._runner, placed.layers, placed.head, device)
            decoder.prepare()
            return decoder, SplitKVMemory(arch, positions, kv_dtype, placed.layers, placed.kv_positions, device)

    def _shared_room(self, store: Store, config: EngineConfig, slices: int, alive: int, compiles: bool) -> int:
        """Of the host's memory, what is left for a device that has no other, if all dense weights go there."""
        libraries, available = library_bytes(compiles), available_bytes()
        needs = needs_of(store, config.kv_bits, self.ctx_size, slices, libraries, config.batch_size, alive)
        limit = config.memory_budget or libraries + int(available * AUTO_SHARE)
        return limit - libraries - needs.workspace - store.architecture.top_k * needs.one_expert

    @staticmethod
    def _predictor(store: Store, on_status: Callable[[str], None]) -> Predictor | None:
        """The store's trained predictor of routes with what the routers themselves say, if it has one."""
        found = read_predictor(store)
        if found is None:
            return None
        on_status("prefetch: by the predictor that moert train-predictor trained")
        arch = store.architecture
        weights = PathWeights(**found.tensors)
        return make_predictor(Mixed.name, store.moe_layers, store.num_experts, arch.top_k, weights)

    def _split(self, store: Store, config: EngineConfig, slices: int) -> Budget:
        compiles = self.offload is not None and self.offload.device.compiles
        libraries, available = library_bytes(compiles), available_bytes()

        def split(ctx_size: int, slices: int, batch_size: int | None = config.batch_size) -> Budget:
            alive = most_alive(batch_size or AUTO_BATCH, self.token_scheduler)
            needs = needs_of(store, config.kv_bits, ctx_size, slices, libraries, batch_size, alive, self.offload)
            return split_budget(needs, config.memory_budget, config.expert_budget, available)

        try:
            return split(self.ctx_size, slices)
        except BudgetError as error:
            advice = []
            fewer = (count for count in range((config.batch_size or 1) - 1, 0, -1))
            if found := next((n for n in fewer if _fits(split, self.ctx_size, slices, n)), None):
                advice.append(f"--batch-size {found}")
            for ctx_size in (c for c in (8192, 4096, 2048, 1024, 512, 256) if c < self.ctx_size):
                if _fits(split, ctx_size, slices):
                    advice.append(f"--ctx-size {ctx_size}")
                    break
            for count in range(slices - 1, 0, -1):
                if _fits(split, self.ctx_size, count):
                    advice.append(f"--precision fixed:{store.layout.widths[count - 1]}")
                    break
            hint = f" {' or '.join(advice)} would fit." if advice else " No smaller context or width alone would fit."
            raise BudgetError(f"{error}{hint}", error.least_bytes) from None

    def _describe(
        self, store: Store, config: EngineConfig, slots: int, num_experts: int, on_status: Callable[[str], None]
    ) -> None:
        chosen = []
        if config.precision is None:
            chosen.append(f"precision {self.precision} (widest stored)")
        elif isinstance(self.precision, RoutedPrecision):
            how = "trained bit router" if self.precision.router.trained else "thresholds on the router's weights"
            chosen.append(f"precision {self.precision} ({how})")
        elif isinstance(self.precision, ElasticPrecision):
            how = "depends on what is in memory: the same prompt and seed can give another text"
            chosen.append(f"precision {self.precision} ({how})")
        if config.ctx_size is None:
            chosen.append(f"context {self.ctx_size}")
        if config.threads is None:
            chosen.append(f"{self.threads} threads")
        if chosen:
            on_status(f"chosen: {', '.join(chosen)}, kernel {kernel_name()}")
        if self.ctx_size > store.architecture.max_position_embeddings:
            trained = store.architecture.max_position_embeddings
            on_status(f"warning: the context of {self.ctx_size} exceeds the {trained} that the model was trained for")
        say_what_is_kept(store, self.precision.slices(store.layout.widths), on_status)
        on_status(self.budget.line())
        share = f"{slots} of {num_experts} experts ({slots / num_experts:.0%})"
        if slots < num_experts:
            where = "O_DIRECT" if direct_io_works(store.location(store.moe_layers[0], 0).file) else "buffered reads"
            on_status(f"expert arena holds {share}; the others are read from disk when needed ({where})")
        else:
            on_status(f"expert arena holds all {num_experts} experts")

    @property
    def counters(self) -> Counters:
        return self._runner.counters

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits per weight that the store has its experts at."""
        return self._widths

    def layer_counters(self, decoding: bool) -> dict[int, Counters]:
        """The same for each layer with experts, of decoding or of prompts."""
        return self._runner.layer_counters(decoding)

    def foresight(self) -> str:
        """What looking ahead came to, in a line; empty where nobody looked."""
        return self._runner.lookahead.line()

    def counted(self, decoding: bool, count: int, first: int | None = None) -> AbstractContextManager[object]:
        """Around a pass of `count` tokens, from position `first` on or of several sequences: what it is counted as."""
        return self._runner.begin(decoding, count, first)

    def draw(self, timeline: Spans | None) -> None:
        """Draw from now on what happens; whoever gives the timeline closes it."""
        self._runner.telemetry.timeline = timeline

    @property
    def decoder(self) -> Decoder:
        """The model, for hooks that look into it."""
        return self._decoder

    def use(self, precision: Precision) -> None:
        """Compute at another precision from now on: UsageError for a wider one than the engine was opened with."""
        if precision.slices(self._widths) > self._most_slices:
            raise UsageError(f"The memory was split for {self.precision}: {precision} needs more.")
        self._runner.use(precision)
        self.precision = precision

    @property
    def kv_bytes_per_position(self) -> int:
        """Of the KV cache, over all layers."""
        return KVCache.bytes_per_position(self._decoder.arch, self._memory.dtype)

    def slots(self) -> Slots:
        """The KV cache, for several sequences; what it held is forgotten, as these are when `forward` is called."""
        self.rewind(0)
        return Slots(self._decoder, self._memory, self._most_alive, self._most_together)

    def preload(self) -> None:
        """Read all experts, if the arena holds all of them: what follows waits for no disk."""
        self._runner.preload()

    def warm(self, path: Path, on_status: Callable[[str], None]) -> None:
        """Begin with the experts that `path` names, where a run before wrote it: see `remember`."""
        try:
            memory = read_memory(path, self._store)
            on_status(f"warm start: reading the experts of the last run, listed in {path}")
            began = time.perf_counter()
            nbytes = self._runner.warm(memory)
            on_status(f"warm start: {readable(nbytes)} in {time.perf_counter() - began:.1f} s")
        except FileNotFoundError:
            on_status(f"warm start: from the next run on; the experts in memory will be listed in {path}")
        except StoreError as error:
            on_status(f"warning: no warm start: {error}")

    def remember(self, path: Path, on_status: Callable[[str], None]) -> None:
        """Write down which experts are in memory, for `warm`. Where that is not possible it says so."""
        memory = self._runner.remember()
        try:
            if memory.resident:
                write_memory(path, self._store, memory)
        except OSError as error:
            on_status(f"warning: no warm start next time, since {path} cannot be written: {error.strerror}")

    def rewind(self, length: int) -> None:
        """Forget all tokens from position `length` on."""
        del self.tokens[length:]
        self._cache.truncate(min(length, self._cache.length))

    def forward(self, ids: Sequence[int], all_logits: bool = False) -> Tensor:
        """Run tokens behind those already there, in chunks: float32 logits [V] of the last, or [T, V] of all.

        Raises UsageError where they do not fit the context, or for one outside the vocabulary; an error or Ctrl-C
        leaves the tokens of whole chunks.
        """
        vocab_size = self._decoder.arch.vocab_size
        for token in ids:
            if not 0 <= token < vocab_size:
                raise UsageError(
                    f"Token id {token} is outside the vocabulary: this model has {vocab_size}, from 0 on; "
                    "encode the text with the model's own tokenizer."
                )
        self._cache.check_room(len(ids))
        self._cache.truncate(len(self.tokens))
        logits: list[Tensor] = []
        for start in range(0, len(ids), PREFILL_CHUNK):
            chunk = list(ids[start : start + PREFILL_CHUNK])
            with self.counted(len(ids) == 1, len(chunk), len(self.tokens)):
                self._runner.tokens(chunk)
                result = self._decoder(torch.tensor(chunk), self._cache, all_logits)
            self.tokens += chunk
            logits = [*logits, result] if all_logits else [result]
        return torch.cat(logits) if all_logits else logits[-1]

    def close(self) -> None:
        """End the reading threads."""
        self._runner.close()


def _policies(config: EngineConfig) -> Policies:
    horizons = {"auto": (0, 1), "off": (0,)}.get(config.prefetch) or (int(config.prefetch),)
    return Policies(config.cache_policy, config.load_order, horizons, config.overlap)


def _kv_dtype(store: Store, kv_bits: int | None) -> torch.dtype:
    if kv_bits is not None:
        return torch.int8 if kv_bits == 8 else torch.float16
    # A lossless store is the reference that others are compared with: its cache rounds nothing either.
    return torch.float32 if store.layout.raw and store.meta.dense_bits == 16 else torch.float16


def _fits(split: Callable[..., Budget], *what: int) -> bool:
    try:
        split(*what)
    except BudgetError:
        return False
    return True
