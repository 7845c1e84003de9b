"""Model folders of the real shape; commands in ranks that are forked, or started where a rank needs all cores."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from lavic.mini.realshape.folder import write_folder
from tests.realshape.stages import Lavic, as_words
from tests.train.fork_server import ForkServer


@pytest.fixture(scope="session")
def base(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """The model folder of 2 language and 3 vision layers: narrow, or of real widths; each is made once."""
    made: dict[bool, Path] = {}

    def make(narrow: bool) -> Path:
        if narrow not in made:
            made[narrow] = tmp_path_factory.mktemp("realshape") / "base"
            write_folder(made[narrow], vocabulary, layers=2, vision_layers=3, narrow=narrow, seed=0)
        return made[narrow]

    return make


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lavic]:
    """Commands in forked ranks of one thread each."""
    fork_server, folder = ForkServer(), tmp_path_factory.mktemp("logs")

    def lavic(argv: Sequence[object], *, ranks: int) -> str:
        log = folder / f"{argv[0]}-{len(list(folder.iterdir()))}"
        started = fork_server.start(as_words(argv), log, ranks=ranks)
        codes = fork_server.wait(started)
        said = "".join(rank.log.read_text() for rank in started)
        assert codes == [0] * ranks, said[-3000:]
        return said

    yield lavic
    fork_server.close()


@pytest.fixture(scope="session")
def alone() -> Lavic:
    """Commands in a process of their own with every core."""

    def lavic(argv: Sequence[object], *, ranks: int) -> str:
        assert ranks == 1
        env = {**os.environ, "LAVIC_DEVICE": "cpu"}
        done = subprocess.run(
            [sys.executable, "-m", "lavic", *as_words(argv)], env=env, capture_output=True, text=True, timeout=3600
        )
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        return done.stdout

    return lavic
