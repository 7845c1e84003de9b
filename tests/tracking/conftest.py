"""An empty MLflow store."""

from __future__ import annotations

import shutil

import pytest

from lavic.tracking.mlflow_client import connect
from lavic.tracking.mlflow_store import default_store_uri


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """An MLflow database without runs: making one takes seconds, copying it none."""
    place = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{place}").search_experiments()
    return place


@pytest.fixture
def store_uri(template, tmp_path):
    """The address of an empty database beside the runs of a test, tmp_path/runs."""
    (tmp_path / "runs").mkdir()
    shutil.copy(template, tmp_path / "runs" / "mlflow.db")
    return default_store_uri(tmp_path / "runs")
