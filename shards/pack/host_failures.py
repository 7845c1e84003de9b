"""Failed photos by host, in a few numbers that fit into a shard's seal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from lavic.shards.http.url import BadUrl, host_name, parse_url
from lavic.shards.pack.outcomes import Outcome

OTHERS = ""
"""Stands for all other hosts."""
_NAMED = 20
"""Hosts that a seal names for each kind of failure."""
_SHOWN = 3
_MALFORMED = "(malformed links)"

Failures = Mapping[str, Mapping[str, int]]
"""By kind, the number of photos of each host."""


def host_of(link: str) -> str:
    """The host of a link, with its port unless that is the scheme's default."""
    try:
        return host_name(parse_url(link))
    except BadUrl:
        return _MALFORMED


def failures_of(rows: Iterable[Outcome]) -> dict[str, dict[str, int]]:
    """The failures of a shard's ledger; rare hosts are counted together."""
    failures: dict[str, Counter[str]] = {}
    for row in rows:
        if row.kind != "ok":
            failures.setdefault(row.kind, Counter())[host_of(row.url)] += 1
    return {kind: _named(hosts) for kind, hosts in sorted(failures.items())}


def failures_table(shards: Iterable[Failures]) -> str:
    """The hosts with the most failures of each kind, the most frequent kind first; empty if nothing failed."""
    total: dict[str, Counter[str]] = {}
    for failures in shards:
        for kind, hosts in failures.items():
            total.setdefault(kind, Counter()).update(hosts)
    if not total:
        return ""
    lines = ["  failures by host"]
    for kind, hosts in sorted(total.items(), key=lambda row: -row[1].total()):
        named = [(host, count) for host, count in hosts.most_common() if host != OTHERS][:_SHOWN]
        counts = [f"{host} {count:,}" for host, count in named]
        if other_hosts := hosts.total() - sum(count for _, count in named):
            counts.append(f"other hosts {other_hosts:,}")
        lines.append(f"  {kind:<16}{', '.join(counts)}")
    return "\n".join(lines)


def _named(hosts: Counter[str]) -> dict[str, int]:
    named = dict(sorted(hosts.most_common(_NAMED)))
    other_hosts = hosts.total() - sum(named.values())
    return {**named, OTHERS: other_hosts} if other_hosts else named
