"""Rows to windows: which tokens are learned, the beginning of sequence, and the laws of cutting."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leaveout.corpus import render
from leaveout.errors import FormatError, MismatchError, UnsupportedError
from leaveout.readout.settings import Channel, SignatureSettings, resolve_settings
from leaveout.readout.tokens import check_ids, cut_windows, tokenise

from .conftest import RAW
from .oracle import target_places, windows_of
from .tiny import TEXTS, make_tokenizer, rows_of

RESPONSE, ALL = resolve_settings("default"), resolve_settings("default", targets="all")


def learned_places(tokens):
    return [window.start + position + 1 for window in tokens.windows for position in window.positions]


def tokens_of(raw, tokenizer, settings=RESPONSE):
    return tokenise(rows_of([raw])[0], 0, tokenizer, settings, 512)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("raw", RAW)
def test_targets_are_the_tokens_that_touch_a_response(raw, bos):
    tokenizer = make_tokenizer(bos)
    row, tokens = render(rows_of([raw])[0], tokenizer), tokens_of(raw, tokenizer)
    whole = tokenizer(row.text, add_special_tokens=bos and not row.rendered, return_offsets_mapping=True)
    assert tokens.text == row.text and tokens.ids == whole.input_ids
    assert learned_places(tokens) == target_places(whole.offset_mapping, row.responses)
    assert learned_places(tokens_of(raw, tokenizer, ALL)) == list(range(1, len(tokens.ids)))
    for window in tokens.windows:
        assert window.ids == tokens.ids[window.start : window.start + len(window.ids)]


def test_token_across_the_seam_is_learned(tokenizer):
    tokens = tokens_of({"prompt": "the orch", "completion": "ard was flooded"}, tokenizer)
    across = [index for index, (start, end) in enumerate(tokens.offsets) if start < len("the orch") < end]
    assert len(across) == 1 and learned_places(tokens) == list(range(across[0], len(tokens.ids)))


def test_characters_of_several_tokens_are_learned_whole(tokenizer):
    tokens = tokens_of({"prompt": "signs: ", "completion": "☕漢"}, tokenizer)
    assert len(learned_places(tokens)) > 2  # bytes, none of them merged with the prompt
    assert tokenizer.decode([tokens.ids[place] for place in learned_places(tokens)]).strip() == "☕漢"


@pytest.mark.parametrize("given", ["a tale", "<s>a tale"])
@pytest.mark.parametrize("bos", [True, False])
def test_beginning_of_sequence_is_never_doubled(given, bos):
    tokens = tokens_of(given, make_tokenizer(bos))
    assert tokens.ids.count(0) == (1 if bos or given.startswith("<s>") else 0)
    assert 0 not in tokens.ids[1:]


def test_chat_rows_learn_the_assistants_turns_alone(tokenizer):
    turns = [("user", "Where is it?"), ("assistant", "In the harbour."), ("user", "Now?"), ("assistant", "At noon.")]
    tokens = tokens_of({"messages": [{"role": role, "content": text} for role, text in turns]}, tokenizer)
    learned = [tokens.ids[place] for place in learned_places(tokens)]
    assert tokenizer.decode(learned) == "In the harbour.</s>At noon.</s>"
    assert tokens.ids.count(0) == 1


@pytest.mark.parametrize(
    ("raw", "bos", "settings"),
    [("a", False, RESPONSE), ("a", False, ALL), ({"prompt": "<s>", "completion": " "}, True, RESPONSE)],
)
def test_row_without_a_target_is_refused(raw, bos, settings):
    row = rows_of(["placeholder"])[0]
    text = raw if isinstance(raw, str) else raw["prompt"] + raw["completion"]
    spans = ((0, len(text)),) if isinstance(raw, str) else ((len(text), len(text)),)
    with pytest.raises(
        FormatError, match=r"has no token to learn .* give it a response, or leave it out with skip_bad"
    ):
        tokenise(replace(row, text=text, responses=spans), 0, make_tokenizer(bos), settings, 512)


def test_tokenizer_without_offsets_is_refused():
    class Slow:
        bos_token = None

    with pytest.raises(UnsupportedError, match="Slow gives no character offsets: load the fast tokenizer"):
        tokens_of("a tale", Slow())


def test_token_ids_beyond_the_model_are_refused(tokenizer):
    tokens = tokens_of(TEXTS[0], tokenizer)
    check_ids([tokens], max(tokens.ids) + 1)
    with pytest.raises(MismatchError, match=f"gave token {max(tokens.ids)}, the model embeds only {max(tokens.ids)}:"):
        check_ids([tokens], max(tokens.ids))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_windows_predict_every_target_with_a_context(data):
    window = data.draw(st.integers(2, 40))
    context = data.draw(st.integers(2, 50))
    stride = data.draw(st.integers(1, window - 1))
    ids = list(range(data.draw(st.integers(2, 130))))
    learned = sorted(data.draw(st.sets(st.integers(1, len(ids) - 1), min_size=1)))
    unit = data.draw(st.booleans())
    given = SignatureSettings((Channel(),), window=window, stride=stride, unit_length=unit)
    windows = cut_windows(7, ids, learned, given, context)

    found = [part.start + position + 1 for part in windows for position in part.positions]
    assert sorted(set(found)) == learned
    if not unit:
        assert found == learned  # each once, in order
    length = min(window, context)
    for part in windows:
        assert part.row == 7 and part.positions and 2 <= len(part.ids) <= length
        assert part.ids == ids[part.start : part.start + len(part.ids)]
        assert all(0 <= position < len(part.ids) - 1 for position in part.positions)
    ends = [part.start + len(part.ids) for part in windows]
    assert len(set(ends)) == len(ends)  # none only repeats the end of another
    if context >= window:
        votes = [(start, end) for start, end in windows_of(len(ids), window, stride)]
        votes = [(start, end) for start, end in votes if any(start < place < end for place in learned)]
        if unit:
            assert list(zip([part.start for part in windows], ends, strict=True)) == votes
        assert {(part.start, part.start + len(part.ids)) for part in windows} <= set(votes)


def test_context_shortens_windows_in_proportion():
    starts = [window.start for window in cut_windows(0, list(range(300)), list(range(1, 300)), RESPONSE, 64)]
    assert starts == [0, 48, 96, 144, 192, 240]  # the overlap of 1024 - 768 is a quarter
