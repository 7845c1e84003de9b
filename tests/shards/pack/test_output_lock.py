"""One crawl writes to a folder; what an earlier one left running stops before it puts anything in place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from lavic.errors import ConfigError
from lavic.shards.http.fetch_settings import FetchSettings
from lavic.shards.image.normalize import PhotoSettings
from lavic.shards.pack.output_lock import Superseded, check_owner, lock_output
from lavic.shards.pack.shard_writer import pack_shard
from lavic.shards.plan.crawl_plan import make_plan
from lavic.shards.plan.photo_tasks import PlanSettings
from lavic.storage.paths import as_path


def test_a_folder_has_one_owner_at_a_time(tmp_path: Path) -> None:
    with lock_output(tmp_path / "out") as name:
        check_owner(tmp_path / "out", name)
        with pytest.raises(ConfigError, match="another lavic command"), lock_output(tmp_path / "out"):
            pass
        (tmp_path / "out/.x.tar.0123.part").write_text("of a worker that was killed")
    assert not list(tmp_path.rglob("*.part"))
    with lock_output(tmp_path / "out") as another:
        check_owner(tmp_path / "out", another)
        with pytest.raises(Superseded):
            check_owner(tmp_path / "out", name)


NO_FLOCK = "#include <errno.h>\nint flock(int file, int operation) { errno = ENOSYS; return -1; }\n"


@pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc to build a file system without flock")
def test_without_locks_the_crawl_goes_on_with_a_warning(tmp_path: Path) -> None:
    """As on Lustre that is mounted without -o flock: every process sees ENOSYS."""
    (tmp_path / "noflock.c").write_text(NO_FLOCK)
    library = tmp_path / "noflock.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "noflock.c"], check=True)
    code = (
        "import logging, sys; from pathlib import Path\n"
        "from lavic.shards.pack.output_lock import check_owner, lock_output\n"
        "logging.basicConfig(format='%(message)s')\n"
        "with lock_output(Path(sys.argv[1])) as name:\n    check_owner(Path(sys.argv[1]), name)\n"
    )
    env = {**os.environ, "LD_PRELOAD": str(library)}
    words = [sys.executable, "-c", code, str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1 and "no file locks (Function not implemented)" in done.stderr


def test_a_refused_input_leaves_nothing_behind(tmp_path: Path) -> None:
    out = tmp_path / "sets" / "train"
    with pytest.raises(ConfigError, match="refused"), lock_output(out):
        (out / "plan").mkdir()
        raise ConfigError("refused")
    assert not list(tmp_path.iterdir())
    out.mkdir(parents=True)
    (out / "mine.txt").write_text("of the user")
    with pytest.raises(ConfigError), lock_output(out):
        raise ConfigError("refused")
    (out / "mine.txt").unlink()
    with pytest.raises(ConfigError), lock_output(out):
        raise ConfigError("refused")
    assert out.is_dir() and not list(out.iterdir()), "a folder of the user's stays"
    with pytest.raises(ConfigError), lock_output(out):
        (out / "rejected.jsonl").touch()
        raise ConfigError("refused")
    assert [path.name for path in out.iterdir()] == ["rejected.jsonl"], "which the error names"

    remote = as_path(f"memory://{tmp_path.name}/refused")
    with pytest.raises(ConfigError), lock_output(remote):
        raise ConfigError("refused")
    assert not (remote / ".owner").exists()


def test_in_an_object_store_the_last_to_come_has_it(tmp_path: Path) -> None:
    folder = as_path(f"memory://{tmp_path.name}/lock_output")
    with lock_output(folder) as name, lock_output(folder) as another:
        check_owner(folder, another)
        with pytest.raises(Superseded, match="has taken over this folder"):
            check_owner(folder, name)


def test_a_worker_left_over_puts_nothing_in_place(tmp_path: Path, catalogue: Callable[..., Path]) -> None:
    chosen = PlanSettings(set="t", split="train", photos_per_shard=9, photos="first", image_size="large")
    plan = make_plan((str(catalogue("n/1.jpg")),), tmp_path / "out", chosen)
    with lock_output(plan.folder) as left_over:
        pass
    fetch = FetchSettings(allow_private=True)
    with lock_output(plan.folder) as name:
        for owner in (left_over, name):
            publish = partial(check_owner, plan.folder, owner)
            try:
                pack_shard(plan.shard(0), plan.digests[0], fetch, PhotoSettings(), before_publish=publish)
                assert owner == name
            except Superseded:
                assert owner == left_over and not plan.shard(0).exists() and not list(tmp_path.rglob("*.part"))
    assert plan.shard(0).exists()
