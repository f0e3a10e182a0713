"""The JSON API: what it answers, what it refuses, and that nothing waits for a model that need not."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path

import httpx2
import pytest
from starlette.testclient import TestClient

from leaveout import Index, TrainingRun
from leaveout.web.api import ROUTES, application, openapi
from leaveout.web.guard import BODY
from leaveout.web.lane import Busy, Lane
from leaveout.web.requests import TEXT
from leaveout.web.serve import listening
from leaveout.web.workbench import Workbench

from .conftest import EVIL, ROWS

QUESTION = {"prompt": "Question 1:", "answer": " Copper conducts heat better than iron does"}
DOCS = Path(__file__).parents[2] / "docs" / "reference"


def post(client, path, body, status=200):
    found = client.post(path, json=body)
    assert found.status_code == status, found.text
    return found.json()


def get(client, path, status=200, **query):
    found = client.get(path, params=query)
    assert found.status_code == status, found.text
    return found.json()


# ---------------------------------------------------------------- the index


def test_ask_gives_the_rows_of_a_search_both_ways(client, place):
    found = post(client, "/api/ask", {**QUESTION, "k": 3})
    index = Index.open(place / "idx")
    query = index.ask(QUESTION["prompt"], QUESTION["answer"])
    everything = index.score([query], length="cosine")[0]
    hits = index.search([query], 3)[0]
    assert [hit["id"] for hit in found["up"]] == [hit.id for hit in hits]
    assert [hit["score"] for hit in found["up"]] == pytest.approx([hit.score for hit in hits])
    assert found["up"][0]["share"] == 1
    worst = sorted(everything)[:3]
    assert [hit["score"] for hit in found["down"]] == pytest.approx([score for score in worst if score < 0], rel=1e-4)
    assert found["considered"] == len(index)
    assert found["verdict"].startswith("One row stands out: the next scores")


def test_contrast_swaps_up_and_down(client):
    one = post(client, "/api/ask", {**QUESTION, "against": " A prime number", "k": 4})
    other = post(client, "/api/ask", {"prompt": QUESTION["prompt"], "answer": " A prime number",
                                      "against": QUESTION["answer"], "k": 4})  # fmt: skip
    assert [hit["id"] for hit in one["up"]] == [hit["id"] for hit in other["down"]]
    assert [hit["score"] for hit in one["down"]] == pytest.approx([-hit["score"] for hit in other["up"]], rel=1e-3)


def test_filters_by_sql_by_ticks_and_by_both(client):
    assert get(client, "/api/sources", field="source")["rows"] == {"s2": 5, "s0": 4, "s1": 3, "": 1, EVIL: 1}

    def ids(**more):
        found = post(client, "/api/ask", {**QUESTION, "k": 20, **more})
        return {hit["id"] for hit in [*found["up"], *found["down"]]}

    assert ids(field="source", only=["s1"]) <= {row["id"] for row in ROWS if row["source"] == "s1"}
    assert ids(field="source", only=[EVIL, ""]) == {"evil/../row", "row 1"}
    assert ids(field="source", only=["s1", "s0"], where="source = 's0' OR 1") == ids(field="source", only=["s0", "s1"])
    assert ids(only=["row 9"]) == {"row 9"}
    assert len(ids(group_by="source")) <= 2 * 5
    assert "unknown column" in post(client, "/api/ask", {**QUESTION, "where": "sauce = 1"}, 400)["error"]
    assert "no field 'sauce'" in get(client, "/api/sources", 400, field="sauce")["error"]


def test_explain_splits_scores_over_words(client):
    hits = post(client, "/api/ask", {**QUESTION, "k": 3})["up"]
    found = post(client, "/api/explain", {**QUESTION, "ids": [hit["id"] for hit in hits]})
    assert "".join(found["answer"]) == QUESTION["prompt"] + QUESTION["answer"]
    assert sum(map(abs, found["shares"])) == pytest.approx(1, abs=0.01)
    assert found["shares"][:3] == [0, 0, 0]  # the prompt is context only
    for row, hit in zip(found["rows"], hits, strict=True):
        assert "".join(row["words"]) == hit["text"]
        assert sum(row["weights"]) == pytest.approx(row["score"], rel=1e-2)
        assert sum(value for _, _, value in row["pairs"]) == pytest.approx(row["score"], rel=1e-2)
        start, end = row["passage"]
        assert 0 <= start < end <= len(row["words"])
    assert found["first"] == len(found["answer"])
    both = post(client, "/api/explain", {**QUESTION, "against": " A prime number", "ids": ["row 3"]})
    first = both["first"]
    assert "".join(both["answer"][:first]) == QUESTION["prompt"] + QUESTION["answer"]
    assert "".join(both["answer"][first:]) == QUESTION["prompt"] + " A prime number"
    assert sum(both["rows"][0]["answer_weights"][first:]) < 0  # the row favours the other answer
    best = max(found["rows"][0]["pairs"], key=lambda pair: pair[2])
    assert found["answer"][best[0]] == found["rows"][0]["words"][best[1]] == " Copper"


def test_controls_are_those_of_a_search(client, place, monkeypatch):
    assert "at least 50 rows" in post(client, "/api/controls", QUESTION, 400)["error"]
    monkeypatch.setattr("leaveout.readout.controls.LEAST", 10)
    found = post(client, "/api/controls", QUESTION)
    index = Index.open(place / "idx")
    hits = index.search([index.ask(QUESTION["prompt"], QUESTION["answer"])], controls=True)[0]
    assert hits.controls is not None and found == json.loads(json.dumps(hits.controls.facts()))


def test_groups_are_sums_over_all_rows(client, place):
    index = Index.open(place / "idx")
    scores = dict(zip(index.ids, index.score([index.ask(QUESTION["prompt"], QUESTION["answer"])])[0], strict=True))
    found = post(client, "/api/groups", {**QUESTION, "group_by": "source", "where": "source = 's0'"})["groups"]
    assert [(group["name"], group["rows"]) for group in found] == [("s0", 4)]
    wanted = sum(float(scores[row["id"]]) for row in ROWS if row["source"] == "s0")
    assert found[0]["total"] == pytest.approx(wanted, rel=1e-4) and found[0]["best"] == "row 9"
    assert "group_by" in post(client, "/api/groups", QUESTION, 400)["error"]


def test_row_in_full_is_as_it_came_whatever_its_id(client):
    found = get(client, "/api/row", id="evil/../row")
    assert found["row"]["response"] == f" {EVIL}" and found["text"] == f"Say: {EVIL}"
    assert "no row has the id" in get(client, "/api/row", 404, id="nobody")["error"]


def test_index_facts_check_and_queries(client, place):
    facts = get(client, "/api/index")
    assert facts["rows"] == 14 and facts["sentences"][0].startswith("14 rows, from ")
    assert get(client, "/api/check") == {"problems": []}
    named = {query["name"]: query for query in get(client, "/api/queries")}
    assert named["copper"]["prompt"] == "Question 1:" and named["ferry"]["measure"] == "probability"


# ---------------------------------------------------------------- the run


def test_rows_meet_the_run_by_id_and_content(client):
    def met(id):
        return get(client, "/api/row", id=id)["run"]

    assert met("row 0") == {"unit": "s0", "examples": 4, "note": None}
    assert met("the same")["unit"] == "s2"  # by its content
    assert met("row 1") == {"unit": None, "note": "the run has another text under this id"}
    assert met("evil/../row") == {"unit": None, "note": "the run was not trained on this row"}


def test_units_are_found_by_a_part_of_their_names(client, bench):
    assert get(client, "/api/run")["units"] == 3
    found = get(client, "/api/units", find="1")
    assert found == {"units": [{"name": "s1", "examples": 4, "trained": True}], "of": 1}
    bench.examples.units |= {f"more {n}": bench.examples.units["s1"] for n in range(400)}
    found = get(client, "/api/units", find="")
    assert len(found["units"]) == 300 and found["of"] == 403


def test_what_if_is_the_prediction_of_the_run(client, place):
    body = {**QUESTION, "queries": ["ferry"], "sets": [["s0"], ["row 1", "row 4", "row 7", "row 10"]], "curve": True}
    found = post(client, "/api/what-if", body)
    run = TrainingRun.open(place / "run")
    told = run.predict([run.recipe.ask(QUESTION["prompt"], QUESTION["answer"])], body["sets"])
    lines = [line for line in found["lines"] if line["query"] != "ferry"]
    assert [line["predicted"] for line in lines] == pytest.approx(told.mean[0].tolist())
    low, high = told.interval()
    assert [line["low"] for line in lines] == pytest.approx(low[0].tolist(), rel=1e-6)
    assert [line["high"] for line in lines] == pytest.approx(high[0].tolist(), rel=1e-6)
    assert "Without s0 the loss would rise by" in lines[0]["sentence"] and "nats" in lines[0]["sentence"]
    assert "nats" not in next(line for line in found["lines"] if line["query"] == "ferry")["sentence"]
    curve = found["curves"][-1]
    assert curve["shares"][0] == 0 and curve["shares"][-1] == 1
    assert curve["predicted"][0] == pytest.approx(told.base[0, 0]) and curve["predicted"][-1] == pytest.approx(
        told.mean[0, 1]
    )


def test_what_cannot_be_predicted_is_said(client):
    assert "no query" in post(client, "/api/what-if", {"sets": [["s0"]]}, 400)["error"]
    assert "no query 'coper': did you mean 'copper'?" in post(
        client, "/api/what-if", {"sets": [["s0"]], "queries": ["coper"]}, 400
    )["error"]  # fmt: skip
    assert "no unit and no example" in post(client, "/api/what-if", {**QUESTION, "sets": [["s9"]]}, 400)["error"]
    assert "no unit and no example" in post(client, "/api/verify", {**QUESTION, "sets": [["s9"]]}, 400)["error"]
    assert get(client, "/api/jobs") == []


def test_verify_retrains_in_the_background_while_questions_are_answered(client):
    job = post(client, "/api/verify", {**QUESTION, "sets": [["s0", "s1"], ["s0"]]})
    assert job["state"] in ("waiting", "running") and job["total"] == 2
    assert post(client, "/api/ask", QUESTION)["up"]
    until = time.monotonic() + 60
    while (job := get(client, "/api/job", id=job["id"]))["state"] in ("waiting", "running"):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert job["state"] == "done" and job["done"] == 2, job
    new, measured = job["lines"]
    assert not new["already_measured"] and measured["already_measured"]
    assert measured["actual"] == pytest.approx(measured["predicted"], abs=0.05)
    where = "inside" if new["inside"] else "outside"
    assert job["outcome"] == f"Retrained: it lies {where} the interval." and job["means"].startswith(
        "Without means the same run"
    )
    assert get(client, "/api/jobs")[0]["id"] == job["id"]
    assert post(client, "/api/stop?id=" + job["id"], {})["state"] == "done"  # it is over
    assert "no job" in get(client, "/api/job", 404, id="../1")["error"]


def test_stopped_job_ends(client):
    job = post(client, "/api/verify", {**QUESTION, "sets": [["s1", "s2"]]})
    assert post(client, "/api/stop?id=" + job["id"], {})["state"] == "stopped"
    assert get(client, "/api/job", id=job["id"])["lines"] == []


def test_without_a_run_the_index_is_asked_and_the_rest_is_refused(place):
    with TestClient(application(Workbench(Index.open(place / "idx"))), base_url="http://localhost") as client:
        assert post(client, "/api/ask", QUESTION)["up"][0]["run"] is None
        assert get(client, "/api/run") is None
        for path in ("/api/what-if", "/api/verify"):
            assert "There is no run here" in post(client, path, {**QUESTION, "sets": [["s0"]]}, 400)["error"]


def test_run_from_python_is_shown_but_not_predicted(place, tmp_path, monkeypatch):
    def refuse(path, device):
        raise __import__("leaveout").UnsupportedError(f"{path} was trained from Python: open it with recipe=.")

    monkeypatch.setattr(TrainingRun, "open", refuse)
    bench = Workbench(Index.open(place / "idx"), place / "run")
    assert bench.run is None and "trained from Python" in bench.run_facts()["problem"]
    assert bench.row("row 0")["run"]["unit"] == "s0"
    with TestClient(application(bench), base_url="http://localhost") as client:
        assert "trained from Python" in post(client, "/api/what-if", {**QUESTION, "sets": [["s0"]]}, 400)["error"]


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([], "must be a JSON object"),
        ({}, "'answer' is missing"),
        ({"answer": 1}, "answer must be a text"),
        ({"answer": "a", "k": 0}, "from 1 to 100"),
        ({"answer": "a", "k": 101}, "from 1 to 100"),
        ({"answer": "a", "k": True}, "a whole number"),
        ({"answer": "a", "only": "s1"}, "only must be a list"),
        ({"answer": "a", "only": [1]}, "only must be a text"),
        ({"answer": "a" * (TEXT + 1)}, "at most"),
        ({"answer": "a", "only": ["x"] * 1001}, "at most 1000"),
        ({"answer": "a", "promt": "b"}, "did you mean 'prompt'?"),
        ({"answer": "a", "form": "poem"}, "no form 'poem'"),
        ({"answer": "", "prompt": ""}, "empty"),
    ],
)
def test_wrong_requests_are_refused_in_a_sentence(client, body, words):
    assert words in post(client, "/api/ask", body, 400)["error"]


def test_other_sites_and_names_are_refused(client):
    def status(method="GET", path="/api/index", **headers):
        content = b"{}" if method == "POST" else None
        return client.request(
            method, path, headers={k.replace("_", "-"): v for k, v in headers.items()}, content=content
        ).status_code

    assert status() == 200 and status(host="localhost:8765") == 200 and status(host="[::1]:8765") == 200
    for name in ("evil.example", "evil.example:8765", "127.0.0.1.evil.example", "localhost.", ""):
        assert status(host=name) == 421  # a name that was made to point here
    assert status(sec_fetch_site="cross-site") == status(sec_fetch_site="same-site") == 403
    assert status(origin="http://evil.example") == status(origin="null") == 403
    assert status(origin="http://127.0.0.1:8765", sec_fetch_site="same-origin") == 200
    assert status("POST", "/api/ask", content_type="text/plain") == 415  # what a form of another site can send
    assert (
        client.post("/api/ask", content=b"x" * (BODY + 1), headers={"content-type": "application/json"}).status_code
        == 413
    )

    def pieces():  # as a whole it would be JSON
        yield b'{"answer": "'
        for _ in range(20):
            yield b"x" * (BODY // 10)
        yield b'"}'

    chunked = client.post("/api/ask", content=pieces(), headers={"content-type": "application/json"})
    assert chunked.status_code == 400 and "not JSON" in chunked.json()["error"]


def test_elsewhere_a_token_is_wanted(bench):
    with TestClient(application(bench, "secret"), base_url="http://10.0.0.5:8765") as client:
        assert client.get("/").status_code == client.get("/api/index").status_code == 401
        assert client.get("/api/index", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/api/index", headers={"Cookie": "leaveout=wrong"}).status_code == 401
        assert client.get("/api/index", headers={"Authorization": "Bearer secret"}).status_code == 200
        first = client.get("/?token=secret")
        assert "HttpOnly" in first.headers["set-cookie"] and "SameSite=Strict" in first.headers["set-cookie"]
        assert client.get("/api/index").status_code == 200  # by the cookie


def test_no_path_reaches_the_file_system(client):
    for path in (
        "/../pyproject.toml",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/page/index.html",
        "/api/../../etc/passwd",
        "//etc/passwd",
    ):
        assert client.get(path).status_code == 404, path


def test_answers_bind_the_browser(client):
    for path in ("/", "/ask.js", "/style.css", "/api/index", "/nothing"):
        headers = client.get(path).headers
        assert (
            "script-src 'self'" in headers["content-security-policy"]
            and "unsafe" not in headers["content-security-policy"]
        )
        assert headers["x-content-type-options"] == "nosniff"
    assert client.get("/api/index").headers["content-type"] == "application/json"


def test_description_is_served_and_is_in_the_docs(client):
    assert client.get("/api/openapi.json").json() == openapi()
    assert json.loads((DOCS / "openapi.json").read_text(encoding="utf-8")) == openapi()
    assert set(openapi()["paths"]) == {call.path for call in ROUTES}


# ---------------------------------------------------------------- the lane


def test_lane_answers_in_order_refuses_too_many_and_drops_who_left():
    async def scenario():
        lane, gate, seen = Lane(3), threading.Event(), []

        def work(name):
            gate.wait(10)
            seen.append(name)
            return name

        first, gone, last = (asyncio.create_task(lane.run(work, name)) for name in ("first", "gone", "last"))
        await asyncio.sleep(0.05)
        with pytest.raises(Busy, match="3 questions wait already"):
            await lane.run(work, "too many")
        gone.cancel()
        await asyncio.sleep(0.05)
        gate.set()
        assert await first == "first" and await last == "last"
        assert seen == ["first", "last"] and lane.waiting == 0
        lane.close()

    asyncio.run(scenario())


def test_question_of_an_asker_who_left_is_left_out(place, bench, monkeypatch):
    """Over a real socket: the first question holds the lane, the second is given up while it waits."""
    gate, seen = threading.Event(), []

    def answer(asked):
        seen.append(asked.answer)
        gate.wait(20)
        return {}

    monkeypatch.setattr(bench, "ask", answer)
    server = listening(bench, "127.0.0.1", 0, None)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    asking = threading.Thread(target=lambda: httpx2.post(f"{address}/api/ask", json={"answer": "first"}, timeout=30))
    try:
        asking.start()
        while not seen:
            time.sleep(0.02)
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{address}/api/ask", json={"answer": "gone"}, timeout=0.3)
        time.sleep(0.3)
        gate.set()
        assert httpx2.post(f"{address}/api/ask", json={"answer": "last"}, timeout=30).status_code == 200
        assert seen == ["first", "last"]
    finally:
        gate.set()
        asking.join()
        server.should_exit = True
        thread.join()


def test_files_are_read_while_a_query_runs(client, bench, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(bench, "ask", lambda asked: {"waited": gate.wait(20)})
    asker = threading.Thread(target=lambda: client.post("/api/ask", json=QUESTION))
    asker.start()
    try:
        assert get(client, "/api/row", id="row 0")["id"] == "row 0"
        assert asker.is_alive()
    finally:
        gate.set()
        asker.join()
