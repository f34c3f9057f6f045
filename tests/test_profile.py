"""Device profiles: what is refused, and by which name; the ones that come along; this machine's."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moert.errors import ProfileError, UsageError
from moert.hardware import devices as devices_module
from moert.hardware.devices import closest, devices, load_device, own_file, this_machine
from moert.hardware.memory import total_bytes
from moert.scheduler.profile import FIGURES, REQUIRED, parse_profile, read_profile

SHIPPED = devices()
GPU = ("gpu_memory_bytes", "gpu_memory_bytes_per_s", "host_to_device_bytes_per_s", "gpu_integrated")
NUMBERS = [name for name in FIGURES if name.endswith(("_s", "_bytes", "_per_byte")) and name != "disk_direct"]
OF_GPU = ("gpu_expert_s_per_byte", "gpu_prefill_macs_per_s", "gpu_launch_overhead_s", "host_to_device_latency_s")
BY_WIDTH = ("expert_s_per_byte", "prefill_macs_per_s", *OF_GPU[:2])


def data(name="laptop-rtx-4060-8gb"):
    """A profile that has all figures."""
    found = json.loads(SHIPPED[name].read_text())
    rows = [{"readers": 2, "size_bytes": 4096, "bytes_per_s": 1e9, "latency_s": 1e-4}]
    reads = {"value": rows, "kind": "measured", "source": "a test", "date": "2026-11-22", "spread": 0.1}
    measured = json.loads(SHIPPED["server-2-core-amx"].read_text())["figures"]
    found["figures"] = {**measured, **found["figures"], "disk_reads": reads}
    return found


def refused(content):
    with pytest.raises(ValueError) as error:
        parse_profile(content)
    return str(error.value)


@pytest.mark.parametrize("name", SHIPPED)
def test_profiles_that_come_along_are_right(name):
    profile = load_device(name)
    assert profile.name == name
    assert profile.expert_s_per_byte.keys() >= {2, 3, 4}
    assert (profile.gpu_memory_bytes is None) == (profile.gpu_integrated is None)
    content = json.loads(SHIPPED[name].read_text())
    assert profile.date == max(figure["date"] for figure in content["figures"].values())
    for figure, value in content["figures"].items():
        if figure not in (*BY_WIDTH, "disk_reads"):
            assert getattr(profile, figure) == value["value"]


def test_the_devices_that_the_readme_names_are_there():
    readme = (SHIPPED["server-2-core-amx"].parent / "README.md").read_text()
    for name in (*SHIPPED, *FIGURES):
        assert f"`{name}`" in readme


def test_a_model_that_stays_in_the_caches_has_figures_of_its_own():
    profile = load_device("server-2-core-amx")
    small, large = (profile.for_weights(int(profile.cached_bytes) + more) for more in (0, 1))
    assert large is profile
    assert small.layer_overhead_s == profile.cached_layer_overhead_s < profile.layer_overhead_s
    assert small.expert_cost(2) == small.dense_s_per_byte == profile.cached_s_per_byte
    content = data()
    del content["figures"]["cached_s_per_byte"]
    assert refused(content) == "figures lacks cached_s_per_byte, which belongs to cached_bytes"


def test_figures_of_a_width_that_is_not_known_are_those_of_the_nearest():
    profile = dataclasses.replace(
        load_device("raspberry-pi-5-nvme"), expert_s_per_byte={2: 1.0, 4: 2.0}, prefill_macs_per_s={2: 3.0, 8: 4.0}
    )
    assert [profile.expert_cost(width) for width in (1, 2, 3, 4, 16)] == [1.0, 1.0, 1.0, 2.0, 2.0]
    assert [profile.prefill_rate(width) for width in (4, 6, 16)] == [3.0, 4.0, 4.0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d.pop("name"), "the whole lacks name"),
        (lambda d: d.update(extra=1), "the whole has extra, which is not known"),
        (
            lambda d: d.update(Description="x"),
            "the whole has Description, which is not known; did you mean description?",
        ),
        (lambda d: d.update(schema_version=1), "schema_version 1 is of an older moert; write it anew: moert profile"),
        (lambda d: d.update(schema_version=3), "schema_version 3 is not 2"),
        (lambda d: d.update(schema_version=[2]), "schema_version [2] is not 2"),
        (lambda d: d.update(name=3), "name should be some text"),
        (lambda d: d.update(description=" "), "description should be some text"),
        (lambda d: d.update(figures=[]), "figures should be an object"),
    ],
)
def test_a_malformed_file_names_the_field(change, reason):
    content = data()
    parse_profile(content)
    change(content)
    assert refused(content).startswith(reason)
    assert refused([]) == "the whole should be an object"


@pytest.mark.parametrize("name", [*REQUIRED, *GPU])
def test_a_figure_that_is_missing_is_named(name):
    content = data()
    del content["figures"][name]
    assert refused(content).startswith(f"figures lacks {name}")


def test_figures_of_a_gpu_are_optional_together():
    content = data()
    for name in (*GPU, *OF_GPU, "disk_reads"):
        del content["figures"][name]
    assert parse_profile(content).gpu_memory_bytes is None


@pytest.mark.parametrize(
    ("figure", "meant"),
    [
        ("disk_gb_per_s", "disk_bytes_per_s"),
        ("disk_MiB_per_s", "disk_bytes_per_s"),
        ("memory_GB", "memory_bytes"),
        ("disk-latency-ms", "disk_latency_s"),
        ("layer_overhead_us", "layer_overhead_s"),
        ("library_mb", "library_bytes"),
        ("expert_ns_per_byte", "expert_s_per_byte"),
        ("attention_gmacs_per_s", "attention_macs_per_s"),
        ("memory_bytes_per_second", "memory_bytes_per_s"),
        ("disk_bytes_per_sec", "disk_bytes_per_s"),
        ("gpu_memory_byts", "gpu_memory_bytes"),
    ],
)
def test_names_with_other_units_get_a_guess(figure, meant):
    content = data()
    content["figures"][figure] = content["figures"]["memory_bytes"]
    assert f"figures has {figure}, which is not known; did you mean {meant}?" in refused(content)


def test_a_name_like_no_other_gets_no_guess():
    content = data()
    content["figures"]["colour"] = 1
    assert refused(content) == "figures has colour, which is not known"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"date": None}, "memory_bytes.date None is not a date such as"),
        ({"date": "2026-13-01"}, "memory_bytes.date '2026-13-01' is not a date such as"),
        ({"kind": "guess"}, "memory_bytes.kind 'guess' is none of measured, datasheet, derived"),
        ({"kind": "measured"}, "memory_bytes lacks spread: "),
        ({"spread": -0.1}, "memory_bytes.spread -0.1 should not be below zero"),
        ({"spread": "small"}, "memory_bytes.spread should be a number, not 'small'"),
        ({"source": ""}, "memory_bytes.source should say where"),
        ({"units": "GB"}, "memory_bytes has units, which is not known"),
        ({"value": "8"}, "memory_bytes.value should be a number, not '8'"),
        ({"value": True}, "memory_bytes.value should be a number, not 'True'"),
        ({"value": math.nan}, "memory_bytes.value should be a number, not 'nan'"),
        ({"value": 10**400}, "memory_bytes.value should be a number"),
        ({"value": 0}, "memory_bytes.value 0 should be above zero"),
        ({"value": 16}, "memory_bytes.value 16 is less than any device has (6.71089e+07 bytes): is it in bytes?"),
    ],
)
def test_a_malformed_figure_is_named(change, reason):
    content = data()
    content["figures"]["memory_bytes"].update(change)
    assert refused(content).startswith(reason)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1, 1e17, "3.5 GB/s", None, [1]])
def test_impossible_figures_are_refused_by_name(name, value):
    content = data()
    figure = content["figures"][name]
    figure["value"] = {"4": value} if name in BY_WIDTH else value
    assert refused(content).startswith(f"{name}.value")


@pytest.mark.parametrize(
    ("figure", "value", "reason"),
    [
        ("memory_bytes_per_s", 68, "memory_bytes_per_s.value 68 is less than any device has (1e+06 bytes per second)"),
        ("memory_bytes_per_s", 2e9, "disk_bytes_per_s is more than memory_bytes_per_s"),
        ("library_bytes", 60e9, "library_bytes is not less than memory_bytes"),
        ("dense_s_per_byte", 1e-12, "dense_s_per_byte 1e-12 would be 1e+12 bytes per second, but memory_bytes_per_s"),
        ("expert_s_per_byte", {"2": 5e-11, "4": 1e-12}, "expert_s_per_byte.value.4 1e-12 would be 1e+12 bytes per"),
        ("expert_s_per_byte", 1, "expert_s_per_byte.value should be an object with a figure for each width"),
        ("expert_s_per_byte", {}, "expert_s_per_byte.value should be an object with a figure for each width"),
        ("expert_s_per_byte", {"four": 1}, "expert_s_per_byte.value has 'four', which is no width"),
        ("expert_s_per_byte", {"17": 1}, "expert_s_per_byte.value has '17', which is no width"),
        ("expert_s_per_byte", {"2": 0}, "expert_s_per_byte.value.2 0 should be above zero"),
        ("disk_direct", 1, "disk_direct.value should be true or false, not '1'"),
        ("gpu_integrated", "no", "gpu_integrated.value should be true or false, not 'no'"),
        ("disk_reads", {}, "disk_reads.value should be a list of reads"),
        ("disk_reads", [3], "disk_reads.value[0] should be an object"),
        ("disk_reads", [{"readers": 1, "size": 1}], "disk_reads.value[0] has size, which is not known"),
    ],
)
def test_figures_that_cannot_be_are_refused(figure, value, reason):
    content = data()
    content["figures"][figure]["value"] = value
    assert refused(content).startswith(reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"readers": 0}, "disk_reads.value[0].readers '0' is not a whole number from 1 to 1024"),
        ({"size_bytes": 1.5}, "disk_reads.value[0].size_bytes '1.5' is not a whole number"),
        ({"bytes_per_s": 1e15}, "disk_reads.value[0].bytes_per_s 1e+15 is more than any device has"),
        ({"latency_s": -1}, "disk_reads.value[0].latency_s -1 should be above zero"),
    ],
)
def test_rows_of_disk_reads_are_checked(change, reason):
    content = data()
    content["figures"]["disk_reads"]["value"][0].update(change)
    assert refused(content).startswith(reason)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(json_values)
def test_whatever_a_file_holds_it_is_one_sentence(value):
    assert "\n" not in refused(value).splitlines()[0]


def outcome(content):
    """The profile, or why it is refused."""
    try:
        return parse_profile(content), ""
    except ValueError as error:
        return None, str(error)


@given(st.sampled_from(FIGURES), st.sampled_from(["value", "kind", "source", "date", "spread"]), json_values)
def test_whatever_a_figure_holds_it_is_right_or_named(name, key, value):
    content = data()
    content["figures"][name][key] = value
    profile, reason = outcome(content)
    assert profile is not None or name in reason or "memory_bytes" in reason


@given(st.sampled_from([n for n in NUMBERS if n not in BY_WIDTH]), st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_kept_or_refused_by_its_name(name, value):
    content = data()
    content["figures"][name]["value"] = value
    profile, reason = outcome(content)
    assert name in reason or "memory_bytes" in reason or getattr(profile, name) == value


@given(st.data())
def test_removing_or_renaming_anything_required_is_refused(drawn):
    content = data()
    name = drawn.draw(st.sampled_from(REQUIRED))
    key = drawn.draw(st.sampled_from(["", "value", "kind", "source", "date"]))
    place = content["figures"][name] if key else content["figures"]
    kept = copy.deepcopy(place.pop(key or name))
    new = drawn.draw(st.none() | st.text(min_size=1, max_size=8))
    if new is not None and new not in ("spread", *FIGURES):
        place[new] = kept
    assert (key or name) in refused(content) or (new is not None and new in refused(content))


def test_files_are_named_with_their_error(tmp_path):
    bad = tmp_path / "bad.json"
    for text, reason in [("{", "it is not JSON"), ("\udcff", "it is not JSON"), ("[" * 100000, "it is not JSON")]:
        bad.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=r"bad\.json is not a device profile: " + reason):
            read_profile(bad)
        with pytest.raises(ProfileError, match=reason):
            load_device(bad)
    with pytest.raises(ProfileError, match="cannot be read: Is a directory"):
        load_device(tmp_path)
    with pytest.raises(UsageError, match="'toaster' is neither a file nor one of jetson-agx-orin-64gb, jetson-orin-n"):
        load_device("toaster")


def homeless():
    raise RuntimeError("Could not determine home directory.")


def test_this_machine_is_what_was_measured_else_the_most_similar_device(tmp_path, monkeypatch):
    monkeypatch.setenv("MOERT_CACHE", str(tmp_path / "cache"))
    profile, line = this_machine()
    assert profile.name == closest()
    assert profile.memory_bytes == total_bytes()
    assert line == f"default figures for {profile.name} (moert profile measures this machine)"
    own_file().parent.mkdir()
    own_file().write_text(json.dumps(data() | {"name": "mine"}))
    profile, line = this_machine()
    assert profile.name == "mine"
    assert line == f"device profile {own_file()}, measured on {profile.date}"
    with monkeypatch.context() as patched:
        patched.setattr(devices_module, "own_file", homeless)
        assert this_machine()[1].startswith("default figures")
    own_file().write_text(json.dumps(data() | {"schema_version": 1}))
    profile, line = this_machine()
    assert profile.name == closest()
    assert line.startswith("default figures")
    assert line.endswith("schema_version 1 is of an older moert; write it anew: moert profile")


@pytest.mark.parametrize(
    ("board", "machine", "nvidia", "cores", "name"),
    [
        ("NVIDIA Jetson Orin Nano Developer Kit\0", "aarch64", False, 6, "jetson-orin-nano-8gb"),
        ("NVIDIA Jetson Orin NX Engineering Reference\0", "aarch64", False, 8, "jetson-orin-nx-16gb"),
        ("NVIDIA Jetson AGX Orin\0", "aarch64", False, 12, "jetson-agx-orin-64gb"),
        ("Raspberry Pi 5 Model B Rev 1.0\0", "aarch64", False, 4, "raspberry-pi-5-nvme"),
        (None, "arm64", False, 10, "jetson-orin-nx-16gb"),
        (None, "x86_64", True, 8, "laptop-rtx-4060-8gb"),
        (None, "x86_64", False, 8, "laptop-16gb-nvme"),
        (None, "x86_64", False, 2, "server-2-core-amx"),
        (None, "x86_64", False, None, "server-2-core-amx"),
    ],
)
def test_the_most_similar_device(tmp_path, monkeypatch, board, machine, nvidia, cores, name):
    monkeypatch.setattr(devices_module, "DEVICE_TREE", tmp_path / "model")
    if board is not None:
        (tmp_path / "model").write_text(board)
    monkeypatch.setattr(devices_module, "NVIDIA", tmp_path if nvidia else tmp_path / "none")
    monkeypatch.setattr(devices_module.platform, "machine", lambda: machine)
    monkeypatch.setattr(devices_module.psutil, "cpu_count", lambda logical: cores)
    assert closest() == name
    monkeypatch.setenv("MOERT_CACHE", str(tmp_path / "cache"))
    profile, _ = this_machine()
    if profile.gpu_integrated:
        assert profile.gpu_memory_bytes == profile.memory_bytes
    assert Path(SHIPPED[name]).exists()
