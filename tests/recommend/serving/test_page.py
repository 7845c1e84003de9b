"""The page in a browser: mouse, keyboard, accessibility, hostile titles, server errors."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest
from fastapi import Response
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.browser import Browser
from tests.recommend.serving.drawn_shop import Shop, make_shop, running
from tests.recommend.serving.page_reader import HOSTILE, Reader

pytestmark = pytest.mark.slow

CONTRAST = """
const channel = (c) => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const color = (text) => text.match(/[\\d.]+/g).map(Number);
const below = (node) => {
  for (let at = node; at; at = at.parentElement) {
    const found = color(getComputedStyle(at).backgroundColor);
    if (found.length < 4 || found[3] === 1) return found;
  }
};
const poor = [];
for (const node of document.querySelectorAll("body *")) {
  const words = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  if (!words || !node.checkVisibility({ visibilityProperty: true })) continue;
  if (node.closest(".quiet, script, noscript")) continue;
  const [a, b] = [light(color(getComputedStyle(node).color)), light(below(node))].sort((x, y) => y - x);
  if ((a + 0.05) / (b + 0.05) < 4.5) poor.push(`${node.outerHTML.slice(0, 80)}: ${(a + 0.05) / (b + 0.05)}`);
}
return poor;
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return make_shop(tmp_path_factory.mktemp("shop") / "set")


@pytest.fixture(scope="module")
def url(shop: Shop) -> Iterator[str]:
    with running(shop.app()) as address:
        yield address


@pytest.fixture
def reader(browser: Browser, shop: Shop, url: str) -> Reader:
    shop.requests.clear()
    shop.answers.clear()
    browser.open(url)
    return Reader(browser, url)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_request_follow_up_like_dislike_and_restart(browser, shop, url, width, scheme):
    browser.open(url, width=width, scheme=scheme)
    reader = Reader(browser, url)
    shop.requests.clear()
    reader.say("a red striped mug")
    assert len(reader.all(".card")) == 10
    reader.until(lambda: reader.photos_loaded() == 10)
    titles = reader.texts(".card .title")
    assert all(titles) and reader.texts("#status") == [f"10 products, the best: {titles[0]}"]
    assert all(text.endswith("%") for text in reader.texts(".card b"))
    assert reader.texts(".card:first-child .methods li") == ["bm25", "tokens"]
    assert "what the photo shows" in reader.texts("#legend")[0]
    assert browser.driver.execute_script(CONTRAST) == []

    reader.say("plain would be fine too")
    first = reader.all(".card")[0].get_attribute("data-id")
    title = reader.texts(".card .title")[0]
    reader.click(".card:first-child .dislike")
    assert reader.texts(".turn.dislike") == [f"Not this: {title}"]
    shown = [card.get_attribute("data-id") for card in reader.all(".card")]
    assert first not in shown and len(shown) == 10
    liked = reader.texts(".card .title")[2]
    reader.click(".card:nth-child(3) .like")
    pressed = [button.get_attribute("aria-pressed") for button in reader.all(".card.liked .like")]
    assert pressed == ["true"] and reader.texts(".turn.like") == [f"Like: {liked}"]
    messages = [turn["content"] for turn in shop.requests[-1]["conversation"]]
    assert messages == ["a red striped mug", "plain would be fine too", "Not that one, please.", f"I like the {liked}."]
    assert {turn["role"] for turn in shop.requests[-1]["conversation"]} == {"user"}
    assert (shop.requests[-1]["k"], shop.requests[-1]["exclude"]) == (10, [first])

    reader.click(".card.liked .like")  # a second click removes the like
    reader.click(".turn.dislike .remove")
    assert len(reader.all(".turn")) == 2 and len(shop.requests[-1]["conversation"]) == 2
    assert browser.driver.execute_script(CONTRAST) == []
    reader.check()
    reader.click("#restart")
    assert not reader.all(".turn") and not reader.all(".card")
    assert browser.driver.execute_script(CONTRAST) == []
    reader.check()


