"""JSON that is read, and what is refused with a reason."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavic.storage.json_text import MAX_DEPTH, BadJson, parse_first, parse_json, value_end


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested more than 200 levels deep"),
        ('{"a":' * 201 + "1" + "}" * 201, "nested more than 200 levels deep"),
        ("9" * 5000, "a number has too many digits"),
        ('{"a": 1e999}', "the number 1e999 is too large"),
        ("[-Infinity]", "-Infinity, which is not a JSON number"),
        ("{'asin': 'B1', 'price': 3.5}", "a Python dict or list, as in older Amazon data"),
        ("[{u'asin': None}]", "a Python dict or list"),
        ('{"a": 1', "Expecting ',' delimiter at column 8"),
        ("", "Expecting value at column 1"),
    ],
)
def test_what_cannot_be_read_says_why(text: str, message: str) -> None:
    with pytest.raises(BadJson) as caught:
        parse_json(text)
    assert message in str(caught.value)


def test_what_python_and_pandas_write_for_a_missing_value_is_null() -> None:
    assert parse_json('{"a": NaN, "b": [1.5, -0.0, 12]}') == {"a": None, "b": [1.5, 0.0, 12]}


def test_the_deepest_value_that_is_read_can_be_written() -> None:
    text = "[" * MAX_DEPTH + '"]}[{"' + "]" * MAX_DEPTH
    assert json.dumps(parse_json(text)) == text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(VALUES, st.sampled_from([" ", ",", "]", "}", "\n"]), st.booleans())
def test_the_end_of_a_value_is_found_without_reading_it(value: object, after: str, ascii: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii)
    assert parse_first(f"xx{text}{after}", 2) == (value, 2 + len(text))
    assert value_end(f"xx{text}{after}{{", 2) == 2 + len(text)
    if text[0] in '[{"':
        for end in range(1, len(text)):
            assert value_end(text[:end], 0) is None
