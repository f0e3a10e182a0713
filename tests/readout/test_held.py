"""Scans on a device: the hits of the CPU, from rows that are copied there once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fake_device import DEVICE, counting
from leaveout.readout import codec as codec_module
from leaveout.readout import held as held_module
from leaveout.readout.codec import BITS, Filled, Planes, Rounded, Whole, packed, tensors, unpacked
from leaveout.readout.held import Held
from leaveout.readout.index import Index
from leaveout.readout.limits import ScanLimits
from leaveout.readout.model import load_readout

from .tiny import TEXTS, built, make_model

SIZES = ((40, 24), (13, 56), (1, 9))
FORMS = {
    "float32": (Whole(203, "float32"), 1e-6),
    "int8": (Whole(203, "int8"), 1e-6),
    "one bit": (Planes(203, 150, 1, 0), 0),
    "four bits": (Planes(203, 203, 4, 0), 0),
    "triples": (Filled(SIZES, ((24, 24), (13, 33), (1, 9)), 200, 0, 4), 1e-6),
}
CORPUS = [
    {"prompt": text[:n], "completion": f"{text[n:]} {n}", "half": n % 2} for n in range(3, 10) for text in TEXTS[:5]
]
KEY = (Path("segment"), "long")
OPTIONS = ({}, {"exact": True}, {"where": "half = 1"}, {"shortlist": 20}, {"shortlist": 10, "where": "half = 1"})
ASKED = ["Copper conducts heat", "The ferry left the harbour at noon."]


def there(arrays):
    return {name: x.to(DEVICE) for name, x in tensors(arrays, slice(None)).items()}


@pytest.mark.parametrize("n_rows", [1, 5, 50])
@pytest.mark.parametrize("name", FORMS)
def test_scores_are_those_of_the_cpu(name, n_rows, monkeypatch):
    codec, error = FORMS[name]
    chance = torch.Generator().manual_seed(0)
    width = codec.form.width(6) if isinstance(codec, Filled) else 203
    rows, queries = (torch.randn(n, width, generator=chance) for n in (n_rows, 3))
    arrays = codec.encode(rows)
    wanted = codec.scorer(queries)(arrays, slice(None))
    for at_once in (64, codec_module.SEGMENTS_THERE):
        monkeypatch.setattr(codec_module, "SEGMENTS_THERE", at_once)
        found = codec.scorer_on(queries, DEVICE)(there(arrays))
        assert found.device == DEVICE and found.shape == (n_rows, 3)
        assert np.abs(found.cpu().numpy() - wanted).max(initial=0) <= error * np.abs(wanted).max(initial=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1, 8, 61, 203])
def test_products_on_a_device_are_whole_numbers(size, bits):
    """Of codes that are written out number by number, with numbers of queries that are, too."""
    chance = np.random.default_rng(size)
    levels = chance.integers(0, 2**bits, (5, size))
    codes = packed(torch.from_numpy(levels.astype(np.uint8)), bits).to(DEVICE)
    assert np.array_equal(unpacked(codes, bits).cpu().numpy()[:, :size], levels)
    rounded = Rounded.of(torch.from_numpy(chance.standard_normal((3, size))).float())
    wanted = (2 * levels - (2**bits - 1)) @ rounded.numbers[:size].numpy().astype(np.int64)
    assert np.array_equal(2 * rounded.to(DEVICE).products(codes, bits).cpu().numpy(), wanted)


@pytest.fixture(scope="module", params=["one form", "two forms", "vectors"])
def places(request, tokenizer, tmp_path_factory):
    """One index, opened with its model on the CPU and on the device."""
    changes = {
        "one form": {"bytes_per_row": 900, "short_bytes": None},
        "two forms": {"bytes_per_row": 1500, "short_bytes": 300},
        "vectors": {"preset": "similarity"},
    }[request.param]
    path = tmp_path_factory.mktemp("held") / "index"
    model = make_model("llama", spread=0.1, dtype=torch.float32)
    built(load_readout(model, tokenizer), CORPUS, path, **changes)
    there = make_model("llama", spread=0.1, dtype=torch.float32).to(DEVICE)
    return Index.open(path, model, tokenizer), Index.open(path, there, tokenizer)


def test_searches_find_the_hits_of_the_cpu(places):
    here, there = places
    queries = here.encode(ASKED)
    for length in ("cosine", "product"):
        for options in OPTIONS:
            if "shortlist" in options and here.short is None:
                continue
            wanted, found = (index.search(queries, k=8, length=length, **options) for index in places)
            assert [[hit.id for hit in one] for one in found] == [[hit.id for hit in one] for one in wanted]
            for one, other in zip(found, wanted, strict=True):
                np.testing.assert_allclose([hit.score for hit in one], [hit.score for hit in other], rtol=1e-5)
    assert here._held is None and there._held is not None and there._held.kept
    with counting() as counts:
        there.search(queries, k=8, workers=2)
    assert counts.launches == counts.copies == 0  # several workers stay on the CPU


def test_a_second_search_copies_no_rows(places, monkeypatch):
    _, there = places
    queries = there.encode(ASKED)
    there.search(queries, k=3, exact=True)
    kept = there._held.n_bytes
    assert kept >= len(CORPUS) * there.long.row_bytes * 0.9
    copied = []
    monkeypatch.setattr(held_module, "sent", lambda x, device: copied.append(x.tolist()) or x.to(device))
    there.search(queries, k=3, exact=True)
    assert not copied
    there.scores_of(queries.vectors, np.array([7, 3]), length="product")
    assert copied == [[3, 7]]
    assert there._held.n_bytes == kept


def test_no_more_is_kept_than_there_is_room_for(places, monkeypatch):
    _, there = places
    queries = there.encode(ASKED)
    monkeypatch.setattr(there, "_held", None)
    monkeypatch.setattr("fake_device.MEMORY", 1000)
    wanted, found = (index.search(queries, k=8, exact=True) for index in places)
    assert there._held.n_bytes == 0 and not there._held.kept
    assert [[hit.id for hit in one] for one in found] == [[hit.id for hit in one] for one in wanted]
    with counting() as counts:
        there.search(queries, k=8, exact=True)
    assert counts.bytes_in >= len(CORPUS) * there.long.row_bytes * 0.9


def test_files_that_are_gone_are_let_go(tokenizer, tmp_path):
    model = make_model("llama", spread=0.1, dtype=torch.float32).to(DEVICE)
    index = built(load_readout(model, tokenizer), CORPUS[:12], tmp_path / "index", preset="similarity")
    before = index.search(ASKED, k=12)[0]
    files = {path for path, _ in index._held.kept}
    index.delete([before[0].id])
    assert [hit.id for hit in index.search(ASKED, k=12)[0]] == [hit.id for hit in before[1:]]
    assert {path for path, _ in index._held.kept} == files
    index.purge()
    assert [hit.id for hit in index.search(ASKED, k=12)[0]] == [hit.id for hit in before[1:]]
    assert not files & {path for path, _ in index._held.kept} and len(index._held.kept) == 1


@pytest.mark.parametrize("fitting", [False, True])
def test_blocks_are_the_rows_in_order(fitting, monkeypatch):
    codec = Whole(10, "int8")
    arrays = codec.encode(torch.randn(100, 10, generator=torch.Generator().manual_seed(0)))
    held = Held(DEVICE)
    monkeypatch.setattr(held, "limits", ScanLimits(kept=1400 if fitting else 1399, block=40 * 14))
    for at in (None, np.arange(3, 90, 2), np.empty(0, np.int64)):
        for name, array in arrays.items():
            blocks = [block[name].cpu().numpy() for block in held.blocks(codec, KEY, arrays, at)]
            assert np.array_equal(np.concatenate([array[:0], *blocks]), array if at is None else array[at])
            assert all(len(block) <= 32 for block in blocks)
    assert held.n_bytes == (1400 if fitting else 0)


def test_blocks_follow_the_memory(monkeypatch):
    assert ScanLimits.of(DEVICE) == ScanLimits(40 * 10**9, 64 * 2**20)
    monkeypatch.setattr("fake_device.MEMORY", 10**9)
    assert ScanLimits.of(DEVICE) == ScanLimits(5 * 10**8, 7_812_500)
