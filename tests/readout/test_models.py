"""One loader for all: what tells models apart, changes behind an index, models that look ahead, wrappers and devices."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import normalizers, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from leaveout.errors import FormatError, MismatchError, UnsupportedError
from leaveout.models import ModelOptions, evaluating, length_limit, load_model, load_tokenizer, source_digest
from leaveout.models.identity import State, glance
from leaveout.readout.families import find_taps
from leaveout.readout.index import Index
from leaveout.readout.model import load_readout
from leaveout.readout.settings import Channel, SignatureSettings
from leaveout.readout.signature import Signer
from leaveout.readout.tokens import Window

from .conftest import RAW, assert_close
from .tiny import COMMON, FAMILIES, SPECIAL, make_model, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
ROWS = RAW[:3]
PLAIN = SignatureSettings((Channel("gh"),))


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def small(family="llama", **changes):
    return make_model(family, spread=0.1, dtype=torch.float32, **changes)


def lora(peft, alpha=8, **more):
    settings = {
        "r": 4,
        "lora_alpha": alpha,
        "target_modules": ["q_proj", "down_proj"],
        "init_lora_weights": False,
        **more,
    }
    return peft.LoraConfig(task_type="CAUSAL_LM", **settings)


def adapted(peft, *configs, seed=1):
    """A model with adapters named A, B, ... of which A is active."""
    torch.manual_seed(seed)
    first, *others = configs or (lora(peft),)
    model = peft.get_peft_model(small(), first, adapter_name="A")
    for name, config in zip("BCD", others, strict=False):
        model.add_adapter(name, config)
    return model


# ---------------------------------------------------------------- adapters


def test_another_adapter_is_refused_wherever_an_index_meets_a_model(peft, tokenizer, tmp_path):
    model = adapted(peft, lora(peft), lora(peft))
    index = Index.build(model, ROWS, tmp_path / "index", PLAIN, tokenizer)
    own = index.score(ROWS)
    model.set_adapter("B")
    for ask in (
        lambda: index.score(ROWS),
        lambda: index.append(["more of the same"]),
        lambda: index.explain("a tale", index.ids[0]),
        lambda: Index.open(tmp_path / "index", model, tokenizer),
        lambda: Index.build(model, ROWS, tmp_path / "index", PLAIN, tokenizer),
    ):
        with pytest.raises(MismatchError, match=r"another adapter"):
            ask()
    assert len(Index.open(tmp_path / "index")) == len(ROWS)
    model.set_adapter("A")
    assert np.array_equal(index.score(ROWS), own)


@pytest.mark.parametrize("change", ["disabled", "alpha", "rslora", "both", "merged", "scaled", "unloaded"])
def test_whatever_changes_what_an_adapter_adds_is_another_adapter(change, peft, tokenizer, tmp_path):
    model = adapted(peft, lora(peft), lora(peft))
    index = Index.build(model, ROWS, tmp_path / "index", PLAIN, tokenizer)
    if change == "alpha":
        other = adapted(peft, lora(peft, alpha=16), lora(peft))
    elif change == "rslora":
        other = adapted(peft, lora(peft, use_rslora=True), lora(peft))
    else:
        other = model
    if change == "both":
        other.base_model.set_adapter(["A", "B"])
    elif change == "merged":
        other.merge_adapter()
    elif change == "scaled":
        next(m for m in other.modules() if isinstance(getattr(m, "scaling", None), dict)).scaling["A"] *= 2
    elif change == "unloaded":
        other = other.unload()
    with other.disable_adapter() if change == "disabled" else evaluating(other):
        with pytest.raises(MismatchError, match=r"another adapter"):
            Index.open(tmp_path / "index", other, tokenizer)
        if other is model:
            with pytest.raises(MismatchError, match=r"another adapter|other weights"):
                index.score(ROWS)


def test_what_does_not_change_the_outputs_is_no_other_adapter(peft, tokenizer, tmp_path):
    """Names, adapters that are not at work, dropout, and the way in which one came to be disabled or merged."""
    one, two = adapted(peft), adapted(peft, lora(peft, lora_dropout=0.5), lora(peft, alpha=3))
    identity = load_model(one, tokenizer).identity()
    assert load_model(two, tokenizer).identity() == identity
    one.save_pretrained(tmp_path / "kept")
    base = small()
    again = peft.PeftModel.from_pretrained(base, tmp_path / "kept" / "A", adapter_name="other")
    assert load_model(again, tokenizer).identity() == identity
    with again.disable_adapter():
        assert load_model(again, tokenizer).identity() == load_model(small(), tokenizer).identity()
    merged = load_model(copy.deepcopy(again).merge_and_unload(), tokenizer).identity()
    again.merge_adapter()
    assert load_model(again, tokenizer).identity() == merged != identity


@pytest.mark.parametrize("kind", ["dora", "ia3", "loha", "saved", "tokens", "oft", "vera"])
def test_other_kinds_of_adapters_are_told_apart(kind, peft, tokenizer):
    configs = {
        "dora": lambda: lora(peft, use_dora=True),
        "ia3": lambda: peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
        ),
        "loha": lambda: peft.LoHaConfig(target_modules=["q_proj"], r=2, init_weights=False),
        "saved": lambda: lora(peft, modules_to_save=["norm"]),
        "tokens": lambda: lora(peft, trainable_token_indices=[5, 6]),
        "oft": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, init_weights=False),
        "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], r=4, init_weights=False),
    }
    model = adapted(peft, configs[kind](), configs[kind]())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".A" in name or ".B" in name:
                p.add_(0.1 * torch.randn_like(p))
    seen = []
    for name in "AB":
        model.set_adapter(name)
        readout = load_readout(model, tokenizer)
        with torch.no_grad():
            seen.append((readout.identity(), readout.hidden(torch.tensor([[5, 6, 7, 8]]))))
    (one, hidden), (two, other) = seen
    assert not torch.allclose(hidden, other) and one["adapters"] != two["adapters"]
    assert {**one, "adapters": 0, "weights": 0} == {**two, "adapters": 0, "weights": 0}
    with model.disable_adapter():
        assert load_readout(model, tokenizer).identity() == load_readout(small(), tokenizer).identity()


def saved_base(tmp_path, tokenizer, **changes):
    small(**changes).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def saved_adapter(peft, tmp_path, tokenizer, name="adapter", alpha=8, seed=1):
    base = AutoModelForCausalLM.from_pretrained(saved_base(tmp_path, tokenizer), dtype=torch.float32)
    torch.manual_seed(seed)
    peft.get_peft_model(base, lora(peft, alpha)).save_pretrained(tmp_path / name)
    return tmp_path / name


def test_adapter_directory_loads_with_its_base_and_the_bases_tokenizer(peft, tokenizer, tmp_path):
    place = saved_adapter(peft, tmp_path, tokenizer)
    index = Index.build(str(place), ROWS, tmp_path / "index", PLAIN)
    inside = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), place)
    assert np.array_equal(Index.open(tmp_path / "index", inside, tokenizer).score(ROWS), index.score(ROWS))
    assert np.array_equal(Index.open(tmp_path / "index").score(ROWS), index.score(ROWS))
    assert load_tokenizer(str(place)).get_vocab() == tokenizer.get_vocab()
    make_tokenizer(bos=False).save_pretrained(place)  # now it has its own
    assert load_model(place).identity()["tokenizer"] != index.identity["tokenizer"]
    for name, alpha, seed in (("alpha", 16, 1), ("other", 8, 2)):
        other = saved_adapter(peft, tmp_path, tokenizer, name, alpha, seed)
        with pytest.raises(MismatchError, match=r"another adapter"):
            Index.open(tmp_path / "index", str(other))
    with pytest.raises(MismatchError, match=r"another adapter"):
        Index.open(tmp_path / "index", str(tmp_path / "base"))


def test_adapter_directories_that_do_not_load_are_refused(peft, tokenizer, tmp_path):
    place = saved_adapter(peft, tmp_path, tokenizer)
    config = json.loads((place / "adapter_config.json").read_text())

    def write(**changes):
        (place / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        return str(place)

    for changes, error, sentence in (
        ({"base_model_name_or_path": None}, FormatError, "adapter of an unnamed model: write the base model's path"),
        (
            {"base_model_name_or_path": "/not/here"},
            UnsupportedError,
            "The base model of the adapter .*, /not/here, does not",
        ),
        ({"base_model_name_or_path": str(place)}, UnsupportedError, "it is an adapter itself"),
        ({"task_type": "SEQ_CLS"}, UnsupportedError, "an adapter for SEQ_CLS: give one of a causal language model"),
        ({"target_modules": ["nothing"]}, UnsupportedError, "does not load as an adapter of .*base"),
    ):
        with pytest.raises(error, match=sentence):
            load_model(write(**changes))
    load_model(write(base_model_name_or_path="../base"))  # relative to the adapter
    weights = load_file(place / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, place / "adapter_model.safetensors")
    with pytest.raises(FormatError, match=r"lacks weights of the adapter"):
        load_model(str(place))
    small().save_pretrained(place)
    with pytest.raises(UnsupportedError, match=r"holds a whole model and an adapter"):
        load_model(str(place))


def test_source_digest_sees_the_base_of_an_adapter(peft, tokenizer, tmp_path):
    place = saved_adapter(peft, tmp_path, tokenizer)
    before = source_digest(str(place))
    assert source_digest(str(place)) == before
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    assert source_digest(str(place)) != before
    assert source_digest("owner/name") == [["owner/name"]]


def test_adapters_that_work_outside_of_the_layers_are_refused(peft, tokenizer, tmp_path):
    place, other = (
        saved_adapter(peft, tmp_path, tokenizer, name, seed=seed) for name, seed in (("one", 1), ("two", 2))
    )
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32, adapters={"0": str(place), "1": str(other)}, xlora_depth=1
    )
    with pytest.raises(UnsupportedError, match=r"works outside of the model's layers.*: give merge_and_unload"):
        load_readout(peft.get_peft_model(small(use_cache=False), config), tokenizer)
    tuned = peft.get_peft_model(small(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    tuned.base_model.config._name_or_path = str(tmp_path / "base")
    tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "prompt")
    with pytest.raises(UnsupportedError, match="Prompt and prefix tuning put tokens before the text"):
        load_readout(str(tmp_path / "prompt"))


def test_adapters_of_transformers_own_and_mixed_ones_are_known(peft, tokenizer, tmp_path):
    place = saved_adapter(peft, tmp_path, tokenizer)
    wanted = load_model(str(place)).identity()
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lm.load_adapter(str(place))
    assert load_readout(lm, tokenizer).identity() == load_readout(str(place)).identity()
    lm.disable_adapters()
    assert load_model(lm, tokenizer).identity() == load_model(str(tmp_path / "base")).identity() != wanted
    mixed = peft.PeftMixedModel(small(), lora(peft), adapter_name="A")
    mixed.add_adapter("B", peft.LoHaConfig(target_modules=["v_proj"], r=2, init_weights=False))
    found = []
    for names in (["A", "B"], ["A"], ["B"]):
        mixed.set_adapter(names)
        found.append(load_readout(mixed, tokenizer).identity()["adapters"])
    assert [len(adapters) for adapters in found] == [2, 1, 1] and len({str(adapters) for adapters in found}) == 3


# ---------------------------------------------------------------- changes behind an index


def test_dropout_stays_off_and_the_callers_form_comes_back(tokenizer, tmp_path):
    lm = small("gpt2")  # with dropout .1
    index = Index.build(lm, ROWS, tmp_path / "index", PLAIN, tokenizer)
    own = index.score(ROWS)
    lm.train()
    lm.transformer.h[1].eval()
    form = [module.training for module in lm.modules()]
    assert len(set(form)) == 2
    assert np.array_equal(index.score(ROWS), own)
    assert np.array_equal(Index.open(tmp_path / "index", lm, tokenizer).score(ROWS), own)
    Index.build(lm, ROWS, tmp_path / "other", PLAIN, tokenizer)
    assert np.array_equal(Index.open(tmp_path / "other", lm, tokenizer).score(ROWS), own)
    index.append(["one more row, which is signed without dropout"])
    assert [module.training for module in lm.modules()] == form


def plus(p):
    with torch.no_grad():
        p.add_(0.05 * torch.ones_like(p))


CHANGES = {
    "in place": lambda lm: plus(lm.model.norm.weight),
    "through .data": lambda lm: lm.lm_head.weight.data.add_(0.05 * torch.ones_like(lm.lm_head.weight)),
    "all a little": lambda lm: [p.data.mul_(1.001) for p in lm.parameters()],
    "another tensor": lambda lm: setattr(lm.lm_head, "weight", nn.Parameter(lm.lm_head.weight.detach() * 1.1)),
    "another module": lambda lm: setattr(lm.model.layers[0], "mlp", small(seed=3).model.layers[0].mlp),
    "frequencies": lambda lm: lm.model.rotary_emb.inv_freq.mul_(1.1),
}
SETTINGS = {
    "hook on the head": lambda lm: lm.lm_head.register_forward_hook(lambda m, a, out: out * 2),
    "hook on the whole": lambda lm: lm.register_forward_hook(lambda m, a, out: out.__class__(logits=out.logits * 2)),
    "hook": lambda lm: lm.model.layers[0].register_forward_hook(lambda m, a, out: out * 1.1),
    "pre-hook": lambda lm: lm.model.norm.register_forward_pre_hook(lambda m, args: (args[0] + 0.1,)),
    "attribute": lambda lm: setattr(lm.model.layers[0].self_attn, "scaling", 0.1),
    "method": lambda lm: setattr(lm.model.norm, "forward", lambda x: x),
}


@pytest.mark.parametrize("change", [*CHANGES, *SETTINGS])
def test_a_changed_model_is_refused_at_each_use_until_it_is_as_it_was(change, tokenizer, tmp_path):
    lm = small()
    index = Index.build(lm, ROWS, tmp_path / "index", PLAIN, tokenizer)
    opened = Index.open(tmp_path / "index", lm, tokenizer)
    (CHANGES | SETTINGS)[change](lm)
    sentence = "has other|another" if change not in SETTINGS else "gives other (hidden states|logits) than when it was"
    if change in ("attribute", "method"):
        sentence = "has other settings of modules"
    for one in (index, opened):
        for ask in (one.score, one.search, one.append):
            with pytest.raises(MismatchError, match=sentence):
                ask(["something else"])
    assert len(Index.open(tmp_path / "index")) == len(ROWS)


def test_a_config_that_was_edited_is_refused_in_a_search_as_in_append(tokenizer, tmp_path):
    for number, (name, value) in enumerate({"final_logit_softcapping": 9.0, "sliding_window": 3}.items()):
        lm = small("gemma2")
        index = Index.build(lm, ROWS, tmp_path / str(number), PLAIN, tokenizer)
        setattr(lm.config, name, value)
        for ask in (index.score, index.append):
            with pytest.raises(MismatchError, match="has another config than when it was opened"):
                ask(["something else"])


@pytest.mark.parametrize("change", ["pre_tokenizer", "normalizer", "split", "bos"])
def test_a_tokenizer_that_cuts_otherwise_is_refused_in_a_search(change, tmp_path):
    own, lm = make_tokenizer(), small()
    index = Index.build(lm, ROWS, tmp_path / "index", PLAIN, own)
    before = index.score(ROWS)
    own.pad_token = "</s>"  # what many set, and nothing depends on
    assert np.array_equal(index.score(ROWS), before)
    if change == "pre_tokenizer":
        own.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "normalizer":
        own.backend_tokenizer.normalizer = normalizers.Lowercase()
    elif change == "split":
        own.split_special_tokens = True
    else:
        own.bos_token = "<|user|>"  # which the chat template names
    for ask in (index.score, index.search, index.append):
        with pytest.raises(MismatchError, match="has another tokenizer than when it was opened"):
            ask(["something else"])
    with pytest.raises(MismatchError, match="another tokenizer"):
        Index.open(tmp_path / "index", lm, own)


@pytest.mark.parametrize(
    "change",
    [
        lambda lm: setattr(lm.model.layers[1].self_attn, "scaling", 0.1),
        lambda lm: setattr(lm.model.norm, "variance_epsilon", 0.5),
        lambda lm: setattr(lm.model.layers[0].mlp, "forward", lambda x: 0 * x),
    ],
    ids=["scaling", "epsilon", "method"],
)
def test_an_index_sees_settings_of_modules_that_no_config_has(change, tokenizer, tmp_path):
    lm = small()
    index = Index.build(lm, ROWS, tmp_path / "index", PLAIN, tokenizer)
    other = copy.deepcopy(lm)
    Index.open(tmp_path / "index", other.train(), tokenizer)
    change(other)
    for meet in (Index.open, lambda path, *model: Index.build(model[0], ROWS, path, PLAIN, model[1])):
        with pytest.raises(MismatchError, match=r"other settings of modules|an index with settings = "):
            meet(tmp_path / "index", other, tokenizer)
    assert len(index) == len(ROWS)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_model_that_was_saved_is_the_same(family, tokenizer, tmp_path):
    lm = small(family)
    lm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    identity, own = load_readout(str(tmp_path)).identity(), load_readout(lm, tokenizer).identity()
    assert {**identity, "tokenizer": 0} == {**own, "tokenizer": 0}


@pytest.mark.parametrize("shape", [(512, 32), (256, 256), (64, 4096), (4, 4096), (1000, 48), (8192,)])
def test_the_quick_checksum_reads_columns_all_over_a_tensor(shape):
    """What is written through `.data` to a quarter of the columns, or of the rows, is seen."""
    tensor = torch.zeros(shape)
    before = glance(State({"w": tensor}))
    for axis in range(len(shape)):
        for part in range(4):
            inside = tensor.data.narrow(axis, part * shape[axis] // 4, shape[axis] // 4)
            inside += 1
            assert glance(State({"w": tensor}))[2] != before[2]
            inside -= 1
    assert glance(State({"w": tensor}))[2] == before[2]


@pytest.mark.parametrize("how", ["in place", "wrapped", "whole"])
def test_compiled_models_are_the_same_and_tapped(how, tokenizer, tmp_path):
    lm = small()
    index = Index.build(lm, ROWS, tmp_path / "index", "residual", tokenizer)
    own = index.score(ROWS)
    other = copy.deepcopy(lm)
    for i, layer in enumerate(other.model.layers):
        if how == "in place":
            layer.compile(backend="eager")
        elif how == "wrapped":
            other.model.layers[i] = torch.compile(layer, backend="eager")
    if how == "whole":
        other = torch.compile(other, backend="eager")
    other(input_ids=torch.tensor([[3, 4, 5]]))
    opened = Index.open(tmp_path / "index", other, tokenizer)
    assert np.array_equal(opened.score(ROWS), own)


def test_models_that_want_more_than_tokens_and_tokenizers_by_name_are_refused(tokenizer):
    sizes = {f"{side}_{name}": 4 for side in ("encoder", "decoder") for name in ("attention_heads", "ffn_dim")}
    config = AutoConfig.for_model(
        "marian", vocab_size=523, d_model=32, encoder_layers=1, decoder_layers=1, pad_token_id=2, **sizes
    )
    with pytest.raises(UnsupportedError, match="MarianMTModel does not run on token ids alone"):
        load_readout(AutoModelForSeq2SeqLM.from_config(config).eval(), tokenizer)
    with pytest.raises(TypeError, match="tokenizer is of type str: give a loaded one"):
        load_readout(small(), "owner/name")


def test_weights_that_come_back_are_accepted(tokenizer, tmp_path):
    lm = small()
    kept = copy.deepcopy(lm.state_dict())
    index = Index.build(lm, ROWS, tmp_path / "index", PLAIN, tokenizer)
    own = index.score(ROWS)
    plus(lm.model.norm.weight)
    with pytest.raises(MismatchError, match=r"other weights"):
        index.score(ROWS)
    lm.load_state_dict(kept)
    assert np.array_equal(index.score(ROWS), own)


def test_append_hashes_in_full(tokenizer, tmp_path):
    """One number that no sample holds, written behind the version counter's back."""
    lm = small()
    index = Index.build(lm, ROWS, tmp_path / "index", PLAIN, tokenizer)
    lm.model.embed_tokens.weight.data[522, 5] += 1.0  # a token that no text has
    with pytest.raises(MismatchError, match=r"other weights"):
        index.append(["more"])


