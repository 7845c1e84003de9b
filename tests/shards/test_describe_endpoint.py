"""`lavic describe --endpoint.url`: concurrent, restartable inside a shard, useless texts flagged, cost reported."""

from __future__ import annotations

import hashlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from lavic.cli import main
from lavic.data.descriptions import FIELDS, descriptions_path
from lavic.data.manifest import Manifest
from lavic.data.shard_dataset import ShardDataset
from lavic.data.tar_shards import Sample
from lavic.shards.describe import is_complete, resolve
from lavic.shards.teacher.partial_descriptions import partial_path
from tests.crawled_sets import write_set
from tests.endpoint.openai_server import OpenAiServer, chat_body, openai_server, question
from tests.shards.teacher_sets import colour_in, colour_of, make_photos, sidecars
from tests.slurm.slurm_jobs import wait_for


def describe_colour(body):
    return chat_body(f"A mug in the colour {colour_in(body)}. It has a handle. And it is", 700, 20)


def answer_below(limit: int, server: OpenAiServer, body):
    """Photos from number `limit` on wait for the server's release."""
    if int(re.search(r"</b> (\d+)", question(body))[1]) >= limit:
        server.hanging.release()
        server.release.wait(60)
    return describe_colour(body)


@pytest.fixture
def server() -> Iterator[OpenAiServer]:
    with openai_server() as running:
        running.chat = describe_colour
        yield running


@pytest.fixture
def photos(tmp_path: Path) -> Manifest:
    return make_photos(tmp_path / "photos", 30, 12)


@pytest.fixture
def words(photos: Manifest, server: OpenAiServer) -> Callable[..., list[str]]:
    """The command line."""

    def make(*more: object) -> list[str]:
        given = [
            *("describe", "--shards", photos.folder, "--endpoint.url", server.url, "--endpoint.model", "seer"),
            *("--endpoint.backoff-s", 0, "--endpoint.concurrency", 4, *more),
        ]
        return [str(word) for word in given]

    return make


def expected(n: int) -> str:
    red, green, _ = colour_of(n)
    return f"A mug in the colour {red // 16}-{green // 16}. It has a handle."


def test_every_photo_gets_its_own_words(photos, server, words, capsys):
    assert main(words("--endpoint.input-price", 2, "--endpoint.output-price", 10, "--max-new-tokens", 50)) == 0
    rows = [row for shard in sidecars(photos) for row in shard]
    assert [row["key"] for row in rows] == [f"B{n:09d}_0" for n in range(30)]
    assert [row["text"] for row in rows] == [expected(n) for n in range(30)]
    assert all(tuple(row) == FIELDS for row in rows)
    assert {(r["model"], r["views"], r["max_new_tokens"], r["sampling"], r["flag"]) for r in rows} == {
        ("seer", "whole", "50", "greedy", "")
    }
    body = server.bodies[0]
    assert (body["max_tokens"], body["temperature"], body["model"]) == (50, 0.0, "seer") and "seed" not in body
    assert 'Its title is "Acme <b>Mug</b> ' in question(body)
    out = capsys.readouterr().out
    assert "Tokens         21,000 in, 600 out, 30 answers" in out
    assert "Cost           0.048; 1,600 for a million photos" in out
    assert re.search(r"Speed +\S+ photos/s, \S+ hours for a million photos", out)
    assert not list(photos.folder.glob("*.begun"))
    assert is_complete(resolve(words()[1:])) and main(words("--max-new-tokens", 50)) == 0 and server.requests == 30


