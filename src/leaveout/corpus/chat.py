"""Chats and instructions to text, with the spans of what the assistant says, by a chat template or in the plain form.

A template is chosen by None (the tokenizer's own, or the plain form where it has none), "none" (the plain form), a
name among the tokenizer's templates, or a Jinja file; `chosen_template` turns the choice into the template itself.
"""

# Tokenizers are Any: isinstance narrows their templates, and parts of messages, to containers of unknown values.
# A tokenizer's own template may be neither text nor texts.
# pyright: reportUnnecessaryIsInstance=false
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from leaveout.corpus.rows import BadRow, Row, Spans, fields_of
from leaveout.errors import FormatError, MismatchError

PLAIN = "none"
Template = str | Mapping[str, str]
"""The text of a Jinja template, or of several by name (one of which may be for rows with tools); "none": the plain form."""

Messages = Sequence[Mapping[str, Any]]
_MARK = "\ue000leaveout\ue000"
_TODAY = datetime(2024, 7, 26)
"""The day in templates that write today's: a row must not change overnight. Llama's own where it knows no other."""
_ASKED_DAY = re.compile(r"""\bstrftime_now\s*\(\s*(?:format\s*=\s*)?("[^"\\]*"|'[^'\\]*')\s*\)""")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def read_template(choice: str | Path | None, directory: Path = Path()) -> str | None:
    """A choice that depends on no file any more: a path becomes what the file holds.

    A path has a dot or a slash in it, the text of a template a brace, and a name neither.
    Raises: FormatError if there is no such file.
    """
    if choice is None or (isinstance(choice, str) and ("{" in choice or not any(sign in choice for sign in "./\\"))):
        return choice
    place = directory / choice
    if not place.is_file():
        raise FormatError(
            f"There is no template {place}: give a Jinja file, the name of one of the tokenizer's templates, or none."
        )
    text = place.read_text(encoding="utf-8")
    if "{" not in text:
        raise FormatError(f"{place} is not a Jinja template, as it writes no message: give another file, or none.")
    return text


def chosen_template(choice: str | Path | Template | None, tokenizer: Any) -> Template:
    """The template that a choice stands for with this tokenizer, with a fixed day where it writes today's.

    Raises: MismatchError for a name that the tokenizer does not know, FormatError for a file that is no template.
    """
    found = _named_template(choice, tokenizer)
    if isinstance(found, Mapping):
        return {name: _on_one_day(text) for name, text in found.items()}
    return _on_one_day(found) if isinstance(found, str) else found


def _on_one_day(template: str) -> str:
    """Raises: FormatError where the template writes the time in a form that it works out itself."""
    fixed = _ASKED_DAY.sub(lambda found: repr(_TODAY.strftime(found[1][1:-1])), template)
    if re.search(r"\bstrftime_now\s*\(", fixed):
        raise FormatError(
            "The chat template writes the time of the rendering, so that a row would change from day to day: give a "
            "template with a date of its own."
        )
    return fixed


def _named_template(choice: str | Path | Template | None, tokenizer: Any) -> Template:
    own = getattr(tokenizer, "chat_template", None)
    if choice is None:
        return dict(own) if isinstance(own, Mapping) else own or PLAIN
    if isinstance(choice, Mapping):
        return choice
    text = read_template(choice)
    assert text is not None
    if text == PLAIN:
        return PLAIN
    if "{" in text:
        _refuse_broken(text, tokenizer)
        return text
    named = own if isinstance(own, Mapping) else {"default": own} if own else {}
    if text not in named:
        near = difflib.get_close_matches(text, [*named, PLAIN], 1, 0.0)
        names = [*near, *(name for name in (*named, PLAIN) if name not in near)]
        raise MismatchError(
            f"The tokenizer has no chat template named {text!r}: give {' or '.join(names)}, or a Jinja file."
        )
    return named[text]