def test_hooks_that_look_on_are_welcome_and_others_refused(tokenizer, tmp_path):
    lm, seen = small(), []
    handles = [
        lm.model.layers[0].register_forward_hook(lambda m, a, out: seen.append(1)),
        lm.model.norm.register_forward_pre_hook(lambda m, args: None),
        lm.lm_head.register_forward_hook(lambda m, a, out: out.clone()),
    ]
    index = Index.build(lm, ROWS, tmp_path / "index", PLAIN, tokenizer)
    assert seen and len(index.score(ROWS)) == 3
    for module, change in (
        (lm.model.layers[1], lambda m, a, out: out + 0.01),
        (lm.lm_head, lambda m, a, out: out * 1.001),
        (lm, lambda m, a, out: out.__class__(logits=out.logits * 2)),
    ):
        handles.append(module.register_forward_hook(change))
        with pytest.raises(UnsupportedError, match=r"A forward hook on .* changes what the model gives: remove it"):
            load_readout(lm, tokenizer)
        handles.pop().remove()
    load_readout(lm, tokenizer)


def test_a_tokenizer_that_was_called_with_truncation_is_the_same(tokenizer, tmp_path):
    own = make_tokenizer()
    before = load_model(small(), own).identity()
    own("a text of many tokens", truncation=True, max_length=3)
    assert own.backend_tokenizer.truncation is not None
    assert load_model(small(), own).identity() == before


