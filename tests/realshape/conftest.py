"""Model folders of the real shape; commands in ranks that are forked, or started where a rank needs all cores."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lavic.mini.realshape.folder import write_folder
from tests.fork_server import ForkServer
from tests.realshape.stages import Lavic, as_words


@pytest.fixture(scope="session")
def base(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """The model folder of 2 language and 3 vision layers: narrow, or of real widths; each is made once."""
    folders: dict[bool, Path] = {}

    def make(narrow: bool) -> Path:
        if narrow not in folders:
            folders[narrow] = tmp_path_factory.mktemp("realshape") / "base"
            write_folder(folders[narrow], vocabulary, layers=2, vision_layers=3, narrow=narrow, seed=0)
        return folders[narrow]

    return make


@pytest.fixture(scope="session")
def forked(fork_server: ForkServer) -> Lavic:
    """Commands in forked ranks of one thread each."""

    def lavic(argv: Sequence[object], *, ranks: int) -> str:
        done = fork_server.lavic(*as_words(argv), ranks=ranks)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        return done.stdout

    return lavic


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
