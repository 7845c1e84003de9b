"""The browser of the tests sees what it is there to see."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow

PAGE = """<!doctype html><meta charset="utf-8"><title>seen</title>
<style>body { margin: 0; background: white } @media (prefers-color-scheme: dark) { body { background: black } }
div { width: 600px }</style><div>wide</div>"""


def test_it_sees_size_scheme_and_overflow(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(PAGE, "utf-8")
    for scheme, color in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(0, 0, 0)")):
        browser.open(page, width=390, scheme=scheme)
        assert browser.driver.execute_script("return innerWidth") == 390
        assert browser.driver.find_element("tag name", "body").value_of_css_property("background-color") in (
            color,
            color.replace("rgb", "rgba").replace(")", ", 1)"),
        )
        assert browser.overflow() == 210
    browser.open(page, width=1280)
    assert browser.overflow() == 0
    assert browser.requests() == [page.as_uri()]
    assert browser.console() == []
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_it_sees_errors_and_requests_and_reaches_no_other_machine(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        PAGE + '<img src="https://example.com/photo.jpg"><script>console.error("a fault"); missing_name()</script>',
        "utf-8",
    )
    browser.open(page)
    errors = browser.errors()
    assert any("a fault" in line for line in errors)
    assert any("missing_name is not defined" in line for line in errors)
    assert any("ERR_NAME_NOT_RESOLVED" in line for line in errors)
    assert browser.requests() == [page.as_uri(), "https://example.com/photo.jpg"]
    browser.open(page.with_name("page.html"))
    assert len(browser.requests()) == 2  # what an earlier visit asked for is forgotten
