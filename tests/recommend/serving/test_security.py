"""Security of a server with a token and markup in its catalogue: paths, headers, tokens, records."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock
from urllib.parse import quote

import pytest
from PIL import Image

from lavic.data.conversations import read_conversations
from lavic.data.index.item_index import list_path
from lavic.data.tar_shards import Sample
from lavic.recommend.conversation_record import CANDIDATES
from lavic.recommend.retrieval.bm25.build import Bm25Builder, Bm25Settings
from lavic.recommend.retrieval.build import add_methods, prepare_index
from lavic.recommend.retrieval.item_table import Row
from lavic.recommend.serving import guard
from tests.browser import Browser
from tests.crawled_sets import write_set

from ..conftest import Assets
from .conftest import Server, serve
from .page_reader import Reader

pytestmark = pytest.mark.slow

TOKEN = "a-token-of-28-characters-987"
WRONG_TOKEN = "a-token-of-28-characters-986"
TITLES = ("<script>h=1</script>", "<img src onerror=h=2>", "<svg onload=h=3>", "<b>bold</b>", "&lt;i&gt;", "${7*7}")
"""Short: ten of them must fit into a prompt of the miniature."""
UNUSUAL_IDS = ("a/b", "../../secret", "<b>id</b>")
"""Unusual ids of items with photos."""


@dataclass(frozen=True)
class Shop:
    """A running server, its items and photos, and its record."""

    server: Server
    ids: list[str]
    set: Path
    record: Path


@pytest.fixture(scope="module")
def shop(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """The miniature's store with other titles, with photos, an index and a token."""
    folder = tmp_path_factory.mktemp("shop")
    store, part = folder / "store", "00000"
    shutil.copytree(assets.store, store, ignore=shutil.ignore_patterns("items-*.safetensors"))
    items = [json.loads(line) for line in list_path(store, part).read_text("utf-8").splitlines()]
    for number, item in enumerate(items):
        item["id"] = UNUSUAL_IDS[number] if number < len(UNUSUAL_IDS) else item["id"]
        item["title"] = TITLES[number % len(TITLES)] + f" mug {number}"
    lines = "".join(json.dumps(item) + "\n" for item in items).encode()
    list_path(store, part).write_bytes(lines)
    manifest = json.loads((store / "manifest.json").read_text("utf-8"))
    manifest["parts"][0]["items_sha256"] = hashlib.sha256(lines).hexdigest()
    (store / "manifest.json").write_text(json.dumps(manifest), "utf-8")

    samples = []
    for number, item in enumerate(items):
        data = io.BytesIO()
        Image.new("RGB", (24, 24), (4 * number, 80, 160)).save(data, "JPEG")
        drawn = Sample.of(item_id=item["id"], n=0, jpg=data.getvalue(), title="", width=24, height=24)
        samples.append(
            Sample(key=item["key"], item_id=item["id"], jpg=drawn.jpg, meta={**drawn.meta, "key": item["key"]})
        )
    photos = write_set(folder / "set", samples, photos_per_shard=25).folder
    (photos / "secret.jpg").write_bytes(b"\xff\xd8\xffa secret")

    index = folder / "index"
    index.mkdir()
    rows = [Row(item["id"], item["title"]) for item in items]
    index_manifest, before = prepare_index(index, lambda: rows, text={"fields": ["title"]})
    add_methods(index, index_manifest, [Bm25Builder(Bm25Settings())], before)

    record = folder / "kept.jsonl"
    args = ("--bundle", assets.bundle, "--store", store, "--index", index, "--shards", photos, "--record", record)
    with serve(*args, "--token", "env:LAVIC_SERVE_TOKEN", env={"LAVIC_SERVE_TOKEN": TOKEN}) as running:
        yield Shop(running, [item["id"] for item in items], photos, record)


