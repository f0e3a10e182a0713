"""Models on another device than the CPU, or on several: the same numbers, and what lies elsewhere is known."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from fake_device import DEVICE, counting
from leaveout.errors import UnsupportedError
from leaveout.models import ModelOptions, load_model
from leaveout.readout.model import load_readout
from leaveout.readout.settings import resolve_settings
from leaveout.readout.signature import Signer
from leaveout.readout.whitening import whitening_matrices

from .conftest import assert_close
from .test_streaming import inputs, saved
from .tiny import make_model, make_readout

CPU = torch.device("cpu")
PLACES = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    return str(saved(tmp_path_factory.mktemp("llama"), tokenizer))


class Moves(AlignDevicesHook):
    """As accelerate dispatches: inputs go to where a module is. It is there already."""

    def init_hook(self, module):
        return module


def dispatched(lm, first):
    """A model whose embedding and first block are on a device, and the others on the CPU."""
    for name in PLACES:
        device = first if name in ("model.embed_tokens", "model.layers.0", "model.rotary_emb") else CPU
        add_hook_to_module(lm.get_submodule(name).to(device), Moves(execution_device=device))
    return add_hook_to_module(lm, Moves(execution_device=first, io_same_device=True))


def signatures(readout, rows):
    settings = resolve_settings("residual")
    signer = Signer(readout, settings)
    windows = [window for row in rows(settings) for window in row.windows]
    signer.whitening = whitening_matrices(signer, windows)
    return signer.rows(windows, len(rows(settings)))


def test_a_model_on_two_devices_gives_the_same_signatures(tokenizer, tokenised):
    whole = make_readout("llama", tokenizer, dtype=torch.float32)
    wanted = signatures(whole, tokenised)
    with counting():
        readout = load_readout(dispatched(make_model("llama", dtype=torch.float32), DEVICE), tokenizer)
        assert readout.identity() == whole.identity()
        assert readout.device == readout.hidden(torch.ones(1, 5, dtype=torch.int64)).device == CPU
        assert_close(signatures(readout, tokenised), wanted, "model float32")
        readout.refuse_changes()


def test_layers_are_streamed_to_a_device(place):
    whole = load_readout(place)
    many = inputs(whole.vocabulary)
    with counting() as counts:
        readout = load_readout(place, options=ModelOptions(device=str(DEVICE), offload="layers"))
        assert readout.device == DEVICE
        assert readout.identity()["weights"] == whole.identity()["weights"]
        found = [states.cpu() for states in readout.hidden_of(many)]
    assert counts.launches > 0
    for one, wanted in zip(found, whole.hidden_of(many), strict=True):
        assert torch.equal(one, wanted)


def test_weights_that_accelerate_keeps_in_files_are_known(place):
    elsewhere = {**dict.fromkeys(PLACES, "cpu"), "model.layers.1": "disk"}
    model = load_readout(place, options=ModelOptions(device_map=elsewhere))
    assert any(parameter.is_meta for parameter in model.lm.parameters())
    assert model.identity() == load_readout(place).identity()
    model.refuse_changes()


def test_a_head_that_lies_elsewhere_is_refused(place):
    elsewhere = {**dict.fromkeys(PLACES, "cpu"), "lm_head": "disk"}
    with pytest.raises(UnsupportedError, match="accelerate keeps the output head of LlamaForCausalLM elsewhere"):
        load_readout(place, options=ModelOptions(device_map=elsewhere))


def test_auto_is_a_map(place):
    assert load_model(place, options=ModelOptions("auto", device_map="auto")).identity() == load_model(place).identity()
