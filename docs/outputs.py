"""Runs the commands and the Python of a page, and writes below them what they print.

    python docs/outputs.py                           # all pages and notebooks of PAGES; the README asks what `make demo` made
    python docs/outputs.py README.md                 # one
    python docs/outputs.py --check README.md         # 1 where what is printed now has another form

In such a page, a block `console` holds commands behind `$ `, each with what it prints; a block with a title is a file; a
block `text` right behind a block `python` is what that prints. All blocks of a page run in one directory, in order.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": ROOT,
    "docs/tutorial/first-hour.md": None,
    "docs/notebooks/find-and-explain.ipynb": None,
    "docs/notebooks/leave-out-and-verify.ipynb": None,
}
"""Each page with the directory it runs in; without one, in an empty one."""
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"```python\n(?:(?!```).)*?^```\n\n?```text", re.MULTILINE | re.DOTALL)
"""Only where a page shows what its Python prints is that run here."""
NOISE = re.compile(r"\d+%\||\[\d\d:\d\d, |FutureWarning|^  warnings\.warn\(")
"""What only bars of progress and warnings of other packages have."""
WIDTH = 104


def refreshed(page: str, place: Path, run: Callable[[str, Path], str] | None = None) -> str:
    """The page with what its blocks print now.

    Raises: RuntimeError for a command that fails.
    """
    names: dict[str, Any] = {}
    printed: str | None = None

    def block(match: re.Match[str]) -> str:
        nonlocal printed
        kind, title, body = match.groups()
        before, printed = printed, None
        if title:
            (place / title).write_text(body, encoding="utf-8")
        elif kind == "console":
            return f"```console\n{_transcript(body, place, run or shell)}```"
        elif kind == "python" and PRINTED.search(page):
            with contextlib.redirect_stdout(io.StringIO()) as out, _inside(place):
                exec(body, names)
            printed = out.getvalue()
        elif kind == "text" and before is not None:
            return f"```text\n{_trimmed(before)}```"
        return match[0]

    return BLOCK.sub(block, page)


@contextlib.contextmanager
def _inside(place: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


def _transcript(body: str, place: Path, run: Callable[[str, Path], str]) -> str:
    """Every command with its output; commands that print nothing, or of whose output nothing was shown, stay bare."""
    told = ""
    for command in re.findall(r"^\$ ((?:[^\n\\]|\\[\s\S])*)", body, re.MULTILINE):
        shown = body.partition(f"$ {command}\n")[2]
        output = run(command, place)
        told += f"$ {command}\n" + ("" if re.match(r"\$ |\Z", shown) else _trimmed(output))
    return told


def _trimmed(text: str) -> str:
    lines = [line.rstrip() for line in text.strip("\n").splitlines()]
    return "".join(f"{line}\n" for line in lines)


def shell(command: str, place: Path) -> str:
    """What a command prints in `place`, errors and sentences too."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    around = {**os.environ, "PATH": path, "COLUMNS": str(WIDTH), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    into = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(["bash", "-c", command], cwd=place, env=around, text=True, check=False, **into)
    if done.returncode:
        raise RuntimeError(f"`{command}` failed:\n{done.stdout}")
    told = re.sub(r"/\S*/site-packages/", "…/site-packages/", done.stdout.replace(str(place), "/home/you/library"))
    lines = (line for line in told.splitlines() if not NOISE.search(line))
    return re.sub(r"\n{3,}", "\n\n", "".join(line + "\n" for line in lines).lstrip("\n"))  # bars leave empty lines


def form(page: str) -> str:
    """A page without its numbers and the widths of its columns."""
    return re.sub(r"[ ─━│]+", " ", re.sub(r"[-+]?\d[\d.,e+-]*", "0", page))


def executed(notebook: Path) -> str:
    """A notebook with the outputs of now, without what differs from run to run."""
    import nbformat
    from nbclient import NotebookClient

    found = nbformat.read(notebook, as_version=4)
    with tempfile.TemporaryDirectory() as place:
        NotebookClient(found, timeout=300, kernel_name="python3", resources={"metadata": {"path": place}}).execute()
    for cell in found.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.get("outputs", []):
            if "text/html" in output.get("data", {}):
                output.data.pop("text/plain", None)
    found.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return nbformat.writes(found) + "\n"


def now(name: str, place: Path | None = None) -> str:
    page, place = ROOT / name, place or PAGES[name]
    if page.suffix == ".ipynb":
        return executed(page)
    with tempfile.TemporaryDirectory() as empty:
        return refreshed(page.read_text(encoding="utf-8"), place or Path(empty))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=f"some of {', '.join(PAGES)}; default: all")
    parser.add_argument("--at", type=Path, help="a directory to run pages in, and to keep")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where the form differs")
    args = parser.parse_args(argv)
    differ = 0
    for name in args.pages or PAGES:
        old, new = (ROOT / name).read_text(encoding="utf-8"), now(name, args.at)
        if args.check:
            differ |= form(old) != form(new)
            print(f"{name}: {'another form' if form(old) != form(new) else 'as it was'}", file=sys.stderr)
        else:
            (ROOT / name).write_text(new, encoding="utf-8")
    return differ


if __name__ == "__main__":
    sys.exit(main())
