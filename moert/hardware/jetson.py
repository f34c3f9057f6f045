"""Read what a Jetson board says of itself: model, software, power mode, clocks. Plain files, no NVML and no root
needed.

Which files those are is as of Jetson Linux (L4T) 35 to 39; each may be missing, in containers most are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moert.hardware.devices import DEVICE_TREE

RELEASE = Path("/etc/nv_tegra_release")  # "# R36 (release), REVISION: 4.3, GCID: ..."
MODE = Path("/var/lib/nvpmodel/status")  # "pmode:0002 fmode:quiet", written by nvpmodel
MODES = Path("/etc/nvpmodel.conf")
FREQUENCIES = Path("/sys/class/devfreq")  # 17000000.gpu, 17000000.ga10b, ...
MEMORY_CLOCK = Path("/sys/kernel/debug/bpmp/debug/clk/emc")  # readable for root only
_JETPACK = {35: 5, 36: 6, 38: 7, 39: 7}
_GPUS = r"gpu|g[abpv]\d\db"
_NO_CAP = float("inf")


@dataclass(frozen=True)
class PowerMode:
    """emc_hz, gpu_hz: what it lets memory and GPU run at, at most; infinite where it sets no limit."""

    number: int
    name: str
    emc_hz: float = _NO_CAP
    gpu_hz: float = _NO_CAP

    @property
    def speed(self) -> tuple[float, ...]:
        """Orders the modes of one board; their numbers do not: MAXN_SUPER is 2 of 0 to 3 on an Orin Nano."""
        watts = re.search(r"(\d+)W", self.name)
        named = ("MAXN" in self.name, "SUPER" in self.name)
        return (*named, self.emc_hz, self.gpu_hz, float(watts[1]) if watts else 0.0)


@dataclass(frozen=True)
class Jetson:
    """model: as the device tree has it. release: of Jetson Linux, such as 36.4.3. mode: None where it is not known.

    gpu_hz, emc_hz: now and at most, of the GPU and of the memory.
    """

    model: str
    release: str | None
    mode: PowerMode | None
    fastest: PowerMode | None
    gpu_hz: tuple[int, int] | None
    emc_hz: tuple[int, int] | None

    @property
    def jetpack(self) -> int | None:
        """Return the first number of the JetPack version, the only one that follows from the release."""
        return _JETPACK.get(int(self.release.partition(".")[0])) if self.release else None


def read_jetson(root: Path = Path("/")) -> Jetson | None:
    """The board under this root; None where it is no Jetson."""
    model, release = _text(root, DEVICE_TREE), _text(root, RELEASE)
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", release)
    if "jetson" not in model.lower() and not found:
        return None
    modes, default = _power_modes(_text(root, MODES))
    # Where nobody chose one, that of the configuration holds.
    chosen = re.search(r"pmode:(\d+)", _text(root, MODE))
    number = int(chosen[1]) if chosen else default
    return Jetson(
        model or "a Jetson board",
        f"{found[1]}.{found[2].strip('.')}" if found else None,
        next((mode for mode in modes if mode.number == number), None),
        max(modes, key=lambda mode: mode.speed, default=None),
        _clock(_named(root, _GPUS), "cur_freq", "max_freq"),
        _clock([_under(root, MEMORY_CLOCK)], "rate", "max_rate") or _clock(_named(root, "emc"), "cur_freq", "max_freq"),
    )


def _under(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")


def _text(root: Path, path: Path) -> str:
    """Without the NUL bytes that end what comes from the device tree; "" where it cannot be read."""
    try:
        return _under(root, path).read_text(errors="replace").replace("\0", "").strip()
    except OSError:
        return ""


def _power_modes(text: str) -> tuple[list[PowerMode], int | None]:
    """Return all modes of nvpmodel.conf, and the number of the one that is meant at first.

    A mode begins with `< POWER_MODEL ID=0 NAME=15W >`; lines such as `EMC MAX_FREQ 2133000000` follow, where 0 and -1
    are no limit.
    """
    text = re.sub(r"#.*", "", text)
    modes = []
    for block in re.split(r"<\s*POWER_MODEL\s", text)[1:]:
        head, _, body = block.partition(">")
        number, name = re.search(r"\bID=(\d+)", head), re.search(r"\bNAME=(\S+)", head)
        if number and name:
            modes.append(PowerMode(int(number[1]), name[1], _limit(body, "EMC"), _limit(body, "GPU")))
    default = re.search(r"<\s*PM_CONFIG\s+DEFAULT=(\d+)", text)
    return modes, int(default[1]) if default else None


def _limit(body: str, what: str) -> float:
    found = re.search(rf"^\s*{what} MAX_FREQ (\d+)", body, re.MULTILINE)
    return float(found[1]) if found and int(found[1]) else _NO_CAP


def _named(root: Path, pattern: str) -> Iterable[Path]:
    try:
        found = sorted(_under(root, FREQUENCIES).iterdir())
    except OSError:
        return []
    return [path for path in found if re.search(pattern, path.name)]


def _clock(folders: Iterable[Path], now: str, most: str) -> tuple[int, int] | None:
    for folder in folders:
        try:
            return int((folder / now).read_text()), int((folder / most).read_text())
        except (OSError, ValueError):
            continue
    return None
