"""Run Mixture-of-Experts language models larger than memory.

The public names are loaded on first use, so that `import moert` stays light.
"""

from __future__ import annotations

import pathlib as _pathlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# `quant`, `scheduler` and `device_profiles` stand at the top level of the repository and install as subpackages.
if not (_pathlib.Path(__file__).parent / "quant").exists():
    __path__.append(str(_pathlib.Path(__file__).parents[1]))

if TYPE_CHECKING:
    from moert.api import LLM as LLM
    from moert.api import AsyncLLM as AsyncLLM
    from moert.api import Chunk as Chunk
    from moert.api import Completion as Completion
    from moert.engine.sampling import SamplingParams as SamplingParams
    from moert.errors import MoertError as MoertError

_EXPORTS = {
    "LLM": "moert.api",
    "AsyncLLM": "moert.api",
    "Chunk": "moert.api",
    "Completion": "moert.api",
    "MoertError": "moert.errors",
    "SamplingParams": "moert.engine.sampling",
}
__all__ = ["LLM", "AsyncLLM", "Chunk", "Completion", "MoertError", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'moert' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
