"""Jetson boards, from trees made up as Jetson Linux has them; and the lines of doctor on them."""

import json

import pytest

from moert.cli import doctor
from moert.device import cuda
from moert.hardware import jetson
from moert.hardware.jetson import read_jetson

from .program import Program

ORIN_NANO = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
RELEASE = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n# KERNEL_VARIANT: oot"
SUPER = """\
###########################
# < POWER_MODEL ID=9 NAME=COMMENT >
< PARAM TYPE=FILE NAME=EMC >
MAX_FREQ /sys/kernel/nvpmodel_clk_cap/emc
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_4 1
GPU MIN_FREQ 0
GPU MAX_FREQ 612000000
EMC MAX_FREQ 2133000000
< POWER_MODEL ID=1 NAME=25W >
GPU MAX_FREQ 918000000
EMC MAX_FREQ 3199000000
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
GPU MAX_FREQ -1
EMC MAX_FREQ 0
< POWER_MODEL ID=3 NAME=7W >
GPU MAX_FREQ 408000000
EMC MAX_FREQ 2133000000
< PM_CONFIG DEFAULT=1 >
"""
XAVIER_NX = """\
< POWER_MODEL ID=0 NAME=MODE_15W_2CORE >
< POWER_MODEL ID=2 NAME=MODE_15W_6CORE >
< POWER_MODEL ID=8 NAME=MODE_20W_6CORE >
< POWER_MODEL ID=3 NAME=MODE_10W_2CORE >
"""