def _refuse_broken(text: str, tokenizer: Any) -> None:
    """Finds out before the first row that a template is not Jinja; what it thinks of a chat is asked row by row."""
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False, chat_template=text)
    except TemplateSyntaxError as error:
        raise FormatError(f"The chat template is not Jinja ({error}): correct it, or give another.") from error
    except Exception:  # a template may refuse this chat and take the rows
        pass


def conversation(row: Row) -> tuple[Mapping[str, Any], ...] | None:
    """The messages that a template is given: those of a chat, or an instruction and its output; None for other rows."""
    if row.form != "instruction":
        return row.messages
    given, _ = fields_of(row.raw)
    asked = "\n\n".join(part for part in (given["instruction"], given.get("input")) if part)
    return {"role": "user", "content": asked}, {"role": "assistant", "content": given["output"]}


def render(row: Row, tokenizer: Any, template: Template | None = None) -> Row:
    """A chat or instruction row with text and spans by a template, by default the tokenizer's own; other rows as they are.

    A span begins after the generation prompt and includes the end-of-turn marker, and tool calls belong to what a turn
    says. With a template that writes the first turns otherwise when more follow, or a generation prompt after every
    chat, a span ends before the marker. A template with `{% generation %}` blocks says itself what is learned. The text
    has its special tokens (`rendered`), so that none are added to it.
    Raises: FormatError if the template refuses or alters the messages.
    """
    template = chosen_template(None, tokenizer) if template is None else template
    if row.rendered or template == PLAIN or (messages := conversation(row)) is None:
        return row
    chat = _Chat(tokenizer, template, row.tools)
    try:
        messages = chat.taken(messages)
        text = chat.text(messages)
        responses = chat.generated(messages, text) or _turns(chat, messages, text) or _replaced(chat, messages, text)
        responses = _after_prompt(responses, messages, row.context)
    except BadRow as bad:
        raise FormatError(
            f"row `{row.id}`: {bad}, change it, give a prompt and completion, or take the plain form by --template none"
        ) from bad
    return replace(row, text=text, responses=responses, rendered=True)


class _Chat:
    """A template with a tokenizer's special tokens and the tools of one row."""

    def __init__(self, tokenizer: Any, template: Template, tools: Sequence[Any] | None) -> None:
        self.tokenizer = tokenizer
        self.options: dict[str, Any] = {} if tools is None else {"tools": [dict(tool) for tool in tools]}
        own = getattr(tokenizer, "chat_template", None)
        if isinstance(template, Mapping):
            name = "tool_use" if tools is not None and "tool_use" in template else "default"
            if name not in template:
                raise FormatError(
                    f"None of the chat templates {', '.join(template)} is the default: choose one by name."
                )
            template = template[name]
        self.template = template
        if template != own:
            self.options["chat_template"] = template

    def text(self, messages: Messages, prompted: bool = False) -> str:
        """Raises: BadRow with what the template says."""
        options = self.options | ({"add_generation_prompt": True} if prompted else {})
        try:
            return self.tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, **options)
        except Exception as error:  # a template is a program of its own and may raise anything
            raise BadRow(f"the chat template refuses the messages ({error})") from error

    def generated(self, messages: Messages, text: str) -> Spans:
        """What stands in the template's `{% generation %}` blocks; () if it has none."""
        if not isinstance(self.template, str) or not _GENERATION.search(self.template):
            return ()
        from transformers.utils.chat_template_utils import render_jinja_template

        options = self.tokenizer.special_tokens_map | self.options | {"chat_template": self.template}
        given = [{name: value for name, value in m.items() if value is not None} for m in messages]  # as tokenizers do
        found: Any = render_jinja_template([given], return_assistant_tokens_mask=True, **options)
        written, spans = found
        if written != [text]:
            raise BadRow("the chat template writes the messages otherwise when it is asked for its generation blocks")
        return tuple((int(start), int(end)) for start, end in spans[0] if start < end)

    def taken(self, messages: Messages) -> list[Mapping[str, Any]]:
        """The messages, with parts of text joined where the template would write the list itself, or refuses it."""
        if not any(_is_parts(message) for message in messages):
            return list(messages)
        marked = [
            m | {"content": [{"type": "text", "text": _MARK} for _ in m["content"]]} if _is_parts(m) else m
            for m in map(dict, messages)
        ]
        try:
            written = self.text(marked)
        except BadRow:
            written = ""
        parts = sum(len(m["content"]) for m in messages if _is_parts(m))
        if written.count(_MARK) >= parts and not any(quote + _MARK in written for quote in "'\""):
            return list(messages)
        return [
            m | {"content": "".join(part["text"] for part in m["content"])} if _is_parts(m) else m
            for m in map(dict, messages)
        ]


