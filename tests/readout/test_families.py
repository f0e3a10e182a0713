"""Model families: trunk and head taken apart, identities, and models that are refused."""

import copy
import re
import socket
from dataclasses import replace
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn

from leaveout.errors import FormatError, MismatchError, UnsupportedError
from leaveout.models.places import hub_answers
from leaveout.readout.build import Pace
from leaveout.readout.doctor import _digits, _stored_bytes, doctor
from leaveout.readout.families import Scaling, find_taps, pull_back
from leaveout.readout.index import Index
from leaveout.readout.model import Readout, load_readout
from leaveout.readout.settings import Channel, SignatureSettings, resolve_settings
from leaveout.readout.signature import Signer
from leaveout.readout.tokens import Window

from .conftest import RAW, assert_close
from .tiny import FAMILIES, TAPS, UNKNOWN, built, make_model, make_readout, make_tokenizer

PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # with transformers 5
IDS = [0, 40, 300, 41, 41, 500, 77, 123, 9, 511, 260, 18]


def gradient_at_hidden(lm, ids, places):
    """Autograd: gradient of the summed loss of the target tokens at the trunk's last hidden state."""
    kept = {}

    def cut(module, args, output):
        kept["leaf"] = output.last_hidden_state = output.last_hidden_state.detach().requires_grad_()
        return output

    handle = lm.base_model.register_forward_hook(cut)
    logits = lm(input_ids=torch.tensor([ids])).logits[0]
    handle.remove()
    F.cross_entropy(logits[[place - 1 for place in places]], torch.tensor(ids)[places], reduction="sum").backward()
    return kept["leaf"].grad[0, [place - 1 for place in places]]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_equals_autograd_through_the_models_own_head(family, tied, tokenizer):
    """Covers head bias, logit scale and soft-capping; tied heads; and batches with padding."""
    readout = make_readout(family, tokenizer, tied=tied, spread=0.15)
    shared = readout.lm.get_input_embeddings().weight.data_ptr() == readout.weight.data_ptr()
    assert shared == tied
    assert (readout.head.bias is not None) == (family == "phi")
    wanted = gradient_at_hidden(readout.lm, IDS, list(range(3, 12)))
    signer = Signer(readout, SignatureSettings((Channel("gh"),)))
    windows = [Window(0, 0, IDS[:9], list(range(8))), Window(1, 0, IDS, list(range(2, 11)))]
    positions = signer.positions(windows)
    assert_close(positions.raw["gh0"][positions.spans[1]], wanted, "float32")  # their norms round to float32
    assert positions.target[positions.spans[1]].tolist() == IDS[3:]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_indexed_by_both_main_presets(family, tokenizer, tmp_path):
    lm = make_model(family, spread=0.1, dtype=torch.float32)
    for preset in ("default", "paper"):
        index = Index.build(lm, RAW[:5], tmp_path / preset, preset, tokenizer, pace=Pace(chunk_rows=3))
        scores = index.score(RAW[:5])
        assert len(index) == 5 and np.isfinite(scores).all()
        assert (scores.argmax(1) == np.arange(5)).all() or preset == "default"  # cosines: each row is its own best
        assert (np.diag(scores) > 0).all()


@pytest.mark.parametrize("family", TAPS)
def test_residual_taps_are_all_that_writes_to_the_stream(family, tokenizer):
    """With the output of every tap set to zero, the final norm gets what the first block got."""
    readout = make_readout(family, tokenizer, spread=0.15)
    taps, final_norm = find_taps(readout, Channel("residual"))
    assert [tap.name for tap in taps] == ["0.attention", "0.mlp", "1.attention", "1.mlp"]
    ids, seen = torch.tensor([IDS]), []
    blocks = readout.trunk.h if family == "gpt2" else readout.trunk.layers
    blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    final_norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    readout.hidden(ids)
    for tap in taps:
        tap.projection.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        readout.hidden(ids)
        assert tap.projection(torch.zeros(1, tap.inputs, dtype=torch.float64)).shape == (1, 32)
        assert (seen[-1] - seen[-3]).abs().max() > 1e-3  # this one wrote something
    assert_close(seen[-1], seen[0], "float32")


