"""Conversations of a server and what was liked in them, kept in the LaViC format to train with.

A row is one answer or one like, and has the keys of the released files:

context            what was said, in `<submission>` and `<comment>` tags
context_items      empty: a conversation of the server names no items by id
gt                 "like", "dislike", or empty for an answer
gt_items           the item that was liked; else empty, and training leaves the row out
candidates_served  the ids that were shown, best first
disliked_items     the item that was not liked
time               when, in seconds since 1970

No address, name or token is kept; the words are kept as they were written.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from lavic.data.schema import Turn, context_of
from lavic.errors import ConfigError, LavicError
from lavic.storage.atomic import to_utf8
from lavic.storage.file_lock import FileLock

CANDIDATES = "candidates_served"
"""Key of the list of ids that were shown."""
_PATIENCE_S = 10.0
_TAIL = 1 << 21

log = logging.getLogger(__name__)


class ConversationRecord:
    """Appends rows to a file. Threads and processes may share the file: each row is one write, under a lock.

    Only the user who runs the server may read the file. It is opened for each row, so it may be moved away at any time.

    Raises:
        ConfigError: The file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(self._open())
        except OSError as error:
            raise ConfigError(f"--record {path}: cannot be written ({error.strerror}); name another file") from None

    def add_answer(self, turns: Sequence[Turn], recommended: Sequence[str]) -> None:
        """Keeps a conversation and the ids that were shown for it.

        Raises:
            LavicError: The disk is full, for example.
        """
        self._add(turns, recommended, gt="", liked=(), disliked=())

    def add_vote(self, turns: Sequence[Turn], recommended: Sequence[str], item: str, *, liked: bool) -> None:
        """Keeps what somebody thought of an item that was shown.

        Raises:
            LavicError: The disk is full, for example.
        """
        self._add(
            turns,
            recommended,
            gt="like" if liked else "dislike",
            liked=(item,) if liked else (),
            disliked=() if liked else (item,),
        )

    def _add(
        self,
        turns: Sequence[Turn],
        recommended: Sequence[str],
        *,
        gt: str,
        liked: Sequence[str],
        disliked: Sequence[str],
    ) -> None:
        row = {
            "context": context_of(turns),
            "context_items": [],
            "gt": gt,
            "gt_items": list(liked),
            CANDIDATES: list(recommended),
            "disliked_items": list(disliked),
            "time": round(time.time(), 3),
        }
        line = to_utf8(json.dumps(row, ensure_ascii=False)) + b"\n"
        try:
            file = self._open()
            try:
                with FileLock(self.path) as lock:
                    if not lock.acquire(_PATIENCE_S):
                        raise LavicError(f"{self.path}: another process holds its lock")
                    self._append(file, line)
            finally:
                os.close(file)
        except OSError as error:
            raise LavicError(f"{self.path}: cannot be written ({error.strerror})") from None

    def _open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _append(self, file: int, line: bytes) -> None:
        """Adds a whole line, or nothing."""
        size = self._end_of_lines(file)
        written = os.write(file, line)
        if written < len(line):
            os.ftruncate(file, size)
            raise LavicError(f"{self.path}: cannot be written (the disk is full)")

    def _end_of_lines(self, file: int) -> int:
        """Where the next line begins. A last line without its end is ended if it is a row, else cut off: a machine
        that lost its power leaves such a line."""
        size = os.fstat(file).st_size
        start = max(0, size - _TAIL)
        tail = os.pread(file, size - start, start)
        if not tail or tail.endswith(b"\n"):
            return size
        last_line_start = tail.rfind(b"\n") + 1
        try:
            json.loads(tail[last_line_start:])
        except ValueError:
            if not last_line_start and start:
                raise LavicError(f"{self.path}: not a file of conversations; name another one with --record") from None
            log.warning("%s: its last line was cut; it is removed", self.path)
            os.ftruncate(file, start + last_line_start)
            return start + last_line_start
        os.write(file, b"\n")
        return size + 1
