"""Lenient JSON: what cannot be parsed is a `ValueError` with a short reason.

`NaN`, which Python and pandas write for a missing value and which is not JSON, is read as null. Numbers that no float
or int can hold and values nested deeper than `MAX_DEPTH` are refused, so that what was read can be written again.
"""

from __future__ import annotations

import json
import re
from math import isinf
from typing import Any

MAX_DEPTH = 200
"""Levels of nested objects and lists; Python's own limit depends on its version and on the caller."""

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
"""A string, a bracket, or the quote of an unterminated string."""

_STEP = {"[": 1, "{": 1, "]": -1, "}": -1}
_SCALAR_END = re.compile(r"[\s,\]}]")
_PYTHON = re.compile(r"\s*[{\[]\s*[{\[]?\s*[ub]?'")
"""The start of a Python dict or list with single quotes, which is not JSON."""


class BadJson(ValueError):
    """A text that is not JSON, or has a value that cannot be represented; the message does not say where."""


def _number(text: str) -> float:
    value = float(text)
    if isinf(value):
        raise BadJson(f"the number {text[:20]} is too large")
    return value


def _constant(name: str) -> None:
    if name != "NaN":
        raise BadJson(f"{name}, which is not a JSON number")


_DECODER = json.JSONDecoder(parse_float=_number, parse_constant=_constant)


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises BadJson where it is not JSON, or cannot be represented."""
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise BadJson(json_error(error, text)) from None
    check_depth(text)
    return value


def parse_first(text: str, start: int) -> tuple[Any, int]:
    """The value that starts at `start`, and where it ends.

    Raises:
        json.JSONDecodeError: It does not end, or is not JSON.
        BadJson: It cannot be represented; `value_end` finds its end.
    """
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (BadJson, json.JSONDecodeError):
        raise
    except (ValueError, RecursionError) as error:
        raise BadJson(json_error(error, text)) from None
    check_depth(text, start, end)
    return value, end


def check_depth(text: str, start: int = 0, end: int | None = None) -> None:
    """Raises BadJson for a text that is nested too deep."""
    end = len(text) if end is None else end
    if text.count("[", start, end) + text.count("{", start, end) <= MAX_DEPTH:
        return
    depth = 0
    for token in _TOKEN.finditer(text, start, end):
        depth += _STEP.get(token[0], 0)
        if depth > MAX_DEPTH:
            raise BadJson(f"nested more than {MAX_DEPTH} levels deep")


def value_end(text: str, start: int) -> int | None:
    """Where the value at `start` ends, by its brackets alone; None where it does not end."""
    depth = 0
    if text[start] in '[{"':
        for token in _TOKEN.finditer(text, start):
            depth += _STEP.get(token[0], 0)
            if token[0] == '"':
                return None
            if depth <= 0:
                return token.end()
        return None
    match = _SCALAR_END.search(text, start)
    return match.start() if match else None


def json_error(error: Exception, text: str) -> str:
    """Why a text could not be parsed."""
    if isinstance(error, RecursionError):
        return f"nested more than {MAX_DEPTH} levels deep"
    if isinstance(error, BadJson):
        return str(error)
    if _PYTHON.match(text):
        return "a Python dict or list, as in older Amazon data; convert it with ast.literal_eval and json.dumps"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    # int() refuses numbers of thousands of digits, which would take quadratic time.
    return "a number has too many digits" if "integer string conversion" in str(error) else str(error)


def json_type(value: Any) -> str:
    """The JSON type of a value, for messages; a number is shown itself."""
    return _TYPES.get(type(value).__name__, f"the number {value!r:.20}")
