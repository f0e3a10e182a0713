"""Recipes take what an index takes: adapters, .gguf files and objects in memory."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from leaveout.corpus import Corpus
from leaveout.errors import FormatError, UnsupportedError
from leaveout.readout.index import Index
from leaveout.training.notes import notes_on
from leaveout.training.recipe import Recipe
from leaveout.training.tasks import task_of
from leaveout.training.train import train_plain

from .test_models import AHEAD, PLAIN, Wrapped, adapted, lora, saved_adapter, scaled, small
from .tiny import TEXTS

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
ROWS = tuple(Corpus.open(list(TEXTS[:4])))


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def recipe(model, **changes):
    return Recipe("causal-lm", ROWS, model=model, **{"batch_size": 2, "max_tokens": 24, **changes})


def test_an_adapter_goes_on_where_the_recipe_says_so(peft, tokenizer, tmp_path):
    place = str(saved_adapter(peft, tmp_path, tokenizer))
    for trained in ("full", {"lora": {"targets": ["q_proj"]}}):
        with pytest.raises(FormatError, match=r"leaves open what is trained: give `trained: adapter` to go on with it"):
            task_of(recipe(place, trained=trained))
    task = task_of(recipe(place, trained="adapter"))
    assert len(task.trained) == 8 and all(".lora_" in name for name in task.trained)
    patterns = task_of(recipe(place, trained=("*.norm.weight", "*lora_B*")))
    assert sum("lora_B" in name for name in patterns.trained) == 4 and len(patterns.trained) == 5
    found = train_plain(recipe(place, trained="adapter"))
    weights = load_file(f"{place}/adapter_model.safetensors")
    before = dict(task.model.named_parameters())
    assert set(found) == set(task.trained) and len(weights) == 8
    assert all(not torch.equal(value, before[name]) for name, value in found.items())
    with pytest.raises(FormatError, match="goes on with an adapter that is at work, and the model has none"):
        task_of(recipe(str(tmp_path / "base"), trained="adapter"))


def test_the_hash_sees_an_adapter_and_its_base(peft, tokenizer, tmp_path):
    place = saved_adapter(peft, tmp_path, tokenizer)
    one = recipe(str(place), trained="adapter")
    seen = [one.hash()]
    assert one.hash() == seen[0]
    for file in (place / "adapter_model.safetensors", tmp_path / "base" / "model.safetensors"):
        weights = load_file(file)
        name = next(iter(weights))
        weights[name] = weights[name] + 1e-3
        save_file(weights, file, {"format": "pt"})
        seen.append(one.hash())
    assert len(set(seen)) == 3


def test_a_pair_in_memory_is_trained_as_a_copy_and_hashed_by_its_weights(peft, tokenizer):
    lm = small()
    kept = copy.deepcopy(lm.state_dict())
    lm.train()
    one = recipe((lm, tokenizer))
    first = train_plain(one)
    second = train_plain(one)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(value, kept[name]) for name, value in lm.state_dict().items()) and lm.training
    digest = one.hash()
    assert recipe((copy.deepcopy(lm), tokenizer)).hash() == digest
    lm.model.norm.weight.data += 1e-3
    assert one.hash() != digest
    model = adapted(peft, lora(peft), lora(peft))
    digest = recipe((model, tokenizer), trained="adapter").hash()
    model.set_adapter("B")
    assert recipe((model, tokenizer), trained="adapter").hash() != digest
    with pytest.raises(FormatError, match="leaves open what is trained"):
        task_of(recipe((model, tokenizer)))


@pytest.mark.parametrize("name", ["bert", "gemma3"])
def test_models_that_look_ahead_are_not_trained(name, tokenizer):
    with pytest.raises(UnsupportedError, match="sees the tokens that it is to predict"):
        task_of(recipe((AHEAD[name](), tokenizer)))


def test_wrapped_and_quantised_models_are_not_trained(tokenizer):
    lm = small()
    for wrapped in (nn.DataParallel(lm), Wrapped(lm)):
        with pytest.raises(UnsupportedError, match="wraps the model: give the model inside it"):
            task_of(recipe(lambda wrapped=wrapped: (wrapped, tokenizer)))
    lm.model.norm.weight = nn.Parameter(torch.ones(32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedError, match=r"quantised weights .* can't be trained: give"):
        task_of(recipe((lm, tokenizer)))
    with pytest.raises(FormatError, match=r"needs `model`: a directory, a .gguf file"):
        task_of(recipe(None))


def test_hooks_and_settings_of_modules_are_refused_or_hashed(tokenizer):
    lm = small()
    before = recipe((lm, tokenizer)).hash()
    handle = lm.model.layers[0].register_forward_hook(lambda m, a, out: out * 1.1)
    with pytest.raises(UnsupportedError, match=r"A forward hook on model.layers.0 changes what the model gives"):
        task_of(recipe((lm, tokenizer)))
    handle.remove()
    assert recipe((lm, tokenizer)).hash() == before
    lm.model.layers[0].self_attn.scaling = 0.1
    assert recipe((lm, tokenizer)).hash() != before


def test_rows_take_no_positions_of_longer_ones(tokenizer):
    """Where the longest row of a batch decides on rotary positions, rows stay on one side of the switch."""
    for max_tokens in (16, 24):
        one = recipe((scaled("phi3"), tokenizer), max_tokens=max_tokens, trained=("*.norm.weight",))
        task = task_of(one)  # all rows are longer than the 16 tokens of the switch, or cut there
        with torch.no_grad():
            together = task.loss(task.model, task.encode(ROWS))
            alone = torch.cat([task.loss(task.model, task.encode([row])) for row in ROWS])
        assert torch.allclose(together, alone, rtol=1e-5)
    with pytest.raises(
        UnsupportedError, match=r"takes other positions for all rows of a batch .* set max_tokens to 16"
    ):
        task.encode_queries(Corpus.open(["Yes.", TEXTS[0]]))
    mixed = Recipe("causal-lm", ("Yes.", *TEXTS[:3]), model=(scaled("phi3"), tokenizer), batch_size=2, max_tokens=24)
    with pytest.raises(UnsupportedError, match=r"Rows have \d+ to 24 tokens, and this model takes other positions"):
        task_of(mixed)


def test_dropout_of_an_adapter_is_said_to_be_off(peft, tokenizer):
    model = adapted(peft, lora(peft, lora_dropout=0.4)).train()
    one = recipe((model, tokenizer), trained="adapter")
    assert "lora_dropout.A 0.4" in notes_on(one, task_of(one))[0]
    first, second = train_plain(one), train_plain(one)
    assert model.training and all(torch.equal(first[name], second[name]) for name in first)


def test_compiled_models_are_trained_as_they_are_written(tokenizer):
    lm = small()
    wanted = train_plain(recipe((lm, tokenizer)))
    wrapped = copy.deepcopy(lm)
    wrapped.model.layers[0] = torch.compile(wrapped.model.layers[0], backend="eager")
    for model in (wrapped, torch.compile(lm, backend="eager")):
        found = train_plain(recipe((model, tokenizer)))
        assert list(found) == list(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_targets_of_new_adapters_that_are_not_there(peft, tokenizer):
    with pytest.raises(UnsupportedError, match=r"no layers for \(q_prj\): give some of down_proj, .*q_proj"):
        task_of(recipe((small(), tokenizer), trained={"lora": {"targets": ["q_prj"]}}))


# ---------------------------------------------------------------- GGUF


def write_gguf(path, tokenizer, quantised=True):
    """A Llama of one block, its matrices in Q8_0, with the tokenizer inside."""
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in backend["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd": (len(tokens), 32), "output": (len(tokens), 32), "output_norm": (32,)}
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32)}
    shapes |= {"blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32)}
    shapes |= {"blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    for name, shape in shapes.items():
        value = (0.2 * rng.standard_normal(shape) + (len(shape) == 1)).astype(np.float32)
        if quantised and len(shape) == 2:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_indexed_and_trained_and_said_to_be_dequantised(tokenizer, tmp_path):
    file = write_gguf(tmp_path / "small.gguf", tokenizer)
    said = "small.gguf is dequantised from Q8_0 to float32."
    index = Index.build(str(file), list(TEXTS[:3]), tmp_path / "index", PLAIN)
    assert index.info()["notes"] == [said]
    (tmp_path / "renamed.gguf").symlink_to(file)
    assert len(Index.open(tmp_path / "index", str(tmp_path / "renamed.gguf")).search([TEXTS[0]], k=1)[0]) == 1
    one = recipe(str(file))
    assert task_of(one).notes == (said,)
    assert train_plain(one)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[:4]))
    (tmp_path / "r.yaml").write_text("{kind: causal-lm, data: rows.jsonl, model: small.gguf, batch_size: 2}")
    assert Recipe.from_yaml(tmp_path / "r.yaml").model == str(file)
    before = one.hash()
    write_gguf(file, tokenizer, quantised=False)
    assert one.hash() != before and task_of(one).notes == ()
    (tmp_path / "r.yaml").write_text("{kind: causal-lm, data: rows.jsonl, model: absent.gguf, batch_size: 2}")
    with pytest.raises(FormatError, match=r"There is no GGUF file .*absent.gguf: correct `model`"):
        Recipe.from_yaml(tmp_path / "r.yaml")
