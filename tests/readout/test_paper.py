"""The `paper` preset against the oracle that computes it one position at a time."""

import copy

import numpy as np
import pytest
import torch

from leaveout.corpus import render
from leaveout.projection import CountSketch
from leaveout.readout.settings import resolve_settings
from leaveout.readout.signature import Signer
from leaveout.readout.tokens import Window

from .conftest import RAW
from .oracle import Slow, paper_row, target_places, truncated_residual, windows_of
from .tiny import make_readout

# Spread of the weights: the softmax at temperature 0.1 is peaked, mixed, flat.
SPREADS = {"llama": 0.3, "gpt_neox": 0.06, "gpt2": 0.02}


@pytest.fixture(scope="module", params=SPREADS)
def model(request, tokenizer):
    """A readout in float32 and the oracle of the same weights."""
    readout = make_readout(request.param, tokenizer, spread=SPREADS[request.param], dtype=torch.float32)
    return readout, Slow(copy.deepcopy(readout.lm).double())


def tables_of(readout):
    v, h = readout.vocabulary, readout.hidden_size
    sketches = {"r": (v, 128, "rh/0//left"), "g": (h, 64, "gh/1//left"), "h": (h, 128, "h")}
    made = {key: CountSketch.make(size, width, 0, stream) for key, (size, width, stream) in sketches.items()}
    return {key: (table.buckets.numpy(), table.signs.numpy(), table.width) for key, table in made.items()}


def cosine(x, y):
    return x @ y / np.linalg.norm(x) / np.linalg.norm(y)


@pytest.mark.parametrize("targets", ["response", "all"])
def test_paper_signature_equals_the_oracle(model, targets, rows, tokenizer, tokenised):
    readout, slow = model
    settings = resolve_settings("paper", targets=targets)
    found = tokenised(settings)
    vectors = Signer(readout, settings).rows([window for row in found for window in row.windows], len(found)).numpy()
    n_windows = set()
    for row, tokens, vector in zip(rows, found, vectors, strict=True):
        row = render(row, tokenizer)
        places = list(range(1, len(tokens.ids))) if targets == "all" else target_places(tokens.offsets, row.responses)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
        assert cosine(vector, paper_row(slow, tokens.ids, places, tables_of(readout))) >= 0.999999, row
        n_windows.add(len(windows_of(len(tokens.ids), 256, 206)))
    assert n_windows >= {1, 2, 3}


def test_paper_signature_of_almost_certain_targets_equals_the_oracle(tokenizer):
    """Text that the model itself likes best, where 1 - p of the target is far below float32 rounding."""
    readout = make_readout("llama", tokenizer, spread=0.7, dtype=torch.float32)
    slow, ids = Slow(copy.deepcopy(readout.lm).double()), [0, 40]
    while len(ids) < 40:
        ids.append(int(slow.positions([*ids, 0], [len(ids)])[0].z.argmax()))
    ids[20] = 300  # one surprise
    lengths = np.array(
        [np.linalg.norm(list(truncated_residual(at.z, at.target).values())) for at in slow.positions(ids, range(1, 40))]
    )
    assert (lengths < 1e-8).sum() > 3 and ((lengths > 1e-7) & (lengths < 1e-4)).sum() > 3
    found = Signer(readout, resolve_settings("paper")).rows([Window(0, 0, ids, list(range(39)))], 1)[0].numpy()
    assert cosine(found, paper_row(slow, ids, range(1, 40), tables_of(readout))) >= 0.999999


def test_paper_rows_are_peaked_and_flat(model, tokenised):
    readout, slow = model
    ids = tokenised(resolve_settings("paper"))[RAW.index(RAW[-2])].ids[:256]
    at = slow.positions(ids, range(1, len(ids)))
    kept = [len(truncated_residual(position.z, position.target)) for position in at]
    low, high = {"llama": (4, 15), "gpt_neox": (5, 100), "gpt2": (150, 257)}[readout.family]
    assert low <= min(kept) < max(kept) <= high
