"""Texts on a terminal with their strongest words marked: bold and underlined where it can, else by brackets and carets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

LEAST = 0.25  # of the largest weight: what is less is not marked
WORDS = 80  # of a text that are shown


def print_marked(name: str, words: Sequence[str], weights: np.ndarray, whole: np.ndarray | None = None) -> None:
    """A text, the stretch of it that matters; `whole`: the weights that the marks are relative to."""
    from rich.console import Console
    from rich.text import Text

    from leaveout.tables import visible
    from leaveout.words import passage

    console = Console(highlight=False)
    largest = float(abs(weights if whole is None else whole).max(initial=0.0)) or 1.0
    start, end = passage(weights, WORDS)
    line = Text().append(f"{name}: ", style="dim").append("… " if start else "")
    for word, weight in zip(words[start:end], weights[start:end], strict=True):
        bare = visible(word)
        inner = bare.strip()
        if not inner or abs(weight) < LEAST * largest:
            line.append(bare)
            continue
        before, after = bare[: len(bare) - len(bare.lstrip())], bare[len(bare.rstrip()) :]
        line.append(before)
        if console.is_terminal:
            line.append(inner, style="bold" if weight > 0 else "underline")
        else:
            line.append(f"[{inner}]" if weight > 0 else f"^{inner}^")
        line.append(after)
    line.append(" …" if end < len(words) else "")
    console.print(line)


def print_legend() -> None:
    """What the marks mean."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    up, down = ("bold", "underlined") if console.is_terminal else ("[brackets]", "^carets^")
    console.print(Text(f"{up}: adds most to the score; {down}: takes most away.\n", style="dim"))
