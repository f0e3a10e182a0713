"""Factors that are too wide for a whitening matrix: near the exact form, and exact where nothing is left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import leaveout.readout.whitening as whitening
import leaveout.readout.wide as wide
from leaveout.readout.index import Index
from leaveout.readout.settings import PRESETS
from leaveout.readout.signature import Signer
from leaveout.readout.whitening import moment_groups, whitening_matrices
from leaveout.readout.wide import WideMoment, WideRoot, arrays_of, roots_of

from .conftest import assert_close
from .tiny import TEXTS, make_model, make_readout

SIZE, DAMPING = 512, 0.1


@pytest.fixture(scope="module")
def positions():
    """Positions whose numbers vary by themselves and together, with a spectrum that falls as of MLP inputs: as 1 / n."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))[0]
    spread = (torch.arange(SIZE) + 1.0).rsqrt().double()
    own = torch.rand(SIZE, generator=generator, dtype=torch.float64) ** 2 + 0.05
    return (torch.randn(3000, SIZE, generator=generator, dtype=torch.float64) * spread) @ mixing * own


def exact_products(x):
    """x (M + damping)^-1 x^T of the last 300 positions, M of the others, by numpy's inverse."""
    seen, asked = x[:-300].numpy(), x[-300:].numpy()
    moment = seen.T @ seen / len(seen)
    added = DAMPING * np.trace(moment) / SIZE
    return asked @ np.linalg.inv(moment + added * np.eye(SIZE)) @ asked.T


def limited(monkeypatch, kept, columns, width=None):
    for name, value in (("KEPT", kept), ("COLUMNS", columns), *([("WIDE", width)] if width else [])):
        monkeypatch.setattr(wide, name, value)


def wide_root(x, kept, columns, monkeypatch):
    limited(monkeypatch, kept, columns)
    moment = WideMoment(SIZE, 0, torch.device("cpu"), torch.float64)
    for piece in x[:-300].split(700):
        moment.add(piece)
    return moment.root(len(x) - 300, DAMPING)


def products(x, root):
    asked = x[-300:] @ root
    return (asked @ asked.t()).numpy()


def test_nothing_left_out_is_exact(positions, monkeypatch):
    assert_close(
        products(positions, wide_root(positions, SIZE, SIZE, monkeypatch)), exact_products(positions), "float32"
    )


@pytest.mark.parametrize(("kept", "error", "rank"), [(64, 0.4, 0.88), (128, 0.33, 0.93), (256, 0.26, 0.95)])
def test_products_are_near_the_exact_ones(positions, monkeypatch, kept, error, rank):
    found, exact = products(positions, wide_root(positions, kept, 2 * kept, monkeypatch)), exact_products(positions)
    assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < error
    above = np.triu_indices(len(exact), 1)
    assert spearmanr(found[above], exact[above]).statistic > rank


def test_main_directions_come_first(positions, monkeypatch):
    root = wide_root(positions, 64, 128, monkeypatch)
    orthogonal = torch.eye(SIZE, dtype=torch.float64) - root.reflections @ root.triangle @ root.reflections.t()
    assert_close(orthogonal @ orthogonal.t(), np.eye(SIZE), "float64")
    moved = (positions * root.scale) @ orthogonal
    energy = moved.square().mean(0)
    assert energy[:64].mean() > 5 * energy[64:].mean()
    assert torch.all(root.by[:64].diff() >= 0)
    assert torch.all(root.by[64:] == root.by[-1])


def test_roots_are_stored_and_come_back(positions, monkeypatch):
    roots = {"a.damping-0.1": wide_root(positions, 8, 16, monkeypatch), "h.damping-0.1": torch.eye(3)}
    found = roots_of(arrays_of(roots))
    assert set(found) == set(roots)
    assert isinstance(found["a.damping-0.1"], WideRoot)
    assert torch.equal(positions @ found["a.damping-0.1"], positions @ roots["a.damping-0.1"])


@pytest.fixture(scope="module")
def readout(tokenizer):
    return make_readout("llama", tokenizer, dtype=torch.float32, intermediate_size=512)


def windows_of(signer, tokenised):
    return [window for row in tokenised(signer.settings) for window in row.windows]


def test_scores_rank_as_with_the_exact_form(readout, tokenised, monkeypatch):
    signer = Signer(readout, replace(PRESETS["default"], bytes_per_row=None, short_bytes=None, storage="float32"))
    windows = windows_of(signer, tokenised)
    signer.whitening = whitening_matrices(signer, windows)
    rows = signer.rows(windows, windows[-1].row + 1)
    exact = signer.form.products(rows, rows)
    limited(monkeypatch, 128, 256, 256)
    signer.whitening = whitening_matrices(signer, windows)
    assert sum(isinstance(root, WideRoot) for root in signer.whitening.values()) == 2  # one an MLP
    rows = signer.rows(windows, windows[-1].row + 1)
    found = signer.form.products(rows, rows)
    assert spearmanr(found.flatten(), exact.flatten()).statistic > 0.98


def test_passes_over_the_sample_change_nothing(readout, tokenised, monkeypatch):
    signer = Signer(readout, PRESETS["residual"])
    windows = windows_of(signer, tokenised)
    assert len(moment_groups(signer)) == 1
    wanted = whitening_matrices(signer, windows)
    monkeypatch.setattr(whitening, "SUMS", 8 * 512**2 + 8 * 40**2)
    assert len(moment_groups(signer)) > 2
    done = []
    found = whitening_matrices(signer, windows, done.append)
    assert sum(done) == len(windows) * len(moment_groups(signer))
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], matrix) for name, matrix in wanted.items())


def test_an_index_with_wide_factors_opens_again(tmp_path, tokenizer, monkeypatch):
    limited(monkeypatch, 16, 32, 40)
    lm = make_model("llama", dtype=torch.float32)
    built = Index.build(lm, list(TEXTS), tmp_path / "idx", tokenizer=tokenizer)
    assert any(isinstance(root, WideRoot) for root in built.signer.whitening.values())
    again = Index.open(tmp_path / "idx", lm, tokenizer)
    assert np.array_equal(again.score(TEXTS[:2]), built.score(TEXTS[:2]))


@pytest.mark.parametrize("size", [8, 40])
def test_roots_for_measuring_change_nothing(monkeypatch, size):
    monkeypatch.setattr(wide, "WIDE", 16)
    monkeypatch.setattr(wide, "KEPT", 4)
    x, root = torch.randn(3, size), wide.idle_root(size, torch.device("cpu"), torch.float32)
    assert isinstance(root, wide.WideRoot) == (size > 16)
    torch.testing.assert_close(x @ root, x)
