"""What items look like in a few words: a file of them, for lists that words answer instead of photos."""

from __future__ import annotations

import json
from pathlib import Path

from lavic.errors import DataError


def read_looks(path: Path) -> dict[str, str]:
    """Item id -> its look in words, from lines of `{"id": ..., "look": ...}`.

    Raises:
        DataError: The file cannot be read, or a line is something else; names it.
    """
    looks = {}
    number = 0
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:
            for line in lines:
                number += 1
                row = json.loads(line)
                if not (isinstance(row["id"], str) and isinstance(row["look"], str)):
                    raise TypeError("both are text")
                looks[row["id"]] = row["look"]
    except OSError as error:
        raise DataError(f"{path}: looks in words cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f'{path}:{number}: expected a JSON object with "id" and "look" ({error})') from None
    return looks
