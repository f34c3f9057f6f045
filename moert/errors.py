"""Errors that a user can meet: each message is one sentence that says what is wrong, where, and what to do.

The command line prints the message without a traceback and leaves with `exit_code`.
"""

from __future__ import annotations


class MoertError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(MoertError):
    """An option or argument is wrong."""

    exit_code = 2


class ClosedError(MoertError):
    """A model was used after it was closed, or in a child of the process that loaded it."""


class BudgetError(MoertError):
    """Something does not fit the memory that was allowed.

    `least_bytes` is the least budget that would do; 0 where that is not known.
    """

    exit_code = 2

    # With a default, so that copying and pickling can call it with the message alone; the attribute follows.
    def __init__(self, message: str, least_bytes: int = 0) -> None:
        super().__init__(message)
        self.least_bytes = least_bytes


class CheckpointError(MoertError):
    """A source checkpoint is missing, malformed or unsafe to read."""


class UnsupportedModelError(MoertError):
    """The model type, or a variant of it that its configuration asks for, is not supported."""


class StoreError(MoertError):
    """A store is missing, damaged or of another format version."""


class TemplateError(MoertError):
    """The chat template of a model cannot be used."""


class TraceError(MoertError):
    """A routing trace is malformed, or has nothing to decode."""


class ProfileError(MoertError):
    """A device profile is malformed, or cannot be read or written."""


class DeviceError(MoertError):
    """A device cannot be used, is out of memory, or was lost."""


class DeviceMemoryError(DeviceError):
    """A device has less memory than it was asked for."""

    exit_code = 2
