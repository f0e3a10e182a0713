"""Recipes: what they hold, how they are read, and that their hash covers all of it."""

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from leaveout.corpus import Corpus
from leaveout.errors import FormatError, UnsupportedError
from leaveout.training.loop import Steps
from leaveout.training.recipe import OptimizerSettings, Recipe
from leaveout.training.tasks import task_of

NAMES = ["anna", "bob", "eve", "kim", "lena", "max"]


def points(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(4, generator=g), i % 3) for i in range(n))


def test_batches_follow_the_order():
    recipe = Recipe("classifier", points(7), batch_size=2, epochs=2)
    assert recipe.batches() == ((0, 1), (2, 3), (4, 5), (6,)) * 2
    assert recipe.with_(drop_last=True).batches() == ((0, 1), (2, 3), (4, 5)) * 2
    assert recipe.with_(batch_size=9).batches() == (tuple(range(7)),) * 2
    assert recipe.with_(steps=5).batches() == ((0, 1), (2, 3), (4, 5), (6,), (0, 1))
    shuffled = recipe.with_(order="shuffled", steps=4).batches()
    assert len(shuffled) == 4 and shuffled[:3] != recipe.batches()[:3]
    assert shuffled == recipe.with_(order="shuffled", steps=4).batches()
    assert recipe.with_(order=((3, 3), (1, 0))).batches() == ((3, 3), (1, 0))


def test_rate_warms_up_and_decays():
    recipe = Recipe("classifier", points(), optimizer=OptimizerSettings("sgd", 1.0), warmup=2, schedule="linear")
    assert [recipe.rate(step, 6) for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert [recipe.with_(schedule="constant").rate(step, 6) for step in (1, 5)] == [1.0, 1.0]
    assert recipe.with_(schedule="cosine").rate(4, 6) == pytest.approx(0.5)


def test_units_keep_the_order_of_their_first_example():
    recipe = Recipe("classifier", points(4), units=("b", "a", "b", "c"))
    assert recipe.unit_names == ("b", "a", "c") and recipe.unit_of.tolist() == [0, 1, 0, 2]


CHANGES = {
    "lr": 0.2, "eps": 0.3, "seed": 1, "dtype": "float64", "schedule": "cosine", "warmup": 1, "epochs": 2,
    "batch_size": 2, "order": "shuffled", "clip_norm": 1.0, "trained": ("*weight",), "model": {"hidden": [3]},
    "units": ("x",) * 6, "examples": points(seed=1), "drop_last": True, "max_tokens": 9, "loss_per": "token", "steps": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_hash_changes_with_content(name):
    recipe = Recipe("classifier", points())
    assert recipe.hash() == Recipe("classifier", points()).hash()
    changed = recipe.with_(**{name: CHANGES[name]})
    assert changed.hash() != recipe.hash()


def test_hash_changes_with_rows_and_functions():
    a, b = Recipe.microgpt(NAMES, n=6), Recipe.microgpt([*NAMES[:-1], "mix"], n=6)
    assert a.hash() != b.hash() and a.hash() == Recipe.microgpt(NAMES, n=6).hash()
    one = Recipe("custom", points(), model=nn.Identity, loss=print)
    two = one.with_(model=nn.Flatten)
    assert one.hash() != two.hash()


def test_hash_changes_with_the_files_of_the_model(tmp_path):
    recipe = Recipe("causal-lm", tuple(Corpus.open(ROWS)), model=str(tmp_path))
    before = recipe.hash()
    (tmp_path / "weights").write_bytes(b"1")
    assert recipe.hash() != before


def test_microgpt_draws_what_the_paper_draws():
    recipe = Recipe.microgpt(NAMES, n=4, seed=7)
    import random

    rng = random.Random(7)
    shuffled = list(NAMES)
    rng.shuffle(shuffled)
    assert [row.text for row in recipe.examples] == shuffled[:4]
    first = task_of(recipe.with_(dtype="float64")).model.wte.weight[0, :3].tolist()
    assert first == [rng.gauss(0, 0.08) for _ in range(3)]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"kind": "diffusion"}, UnsupportedError, "no recipe kind 'diffusion': give one of microgpt"),
        ({"schedule": "step"}, UnsupportedError, "schedule is 'step'"),
        ({"dtype": "bfloat16"}, UnsupportedError, "give one of float32, float64"),
        ({"loss_per": "word"}, ValueError, "give one of example, token"),
        ({"batch_size": 3, "accumulate": 4}, ValueError, "accumulate must be from 1 to batch_size .3., got 4"),
        ({"batch_size": 0}, ValueError, "batch_size must be a whole number of at least 1, got 0"),
        ({"batch_size": 9, "drop_last": True}, ValueError, "drop_last leaves out what is not full: lower batch_size"),
        ({"drop_last": "no"}, ValueError, "drop_last must be true or false, got 'no'"),
        ({"kind": "custom", "loss_per": "token"}, ValueError, "leave loss_per out"),
        ({"order": ((0,), (), (1,))}, ValueError, "batch 1 of order is empty"),
        ({"order": ((0.5,),)}, ValueError, "order must be one of"),
        ({"order": ((0,), (1,)), "steps": 3}, ValueError, "order has 2 batches.* steps is 3: leave steps out"),
        ({"units": ("a",)}, ValueError, "one unit for each of 6"),
        ({"examples": ()}, FormatError, "at least one example"),
        ({"order": "Shuffled"}, ValueError, "one of given, shuffled, or batches of .* below 6, got 'Shuffled'"),
        ({"order": None}, ValueError, "order must be one of"),
        ({"order": (0, 1)}, ValueError, "order must be one of"),
        ({"order": ((0, 6),)}, ValueError, "numbers below 6"),
        ({"order": ((0, -1),)}, ValueError, "numbers below 6"),
        ({"epochs": 0}, ValueError, "epochs must be a whole number of at least 1, got 0"),
        ({"steps": -1}, ValueError, "steps must be a whole number of at least 0, got -1"),
        ({"warmup": -1}, ValueError, "warmup must be a whole number of at least 0"),
        ({"trained": "*mlp*"}, ValueError, "full, a list of name patterns"),
        ({"trained": {"dora": {}}}, ValueError, "full, a list of name patterns"),
        ({"trained": {"lora": {"r": 2}}}, ValueError, "lora needs the field targets"),
        ({"trained": {"lora": {"targets": "c_fc"}}}, ValueError, "must be a list of module names, got 'c_fc'"),
        ({"trained": {"lora": {"targets": []}}}, ValueError, "must be a list of module names"),
        (
            {"trained": {"lora": {"rank": 2, "targets": ["c_fc"]}}},
            ValueError,
            "unknown field 'rank': give one of r, alpha",
        ),
        ({"kind": "causal-lm", "model": "./nowhere"}, FormatError, "There is no directory nowhere"),
    ],
)
def test_wrong_recipe_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        Recipe(**{"kind": "classifier", "examples": points(), **fields})


