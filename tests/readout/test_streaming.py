"""A model whose blocks stay in their files gives the numbers of the whole model, bit for bit, in little memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import leaveout.models.places as places
import leaveout.models.streaming as streaming
from leaveout.errors import FormatError, MismatchError, UnsupportedError
from leaveout.models import ModelOptions, load_model
from leaveout.models.streaming import Waiting
from leaveout.readout.build import BuildOptions, Pace, _worker_start
from leaveout.readout.index import Index
from leaveout.readout.model import load_readout
from leaveout.readout.rerank import whole_model
from leaveout.store import Store

from .tiny import FAMILIES, TEXTS, make_model

WHOLE, LAYERS = ModelOptions("float32"), ModelOptions("float32", offload="layers")
ROWS = [f"{TEXTS[n % 8]} {TEXTS[n * 3 % 8]} {n}" for n in range(30)]
SMALL = Pace(chunk_rows=4)


def saved(path, tokenizer, family="llama", shards=True, tied=False, **changes):
    """The directory of a tiny model in float32, in several files or one."""
    lm = make_model(family, dtype=torch.float32, tied=tied, **changes)
    lm.save_pretrained(path, max_shard_size="60KB" if shards else "1GB")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    return saved(tmp_path_factory.mktemp("llama"), tokenizer, num_hidden_layers=4)


def both(place, dtype="float32"):
    return (
        load_readout(str(place), options=ModelOptions(dtype)),
        load_readout(str(place), options=ModelOptions(dtype, offload="layers")),
    )


def inputs(vocabulary):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, shape, generator=generator) for shape in ((2, 200), (3, 17), (1, 1))]


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_identity_are_those_of_the_whole_model(tmp_path, tokenizer, family, tied):
    place = saved(tmp_path / "model", tokenizer, family, tied=tied)
    whole, streamed = both(place)
    assert streamed.stream is not None
    assert streamed.identity() == whole.identity()
    many = inputs(whole.vocabulary)
    for found, wanted, ids in zip(streamed.hidden_of(many), whole.hidden_of(many), many, strict=True):
        assert torch.equal(found, wanted)
        assert torch.equal(streamed.hidden(ids), wanted)  # called as any model


@pytest.mark.parametrize("dtype", ["bfloat16", "auto", "float64"])
def test_dtypes_are_those_of_the_whole_model(place, dtype):
    whole, streamed = both(place, dtype)
    assert streamed.identity() == whole.identity()
    many = inputs(whole.vocabulary)
    for found, wanted in zip(streamed.hidden_of(many), whole.hidden_of(many), strict=True):
        assert torch.equal(found, wanted)


def test_one_file_is_streamed_as_several(tmp_path, tokenizer, place):
    one = load_model(str(saved(tmp_path / "one", tokenizer, shards=False, num_hidden_layers=4)), options=LAYERS)
    several = load_model(str(place), options=LAYERS)
    assert len(one.stream.files.paths) == 1
    assert len(several.stream.files.paths) > 1
    assert one.identity() == several.identity()


def contents(path):
    """Bytes of all files of an index but for the catalogue's, and the rows and settings of that."""
    files = {
        file.name: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file() and "sqlite" not in file.name
    }
    with Index.open(path).store as store:
        arrays = [
            {key: np.asarray(value).tobytes() for key, value in part.arrays().items()} for part in store.segments()
        ]
        return (
            arrays,
            list(store.iter_rows()),
            store.settings,
            store.state("statistics"),
            store.state("recall"),
            sorted(files),
        )


def test_an_index_is_the_same_byte_for_byte(tmp_path, place, monkeypatch):
    Index.build(str(place), ROWS, tmp_path / "whole", dtype="float32", pace=SMALL)
    monkeypatch.setitem(streaming.WAVE, "cpu", 1300)  # three waves
    Index.build(str(place), ROWS, tmp_path / "streamed", dtype="float32", pace=SMALL, offload="layers")
    assert contents(tmp_path / "streamed") == contents(tmp_path / "whole")


def test_a_worker_streams_as_the_process_that_starts_it(tmp_path, place):
    index = Index.build(str(place), ROWS[:8], tmp_path / "idx", offload="layers", max_memory="20MB")
    signer = _worker_start(index.signer, index.store, BuildOptions(workers=2))()
    assert signer.readout.stream.wave_tokens == index.readout.stream.wave_tokens
    assert signer.whitening.keys() == index.signer.whitening.keys()


def test_an_index_opens_with_either(tmp_path, place):
    streamed = Index.build(str(place), ROWS, tmp_path / "idx", offload="layers")
    wanted = streamed.score(TEXTS[:2])
    for offload in ("none", "layers"):
        opened = Index.open(tmp_path / "idx", offload=offload)
        assert (opened.readout.stream is None) == (offload == "none")
        assert np.array_equal(opened.score(TEXTS[:2]), wanted)


