"""One row: which form it has, its text, spans, id, unit, metadata and content hash; or why it is a bad row."""

# Values of rows come from outside: isinstance narrows Any to containers of unknown values.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, time
from decimal import Decimal
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import xxhash

from leaveout.errors import FormatError, choices

Scalar = str | int | float | bool | None
Spans = tuple[tuple[int, int], ...]
# The fields that a form needs -> those that may join them.
_FORMS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("text",): ("prompt_text",),
    **dict.fromkeys(product(("prompt", "prompt_text"), ("completion", "response")), ()),
    ("instruction", "output"): ("input",),
    ("messages",): ("tools",),
}
_QUESTIONS, _ANSWERS = ("question", "query", "problem"), ("answer", "response", "solution")
# What others call the fields of ours, for rows that have no form of ours: our name -> theirs.
_ALIASES: tuple[dict[str, str], ...] = (
    *({"messages": name} for name in ("conversations", "conversation")),
    *({"instruction": asked, "output": told} for asked, told in product(("instruction", *_QUESTIONS), _ANSWERS)),
)
# Names that rows in no known form may have, the likeliest first, for a proposal of `--columns`.
_LIKELY = {
    "prompt": (*_QUESTIONS, "instruction", "input", "user", "source", "title", "context"),
    "response": (*_ANSWERS, "output", "completion", "target", "reply", "assistant", "chosen", "summary", "text"),
    "messages": ("dialogue", "dialog", "chat", "turns", "history"),
    "text": ("content", "body", "document", "article", "passage", "story", "code", "sentence"),
}
# Who speaks in the messages of ShareGPT, as messages call it elsewhere.
_SPEAKERS = (
    dict.fromkeys(("human", "user"), "user")
    | dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bing", "bard", "function_call"), "assistant")
    | dict.fromkeys(("tool", "observation", "function_response"), "tool")
    | {"system": "system"}
)
_ACCEPTED = "`text`, `prompt` and `completion`, `instruction` and `output`, `messages`, or `chosen` and `rejected`"
CHOSEN, SEAM = "\n\n### Chosen:\n", "\n\n### Rejected:\n"
"""Above the answers of a preference row where it is shown. The second stands between both sides, where these are one text."""
TEXTS = frozenset({"id", *(name for form, more in _FORMS.items() for name in (*form, *more))}).union(
    *(names.values() for names in _ALIASES), ("context", "chosen", "rejected")
)
"""Fields that are never numbers, also where a file cannot tell."""
FORMS = ("text", "prompt", "instruction", "messages")
CALLED = {
    "text": "a text",
    "prompt": "a prompt and its response",
    "instruction": "an instruction row",
    "messages": "a chat",
}
"""What a query of a form is called in messages."""


@dataclass(frozen=True, slots=True)
class Row:
    """One example of the training data."""

    id: str  # the field `id`, else the first 16 digits of the content hash
    text: str  # prompt and response; of an instruction and a chat the plain form, until a template renders it
    responses: Spans  # the parts [start, end) of the text that are learned
    messages: tuple[Mapping[str, Any], ...] | None  # chat rows only; each with `content`, None where it has none
    unit: str  # what is deleted together: the value of the units field, else the id
    meta: dict[str, Scalar]  # all other fields; lists and objects as compact JSON, dates in ISO 8601
    content_hash: str  # xxh3-128 of the text and where the response begins, or of the fields of its form; nothing else
    number: int  # position in the source, from 0, bad rows included
    form: str = "text"  # text, prompt, instruction or messages
    tools: tuple[Any, ...] | None = None  # chat rows only: what the assistant may call
    rendered: bool = False  # whether a chat template wrote the text, with all its special tokens
    raw: Mapping[str, Any] = field(default_factory=dict)  # the row as it came
    kept: int | None = None  # how many of its tokens count, where a recipe cut it; None: all
    weight: float = 1.0  # of its loss: the field `weight`
    pair: tuple[Row, Row] | None = (
        None  # preference rows only: the chosen answer and the rejected one, each with its prompt
    )
    reference: float | None = None  # of a preference row: log p(chosen) - log p(rejected) by a reference model, nats
    context: int = 0  # of a chat: its first messages, which are a prompt, so that nothing of them is learned


class BadRow(Exception):
    """Why a row cannot be read, without its place."""


