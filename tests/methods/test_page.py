"""The example of docs/reference/methods.md runs and says what it promises."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import leaveout.methods

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "reference" / "methods.md").read_text(encoding="utf-8")


def test_example_runs(capsys):
    snippet = re.search(r"<!-- tested by .*?-->\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert snippet
    torch.manual_seed(0)
    exec(snippet[1], {})
    means = [float(x) for x in re.findall(r"mean=([-\d.]+)", capsys.readouterr().out)]
    assert len(means) == 2 and min(means) > 0.3


def test_every_method_is_on_the_page():
    files = {path.stem for path in Path(leaveout.methods.__path__[0]).glob("*.py")}
    for name in files - {"__init__", "effects", "gradients", "registry", "scorer", "signatures"}:
        assert re.search(rf"^\| `{name}[.`]", PAGE, re.MULTILINE), name
