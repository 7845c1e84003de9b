"""What the jobs of tests need to run on SLURM."""

from __future__ import annotations

import pytest

from tests.train.mini_setup import Ground, make_ground


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return make_ground(tmp_path_factory.mktemp("ground"))
