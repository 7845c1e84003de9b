"""Headers from the user's file; those that may hold credentials do not follow a redirect to another site."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from yarl import URL

from lavic.errors import ConfigError
from lavic.shards.http.url import BadUrl, parse_url
from lavic.storage.text_files import TextFileError, read_lines

_PUBLIC = frozenset({"accept", "accept-language", "cache-control", "dnt", "from", "pragma", "referer", "user-agent"})
"""Headers that hold no credentials. All others may, and are only sent to their own site."""
_REFUSED = frozenset(
    {
        *("accept-encoding", "connection", "content-length", "expect", "host", "if-modified-since", "if-none-match"),
        *("keep-alive", "proxy-authorization", "proxy-connection", "range", "te", "trailer", "transfer-encoding"),
        "upgrade",
    }
)
"""Headers that the crawl sets itself."""
_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+)[ \t]*:[ \t]*(.*)")
_SECTION = re.compile(r"\[([^\[\]\s]+|\[[^\[\]\s]+\](?::\d+)?)\]")


@dataclass(frozen=True)
class CustomHeaders:
    """Headers by site."""

    all_hosts: Mapping[str, str] = field(default_factory=dict, repr=False)
    """For every host of the catalogue."""
    by_host: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False)
    """Headers by `host` or `host:port` in lower case."""

    @classmethod
    def read(cls, path: str | Path) -> CustomHeaders:
        """Read `Name: value` lines; those after a line `[host]` are for that host alone. `#` starts a comment.

        Raises:
            ConfigError: The file cannot be read, or a line is wrong. The message does not repeat a value.
        """
        try:
            lines = list(read_lines(path))
        except TextFileError as error:
            raise ConfigError(f"--fetch.headers {error}") from None
        all_hosts: dict[str, str] = {}
        by_host: dict[str, dict[str, str]] = {}
        current = all_hosts
        for number, line in lines:
            if not (line := line.strip()) or line.startswith("#"):
                continue
            location = f"--fetch.headers {path}:{number}"
            if section := _SECTION.fullmatch(line):
                current = by_host.setdefault(_site(section[1], location), {})
                continue
            match = _LINE.fullmatch(line)
            if match is None or not match[2].isprintable():
                raise ConfigError(f"{location}: not a header; write one `Name: value` on each line")
            if match[1].lower() in _REFUSED:
                raise ConfigError(f"{location}: {match[1]} is set by the crawl itself; remove the line")
            current[match[1]] = match[2]
        return cls(all_hosts, by_host)

    def for_url(self, url: URL, original: URL | None) -> dict[str, str]:
        """The headers of a request.

        Headers that may hold credentials are left out if the catalogue's link that led to it, `original` (None for
        robots.txt), is of another site (scheme, host, port).
        """
        host = url.raw_host or ""
        headers = {**self.all_hosts, **self.by_host.get(host, {}), **self.by_host.get(f"{host}:{url.port}", {})}
        if original is not None and (url is original or url.origin() == original.origin()):
            return headers
        return {name: value for name, value in headers.items() if name.lower() in _PUBLIC}


def _site(text: str, location: str) -> str:
    try:
        url = parse_url(f"http://{text}/")
    except BadUrl:
        raise ConfigError(f"{location}: [{text[:80]}] is not a host") from None
    host = url.raw_host or ""
    return host if re.fullmatch(r"[^:]*|\[.*\]", text) else f"{host}:{url.port}"