# ---------------------------------------------------------------- looking ahead


def bidirectional(family, **changes):
    config = AutoConfig.for_model(family, **{**COMMON, **SPECIAL, "vocab_size": 523, **changes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def blind(family):
    """A model that would be causal, but for a flag of its attention."""
    lm = small(family)
    for module in lm.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    return lm


AHEAD = {
    "gemma3": lambda: bidirectional(
        "gemma3_text", use_bidirectional_attention=True, sliding_window=64, layer_types=None
    ),
    "bert": lambda: bidirectional("bert", is_decoder=False, max_position_embeddings=64),
    "roberta": lambda: bidirectional("roberta", is_decoder=False, max_position_embeddings=66, pad_token_id=1),
    "llama": lambda: blind("llama"),
    "gpt_neox": lambda: blind("gpt_neox"),
    "bfloat16": lambda: blind("llama").to(torch.bfloat16),
    "bert bfloat16": lambda: bidirectional("bert", is_decoder=False, max_position_embeddings=64).to(torch.bfloat16),
    "electra": lambda: bidirectional("electra", embedding_size=32, max_position_embeddings=64),
}


@pytest.mark.parametrize("name", AHEAD)
def test_models_that_see_what_they_are_to_predict_are_refused(name, tokenizer):
    with pytest.raises(
        UnsupportedError, match=r"sees the tokens that it is to predict: .* give a causal language model"
    ):
        load_readout(AHEAD[name](), tokenizer)


EXPERTS = {"num_local_experts": 4, "head_dim": 8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "more"), [("mixtral", EXPERTS), ("bart", {"d_model": 32}), ("mamba", {}), ("gemma3_text", {})]
)
def test_causal_models_of_every_kind_pass(family, more, dtype, tokenizer):
    load_readout(bidirectional(family, **more).to(dtype), tokenizer)


def test_a_model_that_does_not_run_as_it_is_says_so(tokenizer):
    lm = bidirectional("mixtral", **EXPERTS).double()
    try:
        lm(input_ids=torch.tensor([[5, 6]]))
    except RuntimeError:
        with pytest.raises(UnsupportedError, match=r"MixtralForCausalLM does not run in float64 here .*: load it with"):
            load_readout(lm, tokenizer)


class OneAhead(nn.Module):
    """Adds a little of the next token's state, only beyond the first 100."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        y = self.norm(x)
        return torch.cat([y[:, :100], y[:, 100:] + 0.01 * y[:, 100:].roll(-1, 1)], 1) if y.shape[1] > 101 else y


def test_one_token_ahead_beyond_the_short_test_is_found(tokenizer):
    lm = small()
    lm.model.norm = OneAhead(lm.model.norm)
    with pytest.raises(UnsupportedError, match=r"when the tokens from .* of 320 on are replaced"):
        load_readout(lm, tokenizer)


class Prefix(OneAhead):
    """Lets the first four tokens see one another, as models with a prefix do."""

    def forward(self, x):
        y = self.norm(x)
        return torch.cat([y[:, :4] + 0.01 * y[:, :4].mean(1, keepdim=True), y[:, 4:]], 1)


def test_a_prefix_that_sees_itself_is_found(tokenizer):
    lm = small()
    lm.model.norm = Prefix(lm.model.norm)
    with pytest.raises(UnsupportedError, match=r"when the tokens from 2 of 24 on are replaced"):
        load_readout(lm, tokenizer)


# ---------------------------------------------------------------- positions that depend on the batch

LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


def scaled(kind):
    if kind == "dynamic":
        return small(rope_parameters=DYNAMIC, max_position_embeddings=16)
    family = "phi3" if kind == "phi3" else "llama"
    config = AutoConfig.for_model(
        family,
        **{
            **COMMON,
            **SPECIAL,
            "vocab_size": 523,
            "rope_parameters": dict(LONGROPE),
            "original_max_position_embeddings": 16,
        },
    )
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return lm


@pytest.mark.parametrize("kind", ["phi3", "longrope", "dynamic"])
def test_rows_beside_longer_ones_keep_their_positions(kind, tokenizer):
    readout = load_readout(scaled(kind), tokenizer)
    assert readout.limit == length_limit(readout.lm) == 16
    ids = [(7919 * (i + 3)) % 523 for i in range(60)]
    lengths = [60, 12, 40, 16, 15, 40, 8, 17] if kind != "dynamic" else [30, 12, 24, 16, 15, 24, 8, 17]
    windows = [Window(row, 0, ids[:n], list(range(n - 1))) for row, n in enumerate(lengths)]
    signer = Signer(readout, PLAIN)
    together = signer.rows(windows, len(windows))
    alone = [signer.rows([Window(0, 0, w.ids, w.positions)], 1)[0] for w in windows]
    assert_close(together, torch.stack(alone), "model float32")
    with torch.no_grad():
        wanted = copy.deepcopy(readout.lm).base_model(input_ids=torch.tensor([ids[:24]])).last_hidden_state
    assert_close(readout.hidden(torch.tensor([ids[:24]])), wanted, "model float32")


def test_a_long_row_leaves_no_traces_in_the_identity(tokenizer, tmp_path):
    lm = scaled("phi3")
    index = Index.build(lm, ROWS, tmp_path / "index", PLAIN, tokenizer)
    with torch.no_grad():
        lm(input_ids=torch.arange(100)[None])
    assert index.score(ROWS).shape == (3, 3)
    assert length_limit(small()) is None


# ---------------------------------------------------------------- heads and wrappers


def test_a_head_that_peft_trains_as_a_copy_works(peft, tokenizer):
    model = adapted(peft, lora(peft, modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["A"].weight.mul_(1.5)
    merged = load_readout(copy.deepcopy(model).merge_and_unload(), tokenizer)
    window = [Window(0, 0, list(range(4, 16)), list(range(11)))]
    found = Signer(load_readout(model, tokenizer), PLAIN).rows(window, 1)
    assert_close(found, Signer(merged, PLAIN).rows(window, 1), "model float32")
    with model.disable_adapter():
        plain = Signer(load_readout(model, tokenizer), PLAIN).rows(window, 1)
    assert_close(plain, Signer(load_readout(small(), tokenizer), PLAIN).rows(window, 1), "model float32")


def test_an_output_projection_that_peft_trains_as_a_copy_is_tapped(peft, tokenizer):
    model = adapted(peft, lora(peft, target_modules=["q_proj"], modules_to_save=["down_proj"]))
    taps, _ = find_taps(load_readout(model, tokenizer), Channel("residual"))
    assert [tap.inputs for tap in taps] == [32, 48, 32, 48]


def test_an_adapted_head_is_refused_with_advice(peft, tokenizer):
    tied = peft.get_peft_model(small(tied=True), lora(peft, trainable_token_indices=[3, 4]))
    for model in (adapted(peft, lora(peft, target_modules=["q_proj", "lm_head"])), tied):
        with pytest.raises(UnsupportedError, match=r"The output head of .* is adapted .*: give model.merge_and_unload"):
            load_readout(model, tokenizer)
        load_readout(model.merge_and_unload(), tokenizer)


def test_wrapped_quantised_and_empty_models_are_refused_with_advice(tokenizer):
    lm = small()
    for wrapped in (nn.DataParallel(lm), Wrapped(lm)):
        with pytest.raises(
            UnsupportedError, match=f"{type(wrapped).__name__} wraps the model: give the model inside it"
        ):
            load_readout(wrapped, tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(lm), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UnsupportedError, match=r"layers that torch has quantised .*: give the model as it was before"):
        load_readout(quantised, tokenizer)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(lm.config)
    with pytest.raises(
        UnsupportedError, match=r"has no numbers in .*, which is on the meta device: load the whole model"
    ):
        load_readout(empty, tokenizer)


class Wrapped(nn.Module):
    """As engines for training wrap a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_the_config_of_a_scaled_head_may_be_a_name_or_idle(tokenizer):
    """MPT names its scale, and transformers does not apply it."""
    config = AutoConfig.for_model(
        "mpt", d_model=32, n_heads=4, n_layers=2, vocab_size=523, max_seq_len=64, logit_scale="inv_sqrt_d_model"
    )
    torch.manual_seed(0)
    assert load_readout(AutoModelForCausalLM.from_config(config).eval(), tokenizer).scale in (1.0, 32**-0.5)
    assert load_readout(make_model("cohere"), tokenizer).scale == 0.5


# ---------------------------------------------------------------- dtype and device


def test_an_index_opens_its_model_in_its_own_dtype(tokenizer, tmp_path):
    place = str(saved_base(tmp_path, tokenizer))
    index = Index.build(place, ROWS, tmp_path / "narrow", PLAIN, dtype="bfloat16")
    moved = Index.open(tmp_path / "narrow", place)
    assert moved.readout.weight.dtype == torch.bfloat16
    assert np.array_equal(moved.score(ROWS), index.score(ROWS))
    with pytest.raises(MismatchError, match=r"another dtype|other weights"):
        Index.open(tmp_path / "narrow", place, dtype="float32")
    in_memory = load_model(small().to(torch.bfloat16), tokenizer)
    Index.build(in_memory, ROWS, tmp_path / "memory", PLAIN)
    if Index.open(tmp_path / "memory").identity["buffers"] == index.identity["buffers"]:
        assert Index.open(tmp_path / "memory", place).readout.weight.dtype == torch.bfloat16


def test_auto_is_the_dtype_that_is_stored(tokenizer, tmp_path):
    small().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    place = str(tmp_path / "base")
    assert load_readout(place).weight.dtype == torch.float32
    index = Index.build(place, ROWS, tmp_path / "index", PLAIN, dtype="auto")
    assert index.identity["dtype"] == "bfloat16"
    assert np.array_equal(Index.open(tmp_path / "index", place).score(ROWS), index.score(ROWS))


def test_files_that_are_no_model_are_refused_in_one_sentence(tokenizer, tmp_path):
    place = saved_base(tmp_path, tokenizer)
    config = json.loads((place / "config.json").read_text())
    for name, error, sentence in (
        (str(place / "config.json"), UnsupportedError, "config.json is a file: give the directory of a model"),
        (" ", ValueError, "name of the model is empty"),
    ):
        with pytest.raises(error, match=sentence):
            load_model(name)
    for dtype in (None, "int8", torch.float32):
        with pytest.raises(ValueError, match=r"dtype .* is not one of float32, bfloat16, float16, float64, auto"):
            load_model(str(place), options=ModelOptions(dtype))
    (place / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(UnsupportedError, match="base does not load as a causal language model"):
        load_model(str(place))
    (place / "config.json").write_text(json.dumps(config))
    (place / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(UnsupportedError, match=r"base does not load as a causal language model .*: Error while"):
        load_model(str(place))


def test_devices_that_are_not_here_are_refused_and_the_builds_is_forgotten(tokenizer, tmp_path, monkeypatch):
    place = str(saved_base(tmp_path, tokenizer))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for device, sentence in (
        ("cuda", "device is 'cuda', but torch finds no CUDA device here: give cpu"),
        ("cuda:1", "no CUDA device here"),
        ("cdua", "device is 'cdua': give cpu, cuda"),
        ("meta", "holds no numbers"),
        ("hpu", "device is 'hpu', but torch finds no such device here: give cpu"),
        ("xla:0", "finds no such device here"),
        (None, "device is None: give cpu"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Index.build(place, ROWS, tmp_path / "index", PLAIN, device=device)
    index = Index.build(place, ROWS, tmp_path / "index", PLAIN, device="auto")
    assert "device" not in index.info()["source"]
    assert Index.open(tmp_path / "index", device="auto").score(ROWS).shape == (3, 3)
    with pytest.raises(ValueError, match=r"no CUDA device here"):
        Index.open(tmp_path / "index", device="cuda").score(ROWS)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'colour'"):
        Index.open(tmp_path / "index", colour="red")  # pyright: ignore
