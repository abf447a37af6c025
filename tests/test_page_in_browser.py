"""report.html in a headless Chromium: no console error, nothing asked of a network, filters and
numbers as in the record."""

import time

import pytest

from tests.browser import Browser, find_browser
from tests.test_report import NAMES, REPORT, K, write_record
from utils.page.record_page import write_page
from utils.page.source import dig, number
from utils.storage.record import write_json

pytestmark = pytest.mark.skipif(
    find_browser() is None, reason="no Chromium on the search path, nor in $CHROMIUM"
)
TEXTS = "[...document.querySelectorAll('.card')].map(c => c.textContent)"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of a common record, of one with nothing changed, and of 10,000 changed samples."""
    base = tmp_path_factory.mktemp("pages")
    write_json(
        write_record(base / "empty", changed=0) / "report.json",
        REPORT | {"target_labels": {"detected": [], "true": []}},
    )
    write_record(base / "common", changed=100, n=200)
    write_record(base / "large", changed=10_500, n=11_000)
    return {name: write_page(base / name) for name in ("common", "empty", "large")}


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


@pytest.fixture
def common(browser, pages):
    browser.open(pages["common"])
    yield browser
    assert browser.problems == []


def choose(browser, which, value):
    """Set a control as a person would; returns the words under the controls."""
    browser.evaluate(
        f"(() => {{ const e = document.getElementById('{which}'); e.value = '{value}';"
        "e.dispatchEvent(new Event('change')); })()"
    )
    return browser.evaluate("document.getElementById('count').textContent")


def test_numbers_are_the_reports(common):
    found = common.evaluate(
        "Object.fromEntries([...document.querySelectorAll('[data-key]')]"
        ".map(e => [e.dataset.key, e.textContent]))"
    )
    assert len(found) > 15
    assert found == {key: number(dig(REPORT, key.split("."))) for key in found}


def test_filters_and_order(common):
    assert (
        common.evaluate("document.getElementById('count').textContent") == "1 to 48 of 100 samples"
    )
    assert choose(common, "given", "1") == "1 to 25 of 25 samples"
    cards = common.evaluate(TEXTS)
    assert len(cards) == 25
    assert all(f"{NAMES[1]} → {NAMES[2]}" in card for card in cards)
    assert choose(common, "new", "3") == "0 samples"
    assert choose(common, "given", "") == "1 to 25 of 25 samples"
    choose(common, "new", "")
    assert choose(common, "kind", "POISONED") == "1 to 48 of 100 samples"
    confidence = lambda: [
        float(card.split("confidence ")[1][:4]) for card in common.evaluate(TEXTS)
    ]
    down, _ = confidence(), choose(common, "order", "up")
    assert down == sorted(down, reverse=True)
    assert max(down) == 1
    assert confidence() == sorted(confidence())
    assert min(confidence()) == 0
    choose(common, "order", "index")
    assert [f"sample {k}" in card for k, card in enumerate(common.evaluate(TEXTS))] == [True] * 48


def test_pages_turn_by_keyboard(common):
    common.evaluate("document.getElementById('on').focus()")
    for event in ("keyDown", "keyUp"):
        common.call(
            "Input.dispatchKeyEvent",
            type=event,
            key="Enter",
            code="Enter",
            windowsVirtualKeyCode=13,
            text="\r",
        )
    assert (
        common.evaluate("document.getElementById('count').textContent") == "49 to 96 of 100 samples"
    )


def test_pictures_are_drawn(common):
    tiles = common.evaluate("""Promise.all([...document.querySelectorAll('.tile')].slice(0, 6)
        .map(e => new Promise(done => {
        const i = new Image(); i.onload = () => done([i.naturalWidth, i.naturalHeight]);
        i.onerror = () => done(null);
        i.src = e.style.backgroundImage.slice(5, -2); })))""")
    assert None not in tiles
    assert all(w % 8 == 0 and h % 8 == 0 and w > 0 for w, h in tiles)


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (360, True)])
def test_nothing_spills_and_both_themes_are_drawn(pages, width, dark, tmp_path):
    with Browser(width, 800, dark) as opened:
        opened.open(pages["common"])
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        assert opened.problems == []
        paper = opened.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, paper[4:-1].split(","))) < 150) == dark
        opened.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000


def test_a_set_without_a_change_has_a_calm_page(browser, pages):
    browser.open(pages["empty"])
    assert "No backdoor was found" in browser.evaluate(
        "document.getElementById('verdict').textContent"
    )
    assert browser.problems == []
    assert browser.evaluate("document.querySelectorAll('#classes tbody tr').length") == K


def test_ten_thousand_samples_are_no_burden(browser, pages):
    started = time.monotonic()
    browser.open(pages["large"])
    assert (
        browser.evaluate("document.getElementById('count').textContent")
        == "1 to 48 of 10000 samples"
    )
    assert "10,000 most confident of 10,500" in browser.evaluate(
        "document.querySelector('#gallery + .note').textContent"
    )
    script = (
        "(() => { const t = performance.now(); const e = document.getElementById('order');"
        "e.value = 'up'; e.onchange(); return performance.now() - t; })()"
    )
    assert browser.evaluate(script) < 2000
    assert time.monotonic() - started < 20
    assert browser.problems == []
