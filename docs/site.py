"""What mkdocs does not do by itself: notebooks become pages, links that leave the site become names of files, and a list may
follow a line of text at once, as on GitHub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

CODE = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)
LIST = re.compile(r"^(?![*\s|#]|\d+\. )(.+)\n(?=\* |1\. )", re.MULTILINE)
LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)*)([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Each notebook of docs/notebooks as a page of Markdown with its outputs, beside the notebook itself."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        notebook = json.loads(Path(file.abs_src_path).read_text(encoding="utf-8"))
        page = "\n\n".join(_cell(cell) for cell in notebook["cells"])
        name = f"[The notebook itself]({Path(file.src_uri).name})"
        files.append(File.generated(config, file.src_uri.replace(".ipynb", ".md"), content=f"{page}\n\n{name}\n"))
    return files


def _cell(cell: dict[str, Any]) -> str:
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return text
    return "\n\n".join([f"```python\n{text}\n```", *(_output(output) for output in cell["outputs"])])


def _output(output: dict[str, Any]) -> str:
    """A table or a page as HTML where there is one, else text."""
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "text/html" in data:
        return "<div>" + "".join(data["text/html"]).replace("\n\n", "\n") + "</div>"
    return "```text\n" + "".join(data["text/plain"]).rstrip("\n") + "\n```"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links out of docs/ become the path of what they lead to; links to notebooks lead to their pages."""
    here, root = Path(page.file.src_uri).parent, Path(config.config_file_path).parent

    def told(match: re.Match[str]) -> str:
        words, up, place, _ = match.groups()
        if place.endswith(".ipynb") and not page.file.src_uri.startswith("notebooks/"):
            return match[0].replace(".ipynb", ".md")
        target = (root / "docs" / here / up / place).resolve()
        if up and not target.is_relative_to(root / "docs") and target.exists():
            path = str(target.relative_to(root))
            return words if words.strip("`") == path else f"{words} (`{path}`)"
        return match[0]

    parts = CODE.split(LINK.sub(told, markdown))
    return "".join(part if place % 2 else LIST.sub(r"\1\n\n", part) for place, part in enumerate(parts))
