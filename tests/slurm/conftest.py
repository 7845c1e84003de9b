"""One SLURM of two nodes for all tests here, and what the jobs need to run on it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Slurm, cluster, missing
from tests.train.ground import Ground, make_ground


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    if why := missing():
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's own are too long a path for a socket
    try:
        with cluster(folder) as running:
            yield running
    except (TimeoutError, OSError) as error:
        pytest.skip(f"SLURM does not start here: {error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return make_ground(tmp_path_factory.mktemp("ground"))
