"""Links of catalogues and redirects, parsed as browsers parse them; percent escapes are sent unchanged.

The rules are those of the WHATWG URL standard, with two additions for catalogues: a link without a scheme gets https,
and a final dot of a host name is dropped. Percent escapes are neither decoded nor added to what is legal, so a signed
path or query reaches the server as it was signed.
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from urllib.parse import unquote_to_bytes

import idna
from yarl import URL

MAX_LENGTH = 64 * 1024
"""Maximum length of a link in characters."""

_PLAIN = re.compile(r"(https?)://([!-.0-;=A-Z\[\]_a-z~]+)(/[A-Za-z0-9._~!$&'()*+,;=:@%/|?-]*)")
"""Links that can be sent as they are, if they have no dot segments either."""
_DOT_SEGMENT = re.compile(r"/(?:\.|%2e)", re.IGNORECASE)
_PADDING = "".join(map(chr, [*range(33), 0x7F, 0x85, 0xA0, 0x3000, 0xFEFF, *range(0x2000, 0x2010), 0x2028, 0x2029]))
_BREAKS = str.maketrans("", "", "\t\r\n")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_HOST_AND_PORT = re.compile(r"[^/?\\:@]+:\d{1,5}(?:[/?\\]|$)")
_AUTHORITY = re.compile(r"([^/\\?]*)(.*)", re.DOTALL)
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]*|\d+", re.ASCII)
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f#%/:<>?@\[\\\]^|]")
_DOT = re.compile(r"\.|%2e", re.IGNORECASE)
_DOTS = re.compile(r"(?:\.|%2e){1,2}", re.IGNORECASE)
_PATH_ESCAPED = re.compile(rb"[\x00-\x20\"#<>^`{}\x7f-\xff]")
_QUERY_ESCAPED = re.compile(rb"[\x00-\x20\"#<>\x7f-\xff]")
_USER_ESCAPED = re.compile(rb"[\x00-\x20\"#/:;<=>?@\[\\\]^`{|}\x7f-\xff]")
_DEFAULT_PORTS = {"http": 80, "https": 443}


class BadUrl(ValueError):
    """A link that is not an http or https address."""


def parse_url(link: str, base: URL | None = None) -> URL:
    """The URL of a link, ready to be requested: `raw_path_qs` is what the server gets.

    Args:
        link: From a catalogue, or a Location header; undecodable bytes of the latter as surrogate escapes.
        base: Where a redirect came from; a relative link is resolved against it.

    Raises:
        BadUrl: The link is malformed or of another scheme. The message does not repeat the link.
    """
    if len(link) > MAX_LENGTH:
        raise BadUrl(f"the link is longer than {MAX_LENGTH:,} characters")
    match = _PLAIN.fullmatch(link)
    if match and not _DOT_SEGMENT.search(match[3]):
        authority = _authority(match[1], match[2])
        return URL.build(scheme=match[1], authority=authority, path=match[3], encoded=True)
    text = link.strip(_PADDING).translate(_BREAKS).partition("#")[0]
    if not text and base is None:
        raise BadUrl("the link is empty")
    scheme = _SCHEME.match(text)
    if scheme and (scheme[1].lower() in _DEFAULT_PORTS or not _HOST_AND_PORT.match(text)):
        if scheme[1].lower() not in _DEFAULT_PORTS:
            raise BadUrl(f"the link's scheme is {scheme[1][:20].lower()!r}, neither http nor https")
        return _absolute(scheme[1].lower(), text[scheme.end() :].lstrip("/\\"))
    if re.match(r"[/\\]{2}", text):
        return _absolute(base.scheme if base else "https", text.lstrip("/\\"))
    if base is not None:
        return _relative(text, base)
    host = _AUTHORITY.match(text)
    if not host or not host[2] or not re.search(r"[^.]\.[^.]|^localhost|^\[", host[1].rpartition("@")[2]):
        raise BadUrl("the link has neither a scheme nor a host")
    return _absolute("https", text)


def host_name(url: URL) -> str:
    """The host of a URL, with its port unless that is the scheme's default."""
    return url.raw_host or "" if url.is_default_port() else f"{url.raw_host}:{url.port}"


def _absolute(scheme: str, after_scheme: str) -> URL:
    """A URL from what follows the scheme and the slashes."""
    match = _AUTHORITY.match(after_scheme)
    assert match, "an expression that matches everything"
    return URL.build(scheme=scheme, authority=_authority(scheme, match[1]), path=_target(match[2]), encoded=True)


