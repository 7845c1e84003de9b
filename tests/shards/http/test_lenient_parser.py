"""Malformed responses: read if curl reads them, refused if curl refuses them."""

from __future__ import annotations

import asyncio
import gzip
import threading
import time
import zlib

import pytest

from lavic.shards.http.fetch_settings import FetchSettings
from lavic.shards.http.fetcher import Fetcher
from lavic.shards.http.lenient_parser import LenientConnector, Repair
from lavic.shards.http.request import Response
from tests.shards.fault_server import PHOTOS
from tests.shards.http.raw_server import RawServer, answer, raw_server

QUICK = FetchSettings(allow_private=True, deadline=5.0, retries=0, host_rate=0, robots=False)
PHOTO = PHOTOS["plain.jpg"]
CHUNKED = b"Transfer-Encoding: chunked"
N = len(PHOTO)


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def chunks(
    data: bytes, size: bytes = b"%x", extension: bytes = b"", trailer: bytes = b"", end: bytes = b"\r\n"
) -> bytes:
    half = len(data) // 2
    parts = [size % len(part) + extension + end + part + end for part in (data[:half], data[half:])]
    return b"".join(parts) + b"0" + end + trailer + end


ACCEPTED = {
    "header-9k": answer(PHOTO, b"Content-Security-Policy: img-src " + b"https://a.example " * 500),
    "header-90k": answer(PHOTO, b"X-Long: " + b"a" * 90_000),
    "header-name-9k": answer(PHOTO, b"X-" + b"a" * 9000 + b": 1"),
    "reason-9k": answer(PHOTO, status=b"HTTP/1.1 200 " + b"O" * 9000),
    "cookies-150": answer(PHOTO, *(b"Set-Cookie: c%d=%s" % (n, b"v" * 50) for n in range(150))),
    "cookies-2000": answer(PHOTO, *(b"Set-Cookie: c%d=v" % n for n in range(2000))),
    "informational-103": b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n" + answer(PHOTO),
    "informational-100-then-odd": b"HTTP/1.1 100 Continue\r\n\r\n" + answer(PHOTO, b"no colon here"),
    "informational-odd": b"HTTP/1.1 102 Processing\r\nno colon here\r\n\r\n" + answer(PHOTO),
    "non-authoritative": answer(PHOTO, status=b"HTTP/1.1 203 Non-Authoritative Information"),
    "range-whole": answer(PHOTO, b"Content-Range: bytes 0-%d/%d" % (N - 1, N), status=b"HTTP/1.1 206 Partial Content"),
    "range-unstated": answer(PHOTO, status=b"HTTP/1.1 206 Partial Content"),
    "length-repeated": answer(PHOTO, b"Content-Length: %d" % N),
    "length-list": answer(PHOTO, b"Content-Length: %d, %d" % (N, N), length=False),
    "length-plus": answer(PHOTO, b"Content-Length: +%d" % N, length=False),
    "length-and-chunked": answer(chunks(PHOTO), b"Content-Length: 7", CHUNKED, length=False),
    "chunked-and-length": answer(chunks(PHOTO), CHUNKED, b"Content-Length: 99999", length=False),
    "identity-and-length": answer(PHOTO, b"Transfer-Encoding: identity"),
    "chunk-size-upper": answer(chunks(PHOTO, b"%X"), CHUNKED, length=False),
    "chunk-size-zeros": answer(chunks(PHOTO, b"0000%x"), CHUNKED, length=False),
    "chunk-extension": answer(chunks(PHOTO, extension=b' ; name="value"'), CHUNKED, length=False),
    "chunk-bare-lf": answer(chunks(PHOTO, end=b"\n"), CHUNKED, length=False),
    "chunk-trailer": answer(chunks(PHOTO, trailer=b"x-checksum: 1\r\n"), CHUNKED, length=False),
    "chunk-trailer-no-colon": answer(chunks(PHOTO, trailer=b"checksum\r\n"), CHUNKED, length=False),
    "chunked-1.0": answer(chunks(PHOTO), CHUNKED, status=b"HTTP/1.0 200 OK", length=False),
    "line-no-colon": answer(PHOTO, b"this line has no colon"),
    "line-first-indented": b"HTTP/1.1 200 OK\r\n X-A: b\r\nContent-Length: %d\r\n\r\n" % N + PHOTO,
    "line-folded": answer(PHOTO, b"X-A: b\r\n c"),
    "line-folded-after-odd": answer(PHOTO, b"no colon\r\n Content-Length: 3"),
    "line-mixed-ends": b"HTTP/1.1 200 OK\r\nX-A: b\nContent-Length: %d\r\n\n" % N + PHOTO,
    "line-bare-lf": answer(PHOTO, b"X-A: b", end=b"\n"),
    "line-cr-cr-lf": answer(PHOTO, b"X-A: b\r"),
    "value-utf-8": answer(PHOTO, "X-A: é".encode()),
    "value-latin-1": answer(PHOTO, "X-A: é".encode("latin-1")),
    "value-control": answer(PHOTO, b"X-A: a\x01b"),
    "value-nul": answer(PHOTO, b"X-A: a\x00b"),
    "name-non-ascii": answer(PHOTO, "X-é: a".encode()),
    "name-with-space": answer(PHOTO, b"X A: a"),
    "name-then-space": answer(PHOTO, b"X-A : a"),
    "name-empty": answer(PHOTO, b": a"),
    "name-of-websockets": answer(PHOTO, b"Sec-WebSocket-Key1: a"),
    "status-no-reason": answer(PHOTO, status=b"HTTP/1.1 200"),
    "status-latin-1": answer(PHOTO, status="HTTP/1.1 200 Öké".encode("latin-1")),
    "status-lower": answer(PHOTO, status=b"http/1.1 200 OK"),
    "status-http-2": answer(PHOTO, status=b"HTTP/2 200 OK"),
    "status-two-spaces": answer(PHOTO, status=b"HTTP/1.1  200 OK"),
    "empty-line-first": b"\r\n" + answer(PHOTO),
    "upgrade-offered": answer(PHOTO, b"Upgrade: h2,h2c", b"Connection: Upgrade"),
    "type-twice": answer(PHOTO, b"Content-Type: image/jpeg", b"Content-Type: text/html"),
    "junk-after": answer(PHOTO) + b"junk",
    "coding-empty": answer(PHOTO, b"Content-Encoding: "),
    "coding-none": answer(PHOTO, b"Content-Encoding: none"),
    "coding-utf-8": answer(PHOTO, b"Content-Encoding: utf-8"),
    "coding-gzip-and-is-not": answer(PHOTO, b"Content-Encoding: gzip"),
    "coding-br-and-is-not": answer(PHOTO, b"Content-Encoding: br"),
    "coding-gzip-then-junk": answer(gzip.compress(PHOTO) + b"junk", b"Content-Encoding: gzip"),
    "coding-gzip-two-members": answer(
        gzip.compress(PHOTO[:200]) + gzip.compress(PHOTO[200:]), b"Content-Encoding: x-gzip"
    ),
    "coding-twice": answer(gzip.compress(gzip.compress(PHOTO)), b"Content-Encoding: gzip, gzip"),
    "coding-deflate": answer(zlib.compress(PHOTO), b"Content-Encoding: deflate"),
    "coding-deflate-raw": answer(raw_deflate(PHOTO), b"Content-Encoding: Deflate"),
    "transfer-gzip": answer(chunks(gzip.compress(PHOTO)), b"Transfer-Encoding: gzip, chunked", length=False),
}
CLOSING = {
    "no-length-1.0": answer(PHOTO, status=b"HTTP/1.0 200 OK", length=False),
    "no-length-1.1": answer(PHOTO, length=False),
    "no-length-odd": answer(PHOTO, b"no colon here", length=False),
    "junk-then-close": answer(PHOTO) + b"\r\n\r\njunk",
}
REFUSED = {
    "length-is-no-number": answer(PHOTO, b"Content-Length: many", length=False),
    "length-negative": answer(PHOTO, b"Content-Length: -1", length=False),
    "no-head": PHOTO,
    "other-protocol": answer(PHOTO, status=b"ICY 200 OK"),
    "status-no-number": answer(PHOTO, status=b"HTTP/1.1 OK"),
    "chunk-size-wrong": answer(chunks(PHOTO, b"0x%x"), CHUNKED, length=False),
    "coding-unknown-to-all": answer(b"\x01\x02\x80\x81" * 40, b"Content-Encoding: compress"),
    "head-endless": answer(PHOTO, *(b"X-%d: %s" % (n, b"a" * 9000) for n in range(70))),
    "head-endless-odd": answer(PHOTO, *(b"X-%d: %s" % (n, b"a" * 9000) for n in range(70)), b"no colon"),
}


