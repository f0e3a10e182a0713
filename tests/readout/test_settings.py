"""Settings: what is refused, what is written down, and what older indexes wrote."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from leaveout.errors import MismatchError
from leaveout.readout.index import Index
from leaveout.readout.opened import read_codecs
from leaveout.readout.settings import PRESETS, Channel, SignatureSettings, resolve_settings
from leaveout.readout.signature import Signer

from .conftest import RAW
from .tiny import make_model, make_readout


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"kind": "hh"}, "kind is 'hh': give one of rh, gh, residual"),
        ({"projection": "dense"}, "projection is 'dense': give one of countsketch, orthogonal"),
        ({"left_width": 0}, "left_width is 0: give a positive number, or None for no projection"),
        ({"damping": 0.0}, "damping is 0.0: give a positive share of the mean eigenvalue"),
        ({"left_damping": -1.0}, "left_damping is -1.0: give a positive share of the mean eigenvalue"),
        ({"left_damping": float("nan")}, "left_damping is nan: give a positive share of the mean eigenvalue"),
        ({"layers": (0,)}, "layers belongs to the residual channel, not to gh: leave it out"),
        ({"kind": "rh", "depths": (0.0,)}, "depths belongs to the residual channel, not to rh: leave it out"),
        ({"outputs": ("mlp",)}, "outputs belongs to the residual channel, not to gh: leave it out"),
        ({"kind": "residual", "outputs": ("mlp", "norm")}, "outputs is 'norm': give one of attention, mlp"),
        ({"kind": "residual", "outputs": ()}, "outputs is empty: give at least one, or leave it out for all"),
        ({"kind": "residual", "layers": ()}, "layers is empty: give at least one, or leave it out for all"),
        ({"kind": "residual", "depths": ()}, "depths is empty: give at least one, or leave it out for all"),
        ({"kind": "residual", "layers": (0,), "depths": (0.0,)}, "layers and depths both say which blocks are taken"),
        ({"kind": "residual", "depths": (0.5, 1.1)}, r"depths is \(0.5, 1.1\): give numbers from 0, the first block"),
        ({"kind": "residual", "depths": (-0.1,)}, r"depths is \(-0.1,\): give numbers from 0, the first block, to 1"),
        ({"kind": "residual", "depths": (float("nan"),)}, r"depths is \(nan,\): give numbers from 0, the first block"),
    ],
)
def test_wrong_channels_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        Channel(**fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"channels": ()}, "channels is empty: give at least one Channel"),
        ({"length_power": -0.5}, r"length_power is -0.5: give 0 \(sum\) to 1 \(mean\)"),
        ({"length_power": 1.5}, r"length_power is 1.5: give 0 \(sum\) to 1 \(mean\)"),
        ({"length_power": 0.5, "unit_length": True}, "Rows of unit length have no other length: give length_power=0"),
        ({"temperature": 0.0}, "temperature is 0.0: give a positive number"),
        ({"mass": 0.5}, "mass below 1 needs a support"),
        ({"window": 8, "stride": 8}, "window is 8, stride 8: give 1 <= stride < window"),
        ({"storage": "int3"}, "storage is 'int3': give one of float32, float16, int8"),
        ({"storage": "int4"}, "storage is 'int4'.* give one of float32, float16, int8"),
        ({"bytes_per_row": 0}, "bytes_per_row is 0: give a whole number of at least 1"),
        ({"bytes_per_row": 2.5}, "bytes_per_row is 2.5: give a whole number of at least 1"),
        ({"short_bytes": 0}, "short_bytes is 0: give a whole number of at least 1"),
        ({"long": "yes"}, "long is 'yes': give one of stored, none"),
        ({"long": "none", "short_bytes": None}, "A row needs a stored form: give short_bytes, or long='stored'"),
        ({"channels": ("gh",)}, r"channels holds something else than channels: give Channel\(\.\.\.\)"),
    ],
)
def test_wrong_settings_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        SignatureSettings(**{"channels": (Channel(),), **fields})


def test_a_field_of_a_channel_is_named_as_such():
    with pytest.raises(ValueError, match=r"depths belongs to a channel.* give channels=\(Channel\(\.\.\., depths="):
        resolve_settings("default", depths=(0.0, 1.0))


MANY = SignatureSettings(
    (
        Channel("rh", 2.0, 8, 9, "orthogonal"),
        Channel("residual", left_damping=0.5, depths=(1.0, 0.0), outputs=("mlp",)),
    ),
    support=64,
    length_power=0.25,
)


@pytest.mark.parametrize("settings", [*PRESETS.values(), MANY], ids=[*PRESETS, "many"])
def test_settings_come_back_from_what_is_written(settings):
    again = SignatureSettings.from_dict(settings.to_dict())
    assert again == settings and again.fingerprint() == settings.fingerprint()


@pytest.mark.parametrize(
    "change",
    [{"left_damping": 0.7}, {"depths": (0.0,)}, {"layers": (0,)}, {"outputs": ("mlp",)}, {"length_power": 0.5}],
)
def test_fingerprint_tells_settings_apart(change):
    plain, channel = SignatureSettings((Channel("residual"),)), Channel("residual")
    here = {name: value for name, value in change.items() if name == "length_power"}
    there = {name: value for name, value in change.items() if name != "length_power"}
    assert replace(plain, channels=(replace(channel, **there),), **here).fingerprint() != plain.fingerprint()


# What an index said of itself before there were left_damping, depths, outputs and length_power.
FIRST = {
    "temperature": 1.0,
    "support": None,
    "mass": 1.0,
    "minimum": 1,
    "unit_positions": False,
    "unit_length": False,
    "targets": "response",
    "window": 1024,
    "stride": 768,
    "storage": "int8",
    "bytes_per_row": 16384,
    "sample_rows": 256,
    "seed": 0,
}
FIRST_CHANNEL = {
    "weight": 1.0,
    "left_width": None,
    "right_width": None,
    "projection": "countsketch",
    "whiten_left": True,
    "whiten_right": True,
    "damping": 0.1,
    "layers": None,
}
FIRST_DEFAULT = {"channels": [{"kind": "gh", **FIRST_CHANNEL}], **FIRST}
FIRST_RESIDUAL = {"channels": [{"kind": "residual", **FIRST_CHANNEL}], **FIRST, "bytes_per_row": 32768}


def test_settings_of_older_indexes_mean_what_they_meant(tokenizer):
    """One damping on both sides, every output projection of every block, plain sums."""
    readout = make_readout("llama", tokenizer)
    default, residual = (SignatureSettings.from_dict(values) for values in (FIRST_DEFAULT, FIRST_RESIDUAL))
    both = {"whiten_left": True, "whiten_right": True, "damping": 0.1}
    assert default == SignatureSettings((Channel("gh", **both),), length_power=0.0)
    signers = [Signer(readout, settings) for settings in (default, residual)]
    sides = [[(part.left.whiten, part.right.whiten) for part in signer.parts] for signer in signers]
    places = ("0.attention", "0.mlp", "1.attention", "1.mlp")
    assert sides[0] == [("gh0.damping-0.1", "h.damping-0.1")]
    assert sides[1] == [("g.final.damping-0.1", f"a.{place}.damping-0.1") for place in places]
    with pytest.raises(ValueError, match="Unknown signature setting 'norm': this index needs a newer leaveout"):
        SignatureSettings.from_dict({**FIRST_DEFAULT, "norm": 1})


@pytest.mark.parametrize("written", [FIRST_DEFAULT, FIRST_RESIDUAL])
def test_older_indexes_open_and_answer(written, tokenizer, tmp_path, monkeypatch):
    lm = make_model("llama", spread=0.1, dtype=torch.float32)
    with monkeypatch.context() as patched:
        patched.setattr(SignatureSettings, "to_dict", lambda _: written)
        Index.build(lm, RAW, tmp_path / "old", SignatureSettings.from_dict(written), tokenizer)
    old = Index.open(tmp_path / "old", lm, tokenizer)
    assert old.info()["signature"] == written
    new = Index.build(lm, RAW, tmp_path / "new", SignatureSettings.from_dict(written), tokenizer)
    assert np.array_equal(old.score(RAW), new.score(RAW))
    assert old.settings == replace(new.settings, template=None)  # which stands for the tokenizer's own
    assert old.append(["a text that came later"]).added == 1 and len(old.search(["a text"], 3)[0]) == 3


def test_presets_are_named_and_changed_by_field():
    with pytest.raises(ValueError, match="There is no preset 'best': give one of default, residual, similarity, paper"):
        resolve_settings("best")
    with pytest.raises(
        ValueError,
        match=r"no signature setting 'temprature': did you mean 'temperature'\? give one of bytes_per_row, channels",
    ):
        resolve_settings("paper", temprature=1)


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        (None, "does not say how its rows are stored: build it anew"),
        ({"name": "flat-int4", "width": 24}, "does not say how its rows are stored: build it anew"),
        ({"long": {"name": "flat-int1"}, "short": None}, "stored as 'flat-int1': it needs another leaveout"),
    ],
)
def test_stored_form_that_is_not_known_is_refused(facts, told):
    with pytest.raises(MismatchError, match=told):
        read_codecs(facts)
