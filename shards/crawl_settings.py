"""Settings of `lavic crawl`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from lavic.config import settings
from lavic.data.schema import ImageSize
from lavic.data.sources.tables import COLUMNS
from lavic.distributed.ray_session import RaySettings
from lavic.shards.cluster.executor import Executor, check_executor
from lavic.shards.http.fetch_settings import FetchSettings
from lavic.shards.image.normalize import PhotoSettings
from lavic.shards.pack.outcomes import KINDS
from lavic.shards.plan.photo_tasks import PlanSettings
from lavic.tracking.settings import TrackingSettings


@settings
class CrawlSettings:
    """Fetch a catalogue's photos and pack them into WebDataset shards."""

    items: tuple[str, ...] = Field(min_length=1)
    """Catalogue files: LaViC item2meta_*.json[l], Amazon Reviews 2023 meta_*.jsonl[.gz], parquet; with --columns csv,
    tsv, parquet and jsonl of plain links; paths, globs, URIs such as s3://..."""
    columns: tuple[str, ...] = ()
    """For files with one link per row: the columns, as `url=URL id=SKU title=NAME text=CAPTION`. Only `url` is
    required. Neighbouring rows with one id are the photos of one item, 0, 1, 2, ...; without ids each link is an item,
    with an id made from the link."""
    out: str
    """Folder of the set, or a URI such as s3://bucket/prefix."""
    set: str = Field(default="photos", pattern=r"^[A-Za-z0-9_]+$")
    """First part of the shards' names."""
    split: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_]+$")
    """Second part of the shards' names, by default `train`. With --splits: the one to make, by default all."""
    splits: tuple[str, ...] = ()
    """Splits of the items, as `train=0.9 valid=0.1`: each becomes a set in OUT/<name>. The item's id decides, so no
    item is in two. If the shares add up to less than 1, items are left out."""
    photos_per_shard: int = Field(default=1000, ge=1, le=100_000)
    """Planned photos in one shard; it holds as many as could be fetched."""
    photos: str = Field(default="first", pattern=r"^(first|all|[1-9]\d{0,5})$")
    """Photos of an item: `first`, `all`, or how many from its first."""
    image_size: ImageSize = "hi_res"
    """Which link of a photo to use if there are several; if it is missing, the largest of the others."""
    text: Literal["auto", "catalogue", "title", "none"] = "auto"
    """Content of the txt members. catalogue: its description of the photo, if it has one; title: the item's title;
    auto: `catalogue` if the catalogue describes any photo, else `title`; plan.json has the choice, and an extended set
    keeps it; none: empty, so that a catalogue with descriptions gives the same shards as one without."""
    duplicates: Literal["stored", "referenced"] = "stored"
    """Photos with the same bytes. stored: each in its own sample, so that any reader of tars gets every item;
    referenced: only the first, and the others are rows in <shard>.references.jsonl, which `lavic embed` follows."""
    near_duplicates: bool = False
    """When the set is complete, list the photos that look like an earlier one, in another size, quality or format, in
    near_duplicates.jsonl. Every new shard is read again for that."""
    limit: int | None = Field(default=None, ge=1)
    """Number of items to plan, from the first."""
    ids: str | None = None
    """File of the items to plan, one id on each line."""
    max_rejected: int = Field(default=100, ge=0)
    """Maximum number of broken records of the catalogue; with more of them nothing is fetched."""
    extend: bool = False
    """Accept a catalogue that has changed: items that are not in the set yet become new shards."""
    retry: tuple[str, ...] = ()
    """Fetch photos with these outcomes again, as `timeout throttled`; their shards are rewritten."""
    min_success: float = Field(default=0.5, ge=0, le=1)
    """Share of the photos that must be stored for the set to count as complete, without those that are gone, opted out
    or placeholders. With fewer the shards are kept, there is no manifest.json, and the exit code is 1."""
    refresh: bool = False
    """Request the stored photos again, by the ETag or Last-Modified that their servers sent, and store the changed ones
    again. A photo that cannot be fetched any more is kept, with the reason in its ledger row. The same command
    continues a refresh that was interrupted."""
    fetch: FetchSettings = FetchSettings()
    """How photos are fetched."""
    photo: PhotoSettings = PhotoSettings()
    """Which photos are accepted, and how they are stored."""
    dry_run: bool = False
    """Print how many photos would be fetched from which hosts, and how long the hosts' rate limits make that take.
    Nothing is written, and no host is contacted."""
    executor: Executor = "auto"
    """Where the shards are made; they are the same either way. `local`: processes of this machine, one per CPU or
    --ray.workers of them, which start in tenths of a second. `ray`: a Ray cluster that is joined or started, which
    takes seconds. `auto`: Ray if one is named (--ray.address, RAY_ADDRESS) or more than 20,000 photos are to be
    fetched, else local."""
    ray: RaySettings = RaySettings()
    """Where the job runs."""
    tracking: TrackingSettings = TrackingSettings()
    """Where the run is recorded."""

    @field_validator("photos", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value

    @field_validator("retry")
    @classmethod
    def _known(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        named = tuple(kind for word in kinds for kind in word.split(",") if kind)
        if wrong := [kind for kind in named if kind not in KINDS or kind == "ok"]:
            raise ValueError(f"{', '.join(wrong)} cannot be retried; known: {', '.join(KINDS[1:])}")
        return named

    @model_validator(mode="after")
    def _one_executor(self) -> CrawlSettings:
        check_executor(self.executor, self.ray)
        return self

    @model_validator(mode="after")
    def _parts(self) -> CrawlSettings:
        shares, columns = self.shares, self.named_columns
        wrong = not all(columns.values()) or len(columns) != len(self.columns) or not set(columns) <= set(COLUMNS)
        if self.columns and (wrong or "url" not in columns):
            raise ValueError(
                f"--columns takes url=NAME and maybe id=, title= and text=, each once, got {' '.join(self.columns)}"
            )
        words = " ".join(self.splits)
        if shares and self.split not in (None, *shares):
            raise ValueError(f"--split {self.split} is not one of --splits {words}")
        if len(shares) != len(self.splits) or not all(0 < share <= 1 for share in shares.values()):
            raise ValueError(f"--splits takes different names with shares, as train=0.9 valid=0.1, got {words}")
        if sum(shares.values()) > 1 + 1e-9:
            raise ValueError(f"--splits: the shares add up to {sum(shares.values()):g}, more than 1")
        return self

    @property
    def named_columns(self) -> dict[str, str]:
        """Name of each column by its content; empty for catalogues."""
        return {field: name for field, _, name in (word.partition("=") for word in self.columns)}

    @property
    def shares(self) -> dict[str, float]:
        """Share of the items by split; empty without --splits."""
        matches = [re.fullmatch(r"([A-Za-z0-9_]+)=(\d*\.?\d+)", word) for word in self.splits]
        return {match[1]: float(match[2]) for match in matches if match}

    def each(self) -> Iterator[CrawlSettings]:
        """The settings of each set."""
        if not self.splits:
            yield replace(self, split=self.split or "train")
        for name in self.shares:
            if self.split in (None, name):
                yield replace(self, split=name, out=f"{self.out.rstrip('/')}/{name}")

    @property
    def planned(self) -> PlanSettings:
        """The settings that decide which photo is where."""
        return PlanSettings(
            set=self.set,
            split=self.split or "train",
            splits=self.shares,
            photos_per_shard=self.photos_per_shard,
            photos=self.photos,
            image_size=self.image_size,
            text=self.text,
            columns=self.named_columns,
            duplicates=self.duplicates,
            limit=self.limit,
            ids=self.ids,
            photo=self.photo.identity(),
        )