def read_row(raw: Any, number: int, units: str | None) -> Row:
    if isinstance(raw, BadRow):
        raise raw
    if isinstance(raw, Row):
        return replace(raw, number=number)
    if isinstance(raw, str):
        raw = {"text": raw}
    if not isinstance(raw, Mapping):
        raise BadRow(f"is {kind_of(raw)}, not an object with fields")
    for name in raw:
        if not isinstance(name, str):
            raise BadRow(f"has {kind_of(name)} as the name of a field, names must be text")
        _utf8(name, name)
    weight = _weight(raw)
    if raw.keys() >= {"chosen", "rejected"}:
        asked = next((name for name in _QUESTIONS if name in raw and "prompt" not in raw), "prompt")
        given = {"prompt" if name == asked else name: value for name, value in raw.items()}
        return replace(_preference(given, number, units, weight), raw=dict(raw))
    _refuse_unpaired(raw)
    given, context = fields_of(raw)
    fields = _form(given)
    form = next(form for form in FORMS if fields[0].startswith(form))
    names = _alias_of(raw)
    used = {"id", *(names.get(name, name) for name in (*fields, *_FORMS[fields]))} | (raw.keys() - given.keys())
    messages = tools = None
    if form == "messages":
        messages, tools = read_messages(given["messages"]), _tools(given.get("tools"))
        if not _speaks(messages[context:]):
            raise BadRow("field `completion` has no assistant's text, so nothing is learned: add some or drop the row")
        text, responses = plain_chat(messages, tools, context)
        content = _chat_content(messages, tools) + (f"\n{context} before" if _speaks(messages[:context]) else "")
    else:
        text, seam = _text_and_seam(given, fields)
        responses = ((seam, len(text)),)
        own = {name: given[name] for name in ("instruction", "input", "output") if given.get(name)}
        content = "instruction\n" + _compact(form, own) if form == "instruction" else f"{seam}\n{text}"
    row = Row(
        "", text, responses, messages, "", {}, "", number, form=form, tools=tools, weight=weight, context=context
    )  # fmt: skip
    return _named(row, content, raw, used, units)


def _named(row: Row, content: str, raw: Mapping[str, Any], used: Collection[str], units: str | None) -> Row:
    """A row with its hash, id, unit and metadata; `used`: the fields that are none."""
    content += "" if row.weight == 1 else f"\nweight {row.weight!r}"
    content_hash = xxhash.xxh3_128_hexdigest(content.encode())
    id = _label("id", raw["id"], (str, int)) if "id" in raw else content_hash[:16]
    if units is not None and units not in raw:
        raise BadRow(f"field `{units}` is missing, but the units are named by it")
    unit = id if units is None else _label(units, raw[units], (str, int, float, bool))
    meta = {name: _scalar(name, value) for name, value in raw.items() if name not in used}
    return replace(row, id=id, unit=unit, meta=meta, content_hash=content_hash, raw=dict(raw))


def _weight(raw: Mapping[str, Any]) -> float:
    """The field `weight`; 1 where there is none."""
    weight = _plain(raw.get("weight"))
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        value = f"{weight}" if isinstance(weight, float) else kind_of(weight)
        raise BadRow(
            f"field `weight` is {value}, but a row's loss is multiplied by it: give a number, or rename the field"
        )
    return float(weight)


# ---------------------------------------------------------------- preferences


def _preference(raw: Mapping[str, Any], number: int, units: str | None, weight: float) -> Row:
    """A row of two answers, of which the first is preferred: texts or lists of messages, with a prompt or what both share.

    Its text shows both sides; what is learned of each begins after the prompt.
    """
    if other := next((form for form in _FORMS if raw.keys() >= {*form}), None):
        raise BadRow(f"has two forms at once, `chosen` with `rejected` and {_quoted(other)}, keep one of them")
    prompt, answers = raw.get("prompt"), (raw["chosen"], raw["rejected"])
    if all(isinstance(answer, str) for answer in answers) and isinstance(prompt, str | None):
        pair = _text_pair(raw, number)
    elif all(isinstance(answer, list | tuple) for answer in answers) and isinstance(prompt, str | list | tuple | None):
        pair = _chat_pair(raw, number)
    else:
        kinds = f"{kind_of(answers[0])} and {kind_of(answers[1])}" + (
            "" if prompt is None else f" after {kind_of(prompt)}"
        )
        raise BadRow(f"fields `chosen` and `rejected` are {kinds}, they must both be text, or both lists of messages")
    chosen, rejected = pair
    if chosen.content_hash == rejected.content_hash:
        raise BadRow("has the same answer as `chosen` and as `rejected`, so that nothing is preferred: drop the row")
    behind = len(chosen.text) + len(SEAM)
    spans = (*chosen.responses, *((behind + start, behind + end) for start, end in rejected.responses))
    text = chosen.text + SEAM + rejected.text
    row = Row("", text, spans, None, "", {}, "", number, form=chosen.form, weight=weight, pair=pair)
    content = f"preference\n{chosen.content_hash}\n{rejected.content_hash}"
    return _named(row, content, raw, {"id", "prompt", "chosen", "rejected", "tools"}, units)


