"""Photos of items by id, read from sets of shards by their offset. An id is looked up in an index, never a path."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from lavic.data.remote_shards import CacheSettings
from lavic.data.shard_dataset import ShardDataset
from lavic.errors import DataError

MEMORY = 64 << 20
"""Bytes of the photos that are kept after they were read."""
MOST_CHARACTERS = 512
"""Longest id in a request: a longer one is no item's."""
ROUTE = "/photos/"
_MEDIA_TYPES = (
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"GIF8", "image/gif"),
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Photo:
    """An encoded photo, as the shards hold it."""

    data: bytes
    media_type: str
    """Media type by its first bytes, not by what the source says."""
    etag: str
    """Strong: another one for other bytes. With its quotes, as the header holds it."""


class ItemPhotos:
    """The photos of items. Threads may share it.

    A set in a folder is read in place. Of a set in an object store single photos are downloaded, not shards.

    Args:
        folders: Of sets of shards, paths or addresses. The first set with a photo is asked.
        key_of: Item id -> key of its photo, such as that which its tokens were made of; None for an unknown item.
        cache: Where copies of shards may be already.
        memory: Bytes of the photos that are kept after they were read.

    Raises:
        DataError: A folder is not a whole set of shards.
    """

    def __init__(
        self,
        folders: Sequence[str | Path],
        key_of: Callable[[str], str | None],
        *,
        cache: CacheSettings | None = None,
        memory: int = MEMORY,
    ) -> None:
        self._sets = [ShardDataset(folder, descriptions=None, cache=cache, copy=False) for folder in folders]
        for data in self._sets:
            _ = data.index  # made now rather than in the first request
        self._key_of, self._memory = key_of, memory
        self._kept: OrderedDict[str, Photo] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __contains__(self, item: object) -> bool:
        """Whether an item has a photo; nothing is read."""
        key = self._key(item)
        return key is not None and self._find(key) is not None

    def path(self, item: str) -> str | None:
        """The path of an item's photo on the server, percent-encoded; None where it has none."""
        return ROUTE + quote(item, safe="") if item in self else None

    def get(self, item: str) -> Photo | None:
        """An item's photo; None for an unknown item, or one without a photo.

        Raises:
            LavicError: The set is damaged, or its store does not answer.
        """
        key = self._key(item)
        if key is None:
            return None
        with self._lock:
            if (photo := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return photo
        sample = self._find(key)
        photo = None if sample is None else _read(*sample)
        if photo is not None:
            self._keep(key, photo)
        return photo

    def _key(self, item: object) -> str | None:
        if not isinstance(item, str) or not 0 < len(item) <= MOST_CHARACTERS:
            return None
        return self._key_of(item)

    def _find(self, key: str) -> tuple[ShardDataset, int] | None:
        for data in self._sets:
            if (row := data.index.find_stored(key)) is not None:
                return data, row
        return None

    def _keep(self, key: str, photo: Photo) -> None:
        if len(photo.data) > self._memory:
            return
        with self._lock:
            if key in self._kept:  # another thread has read it at the same time
                return
            self._kept[key] = photo
            self._bytes += len(photo.data)
            while self._bytes > self._memory:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= len(oldest.data)


def _read(data: ShardDataset, row: int) -> Photo | None:
    sample = data[row]
    digest = hashlib.sha256(sample.jpg).hexdigest()
    if digest != sample.meta.get("sha256"):
        raise DataError(
            f"{data.manifest.folder}: {sample.key} is damaged; `lavic verify` lists every difference in a set"
        )
    media_type = next((name for start, name in _MEDIA_TYPES if sample.jpg.startswith(start)), None)
    if media_type is None:
        log.warning("%s: %s is not a photo that a browser shows", data.manifest.folder, sample.key)
        return None
    return Photo(data=sample.jpg, media_type=media_type, etag=f'"{digest[:32]}"')
