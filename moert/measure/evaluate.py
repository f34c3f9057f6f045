"""Measures what a width costs in quality: perplexity of a text, and how far a store is from the lossless one.

Prints nothing. The text is cut into windows that do not overlap; each starts from an empty context and its first token
is not scored. All precisions, and the lossless store, see the same windows, one window after the other, so that what is
measured when the run is broken off is comparable.
"""

# T tokens of a window, V vocabulary, D hidden

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from moert.config import EngineConfig
from moert.engine.model_runner import ModelRunner, read_precision, say_what_is_kept
from moert.engine.needs import needs_of
from moert.engine.worker import Worker
from moert.errors import UsageError
from moert.hardware.memory import available_bytes, library_bytes
from moert.measure.bench import Case, bytes_without_experts
from moert.measure.bench_kernels import expert_bytes
from moert.models.decoder import DecoderLayer
from moert.models.stored_model import StoredModel
from moert.quant.format import RAW_DTYPE_BYTES, ExpertLayout
from moert.runtime.budget import Budget, split_budget
from moert.runtime.telemetry import Counters
from moert.scheduler.precision import Precision
from moert.text.tokenizer import Tokenizer

LAYER_TOKENS = 4096  # of these the layers' errors are measured; a mean of so many does not move
_BLOCK_FLOATS = 1 << 20  # logits that are compared at a time, in float64


@dataclass(frozen=True, slots=True)
class LayerError:
    """Errors that a width causes in the experts of one layer, all else being lossless: its MoE block gets the hidden
    states of the lossless model, and its output y' is compared with the lossless y; h is the hidden state that leaves
    the layer.

    output_error: ||y' - y|| / ||y||, of all tokens measured. hidden_error: root of the mean over them of the square of
    ||y' - y|| / ||h||, the share of what later layers see that is wrong: the figure to compare layers by. Each token
    has its own norm, since the next layer divides by that: a few have states a hundred times as large as the others.
    """

    layer: int
    output_error: float
    hidden_error: float


@dataclass(frozen=True, slots=True)
class Row:
    """A store at one precision. Figures against the lossless store are None without one, and for itself.

    perplexity: exp of the mean negative log-likelihood of the scored tokens. perplexity_ratio: to the lossless one.
    mean_kl: nats per token, of the lossless distribution against this one. top1_agreement: share of the scored tokens
    for which both think the same token likeliest. mean_width: bits, over (layer, token, expert). bits_per_weight: of
    the experts, with all scales that are stored for that width and those below. expert_bytes_per_token: of the slices
    of the experts that a token is routed to, without their padding to pages: what is read if nothing is in memory.
    bytes_touched_per_token: what decoding reads from memory, over a window: those experts (with the scales of their
    width alone), dense weights and KV cache; see `moert.measure.bench`. bytes_read_per_token: from the disk.
    scored_tokens: those that the figures are means of.
    """

    model: str
    precision: str
    lossless: bool
    scored_tokens: int
    perplexity: float
    perplexity_ratio: float | None
    mean_kl: float | None
    top1_agreement: float | None
    mean_width: float
    bits_per_weight: float
    expert_bytes_per_token: float
    bytes_touched_per_token: float
    bytes_read_per_token: float
    layer_errors: list[LayerError]


def stored_bytes(layout: ExpertLayout, slices: int) -> int:
    """Bytes of the first `slices` slices of an expert, codes and scales, without the padding to pages."""
    if layout.raw:
        return sum(rows * cols for rows, cols in layout.shapes) * RAW_DTYPE_BYTES[layout.raw_dtype]
    return sum(layout.offsets(i)[-1] for i in range(slices))


def cut(ids: Sequence[int], window: int, tokens: int) -> list[list[int]]:
    """Windows of the first `tokens` ids (0: all). UsageError where nothing could be scored."""
    if window < 2:
        raise UsageError(f"A window of {window} tokens scores nothing: give --window at least 2.")
    if tokens < 0 or tokens == 1:
        raise UsageError(f"{tokens} tokens score nothing: give --tokens at least 2, or 0 for the whole text.")
    ids = ids[:tokens] if tokens else ids
    if len(ids) < 2:
        raise UsageError(f"The text has {len(ids)} tokens, but at least 2 are needed: give a longer one.")
    parts = [list(ids[i : i + window]) for i in range(0, len(ids), window)]
    return [part for part in parts if len(part) > 1]


