"""Writes docs/reference/cli.md from the --help of every command; `tests/test_docs.py` fails when the two differ.

Run: .venv/bin/python docs/reference/generate_cli.py
"""

from __future__ import annotations

from pathlib import Path

import typer.main
from typer.testing import CliRunner

from leaveout.cli import app

TARGET = Path(__file__).parent / "cli.md"
WIDTH = "100"


def cli_page() -> str:
    """The whole page: the program's help, then each command's."""
    commands = list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    parts = ["# Command line\n\nMade from `--help` by `docs/reference/generate_cli.py`.\n"]
    for command in [None, *commands]:
        arguments = ["--help"] if command is None else [command, "--help"]
        shown = CliRunner().invoke(app, arguments, prog_name="leaveout", env={"COLUMNS": WIDTH}).output
        lines = "\n".join(line.rstrip() for line in shown.strip().splitlines())
        parts.append(f"## leaveout{'' if command is None else ' ' + command}\n\n```text\n{lines}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(cli_page(), encoding="utf-8")
