"""Inputs of bug reports, on commands of this miniature. Other tests have inputs of the same kinds."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lavic.cli import main
from lavic.model.bundle import save_bundle
from lavic.model.config import ModelSettings
from lavic.model.hub import resolve
from lavic.model.item_store import write_manifest, write_part
from lavic.model.loading import Backbone, read_geometry
from lavic.storage.output_folder import lock_output_folder
from tests.external import EXTERNAL

from .conftest import Assets

CASES = EXTERNAL / "cases/train"
BASE = resolve(ModelSettings(name="mini"))
pytestmark = pytest.mark.external
BOM = b"\xef\xbb\xbf"


def case(name: str) -> Path:
    return CASES / name


@pytest.fixture(scope="module")
def store(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An item store of every item in the cases."""
    ids = dict.fromkeys(case("bom_ids.txt").read_text("utf-8-sig").split())
    for line in case("bom_test.jsonl").read_text("utf-8-sig").splitlines():
        ids |= dict.fromkeys(json.loads(line)["candidates_st"])
    items = [{"id": item, "key": f"{item}_0", "title": f"Acme mug {item[-2:]}"} for item in ids]
    folder = tmp_path_factory.mktemp("store")
    backbone = Backbone.load(ModelSettings(name=str(assets.bundle.parent / "base")))
    tokens = torch.randn(len(items), 5, backbone.vision_width, generator=torch.Generator().manual_seed(2))
    part = write_part(folder, "00000", items, tokens.half())
    write_manifest(folder, backbone, assets.bundle.parent / "vision", [part])
    return folder


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str]):
    """Runs a command; returns its exit code, what it printed and its error lines."""

    def run(*argv: object) -> tuple[int, str, list[str]]:
        code = main([str(arg) for arg in argv])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out, printed.err.splitlines()

    return run


def recommend(assets: Assets, store: Path, *options: object) -> tuple[object, ...]:
    return ("recommend", "--bundle", assets.bundle, "--store", store, *options)


def evaluate(assets: Assets, store: Path, *options: object) -> tuple[object, ...]:
    arms = ("--arms", "lavic", "list_order", "--draws", "50", "--tracking.system-every", "0")
    return ("evaluate", "--bundle", assets.bundle, "--store", store, *arms, *options)


def tune(assets: Assets, store: Path, *options: object) -> tuple[object, ...]:
    data = ("--train", case("bom_test.jsonl"), "--valid", case("bom_test.jsonl"))
    return ("tune", "--store", store, *data, "--model.name", assets.bundle.parent / "base", *options)


def test_a_byte_order_mark_is_ignored(assets: Assets, store: Path, tmp_path: Path, run_cli) -> None:
    marked = case("bom_test.jsonl")
    assert marked.read_bytes().startswith(BOM)
    plain = tmp_path / "plain.jsonl"
    plain.write_bytes(marked.read_bytes().removeprefix(BOM))
    answers = [run_cli(*recommend(assets, store, "--json", "--conversation", file)) for file in (marked, plain)]
    assert [code for code, *_ in answers] == [0, 0] and len(answers[0][1].splitlines()) == 2
    assert answers[0][1].replace(marked.stem, plain.stem) == answers[1][1]

    ids = run_cli(
        *recommend(assets, store, "--json", "--conversation", plain, "--candidates-file", case("bom_ids.txt"))
    )
    listed = case("bom_ids.txt").read_text("utf-8-sig").split()
    assert sorted(item["id"] for item in json.loads(ids[1].splitlines()[0])["ranking"]) == sorted(listed)

    for name, file in (("marked", marked), ("plain", plain)):
        assert run_cli(*evaluate(assets, store, "--test", f"set={file}", "--out", tmp_path / name))[0] == 0
    rankings = [
        [json.loads(line)["ranking"] for line in (tmp_path / name / "predictions.jsonl").read_text().splitlines()]
        for name in ("marked", "plain")
    ]
    assert rankings[0] == rankings[1] and len(rankings[0]) == 4, "two arms on two conversations"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ctx_list.jsonl", "ctx_list.jsonl:1: `context` is a list, not text"),
        ("empty_list.jsonl", "empty_list.jsonl: no candidate is left to rank"),
        ("deep.jsonl", "deep.jsonl:1: not JSON (nested more than 200 levels deep)"),
    ],
)
def test_values_of_a_wrong_shape_are_refused(assets: Assets, store: Path, run_cli, name: str, reason: str) -> None:
    code, printed, errors = run_cli(*recommend(assets, store, "--conversation", case(name)))
    assert (code, printed) == (2, "") and reason in errors[-1]


