"""Several Python threads in the compiled modules at once, and threads that are inside when the program ends."""

import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

from moert.kernels import native
from moert.kernels.elementwise import rms_norm
from moert.kernels.gate_ahead import GateAheadRouters, fold
from moert.quant import dispatch, nested
from moert.quant.expert_table import ExpertTable
from moert.quant.format import ExpertLayout
from moert.quant.matmul import linear
from moert.runtime import transfer

from .child import ENVIRONMENT, PYTHON

pytestmark = pytest.mark.skipif(
    native.compiled() is None or transfer.native_reader() is None, reason="the compiled modules were not built"
)
LAYOUT = ExpertLayout(128, 64, 64, (2, 4))


def filled_memory():
    """Two experts of random weights and where their slices lie."""
    g = torch.Generator().manual_seed(1)
    memory, at, offsets = torch.zeros(2 * sum(LAYOUT.slice_sizes), dtype=torch.uint8), 0, []
    for _ in range(2):
        weights = [torch.randn(*shape, generator=g) for shape in LAYOUT.shapes]
        matrices = [nested.quantise(w, matrix) for w, matrix in zip(weights, LAYOUT.matrices, strict=True)]
        places = []
        for index, size in enumerate(LAYOUT.slice_sizes):
            places.append(at)
            for begin, slices in zip(LAYOUT.offsets(index), matrices, strict=False):
                memory[at + begin : at + begin + slices[index].numel()] = slices[index]
            at += size
        offsets.append(places)
    return memory, offsets


def test_threads_in_both_modules_at_once_get_the_results_of_one():
    memory, offsets = filled_memory()
    table = ExpertTable(LAYOUT, "silu", memory)
    for expert, places in enumerate(offsets):
        table.put(0, expert, places)
    g = torch.Generator().manual_seed(2)
    routers = GateAheadRouters([fold(torch.ones(128), torch.randn(16, 128, generator=g)) for _ in range(2)], 1e-6, 4)
    x, weight, experts = torch.randn(1, 128, generator=g), torch.rand(128, generator=g), ([0, 1], [1, 2])

    def step():
        out = torch.zeros(1, 128)
        assert table.add(0, *experts, [0.5, 0.25], x, out)
        return out, rms_norm(x, weight, 1e-6), linear(x, routers.routers[0]), routers(x)

    def same(a, b):
        return all(map(torch.equal, a[:3], b[:3])) and a[3] == b[3]

    want, wrong, stop = step(), [], time.monotonic() + 1

    def compute():
        try:
            while time.monotonic() < stop:
                if not same(step(), want):
                    wrong.append("another result")
        except Exception as error:
            wrong.append(error)

    def change():
        layer = 0
        while time.monotonic() < stop:
            layer += 1
            table.put(layer, 0, offsets[0])
            table.drop_from(layer - 1, 1 if layer == 1 else 0, 2 if layer == 1 else 0)
            dispatch.set_num_threads(1 + layer % 3)

    before = torch.get_num_threads()
    threads = [threading.Thread(target=compute) for _ in range(4)] + [threading.Thread(target=change)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    dispatch.set_num_threads(before)
    assert not wrong


# Only calls of the compiled modules: torch's own functions end the program when the interpreter is gone.
IN_A_KERNEL = """
import threading, time, torch
from moert.kernels import native
from moert.quant import dispatch
from moert.quant.matmul import native_matrix
x, w, out = torch.randn(64, 2048), torch.rand(2048), torch.empty(64, 2048)
m, products = torch.randn(8, 2048).half(), torch.empty(64, 8)
arguments = x.data_ptr(), w.data_ptr(), 64, 2048, 1e-6, out.data_ptr()
factors = [native_matrix(m)], x.data_ptr(), 64, 2048, 2048, [products.data_ptr()]
steps, quant = native.loaded(), dispatch.loaded()
def work():
    while True: steps.rms_norm(*arguments); quant.linear(*factors)
"""
IN_A_READER = """
import threading, time, torch
from pathlib import Path
from moert.runtime.transfer import Read, NativeReader
memory = torch.zeros(1 << 18, dtype=torch.uint8)
memory = memory[-memory.data_ptr() % 4096 :]  # O_DIRECT
reader = NativeReader(memory)
def work():
    while True:
        read = Read(Path(FILE), 0, [(0, 1 << 16, -1)], "x")
        reader.submit(read); read.wait()
"""


@pytest.mark.parametrize("code", [IN_A_KERNEL, IN_A_READER], ids=["kernel", "reader"])
def test_a_program_ends_well_while_a_thread_is_inside(code, tmp_path):
    file = tmp_path / "data"
    file.write_bytes(bytes(1 << 16))
    end = "for _ in range(3): threading.Thread(target=work, daemon=True).start()\ntime.sleep(0.2)\nprint('end')"
    command = [*PYTHON, "-c", f"FILE = {str(file)!r}\n{code}\n{end}"]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "end\n", "")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="there is no /proc")