def _text_pair(raw: Mapping[str, Any], number: int) -> tuple[Row, Row]:
    """Both sides as texts; without a prompt it is what both have in common, up to a whole word."""
    form, given = "prompt", raw
    if raw.get("prompt") is None:
        shared = shared_length(raw["chosen"][:-1], raw["rejected"][:-1])
        ends = [place for place in range(shared) if raw["chosen"][place].isspace()]
        prompt = raw["chosen"][: ends[-1]].rstrip() if ends else ""
        form = "text"
        given = {"prompt": prompt} | {name: raw[name][len(prompt) :] for name in ("chosen", "rejected")}
    found = []
    for name in ("chosen", "rejected"):
        text, seam = _text_and_seam(given, ("prompt", name))
        side = Row("", text, ((seam, len(text)),), None, "", {}, "", number, form=form)
        found.append(_named(side, f"{seam}\n{text}", {}, (), None))
    return found[0], found[1]


def _chat_pair(raw: Mapping[str, Any], number: int) -> tuple[Row, Row]:
    """Both sides as chats. A prompt beside them is messages before both, or the text of a message that both have."""
    prompt, tools, found = raw.get("prompt"), _tools(raw.get("tools")), []
    for name in ("chosen", "rejected"):
        messages = read_messages([*prompt, *raw[name]] if isinstance(prompt, list | tuple) else raw[name], name)
        if isinstance(prompt, str) and all(message["content"] != prompt for message in messages):
            raise BadRow(f"field `prompt` is text that no message of `{name}` has, give it as messages")
        text, responses = plain_chat(messages, tools)
        side = Row("", text, responses, messages, "", {}, "", number, form="messages", tools=tools)
        found.append(_named(side, _chat_content(messages, tools), {}, (), None))
    return found[0], found[1]


def _refuse_unpaired(raw: Mapping[str, Any]) -> None:
    if "completion" in raw and isinstance(_plain(raw.get("label")), bool):
        raise BadRow(
            "is an unpaired preference (`completion` with a `label` of true or false, as KTO has them), whose loss compares "
            "it with other rows of its batch: pair answers as `chosen` and `rejected`, or rename `label`"
        )
    if (one := raw.keys() & {"chosen", "rejected"}) and not any(raw.keys() >= {*form} for form in _FORMS):
        other = ({"chosen", "rejected"} - one).pop()
        raise BadRow(f"has `{one.pop()}` without `{other}`, a preference row needs both: add it or drop the row")


def renamed(raw: Any, columns: Mapping[str, str]) -> Any:
    """A row whose fields have our names. Raises: BadRow where it lacks one of them, or has ours already."""
    if not isinstance(raw, Mapping):
        return raw
    theirs = set(columns.values())
    if missing := [name for name in columns if columns[name] not in raw]:
        ours = missing[0]
        raise BadRow(
            f"has no field `{columns[ours]}`, which the columns call `{ours}`, only {names_of(raw)}: "
            "write our name=its name, such as prompt=question"
        )
    rest = {name: value for name, value in raw.items() if name not in theirs}
    if clash := [name for name in columns if name in rest]:
        raise BadRow(
            f"has a field `{clash[0]}` itself, which the columns also make of `{columns[clash[0]]}`: give that another "
            f"name, too, such as old_{clash[0]}={clash[0]}"
        )
    return {ours: raw[name] for ours, name in columns.items()} | rest


