"""Tables of plain rows, as text and as HTML: how results print themselves and what a notebook shows."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

INTERVAL = re.compile(r"(?<=\d) (\[-?[\d.e+-]+, -?[\d.e+-]+\])$")  # behind a number, at the end of a cell
WORD = re.compile(r"\[[^\s,\]]+, [^\s,\]]+\]|\S+")  # what no line end breaks: an interval, too
NARROW = 80  # of a terminal: what does not fit there is shown a row a block
READABLE = 10  # letters of a column that words are wrapped in


@dataclass(frozen=True)
class Table:
    """Headers and rows of plain values; `print` shows it as text, a notebook as HTML.

    Numbers stand to the right. All text is shown as it is: brackets and colons (" [/INST]", ":+1:") are no markup, and
    HTML is escaped.

    notes: sentences for under the table
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str | None = None
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        """As wide as the terminal: where that is too narrow, intervals stand below their means and texts take several lines;
        where columns would be too narrow to read, a row is a block of lines."""
        from rich.console import Console
        from rich.table import Table as Drawn
        from rich.text import Text

        console = Console(force_terminal=False, force_jupyter=False)
        room, shown = console.width - 3 * len(self.headers) + 1, self._cells()
        if sum(map(_width, zip(self.headers, *shown, strict=True))) > room:
            if console.width < NARROW:
                return self._stacked(shown, console.width)
            shown = [[INTERVAL.sub(r"\n\1", cell) for cell in row] for row in shown]
        widths = _fitted([*zip(self.headers, *shown, strict=True)], room)
        if widths is None:
            return self._stacked(self._cells(), console.width)
        drawn = Drawn(pad_edge=False)
        for column, (header, width) in enumerate(zip(self.headers, widths, strict=True)):
            numeric = bool(shown) and all(_is_number(row[column]) for row in self.rows)
            drawn.add_column(Text(header), justify="right" if numeric else "left", overflow="fold", width=width)
        for row in shown:
            drawn.add_row(*map(Text, row))
        with console.capture() as captured:
            console.print(drawn)
        return self._framed(captured.get().rstrip("\n"), console.width)

    def _cells(self) -> list[list[str]]:
        return [[visible(number(cell)) for cell in row] for row in self.rows]

    def _stacked(self, shown: Sequence[Sequence[str]], width: int) -> str:
        """A block of lines for each row: the header of a cell, and its text, which goes on below where the line ends."""
        name = min(max(map(len, self.headers), default=0), max(width // 3, 1))
        blocks = [
            "\n".join(
                line
                for header, cell in zip(self.headers, row, strict=True)
                if cell.strip()
                for line in _beside(wrapped(header, name), wrapped(cell, max(width - name - 2, 1)), name)
            )
            for row in shown
        ]
        return self._framed("\n\n".join(blocks), width)

    def _framed(self, drawn: str, width: int) -> str:
        title = [] if not self.title else ["\n".join(wrapped(self.title, width))]
        return "\n".join([*title, drawn, *("\n".join(wrapped(note, width)) for note in self.notes)])

    def html(self, scrolling: bool = True) -> str:
        """The table for a page, where it scrolls by itself if it is too wide."""
        title = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        top = "".join(f"<th>{html.escape(header)}</th>" for header in self.headers)
        lines = [f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in self.rows]
        notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in self.notes)
        drawn = f"<table>{title}<tr>{top}</tr>{''.join(lines)}</table>"
        return (f'<div class="scroll" tabindex="0">{drawn}</div>' if scrolling else drawn) + notes

    def _repr_html_(self) -> str:
        return self.html(scrolling=False)

    def plain(self) -> Table:
        """Without its title."""
        return replace(self, title=None)


def _width(texts: Iterable[str]) -> int:
    """Of the longest line, in the cells of a terminal."""
    from rich.cells import cell_len

    return max((cell_len(line) for text in texts for line in text.splitlines()), default=0)


def _fitted(columns: Sequence[Sequence[str]], room: int) -> list[int] | None:
    """A width for each column (its header first), of all together at most `room`: where that is little, texts are broken, but no
    words, and none into columns of a few letters. None where that does not fit."""
    whole = [max(1, _width(texts)) for texts in columns]
    words = [max(1, _width(word for text in texts for word in WORD.findall(text))) for texts in columns]
    cells = [_width(texts[1:]) for texts in columns]  # without the header, whose words may stand below each other
    widths = [max(word, min(cell, READABLE)) for word, cell in zip(words, cells, strict=True)]
    if sum(widths) > room:
        return None
    while (left := room - sum(widths)) > 0 and (open_ := [i for i, w in enumerate(widths) if w < whole[i]]):
        narrow = min(widths[i] for i in open_)
        growing = [i for i in open_ if widths[i] == narrow][:left]
        widths = [w + (i in growing) for i, w in enumerate(widths)]
    return widths


def terminal_width() -> int:
    """Columns of the terminal, as tables are drawn in them."""
    from rich.console import Console

    return Console(force_terminal=False, force_jupyter=False).width


def visible(text: str) -> str:
    """A text without what would steer the terminal: escapes, and marks that turn its direction."""
    return "".join(one if one.isprintable() or one in "\n\u200c\u200d" else " " for one in text)


def wrapped(text: str, width: int) -> list[str]:
    """A text in lines of at most so many cells of a terminal, broken between words where it can be."""
    from rich.console import Console
    from rich.text import Text

    lines = Text(visible(text)).wrap(Console(width=width, force_terminal=False), width, overflow="fold")
    return [line.plain.rstrip() for line in lines] or [""]


def _beside(names: Sequence[str], lines: Sequence[str], width: int) -> list[str]:
    both = zip_longest(names, lines, fillvalue="")
    return [f"{name}{' ' * (width - _width([name]))}  {line}".rstrip() for name, line in both]


class Tabular:
    """A result that prints as a table, and shows as one in a notebook."""

    def table(self) -> Table:
        """The result as a table."""
        raise NotImplementedError

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().html(scrolling=False)


@dataclass(frozen=True)
class Check:
    """One thing that was tried. `passed` is None for a fact that is neither good nor bad."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Diagnosis(Tabular):
    """What a doctor found, one check after another."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def table(self) -> Table:
        """Name, result and detail of each check."""
        words = {True: "pass", False: "FAIL", None: "note"}
        return Table(["check", "result", "detail"], [(c.name, words[c.passed], c.detail) for c in self.checks])


def number(value: Any) -> str:
    """A short form of any cell: four significant digits for a float."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def shorten(text: str, width: int = 90) -> str:
    """The text on one line, cut to `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _html_cell(value: Any) -> str:
    if _is_number(value):
        return f'<td class="number">{number(value)}</td>'
    kind = ' class="interval"' if INTERVAL.search(str(value)) else ""
    return f"<td{kind}>{html.escape(str(value))}</td>"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
