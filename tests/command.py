"""Runs the command line in this process."""

from __future__ import annotations

import sys

import pytest

from leaveout import cli


def run_command(monkeypatch, capsys, *arguments):
    """Exit code, standard output and standard error of `leaveout` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["leaveout", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
        raise SystemExit(0)
    shown = capsys.readouterr()
    return stopped.value.code or 0, shown.out, shown.err
