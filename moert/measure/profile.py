"""Measure all figures of this machine, as a device profile."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moert.api import LLM as LLM  # what is resident before a model is loaded, as library_bytes counts it
from moert.config import cache_folder, format_bytes
from moert.errors import ProfileError
from moert.hardware.memory import library_bytes, total_bytes
from moert.hub.resolve import shipped_model
from moert.measure.bench_kernels import memory_bandwidths
from moert.measure.compute import DENSE_BITS, TOKENS, ComputeFigures, default_layouts, measure_compute
from moert.measure.disk import READERS, DiskFigures, measure_disk, written_target
from moert.measure.figure import Measured, Progress, measured
from moert.measure.gpu import GpuFigures, find_gpu, measure_gpu
from moert.measure.gpu_kernels import PROMPT_TOKENS, KernelFigures, find_kernels
from moert.measure.overheads import Overheads, measure_answer, measure_cached, measure_overheads
from moert.models.stored_model import StoredModel
from moert.quant.dispatch import kernel_name, set_num_threads
from moert.runtime.disk_speed import Target, store_target
from moert.runtime.transfer import CHUNK_BYTES
from moert.runtime.transfer import READERS as RUNTIME_READERS
from moert.scheduler.profile import SCHEMA_VERSION, Profile, parse_profile
from moert.store.fileio import atomic_file


def measure_device(
    name: str, store: Path | None, folder: Path | None, threads: int, progress: Progress, on_status: Progress
) -> dict[str, Any]:
    """The content of a profile of this machine, checked.

    store: its experts are read, and its layout measured; None: a file that is written to `folder` for as long as it
    takes, or where that is None to the cache folder. Raises ProfileError where something cannot be measured.
    """
    libraries = library_bytes()
    opened = None if store is None else StoredModel.open(store)
    layouts = default_layouts()
    if opened is not None and not opened.layout.raw:
        layouts = [opened.layout, *layouts]
    with _disk_target(opened, folder, progress, on_status) as target:
        disk = measure_disk(target, progress)
    if not disk.direct:
        on_status("this disk does not take O_DIRECT: reads are buffered, and were measured so")
    progress("memory bandwidth")
    memory = measured(memory_bandwidths(threads))
    set_num_threads(threads)
    compute = measure_compute(layouts, progress)
    shipped = StoredModel.open(shipped_model())
    overheads = measure_overheads(opened or shipped, shipped, threads, progress)
    gpu = find_gpu()
    own = None if gpu is None else find_kernels(layouts[0], progress, on_status)
    figures = {
        **_disk_figures(disk, target, memory.value),
        **_memory_figures(memory, libraries, threads),
        **_compute_figures(compute, threads),
        **_overhead_figures(overheads),
        **_cached_figures(measure_cached(shipped, threads, progress)),
        "answer_overhead_s": _of(measure_answer(threads, progress), "answers of the model that ships"),
        **({} if gpu is None else _gpu_figures(measure_gpu(gpu, total_bytes(), progress), own)),
    }
    description = f"{_processor()}, {threads} threads, {format_bytes(total_bytes())} of memory"
    description += "" if gpu is None else f", {gpu.name}"
    content = {"schema_version": SCHEMA_VERSION, "name": name, "description": description, "figures": figures}
    checked(content)
    return content


def checked(content: Mapping[str, Any]) -> Profile:
    """Parse the content of a profile. Raises ProfileError where it is impossible."""
    try:
        return parse_profile(json.loads(json.dumps(content)))
    except ValueError as error:
        raise ProfileError(f"What was measured cannot be ({error}): let the machine rest, and try again.") from None


def check_writable(path: Path) -> None:
    """Raises ProfileError where a profile could not be written to `path`, before anything is measured."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from None


def write_profile(path: Path, content: Mapping[str, Any]) -> None:
    """Write it whole or not at all: ProfileError then, and an older file stays as it was."""
    try:
        with atomic_file(path) as file:
            file.write(as_text(content).encode())
    except OSError as error:
        raise _unwritable(path, error) from None


def as_text(content: Mapping[str, Any]) -> str:
    """The file that holds it."""
    return json.dumps(content, indent=1) + "\n"


def _unwritable(path: Path, error: OSError) -> ProfileError:
    return ProfileError(
        f"The profile cannot be written to {path}: {error.strerror or error}; name another file with --out, or print "
        "it with --out -."
    )


@contextlib.contextmanager
def _disk_target(
    store: StoredModel | None, folder: Path | None, progress: Progress, on_status: Progress
) -> Iterator[Target]:
    if store is not None:
        yield store_target(store)
        return
    if folder is None:
        try:
            folder = cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except (OSError, RuntimeError) as error:  # or there is no home folder
            folder = Path(tempfile.gettempdir())
            on_status(f"the cache folder cannot be written ({error}): measuring the disk of {folder}")
    with written_target(folder, default_layouts()[0], progress) as target:
        yield target


def _figure(value: Any, source: str, kind: str = "measured", spread: float | None = None) -> dict[str, Any]:
    figure = {"value": value, "kind": kind, "source": source, "date": datetime.now(UTC).date().isoformat()}
    if kind == "measured":
        figure["spread"] = _digits(spread or 0.0)
    return figure


def _of(found: Measured, source: str) -> dict[str, Any]:
    return _figure(_digits(found.value), source, spread=found.spread)


def _digits(value: float) -> float:
    """Round a figure to as many digits as mean something."""
    return float(f"{value:.4g}")


def _by_width(values: Mapping[int, float], spread: float, source: str) -> dict[str, Any]:
    return _figure({str(width): _digits(values[width]) for width in sorted(values)}, source, spread=spread)


