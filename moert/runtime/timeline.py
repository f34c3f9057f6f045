"""What happened when, in the Chrome trace format that Perfetto shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TRACKS = ("compute", "disk")
MOST_EVENTS = 1_000_000  # about 100 MB of JSON: longer runs keep their beginning


class Timeline:
    """Collects spans of time; `write` saves them. Times are those of `time.perf_counter`, in seconds."""

    def __init__(self) -> None:
        self._events: list[tuple[str, str, float, float, Mapping[str, Any] | None]] = []

    def add(self, track: str, name: str, begin: float, end: float, details: Mapping[str, Any] | None = None) -> None:
        """Something took from `begin` to `end`. track: `compute` or `disk`."""
        if len(self._events) < MOST_EVENTS:
            self._events.append((track, name, begin, end, details))

    def write(self, path: Path) -> None:
        """Save what there is as JSON. OSError where the file cannot be written."""
        start = min((begin for _, _, begin, _, _ in self._events), default=0.0)
        names = [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": tid, "args": {"name": track}}
            for tid, track in enumerate(_TRACKS)
        ]
        spans = [
            {
                "ph": "X",
                "name": name,
                "pid": 1,
                "tid": _TRACKS.index(track),
                "ts": (begin - start) * 1e6,
                "dur": (end - begin) * 1e6,
                "args": dict(details or {}),
            }
            for track, name, begin, end, details in self._events
        ]
        path.write_text(json.dumps({"traceEvents": names + spans, "displayTimeUnit": "ms"}))
