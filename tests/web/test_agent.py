"""The MCP server, asked by the official client in this process, and once as a command on its pipes."""

from __future__ import annotations

import asyncio
import json
import os
import sys

import pytest
from mcp import Client, StdioServerParameters

from leaveout.web.agent import agent_server

from .conftest import EVIL

QUESTION = {"prompt": "Question 1:", "answer": " Copper conducts heat better than iron does"}


def asked(server, *calls):
    """What the calls (tool, arguments) give, as (is it an error, its JSON value or text)."""

    async def scenario():
        async with Client(server) as client:
            return [await client.call_tool(name, given) for name, given in calls]

    answers = asyncio.run(scenario())
    texts = [answer.content[0].text for answer in answers]
    return [
        (answer.is_error, text if answer.is_error else json.loads(text))
        for answer, text in zip(answers, texts, strict=True)
    ]


def test_tools_answer_as_the_page_does(bench):
    found, why, without, sources, row = asked(
        agent_server(bench),
        ("search", {**QUESTION, "k": 2}),
        ("explain", {**QUESTION, "id": "row 9"}),
        ("what_if", {**QUESTION, "without": ["s0"]}),
        ("list_sources", {"field": "source"}),
        ("read_row", {"id": "evil/../row"}),
    )
    assert not any(error for error, _ in (found, why, without, sources, row))
    assert found[1]["verdict"].startswith("One row stands out") and found[1]["up"][0]["id"] == "row 9"
    assert found[1]["up"][0]["run_unit"] == "s0" and len(found[1]["up"]) == 2
    assert why[1]["strongest_words"][0]["word"] == "Copper" and "Copper conducts" in why[1]["passage"]
    assert without[1]["sentences"][0].startswith("Without s0 the loss would rise by")
    assert sources[1]["rows"]["s2"] == 5 and sources[1]["run_units"] == ["s0", "s1", "s2"]
    assert sources[1]["queries"] == ["copper", "ferry"]
    assert row[1]["text"] == f"Say: {EVIL}"


@pytest.mark.parametrize(
    ("tool", "given", "words"),
    [
        ("read_row", {"id": "nobody"}, "no row has the id 'nobody'"),
        ("search", {"answer": "a", "where": "sauce = 1"}, "unknown column"),
        ("search", {"answer": "a", "k": 1000}, "from 1 to 100"),
        ("what_if", {"answer": " a", "without": ["s9"]}, "no unit and no example with the id 's9'"),
    ],
)
def test_wrong_calls_are_errors_in_a_sentence(bench, tool, given, words):
    ((error, text),) = asked(agent_server(bench), (tool, given))
    assert error and words in text


def test_command_answers_on_its_pipes(place):
    arguments = ["-m", "leaveout.cli", "mcp", str(place / "idx"), str(place / "run")]
    server = StdioServerParameters(command=sys.executable, args=arguments, env=dict(os.environ))
    ((error, found),) = asked(server, ("list_sources", {}))
    assert not error and found["run_units"] == ["s0", "s1", "s2"]
