"""HTTP responses that a strict parser refuses, parsed as leniently as in curl.

aiohttp's parser gets every response first, so a valid one costs nothing more. If it refuses one, `Repair` rewrites the
bytes received so far into a valid HTTP/1.1 response, and a second parser continues from there. Nothing is requested
twice, and the session's limits of time and size hold.
"""

from __future__ import annotations

import re
import select
from functools import partial
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import BadHttpMessage, HttpProcessingError

MAX_LINE = 100 * 1024
"""Maximum length of a header line in bytes, curl's limit."""
MAX_HEADERS = 5_000
"""Maximum number of header lines of one response, curl's limit."""
MAX_HEAD = 300 * 1024
"""Maximum length of a head (status line and header lines) in bytes, curl's limit."""

_LIMITS = {"max_line_size": MAX_LINE, "max_field_size": MAX_LINE, "max_headers": MAX_HEADERS}
_HEAD_END = re.compile(rb"\n\r*\n")
_LINE_END = re.compile(rb"\r*\n")
_STATUS = re.compile(rb"HTTP/(\d)(?:\.(\d))?[ \t]+(\d{3})(?![^ \t])(.*)", re.IGNORECASE | re.DOTALL)
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CHUNK = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,15})[ \t\r]*(?:;[^\n]*)?")
_UNSAFE = bytes.maketrans(b"\0\r\n", b"   ")
_FRAMING = frozenset({b"content-length", b"transfer-encoding", b"connection", b"keep-alive", b"upgrade"})
_REFUSED_BY_AIOHTTP = frozenset({b"sec-websocket-key1"})


class NotHttp(ValueError):
    """A response that curl refuses too."""


class LenientConnector(aiohttp.TCPConnector):
    """A TCP connector whose connections also accept responses with malformed heads and chunks, but not unasked ones."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # aiohttp has no public way to set the protocol class.
        self._factory = partial(_Handler, loop=self._loop)


class Repair:
    """Rewrites one malformed response as a valid one, in whatever pieces it arrives.

    The head keeps its status and every header with a valid name. The body's length is stated once: as
    `Content-Length`, as valid chunks, or by the end of the connection. `Connection: close` is added, since what
    follows such a response cannot be trusted.
    """

    def __init__(self) -> None:
        self._data = b""
        self._position = 0
        """Bytes of `_data` that were passed on."""
        self._remaining = 0
        """Bytes still missing from a body or chunk of known length."""
        self._step = self._head

    def feed(self, data: bytes) -> bytes:
        """Process received bytes; returns those that can be passed on.

        Raises:
            NotHttp: This is not an HTTP response.
        """
        self._data, self._position = self._data[self._position :] + data, 0
        out = []
        while piece := self._step():
            out.append(piece)
        return b"".join(out)

    def _head(self) -> bytes:
        while True:
            self._skip_line_ends()
            data = self._data[self._position :]
            if data[:5].upper() != b"HTTP/"[: len(data)]:
                raise NotHttp("no HTTP status line")
            end = _HEAD_END.search(data)
            if (end.start() if end else len(data)) > MAX_HEAD:
                raise NotHttp(f"the head is longer than {MAX_HEAD:,} bytes")
            if end is None:
                return b""
            lines = _LINE_END.split(data[: end.start()])
            self._position += end.end()
            match = _STATUS.fullmatch(lines[0].strip())
            if match is None:
                raise NotHttp("no HTTP status line")
            if not match[3].startswith(b"1") or match[3] == b"101":
                return self._rewrite(match, lines[1:])

    def _skip_line_ends(self) -> None:
        while self._data[self._position : self._position + 1] in (b"\r", b"\n"):
            self._position += 1

    def _rewrite(self, status: re.Match[bytes], lines: list[bytes]) -> bytes:
        headers = _headers(lines)
        codings = b",".join(value for name, value in headers if name.lower() == b"transfer-encoding").lower()
        lengths = [value for name, value in headers if name.lower() == b"content-length"]
        new_headers = [pair for pair in headers if pair[0].lower() not in _FRAMING]
        other_codings = [
            word for word in map(bytes.strip, codings.split(b",")) if word not in (b"", b"identity", b"chunked")
        ]
        if b"chunked" in codings:
            new_headers.append((b"Transfer-Encoding", b", ".join([*other_codings, b"chunked"])))
            self._step = self._chunk_size
        elif lengths:
            length = lengths[-1].partition(b",")[0].strip().removeprefix(b"+")
            if not length.isdigit() or len(length) > 18:
                raise NotHttp(f"Content-Length {lengths[-1][:40].decode('latin-1')!r}")
            self._remaining = int(length)
            new_headers.append((b"Content-Length", length))
            self._step = self._fixed_length
        else:
            self._step = self._until_closed
        # Some gateways write HTTP/2 or later on a plain connection; it is framed like 1.1.
        version = b"HTTP/1.0" if status[1] == b"0" or (status[1], status[2]) == (b"1", b"0") else b"HTTP/1.1"
        first = b"%s %s %s" % (version, status[3], status[4].strip().translate(_UNSAFE)[:200])
        new_headers.append((b"Connection", b"close"))
        return b"".join([first, b"\r\n", *(b"%s: %s\r\n" % pair for pair in new_headers), b"\r\n"])

    def _fixed_length(self) -> bytes:
        piece = self._take()
        if not self._remaining:
            self._step = self._ignore
        return piece

    def _take(self) -> bytes:
        piece = self._data[self._position : self._position + self._remaining]
        self._position += len(piece)
        self._remaining -= len(piece)
        return piece

    def _until_closed(self) -> bytes:
        piece = self._data[self._position :]
        self._position = len(self._data)
        return piece

    def _ignore(self) -> bytes:
        self._position = len(self._data)
        return b""

    def _chunk_size(self) -> bytes:
        self._skip_line_ends()
        end = self._data.find(b"\n", self._position)
        if (end if end >= 0 else len(self._data)) - self._position > MAX_LINE:
            raise NotHttp("a chunk's first line is too long")
        if end < 0:
            return b""
        line = self._data[self._position : end]
        match = _CHUNK.fullmatch(line)
        if match is None:
            raise NotHttp(f"chunk size {line[:40].decode('latin-1')!r}")
        self._position, self._remaining = end + 1, int(match[1], 16)
        self._step = self._chunk if self._remaining else self._trailer
        return self._step()

    def _chunk(self) -> bytes:
        if not (piece := self._take()):
            return b""
        if not self._remaining:
            self._step = self._chunk_size
        return b"%x\r\n%s\r\n" % (len(piece), piece)

    def _trailer(self) -> bytes:
        """Trailers are read and dropped; the body is complete at their end."""
        unread = self._data[self._position :]
        if len(unread) > MAX_HEAD:
            raise NotHttp("the trailer is too long")
        if not (unread.startswith((b"\n", b"\r\n")) or _HEAD_END.search(unread)):
            return b""
        self._step = self._ignore
        return b"0\r\n\r\n"


def _headers(lines: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Names and values of header lines; lines without a colon or with an invalid name are left out."""
    pairs: list[tuple[bytes, bytes]] = []
    skipped = False
    for line in lines:
        if line[:1] in (b" ", b"\t") and (pairs or skipped):
            if not skipped:
                name, value = pairs[-1]
                pairs[-1] = (name, (value + b" " + line.strip()).translate(_UNSAFE))
            continue
        name, colon, value = line.partition(b":")
        name = name.strip()
        skipped = not colon or not _TOKEN.fullmatch(name) or name.lower() in _REFUSED_BY_AIOHTTP
        if not skipped:
            pairs.append((name, value.strip().translate(_UNSAFE)))
    return pairs


