"""The Triton kernels compile, as they are launched, for devices that are not here."""

import subprocess

import pytest
import torch

from moert.quant import placed
from moert.quant.format import CODES, TRELLIS, ExpertLayout

from .test_triton_kernels import FEW, make_experts, outside, routing


class Recorder:
    """A kernel that notes its launches instead."""

    def __init__(self, kernel):
        self.kernel, self.calls = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **constants: self.calls.append((args, constants))


def launches(kernels, monkeypatch, layout, tokens):
    """Plan what the feed-forward of two experts would launch, on the CPU."""
    recorders = [Recorder(getattr(kernels, name)) for name in ("_round_kernel", "_forward_kernel", "_sum_kernel")]
    for recorder in recorders:
        monkeypatch.setattr(kernels, recorder.kernel.__name__, recorder)
    experts, _ = make_experts(layout, [1, 2], device="cpu")
    x = torch.zeros(tokens, layout.hidden)
    kernels.add_experts(x, experts, *routing(tokens, 2), torch.zeros(tokens, layout.hidden))
    assert [len(recorder.calls) for recorder in recorders] == [1, 1, 1]
    return [(recorder.kernel, *recorder.calls[0]) for recorder in recorders]


@outside
@pytest.mark.parametrize(("tokens", "capability"), [(FEW, 87), (20, 80), (70, 90)])
@pytest.mark.parametrize("code", CODES)
def test_three_launches_that_compile_without_a_device(monkeypatch, tmp_path, code, tokens, capability):
    """To machine code that fits, with the instructions that are meant; for an A100, a Jetson Orin and an H100."""
    triton = pytest.importorskip(
        "triton", minversion="3.4", reason="triton 3.4 or newer is not installed: it is in moert[cuda]"
    )
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moert.quant import triton_kernels

    try:
        tool = triton.knobs.nvidia.cuobjdump.path, triton.knobs.nvidia.ptxas.path
    except RuntimeError:
        pytest.skip("triton comes without ptxas here")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {torch.int8: "*i8", torch.uint8: "*u8", torch.int32: "*i32", torch.float32: "*fp32"}
    layout = ExpertLayout(96, 40, 32, (2, 3), code=code)
    for kernel, args, keywords in launches(triton_kernels, monkeypatch, layout, tokens):
        named = dict(zip(kernel.arg_names, args, strict=False)) | keywords
        constants = {name: named[name] for name in kernel.arg_names if name in keywords or named[name] is None}
        options = {name: value for name, value in keywords.items() if name not in kernel.arg_names}
        kinds = (types[a.dtype] if isinstance(a, torch.Tensor) else "i32" for a in args)
        signature = dict(zip(kernel.arg_names, kinds, strict=False)) | dict.fromkeys(constants, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(args) if isinstance(a, torch.Tensor)}
        source = ASTSource(kernel, signature, constants, aligned)
        made = triton.compile(source, GPUTarget("cuda", capability, 32), options)
        (tmp_path / "cubin").write_bytes(made.asm["cubin"])
        command = [tool[0], "-res-usage", tmp_path / "cubin"]
        used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "STACK:0" in used, "registers are spilled"
        assert made.metadata.shared <= 48 << 10
        name = kernel.__name__
        vectors = tokens <= placed.FEW_TOKENS and name != "_round_kernel"
        assert ("dp4a" in made.asm["ptx"]) == (vectors and code != TRELLIS)
        assert ("mma" in made.asm["ptx"]) == (tokens > placed.FEW_TOKENS and name != "_round_kernel")
        assert "fma." not in made.asm["ptx"] or name == "_sum_kernel", "ties would be rounded otherwise"