def tree(root, **files):
    """A tree with the files of these names; the names of jetson.py, and paths for the rest."""
    for name, text in files.items():
        known = {"model": jetson.DEVICE_TREE, "release": jetson.RELEASE, "mode": jetson.MODE, "modes": jetson.MODES}
        path = root / (known[name].relative_to("/") if name in known else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def clocks(folder, now, most, names=("cur_freq", "max_freq")):
    return {f"{folder}/{name}": f"{hz}\n" for name, hz in zip(names, (now, most), strict=True)}


def orin_nano(root, mode="pmode:0000 fmode:quiet\n", **files):
    gpu = clocks("sys/class/devfreq/17000000.gpu", 306000000, 1020000000)
    files = {"mode": mode, **gpu, **clocks("sys/class/devfreq/15340000.vic", 1, 2), **files}
    return tree(root, model=ORIN_NANO + "\0", release=RELEASE, modes=SUPER, **{k: v for k, v in files.items() if v})


def test_a_board_with_all_its_files(tmp_path):
    emc = clocks("sys/kernel/debug/bpmp/debug/clk/emc", 2133000000, 3199000000, ("rate", "max_rate"))
    board = read_jetson(orin_nano(tmp_path, **emc))
    assert board.model == ORIN_NANO
    assert (board.release, board.jetpack) == ("36.4.3", 6)
    assert (board.mode.number, board.mode.name, board.mode.emc_hz, board.mode.gpu_hz) == (0, "15W", 2.133e9, 6.12e8)
    assert (board.fastest.number, board.fastest.name) == (2, "MAXN_SUPER")  # neither the first nor the last
    assert board.gpu_hz == (306000000, 1020000000)
    assert board.emc_hz == (2133000000, 3199000000)


def test_the_mode_that_nobody_chose_is_the_default(tmp_path):
    assert read_jetson(orin_nano(tmp_path, mode=None)).mode.name == "25W"


def test_modes_without_a_name_that_tells_are_ordered_by_what_they_allow(tmp_path):
    capped = SUPER.replace("MAXN_SUPER", "C").replace("25W", "B").replace("15W", "A").replace("7W", "D")
    assert read_jetson(tree(tmp_path, model="Jetson", modes=capped)).fastest.name == "C"
    assert read_jetson(tree(tmp_path, modes=XAVIER_NX)).fastest.name == "MODE_20W_6CORE"


@pytest.mark.parametrize(
    ("release", "want"),
    [
        (RELEASE, ("36.4.3", 6)),
        ("# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref", ("35.4.1", 5)),
        ("# R38 (release), REVISION: 2.2, GCID: 42205042", ("38.2.2", 7)),
        ("# R99 (release), REVISION: 1.0, GCID: 1", ("99.1.0", None)),
        ("something else", (None, None)),
    ],
)
def test_releases(tmp_path, release, want):
    board = read_jetson(tree(tmp_path, model="NVIDIA Jetson AGX Orin Developer Kit\0", release=release))
    assert (board.release, board.jetpack) == want


def test_a_container_has_hardly_any_of_it(tmp_path):
    assert read_jetson(tmp_path) is None
    board = read_jetson(tree(tmp_path, release=RELEASE))
    assert board.model == "a Jetson board"
    assert (board.mode, board.fastest, board.gpu_hz, board.emc_hz) == (None, None, None, None)


def test_other_boards_are_none(tmp_path):
    assert read_jetson(tree(tmp_path, model="Raspberry Pi 5 Model B Rev 1.0\0")) is None


@pytest.mark.parametrize(
    ("name", "want"),
    [("17000000.ga10b", (1, 2)), ("17000000.gv11b", (1, 2)), ("57000000.gpu", (1, 2)), ("15340000.vic", None)],
)
def test_gpus_of_all_generations(tmp_path, name, want):
    assert read_jetson(tree(tmp_path, release=RELEASE, **clocks(f"sys/class/devfreq/{name}", 1, 2))).gpu_hz == want


def test_what_makes_no_sense_is_left_out(tmp_path):
    files = clocks("sys/class/devfreq/17000000.gpu", "", "many")
    board = read_jetson(orin_nano(tmp_path, mode="pmode:0007", **files))
    assert board.mode is None
    assert board.fastest.name == "MAXN_SUPER"
    assert board.gpu_hz is None


@pytest.fixture
def findings(capsys, monkeypatch, tmp_path):
    """Lines of doctor, by name, with the board under a root and what is said of a GPU."""
    moert = Program(capsys, monkeypatch, tmp_path)

    def run(root, gpu=("", "torch is built without CUDA: install another")):
        monkeypatch.setattr(doctor, "read_jetson", lambda: read_jetson(root))
        monkeypatch.setattr(cuda, "describe_cuda", lambda: gpu)
        result = moert("doctor", "--json")
        assert result.code == 0
        return {f["name"]: (f["state"], f["value"]) for f in json.loads(result.out)["findings"]}

    return run


def test_doctor_on_a_jetson(findings, tmp_path):
    emc = clocks("sys/class/devfreq/emc", 2133000000, 3199000000)
    found = findings(orin_nano(tmp_path, **emc))
    assert found["board"] == ("ok", f"{ORIN_NANO}, Jetson Linux 36.4.3 (JetPack 6)")
    assert found["power mode"] == ("note", "15W; MAXN_SUPER is faster: sudo nvpmodel -m 2")
    assert found["clocks"] == ("ok", "GPU 306 of 1020 MHz, memory 2133 of 3199 MHz")
    assert found["GPU"] == ("note", "cannot be used, since torch is built without CUDA: install another")
    found = findings(orin_nano(tmp_path, mode="pmode:0002"))
    assert found["power mode"] == ("ok", "MAXN_SUPER, the fastest")
    found = findings(orin_nano(tmp_path, mode="pmode:0009"), ("Orin, shares the host's memory", ""))
    assert found["power mode"] == ("ok", "not known: sudo nvpmodel -q shows it")
    assert found["GPU"] == ("ok", "Orin, shares the host's memory")


def test_doctor_elsewhere(findings, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "NVIDIA", tmp_path / "version")
    found = findings(tmp_path)
    assert found["GPU"] == ("ok", "none")
    assert not {"board", "power mode", "clocks"} & found.keys()
    assert findings(tmp_path, ("RTX", "Triton is missing: get it"))["GPU"] == (
        "note",
        "RTX: cannot be used, since Triton is missing: get it",
    )
    (tmp_path / "version").touch()
    assert findings(tmp_path)["GPU"][0] == "note"