def test_unknown_optimizer_and_empty_selection_are_refused():
    with pytest.raises(UnsupportedError, match="no optimizer 'lion': give one of sgd"):
        OptimizerSettings("lion")
    with pytest.raises(UnsupportedError, match="No parameter matches"):
        task_of(Recipe("classifier", points(), trained=("nothing.*",)))


def write(path, **fields):
    path.write_text(yaml.safe_dump(fields))
    return path


def test_yaml_microgpt(tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    path = write(tmp_path / "r.yaml", kind="microgpt", data="names.txt", n=4, seed=3, dtype="float64")
    assert Recipe.from_yaml(path).hash() == Recipe.microgpt(NAMES, n=4, seed=3, dtype="float64").hash()


def test_yaml_classifier(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(6, 4)).astype("float32"), np.array([0, 1, 2, 0, 1, 2])
    np.savez(tmp_path / "d.npz", x=x, y=y, group=np.array(list("aabbcc")))
    settings = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
    path = write(
        tmp_path / "r.yaml", kind="classifier", data="d.npz", units="group", optimizer=settings, model={"hidden": [8, 8]},
        batch_size=2, epochs=3, trained=["*.weight"],
    )  # fmt: skip
    recipe = Recipe.from_yaml(path)
    assert recipe.unit_names == ("a", "b", "c") and recipe.optimizer.momentum == 0.9
    task = task_of(recipe)
    assert task.trained and all(n.endswith("weight") for n in task.trained)
    assert task.loss(task.model, task.encode(recipe.examples)).shape == (6,)


def tiny_gpt2(path):
    """A GPT-2 of 1,500 parameters with a tokenizer of single letters, saved as transformers saves them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {ch: i for i, ch in enumerate("_abcdefghijklmnopqrstuvwxyz :")}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="_"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="_").save_pretrained(path)
    config = transformers.GPT2Config(
        vocab_size=len(vocabulary), n_embd=8, n_layer=1, n_head=2, n_positions=32, initializer_range=0.3, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


ROWS = [{"prompt": f"say {w}: ", "completion": f"{w} {w}", "unit": w[0]} for w in ("ann", "abe", "bob", "cy")]


@pytest.fixture(scope="session")
def lm_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("lm")
    tiny_gpt2(directory / "model")
    (directory / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in ROWS))
    return directory


def test_yaml_causal_lm(lm_directory):
    path = write(
        lm_directory / "r.yaml", kind="causal-lm", data="rows.jsonl", model="model", units="unit", batch_size=2,
        dtype="float64", trained=["*mlp*"],
    )  # fmt: skip
    recipe = Recipe.from_yaml(path)
    assert recipe.unit_names == ("a", "b", "c")
    task = task_of(recipe)
    assert task.trained and all("mlp" in name for name in task.trained)
    ids, labels = task.encode(recipe.examples[:1])
    assert (labels[0] != -100).sum() == len("ann ann") and labels[0, -1] == ids[0, -1]
    both = task.loss(task.model, task.encode(recipe.examples[2:]))
    alone = [task.loss(task.model, task.encode([row])) for row in recipe.examples[2:]]
    assert torch.allclose(both, torch.cat(alone), atol=1e-12)  # padding changes nothing


def test_loss_per_token_is_the_mean_over_the_tokens_of_the_batch(lm_directory):
    rows = tuple(Corpus.open(ROWS))
    recipe = Recipe(
        "causal-lm", rows, model=str(lm_directory / "model"), dtype="float64", loss_per="token", batch_size=4
    )
    task = task_of(recipe)
    batch = task.encode(rows)
    wanted = task.model(input_ids=batch[0], labels=batch[1], attention_mask=torch.ones_like(batch[0])).loss
    (part,) = Steps(recipe, task).parts(0)
    assert torch.allclose(part.loss(task.loss(task.model, batch)), wanted.double(), atol=1e-6)


def test_row_without_a_token_to_learn_is_refused(lm_directory):
    recipe = Recipe("causal-lm", tuple(Corpus.open(ROWS)), model=str(lm_directory / "model"), max_tokens=4)
    with pytest.raises(FormatError, match=r"no token to learn \(it is cut after 4 of 16 tokens\)"):
        task_of(recipe).encode(recipe.examples[:1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "needs at least the fields"),
        ("kind: microgpt", "needs at least the fields"),
        ("{kind: microgpt, data: x, colour: red}", "the field 'colour', which no recipe has: give one of"),
        ("{kind: microgpt, data: x, optimizer: {speed: 1}}", "unknown field 'speed': give one of name, lr, momentum"),
        (
            "{kind: microgpt, data: x, optimizer: adamw}",
            "must be a mapping with a name, such as {name: adamw}, got 'adamw'",
        ),
        (
            "{kind: microgpt, data: x, optimizer: {lr: fast}}",
            "r.yaml: optimizer.lr must be a number of at least 0, got 'fast'",
        ),
        ("{kind: microgpt, data: x, optimizer: {lr: nan}}", "optimizer.lr must be a number"),
        ("{kind: microgpt, data: x, optimizer: {lr: .inf}}", "optimizer.lr must be a number"),
        ("{kind: microgpt, data: x, optimizer: {lr: null}}", "optimizer.lr must be a number"),
        (
            "{kind: microgpt, data: x, optimizer: {betas: [0.9, x]}}",
            "optimizer.betas must be two numbers from 0 to below 1",
        ),
        ("{kind: microgpt, data: x, optimizer: {betas: 0.9}}", "optimizer.betas must be two numbers"),
        ("{kind: microgpt, data: x, clip_norm: much}", "clip_norm must be a number"),
        ("{kind: microgpt, data: x, batch_size: 1.5}", "batch_size must be a whole number of at least 1, got 1.5"),
        ("{kind: microgpt, data: x, epochs: true}", "epochs must be a whole number of at least 1, got True"),
        ("{kind: microgpt, data: x, epochs: 2, steps: 3}", "both `steps` and `epochs`: leave one of them out"),
        ("{kind: classifier, data: x, n: 3}", "only the kind microgpt has `n`"),
        ("{kind: microgpt, data: [x]}", "`data` must be the path"),
        ("{kind: microgpt, data: y}", "which does not exist: correct `data`"),
    ],
)
def test_wrong_yaml_is_refused(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    (tmp_path / "x").write_text("anna\nbob\n")
    with pytest.raises(FormatError, match=message):
        Recipe.from_yaml(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "r.yaml: epochs must be a whole number of at least 1, got 0"),
        ({"steps": 0}, "no steps: set `steps` or `epochs`"),
        ({"n": 0}, "n is 0: give a whole number of at least 1."),
        ({"n": -1}, "n is -1: give a whole number of at least 1."),
        ({"order": "random"}, "r.yaml: order must be one of given, shuffled"),
        ({"order": []}, "no steps"),
        ({"warmup": 6}, "`warmup` is 6, but the run has 6 steps: lower `warmup`"),
        ({"warmup": 2, "steps": 2}, "the run has 2 steps"),
        ({"batch_size": 9, "drop_last": True}, "larger than the number of examples 6"),
        ({"drop_last": "yes please"}, "drop_last must be true or false"),
        ({"order": [[0], [1]], "epochs": 2}, "`order` lists the batches, which are all the steps: leave out `epochs`"),
        ({"loss_per": "word"}, "r.yaml: loss_per is 'word'"),
    ],
)
def test_yaml_of_a_run_that_can_only_be_a_mistake_is_refused(tmp_path, fields, message):
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    path = write(tmp_path / "r.yaml", kind="microgpt", data="names.txt", **fields)
    with pytest.raises(FormatError, match=message):
        Recipe.from_yaml(path)


def test_yaml_warmup_may_last_until_the_last_step(tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    recipe = Recipe.from_yaml(write(tmp_path / "r.yaml", kind="microgpt", data="names.txt", warmup=5))
    assert recipe.rate(5, len(recipe.batches())) == recipe.optimizer.lr


def test_yaml_text_that_is_a_number_is_that_number(tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    text = "{kind: microgpt, data: names.txt, steps: %s, clip_norm: %s, optimizer: {lr: %s, eps: %s, betas: [0.9, %s]}}"
    as_text, as_number = tmp_path / "text.yaml", tmp_path / "number.yaml"
    as_text.write_text(text % ("'3'", "1e2", "1e-3", "1e-4", "99e-2"))
    as_number.write_text(text % ("3", "100.0", "0.001", "0.0001", "0.99"))
    recipe = Recipe.from_yaml(as_text)
    assert recipe.hash() == Recipe.from_yaml(as_number).hash()
    assert recipe.optimizer == OptimizerSettings("adamw", 0.001, betas=(0.9, 0.99), eps=0.0001)


def test_yaml_leaves_a_whole_number_whole_because_the_hash_tells_them_apart(tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    path = write(tmp_path / "r.yaml", kind="microgpt", data="names.txt", optimizer={"name": "sgd", "lr": 1})
    assert Recipe.from_yaml(path).hash() == Recipe.microgpt(NAMES, optimizer=OptimizerSettings("sgd", 1)).hash()


@pytest.mark.parametrize("model", ["./nowhere", "../nowhere", "/nowhere/at/all", "models/of/mine", "~/nowhere"])
def test_yaml_model_that_can_only_be_a_path_must_be_a_directory(tmp_path, model):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in ROWS))
    path = write(tmp_path / "r.yaml", kind="causal-lm", data="rows.jsonl", model=model)
    with pytest.raises(FormatError, match=f"There is no directory .*{model.removeprefix('./')}: correct `model`"):
        Recipe.from_yaml(path)


def test_yaml_model_is_a_directory_beside_the_recipe_or_a_name(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in ROWS))
    (tmp_path / "mine").mkdir()
    for model, wanted in (("./mine", tmp_path / "mine"), ("mine", tmp_path / "mine"), ("owner/name", "owner/name")):
        path = write(tmp_path / "r.yaml", kind="causal-lm", data="rows.jsonl", model=model)
        assert Recipe.from_yaml(path).model == str(wanted)


def test_yaml_lora_without_targets_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in ROWS))
    path = write(
        tmp_path / "r.yaml", kind="causal-lm", data="rows.jsonl", model="owner/name", trained={"lora": {"r": 8}}
    )
    with pytest.raises(FormatError, match="lora needs the field targets"):
        Recipe.from_yaml(path)


def test_causal_lm_without_a_model_and_custom_without_a_loss_are_refused():
    with pytest.raises(FormatError, match="needs `model`"):
        task_of(Recipe("causal-lm", tuple(Corpus.open(ROWS))))
    with pytest.raises(ValueError, match="needs `model`"):
        task_of(Recipe("custom", points()))


def test_a_model_that_lacks_weights_is_refused(tmp_path):
    """transformers would fill them with random numbers, with a warning at most."""
    tiny_gpt2(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(key for key in weights if key.endswith("ln_f.weight"))
    recipe = Recipe("causal-lm", tuple(Corpus.open(["ab"])), model=str(tmp_path), steps=1, batch_size=1)
    task_of(recipe)
    save_file(
        {key: value for key, value in weights.items() if key != name}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(FormatError, match=r"lacks the weights .*ln_f.weight.*: give a whole model"):
        task_of(recipe)


def test_a_recipe_prints_as_one_line():
    shown = repr(Recipe.microgpt(["ann", "abe", "bob"], steps=4))
    assert shown == "Recipe(microgpt: 3 examples, 3 units, 4 steps of paper-adam)"
