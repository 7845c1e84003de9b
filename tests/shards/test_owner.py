"""One crawl writes to a folder; what an earlier one left running stops before it puts anything in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from lavic.data.place import place
from lavic.errors import ConfigError
from lavic.shards.fetch import FetchSettings
from lavic.shards.owner import Superseded, check, owned
from lavic.shards.pack import pack_shard
from lavic.shards.photo import PhotoSettings
from lavic.shards.plan import make_plan
from lavic.shards.tasks import PlanSettings


def test_a_folder_has_one_owner_at_a_time(tmp_path: Path) -> None:
    with owned(tmp_path / "out") as name:
        check(tmp_path / "out", name)
        with pytest.raises(ConfigError, match="another crawl"), owned(tmp_path / "out"):
            pass
        (tmp_path / "out/.x.tar.0123.part").write_text("of a worker that was killed")
    assert not list(tmp_path.rglob("*.part"))
    with owned(tmp_path / "out") as another:
        check(tmp_path / "out", another)
        with pytest.raises(Superseded):
            check(tmp_path / "out", name)


def test_in_an_object_store_the_last_to_come_has_it(tmp_path: Path) -> None:
    folder = place(f"memory://{tmp_path.name}/owned")
    with owned(folder) as name, owned(folder) as another:
        check(folder, another)
        with pytest.raises(Superseded, match="has taken this folder over"):
            check(folder, name)


def test_a_worker_left_over_puts_nothing_in_place(tmp_path: Path, catalogue: Callable[..., Path]) -> None:
    chosen = PlanSettings(set="t", split="train", photos_per_shard=9, photos="first", image_size="large")
    plan = make_plan((str(catalogue("n/1.jpg")),), tmp_path / "out", chosen)
    with owned(plan.folder) as left_over:
        pass
    fetch = FetchSettings(allow_private=True)
    with owned(plan.folder) as name:
        for owner in (left_over, name):
            publish = partial(check, plan.folder, owner)
            try:
                pack_shard(plan.shard(0), plan.digests[0], fetch, PhotoSettings(), publish=publish)
                assert owner == name
            except Superseded:
                assert owner == left_over and not plan.shard(0).exists() and not list(tmp_path.rglob("*.part"))
    assert plan.shard(0).exists()