class _Handler(ResponseHandler):
    """A connection whose parser is wrapped for the beginning of each response."""

    def is_connected(self) -> bool:
        """Whether a connection of the pool can be used again.

        As in curl, not if anything has arrived since its last response: the end of the connection, or bytes that no
        request asked for, which would be read as the response to the next one.
        """
        return super().is_connected() and not self.should_close and not self._has_unread_bytes()

    def _has_unread_bytes(self) -> bool:
        """Whether bytes, or the end of the connection, have arrived that the event loop has not read yet."""
        assert self.transport
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def set_response_params(self, **params: Any) -> None:
        for name, value in _LIMITS.items():
            if name in params:
                params[name] = value
        super().set_response_params(**params)
        self._parser: Any = _FirstReader(self, params)

    def renew(self, params: dict[str, Any]) -> Any:
        """A new parser."""
        super().set_response_params(**params)
        return self._parser


class _FirstReader:
    """Wraps aiohttp's parser until that has accepted the head, and the first byte of a chunked body."""

    def __init__(self, handler: _Handler, params: dict[str, Any]) -> None:
        self._handler, self._params = handler, params
        self._parser = handler._parser
        self._received = b""
        self._pending: tuple[Any, ...] = ()
        self._repair: Repair | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)

    def feed_data(self, data: bytes) -> tuple[Any, bool, bytes]:
        """See aiohttp's parsers."""
        if self._repair:
            return self._feed_repaired(data)
        self._received = self._received + data if self._received else data
        try:
            messages, upgraded, tail = self._parser.feed_data(data)
            if len(self._received) > MAX_HEAD and not messages:
                raise BadHttpMessage(f"the head is longer than {MAX_HEAD:,} bytes")
        except HttpProcessingError as error:
            self._repair, self._pending = Repair(), ()
            self._parser = self._handler.renew(self._params)
            self._handler._parser = self
            try:
                return self._feed_repaired(self._received)
            except NotHttp:
                raise error from None
        if self._pending:
            messages, self._pending = (*self._pending, *messages), ()
        if not messages or messages[-1][0].code < 200:
            # An informational response; the final one is still to come.
            return messages, upgraded, tail
        message, payload = messages[-1]
        if message.chunked and not payload.total_bytes and not payload.is_eof():
            self._pending = tuple(messages)
            return (), upgraded, tail
        self._handler._parser = self._parser
        self._received = b""
        return messages, upgraded, tail

    def _feed_repaired(self, data: bytes) -> Any:
        assert self._repair
        return self._parser.feed_data(self._repair.feed(data))
