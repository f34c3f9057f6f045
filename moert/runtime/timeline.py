"""Write what happened when, in the Chrome trace format (JSON array form) that Perfetto shows."""

from __future__ import annotations

import json
import time
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from moert.errors import UsageError

MOST_EVENTS = 2_000_000  # some 250 MB: longer runs keep their beginning
_COMPUTE, _DEMAND, _AHEAD, _DEVICE, _MOVES = 0, 1, 1000, 2000, 2001  # first number of the lanes of each kind


class Spans(Protocol):
    """Is told of spans of time as they end; `Timeline` says what they are."""

    def step(self, count: int, first: int | None) -> AbstractContextManager[None]: ...

    def dense(self, name: str, end: float) -> None: ...

    def compute(self, name: str, begin: float, end: float) -> None: ...

    def read(self, name: str, begin: float, end: float, nbytes: int, ahead: bool) -> None: ...

    def device(self, name: str, begin: float, end: float) -> None: ...

    def move(self, name: str, begin: float, end: float) -> None: ...


class Timeline:
    """Writes spans of time to a file as they end, so that they take no memory. Times: `time.perf_counter`, in seconds.

    What computes is one lane: passes, and within them attention, waiting and experts, one after the other. Reads
    overlap, so they are put on as many lanes as it takes, those on demand and those ahead apart. What a device computes
    and what is copied to it are a lane each. Raises UsageError
    where the file cannot be written. error: what went wrong later, or None; then the file ends before that.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = open(path, "wb")  # noqa: SIM115
        except OSError as error:
            raise UsageError(
                f"The timeline cannot be written to {path}: {error.strerror}; name another file with --timeline."
            ) from None
        self.path = path
        self.error: OSError | None = None
        self._start = self._last = time.perf_counter()
        self._events = 0
        self._lanes: dict[int, tuple[array[int], array[int]]] = {}  # of reads: begin and end of each, ascending
        self._put("[\n" + json.dumps(_named(_COMPUTE, "compute")))

    @property
    def full(self) -> bool:
        """Tell whether there was more than it takes."""
        return self._events >= MOST_EVENTS

    @contextmanager
    def step(self, count: int, first: int | None) -> Iterator[None]:
        """A forward pass of `count` tokens, from position `first` on or of several sequences."""
        name = f"tokens of several sequences: {count}"
        if first is not None:
            name = f"token {first}" if count == 1 else f"tokens {first} to {first + count - 1}"
        begin, self._last = time.perf_counter(), time.perf_counter()  # apart: what begins with its parts nests badly
        try:
            yield
        finally:
            self.dense("head", time.perf_counter())
            self._add(_COMPUTE, name, begin, time.perf_counter())

    def dense(self, name: str, end: float) -> None:
        """Note what was computed since the last experts."""
        self.compute(name, self._last, end)

    def compute(self, name: str, begin: float, end: float) -> None:
        """Something on the lane of what computes. What began earlier may end later only if it is a pass."""
        self._add(_COMPUTE, name, begin, end)
        self._last = end

    def read(self, name: str, begin: float, end: float, nbytes: int, ahead: bool) -> None:
        """A read from disk; ahead: it was a prefetch."""
        first, last = self._ns(begin), self._ns(end)
        lane = _AHEAD if ahead else _DEMAND
        while True:
            if lane not in self._lanes:
                self._lanes[lane] = array("q"), array("q")
                number = lane - (_AHEAD if ahead else _DEMAND) + 1
                self._put(",\n" + json.dumps(_named(lane, f"{'prefetches' if ahead else 'reads on demand'} {number}")))
            begins, ends = self._lanes[lane]
            at = bisect_right(begins, first)
            if (at == 0 or ends[at - 1] <= first) and (at == len(begins) or last <= begins[at]):
                break
            lane += 1
        if not self.full:
            begins.insert(at, first)
            ends.insert(at, last)
        self._add(lane, name, begin, end, f',"args":{{"bytes":{nbytes}}}')

    def device(self, name: str, begin: float, end: float) -> None:
        """Something that a device computed."""
        self._one_by_one(_DEVICE, "device", name, begin, end)

    def move(self, name: str, begin: float, end: float) -> None:
        """A copy from host to device memory."""
        self._one_by_one(_MOVES, "moves to the device", name, begin, end)

    def _one_by_one(self, lane: int, title: str, name: str, begin: float, end: float) -> None:
        if lane not in self._lanes:
            self._lanes[lane] = array("q"), array("q")
            self._put(",\n" + json.dumps(_named(lane, title)))
        self._add(lane, name, begin, end)

    def close(self) -> None:
        """The file is complete then."""
        self._put("\n]\n")
        try:
            self._file.close()
        except OSError as error:
            self.error = self.error or error

    def about(self) -> str:
        """One line: where it is, and whether all of it."""
        if self.error is not None:
            return f"The timeline in {self.path} breaks off: {self.error.strerror}."
        return f"timeline: {self.path}, {self._events} spans{' (the first ones: it is full)' if self.full else ''}"

    def _ns(self, at: float) -> int:
        return max(0, round((at - self._start) * 1e9))

    def _add(self, lane: int, name: str, begin: float, end: float, more: str = "") -> None:
        if self.full:
            return
        self._events += 1
        first, last = self._ns(begin), self._ns(end)
        span = f'"ts":{first / 1e3:.3f},"dur":{(last - first) / 1e3:.3f}'
        self._put(f',\n{{"ph":"X","pid":1,"tid":{lane},"name":"{name}",{span}{more}}}')

    def _put(self, text: str) -> None:
        if self.error is None:
            try:
                self._file.write(text.encode())
            except OSError as error:  # a full disk is no reason to break off an answer
                self.error = error


def _named(lane: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": "thread_name", "pid": 1, "tid": lane, "args": {"name": name}}