def fetch(server: RawServer, *names: str, settings: FetchSettings = QUICK) -> list[Response]:
    async def run() -> list[Response]:
        async with Fetcher(settings) as fetcher:
            return [await fetcher.fetch(f"{server.url}/{name}") for name in names]

    return asyncio.run(run())


@pytest.fixture(scope="module")
def malformed() -> RawServer:
    answers = {f"/{name}": data for name, data in {**ACCEPTED, **CLOSING, **REFUSED}.items()}
    with raw_server(answers, frozenset(f"/{name}" for name in CLOSING)) as running:
        yield running


@pytest.mark.parametrize("name", [*ACCEPTED, *CLOSING])
def test_a_malformed_response_gives_its_photo(malformed: RawServer, name: str) -> None:
    (response,) = fetch(malformed, name)
    assert response.kind == "ok" and response.body == PHOTO, response.reason


def test_a_malformed_response_costs_one_request(malformed: RawServer) -> None:
    before = len(malformed.targets)
    names = [name for accepted in ACCEPTED for name in (accepted, "line-bare-lf")]
    settings = FetchSettings(**{**vars(QUICK), "retries": 2})
    assert all(response.body == PHOTO for response in fetch(malformed, *names, settings=settings))
    assert len(malformed.targets) - before == len(names)