def encode(text: str, store: StoredModel, against: StoredModel | None) -> list[int]:
    """The tokens of a text. UsageError where the two stores would not understand the same by them."""
    tokenizer = Tokenizer(store.path)
    ids = tokenizer.encode(text)
    if against is not None:
        advice = "name the lossless store of the same checkpoint (moert convert --widths 16 --dense-bits 16)"
        if not against.layout.raw or against.meta.dense_bits != 16:
            raise UsageError(f"{against.path} is not lossless, so --against cannot be it: {advice}.")
        other = Tokenizer(against.path)
        sizes = [s.architecture.vocab_size for s in (store, against)]
        if sizes[0] != sizes[1] or tokenizer.vocabulary != other.vocabulary or other.encode(text) != ids:
            raise UsageError(f"{store.path} and {against.path} do not have the same vocabulary: {advice}.")
        if store.architecture != against.architecture:
            raise UsageError(f"{store.path} and {against.path} are not the same model: {advice}.")
    return ids


@dataclass(slots=True)
class Sums:
    """Sums over the scored tokens of one precision; of the layers: squared norms of y' - y and y, and of the former
    relative to h, and the tokens.
    """

    scored: int = 0
    loss: float = 0.0
    kl: float = 0.0
    same: int = 0
    tokens: int = 0
    bytes_read: int = 0
    token_uses: Counter[int] = field(default_factory=Counter)
    layers: dict[int, Tensor] = field(default_factory=dict)

    def add(self, other: Sums) -> None:
        self.scored += other.scored
        self.loss += other.loss
        self.kl += other.kl
        self.same += other.same
        self.tokens += other.tokens
        self.bytes_read += other.bytes_read
        self.token_uses += other.token_uses
        for layer, squares in other.layers.items():
            self.layers[layer] = self.layers.get(layer, torch.zeros(4, dtype=torch.float64)) + squares

    def count(self, counters: Counters, tokens: int) -> None:
        """Take note of what the runtime counted for so many tokens."""
        self.tokens += tokens
        self.bytes_read += counters.bytes_read
        self.token_uses += counters.token_uses

    def score(self, logits: Tensor, targets: Tensor, lossless: Tensor | None) -> None:
        """logits float32 [T, V] for targets int64 [T], compared in float64, with `lossless` [T, V] if there are."""
        step = max(1, _BLOCK_FLOATS // logits.shape[1])
        for i in range(0, len(targets), step):
            scores = logits[i : i + step].double().log_softmax(-1)
            self.loss -= scores.gather(1, targets[i : i + step, None]).sum().item()
            if lossless is not None:
                true = lossless[i : i + step].double().log_softmax(-1)
                self.kl += (true.exp() * (true - scores)).sum().item()
                self.same += int((true.argmax(-1) == scores.argmax(-1)).sum())
        self.scored += len(targets)


class Evaluation:
    """A store at several precisions beside the lossless store, both loaded under one memory budget.

    window: tokens, the context of both. config: the settings of the store's runner but for context and precision.
    one_by_one: the store computes a window token by token, as an answer is, so that a precision that goes by what is
    in memory costs what it costs there; errors of layers are not measured then.
    on_status gets lines that say what was chosen. `rows()` is right at every moment: an interrupted window does not
    count. Raises UsageError for a precision that the store does not have, BudgetError where memory does not suffice.
    """

    def __init__(
        self,
        store: StoredModel,
        against: StoredModel | None,
        precisions: Sequence[str],
        config: EngineConfig,
        window: int,
        on_status: Callable[[str], None],
        one_by_one: bool = False,
    ) -> None:
        limit = store.architecture.max_position_embeddings
        if window > limit:
            raise UsageError(f"A window of {window} tokens is more than the {limit} that the model was trained for.")
        self._store, self._against, self._window, self._one_by_one = store, against, window, one_by_one
        self._on_status = on_status
        widths = store.layout.widths
        names = precisions or [f"fixed:{width}" for width in reversed(widths)]
        self._precisions = list({str(p): p for p in (read_precision(name, store) for name in names)}.values())
        widest = max(self._precisions, key=lambda precision: precision.slices(widths))
        self.budget, arena = self._split(config, widest.slices(widths))
        say_what_is_kept(store, widest.slices(widths), on_status)
        on_status(self.budget.line())
        self._runner = self._open(store, config, str(widest), arena)
        self._lossless: ModelRunner | None = None
        if against is not None:
            plain = replace(config, kv_bits=None, device="cpu", device_budget=None)
            self._lossless = self._open(against, plain, None, self.budget.arena - arena)
        self._worker = Worker(self._runner, Tokenizer(store.path))
        self._sums = [Sums() for _ in self._precisions]
        self._lossless_sums = Sums()

    def _split(self, config: EngineConfig, slices: int) -> tuple[Budget, int]:
        """Return the budget of both engines together, and the store's share of the arena."""
        store, against, libraries = self._store, self._against, library_bytes()
        own = needs_of(store, config.kv_bits, self._window, slices, libraries)
        # Logits of a window: of both, a copy while they are put together, and the blocks in float64.
        logits = 3 * 4 * self._window * store.architecture.vocab_size + 8 * 8 * _BLOCK_FLOATS
        both = replace(own, workspace=own.workspace + logits)
        if against is not None:
            other = needs_of(against, None, self._window, 1, libraries)
            both = replace(
                both,
                dense=both.dense + other.dense,
                kv_cache=both.kv_cache + other.kv_cache,
                workspace=both.workspace + other.workspace,
                one_expert=own.one_expert + other.one_expert,
                all_experts=own.all_experts + other.all_experts,
            )
        budget = split_budget(both, config.memory_budget, None, available_bytes())
        # Every window uses nearly all experts in turn: an arena that does not hold them all is worth nothing, so the
        # store, which needs less, comes first.
        arena = min(own.all_experts, budget.arena - both.one_expert + own.one_expert)
        return budget, arena if config.expert_budget is None else min(arena, config.expert_budget)

    def _open(self, store: StoredModel, config: EngineConfig, precision: str | None, arena: int) -> ModelRunner:
        changed = replace(config, memory_budget=None, expert_budget=arena, precision=precision, ctx_size=self._window)
        runner = ModelRunner(store, changed, lambda line: None)
        if runner.offload is not None:
            self._on_status(runner.offload.line(self._window))
        return runner

    @property
    def threads(self) -> int:
        return self._runner.threads

    def run(self, windows: Sequence[Sequence[int]], on_progress: Callable[[str], None]) -> None:
        """Measure windows of token ids, each at least 2 and at most `window` long."""
        self._worker.call(lambda runner: self._run(windows, on_progress))

    def _run(self, windows: Sequence[Sequence[int]], on_progress: Callable[[str], None]) -> None:
        measured = 0
        for number, ids in enumerate(windows, 1):
            so_far = [f"{p} {math.exp(s.loss / s.scored):.3f}" for p, s in self._results() if s.scored]
            on_progress(f"window {number} of {len(windows)}" + (f", perplexity {', '.join(so_far)}" if so_far else ""))
            new = [Sums() for _ in self._precisions]
            targets = torch.tensor(ids[1:])
            true, lossless = None, Sums()
            if self._lossless is not None:
                # What a layer on a device makes of something is not to be had apart from the others.
                apart = measured < LAYER_TOKENS and not self._one_by_one and self._runner.offload is None
                with self._layers(new) if apart else _nothing():
                    true = self._logits(self._lossless, ids, lossless)
                lossless.score(true, targets, None)
            for sums, precision in zip(new, self._precisions, strict=True):
                self._runner.use(precision)
                if self._one_by_one:
                    at = f"window {number} of {len(windows)}, {precision}, token"
                    logits = self._decoded(ids, sums, lambda token, at=at: on_progress(f"{at} {token}"))  # type: ignore[misc]
                else:
                    logits = self._logits(self._runner, ids, sums)
                sums.score(logits, targets, true)
            measured += len(ids)
            for total, sums in zip([*self._sums, self._lossless_sums], [*new, lossless], strict=True):
                total.add(sums)

    def _results(self) -> Iterator[tuple[Precision, Sums]]:
        yield from zip(self._precisions, self._sums, strict=True)

    @staticmethod
    def _logits(runner: ModelRunner, ids: Sequence[int], sums: Sums) -> Tensor:
        """Logits [T - 1, V] of all tokens but the last."""
        runner.rewind(0)
        before = runner.counters.copy()
        logits = runner.forward(ids, all_logits=True)[:-1]
        sums.count(runner.counters.since(before), len(ids))
        return logits

    def _decoded(self, ids: Sequence[int], sums: Sums, report: Callable[[int], None]) -> Tensor:
        """The same, token by token."""
        self._runner.rewind(0)
        before, rows = self._runner.counters.copy(), []
        for i, token in enumerate(ids[:-1]):
            if i % 32 == 0:
                report(i)
            rows.append(self._runner.forward([token]))
        sums.count(self._runner.counters.since(before), len(rows))
        return torch.stack(rows)

    @contextmanager
    def _layers(self, sums: Sequence[Sums]) -> Iterator[None]:
        """While the lossless model computes, give what its MoE blocks see to those of the store."""
        assert self._lossless is not None
        differences: list[Tensor] = []
        handles = []

        def block(layer: int) -> Callable[[torch.nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
                differences.clear()
                for precision in self._precisions:
                    self._runner.use(precision)
                    other = _layer(self._runner, layer).mlp(inputs[0])
                    differences.append(torch.stack([_squares(other - y), _squares(y)]))

            return hook

        def after(layer: int) -> Callable[[torch.nn.Module, tuple[object, ...], Tensor], None]:
            def hook(module: torch.nn.Module, inputs: tuple[object, ...], h: Tensor) -> None:
                whole = _squares(h).clamp_min(1e-30)
                for part, squares in zip(sums, differences, strict=True):
                    shares = torch.stack([squares[0] / whole, torch.ones_like(whole)])
                    part.add(Sums(layers={layer: torch.cat([squares, shares]).sum(1)}))

            return hook

        try:
            for layer in self._store.moe_layers:
                module = _layer(self._lossless, layer)
                handles.append(module.mlp.register_forward_hook(block(layer)))
                handles.append(module.register_forward_hook(after(layer)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def rows(self) -> list[Row]:
        """The lossless store first, then one row for each precision; none before the first window has ended."""
        result = []
        lossless = self._lossless_sums
        if self._lossless is not None and self._against is not None and lossless.scored:
            result.append(self._row(self._against, self._lossless, self._lossless.precision, lossless, None))
        for precision, sums in self._results():
            if sums.scored:
                reference = lossless if lossless.scored else None
                result.append(self._row(self._store, self._runner, precision, sums, reference))
        return result

    def _row(
        self, store: StoredModel, runner: ModelRunner, precision: Precision, sums: Sums, reference: Sums | None
    ) -> Row:
        layout, n = store.layout, sums.scored
        # A token uses top-k experts in every layer, each with so many slices: their share among all uses.
        uses = sums.token_uses.total()
        share = {slices: count / uses for slices, count in sums.token_uses.items()}
        per_token = store.architecture.top_k * len(store.moe_layers)
        stored = sum(part * stored_bytes(layout, slices) for slices, part in share.items())
        touched = sum(part * expert_bytes(layout, slices) for slices, part in share.items() if slices)
        weights = sum(rows * cols for rows, cols in layout.shapes)
        return Row(
            model=store.path.name,
            precision=str(precision),
            lossless=layout.raw and store.meta.dense_bits == 16,
            scored_tokens=n,
            perplexity=math.exp(sums.loss / n),
            perplexity_ratio=math.exp((sums.loss - reference.loss) / n) if reference else None,
            mean_kl=sums.kl / n if reference else None,
            top1_agreement=sums.same / n if reference else None,
            mean_width=sum(part * layout.widths[slices - 1] for slices, part in share.items() if slices),
            bits_per_weight=8 * stored / weights,
            expert_bytes_per_token=per_token * stored,
            bytes_touched_per_token=bytes_without_experts(store, runner, Case(0, self._window, 0))
            + per_token * touched,
            bytes_read_per_token=sums.bytes_read / sums.tokens,
            layer_errors=[
                LayerError(layer, math.sqrt(d / y), math.sqrt(share / tokens))
                for layer, of_layer in sorted(sums.layers.items())
                for d, y, share, tokens in [of_layer.tolist()]
            ],
        )

    def close(self) -> None:
        """End the reading threads."""
        self._worker.close()
        if self._lossless is not None:
            self._lossless.close()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _layer(runner: ModelRunner, number: int) -> DecoderLayer:
    return cast(DecoderLayer, runner.decoder.layers[number])


def _squares(x: Tensor) -> Tensor:
    """[T]"""
    return x.double().square().sum(-1)