def test_the_page_works_by_keyboard(reader, shop):
    assert reader.focused.get_attribute("id") == "request"
    reader.press("a mug")
    ActionChains(reader.browser.driver).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    reader.press("in blue", Keys.ENTER)
    reader.until(lambda: len(reader.all(".card:not(.blank)")) == 10)
    assert shop.requests[-1]["conversation"][0]["content"] == "a mug\nin blue"
    assert reader.focused.get_attribute("id") == "request"
    reader.press("striped", Keys.TAB, Keys.ENTER)  # to the button
    reader.until(lambda: len(reader.all(".turn")) == 2)
    reader.settle()

    seen = []
    for _ in range(40):
        reader.press(Keys.TAB)
        focused = reader.focused
        seen.append(focused.get_attribute("aria-label") or focused.text)
        assert focused.value_of_css_property("outline-style") != "none" or focused.get_attribute("id") == "request"
        if "like" in (focused.get_attribute("class") or "").split():
            break
    title = reader.texts(".card .title")[0]
    assert seen[-2:] == [title, f"Like: {title}"]
    item = reader.all(".card")[0].get_attribute("data-id")
    reader.press(Keys.SPACE)
    reader.until(lambda: len(reader.all(".turn")) == 3)
    reader.settle()
    assert reader.focused.get_attribute("aria-pressed") == "true", "the focus was lost"
    reader.press(Keys.TAB, Keys.ENTER)  # dislike: its card goes away, so the focus goes to the products
    reader.until(lambda: reader.all(".turn.dislike"))
    reader.settle()
    assert item not in [card.get_attribute("data-id") for card in reader.all(".card")]
    assert reader.focused.get_attribute("id") == "results-name"
    reader.press(Keys.TAB, Keys.ENTER)
    reader.until(lambda: reader.all("dialog[open]"))
    assert reader.texts("#detail-title") == reader.texts(".card:first-child .title")
    reader.press(Keys.ESCAPE)
    reader.until(lambda: not reader.all("dialog[open]"))
    assert "title" in reader.focused.get_attribute("class")
    reader.check()


def test_the_accessibility_tree_has_names_and_roles(reader):
    reader.say("a red mug")
    tree = reader.browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    seen = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node.get("ignored")]
    roles = [role for role, _ in seen]
    unnamed = [role for role, name in seen if role in ("button", "textbox", "link", "region", "list") and not name]
    assert unnamed == []
    assert ("textbox", "Your request") in seen and ("region", "Products") in seen and ("status", "") in seen
    assert roles.count("heading") >= 12 and "main" in roles and "banner" in roles and "contentinfo" in roles
    status = next(element for element in reader.all("[role=status]"))
    assert status.text.startswith("10 products")


def test_markup_in_titles_is_escaped(browser, tmp_path):
    shop = make_shop(tmp_path / "set", HOSTILE, count=len(HOSTILE))
    with running(shop.app()) as url:
        browser.open(url)
        reader = Reader(browser, url)
        before = len(reader.all("h1, h2, script, b, svg, iframe"))
        reader.say("<script>window.hacked = 9</script> <b>a hat</b>")
        assert len(reader.all(".card")) == len(HOSTILE)
        shown = browser.driver.execute_script(
            "return [...document.querySelectorAll('.card .title')].map(title => title.textContent)"
        )
        assert sorted(shown) == sorted(HOSTILE)
        for _ in HOSTILE:  # through turns, labels, the dialog
            reader.click(".card:first-child .title")
            reader.press(Keys.ESCAPE)
            assert browser.overflow() == 0
            reader.click(".card:first-child .dislike")
        assert reader.texts("#nothing") != [""]
        assert len(reader.all(".turn")) == len(HOSTILE) + 1
        assert browser.driver.execute_script("return window.hacked ?? null") is None
        after = len(reader.all("h1, h2, script, b, svg, iframe")) - len(reader.all(".turn .remove svg"))
        assert after == before
        reader.check()


def test_a_like_in_a_long_conversation_is_recorded(browser, tmp_path):
    """A browser does not send more than 64 KiB while it closes a page."""
    shop = make_shop(tmp_path / "set", count=4)
    with running(shop.app(records=True)) as url:
        browser.open(url)
        reader = Reader(browser, url)
        for _ in range(6):
            browser.driver.execute_script("document.getElementById('request').value = '杯'.repeat(4000)")
            reader.say(" ")
        reader.click(".card .like")
        reader.until(lambda: shop.feedback)
        assert len(shop.feedback[0]["conversation"]) == 6 and shop.feedback[0]["liked"]


def test_text_of_any_direction_does_not_turn_the_words_beside_it(browser, tmp_path):
    shop = make_shop(tmp_path / "set", ["\u202emug (blue)!", "كوب أزرق!"], count=4)
    with running(shop.app()) as url:
        browser.open(url)
        reader = Reader(browser, url)
        reader.say("أريد كوباً!")
        for _ in range(2):
            reader.click(".card:not(.liked) .like")
        directions = browser.driver.execute_script(
            "return [...document.querySelectorAll('.turn .text, .card .title')].map("
            "place => [place.textContent, getComputedStyle(place).direction, getComputedStyle(place).unicodeBidi])"
        )
        assert {bidi for _, _, bidi in directions} <= {"isolate", "plaintext"}
        assert {direction for text, direction, _ in directions if "ك" in text} == {"rtl"}


