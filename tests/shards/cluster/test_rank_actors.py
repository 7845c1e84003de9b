"""`--ray.workers`: ranks of describe and embed as Ray actors."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from lavic.cli import main
from lavic.data.descriptions import read_descriptions
from lavic.distributed.ray_session import RaySettings, ray_session
from lavic.shards.cluster.rank_actors import _forwarding
from tests.train.assets import Assets, make_assets

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    return make_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    before = dict(os.environ)
    os.environ |= {"LAVIC_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with ray_session(RaySettings(cpus=2)):
        yield
    os.environ.clear()
    os.environ.update(before)


def test_describe_and_embed_give_what_one_process_gives(
    assets: Assets, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = ["--model.name", str(assets.base)]
    describe = ["describe", "--shards", str(assets.photos), *base, "--max-new-tokens", "4"]
    sidecars = [assets.photos / f"photos-train-{n:06d}.tar" for n in range(3)]
    embed = ["embed", "--shards", str(assets.photos), *base]
    outputs = {}
    for name, more in (("one", []), ("ray", ["--ray.workers", "2"])):
        assert main([*embed, "--out", str(tmp_path / name), *more]) == 0
        for file in assets.photos.glob("*descriptions*"):
            file.unlink()
        assert main([*describe, *more]) == 0
        outputs[name] = [read_descriptions(shard) for shard in sidecars if shard.exists()]
    assert outputs["one"] == outputs["ray"] and outputs["one"]
    parts = sorted(path.name for path in (tmp_path / "one").glob("*.safetensors"))
    assert parts
    for part in parts:
        assert (tmp_path / "one" / part).read_bytes() == (tmp_path / "ray" / part).read_bytes()
    assert "24 items" in capfd.readouterr().out


def test_a_rank_s_error_comes_back_with_its_code(assets: Assets, tmp_path: Path, capfd) -> None:
    words = [
        "embed",
        "--shards",
        str(assets.photos),
        "--model.name",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*words, "--ray.workers", "2"]) == 2
    assert "lavic embed: error:" in capfd.readouterr().out


def test_the_third_ctrl_c_gives_ranks_up_that_do_not_listen() -> None:
    sent: list[int] = []
    rank = SimpleNamespace(signal=SimpleNamespace(remote=sent.append))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), _forwarding([rank]):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert sent == [signal.SIGTERM, signal.SIGINT, signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
    assert len(sent) == 3
    assert signal.getsignal(signal.SIGINT) is before
