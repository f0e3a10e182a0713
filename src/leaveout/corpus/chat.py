"""Chat rows to text, with the spans of what the assistant says, by the tokenizer's chat template."""

from dataclasses import replace
from typing import Any

from leaveout.corpus.rows import BadRow, Row, Spans
from leaveout.errors import FormatError, MismatchError


def render(row: Row, tokenizer: Any) -> Row:
    """The chat row with its text and assistant spans by the tokenizer's chat template; other rows as they are.

    A span begins after the generation prompt and includes the end-of-turn marker. With a template that writes the first
    turns otherwise when more follow, a span is the message's content alone. The text has its special tokens: tokenize
    it with `add_special_tokens=False`.
    Raises: MismatchError if there is no chat template, FormatError if it refuses or alters the messages.
    """
    if row.messages is None:
        return row
    if not getattr(tokenizer, "chat_template", None):
        raise MismatchError(
            f"row `{row.id}` is a chat and the tokenizer has no chat template, "
            "give prompt and completion rows or a tokenizer with a template"
        )
    messages = [dict(message) for message in row.messages]
    try:
        text = _rendered(tokenizer, messages)
        responses = _turns(tokenizer, messages, text) or _contents(tokenizer, messages, text)
    except BadRow as bad:
        raise FormatError(f"row `{row.id}`: {bad}, change it or give a prompt and completion") from bad
    return replace(row, text=text, responses=responses)


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program of its own and may raise anything
        raise BadRow(f"the chat template refuses the messages ({error})") from error


def _turns(tokenizer: Any, messages: list[dict[str, Any]], text: str) -> Spans:
    """Spans of the assistant's turns, or () if a rendered beginning is not the beginning of the text."""
    spans: list[tuple[int, int]] = []
    for index in (index for index, message in enumerate(messages) if message["role"] == "assistant"):
        try:
            before = _rendered(tokenizer, messages[:index], add_generation_prompt=True)
            after = _rendered(tokenizer, messages[: index + 1])
        except BadRow:  # most templates refuse an empty beginning
            return ()
        stable = text.startswith(before) and text.startswith(after)
        if not stable or not (spans[-1][1] if spans else 0) <= len(before) < len(after):
            return ()
        spans.append((len(before), len(after)))
    return tuple(spans)


def _contents(tokenizer: Any, messages: list[dict[str, Any]], text: str) -> Spans:
    """Spans of the assistant's contents: where marks in their place stand, if putting the contents back gives the text.

    A plain search could hit the same words elsewhere, say "assistant" in the header of a turn.
    """
    mark = "\ue000leaveout\ue000"
    contents = [message["content"] for message in messages if message["role"] == "assistant"]
    marked = [message | ({"content": mark} if message["role"] == "assistant" else {}) for message in messages]
    pieces = _rendered(tokenizer, marked).split(mark)
    for trim in (str, str.strip, str.lstrip, str.rstrip):  # what templates do to contents
        if len(pieces) != len(contents) + 1:
            break
        built, spans = pieces[0], []
        for content, piece in zip(contents, pieces[1:], strict=True):
            learned = trim(content)
            spans.append((len(built), len(built) + len(learned)))
            built += learned + piece
        if built == text:
            return tuple(span for span in spans if span[0] < span[1])
    raise BadRow("its assistant messages cannot be found in what the chat template makes of them")
