"""The device of tests itself: it computes what a CPU does, refuses what a GPU does, and counts."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fake_device import DEVICE, Event, Mixed, OnDevice, counting


def on(*numbers):
    return torch.tensor(numbers).to(DEVICE)


@pytest.mark.parametrize(
    "make",
    [
        lambda place: torch.zeros(3, device=place),
        lambda place: torch.eye(3, device=place),
        lambda place: torch.arange(1, 9, 2, device=place),
        lambda place: torch.linspace(0, 1, 5, device=place),
        lambda place: torch.arange(6.0, device=place).view(2, 3).t() @ torch.ones(2, 3, device=place),
        lambda place: torch.tensor([3.0, 1.0, 2.0], device=place).sort()[1],
        lambda place: torch.full((2, 2), 5, device=place)[:, 1],
        lambda place: torch.eye(3, dtype=torch.float64, device=place).cumsum(0).to(torch.float32),
    ],
)
def test_results_are_those_of_the_cpu(make):
    found = make(DEVICE)
    assert isinstance(found, OnDevice) and found.device == DEVICE
    assert torch.equal(found.cpu(), make("cpu")) and found.shape == make("cpu").shape


def test_changes_in_place_reach_views_and_what_they_are_of():
    x = torch.zeros(2, 3, device=DEVICE)
    x[1].add_(2.0)
    x[:, 0] = 7.0
    torch.mm(torch.ones(2, 2, device=DEVICE), torch.ones(2, 3, device=DEVICE), out=x[:, :])
    assert x.cpu().tolist() == [[2.0] * 3] * 2


def test_products_with_wide_results():
    a, b = (torch.randn(4, 8, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(2))
    found = torch.mm(a.to(DEVICE), b.to(DEVICE).t(), out_dtype=torch.float32)
    assert torch.equal(found.cpu(), a.float() @ b.float().t())


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.ones(2, 3) @ x,
        lambda x: torch.cat([x, torch.ones(3)]),
        lambda x: torch.ones(3)[on(0, 1)],
        lambda x: x.index_select(0, torch.tensor([0])),
        lambda x: x.__setitem__(slice(0, 2), torch.ones(2)) or x + torch.ones(3),
    ],
)
def test_two_devices_do_not_mix(mix):
    with pytest.raises(Mixed, match="one device"):
        mix(on(1.0, 2.0, 3.0))


def test_numbers_do_not_come_over_by_themselves():
    x = on(1.0, 2.0)
    with pytest.raises(TypeError, match=r"Use Tensor\.cpu"):
        x.numpy()
    with pytest.raises(TypeError, match=r"Use Tensor\.cpu"):
        np.asarray(x)
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, generator=torch.Generator(), device=DEVICE)
    assert (x + torch.tensor(1.0)).tolist() == [2.0, 3.0]  # a single number does


@pytest.mark.parametrize(
    ("task", "launches", "copies", "waits"),
    [
        (lambda x: x + 1, 1, 0, 0),
        (lambda x: x.view(3, 1).expand(3, 5).t(), 0, 0, 0),
        (lambda x: x.double(), 1, 0, 0),
        (lambda x: float(x.sum()), 1, 0, 1),
        (lambda x: x.tolist(), 0, 0, 1),
        (lambda x: bool((x > 0).any()), 2, 0, 1),
        (lambda x: x.nonzero(), 1, 0, 1),
        (lambda x: x[x > 1], 2, 0, 1),
        (lambda x: x[torch.tensor([0, 1])], 1, 1, 1),
        (lambda x: x[on(0, 1)], 1, 1, 1),
        (lambda x: x.cpu(), 0, 1, 1),
        (lambda x: x.to("cpu", non_blocking=True), 0, 1, 0),
        (lambda x: torch.ones(3).to(DEVICE, non_blocking=True), 0, 1, 0),
        (lambda x: torch.linalg.eigh(torch.diag(x)), 2, 0, 1),
        (lambda x: torch.linalg.cholesky_ex(torch.diag(x)), 2, 0, 0),
        (lambda x: Event().synchronize(), 0, 0, 1),
    ],
)
def test_counts(task, launches, copies, waits):
    x = on(1.0, 2.0, 3.0)
    with counting() as counts:
        task(x)
    task(x)  # nobody counts
    assert (counts.launches, counts.copies, counts.waits) == (launches, copies, waits), counts


def test_what_was_copied_is_counted_in_bytes():
    with counting() as counts:
        torch.ones(5).to(DEVICE)[:2].cpu()
    assert (counts.bytes_in, counts.bytes_out) == (20, 8)


def test_counts_name_the_line_of_leaveout():
    from leaveout.readout.forms import Vectors

    rows = torch.ones(2, 3, device=DEVICE)
    with counting() as counts:
        Vectors(3).lengths(rows)
        rows.sum()
    lines = counts.by_line("launches")
    assert counts.below("readout/forms.py") == 1 and any(line.endswith(" lengths") for line in lines)
    assert lines["elsewhere"] == 1


def test_modules_move_and_learn():
    torch.ones(1, requires_grad=True).sum().backward()  # the threads of autograd are made at the first backward pass
    model, x = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 1)), torch.randn(5, 3)
    there = copy.deepcopy(model).to(DEVICE)
    assert {p.device for p in there.parameters()} == {DEVICE} and copy.deepcopy(there)[0].weight.requires_grad
    for one, given in ((model, x), (there, x.to(DEVICE))):
        optimizer = torch.optim.AdamW(one.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            one(given).square().mean().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(b.detach().cpu(), a.detach())


@pytest.mark.parametrize("learned", [False, True])
def test_attention(learned):
    query = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    wanted = nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    there = query.to(DEVICE).requires_grad_(learned)
    with counting() as counts:
        found = nn.functional.scaled_dot_product_attention(there, there, there, is_causal=True)
    torch.testing.assert_close(found.detach().cpu(), wanted)
    assert (counts.launches == 1) is not learned


def test_nobody_finds_it_who_looks_for_a_device():
    assert not torch.accelerator.is_available()
    assert torch.ones(2).device.type == "cpu"
