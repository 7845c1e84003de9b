"""The recommender as an MLflow model, asked through `mlflow models serve`."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from lavic.cli import main
from lavic.model.bundle import BundleInfo
from lavic.model.item_store import ItemStore
from lavic.recommend.recommender import Recommender
from tests.fork_server import ForkServer

from .conftest import Assets

pytestmark = pytest.mark.slow

mlflow = pytest.importorskip("mlflow")


@pytest.mark.parametrize("text", ["[" * 100_000, "[red] mug", "[1, 2"])
def test_text_that_begins_with_a_bracket_is_not_parsed_as_json(text: str):
    import pandas

    from lavic.recommend.mlflow_model import RecommenderModel

    queries_seen = []
    model = RecommenderModel()
    model._recommender = SimpleNamespace(recommend_batch=lambda queries: queries_seen.extend(queries) or [])
    model.predict(None, pandas.DataFrame([{"conversation": text}]))
    assert [query.conversation for query in queries_seen] == [text]


@pytest.mark.parametrize("columns", [[], ["candidates"]])
def test_rows_without_a_conversation_are_refused(columns: list[str]):
    """MLflow drops the columns that it does not know, such as a misspelt one, and with the last column the rows."""
    import pandas

    from lavic.recommend.mlflow_model import RecommenderModel

    with pytest.raises(mlflow.exceptions.MlflowException, match="give `conversation`, a text, or `messages`"):
        RecommenderModel().predict(None, pandas.DataFrame(columns=columns))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--uri", "http://127.0.0.1:9"], "MLflow at http://127.0.0.1:9: API request to "),
        (["--base", "nowhere"], "nowhere"),
        (["--experiment", ""], "--experiment: string should have at least 1 character"),
    ],
)
def test_errors_of_register_are_one_line(
    assets: Assets, tmp_path: Path, fork_server: ForkServer, options: list[str], message: str
):
    argv = ["--bundle", assets.bundle, "--store", assets.store, "--name", "shop"]
    if "--uri" not in options:
        options = [*options, "--uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    env = {**os.environ, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    result = fork_server.lavic("register", *argv, *options, cwd=tmp_path, env=env)
    assert result.returncode == 2, result.stderr
    last = result.stderr.splitlines()[-1]  # MLflow and PyTorch may warn before it
    assert last.startswith("lavic register: error: ") and message in last
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def registered(assets: Assets, index: Path, tmp_path_factory: pytest.TempPathFactory):
    """A registered model of a run folder that is not in MLflow."""
    folder = tmp_path_factory.mktemp("mlflow")
    shutil.copytree(assets.bundle, folder / "tune" / "bundle")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    argv = ("--bundle", folder / "tune" / "bundle", "--store", assets.store, "--index", index, "--uri", uri)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["register", *map(str, argv), "--name", "shop"]) == 0
        yield uri
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)


def test_the_registered_model_is_code_and_artifacts_without_pickles(assets: Assets, registered: str):
    client = mlflow.MlflowClient(registered)
    folder = Path(registered.removeprefix("sqlite:///")).parent
    assert client.get_experiment_by_name("lavic").artifact_location == (folder / "mlartifacts").as_uri()
    assert not (folder / "mlruns").exists()  # MLflow's default is below the folder that the command runs in
    version = client.get_model_version("shop", "1")
    info = BundleInfo.read(assets.bundle)
    assert version.tags["lavic.language_adapter"] == info.language_adapter
    assert version.tags["lavic.store"] == ItemStore.open(assets.store).manifest.digest
    assert client.get_run(version.run_id).data.tags["lavic.fingerprint"] == info.fingerprint
    mlflow.set_tracking_uri(registered)
    files = [path for path in Path(mlflow.artifacts.download_artifacts("models:/shop/1")).rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"lavic_model.py", "bundle.json", "manifest.json", "input_example.json"} <= names
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".joblib", ".bin"))]
    logged = mlflow.models.get_model_info("models:/shop/1")
    assert "conversation" in logged.signature.inputs.input_names() and logged.signature.params.params[0].name == "k"


@pytest.mark.slow
def test_requests_to_mlflow_models_serve(assets: Assets, index: Path, registered: str):
    with socket.create_server(("127.0.0.1", 0)) as unused_port:
        port = unused_port.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "-m", "models:/shop/1"]
    env = {**os.environ, "MLFLOW_TRACKING_URI": registered, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    options = ["-h", "127.0.0.1", "-p", str(port), "--workers", "1"]
    process = subprocess.Popen([*command, *options], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client:
            deadline = time.monotonic() + 180
            while True:
                try:
                    if client.get("/ping").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                assert process.poll() is None and time.monotonic() < deadline, "mlflow models serve does not start"
                time.sleep(0.2)
            recommender = Recommender.load(assets.bundle, assets.store, index)
            listed = recommender.store.ids[:6]
            rows = [
                {"conversation": "a red mug", "candidates": listed},
                {"conversation": "an acme mug", "candidates": []},
            ]
            answer = client.post("/invocations", json={"dataframe_records": rows, "params": {"k": 4}})
            assert answer.status_code == 200, answer.text
            first, second = answer.json()["predictions"]
            assert [item["id"] for item in first["items"]] == [
                item.id for item in recommender.recommend("a red mug", listed, k=4)
            ]
            assert [item["id"] for item in second["items"]] == [
                item.id for item in recommender.recommend("an acme mug", k=4)
            ]
            messages = [{"role": "user", "content": "a red mug"}]
            chat = client.post("/invocations", json={"inputs": [{"messages": messages, "candidates": listed}]})
            assert [item["id"] for item in chat.json()["predictions"][0]["items"]][:4] == [
                item["id"] for item in first["items"]
            ]
            misspelt = client.post("/invocations", json={"dataframe_records": [{"Conversation": "a red mug"}]})
            assert misspelt.status_code == 400 and "give `conversation`" in misspelt.text
            bare = client.post("/invocations", json=[{"conversation": "a red mug"}])
            assert bare.status_code == 400 and "dataframe_records" in bare.text
            wrong = client.post("/invocations", json={"inputs": [{"conversation": "a", "candidates": ["B0NOWHERE0"]}]})
            assert wrong.status_code == 400 and "B0NOWHERE0 is not in the item store" in wrong.text
    finally:
        process.terminate()
        process.wait(60)
