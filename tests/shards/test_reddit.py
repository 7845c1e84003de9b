"""`lavic reddit` from files to files: the same set however the rows are spread, and after every kind of end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lavic.cli import main
from lavic.data.conversations import read_conversations
from lavic.data.reddit.splits import NAMES
from lavic.distributed.ray_session import RaySettings
from lavic.errors import DataError, LavicError
from lavic.shards.cluster.tasks import run_tasks
from lavic.shards.reddit_build.short_links import Resolver
from lavic.shards.reddit_settings import ShortLinkSettings
from tests.data.reddit.reddit_dumps import (
    ITEMS,
    comment,
    dp,
    drawn_posts,
    submission,
    write_dump,
    write_items,
    write_reviews,
)

FILES = ("train.jsonl", "valid.jsonl", "test.jsonl", *(f"{name}.ids.jsonl" for name in NAMES), "funnel.json", "card.md")
Build = Callable[..., Path]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (*FILES, "card.html")}


def words(folder: Path, dumps: list[Path], out: Path, *more: str) -> list[str]:
    """The command's words for the catalogue of a folder."""
    files = [
        "--dumps",
        *map(str, dumps),
        "--items",
        str(folder / "meta.jsonl"),
        "--reviews",
        str(folder / "r.jsonl.gz"),
    ]
    return ["reddit", *files, "--out", str(out), "--executor", "local", *more]


def catalogue(folder: Path) -> Path:
    write_items(folder / "meta.jsonl")
    write_reviews(folder / "r.jsonl.gz", {"B1AAAAAAA1": ITEMS[0]})
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], dict[str, bytes]]:
    """A catalogue, dumps of 4,000 comments, and the set that they give."""
    folder = catalogue(tmp_path_factory.mktemp("small"))
    submissions, comments = drawn_posts(200, 20)
    dumps = [write_dump(folder / "RS.zst", submissions), write_dump(folder / "RC.zst", comments, frames=2)]
    assert main(words(folder, dumps, folder / "out", "--ray.workers", "1")) == 0
    return folder, dumps, bytes_of(folder / "out")


def test_the_set_is_the_same_however_the_rows_are_spread(tmp_path: Path) -> None:
    """10^5 comments: in one file with one worker; shuffled, some twice, in five files with other buckets and two."""
    folder = catalogue(tmp_path)
    submissions, comments = drawn_posts(5000, 20, one_in=10)
    first = [
        write_dump(folder / "RS_2020-01.zst", submissions),
        write_dump(folder / "RC_2020-01.zst", comments, frames=3),
    ]
    draw = random.Random(3)
    draw.shuffle(comments)
    draw.shuffle(submissions)
    others = [write_dump(folder / f"{n}.zst", comments[n::4]) for n in range(4)]
    others.insert(1, write_dump(folder / "4.zst", submissions, frames=2))
    assert main(words(folder, first, tmp_path / "a", "--ray.workers", "1")) == 0
    assert main(words(folder, others, tmp_path / "b", "--ray.workers", "2", "--bucket-bytes", "200KiB")) == 0
    made = bytes_of(tmp_path / "a")
    assert bytes_of(tmp_path / "b") == made
    rows = {name: read_conversations(tmp_path / "a" / f"{name}.jsonl") for name in NAMES}
    funnel = json.loads(made["funnel.json"])
    assert {name: len(held) for name, held in rows.items()} == {n: s["rows"] for n, s in funnel["splits"].items()}
    total = sum(map(len, rows.values()))
    assert total > 1500 and 0.78 < len(rows["train"]) / total < 0.82
    lines = funnel["lines"]
    assert lines["lines"] == 105_000 == sum(count for name, count in lines.items() if name != "lines")
    linked = sum("amazon" in row["body"] for row in comments)
    assert lines["comment_with_an_item"] == funnel["comments"]["linking"] == linked
    assert not (tmp_path / "a" / "work").exists()


