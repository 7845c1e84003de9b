"""`lavic crawl --dry-run`, and which hosts failed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lavic.cli import main
from lavic.shards.pack.host_failures import failures_of, failures_table, host_of
from lavic.shards.pack.outcomes import Outcome
from tests.shards.test_crawl import QUICK


def row(kind: Any, url: str) -> Outcome:
    return Outcome(key="a_0", item_id="a", n=0, url=url, kind=kind)


def test_the_host_of_a_link() -> None:
    assert host_of("https://M.example.org:443/a.jpg") == "m.example.org" == host_of("http://m.example.org:80/")
    assert host_of("http://m.example.org:8080/a") == "m.example.org:8080" and host_of("http://[::1]:81/") == "::1:81"
    assert host_of("//m.example.org/a") == host_of("m.example.org/a") == "m.example.org"
    assert host_of("http://[bad/a") == host_of("http://a:port/") == host_of("") == "(malformed links)"


def test_hosts_with_the_most_failures_come_first_and_all_are_counted() -> None:
    rows = [row("gone", f"http://h{n}.example/x") for n in range(30) for _ in range(n + 1)]
    failures = failures_of([*rows, row("timeout", "http://slow.example/x"), row("ok", "http://h1.example/x")])
    assert set(failures) == {"gone", "timeout"} and failures["timeout"] == {"slow.example": 1}
    assert sum(failures["gone"].values()) == len(rows) and len(failures["gone"]) == 21
    lines = failures_table([failures, failures]).splitlines()
    assert lines[1] == (
        f"  {'gone':<16}h29.example 60, h28.example 58, h27.example 56, other hosts {2 * len(rows) - 174}"
    )
    assert lines[2] == f"  {'timeout':<16}slow.example 2"
    assert failures_table([{}, {}]) == ""


class TestDryRun:
    """Against a server that must not be asked."""

    def output(self, capsys: pytest.CaptureFixture[str], *words: str) -> str:
        capsys.readouterr()
        assert main(["crawl", *words]) == 0
        return capsys.readouterr().out

    def test_before_the_first_request(
        self, tmp_path: Path, catalogue: Callable[..., Path], server: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        paths = [*(f"n/{n}.jpg" for n in range(200)), *["n/0.jpg"] * 10, *(f"http://b.example/{n}" for n in range(50))]
        words = ["--items", str(catalogue(*paths)), "--out", str(tmp_path / "out"), "--dry-run"]
        text = self.output(capsys, *words, "--fetch.host-rate", "0.5")
        assert (
            "260 photos of 260 items in 1 shards; to be fetched: 260 photos in 1 shards, by 250 requests to 2" in text
        )
        host = server.url.removeprefix("http://")
        assert f"  {host:<40}{200:>12}{'80.0%':>8}{'06:40':>14}" in text
        assert f"  {'b.example':<40}{50:>12}{'20.0%':>8}{'01:40':>14}" in text
        assert "at least 06:40 in all" in text and "more than 64 s for a response" in text and "robots.txt" in text
        assert "no minimum time" in self.output(capsys, *words, "--fetch.host-rate", "0")
        assert not (tmp_path / "out").exists() and not server.requests and not server.robots_asked

    def test_of_a_set_that_is_there(
        self, tmp_path: Path, catalogue: Callable[..., Path], server: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        paths = [f"n/{n}.jpg" for n in range(20)]
        paths[3] = paths[13] = "status/404"
        items, out = catalogue(*paths), tmp_path / "out"
        words = ["--items", str(items), "--out", str(out), "--photos-per-shard", "5", *QUICK]
        text = self.output(capsys, *words)
        assert f"  {'gone':<16}{server.url.removeprefix('http://')} 2\n" in text
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        server.requests.clear()
        assert "to be fetched: 0 photos in 0 shards" in self.output(capsys, *words, "--dry-run")
        # Both links are one picture: one request.
        again = self.output(capsys, *words, "--dry-run", "--retry", "gone")
        assert "to be fetched: 2 photos in 1 shards, by 1 requests to 1 hosts" in again
        (out / "photos-train-000001.seal.json").unlink()
        assert "to be fetched: 5 photos in 1 shards" in self.output(capsys, *words, "--dry-run")
        seal = before[out / "photos-train-000001.seal.json"]
        (out / "photos-train-000001.seal.json").write_bytes(seal)

        more = {"parent_asin": "B99999", "title": "new", "images": [{"large": f"{server.url}/n/77.jpg"}]}
        items.write_text(items.read_text() + json.dumps(more) + "\n")
        assert main(["crawl", *words, "--dry-run"]) == 2
        assert f"{out} was planned from another input" in capsys.readouterr().err
        grown = self.output(capsys, *words, "--dry-run", "--extend")
        assert "21 photos of 21 items in 5 shards; to be fetched: 1 photos in 1 shards, by 1 requests" in grown
        assert main(["crawl", *words, "--dry-run", "--extend", "--photos-per-shard", "6"]) == 2
        assert f"{out} was planned from another input" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        assert not server.requests