def ask(shop: Shop, path: str, *, token: str = TOKEN, method: str = "GET", **headers: str):
    """Status, headers and body of a request whose path is sent unchanged."""
    connection = http.client.HTTPConnection("127.0.0.1", shop.server.port, timeout=120)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in {"Host": "localhost", "Authorization": f"Bearer {token}", **headers}.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize(
    "path",
    [
        "../../../../etc/passwd",
        "%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "..%252f..%252fetc%252fpasswd",
        "..%5c..%5cetc%5cpasswd",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "secret.jpg",
        "..%2fset%2fsecret.jpg",
        "manifest.json",
        "photos-train-000000.tar",
        "B0MN000000_0",
        "%00",
        "B0MN000000%00.jpg",
        "%ff%fe",
        "a" * 60_000,
        "%F0%9F%98%80" * 4000,
        "",
        ".",
    ],
    ids=lambda path: path[:24],
)
def test_no_file_is_reached_through_photos(shop: Shop, path: str):
    status, headers, body = ask(shop, f"/photos/{path}")
    assert status in (400, 404) and b"root:" not in body and b"secret" not in body
    if status == 404:
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")


def test_items_with_unusual_ids_have_photos(shop: Shop):
    bodies = set()
    for item in shop.ids[:5]:
        status, headers, body = ask(shop, f"/photos/{quote(item, safe='')}")
        assert (status, headers["Content-Type"], headers["X-Content-Type-Options"]) == (200, "image/jpeg", "nosniff")
        assert Image.open(io.BytesIO(body)).size == (24, 24)
        bodies.add(body)
        cached = ask(shop, f"/photos/{quote(item, safe='')}", If_None_Match=headers["ETag"])
        assert cached[0] == 304 and not cached[2]
        item_info = json.loads(ask(shop, f"/v1/items/{quote(item, safe='')}")[2])
        assert item_info["id"] == item and item_info["photo"] == f"/photos/{quote(item, safe='')}"
    assert len(bodies) == 5


@pytest.mark.parametrize("path", ["/", "/page.js", "/v1/items/a", "/photos/a", "/docs", "/openapi.json", "/metrics"])
def test_every_path_requires_the_token(shop: Shop, path: str):
    for wrong_token in ("", WRONG_TOKEN, TOKEN[:-1], TOKEN + "0", "é"):
        status, headers, body = ask(shop, path, token=wrong_token.encode().decode("latin-1"))
        assert status == 401 and headers["WWW-Authenticate"].startswith("Basic")
        assert headers["Content-Security-Policy"].startswith("default-src 'none'") and TOKEN.encode() not in body
    assert ask(shop, f"{path}?token={TOKEN}", token="")[0] == 401
    password = base64.b64encode(f"anybody:{TOKEN}".encode()).decode()
    assert ask(shop, path, Authorization=f"Basic {password}")[0] in (200, 404)


@pytest.mark.parametrize("path", ["/", "/docs", "/page.css", "/v1/items/none", "/nowhere", "/metrics", "/page.json"])
def test_every_answer_has_a_strict_policy(shop: Shop, path: str):
    _, headers, _ = ask(shop, path)
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and "*" not in policy and "http" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
    assert headers["X-Frame-Options"] == "DENY"


