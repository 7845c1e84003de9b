"""Broken catalogues: each unreadable record is named with its line, the others are read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavic.data.catalog import read_items
from lavic.data.sources.record import BadRecord
from lavic.errors import DataError
from lavic.storage import text_files
from tests.data.catalogue_files import METAS, ROWS, write_bytes, write_rows


@pytest.mark.parametrize("line", ['{"parent_asin": "B2"', "[1, 2]", "null", "\x00\x01", '{"title": "no id"}'])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "meta.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n" + line + "\n" + json.dumps(ROWS[1]) + "\n")
    with pytest.raises(DataError, match=r"meta\.jsonl:3: "):
        list(read_items([path]))
    errors: list[DataError] = []
    assert [item.id for item in read_items([path], errors.append)] == ["B0", "B1"]
    assert len(errors) == 1 and ":3: " in str(errors[0])


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "meta.jsonl"
    path.write_bytes(b'{"parent_asin": "B1", "title": "caf\xe9"}\n' + json.dumps(ROWS[1]).encode())
    errors: list[DataError] = []
    assert [item.id for item in read_items([path], errors.append)] == ["B1"]
    assert "meta.jsonl:1: not JSON (not UTF-8)" in str(errors[0])


def test_a_record_too_long_or_too_deep_is_rejected_without_buffering_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 4096)
    rows = [json.dumps(row) for row in ROWS[:3]]
    rows[1:1] = ['{"parent_asin": "' + "x" * 20_000 + '"}', "[" * 4000]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    errors: list[BadRecord] = []
    assert [item.id for item in read_items([tmp_path / "a.jsonl"], errors.append)] == ["B0", "B1", "B2"]
    assert [(error.line, error.reason.partition(" (")[0]) for error in errors] == [
        (2, "a line of more than 0 MiB"),
        (3, "not JSON"),
    ]
    (tmp_path / "b.json").write_text('{"B0": {"images": []},\n"B1": {"title": "open' + "x" * 3_000_000)
    with pytest.raises(DataError, match=r"b\.json:2: not JSON .* records after it cannot be found"):
        list(read_items([tmp_path / "b.json"], errors.append))


def test_a_truncated_json_object_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "item2meta.json"
    path.write_text(json.dumps(METAS, indent=1)[:-400])
    with pytest.raises(DataError, match=r"item2meta\.json:\d\d+: not JSON"):
        list(read_items([path]))


SHORT = {id: {"asin": id, "title": "a", "images": []} for id in ("B0", "B1")}


@pytest.mark.parametrize("whole", [json.dumps(SHORT), json.dumps([*SHORT.values()], indent=1), "[]\n[\n]"])
def test_a_list_or_object_that_is_truncated_anywhere_is_refused(tmp_path: Path, whole: str) -> None:
    for cut in range(1, len(whole) - 1):
        if whole[:cut].strip() in ("[]", "{}"):
            continue
        (tmp_path / "a.json").write_text(whole[:cut])
        with pytest.raises(DataError, match=r"a\.json:\d+: not JSON"):
            list(read_items([tmp_path / "a.json"]))
        if cut > len('{"B0": {'):  # before, it may be a broken line
            with pytest.raises(DataError):
                list(read_items([tmp_path / "a.json"], lambda _: None))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_what_follows_a_list_is_not_ignored(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps(ROWS[:1]) + "\n</html>\n")
    with pytest.raises(DataError, match=r"2: not JSON"):
        list(read_items([tmp_path / name]))


def test_a_truncated_gzip_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "meta.jsonl.gz", ROWS)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="the compressed data is corrupt"):
        list(read_items([path]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.binary(max_size=60), st.sampled_from([json.dumps(row).encode() for row in ROWS[:3]]))))
def test_any_bytes_are_items_or_named_errors(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "any.jsonl"
    path.write_bytes(b"\n".join(line.replace(b"\n", b" ") for line in lines))
    good = sum(line in [json.dumps(row).encode() for row in ROWS[:3]] for line in lines)
    errors: list[DataError] = []
    assert len(list(read_items([path], errors.append))) == good
    assert all("any.jsonl:" in str(error) for error in errors)


SYNTAX = [b"{", b"}", b"[", b"]", b'"', b"'", b":", b",", b"\n", b"\\", b"null", b"1e999", b"\xff", b"\0", b"url"]
SIGNATURES = [b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b\x08\0", b"BZh91AY&SY", b"(\xb5/\xfd", b"PAR1\x15"]
RECORDS = [b'"B1": {"images": []}', b'{"parent_asin": "B2"}']
FRAGMENTS = st.sampled_from([*SYNTAX, *SIGNATURES, *RECORDS]) | st.binary(max_size=3)
ENDINGS = st.sampled_from(["json", "jsonl", "csv", "txt", "parquet"])


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(FRAGMENTS, max_size=20), ENDINGS)
def test_any_bytes_under_any_name_are_items_or_named_errors(tmp_path: Path, pieces: list[bytes], ending: str) -> None:
    path = tmp_path / f"any.{ending}"
    path.write_bytes(b"".join(pieces))
    for columns in (None, {"url": "url"}):
        rejected: list[BadRecord] = []
        try:
            assert all(item.id for item in read_items([path], rejected.append, columns=columns))
        except DataError as error:
            assert str(path) in str(error)
        assert all(str(path) in str(error) for error in rejected)


@pytest.mark.parametrize("first", ["null", "3", '"text"', "[1]"])
def test_values_of_a_json_object_that_are_no_items_are_rejected(tmp_path: Path, first: str) -> None:
    path = write_bytes(tmp_path / "a.json", f'{{"A": {first},\n"B": {{"images": []}}, "C": null}}'.encode())
    errors: list[BadRecord] = []
    assert [item.id for item in read_items([path], errors.append)] == ["B"]
    assert [error.line for error in errors] == [1, 2]


DEEP = '{"images": [], "details": %s}'


REJECTED = {
    DEEP % ("[" * 3000 + "]" * 3000): "not JSON (nested more than 200 levels deep)",
    DEEP % ('{"a":' * 300 + "1" + "}" * 300): "not JSON (nested more than 200 levels deep)",
    '{"price": 1e999}': "not JSON (the number 1e999 is too large)",
    '{"price": ' + "7" * 5000 + "}": "not JSON (a number has too many digits)",
    '{"price": -Infinity, "a": "}{"}': "not JSON (-Infinity, which is not a JSON number)",
    '{"title": "caf\udce9"}': "not JSON (not UTF-8)",
}


@pytest.mark.parametrize("bad", REJECTED, ids=range(len(REJECTED)))
@pytest.mark.parametrize("layout", ["lines", "list", "keyed"])
def test_an_unrepresentable_value_rejects_one_record(tmp_path: Path, bad: str, layout: str) -> None:
    good = '{"parent_asin": "B1", "price": NaN}'
    lines = [good, bad, good]
    if layout == "list":
        lines = ["[" + good + ",", bad + ",", good + "]"]
    elif layout == "keyed":
        lines = [f'{{"B1": {good},', f'"B2": {bad},', f'"B1": {good}}}']
    path = write_bytes(tmp_path / "a.json", "\n".join(lines).encode("utf-8", "surrogateescape"))
    errors: list[BadRecord] = []
    assert [item.id for item in read_items([path], errors.append)] == ["B1", "B1"]
    assert [(error.line, error.reason) for error in errors] == [(2, REJECTED[bad])]


@pytest.mark.slow
def test_a_value_nested_too_deep_across_chunks_rejects_one_record(tmp_path: Path) -> None:
    deep = '{"details": ' + "[" * 2_000_000 + '"]' + '"' + "]" * 2_000_000 + "}"
    path = write_bytes(tmp_path / "a.json", f'{{"A": {deep}, "B": {{"images": []}}}}'.encode())
    errors: list[BadRecord] = []
    assert [item.id for item in read_items([path], errors.append)] == ["B"] and len(errors) == 1


@pytest.mark.parametrize("name", ["meta.json", "meta.json.gz", "meta.jsonl"])
def test_python_literals_are_named_in_the_reason(tmp_path: Path, name: str) -> None:
    text = "{'asin': 'B1', 'title': \"it's\"}\n" + json.dumps(ROWS[0])
    path = write_bytes(tmp_path / name, gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    errors: list[BadRecord] = []
    assert [item.id for item in read_items([path], errors.append)] == ["B0"]
    assert [error.line for error in errors] == [1] and "a Python dict or list, as in older Amazon" in errors[0].reason


def test_bytes_after_compressed_data_are_reported_and_records_kept(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "meta.jsonl.gz", ROWS)
    path.write_bytes(path.read_bytes() + b"<html>")
    errors: list[BadRecord] = []
    assert len(list(read_items([path], errors.append))) == len(list(read_items([path]))) == 50
    assert [error.reason for error in errors] == ["6 bytes after the end of the compressed data were not read"]


@pytest.mark.parametrize(
    ("value", "name"), [(None, "null"), ([], "a list"), ("x", "a text"), (7, "the number 7"), (True, "a boolean")]
)
def test_a_record_that_is_no_object_is_named_by_its_json_type(tmp_path: Path, value: object, name: str) -> None:
    errors: list[BadRecord] = []
    path = write_bytes(tmp_path / "a.jsonl", json.dumps(value).encode())
    assert not list(read_items([path], errors.append))
    assert [error.reason for error in errors] == [f"{name} where an object with one item was expected"]
