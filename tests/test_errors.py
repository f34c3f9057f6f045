"""Errors travel: between processes, and through copies, with their attributes."""

from __future__ import annotations

import copy
import importlib
import multiprocessing
import pickle
import pkgutil
from concurrent.futures import ProcessPoolExecutor

import pytest

import moert
from moert import errors
from moert.errors import BudgetError, MoertError


def kinds() -> list[type[MoertError]]:
    """All classes of errors in the package."""
    for module in pkgutil.walk_packages(moert.cli.__path__, "moert.cli."):
        importlib.import_module(module.name)
    found = [MoertError]
    for kind in found:
        found += [k for k in kind.__subclasses__() if k.__module__.startswith("moert.") and k not in found]
    return found


def test_every_error_survives_pickling_and_copying() -> None:
    declared = {v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, MoertError)}
    assert declared <= set(kinds())
    for kind in kinds():
        error = kind("Too small.", 5) if kind is BudgetError else kind("Too small.")
        error.__dict__["more"] = ["x"]
        for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert (type(again), str(again), vars(again)) == (kind, "Too small.", vars(error))
            assert again.exit_code == kind.exit_code


def test_a_pool_of_processes_tells_the_reason() -> None:
    code = "from moert.errors import BudgetError; raise BudgetError('Too small.', 5)"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.raises(BudgetError, match=r"^Too small\.$") as caught:
            pool.submit(exec, code).result(timeout=60)
        assert caught.value.least_bytes == 5
