"""What comes of one planned photo: the row of its ledger and, where it can be stored, its sample."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace
from typing import Any

from lavic.data.tar_shards import Sample
from lavic.shards.http.request import Answer
from lavic.shards.image.decoder import shared
from lavic.shards.image.normalize import PhotoError, PhotoSettings, examine, store
from lavic.shards.image.placeholders import placeholder_id
from lavic.shards.pack.outcomes import Outcome
from lavic.shards.plan.photo_tasks import PhotoTask

_AT_ONCE = 256 * 1024
"""A JPEG of at most so many bytes, and of little effort, is checked between two answers, others in a thread beside:
handing one over and back costs about a third of a check to its last bit, and many times one of the header."""


@dataclass(frozen=True)
class PhotoResult:
    """The end of a photo."""

    outcome: Outcome
    sample: Sample | None


def left_for_later(task: PhotoTask) -> PhotoResult:
    """The end, for now, of a photo whose host is slow."""
    return PhotoResult(outcome_of(task, kind="unasked", reason="its host is slow: left for later"), None)


def known_placeholder(task: PhotoTask, photo: PhotoSettings) -> PhotoResult | None:
    """The end of a photo whose link says that it stands for a missing one; None for others."""
    if not (id := placeholder_id(task.url, photo.placeholders)):
        return None
    return PhotoResult(
        outcome_of(task, kind="placeholder", reason=f"Amazon's image {id} stands for a missing photo"), None
    )


class TakesLonger(Exception):
    """A photo that is not checked within milliseconds."""


def check_answer(
    task: PhotoTask, answer: Answer, photo: PhotoSettings, began: float, *, at_once: bool = False
) -> PhotoResult:
    """Check what was fetched and make the sample and the ledger's row of it; `at_once`, or raise TakesLonger."""
    if at_once and len(answer.body) > _AT_ONCE:
        raise TakesLonger
    kind, reason, digest, sample = answer.kind, answer.reason, "", None
    if kind == "ok":
        digest = hashlib.sha256(answer.body).hexdigest()
        try:
            found = examine(answer.body, photo, digest)
            if at_once and found.effort != "little":
                raise TakesLonger
            stored = shared().store(found, photo) if found.effort == "unknown" else store(found, photo)
            kept = digest if stored.jpg is answer.body else ""
            sample = _sample(task, stored.jpg, stored.width, stored.height, kept, digest)
        except PhotoError as error:
            kind, reason = error.kind, error.reason
    row = outcome_of(
        task,
        kind=kind,
        reason=reason,
        http=answer.http,
        attempts=answer.attempts,
        bytes=len(answer.body),
        sha256=digest,
        seconds=round(time.perf_counter() - began, 3),
        etag=answer.etag if sample else "",
        last_modified=answer.last_modified if sample else "",
    )
    return PhotoResult(row, sample)


def with_marks_of(row: Outcome, other: Outcome) -> Outcome:
    """A stored photo's row with what the refresh of another, which shows the same picture, says of it."""
    return replace(row, etag=other.etag, last_modified=other.last_modified, refresh_failed=other.refresh_failed)


def same_picture(first: PhotoResult, task: PhotoTask) -> PhotoResult:
    """The end of a photo that shows the picture of another, which was fetched."""
    row = first.outcome
    same = replace(row, **_names(task), attempts=0, seconds=0.0)
    if first.sample is None:
        return PhotoResult(same, None)
    meta = first.sample.meta
    sample = _sample(task, first.sample.jpg, meta["width"], meta["height"], meta["sha256"], meta["source_sha256"])
    return PhotoResult(same, sample)


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


def outcome_of(task: PhotoTask, **values: Any) -> Outcome:
    """A photo's row of the ledger."""
    return Outcome(**_names(task), **values)


def _names(task: PhotoTask) -> dict[str, Any]:
    """What a row of the ledger has from the plan alone, so that it does not depend on which run wrote it."""
    return {"key": task.key, "item_id": task.item_id, "n": task.n, "url": task.url, "same_as": task.same_as}