def fields_of(raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], int]:
    """A row's fields under our names, and how many of its messages are a prompt, as TRL has one.

    A row that has a form of ours keeps its fields as they are.
    """
    if _complete(raw):
        return raw, 0
    names = _alias_of(raw)
    given = {name: value for name, value in raw.items() if name not in names.values()}
    given |= {ours: raw[theirs] for ours, theirs in names.items()}
    if isinstance(given.get("messages"), str):
        given["messages"] = _listed(given["messages"])
    name = "completion" if "completion" in given else "response"
    prompt, answer = _listed(given.get("prompt")), _listed(given.get(name))
    if not isinstance(prompt, list | tuple) or not isinstance(answer, list | tuple | str):
        return given, 0
    answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    given = {key: value for key, value in given.items() if key not in ("prompt", name)}
    return given | {"messages": [*prompt, *answer]}, len(prompt)


def in_own_names(reason: str, raw: Any) -> str:
    """Why a row is bad, with its fields as it calls them."""
    names = _alias_of(raw) if isinstance(raw, Mapping) else {}
    return re.sub(r"field `(\w+)`", lambda found: f"field `{names.get(found[1], found[1])}`", reason)


def _alias_of(raw: Mapping[str, Any]) -> dict[str, str]:
    """Our names of the fields of a row that has them under others."""
    if any(raw.keys() >= {*form} for form in _FORMS):
        return {}
    names = next((names for names in _ALIASES if raw.keys() >= {*names.values()}), {})
    return names | ({"input": "context"} if "output" in names and "context" in raw and "input" not in raw else {})


def _listed(value: Any) -> Any:
    """A list that came as JSON text, as CSV and Parquet may have it; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _complete(raw: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The forms whose fields are all there and of the right type."""
    typed = {name for name, value in raw.items() if _fits(name, value)}
    return [form for form in _FORMS if typed.issuperset(form)]


def _fits(name: str, value: Any) -> bool:
    return isinstance(value, list | tuple if name == "messages" else str)


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items both begin with."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def distinct(rows: Sequence[Any]) -> tuple[Any, ...]:
    """The examples with an id of their own each; a row without one that repeats another gets a number behind its id.

    Raises: FormatError for an id that two rows were given.
    """
    taken: set[str] = set()
    found = []
    for number, row in enumerate(rows):
        if isinstance(row, Row) and row.id in taken:
            if row.id != row.content_hash[:16]:
                raise FormatError(
                    f"The id {row.id!r} of row {number + 1} is that of an earlier row: give every row its own id."
                )
            id = next(name for count in itertools.count(2) if (name := f"{row.id}-{count}") not in taken)
            row = replace(row, id=id, unit=id if row.unit == row.id else row.unit)
        if isinstance(row, Row):
            taken.add(row.id)
        found.append(row)
    return tuple(found)


def row_json(row: Row) -> str:
    """The row as it came, as JSON on one line; types that JSON lacks in ISO form, decimals as text."""
    return json.dumps(row.raw, ensure_ascii=False, allow_nan=False, default=_plain)


def commonest(counts: Mapping[str, int]) -> str:
    """The form that most rows have; of equally many the first of `FORMS`, and a prompt where nothing is known."""
    return max(FORMS, key=lambda form: counts.get(form, 0)) if counts else "prompt"


def asked_row(answer: str, prompt: str | None = None, form: str | None = None) -> dict[str, Any]:
    """A row whose answer is asked about, after a prompt that is context only; without both it is a text.

    White space around either belongs to texts and prompts only, where the two are joined as they are.
    Raises: ValueError for an unknown form.
    """
    form = form or ("text" if prompt is None else "prompt")
    if form not in FORMS:
        raise ValueError(f"there is no form {form!r}: {choices(form, FORMS)}")
    before = prompt or ""
    if form == "text":
        return {"text": before + answer, "prompt_text": before} if before else {"text": answer}
    if form == "prompt":
        return {"prompt": before, "response": answer}
    if form == "instruction":
        return {"instruction": before.strip(), "output": answer.strip()}
    asked = [] if prompt is None else [{"role": "user", "content": before.strip()}]
    return {"messages": [*asked, {"role": "assistant", "content": answer.strip()}]}