def test_every_block_is_read_once_a_wave(place, monkeypatch):
    readout = load_readout(str(place), options=LAYERS)
    read = []
    load = readout.stream._load
    monkeypatch.setattr(readout.stream, "_load", lambda number: (read.append(number), load(number)))
    readout.hidden_of(inputs(readout.vocabulary))
    assert read == [0, 1, 2, 3]


def test_what_does_not_fit_waits_in_a_file(tmp_path, place, monkeypatch):
    files = []
    monkeypatch.setattr(streaming.Waiting, "put", counted(streaming.Waiting.put, files))
    Index.build(str(place), ROWS, tmp_path / "plain", "residual", offload="layers", pace=SMALL)
    assert not any(waiting.file for waiting in files)
    files.clear()
    monkeypatch.setattr(streaming.LayerStream, "waiting", lambda stream: Waiting(5000))
    Index.build(str(place), ROWS, tmp_path / "tight", "residual", offload="layers", pace=SMALL)
    assert any(waiting.file for waiting in files)
    assert contents(tmp_path / "tight") == contents(tmp_path / "plain")


def counted(put, seen):
    def counting(waiting, tensor):
        seen.append(waiting)
        return put(waiting, tensor)

    return counting


def test_waiting_tensors_come_back():
    waiting = Waiting(100)
    shelf = waiting.shelf()
    generator = torch.Generator().manual_seed(0)
    wanted = {n: torch.randn(n, 5, generator=generator).to(torch.bfloat16) for n in range(8)}
    shelf.update(wanted)
    assert waiting.file is not None
    assert all(torch.equal(shelf[n], tensor) for n, tensor in wanted.items())


KILLED = """
import os, signal, sys
import torch; torch.set_num_threads(1)
import leaveout.models.streaming as streaming
from leaveout.readout.index import Index
from leaveout.readout.build import Pace
from leaveout.store import Store
streaming.WAVE["cpu"] = 1300
kept, put, states = [], Store.put, streaming.LayerStream.states
def keeping(*args):
    kept.append(args)
    return put(*args)
def dying(self, many, *rest):
    if kept:
        os.kill(os.getpid(), signal.SIGKILL)
    return states(self, many, *rest)
Store.put = keeping
streaming.LayerStream.states = dying
Index.build(sys.argv[1], eval(sys.argv[2]), sys.argv[3], "residual", offload="layers", pace=Pace(4, commit_seconds=0.0))
"""


def test_a_killed_build_goes_on_at_a_wave(tmp_path, place):
    done = subprocess.run([sys.executable, "-c", KILLED, str(place), repr(ROWS), str(tmp_path / "idx")], check=False)
    assert done.returncode == -9
    with Store.open(tmp_path / "idx") as store:
        assert 0 < store.n_rows < len(ROWS)
    pace = Pace(4, commit_seconds=0.0)
    Index.build(str(place), ROWS, tmp_path / "idx", "residual", offload="layers", pace=pace)
    Index.build(str(place), ROWS, tmp_path / "whole", "residual", dtype="float32", pace=pace)
    assert contents(tmp_path / "idx") == contents(tmp_path / "whole")


# ---------------------------------------------------------------- when


def test_auto_streams_what_does_not_fit(place, monkeypatch):
    size = sum(file.stat().st_size for file in Path(place).glob("*.safetensors"))
    assert load_model(str(place), options=ModelOptions(offload="auto")).stream is None
    assert load_model(str(place), options=ModelOptions(offload="auto", max_memory=2 * size)).stream is None
    monkeypatch.setattr(streaming, "LEAST", 1)
    assert load_model(str(place), options=ModelOptions(offload="auto", max_memory=size - 20_000)).stream is not None


def test_a_wave_is_as_long_as_memory_allows(place, monkeypatch):
    monkeypatch.setattr(streaming, "LEAST", 16)
    stream = load_model(str(place), options=LAYERS).stream
    bytes_of = stream.fixed + 100 * stream.token_bytes
    tight = load_model(str(place), options=ModelOptions(offload="layers", max_memory=bytes_of + 10)).stream
    assert (tight.wave_tokens, tight.waiting_bytes) == (100, 10)
    assert [sum(wave) for wave in tight.waves([60, 30, 20, 80, 200, 1], lambda size: size)] == [90, 100, 200, 1]
    assert stream.wave_tokens == streaming.WAVE["cpu"]


# ---------------------------------------------------------------- what is refused


def test_too_little_memory_says_how_much_is_needed(place):
    with pytest.raises(
        ValueError, match=r"two of its blocks and 1024 tokens need \d\.\d\d MB: give --max-memory at least that"
    ):
        load_model(str(place), options=ModelOptions(offload="layers", max_memory=1000))


