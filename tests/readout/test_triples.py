"""Singular triples of outer products: three ways to find them, and what rows of them mean, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fake_device import DEVICE, counting
from leaveout.projection import random_signs
from leaveout.readout import forms
from leaveout.readout.forms import Triples, low_rank, low_ranks, squared_length
from leaveout.readout.settings import resolve_settings
from leaveout.readout.signature import QUERY_RANK, ROW_RANK, Signer
from leaveout.readout.tokens import Window
from leaveout.readout.whitening import whitening_matrices

from .conftest import GH, assert_close
from .test_codec import dense
from .test_presets import EXACT
from .tiny import make_readout

WAYS = ("_by_positions", "_by_entries", "_by_iteration")


@pytest.fixture
def used(monkeypatch):
    """Names of the ways that were gone."""
    seen = []
    for name in WAYS:
        real = getattr(forms, name)
        monkeypatch.setattr(forms, name, lambda *args, name=name, real=real: seen.append(name) or real(*args))
    return seen


def factors(positions, left, right, decay, seed=0):
    """Factors as rows have them: directions that positions share, of falling weight, and some noise."""
    generator = torch.Generator().manual_seed(seed)
    shared = min(positions, left, right)
    weight = (1 + torch.arange(shared)) ** -decay
    mixed = torch.randn(positions, shared, generator=generator) * weight
    noise = 0.02 * torch.randn(positions, left, generator=generator)
    a = mixed @ torch.randn(shared, left, generator=generator) + noise
    return a, (mixed + 0.3 * torch.randn(positions, shared, generator=generator) * weight) @ torch.randn(
        shared, right, generator=generator
    )


def split(found, rank, left, right):
    u, v = found.double().split([rank * left, rank * right])
    return u.view(rank, left).numpy(), v.view(rank, right).numpy()


@pytest.mark.parametrize(
    ("positions", "left", "right", "rank", "way"),
    [
        (60, 64, 172, 24, 0),
        (256, 300, 256, 48, 0),  # as many positions as are still looked at as such
        (100, 16, 40, 24, 1),
        (300, 40, 500, 48, 1),
        (300, 500, 40, 48, 1),
        (257, 256, 900, 48, 1),  # the widest side that is squared
        (300, 1, 9, 4, 1),
        (300, 9, 1, 4, 1),
        (2, 1, 1, 3, 1),
        (1, 8, 9, 4, 0),
        (3, 8, 8, 2, 0),
        (5, 30, 30, 24, 0),
        (900, 320, 400, 48, 2),  # of more positions than its matrix has room for
        (300, 400, 900, 48, 2),  # of fewer
        (260, 257, 257, 64, 2),
    ],
)
def test_triples_are_those_of_numpy(positions, left, right, rank, way, used):
    a, b = factors(positions, left, right, 0.3, positions)
    found = low_rank(a, b, rank)
    assert used == [WAYS[way]] and found.shape == (rank * (left + right),) and found.dtype == torch.float32
    u, v = split(found, rank, left, right)
    one, s, other = np.linalg.svd(a.double().t().numpy() @ b.double().numpy(), full_matrices=False)
    n = min(rank, len(s))
    wanted = one[:, :n] * s[:n] @ other[:n]
    matrix = u.T @ v
    cosine = (matrix * wanted).sum() / np.linalg.norm(matrix) / np.linalg.norm(wanted)
    assert cosine >= 0.9999
    if way < 2:
        assert np.abs(matrix - wanted).max() <= 5e-6 * s[0]
    lengths = np.linalg.norm(u, axis=1), np.linalg.norm(v, axis=1)
    real = s[:n] > 1e-5 * s[0]
    for length in lengths:  # the root of s on both sides, largest first, nothing behind what there is
        assert_close(length[:n][real] ** 2, s[:n][real], "model float32" if way < 2 else "int8")
        assert (np.diff(length) <= 1e-3 * length[0]).all() and not length[min(n, positions) :].any()


@pytest.mark.parametrize(("positions", "left", "right", "decades"), [(40, 64, 64, 12), (3, 8, 8, 30), (300, 20, 30, 9)])
def test_triples_of_factors_of_any_spread(positions, left, right, decades):
    generator = torch.Generator().manual_seed(positions)
    a = torch.randn(positions, left, generator=generator) * torch.logspace(0, -decades, positions)[:, None]
    b = torch.randn(positions, right, generator=generator)
    u, v = split(low_rank(a, b, 64), 64, left, right)
    wanted = a.double().t().numpy() @ b.double().numpy()
    assert np.abs(u.T @ v - wanted).max() <= 5e-6 * np.linalg.norm(wanted, 2)


@pytest.mark.parametrize(("positions", "left", "right"), [(20, 30, 40), (300, 20, 30), (300, 300, 310)])
def test_triples_of_nothing_and_of_what_is_no_number(positions, left, right, used):
    a, b = factors(positions, left, right, 1.0)
    assert not low_rank(0 * a, b, 8).any() and not low_rank(a, 0 * b, 8).any() and len(used) == 2
    assert used[0] == WAYS[0 if positions == 20 else 1 if left == 20 else 2]
    for bad in (torch.nan, torch.inf):
        for damaged in (
            (torch.where(torch.arange(left) == 3, bad, a), b),
            (a, torch.where(torch.arange(right) == 3, bad, b)),
        ):
            assert torch.isnan(low_rank(*damaged, 8)).all()
    single = low_rank(a[:1], b[:1], 3)  # one position: one triple
    u, v = split(single, 3, left, right)
    assert_close(u.T @ v, np.outer(a[0], b[0]), "model float32")
    assert not u[1:].any() and not v[1:].any()


def test_iteration_begins_at_frozen_signs():
    assert torch.equal(forms._start(6, 4), random_signs(0, "low rank", 24).view(6, 4))
    a, b = factors(300, 300, 310, 1.0)
    assert torch.equal(low_rank(a, b, 8), low_rank(a, b, 8))


@pytest.mark.parametrize(("positions", "left", "right"), [(4, 30, 40), (60, 6, 9)])
def test_length_of_a_sum_of_outer_products(positions, left, right):
    a, b = factors(positions, left, right, 1.0)
    wanted = np.linalg.norm(a.double().numpy().T @ b.double().numpy()) ** 2
    assert float(squared_length(a, b)) == pytest.approx(wanted, rel=1e-4)
    assert float(squared_length(a, 0 * b)) == 0


def distance(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def batch(counts, sizes, decay):
    """Factors of rows with so many positions, by part, and filled up with zeros."""
    made = [[factors(n, *size, decay, 10 * row + part) for row, n in enumerate(counts)]
            for part, size in enumerate(sizes)]  # fmt: skip
    return made, [tuple(torch.nn.utils.rnn.pad_sequence(side, batch_first=True) for side in zip(*rows, strict=True))
                  for rows in made]  # fmt: skip


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize(
    ("counts", "sizes", "rank", "decay", "error"),
    [
        ((60, 5, 1, 33), ((64, 172), (64, 40)), 24, 0.3, 2e-5),
        ((140, 139, 3), ((160, 200),), 48, 0.3, 1e-4),
        ((140, 130), ((160, 200),), 48, 0.0, 0.03),  # nearly flat: which triple is the last one hardly matters
        ((300, 90), ((30, 500), (500, 20)), 48, 1.0, 2e-4),  # of fewer triples than are asked for, and some are tiny
        ((9, 7), ((3, 8), (8, 2)), 24, 1.0, 2e-5),
    ],
)
def test_triples_of_many_rows_and_parts_at_once(counts, sizes, rank, decay, error, on_host, monkeypatch):
    monkeypatch.setattr(forms, "BATCHED", not on_host)
    exact, filled = batch(counts, sizes, decay)
    on_device = [tuple(side.to(DEVICE) for side in pair) for pair in filled]
    low_ranks(on_device, counts, rank)  # makes what is made once
    with counting() as happened:
        rows, squares = low_ranks(on_device, counts, rank)
    assert happened.waits == (3 if on_host else 1) and happened.launches < 110
    assert rows.dtype == torch.float32 and rows.shape == (len(counts), Triples(sizes).width(rank))
    assert torch.equal(low_ranks(on_device, counts, rank)[0].cpu(), rows.cpu())
    for part, (u, v) in enumerate(Triples(sizes).factors(rows.cpu().double())):
        for row, (a, b) in enumerate(exact[part]):
            one, s, other = np.linalg.svd(a.double().numpy().T @ b.double().numpy(), full_matrices=False)
            wanted = one[:, :rank] * s[:rank] @ other[:rank]
            assert distance((u[row].T @ v[row]).numpy(), wanted) <= error
            assert float(squares[row, part]) == pytest.approx((s**2).sum(), rel=1e-5)
            length = u[row].norm(dim=1).numpy()
            real = s[:rank] > 1e-3 * s[0]
            if error < 1e-3:
                assert_close(length[: len(real)][real] ** 2, s[:rank][real], "int8")
            assert not length[min(counts[row], rank) :].any()


def test_a_row_that_is_no_number_spoils_no_other():
    counts, sizes = (12, 20, 7, 9), ((16, 40), (16, 8))
    _, filled = batch(counts, sizes, 0.5)
    whole = low_ranks([(a.to(DEVICE), b.to(DEVICE)) for a, b in filled], counts, 8)[0].cpu()
    filled[0][0][1, 3, 2], filled[1][1][2, 0, 0] = torch.nan, torch.inf
    filled[0][1][3] = 0.0  # of nothing, nothing
    with counting() as happened:
        found = low_ranks([(a.to(DEVICE), b.to(DEVICE)) for a, b in filled], counts, 8)[0]
    assert happened.waits - happened.copies == 1
    found, width = found.cpu(), 8 * sum(sizes[0])
    assert torch.isnan(found[1, :width]).all() and torch.isnan(found[2, width:]).all() and not found[3, :width].any()
    for good in ((0, slice(None)), (1, slice(width, None)), (2, slice(width)), (3, slice(width, None))):
        assert torch.equal(found[good], whole[good])


def test_long_rows_are_computed_one_by_one(used, monkeypatch):
    monkeypatch.setattr(forms, "LONGEST", 10)
    _, filled = batch((11, 4), ((16, 40),), 0.5)
    found = low_ranks([(a.to(DEVICE), b.to(DEVICE)) for a, b in filled], (11, 4), 3)
    assert len(used) == 2
    for one, other in zip(found, low_ranks(filled, (11, 4), 3), strict=True):
        assert torch.equal(one.cpu(), other)


SIZES = ((7, 5), (3, 9))


def test_rows_of_triples_mean_sums_of_outer_products():
    form, generator = Triples(SIZES), torch.Generator().manual_seed(0)
    rows, queries = (torch.randn(n, form.width(rank), generator=generator) for n, rank in ((5, 4), (3, 6)))
    assert form.rank(rows) == 4 and form.rank(queries) == 6
    slow, asked = dense(rows, SIZES), dense(queries, SIZES)
    assert_close(form.products(rows, queries), slow @ asked.T, "float32")
    assert_close(form.lengths(rows), np.linalg.norm(slow, axis=1), "float32")
    parts = np.split(slow, [35], axis=1)
    assert_close(form.part_lengths(rows), np.stack([np.linalg.norm(part, axis=1) for part in parts], 1), "float32")
    assert torch.equal(form.joined(list(form.factors(rows))), rows)
    assert_close(dense(form.widened(rows, 9), SIZES), slow, "float64")
    assert form.rank(form.widened(rows, 9)) == 9
    by = torch.tensor([1.0, 2.0, 0.5, 4.0, 100.0])
    assert_close(dense(form.divided(rows, by), SIZES), slow / by.numpy()[:, None], "float32")
    for place in ("cpu", DEVICE):
        added = form.add(form.widened(rows[:2], 6).to(place), form.widened(rows[2:4], 6).to(place)).cpu()
        for found, wanted in zip(dense(added, SIZES), slow[:2] + slow[2:4], strict=True):
            assert_close(found[35:], wanted[35:], "model float32")  # rank 3 at most
            one, s, other = np.linalg.svd(wanted[:35].reshape(7, 5))
            assert_close(found[:35], (one[:, :5] * s @ other).ravel(), "model float32")


def test_signer_gives_the_triples_of_exact_rows(tokenizer, tokenised, rows):
    """Rows of one window and of several: all of them where the rank suffices, the largest where it does not."""
    readout = make_readout("gpt2", tokenizer, spread=0.15)
    settings = {"flat": EXACT, "triples": {**EXACT, "bytes_per_row": 300}}
    signers = {}
    for name, changes in settings.items():
        signers[name] = Signer(readout, resolve_settings(GH, **changes), QUERY_RANK)
    windows = [window for row in tokenised(signers["flat"].settings, rows[:6]) for window in row.windows]
    matrices = whitening_matrices(signers["flat"], windows)
    for signer in signers.values():
        signer.whitening = matrices
    exact = signers["flat"].rows(windows, 6).numpy()
    assert_close(dense(signers["triples"].rows(windows, 6), ((32, 32),)), exact, "float64")
    few = Signer(readout, signers["triples"].settings, 3)
    few.whitening = matrices
    for number in range(6):
        own = [window for window in windows if window.row == number]
        if len(own) > 1:
            continue
        one, s, other = np.linalg.svd(exact[number].reshape(32, 32))
        found = few.rows(windows, 6)[number]
        assert_close(dense(found[None], ((32, 32),))[0], (one[:, :3] * s[:3] @ other[:3]).ravel(), "float64")
    assert ROW_RANK < QUERY_RANK


def test_rows_longer_than_a_batch_are_summed(tokenizer):
    """A batch of which no row is finished: 1,024 tokens hold one of several windows of a row."""
    readout = make_readout("llama", tokenizer, spread=0.1, max_position_embeddings=2048, dtype=torch.float32)
    ids = torch.randint(4, 500, (1500,), generator=torch.Generator().manual_seed(0)).tolist()
    windows = [Window(0, 0, ids[:1000], list(range(999))), Window(0, 1, ids[500:], list(range(499, 999)))]
    windows.append(Window(1, 0, ids[:30], list(range(29))))
    for changes in ({"bytes_per_row": None}, {"bytes_per_row": 300}):
        signer = Signer(readout, resolve_settings("similarity", unit_length=False, short_bytes=None, **changes))
        whole = signer.encoded(windows, 2)
        rows = signer.rows(windows, 2)
        alone = signer.rows([Window(0, 0, w.ids, w.positions) for w in windows[:1]], 1)
        other = signer.rows([Window(0, 0, w.ids, w.positions) for w in windows[1:2]], 1)
        assert whole["finite"].tolist() == [True, True] and whole["norms"].shape == (2, 1)
        if signer.form.degree == 1:
            assert_close(rows[:1], alone + other, "float32")
            assert_close(whole["norms"][0], (alone + other).norm(dim=1), "model float32")
        else:
            total = dense(alone, ((32, 32),)) + dense(other, ((32, 32),))
            assert_close(dense(rows[:1], ((32, 32),)), total, "model float32")
            assert_close(whole["norms"][0], [np.linalg.norm(total)], "model float32")
