"""The page in a real browser: two adapters answer one question side by side."""

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.serve.conftest import TOKEN

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def browser():
    if not CHROMIUM:
        pytest.skip("no chromium here: apt install chromium, or set CHROMIUM")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def test_two_answers_side_by_side(running, oracle, browser, tmp_path):
    page = browser.new_page(viewport={"width": 1000, "height": 700})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(running.url)
    page.get_by_label("token", exact=True).fill(TOKEN)
    page.get_by_label("token", exact=True).press("Tab")
    page.get_by_label("first").select_option("a0")
    page.get_by_label("second").select_option("a1")
    page.get_by_label("longest answer, tokens").fill("24")
    page.get_by_label("question").fill("tell me")
    page.get_by_role("button", name="Ask").click()
    cards = page.locator("#answers article")
    sync_api.expect(cards.locator("footer").nth(0)).to_contain_text("tokens", timeout=30_000)
    sync_api.expect(cards.locator("footer").nth(1)).to_contain_text("tokens", timeout=30_000)
    assert cards.locator("h2").all_inner_texts() == ["a0", "a1"]
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "tell me"}]
    for number, name in enumerate(("a0", "a1")):
        said = cards.locator("pre").nth(number).evaluate("node => node.textContent")
        assert said.split() == oracle.messages(name, system, 24).split()
        assert re.search(r"\d+ tokens .*first after \d+ ms", cards.locator("footer").nth(number).inner_text())
    boxes = [cards.nth(number).bounding_box() for number in range(2)]
    assert boxes[0]["y"] == boxes[1]["y"], "side by side"
    if kept := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(kept) / "page.png")
        page.set_viewport_size({"width": 390, "height": 800})
        page.screenshot(path=Path(kept) / "page-narrow.png")
    page.set_viewport_size({"width": 390, "height": 800})
    boxes = [cards.nth(number).bounding_box() for number in range(2)]
    assert boxes[0]["y"] < boxes[1]["y"], "one above the other on a phone"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.get_by_label("question").fill("x" * 300)
    page.get_by_role("button", name="Ask").click()
    sync_api.expect(cards.locator("footer").nth(0)).to_contain_text("more than the context", timeout=30_000)
    assert not problems
