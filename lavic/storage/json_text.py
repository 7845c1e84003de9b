"""JSON as it is found in the wild: whatever cannot be read is a `ValueError` that says why in a few words.

`NaN`, which Python and pandas write for a missing value and JSON does not know, is read as null. Numbers that no float
or int can hold and values nested deeper than `DEEPEST` are refused, so that what was read can be written again.
"""

from __future__ import annotations

import json
import re
from math import isinf
from typing import Any

DEEPEST = 200
"""Objects and lists inside each other; Python's own limit depends on its version and on who asks."""

_TYPES = {
    "NoneType": "null",
    "bool": "a boolean",
    "dict": "an object",
    "list": "a list",
    "tuple": "a list",
    "str": "a text",
    "bytes": "bytes",
}
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{}]', re.DOTALL)
"""A string, a bracket, or the quote of a string that does not end."""

_STEP = {"[": 1, "{": 1, "]": -1, "}": -1}
_SCALAR_END = re.compile(r"[\s,\]}]")
_PYTHON = re.compile(r"\s*[{\[]\s*[{\[]?\s*[ub]?'")


class BadJson(ValueError):
    """A text that is not JSON, or holds what cannot be read; the message has no place."""


def _number(text: str) -> float:
    value = float(text)
    if isinf(value):
        raise BadJson(f"the number {text[:20]} is too large")
    return value


def _constant(name: str) -> None:
    if name != "NaN":
        raise BadJson(f"{name}, which is no number of JSON")


_DECODER = json.JSONDecoder(parse_float=_number, parse_constant=_constant)


def parse_json(text: str) -> Any:
    """The value of a text that holds one.

    Raises:
        BadJson: It does not, or the value cannot be read.
    """
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise BadJson(why(error, text)) from None
    check_depth(text)
    return value


def parse_first(text: str, start: int) -> tuple[Any, int]:
    """The value that begins at `start`, and where it ends.

    Raises:
        json.JSONDecodeError: It does not end, or is not JSON.
        BadJson: It ends and cannot be read; `end_of` finds its end.
    """
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (BadJson, json.JSONDecodeError):
        raise
    except (ValueError, RecursionError) as error:
        raise BadJson(why(error, text)) from None
    check_depth(text, start, end)
    return value, end


def check_depth(text: str, start: int = 0, end: int | None = None) -> None:
    """Refuse what is nested too deep.

    Raises:
        BadJson: It is.
    """
    end = len(text) if end is None else end
    if text.count("[", start, end) + text.count("{", start, end) <= DEEPEST:
        return
    depth = 0
    for token in _TOKEN.finditer(text, start, end):
        depth += _STEP.get(token[0], 0)
        if depth > DEEPEST:
            raise BadJson(f"nested more than {DEEPEST} levels deep")


def end_of(text: str, start: int) -> int | None:
    """Where the value at `start` ends, by its brackets alone; None where it does not."""
    depth = 0
    if text[start] in '[{"':
        for token in _TOKEN.finditer(text, start):
            depth += _STEP.get(token[0], 0)
            if token[0] == '"':
                return None
            if depth <= 0:
                return token.end()
        return None
    found = _SCALAR_END.search(text, start)
    return found.start() if found else None


def why(error: Exception, text: str) -> str:
    """What is wrong with a text that could not be read."""
    if isinstance(error, RecursionError):
        return f"nested more than {DEEPEST} levels deep"
    if isinstance(error, BadJson):
        return str(error)
    if is_python(text):
        return "a Python dict or list, as in older Amazon data; convert it with ast.literal_eval and json.dumps"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    # int() refuses numbers of thousands of digits, since reading them takes quadratic time.
    return "a number has too many digits" if "integer string conversion" in str(error) else str(error)


def is_python(text: str) -> bool:
    """Whether a text begins as Python writes a dict: with quotes that JSON does not have."""
    return bool(_PYTHON.match(text))


def json_type(value: Any) -> str:
    """What JSON calls a value, for messages; a number is named itself."""
    return _TYPES.get(type(value).__name__, f"the number {value!r:.20}")
