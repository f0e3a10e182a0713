"""The page in a real Chromium: `make page-check`. Text of hostile rows is in every view that is looked at."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from leaveout import Index
from leaveout.training.queries import as_queries
from leaveout.web.serve import listening
from leaveout.web.workbench import Workbench

from .conftest import EVIL, ROWS

pytestmark = pytest.mark.browser
QUESTION = {"prompt": "Question 1:", "answer": " Copper conducts heat better than iron does"}
SHOTS = os.environ.get("LEAVEOUT_SHOTS")  # where pictures of each view go


@pytest.fixture(scope="module")
def address(place) -> Iterator[str]:
    bench = Workbench(Index.open(place / "idx"), place / "run", as_queries(place / "queries.jsonl"))
    server = listening(bench, "127.0.0.1", 0, None)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as found:
        browser = found.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["wide", "phone"])
def page(chromium, request, address) -> Iterator[Any]:
    """An empty page that fails on any error of a script and on anything the content policy had to refuse."""
    width, scheme = request.param
    context = chromium.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, base_url=address, accept_downloads=True
    )
    context.set_default_timeout(15_000)
    found, problems = context.new_page(), []
    found.on("pageerror", lambda error: problems.append(str(error)))
    found.on(
        "console",
        lambda told: problems.append(told.text) if told.type == "error" and "status of 4" not in told.text else None,
    )
    found.on(
        "request", lambda asked: problems.append(asked.url) if not asked.url.startswith((address, "blob:")) else None
    )
    yield found
    assert problems == []
    context.close()


def look(page, name):
    """What holds in every view: it fits the width, and no text of a row has become markup or a script."""
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate("window.hacked === undefined && document.querySelectorAll('img').length === 0")
    if SHOTS:
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            width = page.viewport_size["width"]
            page.screenshot(path=Path(SHOTS) / f"{name}_{width}_{scheme}.png", full_page=True)


def ask(page, **more):
    page.goto("/")
    page.goto(f"/#/ask?{urlencode({**QUESTION, **more}, doseq=True)}")
    page.wait_for_selector(".row .tint")


def test_ask_click_words_and_open_a_row(page):
    page.goto("/")
    page.get_by_label("One of the queries").select_option("copper")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_selector(".row .tint")
    assert "prompt=Question+1" in page.url and "stands out" in page.locator(".verdict").inner_text()
    first = page.locator(".row").first.locator("button.link").inner_text()
    word = page.locator(".answer .word", has_text="heat").first
    word.click()
    assert word.get_attribute("aria-pressed") == "true" or page.locator(".answer .word[aria-pressed=true]").count() == 1
    page.get_by_role("button", name="Show everything").click()
    assert page.locator(".answer .word[aria-pressed=true]").count() == 0
    page.get_by_role("button", name="Sum up by source").click()
    page.locator("caption", has_text="Sums of the scores of all rows, by source").wait_for()
    page.locator(".row .word").first.click()
    assert "answers" in page.locator("#results .left").inner_text()
    page.locator(".row button.link").first.click()
    dialog = page.get_by_role("dialog")
    assert "As it came" in dialog.inner_text() and first in dialog.inner_text()
    look(page, "row")
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    look(page, "ask")


def test_hostile_rows_are_only_text(page):
    ask(page, where="source LIKE '%script%'", k=5)
    assert EVIL[:30] in page.locator(".row").first.inner_text()
    page.locator(".row button.link").first.click()
    assert EVIL[:30] in page.get_by_role("dialog").inner_text()
    look(page, "hostile")
    page.keyboard.press("Escape")
    assert (
        page.locator(".row.grey").count() == 1 and "not trained on this row" in page.locator(".row.grey").inner_text()
    )


def test_filter_by_ticks_and_deep_link(page):
    page.goto("/")
    page.get_by_label("Prompt (context only)").fill(QUESTION["prompt"])
    page.get_by_label("Answer that is asked about").fill(QUESTION["answer"])
    page.get_by_text("Filter and group").click()
    page.wait_for_selector("#sources input")
    for name in ("s0", "s2"):
        page.locator(f"#sources input[value={name}]").uncheck()
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_selector(".row .tint")
    shown = page.locator(".row .facts").all_inner_texts()
    assert shown and not any("source: s0" in text or "source: s2" in text for text in shown)
    look(page, "filter")
    ids = page.locator(".row button.link").all_inner_texts()
    link = page.url
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_selector(".row .tint")
    assert page.locator(".row button.link").all_inner_texts() == ids
    assert not page.locator("#sources input[value=s0]").is_checked()


def test_untick_predict_and_retrain(page):
    ask(page)
    page.get_by_role("button", name="Without these").click()
    assert "Left out:" in page.locator(".basket").inner_text()
    page.get_by_role("button", name="Put back").click()
    box = page.locator(".row input[data-unit=s0]").first
    box.uncheck()
    assert not page.locator(".row input[data-unit=s0]").last.is_checked()  # rows of one unit go together
    page.get_by_role("button", name="Predict").click()
    page.wait_for_selector("figure svg .band")
    assert "Without s0 the loss would rise by" in page.locator(".sentences").inner_text()
    page.get_by_role("button", name="Retrain to check").click()
    page.wait_for_selector(".check .verdict", timeout=60_000)
    assert "retrained" in page.locator(".check th").all_inner_texts()
    look(page, "retrained")
    page.goto("/#/jobs")
    page.wait_for_selector(".check .verdict")
    assert "done" in page.locator(".check").first.inner_text()
    look(page, "jobs")


def test_what_if_for_several_queries(page):
    page.goto("/#/what-if?q=copper&q=ferry&without=s0&without=s1")
    page.wait_for_selector("figure")
    assert page.locator("figure").count() == 2
    page.get_by_label("each of them for itself").check()
    page.get_by_role("button", name="Predict").click()
    page.wait_for_selector("figure polyline.line1")
    assert page.locator(".sentences li").count() == 4
    page.get_by_text("As a table").click()
    assert page.locator("table tbody tr").count() == 4
    look(page, "what-if")


def test_contrast_copy_and_download(page):
    ask(page, against=" A prime number")
    assert "Rows for the other answer" in page.locator("#results").inner_text()
    assert page.locator(".tint.down").count() > 0
    look(page, "contrast")
    with page.expect_download() as kept:
        page.get_by_role("button", name="Download CSV").click()
    text = Path(kept.value.path()).read_text(encoding="utf-8")
    assert text.splitlines()[0].startswith('"direction","rank","id","score"') and '"down"' in text
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy as JSON").click()
    page.locator("#status", has_text="copied").wait_for(state="attached")
    assert '"up":' in page.evaluate("navigator.clipboard.readText()")


def test_everything_works_from_the_keyboard(page):
    ask(page)
    page.keyboard.press("j")
    page.keyboard.press("j")
    here = "document.activeElement.closest('li.row')?.querySelector('button.link').textContent"
    second = page.locator(".row button.link").nth(1).inner_text()
    assert page.evaluate(here) == second
    page.keyboard.press("x")
    assert "Left out:" in page.locator(".basket").inner_text()
    page.keyboard.press("o")
    page.get_by_role("dialog").wait_for()
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert "next row" in page.get_by_role("dialog").inner_text()
    page.keyboard.press("Escape")
    page.locator(".answer .word").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator(".answer .word[aria-pressed=true]").count() == 1
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"  # the focus stays at the word
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "answer"
    page.keyboard.type("jx?")  # typed, not obeyed
    assert page.locator("#answer").input_value().endswith("jx?")


def test_facts_and_health(page):
    page.goto("/#/index")
    page.get_by_role("button", name="Check all files").click()
    page.get_by_text("All files are as they were written.").wait_for()
    look(page, "index")
    page.goto("/#/run")
    page.wait_for_selector("table")
    assert "12 examples in 3 units" in page.locator("main").inner_text()
    look(page, "run")


CONTRAST = """() => {
  const channel = (v) => v / 255 <= .03928 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
  const read = (colour) => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d");
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const over = (below, [r, g, b, a]) => [r, g, b].map((v, i) => v * a / 255 + below[i] * (1 - a / 255));
  const under = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.unshift(read(getComputedStyle(at).backgroundColor));
    return layers.reduce(over, [255, 255, 255]);
  };
  const ratio = (node) => {
    const [a, b] = [light(read(getComputedStyle(node).color)), light(under(node))];
    return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  };
  const hasText = (node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  return [...document.querySelectorAll("main *, header *")]
    .filter((node) => hasText(node) && node.getClientRects().length && !(node instanceof SVGElement))
    .map((node) => [ratio(node), node.textContent.slice(0, 30), node.className]).filter(([found]) => found < 4.5);
}"""


def test_contrast_of_text_is_at_least_four_and_a_half(page):
    ask(page, against=" A prime number")
    assert page.evaluate(CONTRAST) == []
    page.evaluate("for (const word of document.querySelectorAll('.tint')) word.style.setProperty('--share', '1')")
    assert page.evaluate(CONTRAST) == []


def test_fifty_askers_at_once_get_their_own_answers(address):
    """No error, no answer mixed up, and memory that does not grow with the askers."""
    import httpx2
    import psutil

    def asked(number):
        row = ROWS[number % len(ROWS)]
        body = {"prompt": row["prompt"], "answer": row["response"][: 20 + number], "k": 3}
        with httpx2.Client(base_url=address, timeout=120) as client:
            found = client.post("/api/ask", json=body)
            assert found.status_code == 200, found.text
            ids = [hit["id"] for hit in found.json()["up"]]
            why = client.post("/api/explain", json={key: body[key] for key in ("prompt", "answer")} | {"ids": ids})
            assert why.status_code == 200, why.text
            assert found.json()["asked"] == "".join(why.json()["answer"]) == body["prompt"] + body["answer"]
            assert [row["id"] for row in why.json()["rows"]] == ids
        return ids, [hit["score"] for hit in found.json()["up"]]

    asked(0)
    before, began = psutil.Process().memory_info().rss, time.monotonic()
    with ThreadPoolExecutor(50) as askers:
        together = list(askers.map(asked, range(50)))
    seconds, grown = time.monotonic() - began, psutil.Process().memory_info().rss - before
    alone = [asked(number) for number in (0, 7, 23, 49)]
    assert [together[number] for number in (0, 7, 23, 49)] == alone
    print(f"50 askers in {seconds:.1f} s, memory grew by {grown / 1e6:.0f} MB")
    assert grown < 200e6