OUTPUTS = {
    "llama": ("num_hidden_layers", "model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
    "gpt2": ("n_layer", "transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"),
}


@pytest.mark.parametrize(
    ("n_blocks", "where", "blocks"),
    [
        (5, {}, [0, 1, 2, 3, 4]),
        (5, {"layers": (3, 1, 3)}, [3, 1]),
        (5, {"depths": (0.0, 0.5, 1.0)}, [0, 2, 4]),
        (5, {"depths": (0.9, 0.3)}, [4, 1]),
        (3, {"depths": (0.0, 0.5, 1.0)}, [0, 1, 2]),
        (2, {"depths": (0.0, 0.5, 1.0)}, [0, 1]),
        (1, {"depths": (0.0, 0.5, 1.0)}, [0]),
    ],
)
@pytest.mark.parametrize("outputs", [("attention", "mlp"), ("mlp",), ("attention",)])
@pytest.mark.parametrize("family", OUTPUTS)
def test_a_channel_says_which_output_projections_it_takes(family, outputs, n_blocks, where, blocks, tokenizer):
    """Each once, however many depths round to one block."""
    count, *paths = OUTPUTS[family]
    readout = make_readout(family, tokenizer, **{count: n_blocks})
    channel = Channel("residual", 0.5, outputs=outputs, **where)
    names = [f"{block}.{output}" for block in blocks for output in outputs]
    path = dict(zip(("attention", "mlp"), paths, strict=True))
    wanted = [readout.lm.get_submodule(path[output].format(block)) for block in blocks for output in outputs]
    taps, _ = find_taps(readout, channel)
    assert [tap.name for tap in taps] == names
    assert all(tap.projection is module for tap, module in zip(taps, wanted, strict=True))
    signer = Signer(readout, SignatureSettings((Channel("gh"), channel)))
    assert [part.name for part in signer.parts] == ["gh0", *(f"residual1/{name}" for name in names)]
    assert signer.codec.width == 32 * 32 + sum(32 * tap.inputs for tap in taps)


def test_layers_that_a_model_lacks_are_refused(tokenizer):
    for layer in (2, -1):
        with pytest.raises(ValueError, match=f"The model has layers 0 to 1: layer {layer} is not one of them"):
            find_taps(make_readout("llama", tokenizer), Channel("residual", layers=(0, layer)))


NOT_KNOWN = "The layers of a {} model are not known, so the residual channel {}."


@pytest.mark.parametrize("family", UNKNOWN)
def test_unknown_family_falls_back_and_says_so(family, tokenizer, tmp_path):
    """One kind of channel falls back, whatever it was to be taken from; its whitening stays."""
    lm = make_model(family, spread=0.1, dtype=torch.float32)
    channel = Channel("residual", whiten_left=True, left_damping=0.7, depths=(0.0,), outputs=("mlp",))
    for preset, instead, width in (("residual", "gh", 1024), (SignatureSettings((channel,)), "rh and gh", 256)):
        index = Index.build(lm, RAW[:5], tmp_path / instead, preset, tokenizer)
        assert index.info()["notes"] == [NOT_KNOWN.format(family, f"falls back to {instead}")]
        lefts = [min(width, index.signer.readout.vocabulary), 32]
        assert [(part.left.size, part.right.size) for part in index.signer.parts] == [(left, 32) for left in lefts]
        assert np.isfinite(index.score(RAW[:2])).all()
    assert [part.left.whiten for part in index.signer.parts] == ["rh1000.damping-0.7", "gh1001.damping-0.7"]
    twice = Signer(index.signer.readout, SignatureSettings((channel, channel)))
    assert len(twice.parts) == 2 and [note.rsplit(" channel ", 1)[1] for note in twice.notes] == [
        "falls back to rh and gh.",
        "is left out.",
    ]


@pytest.mark.parametrize("family", UNKNOWN)
def test_unknown_family_replaces_a_residual_channel_by_what_is_not_there_yet(family, tokenizer, tmp_path):
    lm = make_model(family, spread=0.1, dtype=torch.float32)
    rh, blocks = resolve_settings("default").channels
    gh = replace(blocks, kind="gh", depths=None, outputs=Channel.outputs)  # with the damping of what it replaces
    for number, (there, added, says) in enumerate(
        (((rh,), (gh,), "falls back to gh"), ((rh, gh), (), "is left out"), ((gh,), None, "falls back to rh"))
    ):
        index = built(lm, RAW, tmp_path / f"index {number}", "default", tokenizer, channels=(*there, blocks))
        assert index.info()["notes"] == [NOT_KNOWN.format(family, says)]
        if added is None:
            assert [(part.left.size, part.right.size) for part in index.signer.parts] == [(32, 32), (256, 32)]
            continue
        plain = built(lm, RAW, tmp_path / f"plain {number}", "default", tokenizer, channels=(*there, *added))
        assert plain.info()["notes"] == [] and len(index.signer.parts) == len(there) + len(added)
        assert_close(index.score(RAW), plain.score(RAW), "one level")


# Refusals.


class NoHead(nn.Module):
    """Neither trunk nor head."""


@pytest.mark.parametrize(
    "change", [lambda z: z + 1e-3 * torch.randn_like(z), lambda z: 1.01 * z, lambda z: z.roll(1, -1)]
)
def test_logits_that_are_no_head_of_the_hidden_states_are_refused(change, tokenizer, monkeypatch):
    lm = make_model()
    plain = lm.forward

    def forward(**inputs):
        output = plain(**inputs)
        output.logits = change(output.logits)
        return output

    monkeypatch.setattr(lm, "forward", forward)
    sentence = (
        "The head of LlamaForCausalLM does not reproduce the model's logits from its last hidden states .largest "
        "difference .* of the largest logit.*: use a model whose logits are a linear head of the last hidden state"
    )
    with pytest.raises(UnsupportedError, match=sentence):
        load_readout(lm, tokenizer)


def test_models_without_a_head_are_refused(tokenizer):
    for lm in (make_model().model, NoHead()):
        with pytest.raises(UnsupportedError, match=f"{type(lm).__name__} has no linear output head on a trunk: give a"):
            load_readout(lm, tokenizer)


def test_model_in_memory_needs_a_tokenizer():
    with pytest.raises(ValueError, match="A model in memory needs its tokenizer: pass tokenizer="):
        load_readout(make_model())


@pytest.mark.parametrize(
    ("vocabulary", "sentence"),
    [
        (300, "The tokenizer has 512 tokens, the model embeds 300: use the tokenizer that the model came with"),
        (1100, "The tokenizer has only 512 tokens for the model's 1100: use the tokenizer that the model came with"),
    ],
)
def test_tokenizer_of_another_model_is_refused(vocabulary, sentence, tokenizer):
    with pytest.raises(MismatchError, match=sentence):
        load_readout(make_model(vocabulary=vocabulary), tokenizer)


@pytest.mark.parametrize("place", ["model.norm", "lm_head", "model.layers.0.mlp.up_proj"])
def test_weights_that_are_not_numbers_are_refused(place, tokenizer):
    lm = make_model()
    with torch.no_grad():
        lm.get_submodule(place).weight.fill_(float("nan"))
    with pytest.raises(UnsupportedError, match="The logits of LlamaForCausalLM are not finite: get its weights again"):
        load_readout(lm, tokenizer)


def test_paths_that_hold_no_model_are_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="does not load as a causal language model with its"):
        load_readout(str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"There is no GGUF file at .*absent.gguf: give the path of an existing"
    ):
        load_readout(str(tmp_path / "absent.gguf"))
    with pytest.raises(ValueError, match="dtype 'float8' is not one of float32, bfloat16, float16, float64"):
        Index.build(str(tmp_path), RAW, tmp_path / "index", dtype="float8")


