"""The JSON API and the files of the page, as one ASGI application.

    app = application(Workbench(Index.open("idx"), "run"))

Each line of ROUTES is one thing that can be asked: what is served, and what `openapi` describes, are made of the same table.
No path of a request reaches the file system: the page's files are read once, under fixed names.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import leaveout
from leaveout.web.guard import Guard
from leaveout.web.lane import EXPECTED, Busy, Job, Jobs, Lane
from leaveout.web.requests import Ask, Explain, WhatIf, read, schema
from leaveout.web.workbench import Workbench

TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
FILES = (
    "index.html",
    "page.js",
    "ask.js",
    "words.js",
    "whatif.js",
    "facts.js",
    "dom.js",
    "api.js",
    "style.css",
    "icon.svg",
)
"""What the page consists of: the first at /, the others under their names."""


class Missing(ValueError):
    """There is nothing of the name that was given."""


@dataclass
class Desk:
    """What answers: a workbench, its lane, and the retrainings of its run."""

    bench: Workbench
    lane: Lane
    jobs: Jobs | None

    def running(self) -> Jobs:
        """The retrainings. Raises: UnsupportedError without a run that can be retrained."""
        self.bench.require_run()
        assert self.jobs is not None
        return self.jobs

    def job(self, id: str) -> Job:
        """A job. Raises: Missing."""
        found = None if self.jobs is None else self.jobs.find(id)
        if found is None:
            raise Missing(f"There is no job {id!r}: it may be forgotten.")
        return found


async def _index(desk: Desk) -> Any:
    return await run_in_threadpool(desk.bench.index_facts)


async def _check(desk: Desk) -> Any:
    return await run_in_threadpool(desk.bench.check)


async def _run(desk: Desk) -> Any:
    return await run_in_threadpool(desk.bench.run_facts)


async def _units(desk: Desk, find: str) -> Any:
    return desk.bench.units(find)


async def _queries(desk: Desk) -> Any:
    return desk.bench.query_list()


async def _sources(desk: Desk, field: str) -> Any:
    return await run_in_threadpool(desk.bench.sources, field)


async def _row(desk: Desk, id: str) -> Any:
    try:
        return await run_in_threadpool(desk.bench.row, id)
    except ValueError as error:
        raise Missing(str(error)) from None


async def _ask(desk: Desk, asked: Ask) -> Any:
    return await desk.lane.run(desk.bench.ask, asked)


async def _explain(desk: Desk, asked: Explain) -> Any:
    return await desk.lane.run(desk.bench.explain, asked)


async def _controls(desk: Desk, asked: Ask) -> Any:
    return await desk.lane.run(desk.bench.controls, asked)


async def _groups(desk: Desk, asked: Ask) -> Any:
    return await desk.lane.run(desk.bench.groups, asked)


async def _what_if(desk: Desk, asked: WhatIf) -> Any:
    return await desk.lane.run(desk.bench.what_if, asked)


async def _verify(desk: Desk, asked: WhatIf) -> Any:
    jobs = desk.running()
    await desk.lane.run(desk.bench.what_if, asked)  # what cannot be predicted is refused here, not in the job
    return jobs.add(desk.bench.asked_of_run(asked), asked.sets, asked.meaning).facts()


async def _jobs(desk: Desk) -> Any:
    return [] if desk.jobs is None else [job.facts() for job in desk.jobs.all()]


async def _job(desk: Desk, id: str) -> Any:
    return desk.job(id).facts()


async def _stop(desk: Desk, id: str) -> Any:
    job = desk.job(id)
    assert desk.jobs is not None
    desk.jobs.stop(job)
    return job.facts()


@dataclass(frozen=True)
class Call:
    """One thing that can be asked: `body` is read from JSON, `query` are texts of the address."""

    method: str
    path: str
    says: str
    answer: Callable[..., Awaitable[Any]]
    body: type | None = None
    query: tuple[str, ...] = ()


ROUTES = (
    Call("GET", "/api/index", "Sizes, settings, model and notes of the index.", _index),
    Call("GET", "/api/check", "What is wrong with the files; reads all of them.", _check),
    Call("GET", "/api/run", "Sizes, measurements and notes of the run; null without one.", _run),
    Call("GET", "/api/units", "Units of the run whose names hold a text, which may be empty.", _units, query=("find",)),
    Call("GET", "/api/queries", "Queries that are offered by name.", _queries),
    Call("GET", "/api/sources", "How many rows have each value of a field, or of `unit`.", _sources, query=("field",)),
    Call("GET", "/api/row", "A row in full.", _row, query=("id",)),
    Call("POST", "/api/ask", "The rows that push an answer up and down most.", _ask, Ask),
    Call("POST", "/api/explain", "Which words of rows answer which words of the answer.", _explain, Explain),
    Call("POST", "/api/controls", "Whether length or a text search explain the rows that `ask` finds.", _controls, Ask),
    Call("POST", "/api/groups", "What the rows of each value of `group_by` add up to.", _groups, Ask),
    Call("POST", "/api/what-if", "Answers' losses under the model without some of its data.", _what_if, WhatIf),
    Call("POST", "/api/verify", "The same, and really retrained, as a job.", _verify, WhatIf),
    Call("GET", "/api/jobs", "Retrainings, the newest first.", _jobs),
    Call("GET", "/api/job", "One retraining, with what it found so far.", _job, query=("id",)),
    Call("POST", "/api/stop", "Stops a retraining; what it did is kept.", _stop, query=("id",)),
)


def application(bench: Workbench, token: str | None = None, device: str = "cpu") -> Starlette:
    """The application of one workbench; `token`: see `Guard`."""
    desk = Desk(bench, Lane(), None)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if bench.run is not None:
            desk.jobs = Jobs(bench.run.path, device)
        try:
            yield
        finally:
            desk.lane.close()
            if desk.jobs is not None:
                desk.jobs.close()

    described = _json(openapi())
    routes = [Route(call.path, functools.partial(_serve, desk, call), methods=[call.method]) for call in ROUTES]
    routes.append(Route("/api/openapi.json", lambda request: Response(described, media_type="application/json")))
    routes += [Route("/" if name == FILES[0] else f"/{name}", _file(name)) for name in FILES]
    return Starlette(routes=routes, lifespan=lifespan, middleware=[Middleware(Guard, token=token)])


async def _serve(desk: Desk, call: Call, request: Request) -> Response:
    """Reads a request, answers it, and turns expected errors into a sentence."""
    try:
        given: dict[str, Any] = {name: request.query_params.get(name, "") for name in call.query}
        if call.body is not None:
            try:
                body = json.loads(await request.body())
            except (ValueError, RecursionError):
                raise ValueError("The request is not JSON.") from None
            given["asked"] = read(call.body, body)
        answer = await _while_asked(call.answer(desk, **given), request)
        return Response(_json(answer), media_type="application/json")
    except Missing as error:
        return _problem(404, error)
    except Busy as error:
        return _problem(503, error)
    except EXPECTED as error:
        return _problem(400, error)


async def _while_asked(answer: Awaitable[Any], request: Request) -> Any:
    """The answer, unless its asker goes away before: then what still waits for its turn is left out."""
    work, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Busy("The asker went away.")
        return work.result()
    finally:
        work.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _problem(status: int, error: Exception) -> Response:
    return Response(_json({"error": " ".join(str(error).split())}), status, media_type="application/json")


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def _file(name: str) -> Callable[[Request], Response]:
    found = resources.files("leaveout.web") / "page" / name
    content, kind = found.read_bytes(), TYPES[name[name.rindex(".") :]]
    return lambda request: Response(content, media_type=kind)


def openapi() -> dict[str, Any]:
    """The description of the API, OpenAPI 3.1."""
    error = {"description": "Why not, in a sentence.", "content": _content({"$ref": "#/components/schemas/Error"})}
    paths: dict[str, Any] = {}
    for call in ROUTES:
        found: dict[str, Any] = {"summary": call.says, "operationId": call.path.removeprefix("/api/")}
        found["responses"] = {"200": {"description": call.says, "content": _content({})}, "default": error}
        if call.query:
            found["parameters"] = [
                {"name": name, "in": "query", "required": True, "schema": {"type": "string"}} for name in call.query
            ]
        if call.body is not None:
            named = {"$ref": f"#/components/schemas/{call.body.__name__}"}
            found["requestBody"] = {"required": True, "content": _content(named)}
        paths.setdefault(call.path, {})[call.method.lower()] = found
    bodies = {call.body.__name__: schema(call.body) for call in ROUTES if call.body is not None}
    error_schema = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "leaveout",
            "version": leaveout.__version__,
            "description": "Which training data made the model say this, and what would it say without it?",
        },
        "paths": paths,
        "components": {"schemas": {**bodies, "Error": error_schema}},
    }


def _content(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