def test_other_origins_get_no_cors_headers(shop: Shop):
    origin = {"Origin": "https://evil.example"}
    for method in ("GET", "OPTIONS"):
        preflight = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type"}
        for path in ("/v1/recommend", "/", "/v1/items/a%2Fb"):
            status, headers, _ = ask(shop, path, method=method, **origin, **preflight)
            assert not [name for name in headers if name.lower().startswith("access-control")]
            assert status == 200 or method == "OPTIONS" or path == "/v1/recommend"
    with shop.server.client(headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
            for path in ("/v1/recommend", "/v1/feedback"):
                answer = client.post(
                    path, content='{"conversation": "a mug"}', headers={"Content-Type": kind, **origin}
                )
                assert answer.status_code == 415


def test_the_page_with_a_token_and_markup_in_titles(shop: Shop, browser: Browser):
    url = f"http://anybody:{TOKEN}@127.0.0.1:{shop.server.port}/"
    browser.open(url)
    reader = Reader(browser, url)
    assert reader.all("#recorded")[0].is_displayed() and "keeps conversations" in reader.texts("#recorded")[0]
    reader.say("a mug <script>h=9</script>")
    reader.until(lambda: len(reader.all(".card:not(.blank)")) == 10 and reader.photos_loaded() == 10)
    titles = browser.driver.execute_script(
        "return [...document.querySelectorAll('.card .title')].map(title => title.textContent)"
    )
    assert all(any(title.startswith(hostile) for hostile in TITLES) for title in titles)
    shown = [card.get_attribute("data-id") for card in reader.all(".card")]
    reader.click(".card:first-child .dislike")
    reader.click(".card:nth-child(2) .like")
    assert shown[0] not in [card.get_attribute("data-id") for card in reader.all(".card")]
    assert browser.driver.execute_script("return window.h ?? null") is None
    reader.check()

    rows = read_conversations(shop.record, candidates=CANDIDATES)
    recorded = [json.loads(line) for line in shop.record.read_text("utf-8").splitlines()]
    assert [row["gt"] for row in recorded] == ["", "dislike", "", "like", ""]
    assert recorded[0][CANDIDATES] == recorded[1][CANDIDATES] == shown and recorded[1]["disliked_items"] == [shown[0]]
    (liked,) = (row for row in rows if row.targets)
    assert liked.targets[0] in liked.candidates[CANDIDATES] and len(liked.turns) == 2
    assert rows[0].turns[0].text == "a mug <script>h=9</script>"


def test_the_api_page_renders_under_its_policy(shop: Shop, browser: Browser):
    browser.open(f"http://anybody:{TOKEN}@127.0.0.1:{shop.server.port}/docs")
    (page,) = browser.driver.find_elements("css selector", "body")
    assert "POST /v1/recommend" in page.text and page.value_of_css_property("font-family").startswith("system-ui")
    errors = [line for line in browser.errors() if "favicon.ico" not in line]
    assert errors == [] and browser.overflow() == 0


def test_feedback_of_unknown_items_is_refused(shop: Shop):
    known = shop.ids[5]
    with shop.server.client(headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        for change in (
            {"item": "nothing"},
            {"candidates": [known, "nothing"]},
            {"candidates": []},
            {"conversation": []},
            {"more": 1},
        ):
            body = {"conversation": "a mug", "candidates": [known], "item": known, "liked": True, **change}
            assert client.post("/v1/feedback", json=body).status_code == 422


def test_the_token_is_not_logged_or_stored(shop: Shop):
    """The last test of the file: the log has the requests of the other tests."""
    ask(shop, f"/v1/items/x?token={TOKEN}")
    ask(shop, f"/nowhere/{TOKEN}", token=WRONG_TOKEN)
    written = "\n".join(shop.server.lines) + shop.record.read_text("utf-8")
    assert TOKEN not in written and WRONG_TOKEN not in written
    command = Path(f"/proc/{shop.server.process.pid}/cmdline").read_bytes()
    assert TOKEN.encode() not in command


@pytest.mark.parametrize(
    "shown", ["", "Bearer", f"Bearer {WRONG_TOKEN}", "Bearer x", f"Basic {TOKEN}", f"Bearer {TOKEN}"]
)
def test_tokens_are_compared_only_in_constant_time(shown: str, monkeypatch: pytest.MonkeyPatch):
    for answer in (False, True):  # its result decides
        compare = Mock(return_value=answer)
        monkeypatch.setattr(guard.hmac, "compare_digest", compare)
        assert guard._shows(shown.encode(), TOKEN) is answer
        assert compare.call_count == 1 and compare.call_args.args[1] == TOKEN.encode()