def answer_places(text: str, responses: Spans, chosen: int) -> tuple[int, range]:
    """Where the chosen answer begins in the text of a preference row, whose first side has `chosen` characters; and the
    characters of the second side up to its answer which repeat the prompt, none where that is another one."""
    behind = chosen + len(SEAM)
    first, second = responses[0][0], next((start for start, _ in responses if start >= behind), behind)
    return first, range(behind, second if text[behind:second] == text[:first] else behind)


def with_labels(text: str, responses: Spans, chosen: int) -> str:
    """The text of a preference row (see `answer_places`) as people read it: the prompt once, and both answers with labels."""
    first, repeated = answer_places(text, responses, chosen)
    return text[:first] + CHOSEN[0 if first else 2 :] + text[first:chosen] + SEAM + text[repeated.stop :]


def in_words(row: Row) -> str:
    """What a row says, as one would quote it: prompt and answer with white space between them, of a chat what each turn says
    without the marks of a template, of a preference row both answers. A text is as it is."""
    if row.pair is not None:
        return f"{in_words(row.pair[0])} rather than {answer_of(row.pair[1]).strip()}"
    if row.messages is not None:
        return _joined([said(message) for message in row.messages])
    if row.form == "instruction" and row.raw:
        given, _ = fields_of(row.raw)
        return _joined([given[name] for name in ("instruction", "input", "output") if given.get(name)])
    if row.form != "prompt" or row.rendered:
        return row.text
    seam = row.responses[0][0]
    return _joined([row.text[:seam], row.text[seam:]])


def _joined(parts: Sequence[str]) -> str:
    """Texts behind each other, with a space where no white space is."""
    text = ""
    for part in parts:
        apart = not text or not part or text[-1].isspace() or part[0].isspace()
        text += part if apart else f" {part}"
    return text


def answer_of(row: Row) -> str:
    """What is learned of a row last: its response, or what the assistant says in the end."""
    if row.messages is not None:
        return said(row.messages[_last_turn(row.messages)])
    return row.text[row.responses[-1][0] :]


def with_answer(row: Row, answer: str) -> dict[str, Any]:
    """The row with another answer in the place of `answer_of`, in the same form."""
    if row.messages is not None:
        at = _last_turn(row.messages)
        messages = [*row.messages[:at], {**row.messages[at], "content": answer}]
        given = {"prompt": messages[: row.context], "completion": messages[row.context :]}
        return (given if row.context else {"messages": messages}) | (
            {} if row.tools is None else {"tools": list(row.tools)}
        )
    if row.form == "instruction":
        given, _ = fields_of(row.raw)
        return {name: given[name] for name in ("instruction", "input") if given.get(name)} | {"output": answer}
    before = row.text[: row.responses[-1][0]]
    return {"prompt": before, "response": answer} if row.form == "prompt" else asked_row(answer, before or None, "text")


def _last_turn(messages: Sequence[Mapping[str, Any]]) -> int:
    return max(at for at, message in enumerate(messages) if message["role"] == "assistant" and said(message).strip())


