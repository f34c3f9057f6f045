"""Several Python threads in the compiled modules at once, and threads that are inside when the program ends."""

import subprocess
import threading
import time

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
        matrices = [
            nested.quantise(torch.randn(*shape, generator=g), m)
            for m, shape in zip(LAYOUT.matrices, LAYOUT.shapes, strict=True)
        ]
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
            table.keep(layer - 1, 1 if layer == 1 else 0, 2 if layer == 1 else 0)
            dispatch.set_num_threads(1 + layer % 3)

    before = torch.get_num_threads()
    threads = [threading.Thread(target=compute) for _ in range(4)] + [threading.Thread(target=change)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    dispatch.set_num_threads(before)
    assert not wrong


IN_A_KERNEL = """
import threading, time, torch
from moert.kernels.elementwise import rms_norm
from moert.quant.matmul import linear
x, w = torch.randn(64, 2048), torch.rand(2048)
m = torch.randn(8, 2048).half()
def work():
    while True: rms_norm(x, w, 1e-6); linear(x, m)
"""
IN_A_READER = """
import threading, time, torch
from pathlib import Path
from moert.runtime.transfer import Read, NativeReader
memory = torch.zeros(1 << 22, dtype=torch.uint8)
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
    for _ in range(2):
        result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
        assert (result.returncode, result.stdout, result.stderr) == (0, "end\n", "")
