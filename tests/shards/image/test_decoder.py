"""Photos that are slow, crash their decoder or raise an exception: outcome kinds, and no delay for other photos."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import pytest

from lavic.data.tar_shards import read_samples
from lavic.errors import LavicError
from lavic.shards.http.fetch_settings import FetchSettings
from lavic.shards.http.fetcher import Fetcher
from lavic.shards.image import normalize
from lavic.shards.image.decoder import Decoder, shared_decoder
from lavic.shards.image.normalize import PhotoError, PhotoSettings, inspect
from lavic.shards.pack import shard_writer
from lavic.shards.pack.outcomes import read_ledger
from lavic.shards.pack.shard_writer import pack_shard
from lavic.shards.plan.crawl_plan import make_plan
from lavic.shards.plan.photo_tasks import PlanSettings
from tests.shards.fault_server import PHOTOS
from tests.shards.image.decompression_bombs import many_chunks, many_directories, many_scans
from tests.shards.image.to_jpeg import to_jpeg

pytestmark = pytest.mark.slow

SETTINGS = PhotoSettings()


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    running = Decoder()
    yield running
    running.close()


def test_the_decoder_process_gives_the_same_photos(decoder: Decoder) -> None:
    for name in ("clear.png", "rotated.jpg", "srgb.jpg", "animated.webp", "cut.png", "cut.jpg", "text-bomb.png"):
        try:
            expected: object = to_jpeg(PHOTOS[name], SETTINGS)
        except PhotoError as error:
            expected = error.args
        try:
            result: object = decoder.normalize(inspect(PHOTOS[name], SETTINGS), SETTINGS)
        except PhotoError as error:
            result = error.args
        assert result == expected, name
    # The profile is known from now on: such photos are checked in this process.
    assert inspect(PHOTOS["srgb.jpg"], SETTINGS).effort == "little"


def test_decode_seconds_refuses_a_slow_photo(decoder: Decoder) -> None:
    slow = inspect(many_scans(6000), SETTINGS)
    assert slow.effort == "unknown"
    with pytest.raises(PhotoError, match=r"0\.05 s of CPU time of --photo\.decode-seconds") as caught:
        decoder.normalize(slow, PhotoSettings(decode_seconds=0.05))
    assert caught.value.kind == "bomb"
    assert decoder.normalize(slow, SETTINGS).jpg is slow.data


def test_a_dead_decoder_process_is_replaced(decoder: Decoder) -> None:
    good = inspect(PHOTOS["clear.png"], SETTINGS)
    decoder.normalize(good, SETTINGS)
    assert decoder._process
    os.kill(decoder._process.pid, signal.SIGSEGV)
    with pytest.raises(PhotoError, match="SIGSEGV"):
        decoder.normalize(good, SETTINGS)
    decoder.normalize(good, SETTINGS)
    os.kill(decoder._process.pid, signal.SIGKILL)
    assert decoder.normalize(good, SETTINGS).width == 64


def test_a_decoder_process_that_cannot_start_is_an_error(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    good = inspect(PHOTOS["clear.png"], SETTINGS)
    for program, reason in (("/no/such/python", "cannot be started"), ("/bin/false", "exit code 1")):
        monkeypatch.setattr(sys, "executable", program)
        with pytest.raises(LavicError, match=reason):
            decoder.normalize(good, SETTINGS)


def test_the_decoder_process_ends_with_its_parent() -> None:
    code = (
        "import os, signal; from lavic.shards.image.decoder import shared_decoder;"
        "from lavic.shards.image.normalize import *;"
        "from tests.shards.fault_server import PHOTOS; settings = PhotoSettings();"
        "shared_decoder().normalize(inspect(PHOTOS['clear.png'], settings), settings);"
        "print(shared_decoder()._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    out = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])
    running = Path(f"/proc/{int(out.stdout)}")
    deadline = time.monotonic() + 60
    while running.exists() and "Z" not in (running / "stat").read_text().rpartition(")")[2]:
        assert time.monotonic() < deadline, "the decoder outlives its parent"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "bomb"),
        (RecursionError("too deep"), "truncated"),
        (struct.error("unpack"), "truncated"),
        (OSError(28, "No space left on device"), "truncated"),
        (AssertionError(), "truncated"),
    ],
)
def test_any_exception_of_a_decoder_refuses_the_photo(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    for step in ("decode", "to_rgb"):
        monkeypatch.setattr(normalize, step, fail)
        with pytest.raises(PhotoError) as caught:
            to_jpeg(PHOTOS["clear.png"], SETTINGS)
        assert caught.value.kind == kind and caught.value.reason


def test_too_many_scans_are_refused_and_extra_directories_skipped() -> None:
    with pytest.raises(PhotoError) as caught:
        to_jpeg(many_scans(500, bits=1), SETTINGS)
    assert caught.value.kind == "bomb" and "127 scans" in caught.value.reason
    assert to_jpeg(many_scans(500), SETTINGS).width == 500
    assert to_jpeg(many_directories(24_000), PhotoSettings(decode_seconds=1)).height == 48


class LoopLagFetcher(Fetcher):
    """Records the longest delay of the event loop."""

    longest = 0.0

    async def __aenter__(self) -> Fetcher:
        self._watch = asyncio.create_task(self._tick())
        return await super().__aenter__()

    async def _tick(self) -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.01)
            LoopLagFetcher.longest = max(LoopLagFetcher.longest, time.monotonic() - began)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.cancel()
        await super().__aexit__(kind, error, trace)


def test_slow_photos_do_not_block_the_event_loop(
    tmp_path: Path, catalogue: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = many_chunks(300_000)
    began = time.monotonic()
    to_jpeg(chunks, SETTINGS)
    decode_time = time.monotonic() - began
    monkeypatch.setitem(PHOTOS, "scans.jpg", many_scans(6000))
    monkeypatch.setitem(PHOTOS, "directories.tif", many_directories(24_000))
    monkeypatch.setitem(PHOTOS, "chunks.png", chunks)
    monkeypatch.setattr(shard_writer, "Fetcher", LoopLagFetcher)
    paths = ["scans.jpg", "plain.jpg", "directories.tif", "chunks.png", *(f"n/{n}.jpg" for n in range(20))]
    plan = make_plan(
        (str(catalogue(*paths)),),
        tmp_path / "out",
        PlanSettings(set="t", split="train", photos_per_shard=1000, photos="first", image_size="large"),
    )
    fetch = FetchSettings(allow_private=True, deadline=60, host_rate=0)
    settings = PhotoSettings(decode_seconds=0.1)
    shared_decoder().close()
    pack_shard(plan.shard(0), plan.digests[0], fetch, settings)
    rows = {row.url.rpartition("/")[2]: row.kind for row in read_ledger(plan.shard(0))}
    assert [rows[name] for name in paths[:4]] == ["bomb", "ok", "ok", "bomb"]
    assert len(list(read_samples(plan.shard(0)))) == 22
    assert LoopLagFetcher.longest < 0.9 * decode_time, "a photo was decoded between two answers"
