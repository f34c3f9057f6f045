"""The model: store, budget, experts and decoder put together. Tokens in, logits out; knows no requests."""

# T tokens, V vocabulary, D hidden, H query heads, J key/value heads, R sequences

from __future__ import annotations

import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import psutil
import torch
from torch import Tensor

from moert.config import AUTO_BATCH, DEFAULT_CTX_SIZE, PREFILL_CHUNK, EngineConfig
from moert.device.decoder import PlacedDecoder
from moert.device.dense_quant import load_dense
from moert.device.hybrid import HybridRunner
from moert.device.kv_memory import SplitKVMemory
from moert.device.matrix import DenseQuant
from moert.device.offload import OffloadRequest, plan_offload
from moert.engine.needs import kv_dtype, needs_of
from moert.engine.sequence_cache import SequenceCache, SequenceCaches, StepInput
from moert.errors import BudgetError, StoreError, UsageError
from moert.hardware.allocator import keep_freed_memory
from moert.hardware.memory import available_bytes, library_bytes
from moert.models.decoder import Decoder
from moert.models.kv_cache import KVCache, KVMemory
from moert.models.stored_model import StoredModel
from moert.quant.dispatch import choose_kernel, kernel_name, set_num_threads
from moert.quant.format import KEY_BLOCK, align
from moert.quant.matmul import FEW_TOKENS
from moert.runtime.budget import AUTO_SHARE, Budget, split_budget
from moert.runtime.executor import ExpertRunner, Policies
from moert.runtime.telemetry import Counters
from moert.runtime.timeline import Spans
from moert.runtime.transfer import direct_io_works
from moert.runtime.warm import read_memory, write_memory
from moert.scheduler.capacity import slots_for
from moert.scheduler.precision import ElasticPrecision, Precision, RoutedPrecision, parse_precision
from moert.scheduler.predictor import Mixed, PathWeights, Predictor, make_predictor
from moert.store.fileio import readable
from moert.store.predictor import read_predictor


def default_threads() -> int:
    """Physical cores that this process may use: a second thread of a core adds nothing to these kernels."""
    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(logical, psutil.cpu_count(logical=False) or logical))


def read_precision(text: str | None, store: StoredModel) -> Precision:
    """The precision that `text` names, None the usual one. UsageError where the store does not have it."""
    try:
        return parse_precision(text, store.layout.widths, store.bit_router())
    except ValueError as error:
        raise UsageError(f"{error}.") from None


def say_what_is_kept(store: StoredModel, slices: int, on_status: Callable[[str], None]) -> None:
    """Say it where experts have fewer than the `slices` that are asked for."""
    if min(map(min, store.kept.values())) < slices:
        on_status(f"the store was made with --max-size: its experts have {store.kept_widths()}")


class TaskCancelled(BaseException):
    """Whoever wanted something computed does not wait for it any more."""


