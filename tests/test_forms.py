"""Forms of rows and queries, templates, and rows as they came: on the command line and from Python."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from command import run_command
from leaveout import Index, Recipe
from leaveout.corpus import Corpus, render
from leaveout.corpus.chat import chosen_template
from leaveout.corpus.rows import asked_row, in_words
from leaveout.errors import FormatError, MismatchError
from leaveout.readout.opened import row_of
from leaveout.training.queries import Query
from readout.tiny import CHAT, TEXTS, make_model, make_tokenizer

OTHER = CHAT.replace("<|{{ message['role'] }}|>", "{{ message['role'] }}: ").replace("<|assistant|>", "assistant: ")
ROWS = [
    {"instruction": "Where did it leave?", "input": "", "output": TEXTS[0], "score": 3, "tags": ["b", "a"]},
    {"instruction": "What conducts heat?", "output": TEXTS[1], "score": None},
    {"instruction": "Which numbers?", "input": "1, 2", "output": TEXTS[3]},
    {"id": "chat", "messages": [{"role": "user", "content": TEXTS[5]}, {"role": "assistant", "content": TEXTS[7]}]},
    {"id": 7, "text": TEXTS[2]},
]
ASKED = {"instruction": "What conducts heat?", "output": "Copper does."}


@pytest.fixture(scope="module")
def model():
    return make_model("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def index(model, tmp_path_factory):
    return Index.build(model, ROWS, tmp_path_factory.mktemp("forms") / "idx", "similarity", make_tokenizer())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with a saved model, rows and a template."""
    path = tmp_path_factory.mktemp("saved")
    make_model("llama").float().save_pretrained(path / "model")
    make_tokenizer().save_pretrained(path / "model")
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (path / "other.jinja").write_text(OTHER)
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    return lambda *arguments: run_command(monkeypatch, capsys, *arguments)


# Queries


