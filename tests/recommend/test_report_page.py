"""The report of an evaluation in a browser: light and dark, narrow and wide, with hostile titles and texts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from lavic.launch import evaluate
from lavic.model.config import ModelSettings
from lavic.model.item_store import ItemStore, write_manifest, write_part
from lavic.model.loading import Backbone
from tests.browser import Browser

from .conftest import Assets, write_rows

pytestmark = pytest.mark.slow

HOSTILE = '<script>window.harmed = 1</script><img src=https://example.com/x.png onerror="window.harmed = 1">'
LONG_WORD = "W" * 600
"""A word longer than a line."""


@pytest.fixture(scope="module")
def page(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a model with random weights in three orders, with hostile titles, comments and file names."""
    folder = tmp_path_factory.mktemp("report")
    store, backbone = (
        ItemStore.open(assets.store),
        Backbone.load(ModelSettings(name=str(assets.bundle.parent / "base"))),
    )
    titles = itertools.cycle(
        [HOSTILE, LONG_WORD, "</title></style><!--", "' onmouseover='window.harmed = 1", "mug\u202egum"]
    )
    items = [{"id": item, "key": store.key(item), "title": f"{next(titles)} {item[-2:]}"} for item in store.ids]
    (folder / "store").mkdir()
    part = write_part(folder / "store", "00000", items, store.lookup(list(store.ids)))
    write_manifest(folder / "store", backbone, assets.bundle.parent / "vision", [part])
    rows = [json.loads(line) for line in assets.test.read_text().splitlines()][:12]
    for row, text in zip(rows, itertools.cycle([HOSTILE, LONG_WORD, "</p></article><h1>harmed</h1>"]), strict=False):
        row["context"] += f"<comment>{text}</comment>\n"
    write_rows(folder / "<b>test.jsonl", rows)
    argv = ["--bundle", assets.bundle, "--store", folder / "store", "--out", folder / "out", "--draws", 100]
    argv += ["--test", f"main={folder / '<b>test.jsonl'}", "--orders", 3, "--title", f"{HOSTILE} {LONG_WORD}"]
    argv += ["--compare", f"text_only={assets.titles_only}"]
    assert evaluate.main([*map(str, argv)]) == 0
    return folder / "out" / "report.html"


def text(browser: Browser) -> str:
    return str(browser.driver.execute_script("return document.body.textContent"))


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_loads_nothing_and_fits_every_width(page: Path, browser: Browser, width: int, scheme: str) -> None:
    browser.open(page, width=width, scheme=scheme)  # type: ignore[arg-type]
    assert browser.console() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.overflow() <= 0
    colors = browser.driver.execute_script(
        "const style = getComputedStyle(document.body);"
        "return [style.backgroundColor, style.color].map(c => c.match(/[0-9.]+/g).slice(0, 3).map(Number))"
    )
    background, ink = (sum(color) / 3 for color in colors)
    assert (background > 200 > 90 > ink) if scheme == "light" else (background < 60 < 180 < ink)


def test_html_in_texts_is_escaped(page: Path, browser: Browser) -> None:
    browser.open(page)
    assert browser.driver.execute_script("return window.harmed") is None
    count = "return document.querySelectorAll(arguments[0]).length"
    assert browser.driver.execute_script(count, "script, iframe, object, b > b") == 0
    assert browser.driver.execute_script(count, "h1") == 1
    assert browser.driver.execute_script(count, "img:not([src^='data:'])") == 0
    content = text(browser)
    assert content.count(HOSTILE) > 3 and "</p></article><h1>harmed</h1>" in content and "<b>test.jsonl" in content


def test_the_effect_of_shuffling_is_the_first_line(page: Path, browser: Browser) -> None:
    """With random weights, shuffling does not hurt."""
    browser.open(page)
    assert text(browser).startswith("Shuffling the photo tokens between the candidates does not hurt: HitRatio@1 is ")
    sections = [heading.text for heading in browser.driver.find_elements("css selector", "h2")]
    assert {"Controls", "Order of the list", "Calibration"} <= {heading.rstrip("#").strip() for heading in sections}
    circles = browser.driver.find_elements("css selector", ".reliability circle")
    results = json.loads(page.with_name("results.json").read_text())
    bins = list(results["sets"]["main"]["calibration"].values())[:3]
    assert len(circles) == sum(map(len, bins)) > 0


def test_filters_show_the_number_of_cases_they_name(page: Path, browser: Browser) -> None:
    browser.open(page)
    script = (
        "return [...document.querySelectorAll('.case')].filter(c => getComputedStyle(c).display !== 'none')"
        ".map(c => c.className)"
    )
    labels = browser.driver.find_elements("css selector", ".filters label")
    assert len(labels) == 3 + 2 * 6  # all, right, wrong; won and lost against the six other arms that rank
    all_cases = browser.driver.execute_script(script)
    assert len(all_cases) == 12
    filtered = []
    for label in labels:
        browser.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", label)
        label.click()
        classes = browser.driver.execute_script(script)
        name, count = label.text.rsplit(maxsplit=1)
        assert len(classes) == int(count)
        filtered.append((name, classes))
    assert any(name == "won" and 0 < len(classes) < 12 for name, classes in filtered)
    assert all("wrong" in class_name for name, classes in filtered if name == "lost" for class_name in classes)
    assert all("right" in class_name for name, classes in filtered if name == "won" for class_name in classes)


def test_a_case_has_a_permalink(page: Path, browser: Browser) -> None:
    browser.open(page)
    (link,) = browser.driver.find_elements("css selector", "#row-7 .permalink")
    address = link.get_attribute("href")
    assert address == f"{page.as_uri()}#row-7"
    for anchor in ("row-7", "order-of-the-list"):
        browser.open(f"{page.as_uri()}#{anchor}")
        top = browser.driver.execute_script(
            "return document.getElementById(arguments[0]).getBoundingClientRect().top", anchor
        )
        assert -1 <= top < 900
