"""Commands that show what there is to others: serve (the page and its API) and mcp (for agents)."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from leaveout.cli.program import Columns, Device, DeviceMap, MaxMemory, Offload, app, open_rows
from leaveout.cli.readout import IndexPath, ModelAt, open_index
from leaveout.errors import needs

RunToo = Annotated[
    Path | None, typer.Argument(metavar="[RUN]", help="Directory of a training run, for what-if and retraining.")
]
Offered = Annotated[
    str | None, typer.Option("--queries", help="Queries to offer by name: rows in any form, with a field `measure`.")
]


@app.command()
def serve(
    idx: IndexPath,
    run: RunToo = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8765,
    queries: Offered = None,
    columns: Columns = None,
    host: Annotated[
        str, typer.Option(help="Address to answer on. Any but 127.0.0.1 wants a token: LEAVEOUT_TOKEN, or a new one.")
    ] = "127.0.0.1",
    model: ModelAt = None,
    device: Device = "cpu",
    offload: Offload = "auto",
    max_memory: MaxMemory = None,
    device_map: DeviceMap = None,
) -> None:
    """Open a page in the browser: ask, leave rows out, check. On an index, and perhaps a run: ask where an answer comes
    from, leave rows out, see what the model would say, and retrain. The same as a JSON API: see /api/openapi.json.

    Example: leaveout serve idx run
    """
    needs("starlette", "The page", extra="ui")
    needs("uvicorn", "The page", extra="ui")
    bench = _workbench(idx, run, queries, columns, model, device, offload, max_memory, device_map)
    from leaveout.web.serve import serve_page

    token = None if host == "127.0.0.1" else os.environ.get("LEAVEOUT_TOKEN") or secrets.token_urlsafe(24)
    serve_page(bench, host, port, token, device)


@app.command()
def mcp(
    idx: IndexPath,
    run: RunToo = None,
    queries: Offered = None,
    columns: Columns = None,
    model: ModelAt = None,
    device: Device = "cpu",
    offload: Offload = "auto",
    max_memory: MaxMemory = None,
    device_map: DeviceMap = None,
) -> None:
    """Let an agent ask an index, and perhaps a run. An MCP server on standard input and output, with the tools search,
    explain, what_if, list_sources and read_row.

    Example: leaveout mcp idx run
    """
    needs("mcp", "The MCP server", extra="mcp")
    bench = _workbench(idx, run, queries, columns, model, device, offload, max_memory, device_map)
    from leaveout.web.agent import agent_server

    agent_server(bench).run()


def _workbench(
    idx: Path,
    run: Path | None,
    queries: str | None,
    columns: str | None,
    model: str | None,
    device: str,
    offload: str,
    max_memory: str | None,
    device_map: str | None,
) -> Any:
    """The index and the run, opened; their model is loaded now, so that the first question need not wait."""
    if columns is not None and queries is None:
        raise typer.BadParameter("--columns goes with rows of a file: --queries")
    opened = open_index(idx, model, device, offload, max_memory, device_map)
    from leaveout.training.queries import as_queries
    from leaveout.web.workbench import Workbench

    bench = Workbench(opened, run, [] if queries is None else as_queries(open_rows(queries, columns)), device)
    if bench.run_problem is not None:
        print(f"leaveout: {bench.run_problem} Its units are shown, but not predicted.", file=sys.stderr)
    print(f"leaveout: loading the model of {idx}", file=sys.stderr)
    _ = opened.signer
    bench.usual()
    return bench
