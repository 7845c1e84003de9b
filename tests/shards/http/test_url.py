"""Links and redirects: the request target that is sent, and links that are refused."""

from __future__ import annotations

import asyncio

import pytest

from lavic.shards.http.fetch_settings import FetchSettings
from lavic.shards.http.fetcher import Fetcher
from lavic.shards.http.request import Response
from lavic.shards.http.url import BadUrl, parse_url
from tests.shards.fault_server import PHOTOS
from tests.shards.http.raw_server import answer, raw_server

PHOTO = PHOTOS["plain.jpg"]
UNCHANGED = [
    *("/p/a%2Cb%28c%29.jpg", "/thumb/1280x720/http%3A%2F%2Fshop.example%2Fa.jpg", "/p/x.jpg?sig=ab%2Fcd%3D&exp=1"),
    *("/p/%c3%a9.jpg", "/p/%C3%A9.jpg", "/p/%FC.jpg", "/p/x.jpg?", "/p?x", "/p/x.jpg?a=b?c", "/?", "/", "//a//b.jpg"),
    *(
        "/a,b(c)'d!e*f;g=h&i+j$k@l:m~n.jpg",
        "/a?b='c',(d);e=%20+f&g=%E9",
        "/100%.jpg",
        "/a%zz?b=%",
        "/p/x.jpg?a=|&b=/./..",
    ),
    *("/images/I/71._AC_SX|_.jpg", "/a/%2F../b/..%2Fc", "/a.../b/.c/d./..e", "/a?b=c&amp;d=e", "/%7Euser/x.jpg"),
]
CHANGED = {
    "/a b.jpg": "/a%20b.jpg",
    "/é/ü.jpg?q=ß ß": "/%C3%A9/%C3%BC.jpg?q=%C3%9F%20%C3%9F",
    "/e\u0301.jpg": "/e%CC%81.jpg",
    "/商品.jpg": "/%E5%95%86%E5%93%81.jpg",
    "/\U0001f600.jpg": "/%F0%9F%98%80.jpg",
    "/a\ud83d.jpg": "/a%EF%BF%BD.jpg",
    '/a"<b>`{c}^.jpg?"<d>': "/a%22%3Cb%3E%60%7Bc%7D%5E.jpg?%22%3Cd%3E",
    "/a\\b\\c.jpg?d\\e": "/a/b/c.jpg?d\\e",
    "/a\tb\n/c\r.jpg": "/ab/c.jpg",
    "/a/./b/../c.jpg": "/a/c.jpg",
    "/a/%2e/b/%2E%2e/c.jpg": "/a/c.jpg",
    "/../../a.jpg": "/a.jpg",
    "/a/..": "/",
    "/a/b/.": "/a/b/",
    "/a.jpg#size": "/a.jpg",
    "/a.jpg?#b?c": "/a.jpg?",
    "/a.jpg  ": "/a.jpg",
    "?a=b": "/?a=b",
    "": "/",
}
LOCATIONS = {
    "/p/a%2Cb.jpg?x=%2f": "/p/a%2Cb.jpg?x=%2f",
    "/x.jpg?": "/x.jpg?",
    "c.jpg": "/from/c.jpg",
    "./c.jpg": "/from/c.jpg",
    "../c.jpg": "/c.jpg",
    "?b=%2C": "/from/here?b=%2C",
    "\\c.jpg": "/c.jpg",
    " /c d.jpg ": "/c%20d.jpg",
    "c.jpg#x": "/from/c.jpg",
    "//{host}/x.jpg": "/x.jpg",
    "HTTP://{host}/x.jpg": "/x.jpg",
    "http:\\\\{host}\\x.jpg": "/x.jpg",
}


def fetch(*links: str) -> list[Response]:
    async def run() -> list[Response]:
        async with Fetcher(FetchSettings(allow_private=True, retries=0, host_rate=0, robots=False)) as fetcher:
            return [await fetcher.fetch(link) for link in links]

    return asyncio.run(run())


def test_a_link_is_requested_as_the_url_standard_says() -> None:
    expected = {**{target: target for target in UNCHANGED}, **CHANGED}
    with raw_server({target: answer(PHOTO) for target in expected.values()}) as server:
        responses = fetch(*(server.url + target for target in expected))
        assert server.targets == list(expected.values())
    assert all(response.kind == "ok" for response in responses)