@pytest.mark.parametrize(
    ("prompt", "form", "wanted"),
    [
        (None, None, {"text": " Bergen"}),
        ("Where? ", None, {"prompt": "Where? ", "response": " Bergen"}),
        ("Where?", "text", {"text": "Where? Bergen", "prompt_text": "Where?"}),
        ("Where?", "instruction", {"instruction": "Where?", "output": "Bergen"}),
        ("Where?", "messages", {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Bergen"}]}),
        (None, "messages", {"messages": [{"role": "assistant", "content": "Bergen"}]}),
    ],
)  # fmt: skip
def test_a_question_becomes_a_row_of_a_form(prompt, form, wanted):
    assert asked_row(" Bergen", prompt, form) == wanted


def test_an_unknown_form_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"there is no form 'instruct'.*instruction"):
        asked_row("a", "b", "instruct")


def test_questions_take_the_commonest_form_of_an_index(index):
    assert index.forms == {"instruction": 3, "messages": 1, "text": 1} == index.info()["forms"]
    assert index.ask("What conducts heat?", "Copper does.") == ASKED
    assert index.ask(None, "Copper does.") == {"text": "Copper does."}
    assert index.ask("a", "b", "prompt") == {"prompt": "a", "response": "b"}


def test_questions_take_the_commonest_form_of_a_recipe(saved):
    recipe = Recipe("causal-lm", tuple(Corpus.open(ROWS)), model=str(saved / "model"))
    assert recipe.forms == {"instruction": 3, "messages": 1, "text": 1}
    assert recipe.ask("What conducts heat?", "Copper does.") == ASKED


def test_commands_say_the_form_they_ask_in(run, saved, tmp_path):
    assert run("index", saved / "model", saved / "rows.jsonl", "--out", tmp_path / "idx")[0] == 0
    (tmp_path / "asked.jsonl").write_text(json.dumps(ASKED))
    words = ("--prompt", ASKED["instruction"], "--query", ASKED["output"])

    def scores(*options):
        code, out, err = run("search", tmp_path / "idx", *options, "--json")
        assert code == 0
        return {hit["id"]: hit["score"] for hit in json.loads(out)["hits"]}, err

    found, err = scores(*words)
    assert "leaveout: asked as an instruction row, the commonest form of its rows; --form overrides\n" in err
    assert found == scores("--queries", tmp_path / "asked.jsonl")[0]
    plain, err = scores(*words, "--form", "prompt")
    assert "asked as" not in err and plain != found
    assert scores("--query", ASKED["output"])[0] == scores("--query", ASKED["output"], "--form", "text")[0]
    code, out, err = run("explain", tmp_path / "idx", *words, "--id", "chat", "--json")
    assert code == 0 and "asked as an instruction row" in err
    largest = max(found.values())  # rows are rounded as a whole
    assert json.loads(out)["score"] == pytest.approx(found["chat"], abs=0.02 * largest)
    assert json.loads(out)["stored_score"] == pytest.approx(found["chat"], abs=1e-4 * largest)
    code, _, err = run("search", tmp_path / "idx", "--queries", tmp_path / "asked.jsonl", "--form", "text")
    assert code == 2 and "--form goes with --query" in err


def test_predictions_ask_in_the_commonest_form(run, saved, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        f"kind: causal-lm\ndata: {saved / 'rows.jsonl'}\nmodel: {saved / 'model'}\nbatch_size: 2\nmax_tokens: 40\n"
        "optimizer: {name: sgd, lr: 0.001}\n"
    )
    code, _, err = run("train", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    assert code == 0
    cut = "rows are longer than max_tokens = 40 and are cut there"
    assert cut in err and err.index(cut) < err.index("train:")
    assert cut in run("info", tmp_path / "run")[1]
    run("measure", tmp_path / "run", "--retrain", "2", "--design", "singles", "--heldout", "2")
    words = ("--prompt", ASKED["instruction"], "--query", ASKED["output"], "--without", "chat", "--json")
    code, out, err = run("predict", tmp_path / "run", *words)
    assert code == 0 and "asked as an instruction row" in err
    (tmp_path / "asked.jsonl").write_text(json.dumps(ASKED))
    _, same, _ = run("predict", tmp_path / "run", "--queries", tmp_path / "asked.jsonl", "--without", "chat", "--json")
    found, same = map(json.loads, (out, same))
    assert found == same and found["query"] == "What conducts heat? Copper does."
    _, other, err = run("predict", tmp_path / "run", *words, "--form", "prompt")
    assert "asked as" not in err and json.loads(other) != found


# Templates


def test_template_is_part_of_an_index(model, tmp_path):
    build = lambda **options: Index.build(model, ROWS, tmp_path / "idx", "similarity", make_tokenizer(), **options)  # noqa: E731
    found = build()
    assert found.settings.template == CHAT and found.records(["chat"])[0].text.startswith("<s><|user|>")
    assert build(template=CHAT).settings.template == CHAT  # the same, so that the index is opened again
    for other in (OTHER, "none"):
        with pytest.raises(MismatchError, match="holds an index with another chat template: use the same settings"):
            build(template=other)


@pytest.mark.parametrize("template", ["none", OTHER])
def test_rows_and_queries_are_rendered_by_the_chosen_template(template, model, tmp_path):
    tokenizer = make_tokenizer()
    found = Index.build(model, ROWS, tmp_path / "idx", "similarity", tokenizer, template=template)
    for row, record in zip(Corpus.open(ROWS), found.records(found.ids), strict=True):
        assert record.text == render(row, tokenizer, template).text and record.content_hash == row.content_hash
        assert found.tokenised([row])[0].ids == found.tokenised([row_of(record)])[0].ids
    plain = {"prompt": "### Instruction:\nWhat conducts heat?\n\n### Response:\n", "response": "Copper does."}
    same = np.array_equal(found.score([ASKED]), found.score([plain]))
    assert same == (template == "none")
    again = Index.open(tmp_path / "idx", model, tokenizer)
    assert np.array_equal(again.score([ASKED]), found.score([ASKED]))


def test_a_template_is_a_name_a_file_or_none(tmp_path):
    tokenizer = make_tokenizer()
    (tmp_path / "own.jinja").write_text(OTHER)
    assert chosen_template(None, tokenizer) == chosen_template("default", tokenizer) == CHAT
    assert chosen_template(tmp_path / "own.jinja", tokenizer) == OTHER == chosen_template(OTHER, tokenizer)
    assert chosen_template("none", tokenizer) == "none"
    tokenizer.chat_template = {"default": CHAT, "tool_use": OTHER}
    assert chosen_template("tool_use", tokenizer) == OTHER
    assert chosen_template(None, tokenizer) == {"default": CHAT, "tool_use": OTHER}
    with pytest.raises(MismatchError, match=r"no chat template named 'tools': give tool_use or .*default"):
        chosen_template("tools", tokenizer)
    (row,) = Corpus.open([ASKED])
    assert render(row, tokenizer).text.startswith("<s><|user|>")
    tokenizer.chat_template = None
    assert chosen_template(None, tokenizer) == "none" and render(row, tokenizer) == row


def test_a_file_that_is_no_template_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    with pytest.raises(FormatError, match=r"There is no template .*gone.jinja: give a Jinja file, the name"):
        chosen_template(tmp_path / "gone.jinja", tokenizer)
    (tmp_path / "words.txt").write_text("no template")
    with pytest.raises(FormatError, match=r"words.txt is not a Jinja template"):
        chosen_template(tmp_path / "words.txt", tokenizer)
    with pytest.raises(FormatError, match=r"The chat template is not Jinja \("):
        chosen_template("{% for message in messages %}", tokenizer)


USER, HELPER = ({"role": role, "content": said} for role, said in (("user", "Where?"), ("assistant", "Here.")))
TURN = "<|{{ message.role }}|>{{ message.content }}</s>"
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
EACH = "{% for message in messages %}" + TURN + "{% endfor %}"


def learned(template, messages):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    rendered = render(next(iter(Corpus.open([{"messages": messages}]))), tokenizer)
    return rendered.text, [rendered.text[start:end] for start, end in rendered.responses]


@pytest.mark.parametrize("written", ["strftime_now('%d %b %Y')", 'strftime_now( format="%d %b %Y" )'])
def test_a_row_is_the_same_on_every_day(written):
    template = "{% if strftime_now is defined %}{{ " + written + " }}{% endif %}" + EACH + PROMPT
    text, said = learned(template, [USER, HELPER])
    assert text == "26 Jul 2024<|user|>Where?</s><|assistant|>Here.</s>" and said == ["Here.</s>"]


def test_the_day_is_fixed_in_named_templates_and_in_what_is_kept():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": EACH, "dated": "{{ strftime_now('%Y') }}" + EACH}
    chosen = chosen_template("dated", tokenizer)
    assert chosen == "{{ '2024' }}" + EACH == chosen_template(chosen, tokenizer)
    assert chosen_template(None, tokenizer) == {"default": EACH, "dated": chosen}


def test_a_template_that_works_out_the_form_of_the_date_is_refused():
    with pytest.raises(FormatError, match="would change from day to day"):
        learned("{% set form = '%Y' %}{{ strftime_now(form) }}" + EACH, [USER, HELPER])


@pytest.mark.parametrize("turns", [[USER, HELPER], [USER, HELPER, USER, HELPER], [USER, HELPER, HELPER]])
def test_a_generation_prompt_behind_every_chat_is_not_learned(turns):
    text, said = learned(EACH + "<|assistant|>", turns)
    assert text.endswith("Here.</s><|assistant|>")
    assert said == ["Here."] * turns.count(HELPER)


def test_without_any_generation_prompt_the_end_of_a_turn_is_learned():
    assert learned(EACH, [USER, HELPER])[1] == ["<|assistant|>Here.</s>"]
    alternating = "{% for message in messages %}{% if (message.role == 'user') == (loop.index is even) %}"
    alternating += "{{ raise_exception('turns alternate') }}{% endif %}" + TURN + "{% endfor %}"
    assert learned(alternating, [USER, HELPER, USER, HELPER])[1] == ["<|assistant|>Here.</s>"] * 2


def test_generation_blocks_say_what_is_learned():
    block = "{%- generation -%}{{ message.content }}!{% endgeneration %}"
    template = EACH.replace(
        TURN, "<|{{ message.role }}|>{% if message.role == 'assistant' %}" + block + "</s>{% endif %}"
    )
    calls = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
    turns = [HELPER, USER, {"role": "assistant", "content": None, "tool_calls": calls}, HELPER]
    text, said = learned(template, turns)
    assert said == ["Here.!", "!", "Here.!"]
    assert text == "<|assistant|>Here.!</s><|user|><|assistant|>!</s><|assistant|>Here.!</s>"


def test_thoughts_that_earlier_turns_lose():
    own = "{% if message.role == 'assistant' %}{% set parts = message.content.split('</t>') %}"
    own += "{% if loop.last %}<t>{{ parts[:-1] | join | replace('<t>', '') }}</t>{% endif %}{{ parts[-1] }}"
    template = EACH.replace(TURN, "<|{{ message.role }}|>" + own + "{% else %}{{ message.content }}{% endif %}</s>")
    thought = {"role": "assistant", "content": "<t>hm</t>Here."}
    text, said = learned(template + PROMPT, [USER, thought, USER, thought])
    assert said == ["Here.", "<t>hm</t>Here.</s>"]
    assert text == "<|user|>Where?</s><|assistant|>Here.</s><|user|>Where?</s><|assistant|><t>hm</t>Here.</s>"


@pytest.mark.parametrize("written", ["message.content[0].text", "message.content[-1]['text']"])
def test_no_part_of_a_content_is_lost(written):
    template = EACH.replace("message.content", f"message.content if message.content is string else {written}")
    parts = [{"type": "text", "text": text} for text in ("In the ", "mill.")]
    said = learned(template + PROMPT, [USER, {"role": "assistant", "content": parts}])[1]
    assert said == ["In the mill.</s>"]


def test_template_is_part_of_a_recipe(saved, tmp_path):
    text = f"kind: causal-lm\ndata: {saved / 'rows.jsonl'}\nmodel: {saved / 'model'}\n"
    (tmp_path / "own.jinja").write_text(OTHER)
    recipes = {}
    for name in ("null", "none", "own.jinja"):
        (tmp_path / "recipe.yaml").write_text(text + f"template: {name}\n")
        recipes[name] = Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert recipes["own.jinja"].template == OTHER and recipes["none"].template == "none"
    assert len({recipe.hash() for recipe in recipes.values()}) == 3
    (tmp_path / "own.jinja").write_text(OTHER + "{# changed #}")
    (tmp_path / "recipe.yaml").write_text(text + "template: own.jinja\n")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml").hash() != recipes["own.jinja"].hash()
    with pytest.raises(ValueError, match="only a causal-lm recipe has template, not a microgpt recipe"):
        Recipe.microgpt(["abc", "cab"], n=2, template="none")


# Rows as they came


def test_ids_are_alike_in_both_engines(index, saved):
    twice = [*ROWS, ROWS[0], ROWS[0]]
    recipe = Recipe("causal-lm", tuple(Corpus.open(twice)), model=str(saved / "model"))
    assert list(recipe.ids[: len(ROWS)]) == index.ids and len(set(recipe.ids)) == len(twice)
    assert recipe.ids[-2:] == (f"{index.ids[0]}-2", f"{index.ids[0]}-3") == recipe.units[-2:]
    with pytest.raises(
        FormatError, match="The id 'chat' of row 6 is that of an earlier row: give every row its own id"
    ):
        replace(recipe, examples=tuple(Corpus.open([*ROWS, ROWS[3]])), units=())


def test_digest_of_a_query_is_that_of_its_fields(saved):
    (row,) = Corpus.open([ASKED])
    rendered = render(row, make_tokenizer())
    assert rendered.text != row.text
    assert Query(row).digest == Query(ASKED).digest == Query(rendered).digest == Query(ASKED | {"id": "x"}).digest
    assert Query(row.text).digest != Query(row).digest != Query(row, "margin").digest
    assert Query(ASKED | {"input": "x"}).digest != Query(row).digest


def test_records_and_hits_have_the_rows_as_they_came(index):
    assert [record.row for record in index.records(index.ids)] == ROWS
    assert {json.dumps(hit.row) for hit in index.search([ASKED], k=5)[0]} == {json.dumps(row) for row in ROWS}


def test_selected_rows_are_written_as_they_came(run, saved, tmp_path):
    assert run("index", saved / "model", saved / "rows.jsonl", "--out", tmp_path / "idx")[0] == 0
    out = tmp_path / "best.jsonl"
    code, _, err = run("select", tmp_path / "idx", "--wanted", saved / "rows.jsonl", "-n", "5", "--out", out)
    assert code == 0 and "the rows have a field `score` of their own, so the new one is `leaveout_score`" in err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    scores = [line.pop("leaveout_score") for line in lines]
    assert scores == sorted(scores, reverse=True)
    assert sorted(map(json.dumps, lines)) == sorted(map(json.dumps, ROWS))


def test_a_purge_takes_the_rows_as_they_came_too(model, tmp_path):
    secret = 'a "quoted" secret\nthat JSON writes otherwise'
    rows = [*ROWS, {"id": "gone", "text": "x", "note": {"deep": [secret]}}]
    found = Index.build(
        model, [*rows, {"text": "later"}], tmp_path / "idx", "similarity", make_tokenizer(), template="none"
    )
    raw = json.dumps(rows[-1]["note"]).encode()
    stored = (tmp_path / "idx" / "catalogue.sqlite").read_bytes
    assert raw in stored()
    found.delete(["gone"])
    assert found.purge()["rows"] == 1 and raw not in stored() and found.check() == []
    appended = found.append([{"id": "new", "text": "one more", "n": 1}])
    assert appended.added == 1 and found.records(["new"])[0].row == {"id": "new", "text": "one more", "n": 1}


def test_merged_indexes_keep_the_rows(index, model, tmp_path):
    more = [{"id": "more", "instruction": "Say it", "output": TEXTS[4], "n": 1}]
    other = Index.build(model, more, tmp_path / "other", "similarity", make_tokenizer())
    merged = Index.merge([index.path, other.path], tmp_path / "merged")
    assert merged.records(["more"])[0].row == more[0] and merged.forms["instruction"] == 4
    assert Path(merged.path).is_dir()


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"prompt": "Capital of Norway?", "response": "Oslo"}, "Capital of Norway? Oslo"),
        ({"prompt": "Capital of Norway?", "response": " Oslo"}, "Capital of Norway? Oslo"),
        ({"text": "Bergen", "prompt_text": "Ber"}, "Bergen"),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add. 1 2 3"),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}, "Hi Hello."),
        ({"prompt": "Who?", "chosen": " Ann", "rejected": " Bob"}, "Who? Ann rather than Bob"),
    ],
)
def test_a_row_in_words_is_what_a_person_would_quote(raw, words):
    (row,) = Corpus.open([raw])
    assert in_words(row) == words and Query(raw).name == words