def _form(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """The one form whose fields are all there and of the right type."""
    complete = _complete(raw)
    if len(complete) == 1:
        return complete[0]
    if complete:
        one, other = map(_quoted, complete[:2])
        raise BadRow(f"has two forms at once, {one} and {other}, keep one of them")
    for form in _FORMS:
        if raw.keys() >= set(form):
            name = next(name for name in form if not _fits(name, raw[name]))
            wanted = "a list of messages" if name == "messages" else "text"
            raise BadRow(f"field `{name}` must be {wanted}, not {kind_of(raw[name])}")
    raise BadRow(
        f"has {f'only the fields {names_of(raw)}' if raw else 'no fields'}, but a row needs {_ACCEPTED}{_proposal(raw)}"
    )


def _proposal(raw: Mapping[str, Any]) -> str:
    """Which of a row's fields may be meant, by their names and kinds, as the option that would say so."""
    texts = [name for name, value in raw.items() if isinstance(value, str) and name != "id"]
    lists = [name for name, value in raw.items() if isinstance(value, list | tuple) and value and _is_turn(value[0])]

    def likely(ours: str, among: Sequence[str]) -> str | None:
        folded = {name.strip().lower(): name for name in among}
        return next((folded[name] for name in (ours, *_LIKELY[ours]) if name in folded), None)

    prompt = likely("prompt", texts)
    response = likely("response", [name for name in texts if name != prompt])
    text = likely("text", texts) or max(texts, key=lambda name: len(raw[name]), default=None)
    if lists:
        named = f"messages={likely('messages', lists) or lists[0]}"
    elif prompt is None and response is None and len(texts) == 2:
        named = f"prompt={texts[0]},response={texts[1]}"
    elif response is not None and (prompt or texts.index(response)):
        prompt = prompt or texts[texts.index(response) - 1]
        named = f"prompt={prompt},response={response}"
    else:
        named = "" if text is None else f"text={text}"
    return named and f": say which field is what, such as --columns {shlex.quote(named) if ' ' in named else named}"


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def _quoted(form: Sequence[str]) -> str:
    return " with ".join(f"`{name}`" for name in form)


def _text_and_seam(raw: Mapping[str, Any], form: tuple[str, ...]) -> tuple[str, int]:
    """The whole text, and where its response begins."""
    more = _FORMS.get(form, ())
    for name in more:
        if not isinstance(raw.get(name), str | None):
            raise BadRow(f"field `{name}` must be text, not {kind_of(raw[name])}")
    if form == ("text",):
        prompt, text = raw.get("prompt_text") or "", raw["text"]
        if not text.startswith(prompt):
            raise BadRow("field `prompt_text` must be the beginning of `text`")
    elif form == ("instruction", "output"):
        given = f"### Input:\n{raw['input']}\n\n" if raw.get("input") else ""
        prompt = f"### Instruction:\n{raw['instruction']}\n\n{given}### Response:\n"
        text = prompt + raw["output"]
    else:
        prompt = raw[form[0]]
        text = prompt + raw[form[1]]
    if not text[len(prompt) :].strip():
        after = " after its prompt" if form == ("text",) and prompt else ""
        raise BadRow(f"field `{form[-1]}` is empty or blank{after}, so nothing is learned: fill it or drop the row")
    for name in (*form, *more):
        _utf8(name, raw.get(name) or "")
    return text, len(prompt)


def _chat_content(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> str:
    """What is hashed of a chat."""
    content = "chat\n" + _compact("messages", [_without_nulls(message) for message in messages])
    return content + ("" if tools is None else "\n" + _compact("tools", tools))


def read_messages(value: Sequence[Any], field: str = "messages") -> tuple[dict[str, Any], ...]:
    """The messages without their null fields, which Parquet cannot tell from missing ones, but each with `content`.

    Templates compare `content` with none where a turn only calls tools.
    """
    value = [_spoken(message, number) for number, message in enumerate(value, 1)]
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping):
            raise BadRow(f"field `{field}` must hold objects, but message {number} is {kind_of(message)}")
        if not isinstance(message.get("role"), str):
            raise BadRow(f"`role` of message {number} must be text, not {kind_of(message.get('role'))}")
        _check_content(message, number)
    if not _speaks(value):
        raise BadRow(f"field `{field}` has no assistant's text, so nothing is learned: add some or drop the row")
    return tuple({"role": message["role"], "content": None} | _without_nulls(message) for message in value)


def _speaks(messages: Iterable[Mapping[str, Any]]) -> bool:
    return any(message["role"] == "assistant" and said(message).strip() for message in messages)


def _spoken(message: Any, number: int) -> Any:
    """A message of ShareGPT (`from`, `value`) with a role and content; others as they are."""
    if not isinstance(message, Mapping) or "role" in message or not message.keys() >= {"from", "value"}:
        return message
    if (role := _SPEAKERS.get(message["from"]) if isinstance(message["from"], str) else None) is None:
        raise BadRow(f"`from` of message {number} is {message['from']!r}, write one of {', '.join(_SPEAKERS)}")
    rest = {name: value for name, value in message.items() if name not in ("from", "value")}
    return {"role": role, "content": message["value"]} | rest


def _check_content(message: Mapping[str, Any], number: int) -> None:
    """Content is text or parts of text; of a tool's turn also any list or object; none beside tool calls."""
    content, calls = message.get("content"), message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list | tuple) and all(isinstance(call, Mapping) for call in calls)):
        raise BadRow(f"`tool_calls` of message {number} must be a list of objects, not {kind_of(calls)}")
    if isinstance(content, str) or (content is None and calls):
        return
    if message["role"] == "tool" and isinstance(content, list | tuple | Mapping):
        return
    if not isinstance(content, list | tuple):
        raise BadRow(f"`content` of message {number} must be text, not {kind_of(content)}")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = f"of type {part.get('type')!r}" if isinstance(part, Mapping) else kind_of(part)
            raise BadRow(f"`content` of message {number} has a part that is {kind}, only parts of type 'text' are read")


