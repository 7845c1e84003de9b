"""Reading dumps: what today's files hold, and what has broken other readers."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavic.data.reddit.dumps import scan
from lavic.data.reddit.dumps.dump_file import check_dump, read_pieces
from lavic.data.reddit.dumps.gather import gather_dump, read_buckets
from lavic.data.reddit.dumps.id_table import BUCKETS, Table, bucket_of, merge_tables, write_table
from lavic.data.reddit.dumps.post import BadPost, id_of, number_of, pack_post, post_from_row, read_object, unpack_post
from lavic.data.reddit.dumps.scan import lines_that_may_link, scan_dump
from lavic.data.reddit.item_table import ItemTable, merge_catalogue, read_catalogue, read_reviews
from lavic.errors import DataError
from lavic.storage import compression
from tests.data.reddit.reddit_dumps import ITEMS, comment, dp, submission, write_dump, write_items, write_reviews


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> ItemTable:
    folder = tmp_path_factory.mktemp("table")
    read_catalogue(str(write_items(folder / "meta.jsonl")), folder / "a")
    read_reviews(
        str(write_reviews(folder / "r.jsonl.gz", {"B1AAAAAAA1": ITEMS[0], "B1AAAAAAA2": "B9AAAAAAA9"})), folder / "b"
    )
    merge_catalogue(folder, [folder / "a"], [folder / "b"])
    return ItemTable(folder)


def text_of(path: Path) -> bytes:
    return b"".join(read_pieces(path))


def test_windows_of_256_mib_and_several_frames_are_read(tmp_path: Path) -> None:
    rows = [comment(id_of(n), "s1", "t3_s1", "x" * 50) for n in range(1, 50)]
    path = write_dump(tmp_path / "RC_2023-01.zst", rows, frames=3, window_log=28)
    lines = text_of(path).splitlines()
    assert [json.loads(line)["id"] for line in lines] == [row["id"] for row in rows]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path, share: float) -> None:
    draw = random.Random(1)
    rows = [comment(id_of(n), "s1", "t3_s1", str(draw.random())) for n in range(1, 2000)]
    path = write_dump(tmp_path / "RC.zst", rows, frames=2)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match=r"RC\.zst.*truncated"):
        text_of(path)


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_file_cut_within_the_head_of_a_frame_is_an_error(tmp_path: Path, cut: int) -> None:
    first = write_dump(tmp_path / "one.zst", [comment("a1", "s1", "t3_s1", "x")]).read_bytes()
    path = tmp_path / "two.zst"
    path.write_bytes(first + first[:cut])
    with pytest.raises(DataError, match=r"two\.zst"):
        text_of(path)


def test_pieces_end_with_lines_wherever_characters_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "_OUTPUT", 64)
    rows = [comment(id_of(n), "s1", "t3_s1", "é\u2028" * n) for n in range(1, 60)]
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
    path = write_dump(tmp_path / "a.zst", [*lines[:-1], lines[-1].rstrip(b"\n")])
    pieces = list(read_pieces(path))
    assert len(pieces) > 10 and all(piece.endswith(b"\n") for piece in pieces[:-1])
    objects = [read_object(line) for piece in pieces for line in piece.split(b"\n") if line]
    assert [row["body"] for row in objects] == [row["body"] for row in rows]


def test_other_forms_of_compression_and_none_are_read(tmp_path: Path) -> None:
    line = json.dumps(comment("a1", "s1", "t3_s1", "x")).encode()
    (tmp_path / "plain").write_bytes(line)
    (tmp_path / "packed").write_bytes(gzip.compress(line))
    assert text_of(tmp_path / "plain") == text_of(tmp_path / "packed") == line


def test_odd_fields() -> None:
    row = comment("a1", "s1", "t1_b2", "x", created_utc="1338508800", score=None)
    post = post_from_row(row)
    assert (post.created, post.score, post.parent) == (1338508800, None, number_of("b2"))
    for value in (None, "", 17, "t1_"):
        assert post_from_row({**row, "parent_id": value}).parent == -1
    assert post_from_row({**row, "author": None}).author == ""
    assert post_from_row({**row, "score": "12"}).score == 12


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"id": None}, "no_id"),
        ({"link_id": ""}, "no_submission_id"),
        ({"created_utc": None}, "no_time"),
        ({"created_utc": "soon"}, "no_time"),
        ({"created_utc": 1_700_000_000_000}, "no_time"),
        ({"created_utc": -1}, "no_time"),
        ({"created_utc": 10**30}, "no_time"),
    ],
)
def test_a_row_that_is_no_post_says_why(change: dict, reason: str) -> None:
    with pytest.raises(BadPost, match=reason):
        post_from_row({**comment("a1", "s1", "t3_s1", "x"), **change})


@pytest.mark.parametrize(
    ("change", "deletion"),
    [
        ({}, ""),
        ({"body": "[deleted]"}, "deleted"),
        ({"body": "[removed]"}, "removed"),
        ({"body": "[ Removed by Reddit in response to a copyright notice. ]"}, "removed"),
        ({"body": "[ Removed by moderator ]"}, "removed"),
        ({"body": " [deleted by user] "}, "deleted"),
        ({"body": "[removed the cap](https://x.y) first"}, ""),
        ({"_meta": {"was_deleted_later": True}}, "deleted_later"),
        ({"_meta": {"was_initially_deleted": True}}, "restored"),
        ({"_meta": {"removal_type": "deleted"}}, "deleted"),
        ({"_meta": {"is_edited": True, "retrieved_2nd_on": 5}}, ""),
        ({"removed_by_category": "moderator"}, "removed"),
    ],
)
def test_marks_of_deletion(change: dict, deletion: str) -> None:
    assert post_from_row({**comment("a1", "s1", "t3_s1", "x"), **change}).gone == deletion


def test_half_a_surrogate_pair_is_read_and_kept() -> None:
    line = b'{"id":"a1","link_id":"t3_s1","parent_id":"t3_s1","created_utc":1,"body":"x \\ud83d"}'
    row = read_object(line)
    assert row["body"] == "x \ud83d"
    post = post_from_row(row)
    assert unpack_post(pack_post(post)) == post


@given(st.integers(0, (1 << 63) - 1))
def test_ids_are_base_36(number: int) -> None:
    assert number_of(id_of(number)) == number == number_of(f"t3_{id_of(number)}")


LINKING = [
    b'{"body":"https://www.amazon.com/dp/B097CMQVF4"}',
    b'{"body":"https:\\/\\/www.amazon.com\\/dp\\/\\u200eB097CMQVF4"}',
    b'{"body":"Amazon.com/dp/B097CMQVF4"}',
    b'{"body":"HTTPS://WWW.AMAZON.COM/DP/B097CMQVF4"}',
    b'{"body":"https://AMZN.to/3HR4q7E"}',
    b'{"body":"https://a.co/d/2OIA6CY"}',
    b'{"body":"https:\\/\\/a.co\\/d\\/2OIA6CY"}',
    b'{"body":"https://x.y/?u=https%3A%2F%2Fa.co%2Fd%2F2OIA6CY"}',
    b'{"body":"https://geni.us/a?GR_URL=https%3A%2F%2Fwww.amazon.com%2Fdp%2FB09YYVHWSL"}',
    b'{"body":"amzn.asia/d/0aBcDe1"}',
]
OTHERS = [b'{"body":"the horizon, arizona and data.com/x"}', b'{"body":"nothing"}', b'{"body":"a.company"}', b""]


@given(st.lists(st.sampled_from(LINKING + OTHERS), max_size=30), st.booleans())
def test_the_search_in_bytes_finds_every_line_that_links(lines: list[bytes], ended: bool) -> None:
    piece = b"\n".join(lines) + (b"\n" if ended else b"")
    linking = [line.rstrip(b"\n") for line in lines_that_may_link(piece)]
    assert linking == [line for line in lines if line in LINKING]


NAMES = [
    b"amazon",
    b"AmaZON",
    b"amzn",
    b"AMZn",
    b"a.co",
    b"A.Co/",
    b"a.CO\\/",
    b"a.co%2F",
    b"maz",
    b"\n",
    b"\r\n",
    b"\xe2\x80\xa8",
]


@given(st.lists(st.sampled_from(NAMES) | st.sampled_from([bytes([n]) for n in b"amznoAMZNOc./\\% \n"])).map(b"".join))
def test_the_search_of_a_piece_is_the_search_of_its_lines(piece: bytes) -> None:
    name = re.compile(rb"amazon|amzn|a\.co[/\\%]", re.IGNORECASE)
    assert list(lines_that_may_link(piece)) == [line for line in io.BytesIO(piece) if name.search(line)]


@pytest.mark.parametrize("pending_bytes", [0, scan._PENDING_BYTES])
def test_every_line_of_a_scan_is_counted_once(
    tmp_path: Path, items: ItemTable, monkeypatch: pytest.MonkeyPatch, pending_bytes: int
) -> None:
    monkeypatch.setattr(scan, "_PENDING_BYTES", pending_bytes)
    monkeypatch.setattr(compression, "_OUTPUT", 300)
    rows = [
        comment("a1", "s1", "t3_s1", "nothing"),
        comment("a2", "s2", "t3_s2", dp(ITEMS[3])),
        comment("a3", "s3", "t3_s3", dp("B9AAAAAAA9")),
        comment("a4", "s4", "t3_s4", "https://amzn.to/3HR4q7E"),
        comment("a5", "s5", "t3_s5", "bought on Amazon"),
        comment("a6", "s6", "t3_s6", dp("B1AAAAAAA1")),
        {**comment("a7", "s7", "t3_s7", dp(ITEMS[3])), "link_id": None},
        b"amazon {\n",
        b"\n",
        submission("s8", "t", dp(ITEMS[0])),
    ]
    counts, short = scan_dump(str(write_dump(tmp_path / "a.zst", rows)), tmp_path / "hits", items, short=True)
    assert counts == {
        "lines": 10,
        "without_a_link": 2,
        "comment_with_an_item": 2,
        "item_not_in_catalogue": 1,
        "short_link_only": 1,
        "name_without_a_link": 1,
        "no_submission_id": 1,
        "not_json": 1,
        "submission": 1,
    }
    wanted = Table(tmp_path / "hits")
    ids = np.array([number_of(id) for id in ("s2", "s6", "s3", "s8")], np.uint64)
    assert wanted.contains(ids).tolist() == [True, True, False, False]
    assert short == {"https://amzn.to/3HR4q7E": [number_of("s4")]}


def test_lines_without_a_link_are_not_parsed(tmp_path: Path, items: ItemTable) -> None:
    path = write_dump(tmp_path / "a.zst", [b"this is no JSON\n" * 3, comment("a2", "s2", "t3_s2", dp(ITEMS[3]))])
    counts, _ = scan_dump(str(path), tmp_path / "hits", items)
    assert counts == {"lines": 4, "without_a_link": 3, "comment_with_an_item": 1}


def test_variants_become_their_parent_and_other_ids_nothing(items: ItemTable) -> None:
    assert items.parents([ITEMS[5], "B1AAAAAAA1", "B1AAAAAAA2", "000255478X"]) == [ITEMS[5], ITEMS[0], "", ""]
    assert items.parents([]) == []
    assert items.category(ITEMS[5]) == "Beauty"


def test_the_posts_of_wanted_submissions_are_gathered_by_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lavic.data.reddit.dumps.gather.RUN_BYTES", 500)
    links = [id_of(1000 + n) for n in range(20)]
    rows = [comment(id_of(5000 + n), links[n % 20], "t1_x", f'about "link_id":"t3_{links[0]}" {n}') for n in range(100)]
    write_table(tmp_path / "wanted", np.array([number_of(link) for link in links[:10]], np.uint64))
    wanted = Table(tmp_path / "wanted")
    spools = []
    for part in range(2):
        spools.append(tmp_path / f"spool{part}")
        path = write_dump(tmp_path / f"{part}.zst", rows[part::2])
        assert gather_dump(str(path), wanted, spools[-1]) == {"comments": 25}
    posts = list(read_buckets(spools, 0, BUCKETS))
    assert sorted(post.id for post in posts) == sorted(
        number_of(row["id"]) for row in rows if row["link_id"][3:] in links[:10]
    )
    bucket = bucket_of(number_of(links[3]))
    assert {id_of(post.submission) for post in read_buckets(spools, bucket, bucket + 1)} >= {links[3]}


def test_a_submission_is_gathered_by_its_own_id(tmp_path: Path) -> None:
    write_table(tmp_path / "wanted", np.array([number_of("s1")], np.uint64))
    other = submission("s2", "t", crosspost_parent_list=[{"id": "s1", "title": "t"}], crosspost_parent="t3_s1")
    path = write_dump(tmp_path / "a.zst", [submission("s1", "first"), other])
    assert gather_dump(str(path), Table(tmp_path / "wanted"), tmp_path / "spool") == {"submissions": 1}
    [post] = read_buckets([tmp_path / "spool"], 0, BUCKETS)
    assert post.title == "first" and post_from_row(other).crosspost == number_of("s1")


def test_a_link_id_may_lack_its_prefix(tmp_path: Path) -> None:
    write_table(tmp_path / "wanted", np.array([number_of("s1")], np.uint64))
    path = write_dump(tmp_path / "a.zst", [{**comment("c1", "s1", "t3_s1", "a"), "link_id": "s1"}])
    assert gather_dump(str(path), Table(tmp_path / "wanted"), tmp_path / "spool") == {"comments": 1}


def test_a_dump_may_hold_comments_and_submissions(tmp_path: Path) -> None:
    """Also a comment whose id is that of a wanted submission, which is another post."""
    write_table(tmp_path / "wanted", np.array([number_of("s1"), number_of("s2")], np.uint64))
    rows = [comment("c1", "s1", "t3_s1", "a"), submission("s1", "t"), comment("s2", "s9", "t3_s9", "b")]
    rows += [submission("s3", "t"), submission("s2", "t"), comment("c2", "s2", "t3_s2", "c")]
    path = write_dump(tmp_path / "a.zst", rows)
    counts = gather_dump(str(path), Table(tmp_path / "wanted"), tmp_path / "spool")
    assert counts == {"comments": 2, "submissions": 2}
    posts = {(post.is_comment, id_of(post.id)) for post in read_buckets([tmp_path / "spool"], 0, BUCKETS)}
    assert posts == {(True, "c1"), (True, "c2"), (False, "s1"), (False, "s2")}


def test_what_is_no_dump_is_refused(tmp_path: Path) -> None:
    check_dump(write_dump(tmp_path / "odd_name", [b"broken\n", submission("s1", "t")]))
    check_dump(write_dump(tmp_path / "RS.zst", [comment("a1", "s1", "t3_s1", "x")]))
    with pytest.raises(DataError, match=r"meta\.jsonl: neither comments nor submissions"):
        check_dump(write_items(tmp_path / "meta.jsonl"))
    for path in (tmp_path / "nothing", write_dump(tmp_path / "a.zst", [])):
        path.touch()
        with pytest.raises(DataError, match="is empty"):
            check_dump(path)


@settings(max_examples=10)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, (1 << 64) - 1), st.integers(0, 3)), max_size=8), min_size=1, max_size=4)
)
def test_merged_tables_hold_what_the_tables_held(tmp_path_factory: pytest.TempPathFactory, lists: list) -> None:
    folder = tmp_path_factory.mktemp("tables")
    for n, pairs in enumerate(lists):
        columns = np.array(pairs, np.uint64).reshape(-1, 2)
        write_table(folder / str(n), columns[:, 0], columns[:, 1])
    merge_tables(folder / "all", [folder / str(n) for n in range(len(lists))], with_values=True)
    table, pairs = Table(folder / "all"), {pair for part in lists for pair in part}
    assert len(table) == len(pairs)
    for number in {number for number, _ in pairs}:
        assert table.values(number) == sorted(value for other, value in pairs if other == number)
        assert table.contains(np.array([number], np.uint64))[0]
