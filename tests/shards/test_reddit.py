"""`lavic reddit` from files to files: the same set for every layout of the rows, after a kill, and from its ids."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lavic.cli import main
from lavic.data.conversations import read_conversations
from lavic.data.reddit.splits import NAMES
from tests.data.reddit.reddit_dumps import (
    ITEMS,
    comment,
    dp,
    drawn_posts,
    submission,
    write_dump,
    write_items,
)
from tests.shards.reddit_command import reddit_argv, write_catalogue

pytestmark = pytest.mark.slow

SET_FILES = (
    "train.jsonl",
    "valid.jsonl",
    "test.jsonl",
    *(f"{name}.ids.jsonl" for name in NAMES),
    "funnel.json",
    "card.md",
)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (*SET_FILES, "card.html")}


@pytest.fixture(scope="module")
def built_set(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], dict[str, bytes]]:
    """A catalogue, dumps of 4,000 comments, and the set that they give."""
    folder = write_catalogue(tmp_path_factory.mktemp("small"))
    submissions, comments = drawn_posts(200, 20)
    dumps = [write_dump(folder / "RS.zst", submissions), write_dump(folder / "RC.zst", comments, frames=2)]
    assert main(reddit_argv(folder, dumps, folder / "out", "--ray.workers", "1")) == 0
    return folder, dumps, bytes_of(folder / "out")


def test_the_set_does_not_depend_on_files_order_buckets_or_workers(tmp_path: Path) -> None:
    """100,000 comments in one file with one worker, or shuffled in five files with two workers and other buckets."""
    folder = write_catalogue(tmp_path)
    submissions, comments = drawn_posts(5000, 20, one_in=10)
    first = [
        write_dump(folder / "RS_2020-01.zst", submissions),
        write_dump(folder / "RC_2020-01.zst", comments, frames=3),
    ]
    rng = random.Random(3)
    rng.shuffle(comments)
    rng.shuffle(submissions)
    others = [write_dump(folder / f"{n}.zst", comments[n::4]) for n in range(4)]
    others.insert(1, write_dump(folder / "4.zst", submissions, frames=2))
    assert main(reddit_argv(folder, first, tmp_path / "a", "--ray.workers", "1")) == 0
    assert main(reddit_argv(folder, others, tmp_path / "b", "--ray.workers", "2", "--bucket-bytes", "200KiB")) == 0
    expected = bytes_of(tmp_path / "a")
    assert bytes_of(tmp_path / "b") == expected
    rows = {name: read_conversations(tmp_path / "a" / f"{name}.jsonl") for name in NAMES}
    funnel = json.loads(expected["funnel.json"])
    assert {name: len(split) for name, split in rows.items()} == {n: s["rows"] for n, s in funnel["splits"].items()}
    total = sum(map(len, rows.values()))
    assert total > 1500 and 0.78 < len(rows["train"]) / total < 0.82
    lines = funnel["lines"]
    assert lines["lines"] == 105_000 == sum(count for name, count in lines.items() if name != "lines")
    linked = sum("amazon" in row["body"] for row in comments)
    assert lines["comment_with_an_item"] == funnel["comments"]["linking"] == linked
    assert not (tmp_path / "a" / "work").exists()


def test_a_wrong_catalogue_or_reviews_file_is_refused_before_the_dumps_are_read(
    built_set: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, dumps, _ = built_set
    old, other = tmp_path / "old.json", tmp_path / "other.jsonl"
    old.write_text("{'asin': 'B1AAAAAAA1'}\n")
    write_items(other, ["123", "shoe"])
    for flag, file, message in (
        (
            "--items",
            old,
            f"{old}: no item with an id of Amazon's (0 items, 1 broken records; the first: {old}:1: not JSON",
        ),
        ("--items", other, f"{other}: no item with an id of Amazon's (2 items)"),
        ("--reviews", dumps[1], f"{dumps[1]}: none of its 4,000 lines is a review with `asin` and `parent_asin`"),
    ):
        argv = reddit_argv(folder, dumps, tmp_path / "out", "--ray.workers", "1")
        argv[argv.index(flag) + 1] = str(file)
        assert main(argv) == 2
        errors = capsys.readouterr().err
        assert message in errors and "searching links" not in errors


def test_one_file_can_be_catalogue_and_reviews(built_set: tuple, tmp_path: Path) -> None:
    folder, dumps, expected = built_set
    both = tmp_path / "both.jsonl"
    rows = [json.loads(line) for line in (folder / "meta.jsonl").read_text().splitlines()]
    both.write_text("".join(json.dumps({**row, "asin": row["parent_asin"]}) + "\n" for row in rows))
    argv = reddit_argv(folder, dumps, tmp_path / "out", "--ray.workers", "1")
    argv[argv.index("--items") + 1] = argv[argv.index("--reviews") + 1] = str(both)
    assert main(argv) == 0
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == expected["train.jsonl"]


def test_the_set_is_the_same_from_one_dump_of_submissions_and_comments(built_set: tuple, tmp_path: Path) -> None:
    folder, _, expected = built_set
    submissions, comments = drawn_posts(200, 20)
    rows = [*submissions[::2], *comments[:3000], *submissions[1::2], *comments[3000:]]
    (tmp_path / "all.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(reddit_argv(folder, [tmp_path / "all.json"], tmp_path / "out", "--ray.workers", "1")) == 0
    assert bytes_of(tmp_path / "out") == expected


def test_html_and_markdown_in_names_are_escaped_in_the_card(tmp_path: Path) -> None:
    folder = write_catalogue(tmp_path)
    name = "<script>alert(1)</script>|a\n| b"
    posts = [submission("s1", "Which soap?"), comment("c1", "s1", "t3_s1", dp(ITEMS[1]))]
    dump = write_dump(tmp_path / "a.zst", [{**post, "subreddit": name} for post in posts])
    assert main(reddit_argv(folder, [dump], tmp_path / "out", "--ray.workers", "1")) == 0
    for card in ("card.md", "card.html"):
        assert "<script" not in (tmp_path / "out" / card).read_text("utf-8")
    assert "\n| &lt;script>alert(1)&lt;/script>\\|a \\| b | " in (tmp_path / "out" / "card.md").read_text("utf-8")


@pytest.mark.ray
def test_the_set_is_the_same_on_ray(built_set: tuple, tmp_path: Path) -> None:
    folder, dumps, expected = built_set
    command = reddit_argv(folder, dumps, tmp_path / "out", "--ray.cpus", "2", "--bucket-bytes", "100KiB")
    command[command.index("local")] = "ray"
    assert main(command) == 0
    assert bytes_of(tmp_path / "out") == expected


def test_small_inputs_do_not_import_ray(built_set: tuple, tmp_path: Path) -> None:
    folder, dumps, expected = built_set
    command = reddit_argv(folder, dumps, tmp_path / "out")
    command[command.index("local")] = "auto"
    code = "import sys; sys.modules['ray'] = None; from lavic.cli import main; sys.exit(main(sys.argv[1:]))"
    result = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert bytes_of(tmp_path / "out") == expected


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_set_is_the_same_after_kills(built_set: tuple, tmp_path: Path, seed: int) -> None:
    """Three SIGKILLs, each once a random number of files is in the work folder; then a complete run."""
    folder, dumps, expected = built_set
    rng = random.Random(seed)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lavic", *reddit_argv(folder, dumps, out, "--bucket-bytes", "30KiB")]
    killed = 0
    for target in sorted(rng.sample(range(1, 40), 3)):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and sum(path.is_file() for path in (out / "work").rglob("*")) < target:
            time.sleep(0.005)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 2
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert bytes_of(out) == expected


def test_a_complete_set_is_kept_and_other_settings_are_refused(built_set: tuple, capsys: pytest.CaptureFixture) -> None:
    folder, dumps, expected = built_set
    before = (folder / "out" / "funnel.json").stat().st_mtime_ns
    assert main(reddit_argv(folder, dumps, folder / "out")) == 0
    assert (folder / "out" / "funnel.json").stat().st_mtime_ns == before
    assert main(reddit_argv(folder, dumps, folder / "out", "--labels.min-score", "7")) == 2
    assert "holds a set of other files or settings" in capsys.readouterr().err
    assert bytes_of(folder / "out") == expected


def test_a_truncated_dump_is_named(built_set: tuple, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, dumps, _ = built_set
    (tmp_path / "RC_cut.zst").write_bytes(dumps[1].read_bytes()[:-2000])
    assert main(reddit_argv(folder, [dumps[0], tmp_path / "RC_cut.zst"], tmp_path / "out")) == 2
    assert "RC_cut.zst: the compressed data is corrupt (the file is truncated)" in capsys.readouterr().err


def test_a_file_that_is_no_dump_is_refused(built_set: tuple, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, dumps, _ = built_set
    manifest = str(folder / "out")
    options = [str(folder / "meta.jsonl"), "--out", str(tmp_path / "b"), "--executor", "local"]
    for command in (
        reddit_argv(folder, [*dumps, folder / "meta.jsonl"], tmp_path / "a"),
        ["reddit", "rebuild", "--manifest", manifest, "--dumps", *map(str, dumps), *options],
    ):
        assert main(command) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "meta.jsonl: neither comments nor submissions" in line


def test_an_empty_result_names_the_reasons(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_catalogue(tmp_path)
    rows = [comment("a1", "s1", "t3_s1", f"mine: {dp(ITEMS[0])}", author="asker")]
    dumps = [write_dump(tmp_path / "c.zst", rows), write_dump(tmp_path / "s.zst", [submission("s1", "t")])]
    assert main(reddit_argv(folder, dumps, tmp_path / "out")) == 2
    assert "1 by the original poster" in capsys.readouterr().err
    assert main(reddit_argv(folder, [tmp_path / "none.zst"], tmp_path / "out")) == 2
    assert "none.zst: no such dump" in capsys.readouterr().err


def test_rebuild_from_ids_counts_changed_and_missing_rows(
    built_set: tuple, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    _, dumps, original = built_set
    manifest = tmp_path / "ids"
    manifest.mkdir()
    for name in NAMES:
        (manifest / f"{name}.ids.jsonl").write_bytes(original[f"{name}.ids.jsonl"])
        assert b"shave" not in original[f"{name}.ids.jsonl"]
    rebuild = ["reddit", "rebuild", "--manifest", str(manifest), "--executor", "local", "--dumps"]
    assert main([*rebuild, *map(str, dumps), "--out", str(tmp_path / "same")]) == 0
    assert all((tmp_path / "same" / f"{name}.jsonl").read_bytes() == original[f"{name}.jsonl"] for name in NAMES)
    # A later dump, in which one comment was deleted and another one edited.
    ids = [json.loads(line) for line in original["train.ids.jsonl"].splitlines()]
    submissions, comments = drawn_posts(200, 20)
    for row in comments:
        if row["id"] == ids[0]["comment"]:
            row["_meta"] = {"was_deleted_later": True}
        if row["id"] == ids[1]["comment"]:
            row["body"] += " edited"
    later = [write_dump(tmp_path / "s.zst", submissions), write_dump(tmp_path / "c.zst", comments)]
    capsys.readouterr()
    assert main([*rebuild, *map(str, later), "--out", str(tmp_path / "later")]) == 0
    report = json.loads((tmp_path / "later" / "rebuild.json").read_text())
    assert report["changed"] >= 1 and report["missing"] >= 1
    assert sum(report[kind] for kind in ("same", "changed", "missing")) == report["rows"]
    assert f"{report['same']:,} of {report['rows']:,}" in capsys.readouterr().out