def test_a_catalogue_or_reviews_of_another_kind_end_it_before_the_dumps_are_read(
    small: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, dumps, _ = small
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
        given = words(folder, dumps, tmp_path / "out", "--ray.workers", "1")
        given[given.index(flag) + 1] = str(file)
        assert main(given) == 2
        errors = capsys.readouterr().err
        assert message in errors and "searching links" not in errors


def test_one_file_may_be_catalogue_and_reviews(small: tuple, tmp_path: Path) -> None:
    folder, dumps, made = small
    both = tmp_path / "both.jsonl"
    rows = [json.loads(line) for line in (folder / "meta.jsonl").read_text().splitlines()]
    both.write_text("".join(json.dumps({**row, "asin": row["parent_asin"]}) + "\n" for row in rows))
    given = words(folder, dumps, tmp_path / "out", "--ray.workers", "1")
    given[given.index("--items") + 1] = given[given.index("--reviews") + 1] = str(both)
    assert main(given) == 0
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == made["train.jsonl"]


def test_the_set_is_the_same_from_dumps_of_both_kinds(small: tuple, tmp_path: Path) -> None:
    folder, _, made = small
    submissions, comments = drawn_posts(200, 20)
    rows = [*submissions[::2], *comments[:3000], *submissions[1::2], *comments[3000:]]
    (tmp_path / "all.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(words(folder, [tmp_path / "all.json"], tmp_path / "out", "--ray.workers", "1")) == 0
    assert bytes_of(tmp_path / "out") == made


def test_hostile_names_stay_text_in_the_card(tmp_path: Path) -> None:
    folder = catalogue(tmp_path)
    name = "<script>alert(1)</script>|a\n| b"
    posts = [submission("s1", "Which soap?"), comment("c1", "s1", "t3_s1", dp(ITEMS[1]))]
    dump = write_dump(tmp_path / "a.zst", [{**post, "subreddit": name} for post in posts])
    assert main(words(folder, [dump], tmp_path / "out", "--ray.workers", "1")) == 0
    for card in ("card.md", "card.html"):
        assert "<script" not in (tmp_path / "out" / card).read_text("utf-8")
    assert "\n| &lt;script>alert(1)&lt;/script>\\|a \\| b | " in (tmp_path / "out" / "card.md").read_text("utf-8")


@pytest.mark.ray
def test_the_set_is_the_same_on_ray(small: tuple, tmp_path: Path) -> None:
    folder, dumps, made = small
    command = words(folder, dumps, tmp_path / "out", "--ray.cpus", "2", "--bucket-bytes", "100KiB")
    command[command.index("local")] = "ray"
    assert main(command) == 0
    assert bytes_of(tmp_path / "out") == made


def test_small_inputs_need_no_ray(small: tuple, tmp_path: Path) -> None:
    folder, dumps, made = small
    command = words(folder, dumps, tmp_path / "out")
    command[command.index("local")] = "auto"
    code = "import sys; sys.modules['ray'] = None; from lavic.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "out") == made


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_kill_at_any_moment_changes_nothing(small: tuple, tmp_path: Path, seed: int) -> None:
    """SIGKILL once some random number of files stands in the work folder, three times; then to the end."""
    folder, dumps, made = small
    draw = random.Random(seed)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lavic", *words(folder, dumps, out, "--bucket-bytes", "30KiB")]
    killed = 0
    for target in sorted(draw.sample(range(1, 40), 3)):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and sum(path.is_file() for path in (out / "work").rglob("*")) < target:
            time.sleep(0.005)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 2
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert bytes_of(out) == made


def test_a_complete_set_stays_and_another_one_is_refused(small: tuple, capsys: pytest.CaptureFixture) -> None:
    folder, dumps, made = small
    before = (folder / "out" / "funnel.json").stat().st_mtime_ns
    assert main(words(folder, dumps, folder / "out")) == 0
    assert (folder / "out" / "funnel.json").stat().st_mtime_ns == before
    assert main(words(folder, dumps, folder / "out", "--labels.min-score", "7")) == 2
    assert "holds a set of other files or settings" in capsys.readouterr().err
    assert bytes_of(folder / "out") == made


def test_a_truncated_dump_is_named(small: tuple, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, dumps, _ = small
    (tmp_path / "RC_cut.zst").write_bytes(dumps[1].read_bytes()[:-2000])
    assert main(words(folder, [dumps[0], tmp_path / "RC_cut.zst"], tmp_path / "out")) == 2
    assert "RC_cut.zst: the compressed data is corrupt (the file is truncated)" in capsys.readouterr().err


def test_what_is_no_dump_is_refused_before_the_work(
    small: tuple, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, dumps, _ = small
    manifest = str(folder / "out")
    more = [str(folder / "meta.jsonl"), "--out", str(tmp_path / "b"), "--executor", "local"]
    for command in (
        words(folder, [*dumps, folder / "meta.jsonl"], tmp_path / "a"),
        ["reddit", "rebuild", "--manifest", manifest, "--dumps", *map(str, dumps), *more],
    ):
        assert main(command) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "meta.jsonl: neither comments nor submissions" in line


def test_nothing_to_keep_says_why(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = catalogue(tmp_path)
    rows = [comment("a1", "s1", "t3_s1", f"mine: {dp(ITEMS[0])}", author="asker")]
    dumps = [write_dump(tmp_path / "c.zst", rows), write_dump(tmp_path / "s.zst", [submission("s1", "t")])]
    assert main(words(folder, dumps, tmp_path / "out")) == 2
    assert "1 by the asker" in capsys.readouterr().err
    assert main(words(folder, [tmp_path / "none.zst"], tmp_path / "out")) == 2
    assert "none.zst: no such dump" in capsys.readouterr().err


def test_a_set_is_rebuilt_from_its_ids(small: tuple, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _, dumps, made = small
    manifest = tmp_path / "ids"
    manifest.mkdir()
    for name in NAMES:
        (manifest / f"{name}.ids.jsonl").write_bytes(made[f"{name}.ids.jsonl"])
        assert b"shave" not in made[f"{name}.ids.jsonl"]
    again = ["reddit", "rebuild", "--manifest", str(manifest), "--executor", "local", "--dumps"]
    assert main([*again, *map(str, dumps), "--out", str(tmp_path / "same")]) == 0
    assert all((tmp_path / "same" / f"{name}.jsonl").read_bytes() == made[f"{name}.jsonl"] for name in NAMES)
    # A later dump, in which one comment was deleted and another one edited.
    ids = [json.loads(line) for line in made["train.ids.jsonl"].splitlines()]
    submissions, comments = drawn_posts(200, 20)
    for row in comments:
        if row["id"] == ids[0]["comment"]:
            row["_meta"] = {"was_deleted_later": True}
        if row["id"] == ids[1]["comment"]:
            row["body"] += " edited"
    later = [write_dump(tmp_path / "s.zst", submissions), write_dump(tmp_path / "c.zst", comments)]
    capsys.readouterr()
    assert main([*again, *map(str, later), "--out", str(tmp_path / "later")]) == 0
    report = json.loads((tmp_path / "later" / "rebuild.json").read_text())
    assert report["changed"] >= 1 and report["missing"] >= 1
    assert sum(report[kind] for kind in ("same", "changed", "missing")) == report["rows"]
    assert f"{report['same']:,} of {report['rows']:,}" in capsys.readouterr().out


class ShortLinkServer:
    """Answers for short links as their hosts do."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.times: list[float] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                outer.times.append(time.monotonic())
                target = {
                    "/amzn.to/toItem1": (301, f"https://www.amazon.com/Title/dp/{ITEMS[7]}?tag=x"),
                    "/a.co/d/twoHops": (302, "https://amzn.to/toItem1"),
                    "/amzn.to/search1": (301, "https://www.amazon.com/s?k=soap"),
                    "/amzn.to/evilOne": (302, "http://169.254.169.254/latest"),
                    "/amzn.to/noMore1": (404, ""),
                }.get(self.path, (500, ""))
                self.send_response(target[0])
                if target[1]:
                    self.send_header("Location", target[1])
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def short_links() -> Iterator[ShortLinkServer]:
    server = ShortLinkServer()
    yield server
    server.close()


def test_short_links_are_resolved_on_request_and_once(tmp_path: Path, short_links: ShortLinkServer) -> None:
    folder = catalogue(tmp_path)
    codes = ["https://amzn.to/toItem1", "https://a.co/d/twoHops", "https://amzn.to/search1", "https://amzn.to/broken1"]
    rows, posts = [], []
    for n, code in enumerate(codes):
        posts.append(submission(f"s{n}", f"Which number {n}?"))
        rows.append(comment(f"c{n}", f"s{n}", f"t3_s{n}", f"this is great {code}"))
    posts.append(submission("s9", "Which?"))
    rows.append(comment("c9", "s9", "t3_s9", f"this is great {dp(ITEMS[1])}"))
    dumps = [write_dump(tmp_path / "s.zst", posts), write_dump(tmp_path / "c.zst", rows)]
    assert main(words(folder, dumps, tmp_path / "plain")) == 0
    assert not short_links.asked
    assert json.loads((tmp_path / "plain" / "funnel.json").read_text())["lines"]["short_link_only"] == 4
    more = ["--short-links.resolve", "--short-links.server", short_links.address, "--short-links.rate", "50"]
    more += ["--short-links.cache", str(tmp_path / "cache.jsonl")]
    assert main(words(folder, dumps, tmp_path / "a", *more)) == 0
    rows_made = [row for name in NAMES for row in (tmp_path / "a" / f"{name}.jsonl").read_text().splitlines()]
    assert sorted(json.loads(row)["gt_items"][0] for row in rows_made) == [ITEMS[1], ITEMS[7], ITEMS[7]]
    notes = json.loads((tmp_path / "a" / "funnel.json").read_text())["notes"]
    assert (notes["short_links"], notes["short_links_distinct"], notes["short_links_not_resolved"]) == (2, 4, 1)
    asked = len(short_links.asked)
    assert main(words(folder, dumps, tmp_path / "b", *more)) == 0
    assert short_links.asked[asked:] == ["/amzn.to/broken1"], "what is known is not asked again"
    assert (tmp_path / "b" / "train.jsonl").read_bytes() == (tmp_path / "a" / "train.jsonl").read_bytes()


def test_the_resolver_visits_nothing_else_and_keeps_its_rate(tmp_path: Path, short_links: ShortLinkServer) -> None:
    settings = ShortLinkSettings(resolve=True, rate=20, server=short_links.address, limit=3)
    resolver = Resolver(settings, tmp_path / "cache.jsonl")
    for code in ("evilOne", "noMore1", "search1", "toItem1"):
        resolver.resolve(f"https://amzn.to/{code}")
    assert short_links.asked == ["/amzn.to/evilOne", "/amzn.to/noMore1", "/amzn.to/search1"]
    assert [resolver.known(f"https://amzn.to/{code}") for code in ("evilOne", "noMore1", "toItem1")] == ["", "", None]
    # The server hears of a request after it was sent: twice the gap bounds what one late request may take off.
    assert short_links.times[-1] - short_links.times[0] >= 0.05


def _square(task: tuple[int, str]) -> int:
    number, folder = task
    if number == 3 and not (mark := Path(folder) / "died").exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 7:
        raise DataError("seven is not a number")
    if number == 8:
        raise KeyError("eight")
    if number == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    tasks = [(n, str(tmp_path)) for n in range(6)]
    results = dict(run_tasks(_square, tasks, RaySettings(workers=2), on_ray=False))
    assert results == {task: task[0] ** 2 for task in tasks} and (tmp_path / "died").exists()


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [(7, DataError, "seven is not a number"), (8, LavicError, "KeyError"), (9, LavicError, "3 workers died.*SIGKILL")],
)
def test_an_error_of_a_task_ends_the_work(tmp_path: Path, number: int, kind: type, message: str) -> None:
    with pytest.raises(kind, match=f"(?s){message}"):
        list(run_tasks(_square, [(number, str(tmp_path)), (1, str(tmp_path))], RaySettings(workers=1), on_ray=False))
