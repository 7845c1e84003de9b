"""Small JSON files with a checksum of their own content, so that a damaged one is never taken at its word."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_CHECKSUM = "checksum"


def digest_json(body: Mapping[str, Any]) -> str:
    """The sha256 of a JSON object, whatever its white space and the order of its keys."""
    return hashlib.sha256(json.dumps(body, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def dump_checked(body: Mapping[str, Any], indent: int | None = None) -> str:
    """A JSON object as text, with its checksum as the last key."""
    return json.dumps({**body, _CHECKSUM: digest_json(body)}, indent=indent, ensure_ascii=False) + "\n"


class OtherFormat(ValueError):
    """A file in the form of another version."""


def load_checked(data: bytes, format: str | None = None) -> dict[str, Any]:
    """The object that `dump_checked` made a text of; one without a checksum, from an older version, is taken as it is.

    Args:
        data: The bytes of the file.
        format: What its key "format" must say; that key is left out.

    Raises:
        OtherFormat: It says something else.
        ValueError: It is no JSON object, or not the one that was written.
    """
    try:
        body = json.loads(data.decode())
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(body, dict):
        raise ValueError("not a JSON object")
    if format is not None and body.get("format") != format:
        raise OtherFormat(f"not in the form {format}; made by another version of lavic")
    checksum = body.pop(_CHECKSUM, None)
    if checksum is not None and checksum != digest_json(body):
        raise ValueError("its checksum is another: the file is damaged, or was changed by hand")
    if format is not None:
        del body["format"]
    return body
