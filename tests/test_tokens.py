"""A row is the same in both engines: ids, learned positions, special tokens, cuts and templates."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from leaveout.corpus import Corpus, render
from leaveout.corpus.tokens import in_order, tokens_of
from leaveout.errors import FormatError
from leaveout.readout.settings import PRESETS
from leaveout.readout.tokens import tokenise
from leaveout.training.examples import IGNORED
from leaveout.training.recipe import Recipe
from leaveout.training.tasks import task_of
from token_rows import characters, make_rows, make_tokenizer

KINDS = ("byte-level", "trimmed", "metaspace", "unigram", "wordpiece")
LONG = 4096


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: make_tokenizer(kind) for kind in KINDS}


def tiny_model(vocabulary=64, context=LONG):
    config = AutoConfig.for_model(
        "llama", vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=context, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def recipe_of(rows, tokenizer, max_tokens=LONG, context=LONG, **changes):
    def make():
        return tiny_model(len(tokenizer), context), tokenizer

    return Recipe("causal-lm", tuple(Corpus.open(rows)), model=make, max_tokens=max_tokens, **changes)


def by_recipe(task, row):
    """Token ids and learned positions by the training engine."""
    ids, labels = (part[0].tolist() for part in task.encode([row]))
    learned = [place for place, label in enumerate(labels) if label != IGNORED]
    assert all(labels[place] == ids[place] for place in learned)
    return ids, learned


def by_index(row, tokenizer, settings=PRESETS["default"]):
    """Token ids and learned positions by the readout engine, of windows cut small enough to matter."""
    tokens = tokenise(row, 0, tokenizer, replace(settings, window=64, stride=48), LONG)
    for window in tokens.windows:
        assert window.ids == tokens.ids[window.start : window.start + len(window.ids)]
    return tokens.ids, [window.start + place + 1 for window in tokens.windows for place in window.positions]


def check_rows(rows, tokenizer):
    task = task_of(recipe_of(rows, tokenizer))
    forms = set()
    for row in Corpus.open(rows):
        ids, learned = by_recipe(task, row)
        assert (ids, learned) == by_index(row, tokenizer), row.id
        written = render(row, tokenizer)
        bos, n = tokenizer.bos_token_id, sum(written.text.count(sign) for sign in (tokenizer.bos_token,))
        assert ids.count(bos) == max(n, 1 if tokenizer("a").input_ids[0] == bos else 0), row.id
        where = characters(tokenizer, ids, written.text)
        wanted = [
            place
            for place, span in enumerate(where)
            if place and span and any(span[0] < end and span[1] > start for start, end in written.responses)
        ]
        assert learned == wanted, row.id
        forms.add(row.form)
    assert forms == {"text", "prompt", "instruction", "messages"}


@pytest.mark.parametrize("kind", KINDS)
def test_both_engines_learn_the_same_of_200_rows(kind, tokenizers):
    check_rows(make_rows(), tokenizers[kind])


def test_trimmed_offsets_change_nothing(tokenizers):
    for row in Corpus.open(make_rows()):
        found = [tokens_of(row, tokenizers[kind]) for kind in ("byte-level", "trimmed")]
        assert found[0] == found[1], row.id


FROZEN = json.loads((Path(__file__).parent / "golden" / "tokens.json").read_text())


def check_frozen(name, tokenizer):
    from readout.conftest import RAW

    task = task_of(recipe_of(["some text"], tokenizer))
    for entry in FROZEN[name]:
        (row,) = Corpus.open([RAW[entry["row"]]])
        assert row.content_hash == entry["hash"]
        assert by_recipe(task, row) == by_index(row, tokenizer) == (entry["ids"], entry["learned"])


@pytest.mark.parametrize("bos", [True, False])
def test_ids_and_learned_positions_are_frozen(bos):
    from readout.tiny import make_tokenizer as make_tiny

    check_frozen("tiny with <s>" if bos else "tiny without <s>", make_tiny(bos))


# Special tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("<s>the miller asked", "the miller asked"),
        ("the miller asked</s>", "the miller asked"),
        ("<s>the miller asked</s>", "the miller asked"),
    ],
)
def test_special_tokens_that_the_text_has_are_not_added_again(kind, given, plain, tokenizers):
    tokenizer = tokenizers[kind]
    task = task_of(recipe_of([plain], tokenizer))
    for row in Corpus.open([given]):
        ids, learned = by_recipe(task, row)
        assert (ids, learned) == by_index(row, tokenizer)
        assert ids.count(0) <= 1 and ids.count(1) <= 1
    [alone] = Corpus.open([plain])
    own = by_recipe(task, alone)[0]
    if own[0] == 0 and own[-1] == 1:  # the tokenizer adds both
        assert ids == own
    if given.endswith("</s>"):
        assert len(ids) - 1 in learned  # of the text, so that it is learned
    assert (len(own) - 1 in by_recipe(task, alone)[1]) == (own[-1] != 1)  # added, so that it is not


@pytest.mark.parametrize("kind", KINDS)
def test_a_rendered_chat_given_as_text_has_the_ids_of_the_chat(kind, tokenizers):
    tokenizer = tokenizers[kind]
    [chat] = Corpus.open([{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]}])
    rendered = render(chat, tokenizer)
    start, _ = rendered.responses[0]
    [text] = Corpus.open([{"prompt": rendered.text[:start], "response": rendered.text[start:]}])
    task = task_of(recipe_of(["text"], tokenizer))
    assert by_recipe(task, text) == by_recipe(task, chat) == by_index(text, tokenizer) == by_index(chat, tokenizer)


# Offsets


@pytest.mark.parametrize(
    ("offsets", "length", "wanted"),
    [
        ([(0, 3), (3, 5)], 5, [(0, 3), (3, 5)]),
        ([(0, 3), (7, 7), (7, 9)], 9, [(0, 3), (3, 7), (7, 9)]),  # spaces, trimmed
        ([(0, 3), (3, 3), (7, 7), (7, 9)], 9, [(0, 3), (3, 7), (3, 7), (7, 9)]),
        ([(0, 3), (3, 3)], 4, [(0, 3), (3, 4)]),  # a newline at the end
        ([(0, 0), (0, 4)], 4, [(0, 4), (0, 4)]),  # the space that a tokenizer puts before the first word
        ([(0, 2), (2, 2), (2, 2), (2, 3)], 3, [(0, 2), (2, 3), (2, 3), (2, 3)]),  # bytes of one character
        ([(0, 2), (2, 3), (3, 3)], 3, [(0, 2), (2, 3), (2, 3)]),
        ([(0, 1), (0, 1), (0, 1), (1, 2)], 2, [(0, 1), (0, 1), (0, 1), (1, 2)]),
        ([(0, 3), (9, 12), (3, 6), (6, 9)], 9, [(0, 3), (3, 6), (3, 6), (6, 9)]),  # out of order
        ([(0, 3), (6, 4), (6, 9)], 9, [(0, 3), (3, 6), (6, 9)]),  # turned round
        ([(2, 2)], 4, [(0, 4)]),
        ([], 4, []),
    ],
)
def test_empty_offsets_get_the_gap_between_their_neighbours(offsets, length, wanted):
    assert in_order(offsets, length) == wanted


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=12))
def test_no_offset_stays_empty(offsets):
    found = in_order(offsets, 31)
    assert all(0 <= start < end <= 31 for start, end in found) and len(found) == len(offsets)
    ordered = sorted(pair for pair in offsets if pair[0] < pair[1])
    assert in_order(ordered, 31) == ordered


class Untidy:
    """A tokenizer whose offsets lack the characters of some tokens."""

    is_fast, chat_template = True, None

    def __init__(self, tokenizer, lost):
        self.tokenizer, self.lost = tokenizer, lost

    def __call__(self, text, **options):
        found = dict(self.tokenizer(text, **options))
        pieces = self.tokenizer.convert_ids_to_tokens(found["input_ids"])
        found["offset_mapping"] = [
            (end, end) if self.lost(piece) else (start, end)
            for piece, (start, end) in zip(pieces, found["offset_mapping"], strict=True)
        ]
        return found


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
def test_tokens_without_characters_are_learned_with_their_response(kind, tokenizers):
    tokenizer = tokenizers[kind]
    [row] = Corpus.open([{"prompt": "if x:", "response": "\n        return  1\n"}])
    untidy = Untidy(tokenizer, lambda piece: not piece.strip("ĠĊ\u2581\n"))
    assert tokens_of(row, untidy).learned == tokens_of(row, tokenizer).learned
    assert len(tokens_of(row, untidy).learned) > 4


# Cuts


def test_examples_are_cut_and_queries_are_not(tokenizers):
    tokenizer, text = tokenizers["byte-level"], " ".join(["the miller asked for flour"] * 9)
    recipe = recipe_of([text, "the gate"], tokenizer, max_tokens=12)
    task = task_of(recipe)
    whole = by_index(recipe.examples[0], tokenizer)[0]
    assert by_recipe(task, recipe.examples[0])[0] == whole[:12]
    assert task.encode_queries([recipe.examples[0]])[0][0].tolist() == whole
    assert task.cut is not None and [task.cut(row) for row in recipe.examples] == [len(whole) - 12, 0]
    found = tokens_of(recipe.examples[0], tokenizer, limit=12)
    assert found.cut == len(whole) - 12 and found.learned == list(range(1, 12))


def test_a_query_beyond_the_context_is_refused_with_both_numbers(tokenizers):
    tokenizer, text = tokenizers["byte-level"], " ".join(["the miller asked for flour"] * 9)
    n = len(tokenizer(text).input_ids)
    task = task_of(recipe_of(["the gate", text], tokenizer, max_tokens=n, context=n))
    assert task.encode_queries([text])[0].shape == (1, n)
    task = task_of(recipe_of(["the gate", text], tokenizer, max_tokens=12, context=n - 1))
    with pytest.raises(FormatError, match=rf"^The query 'the miller .*' has {n} tokens, .* at most {n - 1}: ask a"):
        task.encode_queries([text])
    task = task_of(recipe_of(["the gate", text], tokenizer, max_tokens=n, context=n - 1))
    with pytest.raises(FormatError, match=rf"has {n} tokens within max_tokens = {n}, .* set max_tokens to {n - 1} or"):
        task.encode([text])


def test_a_long_query_of_microgpt_is_refused():
    recipe = Recipe.microgpt(["abc", "a" * 20, "cab"], n=3)
    task = task_of(recipe)
    assert task.cut is not None and sorted(task.cut(row) for row in recipe.examples) == [0, 0, 5]
    assert task.encode_queries(["a" * 15])[0].shape == (1, 16)
    with pytest.raises(FormatError, match=r"has 17 characters with its end, but the model reads at most 16: ask a sh"):
        task.encode_queries(["a" * 16])


def test_microgpt_learns_and_is_asked_no_prompt():
    recipe = Recipe.microgpt(["abc", "cab", *Corpus.open([{"prompt": "ab", "completion": "ca"}])], n=3)
    task = task_of(recipe)
    ids, targets = task.encode_queries([{"prompt": "ab", "completion": "ca"}, {"text": "abca"}])
    assert torch.equal(ids[0], ids[1]) and targets.tolist() == [[IGNORED, IGNORED, 2, 0, 3], [0, 1, 2, 0, 3]]
    row = next(row for row in recipe.examples if row.form == "prompt")
    assert torch.equal(task.encode([row])[1], targets[:1])
    logits = torch.log_softmax(task.model(ids[:1])[0], -1)
    wanted = -logits[[2, 3, 4], [2, 0, 3]].mean()
    assert torch.allclose(task.loss(task.model, (ids[:1], targets[:1])), wanted)
    long = "a" * 16
    with pytest.raises(
        FormatError, match="has nothing to learn in the 16 characters that the model reads: shorten its p"
    ):
        task.encode(list(Corpus.open([{"prompt": long, "completion": "bc"}])))


def test_an_example_whose_response_is_cut_off_is_refused(tokenizers):
    recipe = recipe_of([{"prompt": "the miller " * 9, "response": "came"}], tokenizers["byte-level"], max_tokens=5)
    with pytest.raises(
        FormatError, match=r"has no token to learn \(it is cut after 5 of \d+ tokens\): raise that limit"
    ):
        task_of(recipe).encode(recipe.examples)
