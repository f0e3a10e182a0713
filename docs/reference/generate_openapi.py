"""Writes docs/reference/openapi.json, the description of the page's API, from the table that it is served by."""

from __future__ import annotations

import json
from pathlib import Path

from leaveout.web.api import openapi

if __name__ == "__main__":
    text = json.dumps(openapi(), indent=1, ensure_ascii=False) + "\n"
    (Path(__file__).parent / "openapi.json").write_text(text, encoding="utf-8")
