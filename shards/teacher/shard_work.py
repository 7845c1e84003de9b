"""One shard: its photos are described, those with unusable texts once more, and the sidecar is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

from lavic.data.descriptions import FIELDS, ORIGIN, descriptions_path, write_descriptions
from lavic.data.shard_dataset import ShardDataset
from lavic.errors import Stopped
from lavic.shards.teacher.partial_descriptions import PartialDescriptions, partial_path
from lavic.shards.teacher.tally import Tally
from lavic.shards.teacher.teacher import Description, Teacher
from lavic.shards.teacher.text_check import NO_TEXT
from lavic.storage.paths import is_remote

CATALOGUE = "catalogue"
"""Takes the place of the model if the text is the catalogue's."""


def describe_shard(
    data: ShardDataset,
    number: int,
    teacher: Teacher,
    tally: Tally,
    *,
    keep_catalogue: bool,
    keep_flagged: bool,
    stopped: Callable[[], bool],
) -> None:
    """Describes the photos of one shard and writes its sidecar.

    A photo without an answer (`failed`) leaves the shard unfinished: the next run asks for it again. `keep_catalogue`:
    photos with a text of the catalogue keep it. `keep_flagged`: unusable texts stay in the sidecar.

    Raises:
        Stopped: A stop was requested; what is written so far is kept.
    """
    started = time.monotonic()
    entry = data.manifest.shards[number]
    shard = data.manifest.path(entry)
    start = sum(earlier.samples for earlier in data.manifest.shards[:number])
    keys = data.keys_of(number)
    samples = range(entry.samples) if keep_catalogue else ()
    catalogue_texts = {keys[n]: text for n in samples if (text := data.meta_and_text(start + n)[1])}
    rows = [n for n in range(entry.samples) if keys[n] not in catalogue_texts]
    with PartialDescriptions.open(shard, {"shard": entry.sha256, **teacher.origin}) as partial:
        num_described = len(partial.written[0])

        def write(attempt: int, rows: Sequence[int]) -> None:
            unwritten = _unwritten_batches(rows, keys, partial.written[attempt], teacher.batch_size)
            samples = (data[start + n] for n in unwritten)
            written = teacher.write(samples, attempt, stopped)
            done = 0
            while batch := list(islice(written, teacher.batch_size)):
                partial.add(attempt, [keys[n] for n in unwritten[done : done + len(batch)]], batch)
                done += len(batch)
            if done < len(unwritten):
                raise Stopped("stopped on request; what is described is kept; run the same command again to continue")

        write(0, rows)
        # Known only when the first pass is through, so that batches are the same after a restart.
        first = partial.written[0]
        write(1, [n for n in rows if first[keys[n]].flag and first[keys[n]].flag not in NO_TEXT])
        texts = {keys[n]: _better(first[keys[n]], partial.written[1].get(keys[n])) for n in rows}
    described = len(rows) - num_described
    tally.add(texts, retried=len(partial.written[1]), described=described, seconds=time.monotonic() - started)
    if any(text.flag == "failed" for text in texts.values()):
        print(f"{shard.name}: unfinished, some photos got no answer", flush=True)
        return
    photos = zip(keys, data.digests_of(number), strict=True)
    write_descriptions(
        shard, (_row(key, sha256, catalogue_texts, texts, teacher, keep_flagged) for key, sha256 in photos)
    )
    if not is_remote(shard):
        partial_path(shard).unlink(missing_ok=True)
    seconds = time.monotonic() - started
    print(f"{descriptions_path(shard).name}: {len(keys)} descriptions, {described / seconds:.1f} photos/s", flush=True)


def _unwritten_batches(
    rows: Sequence[int], keys: Sequence[str], written: Mapping[str, Description], size: int
) -> list[int]:
    """The photos of all batches that are not written whole: a batch is described together or not at all."""
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [n for batch in batches if not all(keys[n] in written for n in batch) for n in batch]


def _better(first: Description, second: Description | None) -> Description:
    """The second text if it is usable, else the first."""
    return second if second is not None and not second.flag else first


def _row(
    key: str,
    source_sha256: str,
    catalogue_texts: dict[str, str],
    texts: dict[str, Description],
    teacher: Teacher,
    keep_flagged: bool,
) -> dict[str, str]:
    origin = [teacher.origin[name] for name in ORIGIN]
    if key in catalogue_texts:
        values = (key, catalogue_texts[key], CATALOGUE, "", *origin[2:], "", source_sha256)
    else:
        text = texts[key]
        values = (key, text.text if keep_flagged or not text.flag else "", *origin, text.flag, source_sha256)
    return dict(zip(FIELDS, values, strict=True))
