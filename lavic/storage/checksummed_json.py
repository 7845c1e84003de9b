"""Small JSON files with a checksum of their own content, so that a damaged one is detected."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_CHECKSUM = "checksum"


def digest_json(body: Mapping[str, Any]) -> str:
    """The sha256 of a JSON object, independent of white space and of the order of its keys."""
    return hashlib.sha256(json.dumps(body, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def dump_checked(body: Mapping[str, Any], indent: int | None = None) -> str:
    """A JSON object as text, with its checksum as the last key."""
    return json.dumps({**body, _CHECKSUM: digest_json(body)}, indent=indent, ensure_ascii=False) + "\n"


class UnknownFormat(ValueError):
    """A file in another version's format."""


def load_checked(data: bytes, format: str | None = None) -> dict[str, Any]:
    """The object of a text by `dump_checked`; one without a checksum, from an older version, is not checked.

    With `format`, the expected value of its key "format", that key is removed.

    Raises:
        UnknownFormat: It has another format.
        ValueError: It is not a JSON object, or its checksum does not match.
    """
    try:
        body = json.loads(data.decode())
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(body, dict):
        raise ValueError("not a JSON object")
    if format is not None and body.get("format") != format:
        raise UnknownFormat(f"not in the format {format}; made by another version of lavic")
    checksum = body.pop(_CHECKSUM, None)
    if checksum is not None and checksum != digest_json(body):
        raise ValueError("its checksum does not match: the file is damaged, or was changed by hand")
    if format is not None:
        del body["format"]
    return body
