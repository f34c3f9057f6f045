"""Python in a process of its own, with the package that is under test: not the one of the current folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import moert

PYTHON = [sys.executable, "-P"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(moert.__file__).parents[1])}
