"""Refuses files that are no dumps of Reddit before any work is done."""

from __future__ import annotations

from pathlib import Path

from lavic.data.reddit.dumps.dump_file import read_pieces
from lavic.data.reddit.dumps.post import BadPost, post_from_row, read_object
from lavic.errors import DataError

_LOOKED_AT = 100
"""Lines from the start of a file, one of which must be a post."""


def check_dump(path: str | Path) -> None:
    """Looks whether a file holds posts of Reddit, whatever its name.

    Args:
        path: A path, or a URI that fsspec knows.

    Raises:
        DataError: It cannot be read, is empty, or none of its first lines is a comment or a submission.
    """
    for piece in read_pieces(path):
        if any(_is_post(line) for line in piece.split(b"\n")[:_LOOKED_AT]):
            return
        raise DataError(
            f"{path}: neither comments nor submissions of Reddit in its first {_LOOKED_AT} lines; "
            "expected one JSON object per line"
        )
    raise DataError(f"{path}: is empty; download it again, or leave it out")


def _is_post(line: bytes) -> bool:
    row = read_object(line)
    if row is None:
        return False
    try:
        post_from_row(row)
    except BadPost:
        return False
    return True