def said(message: Mapping[str, Any]) -> str:
    """What a turn says, plainly: its content, then one line of JSON for each tool call."""
    content = message.get("content")
    if isinstance(content, list | tuple) and all(isinstance(part, Mapping) and "text" in part for part in content):
        content = "".join(part["text"] for part in content)
    calls = [_compact("tool_calls", call) for call in message.get("tool_calls") or ()]
    lines = [] if content in (None, "") else [content if isinstance(content, str) else _compact("content", content)]
    return "\n".join([*lines, *calls])


def plain_chat(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, context: int = 0
) -> tuple[str, Spans]:
    """A chat without a template: `### Role:` above each turn, tools first; and the spans of the assistant's turns after
    the first messages, which are `context`."""
    pieces, spans, length = [], [], 0
    if tools:
        listed = "\n".join(_compact("tools", tool) for tool in tools)
        pieces.append(f"### Tools:\n{listed}")
        length = len(pieces[0]) + 2
    for number, message in enumerate(messages):
        header, body = f"### {message['role'].capitalize()}:\n", said(message)
        _utf8("messages", body)
        if message["role"] == "assistant" and body and number >= context:
            spans.append((length + len(header), length + len(header) + len(body)))
        pieces.append(header + body)
        length += len(header) + len(body) + 2
    return "\n\n".join(pieces), tuple(spans)


def _tools(value: Any) -> tuple[Any, ...] | None:
    """The tools of a chat: a list of objects, also as JSON text, as Parquet often has it."""
    if value is None:
        return None
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise BadRow("field `tools` is text that is not JSON, write a list of objects") from None
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        raise BadRow(f"field `tools` must be a list of objects, not {kind_of(value)}")
    return tuple(value)


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in message.items() if item is not None}


def _label(name: str, value: Any, kinds: tuple[type, ...]) -> str:
    """An id or a unit as text."""
    value = _plain(value)
    if type(value) not in kinds:
        number = "number" if float in kinds else "whole number"
        raise BadRow(f"field `{name}` must be text or a {number}, not {kind_of(value)}")
    value = _scalar(name, value)
    if isinstance(value, str) and not value.strip():
        raise BadRow(f"field `{name}` is empty, fill it")
    return value if isinstance(value, str) else json.dumps(value)


def _plain(value: Any) -> Any:
    """Dates, decimals and numpy's scalars as plain values."""
    value = value.item() if isinstance(value, np.generic) else value
    value = value.isoformat() if isinstance(value, date | time) else value
    return str(value) if isinstance(value, Decimal) else value


def _scalar(name: str, value: Any) -> Scalar:
    value = _plain(value)
    if isinstance(value, str):
        return _utf8(name, value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise BadRow(f"field `{name}` is a whole number beyond 64 bits, write it as text")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"field `{name}` is {value}, write null where there is no number")
    return value if isinstance(value, int | float | None) else _compact(name, value)


def _compact(name: str, value: Any) -> str:
    """JSON that is the same whatever the order of the fields."""
    write = partial(json.dumps, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
    try:
        return _utf8(name, write(value, default=_plain))
    except (TypeError, ValueError, RecursionError):
        raise BadRow(f"field `{name}` ({kind_of(value)}) cannot be written as JSON, change or drop it") from None


def _utf8(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"at character {error.start + 1}"
        raise BadRow(f"field {name!a} has half a surrogate pair {where}, which is not valid UTF-8") from None
    return text


def kind_of(value: Any) -> str:
    kinds: dict[type, str] = {type(None): "null", bool: "true or false", int: "a number", float: "a decimal number"}
    kinds |= {str: "text", bytes: "bytes", list: "a list", tuple: "a list", dict: "an object"}
    return kinds.get(type(value)) or f"a {type(value).__name__}"


def names_of(fields: Iterable[Any]) -> str:
    names = [f"`{name}`" for name in fields]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