def test_without_a_connection_the_hub_is_not_asked(monkeypatch, tmp_path):
    """transformers would ask again and again, for the better part of a minute."""
    asked = []

    def unknown(host, *rest, **named):
        asked.append(host)
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr("leaveout.models.places.getproxies", dict)
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    with pytest.raises(UnsupportedError, match=r"someone/mistyped does not load: there is no such directory"):
        load_readout("someone/mistyped")
    assert asked == [urlsplit(constants.ENDPOINT).hostname]
    make_model(dtype=torch.float32).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(tmp_path))
    assert load_readout("someone/known").family == load_readout(tmp_path).family


def test_the_hub_is_asked_where_it_may_answer(monkeypatch):
    monkeypatch.setattr("leaveout.models.places.getproxies", dict)
    monkeypatch.setattr("leaveout.models.places.socket.getaddrinfo", lambda host, port: ["an address"])
    assert hub_answers()
    monkeypatch.setattr("leaveout.models.places.socket.getaddrinfo", None)
    monkeypatch.setattr("leaveout.models.places.getproxies", lambda: {"https": "proxy:1"})
    assert hub_answers()  # the proxy looks the address up
    monkeypatch.setattr("transformers.utils.peft_utils.find_adapter_config_file", lambda name, **options: None)
    seen = []

    def from_pretrained(name, **options):
        seen.append(options)
        raise OSError("not on the hub\nand much advice")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", from_pretrained)
    with pytest.raises(UnsupportedError, match=r"its tokenizer: not on the hub$"):
        load_readout("someone/mistyped")
    assert "local_files_only" not in seen[0]


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_that_lacks_weights_is_refused(tied, tokenizer, tmp_path):
    """transformers would fill them with random numbers; a head that is the embedding is not among them."""
    make_model(tied=tied, dtype=torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    load_readout(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in weights) != tied
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"lacks the weights .*norm.weight.*: give a whole model"):
        load_readout(tmp_path)