def _is_parts(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return isinstance(content, list | tuple) and all(
        isinstance(part, Mapping) and part.get("type") == "text" for part in content
    )


def _after_prompt(spans: Spans, messages: Messages, context: int) -> Spans:
    """The spans of the turns after the first messages, which are the prompt."""
    spoken = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not any(number < context for number in spoken):
        return spans
    if len(spans) != len(spoken):
        raise BadRow(
            f"its {len(spoken)} assistant messages are {len(spans)} parts of what the chat template writes, so that "
            "those of the prompt cannot be told from the others"
        )
    return tuple(span for number, span in zip(spoken, spans, strict=True) if number >= context)


def _turns(chat: _Chat, messages: Messages, text: str) -> Spans:
    """Spans of the assistant's turns, or () if a rendered beginning is not the beginning of the text."""
    spans: list[tuple[int, int]] = []
    for index in (index for index, message in enumerate(messages) if message["role"] == "assistant"):
        span = _turn(chat, messages, index, text)
        if span is None or span[0] < (spans[-1][1] if spans else 0):
            return ()
        spans.append(span)
    return tuple(spans)


def _turn(chat: _Chat, messages: Messages, index: int, text: str) -> tuple[int, int] | None:
    """The span of one turn, between its beginning with a generation prompt and the text up to its end."""
    try:
        before = chat.text(messages[:index], prompted=True)
        after = chat.text(messages[: index + 1])
    except BadRow:  # most templates refuse an empty beginning
        return None
    if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
        return None
    if index == len(messages) - 1 and _always_prompts(chat, messages, before, after):
        return None
    return len(before), len(after)


def _always_prompts(chat: _Chat, messages: Messages, before: str, after: str) -> bool:
    """Whether a template that writes the same with and without a generation prompt has one behind the whole chat."""
    try:
        if chat.text(messages[:-1]) != before:
            return False
        longer = chat.text([*messages, {"role": "user", "content": _MARK}])
    except BadRow:
        return False
    return not longer.startswith(after)


def _replaced(chat: _Chat, messages: Messages, text: str) -> Spans:
    """Spans of what the assistant's turns say: what a mark in the place of the turn replaces in the text.

    A plain search could hit the same words elsewhere, say "assistant" in the header of a turn. A turn that is written
    otherwise with a mark (a thought that comes before an answer) is found as in `_turns`.
    """
    spans: list[tuple[int, int]] = []
    for index in (index for index, message in enumerate(messages) if message["role"] == "assistant"):
        marked = [*messages[:index], {"role": "assistant", "content": _MARK}, *messages[index + 1 :]]
        before, *after = chat.text(marked).split(_MARK)
        found = len(after) == 1 and text.startswith(before) and text.endswith(after[0])
        if found and len(before) + len(after[0]) <= len(text):
            span = len(before), len(text) - len(after[0])
        else:
            span = _turn(chat, messages, index, text)
        if span is None or (spans and span[0] < spans[-1][1]):
            raise BadRow("its assistant messages cannot be found in what the chat template makes of them")
        spans.append(span)
    return tuple(span for span in spans if span[0] < span[1])