UNASKED = {
    "another photo": answer(PHOTOS["grey.jpg"]),
    "timeout": answer(b"", b"Connection: close", status=b"HTTP/1.1 408 Request Timeout"),
    "half a response": answer(PHOTO)[:200],
    "junk": b"junk",
}


@pytest.mark.parametrize("name", UNASKED)
@pytest.mark.parametrize("read", [True, False])
def test_bytes_that_arrive_between_two_requests_are_not_the_next_response(name: str, read: bool) -> None:
    received, sent = threading.Event(), threading.Event()
    first: list[object] = [answer(PHOTO), lambda: received.wait(9), UNASKED[name], sent.set]

    async def run(url: str) -> list[Response]:
        async with Fetcher(QUICK) as fetcher:
            responses = [await fetcher.fetch(f"{url}/first")]
            received.set()
            sent.wait(9)
            if read:  # by the event loop, before the next request
                await asyncio.sleep(0.05)
            return [*responses, await fetcher.fetch(f"{url}/second")]

    with raw_server({"/first": first, "/second": answer(PHOTOS["srgb.jpg"])}) as server:
        responses = asyncio.run(run(server.url))
        assert [response.body for response in responses] == [PHOTO, PHOTOS["srgb.jpg"]]
        assert server.targets == ["/first", "/second"] and server.connections == 2


@pytest.mark.parametrize("name", REFUSED)
def test_an_unreadable_response_is_an_http_error_with_a_reason(malformed: RawServer, name: str) -> None:
    (response,) = fetch(malformed, name)
    assert response.kind == "http_error" and response.reason and len(response.reason) < 300


def test_headers_of_a_malformed_response_are_used() -> None:
    malformed_head = (b"no colon here", b"X-Robots-Tag: noai")
    with raw_server(
        {
            "/tagged": answer(PHOTO, *malformed_head),
            "/moved": answer(b"", b"no colon", b"Location: /target", status=b"HTTP/1.1 302 Found"),
            "/target": answer(PHOTO),
            "/part": answer(PHOTO[:99], b"Content-Range: bytes 0-98/%d" % N, status=b"HTTP/1.1 206 Partial Content"),
            "/busy": answer(b"", b"no colon", b"Retry-After: 7", status=b"HTTP/1.1 429 Slow"),
        }
    ) as server:
        (tagged,) = fetch(server, "tagged", settings=FetchSettings(**{**vars(QUICK), "robots": True}))
        moved, part, busy = fetch(server, "moved", "part", "busy")
    assert (tagged.kind, moved.kind, part.kind, busy.kind) == ("opted_out", "ok", "truncated", "throttled")
    assert busy.retry_after == 7 and "0-98" in part.reason


