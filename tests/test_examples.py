"""Each example runs in a tiny form; what it calls actual is what an ordinary retraining gives."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from leaveout.deletion.predict import agreement
from leaveout.training.queries import query_losses
from leaveout.training.recipe import Recipe
from leaveout.training.train import train_plain
from readout.tiny import make_tokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    """Imports a script of the examples by name; the number of threads is put back afterwards."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


def test_names_predicts_documents_and_first_letters(script, capsys, monkeypatch):
    names = script("names")
    for name, fewer in (("PROBE_RUNS", (4, 16)), ("PROBE_STEPS", (2, 6))):  # prices may be rough here
        monkeypatch.setattr(f"leaveout.deletion.plan.{name}", fewer)
    documents, letters = names.main(["--n", "40", "--budget", "3"])
    recipe = Recipe.microgpt(names.HERE.joinpath("names.txt").read_text().split(), n=40)
    kept = torch.tensor([float(row.text[0] not in "st") for row in recipe.examples])
    actual = query_losses(recipe, train_plain(recipe, kept), names.QUERIES).double()
    where = letters.without.index("s, t")
    np.testing.assert_allclose(letters.actual[:, where], actual, rtol=1e-4)
    found = [agreement(v.effect, v.actual - v.base) for v in (letters, documents)]
    assert found[0]["spearman"] > 0.7 and found[1]["spearman"] > 0.5  # also over sets that the plan had retrained
    text = capsys.readouterr().out
    assert text.count("measuring: ") == 2 and "expected error" in text
    assert "95 % interval" in text and " inside" in text


def test_names_yaml_is_the_recipe_of_the_script(script):
    names = script("names")
    from_script = Recipe.microgpt((names.HERE / "names.txt").read_text().split(), n=200)
    assert Recipe.from_yaml(names.HERE / "names.yaml").hash() == from_script.hash()


def test_digits_predicts_images_writers_and_classes(script, capsys):
    pytest.importorskip("sklearn")
    digits = script("digits")
    found = digits.main(["--n", "200", "--retrain", "40"])
    assert [len(v.without) for v in found] == [5, 8 // 2 + 2, 15]
    assert found[0].summary()["sets"] >= 3
    for verification in found:
        summary = verification.summary()  # of few writers most sets were held out, so that they prove nothing
        assert summary["sets"] < 3 or summary["spearman"] > 0.6
        assert verification.inside.mean() >= 0.5
    assert "Without a share of a class" in capsys.readouterr().out


def test_finetune_predicts_sources(script, tmp_path, capsys):
    finetune = script("finetune")
    path = tmp_path / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model, tokenizer = LlamaForCausalLM(config), make_tokenizer()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    found = finetune.main(["--model", str(path), "--out", str(tmp_path / "run")])
    assert found.without[-5:] == ("sea=0.5", "farm=0.5", "bedtime=0.5", "kitchen=0.5", "rules=0.5")
    assert found.summary()["spearman"] > 0.7
    rows, queries = finetune.split(finetune.HERE / "finetune.jsonl")
    recipe = finetune.make_recipe(rows, str(path))
    kept = torch.tensor([0.0 if unit in ("sea", "farm", "bedtime") else 1.0 for unit in recipe.unit_names])
    actual = query_losses(recipe, train_plain(recipe, kept), queries).double()
    np.testing.assert_allclose(found.actual[:, 0], actual, rtol=1e-4)
    assert "learned most from" in capsys.readouterr().out
