"""The page in headless Chromium: by mouse and by keyboard, light and dark, with what goes wrong."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from incipit.serve.asks import Delta, End, Sampling
from incipit.serve.http.app import Options
from incipit.serve.http.keys import Keys

pytestmark = pytest.mark.slow
PATIENCE = 60_000  # milliseconds
KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("INCIPIT_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium on this machine; INCIPIT_CHROMIUM names one elsewhere")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(chromium: Any, listen: Any, site: Any, **more: Any) -> Iterator[Any]:
    """The page of a site; what it writes on the console and what it asks elsewhere fails the test."""
    faults: list[str] = []
    with listen(site.gate) as (url, _):
        page = chromium.new_page(**more)
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "console",
            lambda message: faults.append(message.text) if "Content Security" in message.text else None,
        )
        page.on(
            "request", lambda request: faults.append(request.url) if not request.url.startswith(url) else None
        )
        page.goto(url)
        page.locator("#prompts li").first.wait_for()
        try:
            yield page
        finally:
            page.close()
    assert not [fault for fault in faults if not fault.startswith("data:")]


def rows(page: Any) -> list[list[str]]:
    return [
        [cell.inner_text() for cell in row.locator("th, td").all()] for row in page.locator("#rows tr").all()
    ]


def test_answers_stand_side_by_side(chromium: Any, listen: Any, site: Any) -> None:
    with opened(chromium, listen, site) as page:
        assert page.locator("#backbone").inner_text() == "over llama"
        page.get_by_role("checkbox", name="best", exact=True).uncheck()
        page.get_by_role("checkbox", name="mood", exact=True).check()
        page.get_by_role("checkbox", name="short", exact=True).check()
        page.locator("#text").fill("a great film\n\n  <b>the</b> bad one ")
        page.get_by_role("button", name="Ask").click()
        page.get_by_text("4 answers in").wait_for()
        assert [th.inner_text() for th in page.locator("thead th").all()] == ["text", "mood", "short"]
        first, second = rows(page)
        assert first[0] == "a great film" and second[0] == "<b>the</b> bad one"  # text, never markup
        assert first[1].split() == ["good", "good", "75.0", "%", "bad", "25.0", "%", "500", "ms"]
        assert first[2].startswith("w0 w1 w2 .") and "cut at its length" in first[2]
        written = [t.ask.do.max_new_tokens for t in site.engine.tickets if isinstance(t.ask.do, Sampling)]
        assert written == [3, 3]  # tickets come in the order of the network
        widths = [
            bar.evaluate("e => e.style.width")
            for bar in page.locator("#rows tr").first.locator(".bar i").all()
        ]
        assert widths == ["75%", "25%"]


def test_the_keyboard_is_enough(chromium: Any, listen: Any, site: Any) -> None:
    with opened(chromium, listen, site) as page:
        page.keyboard.press("Tab")
        assert page.evaluate_handle("document.activeElement").as_element().get_attribute("id") == "filter"
        page.keyboard.type("sho")
        page.get_by_text("best").wait_for(state="detached")
        page.keyboard.press("Tab")
        page.keyboard.press("Space")
        assert page.get_by_role("checkbox", name="short", exact=True).is_checked()
        for _ in range(2):  # over the card to the text
            page.keyboard.press("Tab")
        page.keyboard.type("a great film")
        page.keyboard.press("Control+Enter")
        page.get_by_text("2 answers in").wait_for()


def test_text_comes_as_it_is_written_and_stops_when_told(chromium: Any, listen: Any, site: Any) -> None:
    site.engine.by_hand = True
    with opened(chromium, listen, site) as page:
        page.get_by_role("checkbox", name="best", exact=True).uncheck()
        page.get_by_role("checkbox", name="talk", exact=True).check()
        page.locator("#text").fill("hello\nworld")
        page.keyboard.press("Control+Enter")
        site.engine.wait(lambda: len(site.engine.tickets) == 2)
        site.engine.tickets[1].put(Delta((20,), "some words"))
        page.get_by_text("some words").wait_for()
        site.engine.tickets[1].put(End("stop", text=" more"))
        page.get_by_text("some words more").wait_for()
        page.get_by_text("1 of 2 answers").wait_for()
        page.keyboard.press("Escape")
        site.engine.wait(lambda: site.engine.cancelled == [site.engine.tickets[0]])
        page.get_by_text("1 of 2 answers in").wait_for()
        stopped, written = sorted((row[1] for row in rows(page)), reverse=True)
        assert stopped == "stopped" and written.startswith("some words more")


def test_a_card(chromium: Any, listen: Any, site: Any) -> None:
    with opened(chromium, listen, site) as page:
        item = page.locator("#prompts li").filter(has=page.get_by_role("checkbox", name="mood", exact=True))
        item.get_by_text("card").click()
        item.get_by_text("Review: {text}").wait_for()
        said = item.inner_text()
        assert "bad, good" in said and "test accuracy" in said and "0.8750" in said and "4 rows" in said


CURVE = {"metric": "accuracy", "steps": [10, 20, 30], "scores": [0.5, 0.875, 0.75], "best": 20}
MASK = {
    "kind": "masked",
    "mask": ["11", "00", "10"],
    "removed": False,
    "inner": {"kind": "input", "length": 3},
}


def test_figures_of_a_card_are_read_by_eye_and_by_keyboard(chromium: Any, listen: Any, site: Any) -> None:
    site.store.versions["mood"].card.update(curve=CURVE, prompt={"kind": "framed", "inner": MASK})
    site.store.versions["pair"].card.update(
        curve=CURVE | {"metric": "<b>f1", "steps": ["x", 20, 30], "scores": [1, 0.5, 0.5]},
        method="weighted", members=[{"name": "one"}, {"name": "two"}], weights=[0.5, 2],
    )  # fmt: skip
    with opened(chromium, listen, site) as page:
        item = page.locator("#prompts > li").filter(has=page.get_by_role("checkbox", name="mood", exact=True))
        item.get_by_text("card").click()
        item.get_by_text("taken at step 20: 0.8750").wait_for()
        assert "2 of 3 tokens, 3 of 6 pieces kept, the others zero" in item.inner_text()
        curve, mask = item.locator("figure svg").all()
        named = curve.get_attribute("aria-label")
        assert "from 0.50 to 0.88; step 20: 0.8750 was taken" in named
        way = [point.split(",") for point in curve.locator("polyline").get_attribute("points").split()]
        heights = [float(y) for _, y in way]
        assert heights[1] < heights[2] < heights[0], "a higher score stands higher"
        assert [p.get_attribute("d").count("M") for p in mask.locator("path").all()] == [3, 3]
        curve.focus()
        page.keyboard.press("ArrowRight")
        item.get_by_text("step 30: 0.7500").wait_for()
        page.keyboard.press("Home")
        item.get_by_text("step 10: 0.5000").wait_for()
        page.keyboard.press("Tab")
        item.get_by_text("taken at step 20: 0.8750").wait_for()
        pair = page.locator("#prompts > li").filter(has=page.get_by_role("checkbox", name="pair", exact=True))
        pair.get_by_text("card").click()
        pair.get_by_text("one × 0.5, two × 2").wait_for()
        said = pair.inner_text()
        assert "weighted mean of the scores" in said
        assert (
            "<b>f1 on validation" in said and "taken at step 20: 0.5000" in said
        )  # a stranger's card, as text
        assert pair.locator("figure").count() == 1 and pair.locator("figure b").count() == 0


def test_errors_are_shown_where_they_belong(chromium: Any, listen: Any, site: Any) -> None:
    with opened(chromium, listen, site) as page:
        page.get_by_role("checkbox", name="pair", exact=True).check()
        page.locator("#text").fill("one text for two fields")
        page.keyboard.press("Control+Enter")
        page.get_by_text("the prompt's form reads 'a', 'b'").wait_for()
        assert rows(page)[0][1].startswith("good")
        page.get_by_text("1 of 2 answers in").wait_for()


def test_a_server_that_asks_for_a_key(chromium: Any, listen: Any, make: Any) -> None:
    with opened(chromium, listen, make(Options(keys=Keys.of([KEY], "keys")))) as page:
        page.get_by_label("This server asks for a key.").fill(KEY)
        page.keyboard.press("Enter")
        page.get_by_role("checkbox", name="mood", exact=True).wait_for()
        assert page.locator("#key").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_dark_and_narrow(chromium: Any, listen: Any, site: Any, scheme: str) -> None:
    with opened(chromium, listen, site, color_scheme=scheme, viewport={"width": 360, "height": 800}) as page:
        page.locator("#text").fill("a-very-long-word-that-nobody-can-break-" * 2)
        page.keyboard.press("Control+Enter")
        page.get_by_text("1 answer in").wait_for()
        wide = page.locator("html").evaluate("e => e.scrollWidth <= e.clientWidth")
        paper = page.locator("html").evaluate("e => getComputedStyle(e).backgroundColor")
        assert wide, "nothing scrolls sideways on a phone"
        dark = sum(map(int, paper.removeprefix("rgb(").removesuffix(")").split(","))) < 300
        assert dark == (scheme == "dark")
