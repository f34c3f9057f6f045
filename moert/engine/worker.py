"""The thread that runs an engine, and what its callers on other threads hold: nothing of torch runs on theirs.

Requests and tasks come in through one queue; pieces of answers go out to whoever asked. A task has the model for
itself: it runs when the requests before it have ended, and those behind it wait.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from queue import SimpleQueue
from typing import Generic, TypeVar

from moert.engine.engine import Engine, Output
from moert.engine.model_runner import ModelRunner, TaskCancelled
from moert.engine.sequence import Chunk, Request
from moert.errors import ClosedError, MoertError, UsageError
from moert.text.tokenizer import Tokenizer

T = TypeVar("T")
INTERVAL = 0.005  # 200 pieces of an answer a second are more than anybody can tell apart
CLOSED = "This model is closed: load it again to use it."
Deliver = Callable[[int, Chunk], object]


class Submission:
    """Requests that somebody waits for.

    deliver: called on the engine's thread with the index of a request and a piece of its answer.
    """

    def __init__(self, requests: Sequence[Request], deliver: Deliver) -> None:
        self.requests, self.deliver = requests, deliver
        self.ids: list[int] = []  # that the engine gave them
        self.aborted = False


class _Task(Generic[T]):
    """A function of the model that somebody waits for."""

    def __init__(self, function: Callable[[ModelRunner], T]) -> None:
        self._function = function
        self._result: T
        self._error: BaseException | None = None
        self._done: SimpleQueue[None] = SimpleQueue()
        self.cancelled = False

    def run(self, runner: ModelRunner) -> None:
        try:
            self._result = self._function(runner)
        except BaseException as error:  # whatever it is, it is the caller's
            self._error = error
        self._done.put(None)

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._done.put(None)

    def wait(self) -> T:
        try:
            self._done.get()
        except BaseException:  # Ctrl-C: what runs ends with the chunk that is being computed
            self.cancelled = True
            self._done.get()
            raise
        if isinstance(self._error, TaskCancelled):
            raise ClosedError(CLOSED)
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # no cycle through the traceback
        return self._result


_Message = Submission | _Task  # type: ignore[type-arg]


class Worker:
    """Owns the thread, its engine and the model.

    at_end: called on that thread when it ends, before the model is closed; more may be added by tasks. All methods may
    be called from any thread.
    """

    def __init__(self, runner: ModelRunner, tokenizer: Tokenizer, at_end: Sequence[Callable[[], object]] = ()) -> None:
        self._runner, self._engine, self.at_end = runner, Engine(runner, tokenizer, INTERVAL), [*at_end]
        self._inbox: SimpleQueue[_Message | None] = SimpleQueue()  # None: look what has changed
        self._backlog: deque[_Message] = deque()
        self._owners: dict[int, tuple[Submission, int]] = {}
        self._current: _Task | None = None  # type: ignore[type-arg]
        self._aborts: deque[Submission] = deque()
        self._closing = self._closed = False
        self._failure: BaseException | None = None
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._main, name="moert-engine", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise ClosedError where nothing can be computed any more."""
        self._check_fork()
        if self._closing:
            raise ClosedError(CLOSED)

    def _check_fork(self) -> None:
        if os.getpid() != self._pid:
            raise ClosedError("This model was loaded before the process was forked: load it again in the child.")

    def submit(self, submission: Submission) -> None:
        """Let the requests run; their answers are delivered piece by piece. Raises ClosedError."""
        if self._is_own_thread():
            raise UsageError("A task of the model cannot wait for answers of the same model: ask for them outside.")
        self._put(submission)

    def abort(self, submission: Submission) -> None:
        """End what is left of the requests; nothing more of them is delivered, but for what is on its way."""
        if os.getpid() == self._pid:
            submission.aborted = True
            self._aborts.append(submission)
            self._inbox.put(None)

    def stream(self, requests: Sequence[Request]) -> Generator[tuple[int, Chunk], None, None]:
        """Pieces of the answers as they come, each with the index of its request. Raises ClosedError.

        To close or to drop the iterator ends the requests.
        """
        pieces: SimpleQueue[tuple[int, Chunk]] = SimpleQueue()
        submission, left = Submission(requests, lambda index, chunk: pieces.put((index, chunk))), len(requests)
        try:
            self.submit(submission)
            while left:
                self._check_fork()
                index, chunk = pieces.get()
                if isinstance(chunk.error, ClosedError):
                    raise ClosedError(str(chunk.error))
                left -= chunk.finish_reason is not None
                yield index, chunk
        finally:
            if left:
                self.abort(submission)

    def call(self, function: Callable[[ModelRunner], T]) -> T:
        """Run a function of the model on the engine's thread, when no request runs; returns what it returns.

        Ctrl-C ends it with the chunk of tokens that is computed. Raises what it raises, and ClosedError.
        """
        if self._is_own_thread():
            return function(self._runner)
        task = _Task(function)
        self._put(task)
        return task.wait()

    def close(self) -> None:
        """End everything, with an error for those who wait: the step that runs is the last. Can be called again."""
        if os.getpid() != self._pid:
            return
        self._closing = True
        self._inbox.put(None)
        if not self._is_own_thread():
            self._thread.join()
        if self._failure is not None:
            error, self._failure = self._failure, None
            raise error

    def _is_own_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def _put(self, message: _Message) -> None:
        self.check()
        self._inbox.put(message)
        if self._closed:  # maybe nobody looks into the queue any more
            self.check()

    def _main(self) -> None:
        try:
            self._runner.enter_thread()
            while not self._closing:
                self._receive()
                self._begin()
                if self._engine.has_work and not self._closing:
                    self._deliver(self._step())
        finally:
            self._end()

    def _receive(self) -> None:
        """Take what came in; wait for it where there is nothing else to do."""
        while not self._inbox.empty() or not (self._engine.has_work or self._backlog or self._closing):
            message = self._inbox.get()
            if message is not None:
                self._backlog.append(message)
        while self._aborts:
            submission = self._aborts.popleft()
            for request_id in submission.ids:
                self._engine.abort(request_id)
                self._owners.pop(request_id, None)

    def _begin(self) -> None:
        """Begin what is next in the queue, so far as it need not wait."""
        while self._backlog and not self._closing:
            message = self._backlog[0]
            if isinstance(message, _Task):
                if self._engine.has_work:
                    return
                self._run(message)
            elif not message.aborted:
                self._add(message)
            self._backlog.popleft()

    def _add(self, submission: Submission) -> None:
        for index, request in enumerate(submission.requests):
            submission.ids.append(request_id := self._engine.add_request(request))
            self._owners[request_id] = submission, index

    def _run(self, task: _Task) -> None:  # type: ignore[type-arg]
        if task.cancelled:
            task.fail(TaskCancelled())
            return
        self._current = task
        self._runner.cancelled = lambda: task.cancelled or self._closing
        task.run(self._runner)
        self._runner.cancelled = lambda: False
        self._current = None

    def _step(self) -> list[Output]:
        try:
            return self._engine.step()
        except BaseException as error:  # a mistake of ours: those who wait must learn of it, and others may go on
            failed = MoertError(f"The engine failed unexpectedly: {type(error).__name__}: {error}.")
            failed.__cause__ = error
            return self._engine.fail(failed)

    def _deliver(self, outputs: Sequence[Output]) -> None:
        for request_id, chunk in outputs:
            owner = self._owners.get(request_id)
            if owner is None:
                continue
            submission, index = owner
            if chunk.finish_reason is not None:
                del self._owners[request_id]
            try:
                submission.deliver(index, chunk)
            except Exception:  # there is nobody any more who could take it
                self._engine.abort(request_id)
                self._owners.pop(request_id, None)

    def _end(self) -> None:
        self._closing = self._closed = True
        error = ClosedError("This model was closed before the answer was complete: load it again to use it.")
        try:
            while not self._inbox.empty():
                message = self._inbox.get()
                if message is not None:
                    self._backlog.append(message)
            for message in self._backlog:
                if isinstance(message, _Task):
                    message.fail(error)
                elif not message.ids and not message.aborted:
                    self._add(message)
            self._deliver(self._engine.fail(error))
        finally:
            for end in [*self.at_end, self._runner.close]:
                try:
                    end()
                except BaseException as failure:  # of whoever closes
                    self._failure = self._failure or failure