def test_a_photo_that_was_replaced_under_its_key_is_described_again(photos, server, words):
    assert main(words()) == 0
    samples = list(ShardDataset(photos.folder, descriptions=None))
    # As `lavic crawl --refresh` does: item 4 has the photo of item 20 now.
    old, new = samples[4], samples[20]
    samples[4] = Sample.of(item_id=old.item_id, n=0, jpg=new.jpg, title=old.title, width=16, height=16)
    write_set(photos.folder, samples, photos_per_shard=photos.shards[0].samples)
    for order in (slice(None), slice(None, None, -1)):  # lines are found by their place, or by their key
        path = descriptions_path(photos.path(photos.shards[0]))
        path.write_text("".join(path.read_text("utf-8").splitlines(keepends=True)[order]), "utf-8")
        texts = [sample.text for sample in ShardDataset(photos.folder)]
        assert texts == [expected(n) if n != 4 else "" for n in range(30)]
        assert not is_complete(resolve(words()[1:]))
    before = server.requests
    assert main(words()) == 0 and server.requests - before == photos.shards[0].samples
    assert [sample.text for sample in ShardDataset(photos.folder)] == [expected(20 if n == 4 else n) for n in range(30)]
    assert is_complete(resolve(words()[1:]))


def test_a_killed_command_continues_inside_the_shard(photos, server, words):
    assert main(words()) == 0
    paths = [descriptions_path(photos.path(shard)) for shard in photos.shards]
    undisturbed = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    before = server.requests
    begun = partial_path(photos.path(photos.shards[1]))

    def described() -> int:
        return len(begun.read_text().splitlines()) - 1 if begun.exists() else -1

    server.faults.append((500, {}, b""))
    for unanswered in (17, 20):  # killed while requests wait, in the second shard, then in what remains of it
        server.chat = partial(answer_below, unanswered, server)
        run = subprocess.Popen([sys.executable, "-m", "lavic", *words("--endpoint.retries", 2)])
        assert server.hanging.acquire(timeout=60)
        wait_for(lambda last=unanswered: described() == last - 12, 60, "the answers on disk")
        run.send_signal(signal.SIGKILL)
        run.wait()
    server.chat = describe_colour
    server.release.set()
    assert paths[0].read_bytes() == undisturbed[0] and not paths[1].exists()
    kept = described()
    assert kept == 8
    begun.write_bytes(begun.read_bytes()[:-9])  # a line that the kill cut
    counted = server.requests
    assert main(words()) == 0
    assert [path.read_bytes() for path in paths] == undisturbed
    assert server.requests - counted == 18 - (kept - 1)
    assert server.requests - before < 30 + 2 * 4 + 4 * 4 and not begun.exists()


def test_begun_descriptions_of_a_described_shard_are_removed(photos, words):
    """A command was killed after it had written the sidecar."""
    assert main(words()) == 0
    begun = partial_path(photos.path(photos.shards[1]))
    begun.write_bytes(b"{}\n")
    assert main(words()) == 0
    assert not begun.exists()


def test_begun_descriptions_of_other_settings_are_not_used(photos, server, words):
    server.faults.extend([""] * 5 + ["hang"] * 4)
    run = subprocess.Popen([sys.executable, "-m", "lavic", *words()])
    assert all(server.hanging.acquire(timeout=60) for _ in range(4))
    run.kill()
    run.wait()
    server.release.set()
    server.chat = lambda body: chat_body("Something else entirely.")
    assert main(words("--endpoint.model", "other", "--endpoint.concurrency", "1")) == 0
    assert {row["text"] for shard in sidecars(photos) for row in shard} == {"Something else entirely."}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--endpoint.model", "other"], "by seer with the weights endpoint-"),
        (["--endpoint.extra", "{min_pixels: 9}"], "the weights endpoint-"),
        (["--temperature", "0.5"], "the sampling greedy, not temperature=0.5 seed=0"),
        (["--max-new-tokens", "9"], "--max-new-tokens 128, not 9"),
        (["--prompt-file", "QUESTION"], "prompt version question-"),
    ],
)
def test_descriptions_made_in_another_way_are_refused(photos, words, tmp_path, capsys, more, message):
    (tmp_path / "QUESTION").write_text("What is {title}?")
    assert main(words()) == 0
    assert main(words(*(str(tmp_path / word) if word == "QUESTION" else word for word in more))) == 2
    assert message in capsys.readouterr().err
    changes = ["--endpoint.concurrency", "1", "--endpoint.retries", "1", "--endpoint.input-price", "3"]
    assert main(words(*changes)) == 0, "they change no text"


