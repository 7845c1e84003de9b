"""`lavic crawl --dry-run`: prints what would be fetched from each host, and how long the rate limits make that take."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lavic.errors import LavicError
from lavic.shards.crawl_settings import CrawlSettings
from lavic.shards.pack.host_failures import host_of
from lavic.shards.pack.outcomes import ALWAYS_RETRIED, read_ledger
from lavic.shards.pack.seal import Seal
from lavic.shards.plan.crawl_plan import FOLDER, Plan, load_plan
from lavic.shards.plan.photo_tasks import PhotoTask
from lavic.storage.paths import as_path, file_sizes
from lavic.tracking.progress import ProgressBar

_SHOWN = 15


def dry_run(
    settings: CrawlSettings, plan_in: Callable[[Path], Plan], seals_of: Callable[[Plan], Sequence[Seal | None]]
) -> None:
    """Print what a crawl of one set would fetch. Writes nothing into the set's folder and contacts no host.

    Args:
        settings: Of one set.
        plan_in: Loads or makes the plan of a folder.
        seals_of: For each shard of a plan its seal, or None if it is not complete.

    Raises:
        ConfigError: The folder has another plan.
        DataError: The catalogue cannot be read.
    """
    folder = as_path(settings.out)
    with _planned(folder, settings.extend, plan_in) as plan:
        # New shards of an extended plan have no seal in the folder.
        plan_in_folder = Plan(folder=folder, settings=plan.settings, generations=plan.generations)
        retried = ALWAYS_RETRIED.union(settings.retry, ("ok",) if settings.refresh else ())
        requests: Counter[str] = Counter()
        photos = shards = 0
        for number, seal in enumerate(seals_of(plan_in_folder)):
            if seal is not None and not any(map(seal.outcomes.get, retried)):
                continue
            shards += 1
            links = _links(plan.tasks(number), plan_in_folder.shard(number), seal, retried)
            photos += len(links)
            requests.update(host_of(link) for link in links if link)
        print(_report(settings, plan, shards, photos, requests))


@contextmanager
def _planned(folder: Path, extend: bool, plan_in: Callable[[Path], Plan]) -> Iterator[Plan]:
    """The plan as a crawl would make it; a new one is made in a temporary folder."""
    if load_plan(folder) is not None and not extend:
        yield plan_in(folder)
        return
    with tempfile.TemporaryDirectory(prefix="lavic-dry-run-") as temporary:
        copy = Path(temporary)
        (copy / FOLDER).mkdir()
        for name in file_sizes(folder / FOLDER):
            (copy / FOLDER / name).write_bytes((folder / FOLDER / name).read_bytes())
        try:
            plan = plan_in(copy)
        except LavicError as error:
            raise type(error)(str(error).replace(temporary, str(folder))) from None
        yield plan


def _links(tasks: list[PhotoTask], shard: Path, seal: Seal | None, retried: Collection[str]) -> list[str]:
    """The links of a shard's photos to fetch; empty for one that is fetched with another."""
    if seal is not None:
        retried_keys = {row.key for row in read_ledger(shard) if row.kind in retried}
        tasks = [task for task in tasks if task.key in retried_keys]
    pictures: set[str] = set()
    links = []
    for task in tasks:
        picture = task.same_as or task.key
        links.append("" if picture in pictures else task.url)
        pictures.add(picture)
    return links


def _report(settings: CrawlSettings, plan: Plan, shards: int, photos: int, requests: Counter[str]) -> str:
    rate, connections = settings.fetch.host_rate, settings.fetch.host_connections
    total = requests.total()
    lines = [
        f"{settings.out}: dry run, nothing is written and no host is contacted",
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
    if other_hosts := ranked[_SHOWN:]:
        lines.append(row(f"{len(other_hosts):,} more hosts", sum(count for _, count in other_hosts), other_hosts[0][1]))
    if rate:
        lines.append(
            f"at least {ProgressBar.format_interval(ranked[0][1] / rate)} in all: hosts are used in parallel, with at "
            f"most {rate:g} requests per second each (--fetch.host-rate)"
        )
    else:
        lines.append("no minimum time: --fetch.host-rate 0 sets no limit")
    if rate and connections:
        lines.append(
            f"longer if a host takes more than {connections / rate:.2g} s for a response, since it has at most "
            f"{connections} requests in flight (--fetch.host-connections)"
        )
    if settings.fetch.robots:
        lines.append(
            "the crawl also reads the robots.txt of each host, which may forbid photos or ask for a Crawl-delay"
        )
    return "\n".join(lines)
