"""Settings of an engine: declared once, read from what callers give, refused in one sentence."""

from __future__ import annotations

import typing
from dataclasses import fields
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moert import LLM
from moert.config import EngineConfig, Settings, did_you_mean, parse_bytes
from moert.errors import MoertError, UsageError
from moert.scheduler.eviction import POLICIES
from moert.scheduler.hebf import ORDERS

NAMES = [f.name for f in fields(EngineConfig)]


def test_the_keyword_arguments_are_the_fields() -> None:
    assert list(Settings.__annotations__) == NAMES
    accepted, kept = typing.get_type_hints(Settings), typing.get_type_hints(EngineConfig)
    for name in NAMES:
        wider = set(typing.get_args(accepted[name]) or [accepted[name]])
        assert wider >= set(typing.get_args(kept[name]) or [kept[name]]), name


def test_every_setting_is_documented() -> None:
    assert LLM.__doc__ is not None
    for f in fields(EngineConfig):
        setting = f.metadata["setting"]
        assert setting.help
        assert f"    {f.name}: {setting.help.split()[0]}" in LLM.__doc__
        assert f.type in ("bool",) or setting.metavar


def test_names_of_policies_are_those_of_the_scheduler() -> None:
    for name in POLICIES:
        assert EngineConfig(cache_policy=name).cache_policy == name
    for name in ORDERS:
        assert EngineConfig(load_order=name).load_order == name
    with pytest.raises(UsageError, match=f"it can be {', '.join([*POLICIES][:-1])} or {[*POLICIES][-1]}"):
        EngineConfig(cache_policy="best")
    with pytest.raises(UsageError, match=f"it can be {', '.join([*ORDERS][:-1])} or {[*ORDERS][-1]}"):
        EngineConfig(load_order="best")


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({"memory_budget": "2GiB"}, 2 << 30),
        ({"memory_budget": 6.5e9}, 6_500_000_000),
        ({"memory_budget": "auto"}, None),
        ({"expert_budget": np.int64(4096)}, 4096),
        ({"device_budget": np.float32(4096)}, 4096),
        ({"expert_budget": Fraction(9, 2)}, 4),
        ({"ctx_size": "2048"}, 2048),
        ({"ctx_size": np.int32(7)}, 7),
        ({"threads": " 3 "}, 3),
        ({"batch_size": None}, None),
        ({"kv_bits": "8"}, 8),
        ({"prefetch": 2}, "2"),
        ({"dense_quant": 16}, "16"),
        ({"overlap": False}, False),
        ({"precision": "routed:3"}, "routed:3"),
    ],
)
def test_settings_are_read_as_people_write_them(given: dict[str, object], want: object) -> None:
    ((name, _),) = given.items()
    read = getattr(EngineConfig.of(given), name)
    assert read == want
    assert type(read) is type(want)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("memory_budget", "lots", "memory-budget 'lots' is not a size; write for example 2GiB"),
        ("memory_budget", float("nan"), "memory-budget nan is not a size"),
        ("memory_budget", float("inf"), "memory-budget inf is not a size"),
        ("memory_budget", True, "memory-budget True is not a size"),
        ("memory_budget", [1], r"memory-budget \[1\] is not a size"),
        ("memory_budget", 0.5, "memory-budget 0.5 must be above zero"),
        ("expert_budget", 10**400, "more than any machine has"),
        ("ctx_size", "long", "ctx-size 'long' is not a whole number"),
        ("ctx_size", 20.5, "ctx-size 20.5 is not a whole number"),
        ("ctx_size", 0, "ctx-size 0 must be at least 1"),
        ("ctx_size", "-4", "ctx-size -4 must be at least 1"),
        ("ctx_size", 10**12, "ctx-size 1000000000000 must be at most 2147483647"),
        ("threads", 100_000, "threads 100000 must be at most 1024"),
        ("threads", False, "threads False is not a whole number"),
        ("precision", 4, "precision 4 is not text, such as 'fixed:4'"),
        ("kv_bits", 4, "kv-bits 4 is not known; it can be 8 or 16"),
        ("kv_bits", True, "kv-bits True is not known"),
        ("prefetch", "4", "prefetch '4' is not known; it can be auto, off, 1, 2 or 3"),
        ("prefetch", None, "prefetch None is not known"),
        ("device", "tpu", "device 'tpu' is not known; it can be auto, cpu, cuda, emulated or interpreter"),
        ("dense_quant", "int4", "dense-quant 'int4' is not known; it can be 16, int8, nf4 or off"),
        ("overlap", "no", "overlap 'no' is neither True nor False"),
    ],
)
def test_a_bad_setting_is_named(name: str, value: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EngineConfig.of({name: value})
    with pytest.raises(UsageError, match=message):
        LLM(**{name: value})  # type: ignore[arg-type]


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.complex_numbers(),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(), st.integers(), max_size=1),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(NAMES), VALUES)
def test_whatever_is_given_is_read_or_refused_in_one_sentence(name: str, value: object) -> None:
    try:
        config = EngineConfig.of({name: value})
    except UsageError as error:
        message = str(error)
    else:
        message = name.replace("_", "-")
        assert EngineConfig.of({name: getattr(config, name)}) == config
    assert message.startswith(name.replace("_", "-"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ctxsize", "There is no setting 'ctxsize'; did you mean ctx_size?"),
        ("ctx", "There is no setting 'ctx'; did you mean ctx_size?"),
        ("memory-budget", "did you mean memory_budget?"),
        ("gpu_layers", r"There is no setting 'gpu_layers'; see help\(moert.LLM\)"),
        ("token_scheduler", "There is no setting 'token_scheduler'"),
    ],
)
def test_an_unknown_setting_names_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        LLM(**{name: 1})  # type: ignore[arg-type]


def test_options_are_alike_by_their_letters_not_by_their_dashes() -> None:
    assert did_you_mean("--bogus", ["--verbose"], "!") == "!"
    assert did_you_mean("--tempp", ["--temp", "--top-p"]) == "; did you mean --temp?"
    assert did_you_mean("/sytem", ["/system", "/stats"]) == "; did you mean /system?"


@pytest.mark.parametrize("model", [5, b"x", ["a"], 1.5, True])
def test_a_model_of_a_wrong_type_is_named(model: object) -> None:
    with pytest.raises(UsageError, match=r"^model is .*, but must be a folder or a hub id such as 'owner/name'"):
        LLM(model)  # type: ignore[arg-type]


def test_what_is_called_with_lines_must_be_callable() -> None:
    with pytest.raises(UsageError, match="on_status is 3, but must be a function"):
        LLM(on_status=3)  # type: ignore[arg-type]
    with pytest.raises(MoertError):
        parse_bytes(object())
