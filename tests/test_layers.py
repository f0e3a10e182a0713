"""Who may import whom, as docs/architecture.md says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "leaveout"
BELOW = {"errors", "__version__"}
FOUNDATION = {"corpus", "store", "executor", "metrics", "models"}
ALLOWED = {
    "errors": set(),
    **{name: BELOW | {name} for name in FOUNDATION},
    "store": BELOW | {"store"},
    "jets": BELOW | FOUNDATION | {"jets"},
    "training": BELOW | FOUNDATION | {"jets", "training"},
    "deletion": BELOW | FOUNDATION | {"jets", "training", "deletion"},
    "readout": BELOW | FOUNDATION | {"readout"},
    "baselines": BELOW | FOUNDATION | {"baselines", "readout", "training"},
    "evaluation": BELOW | FOUNDATION | {"baselines", "deletion", "evaluation", "readout", "training"},
    "report": BELOW | {"metrics"},
}
FREE = {"__init__", "cli", "demo", "pages", "web"}


def imported(path: Path) -> set[str]:
    """First names under leaveout that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                package = path.relative_to(SOURCE).parts[: -node.level]
                base = [*package, *(node.module.split(".") if node.module else [])]
                names |= {base[0]} if base else {alias.name for alias in node.names}
            elif node.module and node.module.split(".")[0] == "leaveout":
                parts = node.module.split(".")
                names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("leaveout.")}
    return names


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_layer_imports_only_from_below(path):
    layer = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if layer not in FREE:
        assert imported(path) <= ALLOWED[layer]


def test_imports_are_seen_in_every_form(tmp_path):
    fake = SOURCE / "readout" / "imagined.py"
    code = "import leaveout.jets.series\nfrom leaveout.training import x\nfrom ..cli import main\nfrom . import index"
    names = set()
    for line in code.splitlines():
        node_file = tmp_path / "one.py"
        node_file.write_text(line)
        tree = ast.parse(line)
        assert tree.body
        names |= _imported_as(line, fake)
    assert names == {"jets", "training", "cli", "readout"}


def _imported_as(code: str, place: Path) -> set[str]:
    class Fake(type(place)):  # type: ignore[misc]
        def read_text(self, *args, **kwargs):
            return code

    return imported(Fake(place))