class ModelRunner:
    """A loaded model with the KV cache of its sequences: `step` computes some of them, `forward` one for measuring.

    caches: the sequences. cancelled: asked before each chunk of `forward` whether to raise TaskCancelled. Raises
    BudgetError where memory does not suffice, UsageError for settings that do not fit the model, StoreError where the
    store is damaged.
    """

    def __init__(self, store: StoredModel, config: EngineConfig, on_status: Callable[[str], None]) -> None:
        arch = store.architecture
        try:
            choose_kernel()
        except ValueError as error:
            raise UsageError(f"{error}.") from None
        self.precision, policies = read_precision(config.precision, store), _policies(config)
        self.ctx_size = config.ctx_size or min(DEFAULT_CTX_SIZE, arch.max_position_embeddings)
        self.batch_size = config.batch_size or AUTO_BATCH
        self.hybrid = config.hybrid
        self.threads = config.threads or default_threads()
        set_num_threads(self.threads)
        keep_freed_memory()
        self._widths = store.layout.widths
        slices = self.precision.slices(self._widths)
        alive = self.batch_size
        positions = align(self.ctx_size, KEY_BLOCK) * (config.batch_size or 1)
        dtype = kv_dtype(store, config.kv_bits)
        shared = functools.partial(self._shared_room, store, config, slices, alive)
        run = OffloadRequest(store, config, self.precision, positions, alive, dtype, shared)
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
            self._experts = self._make_experts(store, slots, policies, predictor)
            undo.pop_all()
            undo.callback(self._experts.close)
            self._decoder, self._memory = self._load(store, config, positions, dtype)
            if isinstance(self._experts, HybridRunner) and compiles:
                self._experts.prepare()
            if slots[0] < num_experts:
                self._decoder.watch(self._experts)
            self.caches = SequenceCaches(arch, self._memory)
            self._own: SequenceCache | None = None  # what `forward` computes
            self.cancelled: Callable[[], bool] = lambda: False
            # Raw weights meet many tokens through torch, whose sums then depend on how many there are.
            self._most_together = FEW_TOKENS - 1 if store.layout.raw else math.inf
            undo.pop_all()

    def _make_experts(
        self, store: StoredModel, slots: Sequence[int], policies: Policies, predictor: Predictor | None
    ) -> ExpertRunner | HybridRunner:
        activation, offload = store.architecture.hidden_act, self.offload
        if offload is None:
            return ExpertRunner(store, slots, self.precision, activation, policies, predictor)
        return HybridRunner(
            store, slots, self.precision, activation, policies, predictor,
            device=offload.device, device_slots=offload.slots, cost_model=offload.cost_model, hybrid=self.hybrid,
        )  # fmt: skip

    def _load(
        self, store: StoredModel, config: EngineConfig, positions: int, dtype: torch.dtype
    ) -> tuple[Decoder, KVMemory]:
        """The dense part and the KV cache, where they are to lie."""
        arch, offload = store.architecture, self.offload
        if offload is None or not offload.placement.any:
            return Decoder(arch, store.load_dense(), self._experts), KVMemory(arch, positions, dtype)
        placed, device = offload.placement, offload.device
        with device.guard():
            dense = load_dense(store, placed, device, cast(DenseQuant, config.dense_quant))
            decoder = PlacedDecoder(arch, dense, self._experts, placed.layers, placed.head, device)
            decoder.prepare()
            return decoder, SplitKVMemory(arch, positions, dtype, placed.layers, placed.kv_positions, device)

    def _shared_room(self, store: StoredModel, config: EngineConfig, slices: int, alive: int, compiles: bool) -> int:
        """Of the host's memory, what is left for a device that has no other, if all dense weights go there."""
        libraries, available = library_bytes(compiles), available_bytes()
        needs = needs_of(store, config.kv_bits, self.ctx_size, slices, libraries, config.batch_size, alive)
        limit = config.memory_budget or libraries + int(available * AUTO_SHARE)
        return limit - libraries - needs.workspace - store.architecture.top_k * needs.one_expert

    @staticmethod
    def _predictor(store: StoredModel, on_status: Callable[[str], None]) -> Predictor | None:
        """The store's trained predictor of routes with what the routers themselves say, if it has one."""
        found = read_predictor(store)
        if found is None:
            return None
        on_status("prefetch: by the predictor that moert train-predictor trained")
        arch = store.architecture
        weights = PathWeights(**found.tensors)
        return make_predictor(Mixed.name, store.moe_layers, store.num_experts, arch.top_k, weights)

    def _split(self, store: StoredModel, config: EngineConfig, slices: int) -> Budget:
        compiles = self.offload is not None and self.offload.device.compiles
        libraries, available = library_bytes(compiles), available_bytes()

        def split(ctx_size: int, slices: int, batch_size: int | None = config.batch_size) -> Budget:
            alive = batch_size or AUTO_BATCH
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
        self, store: StoredModel, config: EngineConfig, slots: int, num_experts: int, on_status: Callable[[str], None]
    ) -> None:
        chosen = []
        if config.precision is None:
            chosen.append(f"precision {self.precision} (the default)")
        elif isinstance(self.precision, RoutedPrecision):
            chosen.append(f"precision {self.precision} (thresholds on the router's weights)")
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
        return self._experts.counters

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits per weight that the store has its experts at."""
        return self._widths

    def layer_counters(self, decoding: bool) -> dict[int, Counters]:
        """The same for each layer with experts, of decoding or of prompts."""
        return self._experts.layer_counters(decoding)

    def lookahead(self) -> str:
        """What looking ahead came to, in a line; empty where nobody looked."""
        return self._experts.lookahead.line()

    def draw(self, timeline: Spans | None) -> None:
        """Draw from now on what happens; whoever gives the timeline closes it."""
        self._experts.telemetry.timeline = timeline

    @property
    def decoder(self) -> Decoder:
        """The model, for hooks that look into it."""
        return self._decoder

    def use(self, precision: Precision) -> None:
        """Compute at another precision from now on: UsageError for a wider one than the engine was opened with."""
        if precision.slices(self._widths) > self._most_slices:
            raise UsageError(f"The memory was split for {self.precision}: {precision} needs more.")
        self._experts.use(precision)
        self.precision = precision
        self.caches.clear()  # what they hold was computed at another

    @property
    def kv_bytes_per_position(self) -> int:
        """Of the KV cache, over all layers."""
        return KVCache.bytes_per_position(self._decoder.arch, self._memory.dtype)

    def enter_thread(self) -> None:
        """Let this thread compute from now on, and no other."""
        set_num_threads(self.threads)  # of torch, each thread has a number of its own
        if self.offload is not None:
            with self.offload.device.guard():
                self.offload.device.enter_thread()

    def preload(self) -> None:
        """Read all experts, if the arena holds all of them: what follows waits for no disk."""
        self._experts.preload(self._stop_if_cancelled)

    def _stop_if_cancelled(self) -> None:
        if self.cancelled():
            raise TaskCancelled

    def warm(self, path: Path, on_status: Callable[[str], None]) -> None:
        """Begin with the experts that `path` names, where a run before wrote it: see `remember`."""
        try:
            memory = read_memory(path, self._store)
            on_status(f"warm start: reading the experts of the last run, listed in {path}")
            began = time.perf_counter()
            nbytes = self._experts.warm(memory)
            on_status(f"warm start: {readable(nbytes)} in {time.perf_counter() - began:.1f} s")
        except FileNotFoundError:
            on_status(f"warm start: from the next run on; the experts in memory will be listed in {path}")
        except StoreError as error:
            on_status(f"warning: no warm start: {error}")

    def remember(self, path: Path, on_status: Callable[[str], None]) -> None:
        """Write down which experts are in memory, for `warm`. Where that is not possible it says so."""
        memory = self._experts.remember()
        try:
            if memory.resident:
                write_memory(path, self._store, memory)
        except OSError as error:
            on_status(f"warning: no warm start next time, since {path} cannot be written: {error.strerror}")

    @property
    def tokens(self) -> list[int]:
        """Those behind which `forward` computes; requests that run meanwhile may take their place."""
        own = self._own
        there = own is not None and own in self.caches and own.cache.ctx_size == self.ctx_size
        return own.tokens if own is not None and there else []

    def rewind(self, length: int) -> None:
        """Forget all tokens of `forward` from position `length` on."""
        del self.tokens[length:]

    def forward(self, ids: Sequence[int], all_logits: bool = False) -> Tensor:
        """Run tokens behind those already there, in chunks: float32 logits [V] of the last, or [T, V] of all.

        For measuring, while no request runs. Raises UsageError where they do not fit the context, or for one outside
        the vocabulary; an error or Ctrl-C leaves the tokens of whole chunks.
        """
        vocab_size = self._decoder.arch.vocab_size
        for token in ids:
            if not 0 <= token < vocab_size:
                raise UsageError(
                    f"Token id {token} is outside the vocabulary: this model has {vocab_size}, from 0 on; "
                    "encode the text with the model's own tokenizer."
                )
        own = self._own
        if own is None or self.tokens is not own.tokens:
            own = self._own = self.caches.open([], self.ctx_size)
            assert own is not None, "a request runs"
            own.running = False  # whoever needs the room may have it
        own.cache.truncate(len(own.tokens))
        own.cache.check_room(len(ids))
        logits: list[Tensor] = []
        for start in range(0, len(ids), PREFILL_CHUNK):
            self._stop_if_cancelled()
            chunk = list(ids[start : start + PREFILL_CHUNK])
            with self._experts.begin(len(ids) == 1, len(chunk), len(own.tokens)):
                self._experts.tokens(chunk)
                result = self._decoder(torch.tensor(chunk), own.cache, all_logits)
            own.tokens += chunk
            logits = [*logits, result] if all_logits else [result]
        return torch.cat(logits) if all_logits else logits[-1]

    def at_a_time(self, capacities: Sequence[int]) -> int:
        """How many of the first of sequences for so many tokens the KV cache has room for, `batch_size` at most."""
        ends = itertools.accumulate(align(min(size, self.ctx_size), KEY_BLOCK) for size in capacities)
        return sum(end <= self.caches.positions for end in itertools.islice(ends, self.batch_size))

    def step(self, inputs: Sequence[StepInput], decoding: bool) -> Tensor:
        """Run tokens of each sequence behind those already there: float32 logits [R, V], of the last token of each.

        They are, to the byte, those that each sequence would get alone. An error leaves all sequences as they were.
        decoding: what the step is counted as.
        """
        for sequence, _ in inputs:
            sequence.cache.truncate(len(sequence.tokens))
        runs = [(torch.tensor(tokens), sequence.cache) for sequence, tokens in inputs]
        alone = inputs[0] if len(inputs) == 1 else None
        first = None if alone is None else len(alone.cache.tokens)
        with self._experts.begin(decoding, sum(len(tokens) for _, tokens in inputs), first):
            if alone is not None:
                self._experts.tokens(alone.tokens)
            logits = self._decoder.together(runs, self._most_together)
        for sequence, tokens in inputs:
            sequence.tokens += tokens
        return logits

    def close(self) -> None:
        """End the reading threads."""
        self._experts.close()


def _policies(config: EngineConfig) -> Policies:
    horizons = {"auto": (0, 1), "off": (0,)}.get(config.prefetch) or (int(config.prefetch),)
    return Policies(config.cache_policy, config.load_order, horizons, config.overlap)


def _fits(split: Callable[..., Budget], *what: int) -> bool:
    try:
        split(*what)
    except BudgetError:
        return False
    return True