# Identity.


def changed(lm, name):
    lm = copy.deepcopy(lm)
    with torch.no_grad():
        low_rank = torch.randn(32, 1, dtype=torch.float64) @ torch.randn(1, 32, dtype=torch.float64)
        lm.get_parameter(name).view(-1)[:1024] += 1e-3 * low_rank.flatten()[: lm.get_parameter(name).numel()]
    return lm


def test_identity_tells_models_and_tokenizers_apart(tokenizer):
    lm = make_model()
    names = (
        "model.layers.1.self_attn.q_proj.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    )
    own = load_readout(lm, tokenizer).identity()
    assert load_readout(copy.deepcopy(lm), make_tokenizer()).identity() == own
    others = [load_readout(changed(lm, name), tokenizer).identity() for name in names]
    assert len({identity["weights"] for identity in [own, *others]}) == 5
    assert all({**identity, "weights": 0} == {**own, "weights": 0} for identity in others)
    spoken = make_tokenizer()
    spoken.chat_template = "{{ messages[0]['content'] }}"
    for other in (make_tokenizer(bos=False), make_tokenizer(extra="zzzyzx zzzyzx"), spoken):
        identity = load_readout(lm, other).identity()
        assert identity["tokenizer"] != own["tokenizer"] and identity["weights"] == own["weights"]


@PEFT_WARNS
def test_adapters_count_as_weights_and_are_seen_by_the_signature(tokenizer):
    peft = pytest.importorskip("peft")
    lm = make_model(dtype=torch.float32)
    plain = load_readout(copy.deepcopy(lm), tokenizer)
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = load_readout(peft.get_peft_model(lm, config), tokenizer)
    assert adapted.identity()["weights"] != plain.identity()["weights"]
    window = [Window(0, 0, IDS, list(range(11)))]
    for channel, parts in ((Channel("gh"), 1), (Channel("residual"), 4)):
        signers = [Signer(readout, SignatureSettings((channel,))) for readout in (plain, adapted)]
        one, other = (signer.rows(window, 1) for signer in signers)
        assert len(signers[1].parts) == parts
        assert one.shape == other.shape and not torch.allclose(one, other, rtol=1e-3)


@PEFT_WARNS
def test_prompt_tuning_is_refused(tokenizer):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UnsupportedError, match="Prompt and prefix tuning put tokens before the text: give the model"):
        load_readout(peft.get_peft_model(make_model(), config), tokenizer)


