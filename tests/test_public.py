"""The public names stand in one table, which type checkers and the package itself read alike."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import leaveout

TABLE = Path(leaveout.__file__).with_suffix(".pyi")


def test_names_are_those_that_type_checkers_see():
    """A name is public for them if it is imported as itself (PEP 484)."""
    imports = [node for node in ast.parse(TABLE.read_text()).body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: node.module for node in imports for alias in node.names}
    assert list(seen) == leaveout.__all__ and [alias.name for node in imports for alias in node.names] == list(seen)
    for name, module in seen.items():
        assert getattr(leaveout, name) is getattr(importlib.import_module(str(module)), name)
    assert set(dir(leaveout)) == {*seen, "__version__"}


def test_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(AttributeError, match=r"no attribute 'TrainingRuns': .*TrainingRun.*dir\(leaveout\)"):
        _ = leaveout.TrainingRuns  # type: ignore[attr-defined]


def test_import_needs_no_torch():
    code = "import sys, leaveout; from leaveout import LeaveoutError; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