def test_a_redirect_is_requested_as_the_url_standard_says() -> None:
    """Bytes that are not ASCII are sent unchanged, whatever their encoding."""
    raw = {"/bilder/fl\u00fcgel.jpg".encode(code): code for code in ("latin-1", "utf-8")}
    targets = {"latin-1": "/bilder/fl%FCgel.jpg", "utf-8": "/bilder/fl%C3%BCgel.jpg"}
    with raw_server({}) as server:
        host = server.url.removeprefix("http://")
        locations = {
            **{text.format(host=host).encode(): target for text, target in LOCATIONS.items()},
            **{data: targets[code] for data, code in raw.items()},
        }
        for location, target in locations.items():
            redirect = answer(b"", b"Location: " + location, status=b"HTTP/1.1 302 Found")
            server.answers = {"/from/here?a": redirect, target: answer(PHOTO)}
            server.targets.clear()
            (response,) = fetch(f"{server.url}/from/here?a")
            assert response.kind == "ok" and server.targets == ["/from/here?a", target], location


@pytest.mark.parametrize("location", [b"javascript:alert(1)", b"http://", b"http://[::1", b"http://a b/", b"data:,x"])
def test_a_redirect_to_an_invalid_url_is_a_bad_url(location: bytes) -> None:
    redirect = answer(b"", b"Location: " + location, status=b"HTTP/1.1 302 Found")
    with raw_server({"/x": redirect}) as server:
        (response,) = fetch(f"{server.url}/x")
    assert (response.kind, response.http, response.attempts) == ("bad_url", 302, 1)
    assert response.reason.startswith("redirected")


@pytest.mark.parametrize(
    ("link", "parsed"),
    [
        ("//h.com/x.jpg", "https://h.com/x.jpg"),
        ("h.com/x.jpg", "https://h.com/x.jpg"),
        ("www.h.com/x.jpg?a=b:c", "https://www.h.com/x.jpg?a=b:c"),
        ("h.com:8443/x.jpg", "https://h.com:8443/x.jpg"),
        ("localhost:8080/x.jpg", "https://localhost:8080/x.jpg"),
        ("HTTPS://H.Com/X.jpg", "https://h.com/X.jpg"),
        ("http:h.com/x", "http://h.com/x"),
        ("https:/h.com/x", "https://h.com/x"),
        ("http:///h.com/x", "http://h.com/x"),
        ("http://h.com:80/x", "http://h.com/x"),
        ("https://h.com:443/x", "https://h.com/x"),
        ("https://h.com:0080/x", "https://h.com:80/x"),
        ("http://h.com:/x", "http://h.com/x"),
        ("http://h.com./x", "http://h.com/x"),
        ("http://bücher.example/x", "http://xn--bcher-kva.example/x"),
        ("http://BÜCHER.example/x", "http://xn--bcher-kva.example/x"),
        ("http://xn--bcher-kva.example/x", "http://xn--bcher-kva.example/x"),
        ("http://faß.example/x", "http://xn--fa-hia.example/x"),
        ("http://b%C3%BCcher.example/x", "http://xn--bcher-kva.example/x"),
        ("http://商品。example/x", "http://xn--jvrxl.example/x"),
        ("http://i❤.ws/x", "http://xn--i-7iq.ws/x"),
        ("http://my_bucket.s3.example/x", "http://my_bucket.s3.example/x"),
        ("http://u:p%40@h.com/x", "http://u:p%40@h.com/x"),
        ("http://@h.com/x", "http://h.com/x"),
        ("http://[2606:4700:0:0::1111]/x", "http://[2606:4700::1111]/x"),
        ("\ufeff\u00a0 http://h.com/x\u3000", "http://h.com/x"),
    ],
)
def test_scheme_host_and_port_are_parsed(link: str, parsed: str) -> None:
    assert str(parse_url(link)) == parsed


@pytest.mark.parametrize(
    ("number", "address"),
    [
        ("0", "0.0.0.0"),
        ("1", "0.0.0.1"),
        ("127.1", "127.0.0.1"),
        ("1.2.3", "1.2.0.3"),
        ("0X7F.0x0.00.1", "127.0.0.1"),
        ("4294967295", "255.255.255.255"),
        ("010.0.0.1", "8.0.0.1"),
        ("0x.0.0.1", "0.0.0.1"),
    ],
)
def test_numeric_hosts_are_read_as_by_inet_aton(number: str, address: str) -> None:
    assert parse_url(f"http://{number}/x").raw_host == address


def test_a_reason_does_not_repeat_credentials() -> None:
    for link in ("http://user:secret@a b/x", "ftp://user:secret@h/x", "http://user:secret@h:0/?sig=secret"):
        with pytest.raises(BadUrl) as caught:
            parse_url(link)
        assert "secret" not in str(caught.value)
