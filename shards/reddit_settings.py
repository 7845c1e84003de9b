"""Settings of `lavic reddit` and `lavic reddit rebuild`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from lavic.config import ByteCount, settings
from lavic.data.reddit.settings import LabelSettings, SplitSettings
from lavic.distributed.ray_session import RaySettings
from lavic.shards.cluster.executor import Executor, check_executor


@settings
class ShortLinkSettings:
    """Short links (amzn.to, a.co), whose items are known only by requests."""

    resolve: bool = False
    """Request short links from their hosts to learn their targets. The only requests that this command makes."""
    rate: float = Field(default=1.0, gt=0, le=100)
    """Maximum number of requests per second, to all hosts together."""
    cache: Path | None = None
    """File of the results, which are requested once; by default OUT/short_links.jsonl. It can be shared."""
    limit: int | None = Field(default=None, ge=0)
    """Maximum number of requests of this run; links that are left are counted as not resolved."""
    timeout: float = Field(default=10.0, gt=0, le=600)
    """Timeout of a request, seconds."""
    server: str | None = None
    """A server to use instead of the links' own hosts: `http://HOST:PORT` gets /amzn.to/CODE."""


@settings
class RedditSettings:
    """Conversations from dumps of Reddit and a catalogue of Amazon's items."""

    dumps: tuple[str, ...] = Field(min_length=1)
    """Dumps of comments and submissions, Arctic Shift's or Pushshift's: monthly, per subreddit, any number, paths,
    globs and URIs. The kind of a file is detected from its content."""
    items: tuple[str, ...] = Field(min_length=1)
    """Catalogue files, as for `lavic crawl`: Amazon Reviews 2023 meta_*.jsonl[.gz], LaViC item2meta_*.json[l],
    parquet."""
    reviews: tuple[str, ...] = ()
    """Review files of Amazon Reviews 2023, whose rows hold `asin` and `parent_asin`: links to a variant then count for
    its item."""
    out: Path
    """Folder for the set."""
    labels: LabelSettings = LabelSettings()
    """Which comments are recommendations."""
    split: SplitSettings = SplitSettings()
    """How they are split."""
    bots: Path | None = None
    """File of more accounts of programs, one name on each line."""
    short_links: ShortLinkSettings = ShortLinkSettings()
    """Short links."""
    bucket_bytes: ByteCount = Field(default="32MiB", validate_default=True, gt=0)
    """Bytes of posts that a worker holds at a time; in memory they take several times as much. The set does not
    depend on it."""
    keep_work: bool = False
    """Keep OUT/work, the results of the steps, when the set is complete."""
    executor: Executor = "auto"
    """Where the steps run; the set is the same. `local`: processes of this machine. `ray`: a Ray cluster that is
    joined or started. `auto`: Ray if one is named (--ray.address, RAY_ADDRESS) or the dumps have more than 8 GiB, else
    local."""
    ray: RaySettings = RaySettings()
    """Where the job runs. `workers`: files, or parts of the buckets, at a time."""

    @model_validator(mode="after")
    def _one_executor(self) -> RedditSettings:
        check_executor(self.executor, self.ray)
        return self


@settings
class RebuildSettings:
    """A set again from its ids and the dumps."""

    manifest: Path
    """Folder with `train.ids.jsonl`, `valid.ids.jsonl` and `test.ids.jsonl`."""
    dumps: tuple[str, ...] = Field(min_length=1)
    """Dumps that hold its posts."""
    out: Path
    """Folder for the set."""
    bucket_bytes: ByteCount = Field(default="32MiB", validate_default=True, gt=0)
    """Bytes of posts that a worker holds at a time."""
    keep_work: bool = False
    """Keep OUT/work when the set is complete."""
    executor: Executor = "auto"
    """Where the steps run, as for `lavic reddit`."""
    ray: RaySettings = RaySettings()
    """Where the job runs."""
