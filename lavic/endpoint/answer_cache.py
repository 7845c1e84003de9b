"""Answers on disk by the digest of their request, shared by any number of processes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavic.errors import DataError
from lavic.storage.atomic import atomic_open
from lavic.storage.checksummed_json import dump_checked, load_checked

_FORMAT = "lavic-answer-1"
log = logging.getLogger(__name__)


def request_digest(kind: str, body: Mapping[str, Any]) -> str:
    """The sha256 of a request, independent of the order of its keys. Neither the key nor the URL is part of it."""
    text = json.dumps({"kind": kind, "body": body}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class AnswerCache:
    """One small file for each answer, in folders by the first two digits of the digest.

    A file is written aside and renamed; one that is damaged counts as absent and is written again.

    Raises:
        DataError: The folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._warned = False
        try:
            for n in range(256):
                (folder / f"{n:02x}").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder}: cannot keep answers there ({error.strerror})") from None

    def get(self, digest: str) -> dict[str, Any] | None:
        """The answer of a request; None if there is none."""
        try:
            return load_checked(self._path(digest).read_bytes(), _FORMAT)
        except (OSError, ValueError):
            return None

    def put(self, digest: str, answer: Mapping[str, Any]) -> None:
        """Keeps an answer. A full disk is a warning: the answer itself is not lost."""
        try:
            with atomic_open(self._path(digest), durable=False) as file:
                file.write(dump_checked({"format": _FORMAT, **answer}).encode("utf-8", "replace"))
        except OSError as error:
            if not self._warned:
                log.warning("%s: answers are not kept (%s)", self._folder, error.strerror)
            self._warned = True

    def _path(self, digest: str) -> Path:
        return self._folder / digest[:2] / f"{digest}.json"
