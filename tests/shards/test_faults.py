"""One crawl of everything that servers do wrong, as a user runs it, among photos that are fine."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lavic.cli import main
from lavic.data.shard_dataset import ShardDataset
from lavic.shards.pack.outcomes import KINDS, read_ledger

pytestmark = pytest.mark.slow

FAULTS = {
    "plain.jpg": "ok",
    "progressive.jpg": "ok",
    "grey.jpg": "ok",
    "cmyk.jpg": "ok",
    "deep.png": "ok",
    "clear.png": "ok",
    "palette.gif": "ok",
    "palette.png": "ok",
    "animated.gif": "ok",
    "animated.webp": "ok",
    "rotated.jpg": "ok",
    "bad-exif.jpg": "ok",
    "srgb.jpg": "ok",
    "bad-profile.jpg": "ok",
    "profile.jpg": "ok",
    "moved": "ok",
    "packed": "ok",
    "tagged/googlebot:+noai": "ok",
    "status/404": "gone",
    "status/410": "gone",
    "status/401": "forbidden",
    "status/403": "forbidden",
    "slow": "timeout",
    "drip": "too_slow",
    "endless": "too_big",
    "big.jpg": "too_big",
    "packed-bomb": "too_big",
    "page.jpg": "not_image",
    "cut.jpg": "truncated",
    "cut-and-closed.jpg": "truncated",
    "cut.png": "truncated",
    "short": "truncated",
    "empty.jpg": "truncated",
    "bomb.jpg": "bomb",
    "bomb.png": "bomb",
    "zip-bomb.png": "bomb",
    "text-bomb.png": "bomb",
    "frames.gif": "ok",
    "apple.jpg": "unsupported",
    "drawing.jpg": "unsupported",
    "tagged/noai": "opted_out",
    "tagged/noimageindex,+nofollow": "opted_out",
    "private/1.jpg": "opted_out",
    "to-secrets": "blocked_address",
    "to-file": "bad_url",
    "loop": "http_error",
    "long": "truncated",
    "status/500": "http_error",
    "hang-up": "connect",
    "stand-in.jpg": "placeholder",
}


def test_every_fault_ends_under_its_name_and_disturbs_nothing_else(
    tmp_path: Path,
    catalogue: Callable[..., Path],
    server: Any,
    second_server: Any,
    tls_servers: tuple[Any, Any],
    photos: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    trusted, foreign = tls_servers
    server.robots = (200, b"User-agent: lavic\nDisallow: /private/\n")
    trusted.elsewhere = f"{server.url}/n/1.jpg"
    elsewhere = {
        # A host that asks for fewer requests gets fewer: one of its own, so that the others need not wait.
        f"{second_server.url}/patience/1": "ok",
        f"{second_server.url}/status/429": "throttled",
        f"{second_server.url}/status/503": "throttled",
        f"{trusted.url}/plain.jpg": "ok",
        f"{trusted.url}/away": "blocked_address",
        f"{foreign.url}/plain.jpg": "tls",
        "http://no-such-host.invalid/1.jpg": "dns",
        "http://127.0.0.1:9/1.jpg": "connect",
        "ftp://127.0.0.1/1.jpg": "bad_url",
    }
    good = [f"n/{n}.jpg" for n in range(200)]
    faults = [*FAULTS, *elsewhere]
    paths = [path for n, link in enumerate(good) for path in (link, *faults[n : n + 1])]
    stand_in = hashlib.sha256(photos["stand-in.jpg"]).hexdigest()
    out = tmp_path / "out"
    words = ["--items", str(catalogue(*paths)), "--out", str(out), "--photos-per-shard", "70"]
    fetch = ["--fetch.allow-private", "--fetch.deadline", "2", "--fetch.retries", "2", "--fetch.backoff", "0.05"]
    fetch += ["--fetch.max-bytes", "1000000", "--fetch.host-rate", "0", "--fetch.patience", "5"]
    assert main(["crawl", *words, *fetch, "--photo.placeholders", stand_in]) == 0

    dataset = ShardDataset(out)
    rows = [row for shard in sorted(out.glob("*.tar")) for row in read_ledger(shard)]
    ended = {row.url.removeprefix(f"{server.url}/"): row for row in rows}
    assert len(ended) == len(rows) == len(paths)
    expected = {**FAULTS, **elsewhere, **dict.fromkeys(good, "ok")}
    assert {path: ended[path].kind for path in expected} == expected
    assert {row.kind for row in rows} == set(KINDS) - {"unasked"}
    assert all((row.reason == "") == (row.kind == "ok") for row in rows)
    assert (
        ended[f"{second_server.url}/patience/1"].attempts >= 2
        and ended["status/404"].http == 404
        and ended["private/1.jpg"].attempts == 0
    )
    assert not foreign.requests and "/private/1.jpg" not in server.requests

    assert dataset.keys == [row.key for row in rows if row.kind == "ok"]
    for n in range(len(dataset)):
        sample = dataset[n]
        image = Image.open(io.BytesIO(sample.jpg))
        image.load()
        assert image.format == "JPEG" and image.mode in ("RGB", "L") and image.getexif().get(0x0112, 1) == 1
        assert image.size == (sample.meta["width"], sample.meta["height"])
    kept = {row.key: row.sha256 for row in rows if row.kind == "ok" and row.url.endswith(("plain.jpg", "/n/7.jpg"))}
    for n, key in enumerate(dataset.keys):
        if key in kept:
            assert dataset[n].meta["sha256"] == dataset[n].meta["source_sha256"] == kept[key]

    text = capsys.readouterr().out
    assert all(kind in text for kind in KINDS if kind != "unasked") and main(["verify", str(out)]) == 0
