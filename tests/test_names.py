"""The names of the tests: two processes that share the work must find the same ones, in the same order.

`make test` has two processes with hash seeds of their own, and xdist refuses to start when they differ; this test says where.
"""

import difflib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def names_of_tests(hash_seed, temporary):
    """What a process of its own collects, line by line; `temporary` is where it may write."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=--strict-markers"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ended = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-p", "no:xdist", str(ROOT / "tests")],
        check=False,
        cwd=ROOT,
        env={**environment, "PYTHONHASHSEED": str(hash_seed), "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    return [line for line in ended.stdout.splitlines() if "::" in line]


def test_names_of_tests_depend_on_nothing_but_the_source(tmp_path):
    """Not on the time (the second collection begins seconds after the first), hash seed, or temporary directory."""
    found = []
    for hash_seed in (1, 2):
        place = tmp_path / str(hash_seed)
        place.mkdir()
        found.append(names_of_tests(hash_seed, place))
    first, second = found
    assert len(first) == len(set(first)) > 1000  # the whole suite, each test once
    assert first == second, "\n".join(difflib.unified_diff(first, second, "first", "second", lineterm="", n=0))