def _disk_figures(disk: DiskFigures, target: Target, memory: float) -> dict[str, Any]:
    how = f"random reads of {target.what}" + ("" if disk.direct else ", buffered: it does not take O_DIRECT")
    rows = [
        {
            "readers": row.readers,
            "size_bytes": row.size_bytes,
            "bytes_per_s": _digits(row.bytes_per_s),
            "latency_s": _digits(row.latency_s),
        }
        for row in disk.rows
    ]
    speed = Measured(min(disk.bytes_per_s.value, memory), disk.bytes_per_s.spread)  # files in memory look faster
    chunk = format_bytes(CHUNK_BYTES)
    counts = ", ".join(map(str, READERS[:-1]))
    return {
        "disk_bytes_per_s": _of(speed, f"{how}, as moert reads: {RUNTIME_READERS} readers, pieces of {chunk}"),
        "disk_latency_s": _of(disk.latency_s, f"single {how}, 4 KiB each"),
        "disk_chunk_bytes": _figure(CHUNK_BYTES, "the pieces into which moert cuts its reads", "derived"),
        "disk_direct": _figure(disk.direct, "whether a file can be opened with O_DIRECT"),
        "disk_reads": _figure(
            rows, f"{how}, {counts} and {READERS[-1]} at a time; latency_s: the median of one read", spread=disk.spread
        ),
    }


def _memory_figures(memory: Measured, libraries: int, threads: int) -> dict[str, Any]:
    return {
        "memory_bytes": _figure(total_bytes(), "what the system reports, or the control group's limit"),
        "memory_bytes_per_s": _of(memory, f"reading 1 GiB with {threads} threads, the fastest of several loops"),
        "library_bytes": _figure(libraries, "resident before a model is loaded, as moert counts it in a budget"),
    }


def _compute_figures(compute: ComputeFigures, threads: int) -> dict[str, Any]:
    how = f"kernel {kernel_name()}, {threads} threads, weights beyond the caches"
    return {
        "expert_s_per_byte": _by_width(compute.expert_s_per_byte, compute.expert_spread, f"{how}, 1 token"),
        "dense_s_per_byte": _of(compute.dense_s_per_byte, f"{how}, {DENSE_BITS} bits, 1 token"),
        "prefill_macs_per_s": _by_width(compute.prefill_macs_per_s, compute.prefill_spread, f"{how}, {TOKENS} tokens"),
        "dense_prefill_macs_per_s": _of(compute.dense_prefill_macs_per_s, f"{how}, {DENSE_BITS} bits, {TOKENS} tokens"),
        "attention_macs_per_s": _of(
            compute.attention_macs_per_s, f"what attention of {TOKENS} tokens takes longer behind others, {how}"
        ),
    }


def _overhead_figures(found: Overheads) -> dict[str, Any]:
    how = f"decoding with {found.model}, beside kernels and waiting"
    return {
        "token_overhead_s": _of(found.token_s, f"{how}: a token without its layers"),
        "layer_overhead_s": _of(found.layer_s, f"{how}: a layer with all in memory"),
        "miss_overhead_s": _of(found.miss_s, f"{how}: what a layer takes longer in which something is missing"),
        "load_overhead_s": _of(found.load_s, f"{how}: what it takes longer for each read"),
    }


def _cached_figures(found: tuple[int, Measured, Overheads] | None) -> dict[str, Any]:
    if found is None:
        return {}
    nbytes, cost, overheads = found
    return {
        "cached_bytes": _figure(nbytes, "the largest cache that the system reports, 32 MiB at most", "derived"),
        "cached_s_per_byte": _of(cost, f"kernels while decoding with {overheads.model}"),
        **{f"cached_{name}": figure for name, figure in _overhead_figures(overheads).items()},
    }


def _gpu_figures(gpu: GpuFigures, own: KernelFigures | None) -> dict[str, Any]:
    shared = "memory that it shares with the host, as the system reports it"
    return {
        "gpu_memory_bytes": _figure(gpu.memory_bytes, shared if gpu.integrated else "what CUDA reports"),
        "gpu_memory_bytes_per_s": _of(gpu.memory_bytes_per_s, f"{gpu.name}: a copy in its memory, read and written"),
        "host_to_device_bytes_per_s": _of(gpu.host_to_device_bytes_per_s, f"{gpu.name}: copies of pinned memory"),
        "gpu_integrated": _figure(gpu.integrated, "what CUDA reports"),
        **(_torch_figures(gpu) if own is None else _kernel_figures(gpu.name, own)),
    }


def _torch_figures(gpu: GpuFigures) -> dict[str, Any]:
    how = f"{gpu.name}: torch's product with a vector, half precision; moert's kernels do not run on it"
    return {"gpu_expert_s_per_byte": _by_width(gpu.expert_s_per_byte, gpu.expert_spread, how)}


def _kernel_figures(name: str, own: KernelFigures) -> dict[str, Any]:
    how = f"{name}: moert's kernels, weights beyond the caches"
    prompt = f"{how}, {PROMPT_TOKENS} tokens"
    return {
        "gpu_expert_s_per_byte": _by_width(own.expert_s_per_byte, own.expert_spread, f"{how}, 1 token"),
        "gpu_prefill_macs_per_s": _by_width(own.prefill_macs_per_s, own.prefill_spread, prompt),
        "gpu_launch_overhead_s": _of(own.launch_s, f"{name}: one expert of one token, beyond what its bytes take"),
        "host_to_device_latency_s": _of(own.copy_latency_s, f"{name}: a copy of 4 KiB, waited for"),
    }


def _processor() -> str:
    """Return the name of the processor, for people."""
    cores = f"{os.cpu_count() or 1} logical cores"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {cores}"
    return f"{platform.processor() or platform.machine()}, {cores}"