def test_the_content_security_policy_blocks_injection(reader):
    driver = reader.browser.driver
    thrown, hacked = driver.execute_async_script("""
        const done = arguments[0];
        const missing = new Set(["img-src", "style-src-attr", "connect-src", "require-trusted-types-for"]);
        const sinks = [
            () => { document.body.innerHTML = "<b>markup</b>"; },
            () => { document.createElement("script").text = "window.hacked = 1"; },
            () => { document.createElement("script").src = "https://localhost:9/page.js"; },
            () => { document.body.setAttribute("onclick", "window.hacked = 3"); },
        ];
        const thrown = sinks.map((sink) => { try { sink(); return ""; } catch (error) { return error.name; } });
        addEventListener("securitypolicyviolation", (event) => {
            missing.delete(event.effectiveDirective);
            if (!missing.size) done([thrown, window.hacked ?? null]);
        });
        const image = new Image(), script = document.createElement("script");
        image.src = "http://localhost:9/photo.jpg";
        script.append("window.hacked = 2");
        document.body.append(image, script);
        document.body.setAttribute("style", "color: red");
        fetch("http://localhost:9/").catch(() => {});
    """)
    assert hacked is None and thrown == ["TypeError"] * 4


def test_a_busy_server_is_retried(reader, shop):
    shop.answers += [Response("{}", 429, {"Retry-After": "1"}), Response("{}", 503, {"Retry-After": "1"})]
    reader.all("#request")[0].send_keys("a hat", Keys.ENTER)
    reader.until(lambda: "busy" in reader.texts("#problem-text")[0])
    reader.until(lambda: len(reader.all(".card:not(.blank)")) == 10)
    assert len(shop.requests) == 3 and not reader.all("#problem")[0].is_displayed()


def test_after_three_busy_answers_a_retry_button_is_shown(reader, shop):
    shop.answers += [Response("{}", 503, {"Retry-After": "1"}) for _ in range(3)]
    reader.all("#request")[0].send_keys("a hat", Keys.ENTER)
    reader.until(lambda: len(shop.requests) == 3 and reader.all("#problem")[0].is_displayed())
    reader.settle()
    assert reader.texts("#problem-text") == ["The server could not answer in time."]
    assert reader.texts("#countdown") == [""] and not reader.all(".card")
    reader.click("#retry")
    reader.until(lambda: len(reader.all(".card:not(.blank)")) == 10)


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (Response(json.dumps({"error": {"message": "too <b>long</b>"}}), 422), "too <b>long</b>"),
        (Response("<html>Bad gateway</html>", 502), "The server answered with an error (502)."),
        (None, "The server does not answer. Is it running?"),
    ],
    ids=["refused", "proxy", "gone"],
)
def test_errors_are_shown_and_can_be_retried(reader, shop, answer, shown):
    if answer is None:
        reader.browser.driver.execute_cdp_cmd("Network.enable", {})
        offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        reader.browser.driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    else:
        shop.answers.append(answer)
    reader.say("a hat")
    assert reader.texts("#problem-text") == [shown] and reader.texts("#status") == [""]
    if answer is None:
        online = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        reader.browser.driver.execute_cdp_cmd("Network.emulateNetworkConditions", online)
    reader.click("#retry")
    assert len(reader.all(".card")) == 10 and not reader.all("#problem")[0].is_displayed()


def test_empty_results_and_missing_photos(reader, shop):
    shop.answers.append(Response(json.dumps({"items": []})))
    reader.say("a spaceship")
    assert reader.texts("#nothing") == ["No product fits. Say it in other words, or say more."]
    item = {"id": "gone", "title": "", "probability": 1e-5, "photo": "/photos/gone"}
    shop.answers.append(Response(json.dumps({"items": [item, {**item, "id": "none", "photo": None}]})))
    reader.say("a boat")
    reader.until(lambda: reader.texts(".missing") == ["No photo", "No photo"])
    assert reader.texts(".card .title") == ["gone", "none"] and reader.texts(".card b") == ["< 0.1 %"] * 2


def test_a_new_message_replaces_the_pending_one(reader, shop):
    shop.hold.clear()
    try:
        reader.all("#request")[0].send_keys("a hat", Keys.ENTER)
        reader.until(lambda: len(shop.requests) == 1)
        assert len(reader.all(".card.blank")) == 10 and reader.texts("#status") == ["Looking…"]
        shop.answers.append(Response(json.dumps({"items": []})))  # the answer to the first request, which was replaced
        reader.all("#request")[0].send_keys("a red hat", Keys.ENTER)
        reader.until(lambda: len(shop.requests) == 2)
    finally:
        shop.hold.set()
    reader.until(lambda: reader.all(".card:not(.blank)") or reader.all("#nothing")[0].is_displayed())
    assert len(shop.requests[1]["conversation"]) == 2


def test_every_file_of_the_page_has_a_content_security_policy(url):
    with httpx.Client(base_url=url) as client:
        for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
            answer = client.get(path)
            policy = answer.headers["Content-Security-Policy"]
            assert answer.headers["Content-Type"].startswith(kind) and "unsafe" not in policy and "*" not in policy
            assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
            cached = client.get(path, headers={"If-None-Match": answer.headers["ETag"]})
            assert (cached.status_code, cached.content) == (304, b"")
            assert cached.headers["Content-Security-Policy"] == policy
        assert client.get("/page.html").status_code == client.get("/page/page.html").status_code == 404
