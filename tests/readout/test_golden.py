"""Stored rows frozen: a refactoring that changes what an index holds is seen here, on every make of processor.

The model's weights are integers from the project's own generator over powers of two, its tokenizer is the bytes of
ASCII, so that neither rests on another library's random numbers or training. Bytes differ by processor, because sums
are taken in other orders; a stored number may therefore lie one level beside the frozen one, and few do.

`PYTHONPATH=src:tests python -m readout.test_golden` writes the files anew. Say in the commit why that had to be.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from leaveout.projection import random_bits
from leaveout.readout.settings import PRESETS
from leaveout.store import Store

from .tiny import built, make_model

HERE = Path(__file__).parent / "golden"
SPECIAL = ("<s>", "</s>")
ROWS = [
    "Two herons stood in the weir; the third had flown at noon.",
    {"prompt": "Name a metal that floats on water: ", "completion": "lithium, or sodium - briefly."},
    {
        "text": "Q: how many legs has a crab?\nA: ten, counting both claws.",
        "prompt_text": "Q: how many legs has a crab?\n",
    },
    "for row in rows:\n    if row.kept:\n        total += row.size\n",
    {
        "prompt": "Longer than one window, so that it is cut: ",
        "completion": " ".join(f"line {n}" for n in range(40)) + ".",
    },
]
# name -> preset and what is changed of it; windows are short, so that the last row has several. Nothing is whitened, as
# the directions of eigenvectors have no sign of their own; of whitened rows, scores and lengths are frozen.
FORMS = {
    "similarity": ("similarity", {}),
    "paper": ("paper-responses", {}),
    "cosine": ("similarity", {"targets": "all", "bytes_per_row": 200}),
}
IN_FULL = {"bytes_per_row": None, "short_bytes": None, "storage": "float32"}
# name -> preset, changes, and how far scores may be off, relative to the largest: one of a hundred numbers of a row of
# triples may be rounded to the other side
SCORES = {
    "default": ("default", IN_FULL, 1e-5),
    "residual": ("residual", IN_FULL, 1e-5),
    "triples": ("similarity", {"bytes_per_row": 100, "storage": "float32"}, 3e-3),
}
SHORT = {"window": 64, "stride": 48}
# Five code paths of one processor gave the same levels everywhere, scales to 4e-7 and scores to 1.5e-7; a number that
# rounds otherwise lay within about 1e-5 of the middle between two levels, which one in 10,000 does.
ONE_LEVEL, SAME = 0.999, 0.99  # shares of numbers: at most one level beside, and equal
SCALES = 1e-5  # relative: what the numbers of a row are multiplied with


def integers(name, shape, top):
    """Whole numbers from -top to top, each as likely."""
    bits = random_bits(7, name, int(np.prod(shape))) >> np.uint64(40)
    return torch.from_numpy((bits % np.uint64(2 * top + 1)).astype(np.int64) - top).reshape(shape)


def frozen_model():
    """A llama of two layers: weights k / 64 with |k| <= 12, norms 1 + k / 16 with |k| <= 4."""
    lm = make_model("llama", vocabulary=98, dtype=torch.float32, hidden_size=16, intermediate_size=24, head_dim=4)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(integers(name, parameter.shape, 12) / 64)
            else:
                parameter.copy_(1 + integers(name, parameter.shape, 4) / 16)
    return lm


def frozen_tokenizer():
    """One token for each printable character of ASCII and for the newline."""
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = {token: n for n, token in enumerate([*SPECIAL, *letters, "Ġ", "Ċ"])}  # a space, a newline
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, bos_token="<s>", eos_token="</s>")


def levels(arrays):
    """The stored numbers [rows, width] as whole numbers, of four bits from 0 to 15, all others from -127 to 127."""
    if "long.codes" in arrays:
        bits = np.unpackbits(arrays["long.codes"].reshape(len(arrays["long.codes"]), 4, -1), axis=2)
        return (bits * np.array([8, 4, 2, 1])[:, None]).sum(1)
    stored = arrays["long.signature"]
    if stored.dtype == np.int8:
        return stored
    assert stored.dtype == np.float16
    return np.round(127 * stored.astype(np.float64)).astype(np.int8)


def stored(form, place):
    """Levels, scales of rows and short forms, as an index of this form holds them."""
    preset, changes = FORMS[form]
    built(frozen_model(), ROWS, place, preset, frozen_tokenizer(), **{**SHORT, **changes})
    (segment,) = Store.open(place).segments()
    arrays = segment.arrays()
    found = {"levels": levels(arrays).astype(np.int8), "scale": np.array(arrays["long.scale"])}
    if "short.codes" in arrays:
        found |= {"short": np.array(arrays["short.codes"]), "short_scale": np.array(arrays["short.scale"])}
    return found


def scores(form, place):
    """Scores [query, train] of the rows with themselves, and the lengths [rows, parts] that are stored beside them."""
    preset, changes, _ = SCORES[form]
    index = built(frozen_model(), ROWS, place, preset, frozen_tokenizer(), **SHORT, **changes)
    (segment,) = index.store.segments()
    return index.score(ROWS).astype(np.float64), segment.arrays()["norms"].astype(np.float64)


@pytest.mark.parametrize("form", FORMS)
def test_stored_numbers_are_frozen(form, tmp_path):
    """Most numbers equal, one in a thousand more than one level beside; each part of a row on its own scale."""
    with np.load(HERE / f"{form}.npz") as golden:
        wanted = dict(golden)
    found = stored(form, tmp_path / "index")
    assert found.keys() == wanted.keys() and found["levels"].shape == wanted["levels"].shape
    apart = np.abs(found["levels"].astype(int) - wanted["levels"])
    assert (apart <= 1).mean() >= ONE_LEVEL and (apart == 0).mean() >= SAME
    np.testing.assert_allclose(found["scale"], wanted["scale"], rtol=SCALES)
    if "short" in wanted:
        assert (np.unpackbits(found["short"]) == np.unpackbits(wanted["short"])).mean() >= SAME
        np.testing.assert_allclose(found["short_scale"], wanted["short_scale"], rtol=1e-3)


@pytest.mark.parametrize("form", SCORES)
def test_scores_are_frozen(form, tmp_path):
    wanted = json.loads((HERE / "frozen.json").read_text())["scores"][form]
    for found, frozen in zip(scores(form, tmp_path / "index"), (wanted["scores"], wanted["norms"]), strict=True):
        frozen = np.array(frozen)
        np.testing.assert_allclose(found, frozen, rtol=0, atol=SCORES[form][2] * np.abs(frozen).max())


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_of_presets_are_frozen(preset):
    """Fields that were there keep their values; the fingerprint changes with a new field, and is then written anew."""
    frozen = json.loads((HERE / "frozen.json").read_text())["presets"][preset]
    assert PRESETS[preset].to_dict() == frozen["settings"]
    assert PRESETS[preset].fingerprint() == frozen["fingerprint"]


def freeze(place):
    """Writes the golden files; `place` is a directory for the indexes."""
    for form in FORMS:
        np.savez_compressed(HERE / f"{form}.npz", **stored(form, place / form))
    presets = {
        name: {"fingerprint": settings.fingerprint(), "settings": settings.to_dict()}
        for name, settings in PRESETS.items()
    }
    frozen = {}
    for form in SCORES:
        found = [[[float(f"{x:.7g}") for x in row] for row in both] for both in scores(form, place / f"{form} scores")]
        frozen[form] = dict(zip(("scores", "norms"), found, strict=True))
    (HERE / "frozen.json").write_text(json.dumps({"scores": frozen, "presets": presets}, indent=1) + "\n")


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        freeze(Path(directory))
