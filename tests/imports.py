"""The import graph of the package, read from its sources: imports anywhere in a file count, also those for type checkers."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

Graph = dict[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module below the folder of a package."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def graph(files: Mapping[str, Path]) -> Graph:
    """Module -> the modules of the same package that it imports."""
    return {name: set(_imported(name, path, files)) - {name} for name, path in files.items()}


def _imported(name: str, path: Path, files: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            base = above[: len(above) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module in files:  # its own code runs first, also where what is asked for is a module below it
                yield module
            yield from (name for alias in node.names if (name := f"{module}.{alias.name}") in files)


def circles(edges: Graph) -> list[list[str]]:
    """Groups of modules that reach each other: the strongly connected components of more than one module."""
    reach = {name: _reached(name, edges) for name in edges}
    groups = {frozenset(b for b in reach[a] if a in reach[b]) | {a} for a in edges}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _reached(name: str, edges: Graph) -> set[str]:
    seen: set[str] = set()
    todo = list(edges[name])
    while todo:
        if (at := todo.pop()) not in seen:
            seen.add(at)
            todo += edges.get(at, ())
    return seen
