"""A file with a short description of each item's look, for controls that rank by text instead of photos."""

from __future__ import annotations

from pathlib import Path

from lavic.errors import DataError
from lavic.storage.json_text import parse_json
from lavic.storage.text_files import read_lines


def read_looks(path: Path) -> dict[str, str]:
    """Item id -> the text of its look, from lines of `{"id": ..., "look": ...}`.

    Raises:
        DataError: The file cannot be read, or a line has another form; names the line.
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
