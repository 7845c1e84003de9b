"""What items look like in a few words: a file of them, for lists that words answer instead of photos."""

from __future__ import annotations

from pathlib import Path

from lavic.errors import DataError
from lavic.storage.json_text import parse_json
from lavic.storage.text_files import read_lines


def read_looks(path: Path) -> dict[str, str]:
    """Item id -> its look in words, from lines of `{"id": ..., "look": ...}`.

    Raises:
        DataError: The file cannot be read, or a line is something else; names it.
    """
    looks = {}
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            if not (isinstance(row["id"], str) and isinstance(row["look"], str)):
                raise TypeError("both are text")
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f'{path}:{number}: expected a JSON object with "id" and "look" ({error})') from None
        looks[row["id"]] = row["look"]
    return looks
