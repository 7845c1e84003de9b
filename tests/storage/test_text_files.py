"""Text files in every encoding and packing, and what is no text at all."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import logging
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavic.storage.compression import zstd_module
from lavic.storage.text_files import TextFileError, decode_text, open_text_file, read_lines, read_text

TEXT = "B000000001 caf\u00e9\nB000000002 \u4e00\u4e8c\u4e09\n\nB000000003\n"


def zstd(data: bytes) -> bytes:
    return zstd_module().compress(data)


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstd,
}
ENCODED = {
    "utf-8": TEXT.encode(),
    "utf-8 with a mark": codecs.BOM_UTF8 + TEXT.encode(),
    "utf-16-le with a mark": codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
    "utf-16-be with a mark": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "utf-16-le": TEXT.encode("utf-16-le"),
    "utf-16-be": TEXT.encode("utf-16-be"),
    "utf-32": codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"),
    "windows": TEXT.replace("\n", "\r\n").encode(),
    "old macintosh": TEXT.replace("\n", "\r").encode(),
    "windows, exported": codecs.BOM_UTF16_LE + TEXT.replace("\n", "\r\n").encode("utf-16-le"),
}


@pytest.mark.parametrize("kind", ["plain", *PACKED])
@pytest.mark.parametrize("encoding", ENCODED)
def test_every_encoding_and_packing_gives_the_same_text(tmp_path: Path, encoding: str, kind: str) -> None:
    data = ENCODED[encoding]
    for name in ("ids.txt", "ids.txt.gz", "ids.zst"):
        path = tmp_path / name
        path.write_bytes(data if kind == "plain" else PACKED[kind](data))
        assert read_text(path) == TEXT
        assert list(read_lines(str(path))) == list(enumerate(TEXT.removesuffix("\n").split("\n"), 1))
    assert decode_text(data, "standard input") == TEXT


def test_addresses_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(gzip.compress(TEXT.encode("utf-16")))
    assert read_text(f"file://{tmp_path}/a.txt") == TEXT
    with pytest.raises(TextFileError, match="nosuch://a: cannot be opened"):
        read_text("nosuch://a")


@pytest.mark.parametrize("kind", PACKED)
def test_members_that_follow_each_other_are_one_text(tmp_path: Path, kind: str) -> None:
    pack, path = PACKED[kind], tmp_path / "a"
    path.write_bytes(b"".join(pack(line.encode()) for line in ("a\n", "", "b" * 3_000_000 + "\n", "c")))
    assert [len(line) for _, line in read_lines(path)] == [1, 3_000_000, 1]


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize(
    ("tail", "counted"), [(b"", 0), (b"\0" * 40_000, 0), (b"<html>", 6), (b"\0" * 600 + b"x" * 70_000, 70_000)]
)
def test_what_follows_the_packed_data_is_counted(
    tmp_path: Path, kind: str, tail: bytes, counted: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(PACKED[kind](TEXT.encode()) + tail)
    with caplog.at_level(logging.WARNING):
        assert read_text(path) == TEXT
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: ignored {counted} bytes after the end of the compressed data"
    ] * bool(counted)


@pytest.mark.parametrize("kind", PACKED)
def test_packed_data_that_breaks_off_or_is_damaged_is_refused(tmp_path: Path, kind: str) -> None:
    data = PACKED[kind](TEXT.encode() * 50)
    (tmp_path / "short").write_bytes(data[:-5])
    with pytest.raises(TextFileError, match="short: the compressed data is corrupt"):
        read_text(tmp_path / "short")
    if kind != "zstd":  # whose frames have no checksum unless they are asked for
        (tmp_path / "flipped").write_bytes(data[:-6] + bytes([data[-6] ^ 1]) + data[-5:])
        with pytest.raises(TextFileError, match="flipped: the compressed data is corrupt"):
            read_text(tmp_path / "flipped")


def test_a_zstd_file_with_a_large_window_and_frames_to_skip(tmp_path: Path) -> None:
    packed = zstd_module().ZstdCompressor(options={zstd_module().CompressionParameter.window_log: 28})
    # In pieces, so that the frame does not say how long it is and the window is as large as it may be.
    data = packed.compress(TEXT.encode()) + packed.flush()
    (tmp_path / "a.zst").write_bytes(b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + data)
    assert read_text(tmp_path / "a.zst") == TEXT


def test_text_that_begins_like_something_packed_is_text(tmp_path: Path) -> None:
    for text in ("BZh9 is an id\n", "PK\n", "a", "", "ab", "P*M"):
        (tmp_path / "a").write_text(text)
        assert read_text(tmp_path / "a") == text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\nb\ncaf\xe9\n", "a:3: not UTF-8 (byte 0xe9); save the file as UTF-8"),
        (b"a\nb\0c\n", "a:2: a NUL byte, so this is not a text file"),
        (codecs.BOM_UTF16_LE + "a\nb\n".encode("utf-16-le") + b"x", "a:3: not UTF-8 (byte 0xff)"),
        (codecs.BOM_UTF16_LE + "a\n".encode("utf-16-le") + b"\0\xd8x\0", "a:2: not UTF-8"),
        (b"PK\x03\x04rest", "a: a zip archive; unpack it first"),
    ],
)
def test_what_is_no_text_is_named_with_its_line(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(data)
    for read in (read_text, lambda path: list(read_lines(path))):
        with pytest.raises(TextFileError) as caught:
            read(path)
        assert message in str(caught.value)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(TextFileError, match="none: no such file"):
        read_text(tmp_path / "none")
    with pytest.raises(TextFileError, match="cannot be read"):
        read_text(tmp_path)


@pytest.mark.slow
def test_a_small_file_that_unpacks_without_end_is_not_held(tmp_path: Path) -> None:
    (tmp_path / "a.bz2").write_bytes(bz2.compress(b"\0" * 200_000_000))
    with open_text_file(tmp_path / "a.bz2") as file:
        assert len(file.read(1000)) == 1000
        assert isinstance(file, io.BufferedReader)
    with pytest.raises(TextFileError, match=r"a\.bz2:1: a line of more than 64 MiB"):
        list(read_lines(tmp_path / "a.bz2"))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=80))
def test_any_text_comes_back(tmp_path: Path, text: str) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / "a").write_bytes(text.encode(encoding))
        assert read_text(tmp_path / "a") == text.removeprefix("\ufeff" if encoding == "utf-8" else "")
