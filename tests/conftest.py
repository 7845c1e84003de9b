"""What tests of several folders stand on."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import NotStarted, cluster, missing
from tests.slurm.running import Slurm


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A SLURM of two nodes, one for all tests."""
    if why := missing():
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # others may be too long a path for a socket
    try:
        with cluster(folder) as running:
            yield running
    except NotStarted as error:
        pytest.skip(f"SLURM is installed but does not start here: {error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