def test_the_question_of_a_file_and_sampling_are_sent(photos, server, words, tmp_path):
    (tmp_path / "q.txt").write_text("\ufeffLook at {title}.\nWhat colour is {title}?\n", encoding="utf-8")
    more = ["--prompt-file", tmp_path / "q.txt", "--temperature", 0.5, "--top-p", 0.9, "--seed", 7]
    assert main(words(*more)) == 0
    body = next(body for body in server.bodies if " 3." in question(body))
    assert question(body) == "Look at Acme <b>Mug</b> 3.\nWhat colour is Acme <b>Mug</b> 3?"
    assert (body["temperature"], body["top_p"], body["seed"]) == (0.5, 0.9, 7)
    assert {row["sampling"] for shard in sidecars(photos) for row in shard} == {"temperature=0.5 top_p=0.9 seed=7"}


def test_useless_texts_are_asked_for_once_more_and_flagged(photos, server, words, tmp_path, capsys):
    bad = {
        "0-0": "",
        "1-0": "I'm sorry, I can't help with that.",
        "2-0": "red and red and red and red and red and red and red",
        "3-0": "The mug is an Acme mug.",
    }

    def answer(body):
        colour, again = colour_in(body), body["temperature"] > 0
        if colour == "5-0":
            return 400, {}, b'{"error": {"message": "content policy"}}'
        if colour in bad and not (again and colour == "1-0"):
            return chat_body(bad[colour])
        return describe_colour(body)

    server.chat = answer
    page = tmp_path / "page.html"
    assert main(words("--page", page, "--examples", 9)) == 0
    rows = [row for shard in sidecars(photos) for row in shard]
    assert [row["flag"] for row in rows[:6]] == ["empty", "", "loop", "title", "", "rejected"]
    assert [row["text"] for row in rows[:6]] == ["", expected(1), "", "", expected(4), ""]
    second = [body for body in server.bodies if body["temperature"] > 0]
    assert {colour_in(body) for body in second} == set(bad) and len(second) == 4
    assert all((body["temperature"], body["seed"]) == (0.7, 1) for body in second)
    out = capsys.readouterr().out
    assert "Flagged        1 empty, 1 loop, 1 rejected, 1 title" in out and "Written twice  4" in out
    html = page.read_text()
    assert html.count("<article>") == 9 and html.count('class="flag"') == 3 and "<script" not in html
    assert html.count('src="data:image/jpeg;base64,') == 9 and "Acme &lt;b&gt;Mug&lt;/b&gt;" in html
    assert "30, 30 described" in html and "1 empty, 1 loop, 1 rejected, 1 title" in html and "<b>" not in html

    assert main(words("--page", page)) == 0, "of what is there"
    assert "Speed" not in page.read_text()
    for path in photos.folder.glob("*.descriptions.jsonl"):
        path.unlink()
    assert main(words("--flagged", "keep")) == 0
    assert sidecars(photos)[0][1 + 1]["text"] == bad["2-0"]


def test_thoughts_are_no_description(photos, server, words, capsys):
    def answer(body):
        colour = colour_in(body)
        message = "" if colour == "0-0" else f"</think>\n\nA mug in the colour {colour}. It has a handle."
        return chat_body(f"<think>\nThe user wants a text. I see a mug.{message}")

    server.chat = answer
    assert main(words()) == 0
    rows = [row for shard in sidecars(photos) for row in shard]
    assert (rows[0]["text"], rows[0]["flag"]) == ("", "empty")
    assert [row["text"] for row in rows[1:]] == [expected(n) for n in range(1, 30)]
    assert "Flagged        1 empty" in capsys.readouterr().out


