"""`lavic crawl --dry-run`: what would be fetched from each host, and how long the hosts' limits make that take."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lavic.errors import LavicError
from lavic.shards.crawl_settings import CrawlSettings
from lavic.shards.pack.host_failures import host_of
from lavic.shards.pack.outcomes import ASKED_AGAIN, read_ledger
from lavic.shards.pack.seal import Seal
from lavic.shards.plan.crawl_plan import FOLDER, Plan, load_plan, read_tasks
from lavic.storage.paths import place, sizes
from lavic.tracking.progress import ProgressBar

_SHOWN = 15


def dry_run(
    settings: CrawlSettings, plan_in: Callable[[Path], Plan], seals_of: Callable[[Plan], Sequence[Seal | None]]
) -> None:
    """Print what a crawl would fetch. Writes nothing into the set's folder and contacts no photo host.

    Args:
        settings: Of one set.
        plan_in: Makes or takes up the plan of a folder.
        seals_of: For each shard of a plan its seal, or None where it is not whole.

    Raises:
        ConfigError: The folder belongs to another plan.
        DataError: The catalogue cannot be read.
    """
    folder = place(settings.out)
    with _planned(folder, settings.extend, plan_in) as plan:
        # What an extended plan adds has no seal in the folder itself.
        here = Plan(folder=folder, settings=plan.settings, generations=plan.generations)
        again = ASKED_AGAIN.union(settings.retry, ("ok",) if settings.refresh else ())
        requests: Counter[str] = Counter()
        photos = shards = 0
        for number, seal in enumerate(seals_of(here)):
            if seal is not None and not any(map(seal.outcomes.get, again)):
                continue
            shards += 1
            links = _links(plan.shard(number), here.shard(number), seal, again)
            photos += len(links)
            requests.update(host_of(link) for link in links if link)
        print(_report(settings, plan, shards, photos, requests))


@contextmanager
def _planned(folder: Path, extend: bool, plan_in: Callable[[Path], Plan]) -> Iterator[Plan]:
    """The plan as a crawl would make it, beside the folder where the crawl would write one."""
    if load_plan(folder) is not None and not extend:
        yield plan_in(folder)
        return
    with tempfile.TemporaryDirectory(prefix="lavic-dry-run-") as temporary:
        there = Path(temporary)
        (there / FOLDER).mkdir()
        for name in sizes(folder / FOLDER):
            (there / FOLDER / name).write_bytes((folder / FOLDER / name).read_bytes())
        try:
            plan = plan_in(there)
        except LavicError as error:
            raise type(error)(str(error).replace(temporary, str(folder))) from None
        yield plan


def _links(planned: Path, shard: Path, seal: Seal | None, again: Collection[str]) -> list[str]:
    """For each photo of a shard that is to be fetched its link; empty where another photo's link shows the same."""
    tasks = read_tasks(planned)
    if seal is not None:
        wanted = {row.key for row in read_ledger(shard) if row.kind in again}
        tasks = [task for task in tasks if task.key in wanted]
    seen: set[str] = set()
    links = []
    for task in tasks:
        picture = task.same_as or task.key
        links.append("" if picture in seen else task.url)
        seen.add(picture)
    return links


def _report(settings: CrawlSettings, plan: Plan, shards: int, photos: int, requests: Counter[str]) -> str:
    rate, connections = settings.fetch.host_rate, settings.fetch.host_connections
    total = requests.total()
    lines = [
        f"{settings.out}: dry run, nothing is written and no host is asked",
        f"{plan.counts.photos:,} photos of {plan.counts.items:,} items in {len(plan.digests):,} shards; to be fetched: "
        f"{photos:,} photos in {shards:,} shards, by {total:,} requests to {len(requests):,} hosts",
    ]
    if not total:
        return "\n".join(lines)

    def row(name: str, count: int, longest: int) -> str:
        least = ProgressBar.format_interval(longest / rate) if rate else "-"
        return f"  {name:<40}{count:>12,}{count / total:>8.1%}{least:>14}"

    lines.append(f"  {'host':<40}{'requests':>12}{'share':>8}{'at least':>14}")
    ranked = requests.most_common()
    lines += [row(host, count, count) for host, count in ranked[:_SHOWN]]
    if rest := ranked[_SHOWN:]:
        lines.append(row(f"{len(rest):,} more hosts", sum(count for _, count in rest), rest[0][1]))
    if rate:
        lines.append(
            f"at least {ProgressBar.format_interval(ranked[0][1] / rate)} in all: hosts are asked side by side, each "
            f"{rate:g} times a second at most (--fetch.host-rate)"
        )
    else:
        lines.append("no least time: --fetch.host-rate 0 asks each host as fast as it answers")
    if rate and connections:
        lines.append(
            f"longer where a host takes more than {connections / rate:.2g} s for an answer, since it has "
            f"{connections} requests in flight at most (--fetch.host-connections)"
        )
    if settings.fetch.robots:
        lines.append("robots.txt of each host, which may forbid photos or ask for a Crawl-delay, is read by the crawl")
    return "\n".join(lines)
