"""An MCP server: an agent asks where an answer comes from, and what the model would say without it.

The tools are those of the page, cut to what an agent reads: sentences, ids, short texts. Each says in its answer what can be
asked next. They only read: nothing is trained and nothing is written but values that a run keeps of a query.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations

import leaveout
from leaveout.tables import shorten
from leaveout.web.lane import EXPECTED, Lane
from leaveout.web.requests import Ask, Explain, WhatIf, read
from leaveout.web.workbench import Workbench

Answer = TypeVar("Answer")

TEXT = 500  # characters of a row in a list
WORDS = 12  # words and pairs that are named of a row
INSTRUCTIONS = (
    "Answers where an answer of a language model comes from. search finds the training rows that push an answer up and down; "
    "explain says which words of a row do so; read_row gives a row in full; list_sources counts rows by source; what_if "
    "predicts the answer's loss under the model trained without some units of its data, with a 95 % interval. A score compares "
    "rows of one question only. A row that stands out is a suspect: what_if, or retraining, says what it did."
)


def agent_server(bench: Workbench) -> MCPServer:
    """The server of a workbench; `run()` answers on standard input and output."""
    lane = Lane()
    server = MCPServer("leaveout", version=leaveout.__version__, instructions=INSTRUCTIONS)
    reads = server.tool(annotations=ToolAnnotations(read_only_hint=True, open_world_hint=False))

    async def told(work: Callable[..., Answer], *given: Any) -> Answer:
        try:
            return await lane.run(work, *given)
        except EXPECTED as error:
            raise ToolError(" ".join(str(error).split())) from None

    @reads
    async def search(
        answer: str,
        prompt: str | None = None,
        against: str | None = None,
        where: str | None = None,
        k: int = 5,
        controls: bool = False,
    ) -> dict[str, Any]:
        """Find the training rows that push an answer up most, and down most.

        prompt: what stands before the answer, as context only. against: another answer after the same prompt, to ask why the
        first and not this one. where: an SQL expression over id, unit, text and the rows' fields, such as source = 'web'.
        controls: also say whether length or a text search alone would give the same list.
        """
        given = {"answer": answer, "prompt": prompt, "against": against, "where": where, "k": k}
        return await told(lambda: _search(bench, read(Ask, given), controls))

    @reads
    async def explain(answer: str, id: str, prompt: str | None = None, against: str | None = None) -> dict[str, Any]:
        """Say which words of a row answer which words of the answer, and show the passage that matters."""
        given = {"answer": answer, "prompt": prompt, "against": against, "ids": [id]}
        return await told(lambda: _explain(bench, read(Explain, given)))

    @reads
    async def what_if(
        without: list[str],
        answer: str | None = None,
        prompt: str | None = None,
        queries: list[str] | None = None,
    ) -> dict[str, Any]:
        """Predict an answer's loss if the model were trained without some units of its data, with a 95 % interval.

        without: units, as `run_unit` of found rows and list_sources name them; all are left out together. queries: names of
        the run's queries, instead of an answer.
        """
        given = {"sets": [without], "answer": answer, "prompt": prompt, "queries": queries}
        return await told(lambda: _what_if(bench, read(WhatIf, given)))

    @reads
    async def list_sources(field: str = "unit") -> dict[str, Any]:
        """Count the rows of each value of a field, or of `unit`; name the other fields, the run's units and its queries."""
        return await told(lambda: _sources(bench, field))

    @reads
    async def read_row(id: str) -> dict[str, Any]:
        """A row in full, with its fields and the unit of the run that holds it."""
        return await told(bench.row, id)

    return server


def _search(bench: Workbench, asked: Ask, controls: bool) -> dict[str, Any]:
    found = bench.ask(asked)
    return {
        "verdict": found["verdict"],
        "rows_considered": found["considered"],
        **({"controls": bench.controls(asked)} if controls else {}),
        **{way: [_brief(hit) for hit in found[way]] for way in ("up", "down")},
    }


def _brief(hit: dict[str, Any]) -> dict[str, Any]:
    met = hit["run"] or {"unit": None}
    return {
        "id": hit["id"], "share_of_strongest": round(hit["share"], 3), "score": hit["score"], "fields": hit["fields"],
        "text": shorten(hit["text"], TEXT), "run_unit": met["unit"],
    }  # fmt: skip


def _explain(bench: Workbench, asked: Explain) -> dict[str, Any]:
    found = bench.explain(asked)
    row, answer = found["rows"][0], found["answer"]
    start, end = row["passage"]
    order = sorted(range(len(row["words"])), key=lambda at: -abs(row["weights"][at]))[:WORDS]
    return {
        "id": row["id"], "score": row["score"], "passage": "".join(row["words"][start:end]),
        "strongest_words": [{"word": row["words"][at].strip(), "adds": row["weights"][at]} for at in order],
        "strongest_pairs": [
            {"answer": answer[q].strip(), "row": row["words"][r].strip(), "adds": value}
            for q, r, value in row["pairs"][:WORDS]
        ],
    }  # fmt: skip


def _what_if(bench: Workbench, asked: WhatIf) -> dict[str, Any]:
    found = bench.what_if(asked)
    lines = found["lines"]
    return {"sentences": [*(line["sentence"] for line in lines), found["means"]], "lines": lines}


def _sources(bench: Workbench, field: str) -> dict[str, Any]:
    units = bench.units("")
    return {
        **bench.sources(field), "fields": ["unit", *bench.index.store.info()["fields"]],
        "run_units": [unit["name"] for unit in units["units"]], "run_units_in_all": units["of"],
        "queries": list(bench.queries),
    }  # fmt: skip
