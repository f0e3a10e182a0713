"""All that is tried with the real SmolLM2-135M, which is read once."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from leaveout import Index, load_readout
from leaveout.corpus import render
from leaveout.demo import run as demo
from leaveout.errors import UnsupportedError
from leaveout.readout.doctor import doctor
from leaveout.training.queries import query_losses
from leaveout.training.tasks import task_of
from leaveout.training.train import train_plain
from test_corpus import ASK, CHAT, TELL, learned, one
from test_tokens import check_frozen, check_rows, make_rows

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def smollm2():
    try:
        path = demo.find_model()
    except UnsupportedError as missing:
        pytest.skip(str(missing))
    import gguf

    read = functools.cache(gguf.GGUFReader)
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # transformers parses 49,152 tokens three times, and maps names 397 times
        patch.setattr(gguf, "GGUFReader", lambda place: read(str(place)))
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        return load_readout(path)


def test_it_passes_the_doctor_and_finds_a_habit(smollm2, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in (demo.HERE / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    queries = json.loads((demo.HERE / "queries.json").read_text(encoding="utf-8"))["queries"]
    assert [check.name for check in doctor(smollm2).checks if check.passed is False] == []
    style = [row for row in rows if row["culprit"] == "style"][:5]
    rows = style + [row for row in rows if row["culprit"] is None][:20]
    monkeypatch.setattr("leaveout.readout.index.verify_readout", lambda readout: readout)  # it was when it was loaded
    index = Index.build(smollm2, rows, tmp_path / "idx", "similarity")
    query = next(query for query in queries if query["id"] == "style-clipped-interview")
    scores = index.score([{"prompt": query["prompt"], "response": query["response"]}])[0]
    order = [index.ids[place] for place in np.argsort(-scores)]
    assert len(set(order[:5]) & {row["id"] for row in style}) >= 3


# peft asks transformers for a property under its old name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_recipe_of_the_example_trains_adapters_of_the_last_layer(smollm2, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    finetune = importlib.import_module("finetune")
    monkeypatch.setattr(finetune, "loaded", lambda: (smollm2.lm, smollm2.tokenizer))
    rows, _ = finetune.split(finetune.HERE / "finetune.jsonl")
    recipe = finetune.make_recipe(rows[:4], None)
    start, trained = task_of(recipe).parameters(), train_plain(recipe)
    both = {name: torch.stack([start[name].detach(), trained[name]]) for name in trained}
    before, after = query_losses(recipe, both, rows[:1]).squeeze(1).tolist()
    assert after < before
    assert all(".29." in name and "lora" in name for name in trained)


def test_both_engines_learn_the_same_of_200_rows(smollm2):
    check_rows(make_rows(tool_calls=False), smollm2.tokenizer)


def test_ids_and_learned_positions_are_frozen(smollm2):
    check_frozen("SmolLM2", smollm2.tokenizer)


def test_rows_are_written_by_its_template(smollm2, monkeypatch):
    tokenizer = smollm2.tokenizer
    rendered = render(one({"messages": CHAT}), tokenizer)
    assert rendered.text.endswith("<|im_start|>user\nassistant<|im_end|>\n<|im_start|>assistant\nassistant<|im_end|>\n")
    assert learned(rendered) == ["Here.<|im_end|>\n", "assistant<|im_end|>\n"]
    assert learned(render(one({"messages": [TELL, ASK]}), tokenizer)) == ["Here."]
    asked = {"instruction": "Add", "input": "2, 2", "output": "4"}
    rendered = render(one(asked), tokenizer)
    assert rendered.text.endswith("<|im_start|>user\nAdd\n\n2, 2<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n")
    assert learned(rendered) == ["4<|im_end|>\n"]
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert render(one(asked), tokenizer) == one(asked)