def test_invalid_utf8_on_standard_input_is_replaced(
    assets: Assets, store: Path, run_cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = case("latin1_stdin.txt").read_bytes()
    answers = []
    for stdin_bytes in (data, data.decode("utf-8", "replace").encode()):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin_bytes)))
        answers.append(run_cli(*recommend(assets, store, "--json", "--candidates-file", case("bom_ids.txt"))))
    assert answers[0][:2] == answers[1][:2] and answers[0][0] == 0
    assert "invalid characters were replaced" in answers[0][2][0]


def test_a_bundle_with_the_adapter_of_another_run_is_refused(
    assets: Assets, store: Path, tmp_path: Path, run_cli
) -> None:
    swapped = tmp_path / "bundle"
    shutil.copytree(assets.bundle, swapped)
    shutil.rmtree(swapped / "language_adapter")
    shutil.copytree(assets.titles_only / "language_adapter", swapped / "language_adapter")
    argv = ("recommend", "--bundle", swapped, "--store", store, "--conversation", case("bom_test.jsonl"))
    for _ in range(2):
        code, printed, errors = run_cli(*argv)
        assert (code, printed) == (2, "")
        assert "language_adapter: its digest is" in errors[-1] and "bundle.json records" in errors[-1]
        os.truncate(swapped / "language_adapter" / "adapter_model.safetensors", 1000)


def test_a_long_thread_is_ranked(assets: Assets, store: Path, tmp_path: Path, run_cli) -> None:
    command = [sys.executable, str(case("make_long_thread.py")), str(tmp_path / "rows.jsonl")]
    (tmp_path / "rows.jsonl").write_bytes(case("bom_test.jsonl").read_bytes().removeprefix(BOM))
    (tmp_path / "long.jsonl").write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)
    code, printed, _ = run_cli(*recommend(assets, store, "--json", "--conversation", tmp_path / "long.jsonl"))
    assert code == 0 and len(json.loads(printed)["ranking"]) == 10


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (("--deepspeed", "ds_offload.json"), "zero_optimization.offload_optimizer"),
        (("--lora.r", "0"), "--lora.r: input should be greater than 0, got '0'"),
        (("--lora.dropout", "1.5"), "--lora.dropout: input should be less than 1, got '1.5'"),
        (("--config", "distill-mini"), "a config for 'lavic distill', not for 'lavic tune'"),
    ],
)
def test_invalid_tune_settings_are_refused(
    assets: Assets, store: Path, tmp_path: Path, run_cli, option: tuple[str, str], reason: str
) -> None:
    value = case(option[1]) if option[0] == "--deepspeed" else option[1]
    code, _, errors = run_cli(*tune(assets, store, option[0], value, "--out", tmp_path / "run"))
    assert code == 2 and reason in errors[-1]
    assert not (tmp_path / "run").exists()


def test_an_output_path_that_is_a_file_is_refused(assets: Assets, store: Path, tmp_path: Path, run_cli) -> None:
    (tmp_path / "talk.txt").write_text("a lamp")
    for argv in (
        tune(assets, store, "--out", tmp_path / "talk.txt" / "run"),
        evaluate(assets, store, "--test", case("bom_test.jsonl"), "--out", tmp_path / "talk.txt"),
    ):
        code, _, errors = run_cli(*argv)
        assert code == 2 and "a file is where a folder is needed" in errors[-1]


def test_an_output_folder_in_use_is_refused(assets: Assets, store: Path, tmp_path: Path, run_cli) -> None:
    with lock_output_folder(tmp_path / "two"):
        code, _, errors = run_cli(*evaluate(assets, store, "--test", case("bom_test.jsonl"), "--out", tmp_path / "two"))
    assert code == 2 and "another lavic command is writing to this folder" in errors[-1]


def test_bundle_files_follow_the_umask(assets: Assets, tmp_path: Path) -> None:
    backbone = Backbone.load(ModelSettings(name=str(assets.bundle.parent / "base")))
    before = os.umask(0o002)
    try:
        vision = assets.bundle.parent / "vision"
        save_bundle(tmp_path / "bundle", backbone, vision=vision, max_length=512)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "bundle").rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert {path.stat().st_mode & 0o777 for path in files} == {0o664}


def test_a_base_model_saved_by_transformers_5_is_read(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").unlink()
    shutil.copy(case("transformers5_saved") / "processor_config.json", tmp_path / "base")
    assert read_geometry(tmp_path / "base") == read_geometry(BASE)