@lru_cache(maxsize=4096)
def _authority(scheme: str, text: str) -> str:
    """User, host and port in normal form."""
    userinfo, separator, host_port = text.rpartition("@")
    if host_port.startswith("["):
        name, bracket, port = host_port[1:].partition("]")
        if not bracket or port[:1] not in ("", ":"):
            raise BadUrl("the link's IPv6 address is not closed")
        host, port = f"[{_ipv6(name)}]", port[1:]
    else:
        name, _, port = host_port.partition(":")
        host = _host(name)
    if port and not (port.isascii() and port.isdigit() and 0 < int(port[:20]) < 65536):
        raise BadUrl(f"the link's port is {port[:20]!r}")
    if port and int(port) != _DEFAULT_PORTS[scheme]:
        host = f"{host}:{int(port)}"
    user, colon, password = userinfo.partition(":")
    if separator and (user or password):
        host = f"{_escape(user, _USER_ESCAPED)}{colon}{_escape(password, _USER_ESCAPED)}@{host}"
    return host


def _relative(text: str, base: URL) -> URL:
    path, question_mark, query = base.raw_path_qs.partition("?")
    if not text:
        text = path + question_mark + query
    elif text.startswith("?"):
        text = path + text
    elif text[0] not in "/\\":
        text = path[: path.rfind("/") + 1] + text
    return URL.build(scheme=base.scheme, authority=base.raw_authority, path=_target(text), encoded=True)


def _target(text: str) -> str:
    """Path and query as they are sent. Both are yarl's path, which would drop an empty query."""
    path, question_mark, query = text.partition("?")
    path = path.replace("\\", "/")
    if not path.startswith("/"):
        path = "/" + path
    if _DOT_SEGMENT.search(path):
        path = _remove_dot_segments(path)
    return _escape(path, _PATH_ESCAPED) + question_mark + _escape(query, _QUERY_ESCAPED)


def _remove_dot_segments(path: str) -> str:
    """The path without `.` and `..` segments."""
    output: list[str] = []
    segments = path.split("/")[1:]
    for number, segment in enumerate(segments):
        if not _DOTS.fullmatch(segment):
            output.append(segment)
            continue
        if len(_DOT.findall(segment)) == 2 and output:
            output.pop()
        if number == len(segments) - 1:
            output.append("")
    return "/" + "/".join(output)


def _escape(text: str, escaped: re.Pattern[bytes]) -> str:
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # A lone surrogate, from a JSON escape.
        data = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
    return escaped.sub(lambda match: b"%%%02X" % match[0][0], data).decode("ascii")


def _host(name: str) -> str:
    """A host name in ASCII and lower case, or an IPv4 address in normal form."""
    if "%" in name:
        name = unquote_to_bytes(name).decode("utf-8", "replace")
    if not name.isascii():
        name = _to_ascii(name)
    name = name.lower().removesuffix(".")
    if not name:
        raise BadUrl("the link has no host")
    if _FORBIDDEN.search(name):
        raise BadUrl(f"the link's host is {name[:80]!r}")
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        return _ipv4(labels)
    if len(name) > 253 or not all(0 < len(label) < 64 for label in labels):
        raise BadUrl(f"the link's host is {name[:80]!r}")
    return name


def _to_ascii(name: str) -> str:
    try:
        labels = re.split(r"[.\u3002]", idna.uts46_remap(name, std3_rules=False, transitional=False))
        return ".".join(label if label.isascii() else _to_alabel(label) for label in labels)
    except (idna.IDNAError, UnicodeError):
        raise BadUrl(f"the link's host is {name[:80]!r}") from None


def _to_alabel(label: str) -> str:
    try:
        return idna.alabel(label).decode("ascii")
    except idna.IDNAError:
        # Emoji names are registered and in use, although IDNA 2008 forbids them.
        return "xn--" + label.encode("punycode").decode("ascii")


def _ipv4(labels: list[str]) -> str:
    """As inet_aton reads it: one to four numbers, decimal, octal or hexadecimal; the last fills what is left."""
    try:
        numbers = [_parse_ipv4_number(label) for label in labels]
        if len(numbers) > 4 or any(number > 255 for number in numbers[:-1]):
            raise ValueError
        value = sum(number << (24 - 8 * index) for index, number in enumerate(numbers[:-1]))
        if numbers[-1] >= 256 ** (5 - len(numbers)):
            raise ValueError
        return str(ipaddress.IPv4Address(value + numbers[-1]))
    except ValueError:
        raise BadUrl(f"the link's host is {'.'.join(labels)[:80]!r}, a number but not an IPv4 address") from None


def _parse_ipv4_number(text: str) -> int:
    if not _NUMBER.fullmatch(text) or len(text) > 40:
        raise ValueError
    if text[:2] == "0x":
        return int(text[2:] or "0", 16)
    return int(text, 8) if text[0] == "0" else int(text)


def _ipv6(text: str) -> str:
    """The address without its zone, which only link-local addresses have; these are never requested."""
    try:
        return ipaddress.IPv6Address(unquote_to_bytes(text).decode("utf-8", "replace").partition("%")[0]).compressed
    except ValueError:
        raise BadUrl(f"the link's host is {text[:60]!r}, not an IPv6 address") from None
