"""Residuals of given logits, and the search for the largest ones, against sorting and exact arithmetic."""

from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from leaveout.readout.limits import Limits
from leaveout.readout.logits import GROUP, Head, largest
from leaveout.readout.model import Readout
from leaveout.readout.settings import resolve_settings

from .conftest import assert_close
from .oracle import truncated_residual

getcontext().prec = 50


class Bare(nn.Module):
    """A head alone, so that logits can be given: W is the identity."""

    def __init__(self, size, dtype):
        super().__init__()
        self.head = nn.Linear(size, size, bias=False, dtype=dtype)
        nn.init.eye_(self.head.weight)

    def get_output_embeddings(self):
        return self.head


@torch.no_grad()
def residuals(logits, targets, dtype=torch.float64, cap=None, scale=1.0, **changes):
    """r [positions, vocabulary] of logits before scale and cap."""
    logits = torch.as_tensor(np.asarray(logits), dtype=dtype)
    size = logits.shape[1]
    head = Head(Readout(Bare(size, dtype), None, None, scale, cap), resolve_settings("default", **changes), dtype)
    pieces = [r @ torch.eye(size, dtype=dtype) for _, r in head.residuals(logits, torch.as_tensor(targets))]
    return torch.cat(pieces).numpy()


def exact_residual(z, target, temperature=1.0):
    """softmax(z / temperature) - e_y with 50 digits, as floats."""
    e = [(Decimal(float(value)) / Decimal(temperature)).exp() for value in z]
    others = sum(value for index, value in enumerate(e) if index != target)
    total = others + e[target]
    return [float(-others / total if index == target else value / total) for index, value in enumerate(e)]


# A grid with many ties, far values, and what padding holds.
SCORES = st.one_of(st.integers(-3, 3).map(float), st.floats(-200, 50, width=32), st.just(-np.inf))


@given(
    arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 12).map(lambda n: n * GROUP)), elements=SCORES),
    st.integers(1, 80),
    st.sampled_from([0.5, 20.0, np.inf]),
)
@settings(max_examples=50, deadline=None)
def test_largest_equals_sorting(scores, count, reach):
    scores[:, 0] = np.maximum(scores[:, 0], -200)  # at least one is finite, as in a row of logits
    value, index = (x.numpy() for x in largest(torch.tensor(scores), count, reach))
    wanted = -np.sort(-scores, axis=1)
    width = value.shape[1]
    assert width <= min(count, scores.shape[1])
    assert np.array_equal(np.take_along_axis(scores, index, 1), value)
    assert all(len(set(row)) == width for row in index.tolist())
    near = wanted[:, :width] >= wanted[:, :1] - np.float32(reach)
    near[:, :4] = True
    assert np.array_equal(value[near], wanted[:, :width][near])
    assert (value[:, :-1] >= value[:, 1:]).all()
    if width < min(count, scores.shape[1]):
        assert width >= min(4 * GROUP, count)
        assert (wanted[:, width:] < wanted[:, :1] - reach).all()


@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.0])
@pytest.mark.parametrize(
    ("own", "others"),
    [(0.0, 0.0), (12.0, 0.0), (30.0, 0.0), (80.0, 0.0), (0.0, 15.0)],  # 1 - p of the target: 1e-5, 1e-12, 1e-34
)
def test_dense_residual_keeps_all_digits_of_the_complement(own, others, temperature):
    z = np.random.default_rng(1).normal(others, 0.5, 40).astype(np.float32) * np.float32(temperature)
    z[7] = own * temperature
    wanted = exact_residual(z, 7, np.float32(temperature).item())
    found = residuals(z[None], [7], torch.float32, temperature=temperature)[0]
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-37)
    assert abs(found.sum()) <= 1e-5 * np.abs(found).sum()


@pytest.mark.parametrize("support", [None, 8])
@pytest.mark.parametrize(("cap", "scale"), [(None, 0.5), (3.0, 1.0), (3.0, 0.25)])
def test_residual_passes_scale_and_soft_cap(support, cap, scale):
    """The residual is the gradient of the loss at W h + b."""
    u = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    target = torch.arange(6)
    leaf = u.clone().requires_grad_()
    z = scale * leaf if cap is None else cap * torch.tanh(scale * leaf / cap)
    if support is not None:  # the same loss over the support alone
        kept = z.topk(support, 1).indices.tolist()
        kept = [row if y in row else [*row[:-1], y] for row, y in zip(kept, target.tolist(), strict=True)]
        outside = torch.ones_like(z, dtype=torch.bool).scatter(1, torch.tensor(kept), False)
        z = z.masked_fill(outside, -torch.inf)
    torch.nn.functional.cross_entropy(z, target, reduction="sum").backward()
    options = {} if support is None else {"support": support}
    assert_close(residuals(u, target, cap=cap, scale=scale, **options), leaf.grad, "float64")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_sparse_residual_equals_the_oracle(data):
    size = data.draw(st.integers(9, 70))
    spread = data.draw(st.sampled_from([0.05, 1.0, 6.0]))
    support = data.draw(st.sampled_from([4, 16, 64]))
    mass = data.draw(st.sampled_from([0.5, 0.92, 1.0]))
    tau = data.draw(st.sampled_from([0.1, 2.0]))
    z = np.random.default_rng(data.draw(st.integers(0, 10**6))).normal(0, spread * tau, (3, size))
    targets = [int(z[0].argmax()), int(z[1].argmin()), data.draw(st.integers(0, size - 1))]
    found = residuals(z, targets, temperature=tau, support=support, mass=mass, minimum=4)
    for row, target, scores in zip(found, targets, z, strict=True):
        wanted = truncated_residual(scores, target, tau, support, mass if mass < 1 else 1 - 1e-13, 4)
        np.testing.assert_allclose(row, [wanted.get(v, 0.0) for v in range(size)], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("support", [None, 16])
def test_narrow_head_is_widened_in_pieces(support):
    """A bfloat16 head of more than 4,096 tokens gives what its float32 copy gives."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        head = Bare(4200, torch.bfloat16)
        head.head = nn.Linear(8, 4200, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        readout = Readout(head.to(dtype).requires_grad_(False), None, None)
        hidden, target = torch.randn(5, 8, generator=generator), torch.tensor([0, 4100, 7, 4095, 4096])
        residual = Head(readout, resolve_settings("default", support=support), torch.float32)
        found[dtype] = torch.cat([r @ readout.weight for _, r in residual.residuals(hidden, target)]).detach()
    assert_close(found[torch.bfloat16], found[torch.float32], "float32")
    assert found[torch.float32].abs().max() > 0.1


def test_residuals_are_the_same_in_blocks(monkeypatch):
    monkeypatch.setattr("leaveout.readout.logits.Limits", lambda: Limits(logit_bytes=1))  # the smallest blocks
    z = np.random.default_rng(0).normal(0, 3, (50, 40))
    found = residuals(z, list(range(40)) + list(range(10)))
    for row, scores, target in zip(found, z, [*range(40), *range(10)], strict=True):
        np.testing.assert_allclose(row, exact_residual(scores, target), rtol=1e-12)
