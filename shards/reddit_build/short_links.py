"""Resolves short links one after the other at a limited rate; every result is kept in a file.

Requests go to the hosts of Amazon's short links alone, and only for the address that they redirect to: no page is
fetched, and no address in a response is visited, besides another short link.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from lavic import __version__
from lavic.data.links import asins, short_links
from lavic.data.reddit.dumps.id_table import write_table
from lavic.data.reddit.item_table import ItemTable
from lavic.errors import ConfigError, first_line
from lavic.shards.reddit_build.work_folder import WorkFolder
from lavic.shards.reddit_settings import ShortLinkSettings
from lavic.storage.atomic import atomic_write
from lavic.storage.json_text import BadJson, parse_json
from lavic.storage.text_files import read_lines
from lavic.tracking.progress import progress_bar

log = logging.getLogger(__name__)

CACHE = "short_links.jsonl"
_HOPS = 3
_GONE = (404, 410)
_REDIRECTS = (301, 302, 303, 307, 308)
_BREAK_AFTER = 10
"""Failures in a row after which the rest is left for another run."""


def resolve_links(
    settings: ShortLinkSettings,
    out: Path,
    work: WorkFolder,
    links_of_dumps: Sequence[Mapping[str, Sequence[int]]],
    items: ItemTable,
) -> tuple[Path, Path, dict[str, int]]:
    """Resolves the short links; those of each dump come with the submissions that hold them.

    Returns:
        A JSON file of the links that lead to an item, a table of the submissions that hold those, and counts.
    """
    resolved, hits, counted = (work.path / f"short_links.{kind}" for kind in ("json", "table", "counts.json"))
    if counted.exists():
        # Results of other runs since then are for other sets: the steps after this one may have begun.
        return resolved, hits, json.loads(counted.read_text("utf-8"))
    urls = sorted({url for links in links_of_dumps for url in links})
    resolver = Resolver(settings, settings.cache or out / CACHE)
    with progress_bar(len(urls), "links", "resolving short links") as bar:
        for url in urls:
            resolver.resolve(url)
            bar.update(1)
    known = {url: asin for url in urls if (asin := resolver.known(url)) and items.parents([asin])[0]}
    submissions = {id for links in links_of_dumps for url, ids in links.items() if url in known for id in ids}
    atomic_write(resolved, json.dumps(known, sort_keys=True))
    write_table(hits, np.array(sorted(submissions), np.uint64))
    unknown = sum(resolver.known(url) is None for url in urls)
    counts = {
        "short_links_distinct": len(urls),
        "short_links_not_resolved": unknown,
        "short_links_to_items": len(known),
    }
    atomic_write(counted, json.dumps(counts))
    return resolved, hits, counts


class Resolver:
    """Resolves short links, and keeps the results in a file."""

    def __init__(self, settings: ShortLinkSettings, cache: Path) -> None:
        """Reads the results of earlier runs: rows with `url`, `asin` (empty for none) and `status`.

        Raises:
            ConfigError: The server, or the file, is not what it should be.
        """
        self._settings, self._cache = settings, cache
        self._server = _server(settings.server) if settings.server else None
        self._answers: dict[str, str] = {}
        self._requests = self._failures = 0
        self._next = 0.0
        if exists := cache.exists():
            _complete_last_line(cache)
        for line, text in read_lines(cache) if exists else ():
            try:
                row = parse_json(text)
                self._answers[row["url"]] = row["asin"]
            except (BadJson, KeyError, TypeError):
                raise ConfigError(f"{cache}:{line}: not an answer for a short link; remove the line") from None

    def known(self, url: str) -> str | None:
        """The item that a link leads to; empty for none, None where it is not known."""
        return self._answers.get(url)

    def resolve(self, url: str) -> None:
        """Resolves a link, unless its result is known, the limit is reached or the hosts do not respond."""
        limit = self._settings.limit
        if url in self._answers or self._failures >= _BREAK_AFTER or (limit is not None and self._requests >= limit):
            return
        target = url
        for _ in range(_HOPS):
            try:
                status, location = self._request(target)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._failed(url, first_line(error))
                return
            if status in _GONE:
                self._keep(url, "", status)
                return
            if status not in _REDIRECTS or not location:
                self._failed(url, f"status {status}")
                return
            if linked := asins(location):
                self._keep(url, linked[0], status)
                return
            if not (next_links := short_links(location)):
                self._keep(url, "", status)
                return
            target = next_links[0]
        self._keep(url, "", 0)

    def _request(self, url: str) -> tuple[int, str]:
        """Status and Location of one request, at the rate."""
        time.sleep(max(0.0, self._next - time.monotonic()))
        self._next = time.monotonic() + 1 / self._settings.rate
        self._requests += 1
        parts = urlsplit(url)
        timeout = self._settings.timeout
        path = parts.path
        if self._server:
            host, port = self._server
            path = f"/{parts.netloc}{path}"
            connection = http.client.HTTPConnection(host, port, timeout=timeout)
        else:
            connection = http.client.HTTPSConnection(parts.netloc, timeout=timeout)
        try:
            connection.request("GET", path, headers={"User-Agent": f"lavic/{__version__}", "Accept": "*/*"})
            response = connection.getresponse()
            return response.status, response.getheader("Location") or ""
        finally:
            connection.close()

    def _keep(self, url: str, asin: str, status: int) -> None:
        self._failures = 0
        self._answers[url] = asin
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        with self._cache.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"url": url, "asin": asin, "status": status}) + "\n")

    def _failed(self, url: str, reason: str) -> None:
        """A link stays unresolved: another run may request it again."""
        self._failures += 1
        log.warning("%s: %s", url, reason)
        if self._failures == _BREAK_AFTER:
            log.warning("%d requests in a row failed: the other short links are left for another run", _BREAK_AFTER)


def _complete_last_line(cache: Path) -> None:
    """Ends the last line of a file, or removes it if it was cut: the disk was full, or the machine went down."""
    data = cache.read_bytes()
    if not (last := data[data.rfind(b"\n") + 1 :]):
        return
    with cache.open("rb+") as file:
        try:
            parse_json(last.decode())
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        except ValueError:
            file.truncate(len(data) - len(last))


def _server(address: str) -> tuple[str, int]:
    parts = urlsplit(address)
    if parts.scheme != "http" or not parts.hostname or parts.path.strip("/"):
        raise ConfigError(f"--short-links.server: {address} is not http://HOST:PORT")
    return parts.hostname, parts.port or 80
