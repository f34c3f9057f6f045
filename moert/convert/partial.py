"""The folder OUT.partial of an unfinished conversion: what is finished, and who works in it.

progress.json   settings, fingerprint of the source, and the finished weight files with their checksums
store/          becomes OUT
...             what the quantiser keeps for a later run
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moert.errors import StoreError
from moert.store.fileio import sync_folder, write_json
from moert.store.layout import META_FILE
from moert.store.meta import StoreMeta

PROGRESS_FILE = "progress.json"


@dataclass(frozen=True, slots=True)
class Finished:
    """A weight file that is whole: bytes, where its data begin, and a CRC-32 per tensor in the order of the file.

    sensitivity, usage, router_weights: of a layer's experts, where they were measured (see `Measured`).
    """

    size: int
    data_start: int
    checksums: list[int]
    sensitivity: list[list[float]] | None = None
    usage: list[float] | None = None
    router_weights: list[list[float]] | None = None


@dataclass
class Partial:
    """An unfinished conversion that this process holds the lock of."""

    out: Path
    folder: Path
    settings: dict[str, Any]
    fingerprint: dict[str, Any]
    began_here: bool
    others: Sequence[str] = ()  # files of the quantiser, removed with the rest
    finished: dict[str, Finished] = field(default_factory=dict)
    kl: list[float] | None = None  # of the whole model at each width, once it was measured

    @property
    def store(self) -> Path:
        """The folder that becomes the store."""
        return self.folder / "store"

    @classmethod
    @contextmanager
    def begin(
        cls,
        out: Path,
        settings: dict[str, Any],
        fingerprint: dict[str, Any],
        resume: bool,
        others: Sequence[str] = (),
    ) -> Iterator[Partial]:
        """Make or take over OUT.partial. StoreError where it is there and may not be taken over."""
        folder = out.with_name(out.name + ".partial")
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
            began_here = True
        except FileExistsError:
            began_here = False
            if not resume:
                raise StoreError(
                    f"{folder} is left from an unfinished conversion: go on with --resume or delete it."
                ) from None
        partial = cls(out, folder, settings, fingerprint, began_here, others)
        lock = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreError(f"Another conversion is writing to {folder} now: wait for it to end.") from None
            partial._restore()
            partial.store.mkdir(exist_ok=True)
            yield partial
        finally:
            os.close(lock)

    def _restore(self) -> None:
        """Read what an earlier run finished, after checking that this run would write the same."""
        path = self.folder / PROGRESS_FILE
        if not path.exists():
            self._save()
            return
        try:
            state = json.loads(path.read_bytes())
            settings, fingerprint = state["settings"], state["fingerprint"]
            files = {name: Finished(**value) for name, value in state["files"].items()}
            self.kl = state["kl"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{path} is damaged: delete {self.folder} and convert again.") from error
        if settings != self.settings:
            changed = [key for key in self.settings if settings.get(key) != self.settings[key]]
            raise StoreError(
                f"{self.folder} was begun with other settings ({', '.join(changed) or 'unknown'}):"
                " resume with the same ones or delete it."
            )
        if fingerprint != self.fingerprint:
            raise StoreError(f"The checkpoint has changed since {self.folder} was begun: delete it and convert again.")
        for name, file in files.items():
            target = self.store / name
            if target.is_file() and target.stat().st_size == file.size:
                self.finished[name] = file

    def _save(self) -> None:
        files = {name: asdict(file) for name, file in self.finished.items()}
        write_json(
            self.folder / PROGRESS_FILE,
            {"settings": self.settings, "fingerprint": self.fingerprint, "files": files, "kl": self.kl},
        )

    def finish(self, name: str, file: Finished) -> None:
        """Record a file that is whole and durable."""
        self.finished[name] = file
        self._save()

    def measured(self, kl: list[float]) -> None:
        """Record what the whole model loses at each width."""
        self.kl = kl
        self._save()

    def rename(self, name: str, new: str) -> None:
        """Give a finished file another name. Broken off at any moment, it is done by doing it again."""
        if name in self.finished:
            self.finished[new] = self.finished[name]
            self._save()  # under both names: the one that is not there counts for nothing
            os.rename(self.store / name, self.store / new)
            del self.finished[name]
            self._save()

    def drop(self, name: str) -> None:
        """Remove a file that is not needed any more, whether it is there or not."""
        self.finished.pop(name, None)
        (self.store / name).unlink(missing_ok=True)

    def abandon(self) -> None:
        """Remove the folder again if this run made it and nothing was converted."""
        if self.began_here and not self.finished:
            self._remove()

    def publish(self, meta: StoreMeta) -> None:
        """Write moert.json and let the store appear as OUT."""
        write_json(self.store / META_FILE, meta.as_json())
        if os.path.lexists(self.out):  # rename would silently replace an empty folder
            raise StoreError(f"{self.out} has appeared meanwhile: delete it and go on with --resume.")
        os.rename(self.store, self.out)
        sync_folder(self.out.parent)
        self._remove()

    def _remove(self) -> None:
        # Never recursively: what is not ours stays.
        if self.store.is_dir():
            self.store.rmdir()
        for name in (PROGRESS_FILE, *self.others):
            for file in (name, name + ".tmp"):
                (self.folder / file).unlink(missing_ok=True)
        try:
            self.folder.rmdir()
        except OSError:
            return
