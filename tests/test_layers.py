"""Who may import whom, as docs/architecture.md says."""

from __future__ import annotations

from pathlib import Path

from imports import circles, graph, modules

SOURCE = Path(__file__).parent.parent / "src" / "leaveout"
ROOT = "leaveout"
BASE = {"errors", "plugins", "files"}
FOUNDATION = BASE | {
    "corpus",
    "store",
    "executor",
    "bm25",
    "influence",
    "metrics",
    "projection",
    "quantities",
    "tables",
    "models",
    "words",
}
ALONE = {name: BASE | {name} for name in FOUNDATION}
ALLOWED = {
    **ALONE,
    "jets": FOUNDATION,
    "training": FOUNDATION | {"jets"},
    "deletion": FOUNDATION | {"jets", "training"},
    "readout": FOUNDATION,
    "methods": FOUNDATION | {"training", "deletion", "readout"},
    "evaluation": FOUNDATION | {"training", "deletion", "readout", "methods"},
    "report": FOUNDATION | {"training", "deletion", "readout", "methods", "evaluation"},
}
FREE = {ROOT, "cli", "demo", "web"}


def layer(module: str) -> str:
    return module.split(".")[1] if "." in module else ROOT


def test_layers_import_only_from_below():
    edges = graph(modules(SOURCE))
    wrong = [
        f"{module} imports {other}"
        for module, others in edges.items()
        for other in others
        if layer(module) not in FREE and layer(other) not in ALLOWED[layer(module)] | {layer(module)}
    ]
    assert not wrong


def test_no_module_imports_itself_in_a_circle():
    assert circles(graph(modules(SOURCE))) == []


def test_imports_are_seen_in_every_form(tmp_path):
    package = tmp_path / "house"
    (package / "inner").mkdir(parents=True)
    files = {
        "__init__.py": "", "inner/__init__.py": "from . import deep", "inner/deep.py": "def f():\n    from ..top import x",
        "top.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import house.inner",
        "other.py": "import os\nfrom house import top",
    }  # fmt: skip
    for name, code in files.items():
        (package / name).write_text(code)
    edges = graph(modules(package))
    assert edges["house.inner"] == {"house.inner.deep"}  # its own name is no import of another
    assert edges["house.inner.deep"] == {"house.top"}
    assert edges["house.top"] == {"house.inner"}
    assert edges["house.other"] == {"house", "house.top"}  # the package runs before a module below it
    assert circles(edges) == [["house.inner", "house.inner.deep", "house.top"]]