def test_a_place_without_safetensors_is_refused(tmp_path, place):
    shutil.copytree(place, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*"))
    with pytest.raises(UnsupportedError, match="it has no safetensors files"):
        load_model(str(tmp_path / "model"), options=LAYERS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": "disk"}, "offload is 'disk'"),
        ({"offload": "none", "max_memory": 10**9}, "max_memory bounds layers that are streamed"),
        ({"device_map": "auto", "device": "cuda"}, "device_map says where all of a model is"),
        ({"device_map": "auto", "offload": "layers"}, "device_map is for a model that is loaded whole"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ModelOptions(**options)


def test_a_model_in_memory_has_no_layers_in_files(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="The model is in memory already"):
        Index.build(make_model(), ROWS, tmp_path / "idx", tokenizer=tokenizer, offload="layers")


def test_an_amount_of_memory_is_read(tmp_path, place):
    with pytest.raises(ValueError, match="max_memory must be a number with a unit"):
        Index.build(str(place), ROWS, tmp_path / "idx", max_memory="much")


def damaged(place, path, change):
    """A copy of a model one of whose tensors is changed."""
    shutil.copytree(place, path)
    file = sorted(path.glob("*.safetensors"))[-1]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return path


def test_files_that_lack_weights_are_refused(tmp_path, tokenizer):
    place = saved(tmp_path / "model", tokenizer, shards=False)
    lacking = damaged(place, tmp_path / "lacking", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(FormatError, match=r"lacks the weights 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load_model(str(lacking), options=LAYERS)


def test_a_file_that_was_cut_is_refused(tmp_path, place):
    shutil.copytree(place, tmp_path / "model")
    file = sorted((tmp_path / "model").glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FormatError, match="is cut short"):
        load_model(str(tmp_path / "model"), options=LAYERS)
    file.write_bytes(b"nothing at all")
    with pytest.raises(FormatError, match="is no safetensors file"):
        load_model(str(tmp_path / "model"), options=LAYERS)
    file.unlink()
    with pytest.raises(FormatError, match="is not there"):
        load_model(str(tmp_path / "model"), options=LAYERS)


def test_files_that_change_meanwhile_are_noticed(tmp_path, place):
    shutil.copytree(place, tmp_path / "model")
    model = load_model(str(tmp_path / "model"), options=LAYERS)
    model.identity()
    model.refuse_changes()
    file = sorted((tmp_path / "model").glob("*.safetensors"))[-1]
    tensors = load_file(file)
    name = next(name for name in tensors if "layers" in name)
    tensors[name] = tensors[name] + 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(MismatchError, match="other weights than when it was opened"):
        model.refuse_changes()


def test_work_between_blocks_is_refused(place, monkeypatch):
    from transformers import LlamaModel

    def forward(self, input_ids, **kwargs):
        states = self.embed_tokens(input_ids)
        places = torch.arange(states.shape[1])[None]
        for layer in self.layers:
            states = 2 * layer(states, position_embeddings=self.rotary_emb(states, places))
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=self.norm(states))

    monkeypatch.setattr(LlamaModel, "forward", forward)
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM does more between its blocks"):
        load_readout(str(place), options=LAYERS)


def test_blocks_that_share_what_they_compute_are_refused(place, monkeypatch):
    """Each block adds what the one before it left behind: one by one, that is another batch's."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    own, left = LlamaDecoderLayer.forward, []

    def forward(self, hidden_states, *args, **kwargs):
        if self.self_attn.layer_idx == 0:
            left.clear()
        left.append(own(self, hidden_states, *args, **kwargs))
        return left[-1] + sum(states.mean() for states in left)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    with pytest.raises(UnsupportedError, match="give other states one by one than in the whole model"):
        load_readout(str(place), options=LAYERS)


def test_a_quantised_model_is_refused(tmp_path, place):
    shutil.copytree(place, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}})
    )
    with pytest.raises(UnsupportedError, match="it is quantised"):
        load_model(str(tmp_path / "model"), options=LAYERS)


def test_going_backwards_through_streamed_layers_is_refused(place):
    with pytest.raises(UnsupportedError, match="its layers are streamed here: give offload none"):
        whole_model(load_readout(str(place), options=LAYERS))


def test_workers_share_what_was_free(tmp_path, place, monkeypatch):
    monkeypatch.setattr(places, "free_memory", lambda device: 10**9)
    index = Index.build(str(place), ROWS[:4], tmp_path / "idx", offload="layers")
    signer = _worker_start(index.signer, index.store, BuildOptions(workers=4))()
    assert signer.readout.stream.limit == index.readout.stream.limit // 4 == 10**9 * 4 // 5 // 4