def test_a_dropped_reader_ends_its_threads_and_closes_its_files(tmp_path):
    file = tmp_path / "data"
    file.write_bytes(bytes(1 << 20))

    def count(folder):
        return len(list(Path("/proc/self", folder).iterdir()))

    memory = torch.zeros(1 << 21, dtype=torch.uint8)
    before = count("task"), count("fd")
    reader = transfer.NativeReader(memory[-memory.data_ptr() % 4096 :])
    reads = [transfer.Read(file, 0, [(0, 1 << 20, -1)], "x") for _ in range(50)]
    for read in reads:
        reader.submit(read, ahead=True)
    assert (count("task"), count("fd")) == (before[0] + transfer.READERS, before[1] + 1)
    del reader, memory
    assert (count("task"), count("fd")) == before
    assert all(read.done for read in reads)


def test_a_closed_reader_refuses_reads(tmp_path):
    file = tmp_path / "data"
    file.write_bytes(bytes(4096))
    reader = transfer.NativeReader(torch.zeros(4096, dtype=torch.uint8))
    closers = [threading.Thread(target=reader.close) for _ in range(4)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join()
    with pytest.raises(RuntimeError, match="closed"):
        reader.submit(transfer.Read(file, 0, [(0, 4096, -1)], "x"))


def test_a_child_after_fork_does_not_wait_for_a_reader():
    code = """
import os, torch
from pathlib import Path
from moert.runtime.transfer import Read, NativeReader
memory = torch.zeros(4096, dtype=torch.uint8)
reader = NativeReader(memory)
if os.fork() == 0:
    try:
        reader.submit(Read(Path(os.devnull), 0, [(0, 4096, -1)], "x"))
    except RuntimeError as error:
        print(error, flush=True)
    del reader
    os._exit(0)
os.wait()
"""
    result = subprocess.run([*PYTHON, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert "forked from" in result.stdout


def test_the_reference_kernel_does_not_swap_the_reader():
    try:
        dispatch.set_kernel("reference")
        memory = torch.zeros(4096, dtype=torch.uint8)
        for native_or_not, kind in ((None, transfer.NativeReader), (False, transfer.SliceReader)):
            reader = transfer.make_reader(memory, native_or_not)
            assert type(reader) is kind
            reader.close()
    finally:
        dispatch.set_kernel(dispatch.available_kernels()[0])


def test_settings_are_read_when_a_kernel_is_first_needed():
    code = """
import os
import moert.engine, moert.quant.matmul, moert.kernels.layer_step
from moert.quant import dispatch
os.environ["MOERT_KERNEL"] = "generic"
print(dispatch.kernel_name())
os.environ["MOERT_KERNEL"] = "sve"
try:
    dispatch.choose_kernel()
except ValueError as error:
    print(error)
"""
    environment = {**ENVIRONMENT, "MOERT_KERNEL": "nonsense"}
    result = subprocess.run([*PYTHON, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert result.stdout.startswith("generic\nMOERT_KERNEL: kernel 'sve' is not available here"), result.stderr
