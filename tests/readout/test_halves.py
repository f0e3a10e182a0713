"""Products in halves, against float64, and how far other short cuts would be off."""

from __future__ import annotations

import pytest
import torch

from fake_device import DEVICE
from leaveout.readout.halves import halves, multiplies_halves, product_left, product_right


def rounded(x, digits):
    """Numbers with so many binary digits, as a unit of a GPU takes them."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2**digits).round() / 2**digits, exponent)


def error(found, a, b):
    """Largest, in units of the product of the lengths of the vectors."""
    wanted = a.double() @ b.double()
    return float(
        ((found.cpu().double() - wanted).abs() / (a.double().norm(dim=1)[:, None] * b.double().norm(dim=0))).max()
    )


def residuals(positions, size):
    """Softmaxes: a few large numbers, many of 1e-4 and less."""
    return torch.softmax(4 * torch.randn(positions, size, generator=torch.Generator().manual_seed(0)), 1)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_two_halves_are_nearly_float32(half):
    e, w = residuals(20, 3000), torch.randn(3000, 64, generator=torch.Generator().manual_seed(1)).to(half)
    found = product_left(halves(e.to(DEVICE), half), w.to(DEVICE))
    assert found.dtype == torch.float32 and error(found, e, w) <= 1e-6
    assert error(rounded(e, 11) @ w.double(), e, w) > 4 * error(found, e, w)  # TF32
    assert error(rounded(e, 8) @ w.double(), e, w) > 30 * error(found, e, w)
    x, m = torch.randn(20, 300, generator=torch.Generator().manual_seed(2)).to(half), w[:300].float() ** 3
    found = product_right(x.to(DEVICE), halves(m.to(DEVICE), half))
    assert error(found, x, m) <= 3e-6 < error(x.double() @ rounded(m, 8), x, m)


def test_halves_hold_what_float16_alone_does_not():
    tiny = torch.full((1, 4), 3e-8)
    both = halves(tiny, torch.float16)
    assert float((both[0].double() + both[1].double() / 2**11 - tiny).abs().max()) < 3e-11


def test_a_cpu_and_whole_numbers_are_left_alone():
    cpu = torch.device("cpu")
    assert multiplies_halves(DEVICE, torch.bfloat16) and not multiplies_halves(DEVICE, torch.float32)
    assert not multiplies_halves(cpu, torch.bfloat16)
