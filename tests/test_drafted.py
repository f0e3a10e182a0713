"""A recipe drafted from an index: it trains, says what nobody said, and is refused before anything is written."""

import json

import pytest
import torch
import transformers

from command import run_command
from jets.test_recipe import tiny_gpt2
from leaveout import Corpus, FormatError, Index, Recipe, TrainingRun, UnsupportedError, draft_recipe
from leaveout.deletion.measurements import MeasureSettings

WORDS = ("ann", "abe", "bob", "cy", "dee", "eve", "fay", "gus")
ROWS = [{"id": w, "prompt": f"say {w}: ", "completion": f"{w} {w}", "source": w[0] > "b"} for w in WORDS]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_gpt2(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def indexes(base, tmp_path_factory):
    """The rows indexed by the model that was trained on them, by targets."""
    place = tmp_path_factory.mktemp("indexes")
    for targets in ("response", "all"):
        Index.build(str(base), ROWS, place / targets, "similarity", targets=targets, units="source")
    return place


def test_a_drafted_recipe_is_the_run_that_was_told_and_can_be_measured(indexes, base, tmp_path):
    told = {"model": str(base), "lr": 0.01, "epochs": 2, "batch_size": 2, "optimizer": "sgd", "schedule": "constant"}
    written = draft_recipe(indexes / "response", tmp_path / "new" / "recipe.yaml", **told)
    recipe = Recipe.from_yaml(written)
    rows = tuple(Corpus.open(ROWS, units="source"))
    by_hand = Recipe(
        "causal-lm", rows, template="none", model=str(base), batch_size=2, epochs=2, optimizer=recipe.optimizer,
        schedule="constant", clip_norm=1.0, loss_per="token", order="shuffled", seed=42, max_tokens=recipe.max_tokens,
    )  # fmt: skip
    assert recipe.difference(by_hand.digests()) == ""
    assert recipe.optimizer.name == "sgd" and recipe.optimizer.lr == 0.01 and len(recipe.unit_names) == 2
    unsaid = [line.split(":")[0] for line in written.read_text().splitlines() if "not said" in line.partition("#")[2]]
    assert unsaid[1:] == ["trained", "max_tokens", "optimizer", "accumulate", "clip_norm", "loss_per", "order", "seed"]
    run = TrainingRun.train(written, tmp_path / "run")
    run.measure(retrain=2, design="singles", settings=MeasureSettings(check=False))
    effect = run.predict([ROWS[0]], [["true"]])
    assert effect.std[0, 0] < 0.1 * abs(effect.effect[0, 0])


def test_rows_that_are_learned_whole_are_written_as_their_texts(indexes, tmp_path):
    recipe = Recipe.from_yaml(draft_recipe(indexes / "all", tmp_path / "recipe.yaml", epochs=1))
    assert recipe.examples[0].text == "say ann: ann ann"
    assert "the index's own model" in (tmp_path / "recipe.yaml").read_text()


def test_preference_rows_stay_pairs_whatever_was_learned_of_them(base, tmp_path):
    rows = [{"id": w, "prompt": f"say {w}: ", "chosen": w, "rejected": "no"} for w in WORDS[:3]]
    for targets in ("response", "all"):
        Index.build(str(base), rows, tmp_path / targets, "similarity", targets=targets)
        written = draft_recipe(
            tmp_path / targets, tmp_path / f"of {targets}" / "recipe.yaml", model=str(base), epochs=1
        )
        recipe = Recipe.from_yaml(written)
        assert recipe.loss["kind"] == "dpo" and [e.raw["rejected"] for e in recipe.examples] == ["no"] * 3


@pytest.mark.filterwarnings("ignore")
def test_the_adapter_of_an_index_says_what_was_trained(base, tmp_path):
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    Index.build(str(tmp_path / "adapter"), ROWS, tmp_path / "idx", "similarity")
    recipe = Recipe.from_yaml(draft_recipe(tmp_path / "idx", tmp_path / "recipe.yaml"))
    assert recipe.trained == {"lora": {"r": 2, "alpha": 4, "targets": ["c_attn"]}} and recipe.model == str(base)


def test_what_no_recipe_can_be_drafted_from_is_refused_and_nothing_is_left(indexes, base, tmp_path):
    out = tmp_path / "recipe.yaml"
    for said, error, sentence in (
        ({"rate": 1.0}, TypeError, "'rate'"),
        ({"optimizer": "adafactor"}, UnsupportedError, "no optimizer 'adafactor'"),
        ({"units": "author"}, FormatError, "author"),
    ):
        with pytest.raises(error, match=sentence):
            draft_recipe(indexes / "response", out, **said)
    TrainingRun.train(Recipe.microgpt(WORDS, n=4), tmp_path / "run")
    with pytest.raises(FormatError, match="is not an index: draft a recipe from the directory of one"):
        draft_recipe(tmp_path / "run" / "bank", out)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(base), transformers.AutoTokenizer.from_pretrained(base)
    Index.build(loaded[0], ROWS[:3], tmp_path / "memory", "similarity", loaded[1])
    with pytest.raises(UnsupportedError, match="built with a model in memory: say which model"):
        draft_recipe(tmp_path / "memory", out)
    assert not out.exists() and not (tmp_path / "rows.jsonl").exists()
    out.write_text("mine")
    with pytest.raises(FileExistsError, match="is there already"):
        draft_recipe(indexes / "response", out)


def test_rows_without_a_text_are_refused(indexes, tmp_path, monkeypatch):
    from leaveout.store import Store
    from leaveout.store.catalogue import Record

    kept = Store.iter_rows
    bare = lambda store: (Record(r.id, "", r.unit, r.meta, r.content_hash, r.extra) for r in kept(store))  # noqa: E731
    monkeypatch.setattr(Store, "iter_rows", bare)
    with pytest.raises(FormatError, match="has no text of the row 'ann': build it again"):
        draft_recipe(indexes / "response", tmp_path / "recipe.yaml")


def test_the_command_says_what_was_not_said(indexes, base, tmp_path, monkeypatch, capsys):
    asked = (
        "recipe",
        indexes / "response",
        "--out",
        tmp_path / "recipe.yaml",
        "--model",
        base,
        "--lora",
        "c_attn,c_proj",
    )
    code, out, _ = run_command(monkeypatch, capsys, *asked, "--lora-r", "2", "--lr", "1e-3", "--json")
    found = json.loads(out)
    assert code == 0 and "optimizer" in found["not said"] and "trained" not in found["not said"]
    recipe = Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert recipe.trained == {"lora": {"r": 2, "alpha": 16, "targets": ["c_attn", "c_proj"]}}
    code, _, told = run_command(monkeypatch, capsys, *asked)
    assert code == 1 and "is there already" in told


def test_rows_that_are_longer_than_the_model_reads_are_cut_where_it_ends(base, tmp_path):
    rows = [*ROWS, {"id": "long", "prompt": "say all: ", "completion": " ".join(WORDS) * 2}]
    Index.build(str(base), rows, tmp_path / "idx", "similarity")
    written = draft_recipe(tmp_path / "idx", tmp_path / "recipe.yaml", epochs=1)
    assert "max_tokens: 32  # not said: what the model reads; 1 row is longer, and is cut" in written.read_text()
    TrainingRun.train(written, tmp_path / "run")
