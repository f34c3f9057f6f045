"""Devices that are known by their figures: those that come along, a user's own, and this machine."""

from __future__ import annotations

import platform
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import psutil

from moert.config import cache_folder
from moert.errors import ProfileError, UsageError
from moert.hardware.memory import total_bytes
from moert.scheduler.profile import Profile, read_profile

DEVICE_TREE = Path("/proc/device-tree/model")  # what an Arm board calls itself
NVIDIA = Path("/proc/driver/nvidia/version")
# What the name of a board holds, and the profile for it.
_BOARDS = {
    "agx orin": "jetson-agx-orin-64gb",
    "orin nx": "jetson-orin-nx-16gb",
    "orin nano": "jetson-orin-nano-8gb",
    "raspberry pi 5": "raspberry-pi-5-nvme",
}


def devices() -> dict[str, Path]:
    """Profiles that come along, by name."""
    folder = Path(str(files("moert.device_profiles")))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def load_device(name: str | Path) -> Profile:
    """The profile that comes along under this name, or in this file.

    Raises UsageError where there is neither, ProfileError where the file is malformed or cannot be read.
    """
    known = devices()
    path = known.get(str(name), Path(name).expanduser())
    if not path.exists():
        raise UsageError(f"device profile {str(name)!r} is neither a file nor one of {', '.join(known)}.")
    try:
        return read_profile(path)
    except ValueError as error:
        raise ProfileError(f"{error}.") from None
    except OSError as error:
        raise ProfileError(f"The device profile {path} cannot be read: {error.strerror or error}.") from None


def own_file() -> Path:
    """Return the file to which `moert profile` writes the figures of this machine."""
    return cache_folder() / "device.json"


def this_machine() -> tuple[Profile, str]:
    """Return the profile of this machine, and a line that says whether it was measured.

    The profile that `moert profile` wrote; where there is none, or one of no use, the one that comes along for the
    device most like this, with this machine's memory.
    """
    wrong = ""
    try:
        path = own_file()
        if path.exists():
            profile = load_device(path)
            return profile, f"device profile {path}, measured on {profile.date}"
    except ProfileError as error:
        wrong = f"; {str(error).rstrip('.')}"
    except (OSError, RuntimeError):  # no home folder, or one that may not be looked into
        pass
    name = closest()
    memory = total_bytes()
    profile = replace(load_device(name), memory_bytes=float(memory))
    if profile.gpu_integrated:
        profile = replace(profile, gpu_memory_bytes=float(memory))
    return profile, f"default figures for {name} (moert profile measures this machine){wrong}"


def device_or_this(name: str | Path | None) -> tuple[Profile, str]:
    """`load_device`, or `this_machine` where no name is given, and a line on where the figures are from."""
    if name is None:
        return this_machine()
    profile = load_device(name)
    return profile, f"figures of {profile.date}"


def closest() -> str:
    """Guess, without measuring, which of the profiles that come along is of the device most like this machine."""
    try:
        board = DEVICE_TREE.read_text(errors="replace").lower()
    except OSError:
        board = ""
    for words, name in _BOARDS.items():
        if words in board:
            return name
    if platform.machine().lower() in ("aarch64", "arm64"):
        return "jetson-orin-nx-16gb"
    if NVIDIA.exists():
        return "laptop-rtx-4060-8gb"
    return "server-2-core-amx" if (psutil.cpu_count(logical=False) or 1) <= 2 else "laptop-16gb-nvme"
