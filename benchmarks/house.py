"""How large is the house, and does it hold together? Files, code lines, lengths of functions, and import circles.

Code lines are lines without blanks, comments and docstrings; those of imports count. The length of a function is its code
lines, definition included.

    python benchmarks/house.py [--source DIRECTORY --name FILE]
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from measuring import arguments, write_result

ROOT = Path(__file__).parent.parent

sys.path.insert(0, str(ROOT / "tests"))
from imports import circles, graph, modules  # noqa: E402  # below tests/

DEFINED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_lines(path: Path) -> set[int]:
    """Numbers of the code lines of a file."""
    text = path.read_text(encoding="utf-8")
    written = {n for n, line in enumerate(text.splitlines(), 1) if line.strip() and not line.strip().startswith("#")}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DEFINED) and ast.get_docstring(node, clean=False) is not None:
            written -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return written


def lengths(path: Path) -> Iterator[int]:
    """Code lines of each function of a file."""
    code = code_lines(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield len(code & set(range(node.lineno, (node.end_lineno or 0) + 1)))


def main(argv: Sequence[str] | None = None) -> Path:
    parser = arguments(__doc__)
    parser.add_argument("--source", type=Path, default=ROOT / "src" / "leaveout")
    parser.add_argument("--name", default="house.json", help="of the result file")
    args = parser.parse_args(argv)
    files = modules(args.source)
    sizes = sorted(length for path in files.values() for length in lengths(path))
    result = {
        "files": len(files), "code_lines": sum(len(code_lines(path)) for path in files.values()), "functions": len(sizes),
        "function_lines": {"median": sizes[len(sizes) // 2], "p90": sizes[len(sizes) * 9 // 10], "longest": sizes[-1]},
        "circles": circles(graph(files)),
    }  # fmt: skip
    return write_result(args.out, args.name, result, args)


if __name__ == "__main__":
    main()
