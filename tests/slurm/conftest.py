"""What the jobs of tests need to run on SLURM."""

from __future__ import annotations

import pytest

from tests.train.assets import Assets, make_assets


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    return make_assets(tmp_path_factory.mktemp("assets"))