def test_queries_need_the_model_of_the_index(tokenizer, tmp_path):
    lm = make_model()
    Index.build(lm, RAW[:3], tmp_path / "index", "paper", tokenizer)
    assert len(Index.open(tmp_path / "index", copy.deepcopy(lm), tokenizer).search(["a tale"], k=2)[0]) == 2
    for other, other_tokenizer, what in (
        (changed(lm, "model.layers.1.self_attn.q_proj.weight"), tokenizer, "weights"),
        (lm, make_tokenizer(bos=False), "tokenizer"),
    ):
        with pytest.raises(
            MismatchError, match=f"The given model .*{what}.* the one that .* was built with .a llama in float64"
        ):
            Index.open(tmp_path / "index", other, other_tokenizer)
    with pytest.raises(MismatchError, match="built with a model in memory: give it with Index"):
        Index.open(tmp_path / "index").search(["a tale"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_models_load_from_a_path_and_agree(dtype, tokenizer, tmp_path):
    lm = make_model("qwen2", spread=0.1, dtype=torch.float32)
    lm.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    scores = {}
    for name in ("float32", dtype):
        index = Index.build(tmp_path / "model", RAW, tmp_path / name, "similarity", dtype=name)
        again = Index.open(tmp_path / name)
        scores[name] = again.score(RAW)
        assert [hit.id for hit in again.search([RAW[0]], k=1)[0]] == [index.ids[0]]
        assert again.identity["dtype"] == name
    assert np.abs(scores["float32"] - scores[dtype]).max() < 0.05  # 8 bits per number, 2 layers
    with pytest.raises(MismatchError, match=f"{tmp_path.name}.* holds an index with weights = "):
        Index.build(tmp_path / "model", RAW, tmp_path / dtype, "similarity")


class Wide(nn.Module):
    """A head for so many tokens that vocabulary^2 numbers have no room anywhere."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 400_000, bias=False)

    def get_output_embeddings(self):
        return self.head


def test_vocabularies_are_never_squared():
    readout = Readout(Wide(), None, None)
    assert Signer(readout, SignatureSettings((Channel("rh", left_width=8),))).codec.width == 64
    with pytest.raises(
        UnsupportedError, match=r"An unprojected rh channel would hold 400000 x 8 .* set its left_width"
    ):
        Signer(readout, SignatureSettings((Channel("rh"),)))


def test_speeds_are_written_without_exponents():
    told = {99.4: "99", 99.51: "100", 99.99: "100", 1234.5: "1,234", 0.5: "0.5", 9.96: "10"}
    assert {x: _digits(x) for x in told} == told


def test_doctor_gives_a_table(tokenizer):
    found = doctor(make_model("llama", spread=0.1, dtype=torch.float32), tokenizer)
    results = {check.name: check.passed for check in found.checks}
    assert results["padding invariance"] and results["loss"] is False and not found.passed  # it is not trained
    details = {check.name: check.detail for check in found.checks}
    assert details["layers"] == "4 output projections that the residual channel can take"
    rates = re.fullmatch(
        r"([\d,]+) tokens a second through the model; `default` indexes ([\d.,]+) rows of (\d+) tokens \((\d+) learned\) a "
        r"second, (\d+)% of that; a million rows take ([\d.,]+) hours",
        details["speed"],
    )
    assert rates, details["speed"]
    tokens, rows, length, learned, share, hours = (float(x.replace(",", "")) for x in rates.groups())
    assert learned == length * 2 // 3 and abs(share - 100 * rows * length / tokens) < 2 + 0.07 * share
    assert abs(hours - 1e6 / rows / 3600) < 0.1 * hours
    assert "padding invariance" in str(found) and "FAIL" in str(found)
    assert "<td>FAIL</td>" in found._repr_html_()


def test_doctor_says_what_a_row_holds(tokenizer):
    def told(**changes):
        readout = make_readout("llama", tokenizer, dtype=torch.float32, num_hidden_layers=1, **changes)
        return _stored_bytes(readout).detail, readout

    takes = r"a row takes ([\d,]+) bytes by default, a million [\d.,]+ GB"
    assert re.fullmatch(f"{takes}, and is held whole", told()[0])
    holds = rf"{takes}: room for (\d+) to (\d+) singular triples at 1 bit"
    assert re.fullmatch(holds, told(hidden_size=256, intermediate_size=512)[0])
    said, readout = told(hidden_size=1024, intermediate_size=4096)
    found = re.fullmatch(rf"{holds} of which sides are cut; bytes_per_row=(\d+) has room for 32 of every part", said)
    assert found and found[1] == "16,384", said
    low, high, enough = map(int, found.groups()[1:])
    codes = 32 * (66 + 128 + 128 + 512)  # one bit of every number of 32 triples of the head and of one block
    assert 28 < low < high and codes < enough - 2048 < 1.05 * codes
    long = Signer(readout, replace(resolve_settings("default"), bytes_per_row=enough)).codec
    assert long.code_bytes >= codes and long.n_triples >= 2 * 32 and long.kept == long.sizes


@pytest.mark.parametrize("family", TAPS)
def test_final_norms_are_known_by_what_they_do(family):
    """Gains, biases and what is taken off before, and a pull-back that is autograd's."""
    lm = make_model(family, spread=0.3)
    norm = find_taps(make_readout(family, make_tokenizer(), spread=0.3), Channel("residual"))[1]
    with torch.no_grad():
        for p in norm.parameters():
            p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype)
    found = Scaling.of(norm, 32, torch.device("cpu"), torch.float64)
    assert found.centred == isinstance(norm, torch.nn.LayerNorm) or "olmo" in family, lm
    x, g = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = 3 * x + 1
    with torch.no_grad():
        back = found.back(g, *found.at(norm, x))
    assert_close(back, pull_back(norm, x, g), "float32")


class Power(torch.nn.Module):
    def forward(self, x):
        return x / x.abs().pow(3).mean(-1, keepdim=True).pow(1 / 3)


@pytest.mark.parametrize("norm", [Power(), torch.nn.Tanh(), torch.nn.GroupNorm(4, 32)])
def test_norms_of_another_kind_are_not_taken_for_known(norm):
    assert Scaling.of(norm.double(), 32, torch.device("cpu"), torch.float64) is None
