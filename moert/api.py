"""The Python interface."""

# T tokens, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from moert.config import AUTO, EngineConfig, parse_budget, parse_bytes
from moert.engine import batch
from moert.engine.model_runner import Engine
from moert.engine.sampling import SamplingParams, usable_fields
from moert.engine.sequence import Answer, join
from moert.engine.sequence import Chunk as Chunk
from moert.engine.sequence import Completion as Completion
from moert.engine.statistics import GenerationStats as GenerationStats
from moert.engine.statistics import RequestTimer
from moert.errors import UsageError
from moert.hub.resolve import resolve, warm_file
from moert.models.stored_model import StoredModel as Store
from moert.planning.automatic import Automatic, choose
from moert.text.chat import Message, render
from moert.text.tokenizer import Tokenizer
from moert.train.recording import Recorder

Messages = str | Message | Sequence[Message]
Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model ready to answer.

    model: a store, a checkpoint folder or a hub id (converted once into the cache folder); None is the model that
    ships with the package. memory_budget: for everything, `"2GiB"` or bytes; `"auto"` plans for this machine what else
    is left open, precision and context, and keeps it as `plan` (`moert.planning`). expert_budget: for the expert arena
    alone. precision: `"fixed:4"`, `"routed:3"` for a mean, `"elastic:3"` for a bound; None is the widest stored. Behind
    a bound `",skip=0.1"` leaves out, within it, missing experts of router weights below 0.1; `",route=0.1"` favours
    experts in memory, beyond it.
    kv_bits: 8 or 16, of the KV cache. batch_size: prompts that run together, each with a context of its own; None lets
    up to 16 share the KV cache of one context. device: `"auto"` takes a GPU that can be used, `"cpu"` none;
    device_budget: how much of its memory. token_scheduler, cache_policy, load_order, prefetch, overlap, hybrid and
    dense_quant: see `EngineConfig`. warm: begin with the experts in memory that were there when such a model was closed
    last. on_status gets lines that say what was chosen.
    Raises MoertError; see `moert.errors` for its kinds.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        memory_budget: int | str | None = None,
        expert_budget: int | str | None = None,
        precision: str | None = None,
        ctx_size: int | None = None,
        threads: int | None = None,
        kv_bits: int | None = None,
        cache_policy: str = "score",
        load_order: str = "hottest",
        prefetch: str = "auto",
        overlap: bool = True,
        batch_size: int | None = None,
        token_scheduler: str = "first-come",
        device: str = "auto",
        device_budget: int | str | None = None,
        hybrid: bool = True,
        dense_quant: str = "16",
        warm: bool = False,
        offline: bool = False,
        on_status: Callable[[str], None] | None = None,
    ) -> None:
        config = EngineConfig(
            memory_budget=parse_budget(memory_budget),
            expert_budget=None if expert_budget is None else parse_bytes(expert_budget, "expert-budget"),
            precision=precision,
            ctx_size=ctx_size,
            threads=threads,
            kv_bits=kv_bits,
            cache_policy=cache_policy,
            load_order=load_order,
            prefetch=prefetch,
            overlap=overlap,
            batch_size=batch_size,
            token_scheduler=token_scheduler,
            device=device,
            device_budget=None if device_budget is None else parse_bytes(device_budget, "device-budget"),
            hybrid=hybrid,
            dense_quant=dense_quant,
        )
        self.description: list[str] = []
        self._say = on_status or (lambda line: None)

        def status(line: str) -> None:
            self.description.append(line)
            if on_status is not None:
                on_status(line)

        path = resolve(None if model is None else str(model), offline=offline, on_status=status)
        self.store = Store.open(path)
        self.tokenizer = Tokenizer(path)
        self.default_params = SamplingParams.from_generation_config(self.tokenizer.generation_config)
        for warning in (*self.tokenizer.warnings, *usable_fields(self.tokenizer.generation_config)[1]):
            status(warning)
        self.plan: Automatic | None = None
        if memory_budget == AUTO and config.expert_budget is None:
            config, self.plan = choose(self.store, config)
        self._engine = Engine(self.store, config, status)
        if self.plan is not None:
            status(self.plan.line(self._engine.budget.total))
        self._warm_file: Path | None = None
        if warm:
            try:
                self._engine.warm(file := warm_file(path, str(self._engine.precision)), status)
            except BaseException:
                self._engine.close()
                raise
            self._warm_file = file  # only now: what is interrupted before is nothing to remember
        self._latest: object = None  # the request that the KV cache belongs to
        self._recorders: list[Recorder] = []

    @property
    def budget(self) -> int:
        """Bytes that peak resident memory stays below."""
        return self._engine.budget.total

    @property
    def ctx_size(self) -> int:
        """Tokens that the context holds."""
        return self._engine.ctx_size

    @property
    def engine(self) -> Engine:
        """Tokens in, logits out, with its counters: for measuring. Using it moves the KV cache under `stream`."""
        return self._engine

    def generate(self, prompts: str | Sequence[Prompt], params: Params = None) -> list[Completion]:
        """Continue each prompt; the results are in the order of the prompts.

        params: for all prompts, or one for each. Several prompts run together, see `stream_many`.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        pieces: list[list[Chunk]] = [[] for _ in prompts]
        for index, piece in self.stream_many(prompts, params):
            pieces[index].append(piece)
        return [join(iter(made)) for made in pieces]

    def stream_many(self, prompts: Sequence[Prompt], params: Params = None) -> Iterator[tuple[int, Chunk]]:
        """Continue several prompts together, piece by piece, each with the index of its prompt.

        Each gets the text that it would get alone (unless the precision is elastic). One that fails ends with the
        finish reason `error`, and the others go on. Raises UsageError, before anything starts, for a prompt that
        `stream` would refuse.
        """
        each = [self.default_params] * len(prompts) if params is None else params
        each = [each] * len(prompts) if isinstance(each, SamplingParams) else list(each)
        if len(each) != len(prompts):
            raise UsageError(
                f"There are {len(prompts)} prompts, but {len(each)} sampling parameters: give one for each."
            )
        encoded = []
        for number, prompt in enumerate(prompts, 1):
            ids = self._encode(prompt)
            try:
                self._check(ids)
            except UsageError as error:
                if len(prompts) == 1:
                    raise
                raise UsageError(f"Prompt {number} of {len(prompts)}: {error}") from None
            encoded.append(ids)
        return self._run_many(list(zip(encoded, each, strict=True)))

    def _run_many(self, requests: Sequence[tuple[list[int], SamplingParams]]) -> Iterator[tuple[int, Chunk]]:
        if self._engine.batch_size == 1 or len(requests) == 1:
            for index, (ids, params) in enumerate(requests):
                for piece in self._run(ids, params):
                    yield index, piece
            return
        self._latest = request = object()
        for found in batch.run(self._engine, self.tokenizer, requests, self._say):
            yield found
            self._still(request)

    def _still(self, request: object) -> None:
        if self._latest is not request:
            raise UsageError("Another request began on this model before this answer ended; take them in turn.")

    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        template_args: Mapping[str, Any] | None = None,
    ) -> Completion:
        """Answer a conversation: messages with `role` and `content`, one of them alone, or a user's text.

        template_args: more variables for the model's chat template, such as `{"enable_thinking": False}`.
        """
        return join(self.stream_chat(messages, params, template_args=template_args))

    def stream_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        template_args: Mapping[str, Any] | None = None,
    ) -> Iterator[Chunk]:
        """Answer a conversation, piece by piece. What the KV cache holds of it is not computed again."""
        return self.stream(self.encode_chat(messages, template_args=template_args), params)

    def encode_chat(self, messages: Messages, *, template_args: Mapping[str, Any] | None = None) -> list[int]:
        """Return the prompt that the model's chat template makes of a conversation, as token ids."""
        text = render(
            messages,
            self.tokenizer.chat_template,
            special_tokens=self.tokenizer.special_tokens,
            template_args=template_args,
        )
        return self.tokenizer.encode(text, add_special_tokens=False)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Chunk]:
        """Continue a prompt (text or token ids), piece by piece; the last piece has the finish reason.

        Raises UsageError for an empty prompt and for one that does not fit the context.
        """
        params = params or self.default_params
        ids = self._encode(prompt)
        self._check(ids)
        return self._run(ids, params)

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _check(self, ids: Sequence[int], answer: int = 1) -> None:
        if not ids:
            raise UsageError("The prompt is empty; give at least one token.")
        vocab_size = self.store.architecture.vocab_size
        if not all(0 <= i < vocab_size for i in ids):
            raise UsageError(f"The prompt holds token ids outside the vocabulary of {vocab_size}.")
        if len(ids) + answer > self.ctx_size:
            raise UsageError(
                f"The prompt of {len(ids)} tokens does not fit the context of {self.ctx_size}; "
                "shorten it or raise --ctx-size."
            )

    def _run(self, ids: list[int], params: SamplingParams) -> Iterator[Chunk]:
        engine, answer = self._engine, Answer(params, self.tokenizer)
        self._latest = request = object()
        meter = RequestTimer(engine, answer.seed, len(ids))
        cached = _common_prefix(engine.tokens, ids[:-1])
        engine.rewind(cached)
        logits = engine.forward(ids[cached:])
        meter.prefilled(cached)
        while True:
            text, finish = answer.take(logits, engine.tokens, engine.ctx_size)
            if text or finish:
                yield Chunk(text, answer.unsaid(), finish, meter.stats(answer.count))
            if finish:
                return
            self._still(request)
            logits = engine.forward([answer.latest])

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits of every position: float32 [T, V]. Starts from an empty context. The result is not in the budget."""
        ids = list(token_ids)
        self._check(ids, answer=0)
        self._latest = None
        self._engine.rewind(0)
        return self._engine.forward(ids, all_logits=True)

    def record_trace(self, path: Path | str) -> None:
        """Write from now on, until the model is closed, which experts each token is routed to, for `moert simulate` and
        `moert train-predictor`. OSError where the file cannot be written."""
        self._recorders.append(Recorder(self.store, self._engine.decoder, Path(path)))

    def close(self) -> None:
        """End the reading threads and what is recorded, and write down what a warm start needs; the object is of no use
        afterwards."""
        try:
            while self._recorders:
                self._recorders.pop().close()
            if self._warm_file is not None:
                file, self._warm_file = self._warm_file, None
                self._engine.remember(file, self._say)
        finally:
            self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
