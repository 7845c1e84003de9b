"""The result of one planned photo: its ledger row and, if it can be stored, its sample."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace
from typing import Any

from lavic.data.tar_shards import Sample
from lavic.shards.http.request import Response
from lavic.shards.image.decoder import shared_decoder
from lavic.shards.image.normalize import PhotoError, PhotoSettings, inspect, normalize
from lavic.shards.image.placeholders import placeholder_id
from lavic.shards.pack.outcomes import Outcome
from lavic.shards.plan.photo_tasks import PhotoTask

_INLINE_BYTES = 256 * 1024
"""JPEGs of at most this size and little effort are checked in the event loop: handing one to a thread costs about a
third of a full check, and many times a check of the header."""


@dataclass(frozen=True)
class PhotoResult:
    """The result of one photo."""

    outcome: Outcome
    sample: Sample | None = None


class NeedsThread(Exception):
    """A photo whose check takes more than a few milliseconds."""


def outcome_of(task: PhotoTask, **values: Any) -> Outcome:
    """A photo's row of the ledger."""
    return Outcome(**_planned(task), **values)


def deferred(task: PhotoTask) -> PhotoResult:
    """The preliminary result of a photo whose host is slow."""
    return PhotoResult(outcome_of(task, kind="unasked", reason="its host is slow: deferred"))


def known_placeholder(task: PhotoTask, photo: PhotoSettings) -> PhotoResult | None:
    """The result of a photo whose link leads to a known placeholder; None for others."""
    if not (id := placeholder_id(task.url, photo.placeholders)):
        return None
    return PhotoResult(
        outcome_of(task, kind="placeholder", reason=f"Amazon's image {id} is a placeholder for a missing photo")
    )


def check_response(
    task: PhotoTask, response: Response, photo: PhotoSettings, began: float, *, inline: bool = False
) -> PhotoResult:
    """Check a fetched photo and make its sample and ledger row.

    `began` is the time of the request by `time.perf_counter`. With `inline`, NeedsThread is raised if the check takes
    more than a few milliseconds.
    """
    if inline and len(response.body) > _INLINE_BYTES:
        raise NeedsThread
    kind, reason, digest, sample = response.kind, response.reason, "", None
    if kind == "ok":
        digest = hashlib.sha256(response.body).hexdigest()
        try:
            inspected = inspect(response.body, photo, digest)
            if inline and inspected.effort != "little":
                raise NeedsThread
            convert = shared_decoder().normalize if inspected.effort == "unknown" else normalize
            stored = convert(inspected, photo)
            sha256 = digest if stored.jpg is response.body else ""
            sample = _sample(task, stored.jpg, stored.width, stored.height, sha256, digest)
        except PhotoError as error:
            kind, reason = error.kind, error.reason
    row = outcome_of(
        task,
        kind=kind,
        reason=reason,
        http=response.http,
        attempts=response.attempts,
        bytes=len(response.body),
        sha256=digest,
        seconds=round(time.perf_counter() - began, 3),
        etag=response.etag if sample else "",
        last_modified=response.last_modified if sample else "",
    )
    return PhotoResult(row, sample)


def copy_for(task: PhotoTask, first: PhotoResult) -> PhotoResult:
    """The result of a photo that shows the picture of another one, which was fetched."""
    row = replace(first.outcome, **_planned(task), attempts=0, seconds=0.0)
    if first.sample is None:
        return PhotoResult(row)
    meta = first.sample.meta
    return PhotoResult(
        row, _sample(task, first.sample.jpg, meta["width"], meta["height"], meta["sha256"], meta["source_sha256"])
    )


def _sample(task: PhotoTask, jpg: bytes, width: int, height: int, sha256: str, source_sha256: str) -> Sample:
    return Sample.of(
        item_id=task.item_id,
        n=task.n,
        jpg=jpg,
        title=task.title,
        width=width,
        height=height,
        text=task.text,
        url=task.url,
        categories=task.categories,
        details=task.details,
        source_sha256=source_sha256,
        sha256=sha256,
    )


def _planned(task: PhotoTask) -> dict[str, Any]:
    """The fields of a row that come from the plan, and so do not depend on the run that writes it."""
    return {"key": task.key, "item_id": task.item_id, "n": task.n, "url": task.url, "same_as": task.same_as}