def test_a_truncated_or_huge_compressed_body_is_refused() -> None:
    packed = gzip.compress(PHOTO)
    with raw_server(
        {
            "/cut": answer(packed[:-20], b"Content-Encoding: gzip"),
            "/damaged": answer(packed[:-8] + bytes(8), b"Content-Encoding: gzip"),
            "/bomb": answer(gzip.compress(bytes(30_000_000)), b"Content-Encoding: gzip"),
            "/bomb-deflate": answer(raw_deflate(bytes(30_000_000)), b"Content-Encoding: deflate"),
        }
    ) as server:
        kinds = [response.kind for response in fetch(server, "cut", "damaged", "bomb", "bomb-deflate")]
    assert kinds == ["truncated", "truncated", "too_big", "too_big"]


@pytest.mark.parametrize("coding", ["br", "zstd"])
def test_brotli_and_zstd_are_read_if_installed(coding: str) -> None:
    if coding == "br":
        brotli = pytest.importorskip("brotli")
        compress = brotli.compress
    else:
        compress = pytest.importorskip("backports.zstd").compress
    line = b"Content-Encoding: " + coding.encode()
    answers = {"/ok": compress(PHOTO), "/bomb": compress(bytes(30_000_000)), "/cut": compress(PHOTO)[:-20]}
    with raw_server({name: answer(body, line) for name, body in answers.items()}) as server:
        good, bomb, cut = fetch(server, "ok", "bomb", "cut")
    assert good.body == PHOTO and bomb.kind == "too_big" and cut.kind == "truncated"


@pytest.mark.parametrize("name", [*ACCEPTED, *CLOSING])
@pytest.mark.parametrize("size", [1, 7, 500])
def test_repair_does_not_depend_on_packet_boundaries(name: str, size: int) -> None:
    data = {**ACCEPTED, **CLOSING}[name]
    if len(data) > 20_000:
        data = data[:300] + data[-N - 2000 :] if size == 1 else data
    single, split = Repair(), Repair()
    at_once = single.feed(data)
    head, _, _ = at_once.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.") and head.count(b"\r\n") == head.count(b"\n") and b"\0" not in head
    parts = b"".join(split.feed(data[start : start + size]) for start in range(0, len(data), size))
    assert unchunked(parts) == unchunked(at_once)


def unchunked(data: bytes) -> bytes:
    head, _, body = data.partition(b"\r\n\r\n")
    if b"chunked" not in head.lower():
        return data
    out = []
    while body:
        size, _, body = body.partition(b"\r\n")
        out.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]
    return head + b"".join(out)


@pytest.mark.parametrize("name", ["name-with-space", "chunk-extension", "informational-odd", "line-no-colon"])
def test_a_malformed_response_is_read_with_any_split(name: str) -> None:
    async def read(pieces: list[bytes]) -> bytes:
        async with LenientConnector() as connector:
            connection = connector._factory()
            connection.set_response_params(read_until_eof=True, auto_decompress=False)
            for piece in pieces:
                connection.data_received(piece)
            while (message := await connection.read())[0].code < 200:
                pass
            return await message[1].read()

    async def run() -> None:
        data = ACCEPTED[name]
        for cut in range(1, 200):
            assert await read([data[:cut], data[cut:]]) == PHOTO, cut

    asyncio.run(run())


def test_a_malformed_response_that_ends_early_is_truncated() -> None:
    with raw_server(
        {
            "/length": answer(PHOTO[:99], b"no colon", b"Content-Length: %d" % N, length=False),
            "/chunks": answer(chunks(PHOTO, extension=b" ; a=b")[:-30], CHUNKED, length=False),
        },
        frozenset({"/length", "/chunks"}),
    ) as server:
        assert [response.kind for response in fetch(server, "length", "chunks")] == ["truncated", "truncated"]


def test_tiny_chunks_take_linear_time() -> None:
    """Two megabytes in chunks of one byte: a parser that copies the rest for each chunk takes minutes."""
    repair = Repair()
    data = answer(b"1;a \r\nx\r\n" * 200_000 + b"0\r\n\r\n", CHUNKED, length=False)
    began = time.process_time()
    repair.feed(data)
    assert time.process_time() - began < 3.0
