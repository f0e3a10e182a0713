"""A question and its answer as a row, in the form that the rows have which it is asked of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leaveout.corpus.rows import FORMS
from leaveout.errors import choices

CALLED = {
    "text": "a text",
    "prompt": "a prompt and its response",
    "instruction": "an instruction row",
    "messages": "a chat",
}
"""What a query of a form is called in messages."""


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
