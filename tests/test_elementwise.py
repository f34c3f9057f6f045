"""Work on many tokens between the products, against float64."""

import pytest
import torch

from moert.kernels import elementwise
from moert.quant import matmul

KERNELS = matmul.available_kernels()


@pytest.fixture(autouse=True, params=KERNELS)
def kernel(request):
    matmul.set_kernel(request.param)
    yield
    matmul.set_kernel(KERNELS[0])


@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (1, 2048), (70, 4, 16), (5, 0, 16)])
def test_norm(shape):
    g = torch.Generator().manual_seed(1)
    for scale in (1e-3, 1.0, 1e6):
        x, weight = torch.randn(shape, generator=g) * scale, torch.randn(shape[-1], generator=g)
        want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
        torch.testing.assert_close(elementwise.rms_norm(x, weight, 1e-6).double(), want, rtol=1e-5, atol=1e-9)


def test_norm_of_a_part_of_a_tensor():
    x, weight = torch.randn(6, 64)[::2, 16:48], torch.rand(32)
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    torch.testing.assert_close(elementwise.rms_norm(x, weight, 1e-6).double(), want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("tokens", "heads", "d"), [(1, 1, 2), (7, 3, 16), (300, 4, 128)])
def test_rotation(tokens, heads, d):
    g = torch.Generator().manual_seed(2)
    x, angles = torch.randn(tokens, heads, d, generator=g), torch.randn(tokens, d // 2, generator=g) * 3
    pairs = torch.complex(x[..., : d // 2].double(), x[..., d // 2 :].double())
    turned = pairs * torch.polar(torch.ones_like(angles).double(), angles.double())[:, None]
    want = torch.cat([turned.real, turned.imag], -1).transpose(0, 1)
    got = elementwise.rotate(x, angles.cos(), angles.sin())
    assert got.shape == (heads, tokens, d)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "top_k", "size"), [(1, 1, 1), (1, 8, 100), (40, 3, 33), (65, 8, 512)])
def test_weighted_sum(tokens, top_k, size):
    g = torch.Generator().manual_seed(3)
    parts, weights = torch.randn(tokens * top_k, size, generator=g), torch.rand(tokens, top_k, generator=g)
    order = torch.randperm(tokens * top_k, generator=g)
    want = torch.einsum("tk,tkd->td", weights.double(), parts.double()[order].view(tokens, top_k, size))
    torch.testing.assert_close(elementwise.combine(parts, order, weights).double(), want, rtol=1e-5, atol=1e-5)