def test_photos_without_an_answer_are_asked_for_by_the_next_run(photos, server, words, capsys):
    def answer(body):
        return (503, {}, b"busy") if colour_in(body) in ("3-0", "4-0") else describe_colour(body)

    server.chat = answer
    assert main(words("--endpoint.retries", 1)) == 1
    out = capsys.readouterr().out
    assert "2 photos got no answer: run the same command again" in out and "4 server" in out
    assert [len(shard) for shard in sidecars(photos)] == [0, 12, 6]
    server.chat = describe_colour
    before = server.requests
    assert main(words("--endpoint.retries", 1)) == 0
    assert server.requests - before == 2
    assert [row["text"] for row in sidecars(photos)[0]] == [expected(n) for n in range(12)]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((401, {}, b""), "check --endpoint.api-key"),
        ((404, {}, b""), "check --endpoint.url and --endpoint.model seer"),
        ((500, {}, b"<h1>down</h1>"), "5 requests in a row failed, the last one: http"),
        ("close", "the connection breaks"),
        ((200, {"Content-Type": "text/html"}, b"<html>"), "a web page"),
        ((200, {}, b'{"choices": [{"mes'), "not JSON"),
    ],
    ids=str,
)
def test_a_server_that_does_not_work_ends_it_with_one_line(photos, server, words, capsys, fault, message):
    server.faults.extend([fault] * 100)
    assert main(words("--endpoint.retries", 1, "--endpoint.give-up-after", 5)) in (1, 2)
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and not any(sidecars(photos))


def test_what_is_missing_is_named(photos, server, capsys):
    words = ["describe", "--shards", str(photos.folder)]
    assert main([*words, "--endpoint.url", server.url]) == 2
    assert "missing --endpoint.model" in capsys.readouterr().err
    assert main([*words, "--endpoint", server.url]) == 2
    assert "--endpoint" in capsys.readouterr().err
    empty = photos.folder / "empty.txt"
    empty.write_text("\n")
    assert main([*words, "--endpoint.url", server.url, "--endpoint.model", "m", "--prompt-file", str(empty)]) == 2
    assert f"--prompt-file {empty}: is empty" in capsys.readouterr().err


def test_a_stop_request_is_heard_while_an_answer_is_awaited(photos, server, words):
    server.faults.extend([""] * 5 + ["hang"] * 4)
    run = subprocess.Popen([sys.executable, "-m", "lavic", *words()], stderr=subprocess.PIPE, text=True)
    assert all(server.hanging.acquire(timeout=60) for _ in range(4))
    run.send_signal(signal.SIGUSR1)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 75 and "stopped on request" in error and "Traceback" not in error
    server.release.set()
    assert main(words()) == 0
    assert [row["text"] for shard in sidecars(photos) for row in shard] == [expected(n) for n in range(30)]


def test_a_stop_request_is_heard_while_servers_load(photos, server, words):
    server.loading = 10**9
    run = subprocess.Popen(
        [sys.executable, "-m", "lavic", *words("--endpoint.startup-s", 1000)], stderr=subprocess.PIPE, text=True
    )
    while not server.paths["/v1/models"]:
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGUSR1)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 75 and "before the servers answered" in error and not server.requests


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_the_page_in_a_browser(photos, server, words, tmp_path, browser, width, scheme):
    long = "".join(hashlib.sha256(bytes([n])).hexdigest() for n in range(5))
    evil = f"</p><script>document.title='taken'</script><img src=//192.0.2.1/x onerror=alert(1)> {long}"
    server.chat = lambda body: chat_body(evil if colour_in(body) == "1-0" else "")
    page = tmp_path / "page.html"
    assert main(words("--page", page)) == 0
    browser.open(page, width=width, scheme=scheme)
    assert browser.driver.title == "Descriptions" and browser.overflow() == 0
    assert not browser.errors() and len(browser.requests()) == 1
    shown = browser.driver.find_elements("css selector", "article img")
    assert len(shown) == 17 and all(image.get_property("naturalWidth") == 16 for image in shown)
