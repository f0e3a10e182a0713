"""Signatures on another device: the numbers of the CPU, few launches, and no waiting."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fake_device import DEVICE, counting
from leaveout.projection import CountSketch
from leaveout.readout import codec
from leaveout.readout.build import Pace
from leaveout.readout.limits import Limits
from leaveout.readout.logits import Head
from leaveout.readout.model import load_readout
from leaveout.readout.settings import resolve_settings
from leaveout.readout.signature import Signer
from leaveout.readout.tokens import Window
from leaveout.readout.whitening import whitening_matrices

from .tiny import TEXTS, built, make_model

FORMS = {
    "default": ("default", {}),
    "triples": ("default", {"bytes_per_row": 1500, "short_bytes": 300}),
    "residual": ("residual", {}),
    "paper": ("paper", {}),
    "similarity": ("similarity", {}),
}
WINDOWS = [
    (0, 30),
    (1, 12),
    (2, 40),
    (2, 25),
    (2, 11),
    (3, 40),
    (4, 2),
    (3, 9),
]  # rows and tokens: some rows have several


def windows(given=WINDOWS):
    chance = torch.Generator().manual_seed(0)
    return [
        Window(row, 0, torch.randint(500, (n,), generator=chance).tolist(), list(range(n // 3, n - 1)))
        for row, n in given
    ]


def signers(name, tokenizer, dtype, family="llama", **more):
    """One on the CPU and one on the device, with the same whitening."""
    preset, changes = FORMS[name]
    settings = resolve_settings(preset, **changes, **more)
    models = [make_model(family, spread=0.1, dtype=dtype).to(place) for place in ("cpu", DEVICE)]
    here, there = (Signer(load_readout(model, tokenizer), settings) for model in models)
    if settings.whitens:
        here.whitening = whitening_matrices(here, windows())
        there.whitening = {key: value.to(DEVICE) for key, value in here.whitening.items()}
    return here, there


def gram(signer, rows):
    """Products of all rows: they say what rows of triples mean, whichever signs those have."""
    rows = rows.float().cpu()
    return signer.form.products(rows, rows).numpy()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("name", FORMS)
def test_signatures_are_those_of_the_cpu(name, family, tokenizer):
    here, there = signers(name, tokenizer, torch.float32, family)
    wanted, found = (signer.rows(windows(), 5).float().cpu() for signer in (here, there))
    if name != "triples":
        assert float((found - wanted).norm() / wanted.norm()) <= 1e-4
    cross = here.form.products(found, wanted).diagonal().numpy()
    own, others = (np.diag(gram(here, rows)) for rows in (found, wanted))
    assert (np.sqrt(np.maximum(own + others - 2 * cross, 0) / others) <= 1e-3).all()  # a difference of float32 numbers
    assert np.abs(own - others).max() <= 1e-4 * others.max()


@pytest.mark.parametrize("name", ["default", "triples", "similarity"])
def test_both_sides_are_those_of_the_cpu(name, tokenizer):
    """One row has no prompt, which leaves that side zero, and not what no iteration comes to an end of."""
    here, there = signers(name, tokenizer, torch.float32, targets="both")
    sides = [replace(one, prompt=list(range(one.row and len(one.ids) // 3))) for one in windows()]
    wanted, found = (signer.rows(sides, 5).float().cpu().chunk(2, 1) for signer in (here, there))
    assert not found[1][[0, 4]].any() and not wanted[1][[0, 4]].any() and found[1][1:4].any(1).all()
    for a, b in zip(wanted, found, strict=True):
        cross, own, others = (here.form.products(x, y).diagonal() for x, y in ((a, b), (a, a), (b, b)))
        assert float((own + others - 2 * cross).abs().max()) <= 1e-6 * float(own.max())


@pytest.mark.parametrize("name", FORMS)
def test_scores_in_bfloat16_rank_alike(name, tokenizer):
    here, there = signers(name, tokenizer, torch.bfloat16)
    many = windows([(row, 8 + row) for row in range(30)])
    wanted, found = (gram(signer, signer.rows(many, 30))[np.triu_indices(30)] for signer in (here, there))
    assert np.corrcoef(wanted.argsort().argsort(), found.argsort().argsort())[0, 1] >= 0.999


def test_statistics_are_those_of_the_cpu(tokenizer):
    here, there = signers("default", tokenizer, torch.float32)
    for name, matrix in whitening_matrices(there, windows()).items():
        square, wanted = (x.double().cpu() @ x.double().cpu().T for x in (matrix, here.whitening[name]))
        assert float((square - wanted).norm() / wanted.norm()) <= 1e-4


@pytest.mark.parametrize(("name", "launches"), [("triples", 320), ("paper", 150)])
def test_a_batch_waits_at_most_once(name, launches, tokenizer):
    """But for several windows of one row, which wait for each other."""
    _, there = signers(name, tokenizer, torch.bfloat16)
    single = [Window(n, 0, w.ids, w.positions) for n, w in enumerate(windows())]
    list(there.finished(single))  # what is made once
    with counting() as counts:
        list(there.finished(single))
    waits = counts.waits - counts.below("readout/model.py", "waits")  # the model's own
    assert waits == (1 if name == "triples" else 0), counts.by_line("waits")
    assert counts.launches - counts.below("readout/model.py") < launches, counts.by_line("launches")


@pytest.mark.parametrize(
    ("kept", "sizes", "n_bytes", "rank"),
    [
        (
            ((24, 56), (24, 56), (9, 5)),
            ((40, 56), (24, 60), (17, 5)),
            700,
            20,
        ),  # sides that are cut; sizes that fill no byte
        (((40, 30), (24, 32)), ((40, 30), (24, 56)), 300, 48),
        (((17, 9),), ((17, 9),), 120, 5),
    ],
)
@pytest.mark.parametrize("dense", [True, False])
def test_codes_are_those_of_the_cpu(kept, sizes, n_bytes, rank, dense, monkeypatch):
    monkeypatch.setattr(codec, "DENSE", 4096 if dense else 8)
    codec._rotations.cache_clear()
    filled = codec.Filled(sizes, kept, n_bytes, 0, 16)
    rows = torch.randn(7, filled.form.width(rank), generator=torch.Generator().manual_seed(0))
    rows *= torch.logspace(0, -2, rows.shape[1])
    rows[3] = 0
    there = rows.to(DEVICE)
    filled.coded(there)  # makes what is made once
    with counting() as counts:
        coded = filled.coded(there)
    assert counts.waits == counts.copies == 0 and counts.launches < 250, counts.by_line("waits")
    for name, wanted in filled.encode(rows).items():
        found = coded[name].cpu().numpy()
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        if name in ("codes", "counts"):
            assert (found != wanted).mean() <= 1e-3  # a turned number within rounding of a level
        else:
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_a_chunk_comes_in_one_copy(name, tokenizer):
    here, there = signers(name, tokenizer, torch.float32)
    wanted = here.encoded(windows(), 5)
    encoding = there.encoding(windows(), 5)
    with counting() as counts:
        found = encoding.arrays()
    assert (counts.launches, counts.copies, counts.waits) == (0, 0, 1)  # the copy is on its way
    assert found.keys() == wanted.keys() and found["finite"].dtype == bool
    for key, array in wanted.items():
        assert found[key].dtype == array.dtype and found[key].shape == array.shape
    np.testing.assert_allclose(found["norms"], wanted["norms"], rtol=1e-3)


def test_an_index_is_built_and_searched_on_a_device(tokenizer, tmp_path):
    rows = [{"prompt": text[:20], "completion": text[20:]} for text in TEXTS]
    found = []
    for place in ("cpu", DEVICE):
        model = make_model("llama", spread=0.1, dtype=torch.float32).to(place)
        pace = Pace(chunk_rows=3)  # so that one chunk is on its way while the next is computed
        path = tmp_path / torch.device(place).type
        index = built(load_readout(model, tokenizer), rows, path, bytes_per_row=1500, short_bytes=300, pace=pace)
        hits = index.search([rows[2], "Copper conducts heat"], k=8)
        found.append([[(hit.id, hit.score) for hit in one] for one in hits])
    for one, other in zip(*found, strict=True):
        assert [id for id, _ in one] == [id for id, _ in other]
        largest = max(abs(score) for _, score in one)
        np.testing.assert_allclose([s for _, s in one], [s for _, s in other], atol=2e-2 * largest)


def test_limits_follow_the_memory(monkeypatch):
    assert Limits.of(torch.device("cpu"), 1, 1) == Limits()
    large = Limits.of(DEVICE, 10**5, 10**6)
    assert large.batch_tokens == 16_384 and large.batch_rows == 10_000 and large.logit_bytes == 4 * 2**30
    monkeypatch.setattr("fake_device.MEMORY", 10**9)
    small = Limits.of(DEVICE, 10**5, 10**6)
    assert (small.batch_tokens, small.batch_rows, small.logit_bytes) == (2500, 125, 62_500_000)


def test_a_sketch_is_a_product_where_additions_have_no_order(tokenizer):
    here, there = signers("default", tokenizer, torch.float32)
    assert isinstance(here.maps["rh0"], CountSketch)
    assert torch.equal(there.maps["rh0"].cpu(), here.maps["rh0"].matrix())


def test_sparse_residuals_of_fixed_width_are_those_of_the_cpu(tokenizer):
    settings = resolve_settings("paper", support=20)
    products = []
    for place in ("cpu", DEVICE):
        readout = load_readout(make_model("llama", spread=0.1, dtype=torch.float32).to(place), tokenizer)
        head = Head(readout, settings, torch.float32)
        hidden = torch.randn(9, 32, generator=torch.Generator().manual_seed(1)).to(place)
        pieces = head.residuals(hidden, torch.arange(9).to(place))
        products.append(torch.cat([residual @ readout.weight for _, residual in pieces]).cpu())
    assert float((products[0] - products[1]).norm() / products[0].norm()) < 1e-6
