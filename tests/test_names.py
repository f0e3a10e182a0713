"""The names of the tests: two processes that share the work must find the same ones, in the same order.

`make test` has two processes with hash seeds of their own, and xdist refuses to start when they differ; this test says where.
"""

import difflib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COLLECT = [
    "--collect-only", "-q", "-o", "addopts=--strict-markers", "-p", "no:cacheprovider", "-p", "no:xdist",
    str(ROOT / "tests"),
]  # fmt: skip


class Names:
    """A plug-in of pytest that keeps the names of what is collected."""

    def __init__(self):
        self.found = []

    def pytest_collection_finish(self, session):
        self.found = [item.nodeid for item in session.items]


def names_here(monkeypatch):
    """What this process collects; modules that it has imported already are read as they are."""
    monkeypatch.chdir(ROOT)
    names = Names()
    assert pytest.main(COLLECT, plugins=[names]) == 0
    return names.found


def names_elsewhere(hash_seed, temporary):
    """What a process of its own collects; `temporary` is where it may write."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "--assert=plain", *COLLECT],
        check=False,
        cwd=ROOT,
        env={**environment, "PYTHONHASHSEED": hash_seed, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    return [line for line in ended.stdout.splitlines() if "::" in line]


def test_names_of_tests_depend_on_nothing_but_the_source(tmp_path, monkeypatch):
    """Not on the time (the second collection begins seconds after the first), hash seed, or temporary directory."""
    first = names_here(monkeypatch)
    second = names_elsewhere("2" if os.environ.get("PYTHONHASHSEED") == "1" else "1", tmp_path)
    assert len(first) == len(set(first)) > 1000  # the whole suite, each test once
    assert first == second, "\n".join(difflib.unified_diff(first, second, "first", "second", lineterm="", n=0))
