"""The Python interface."""

# T tokens, V vocabulary

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from functools import partial
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from torch import Tensor

from moert.config import AUTO, EngineConfig, Settings, document_settings
from moert.engine.arguments import Params, Prompt, as_model, as_one_params, as_params, as_prompt, as_prompts
from moert.engine.model_runner import ModelRunner
from moert.engine.sampling import ResolvedParams, SamplingParams, usable_fields
from moert.engine.sequence import Chunk as Chunk
from moert.engine.sequence import Completion as Completion
from moert.engine.sequence import Priority, Request, join
from moert.engine.statistics import GenerationStats as GenerationStats
from moert.engine.worker import Submission, Worker
from moert.errors import ClosedError, UsageError
from moert.hub.resolve import resolve, warm_file
from moert.models.stored_model import StoredModel
from moert.planning.automatic import Automatic, choose
from moert.text.chat import Message, render
from moert.text.tokenizer import Tokenizer
from moert.train.recording import Recorder

Messages = str | Message | Sequence[Message]
T = TypeVar("T")


@document_settings
class LLM:
    """A model ready to answer, to any number of threads at a time.

    Requests that are made at the same time run together. A stream that is closed or dropped ends its request. An LLM
    that is closed, or was loaded before the process was forked, raises ClosedError.

    model: a store, a checkpoint folder or a hub id (converted once into the cache folder, which takes hours for a large
    model: `moert convert` shows its progress); None is the model that ships with the package. warm: begin with the
    experts in memory that were there when such a model was closed last. offline: never use the network. on_status: is
    called with lines that say what was chosen; those that begin with "warning:" deserve attention. The settings are
    keywords too, and are listed below; with `memory_budget="auto"` what was planned for this machine is kept as `plan`
    (`moert.planning`).
    Raises MoertError; see `moert.errors` for its kinds.
    """

    def __init__(
        self,
        model: str | PathLike[str] | None = None,
        *,
        warm: bool = False,
        offline: bool = False,
        on_status: Callable[[str], None] | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        # Several prompts at once are usual here, so the choice is left to moert.
        config = EngineConfig.of({"batch_size": None, **settings})
        if on_status is not None and not callable(on_status):
            raise UsageError(f"on_status is {on_status!r}, but must be a function that takes a line of text.")
        self.description: list[str] = []
        self._say = on_status or (lambda line: None)

        def status(line: str) -> None:
            self.description.append(line)
            if on_status is not None:
                on_status(line)

        path = resolve(as_model(model), offline=offline, on_status=status)
        self.store = StoredModel.open(path)
        self.tokenizer = Tokenizer(path)
        self.default_params = SamplingParams.from_generation_config(self.tokenizer.generation_config).resolve()
        for warning in (*self.tokenizer.warnings, *usable_fields(self.tokenizer.generation_config)[1]):
            status(f"warning: {warning}")
        self.plan: Automatic | None = None
        if settings.get("memory_budget") == AUTO and config.expert_budget is None:
            config, self.plan = choose(self.store, config)
        self._runner = ModelRunner(self.store, config, status)
        if self.plan is not None:
            status(self.plan.line(self._runner.budget.total))
        at_end: list[Callable[[], object]] = []  # it must not know `self`, which would never be dropped then
        if warm:
            try:
                self._runner.warm(file := warm_file(path, str(self._runner.precision)), status)
            except BaseException:
                self._runner.close()
                raise
            # Only now: what is interrupted before is nothing to remember.
            at_end.append(partial(self._runner.remember, file, self._say))
        self._worker = Worker(self._runner, self.tokenizer, at_end)
        self._finalizer = weakref.finalize(self, self._worker.close)  # also when the program ends

    @property
    def budget(self) -> int:
        """Bytes that peak resident memory stays below."""
        return self._runner.budget.total

    @property
    def ctx_size(self) -> int:
        """Tokens that the context holds."""
        return self._runner.ctx_size

    @property
    def precision(self) -> str:
        """Bits per weight at which experts compute: a policy such as `fixed:4`."""
        return str(self._runner.precision)

    @property
    def resident_share(self) -> float:
        """Share of the experts that memory has room for."""
        return self._runner.resident_share

    @property
    def device(self) -> str | None:
        """Name of the device that computes beside the CPU; None without one."""
        return None if self._runner.offload is None else self._runner.offload.device.name

    @property
    def runner(self) -> ModelRunner:
        """Tokens in, logits out, with its counters: for measuring. To compute with it, see `call`."""
        return self._runner

    def call(self, function: Callable[[ModelRunner], T]) -> T:
        """Return what `function` makes of the runner, which it has for itself until it returns.

        It runs on the thread that computes, when the requests before it have ended. Ctrl-C ends it with the tokens that
        are being computed.
        """
        return self._worker.call(function)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        priority: Priority = "interactive",
        timeout: float | None = None,
    ) -> list[Completion]:
        """Continue each prompt; the results are in the order of the prompts.

        prompts: text or token ids, or a list of these; a flat list of whole numbers is one prompt. params: for all
        prompts, or one for each; what they leave open is the model's default. Several prompts run together, see
        `stream_many`.
        """
        requests = self._requests(as_prompts(prompts), params, priority, timeout, stream=False)
        chunks: list[list[Chunk]] = [[] for _ in requests]
        for index, chunk in self._run(requests):
            chunks[index].append(chunk)
        return [join(made) for made in chunks]

    def stream_many(
        self,
        prompts: Sequence[Prompt],
        params: Params = None,
        *,
        priority: Priority = "interactive",
        timeout: float | None = None,
    ) -> Iterator[tuple[int, Chunk]]:
        """Continue several prompts together, piece by piece, each with the index of its prompt.

        Each gets the text that it would get alone (unless the precision is elastic). One of several that fails ends
        with the finish reason `error`, and the others go on. priority: `"batch"` leaves the turns to interactive
        requests. timeout: seconds, after which what is not complete fails. They begin with the first piece that is
        asked for. Raises UsageError, before anything starts, for a prompt that `stream` would refuse.
        """
        return self._run(self._requests(as_prompts(prompts), params, priority, timeout))

    def _requests(
        self,
        prompts: Sequence[Prompt],
        params: Params | Sequence[ResolvedParams],
        priority: Priority,
        timeout: float | None,
        stream: bool = True,
    ) -> list[Request]:
        self._worker.check()
        each = as_params(params, len(prompts), self.default_params)
        deadline = None if timeout is None else time.monotonic() + timeout
        requests = []
        for number, (prompt, own) in enumerate(zip(prompts, each, strict=True), 1):
            ids = self._encode(prompt)
            try:
                self._check(ids)
            except UsageError as error:
                if len(prompts) == 1:
                    raise
                raise UsageError(f"Prompt {number} of {len(prompts)}: {error}") from None
            requests.append(Request(ids, own, priority, deadline, stream))
        return requests

    def _run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Chunk]]:
        """Pieces of the answers; of a single one an error is raised."""
        if len(requests) > 1:
            together = self._runner.at_a_time([len(r.prompt_ids) + r.params.max_tokens - 1 for r in requests])
            positions = self._runner.caches.positions
            self._say(f"{len(requests)} prompts, {together} at a time (KV cache of {positions} positions)")
        with closing(self._worker.stream(requests)) as chunks:
            for index, chunk in chunks:
                if chunk.error is not None and len(requests) == 1:
                    raise chunk.error
                yield index, chunk

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

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: Priority = "interactive",
        timeout: float | None = None,
    ) -> Iterator[Chunk]:
        """Continue a prompt (text or token ids), piece by piece; the last piece has the finish reason.

        priority, timeout: see `stream_many`. Raises UsageError for an empty prompt and for one that does not fit the
        context.
        """
        each = [as_one_params(params, self.default_params)]
        requests = self._requests([as_prompt(prompt)], each, priority, timeout)
        return (chunk for _, chunk in self._run(requests))

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

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits of every position: float32 [T, V]. Starts from an empty context. The result is not in the budget."""
        ids = self._encode(as_prompt(token_ids))
        self._check(ids, answer=0)

        def compute(runner: ModelRunner) -> Tensor:
            runner.rewind(0)
            return runner.forward(ids, all_logits=True)

        return self.call(compute)

    def record_trace(self, path: Path | str) -> None:
        """Write from now on, until the model is closed, which experts each token is routed to, for `moert simulate` and
        `moert train-predictor`. OSError where the file cannot be written."""
        self.call(lambda runner: self._worker.at_end.append(Recorder(self.store, runner.decoder, Path(path)).close))

    def close(self) -> None:
        """End the threads and what is recorded, and write down what a warm start needs.

        The step that runs is the last. Whoever waits for an answer gets a ClosedError, and so does whoever asks for
        one afterwards.
        """
        self._finalizer.detach()
        self._worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncLLM:
    """An `LLM` for asyncio: any number of tasks at a time, and the event loop never waits.

    The arguments are those of `LLM`. To cancel a task that waits, or to leave its `async for`, ends its request.
    Loading takes its time: `await AsyncLLM.load(...)` does it beside the event loop.
    """

    def __init__(self, model: str | PathLike[str] | None = None, **settings: Any) -> None:
        self.llm = LLM(model, **settings)

    @classmethod
    async def load(cls, model: str | PathLike[str] | None = None, **settings: Any) -> Self:
        """Load a model in a thread."""
        return await asyncio.to_thread(cls, model, **settings)

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        priority: Priority = "interactive",
        timeout: float | None = None,
    ) -> list[Completion]:
        """Continue each prompt, as `LLM.generate` does."""
        requests = self.llm._requests(as_prompts(prompts), params, priority, timeout, stream=False)
        chunks: list[list[Chunk]] = [[] for _ in requests]
        async with aclosing(self._run(requests)) as found:
            async for index, chunk in found:
                chunks[index].append(chunk)
        return [join(made) for made in chunks]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: Priority = "interactive",
        timeout: float | None = None,
    ) -> AsyncIterator[Chunk]:
        """Continue a prompt piece by piece, as `LLM.stream` does; it begins with the first piece that is asked for."""
        return self._stream(self.llm._requests([as_prompt(prompt)], params, priority, timeout))

    async def chat(self, messages: Messages, params: SamplingParams | None = None, **options: Any) -> Completion:
        """Answer a conversation, as `LLM.chat` does."""
        return (await self.generate([self.llm.encode_chat(messages, **options)], params))[0]

    def stream_chat(
        self, messages: Messages, params: SamplingParams | None = None, **options: Any
    ) -> AsyncIterator[Chunk]:
        """Answer a conversation piece by piece, as `LLM.stream_chat` does."""
        return self.stream(self.llm.encode_chat(messages, **options), params)

    async def _stream(self, requests: Sequence[Request]) -> AsyncIterator[Chunk]:
        async with aclosing(self._run(requests)) as chunks:
            async for _, chunk in chunks:
                yield chunk

    async def _run(self, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Chunk], None]:
        loop, worker = asyncio.get_running_loop(), self.llm._worker
        pieces: asyncio.Queue[tuple[int, Chunk]] = asyncio.Queue()
        submission = Submission(
            requests, lambda index, chunk: loop.call_soon_threadsafe(pieces.put_nowait, (index, chunk))
        )
        left = len(requests)
        try:
            worker.submit(submission)
            while left:
                index, chunk = await pieces.get()
                if isinstance(chunk.error, ClosedError) or (chunk.error is not None and len(requests) == 1):
                    raise chunk.error
                left -= chunk.finish_reason is not None
                yield index, chunk
        finally:
            if left:
                worker.abort(submission)

    async def close(self) -> None:
        """Close the model, as `LLM.close` does."""
        await asyncio.to_thread(self.llm.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
