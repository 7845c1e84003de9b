"""`lavic doctor`: packages, folders and SLURM."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest
from packaging.requirements import Requirement

from lavic.launch import doctor


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("LAVIC_DEVICE", "cpu")


def test_doctor_reports_this_machine(capsys):
    code = doctor.main([])
    text = capsys.readouterr().out
    for name in ("python", "torch", "pydantic", "memory", "disk"):
        assert f" {name} " in text
    assert code == (1 if "\nmissing " in f"\n{text}" else 0)


def test_packages_are_checked_against_setup_py():
    checks = {check.name: check for check in doctor._packages()}
    assert {"pydantic", "ray", "deepspeed", "mlflow", "torch"} <= set(checks)
    assert checks["pydantic"].state == "ok"


def test_every_required_package_is_checked_once():
    extras = set(importlib.metadata.metadata("lavic").get_all("Provides-Extra")) - {"dev"}
    requirements = [Requirement(line) for line in importlib.metadata.requires("lavic")]
    names = [
        requirement.name
        for requirement in requirements
        if not requirement.marker or any(doctor._applies(requirement, e) for e in extras)
    ]
    assert sorted(check.name for check in doctor._packages()) == sorted(set(names))


def test_a_missing_package_names_its_extra(monkeypatch):
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    checks = {check.name: (check.state, check.fix) for check in doctor._packages()}
    assert checks["orjson"] == ("missing", "pip install 'lavic[reddit]'")
    assert checks["fastapi"] == ("missing", "pip install 'lavic[serve]'")
    assert checks["pillow-heif"] == ("note", "pip install 'lavic[heif]'")


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("raise OSError('libcudart.so.12: cannot open shared object file')", "cannot be imported: libcudart.so.12: c"),
        ("import a_missing_dependency", "cannot be imported: No module named 'a_missing_dependency'"),
    ],
)
def test_a_torch_that_cannot_be_imported_is_reported(tmp_path, monkeypatch, code, value):
    (tmp_path / "torch.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    check = doctor._gpus()
    assert check.state == "missing" and value in check.value and "pip install torch" in check.fix


def test_a_gpu_that_cannot_be_used_is_reported(monkeypatch):
    def busy(index: int) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nmore")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", busy)
    check = doctor._gpus()
    assert check.state == "missing" and check.value.endswith("all CUDA-capable devices are busy or unavailable")


def test_names_are_aligned_in_one_column(capsys):
    doctor.main([])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("ok ", "note ", "missing "))]
    assert len(lines) > 20
    column = 8 + doctor._NAME_WIDTH
    assert all(line[column - 1] == " " and line[column] != " " for line in lines)


def test_home_cache_and_temporary_folders_are_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "a" / "cache"))
    monkeypatch.setattr(doctor.tempfile, "gettempdir", lambda: "/" + "t" * 60)
    checks = {check.name: check for check in doctor._folders()}
    assert checks["home"].value == str(tmp_path)
    assert checks["Hugging Face cache"].value.startswith(f"{tmp_path}/a/cache, ")
    assert "TMPDIR" in checks["temporary folder"].fix


def test_a_missing_home_folder_is_reported(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    (check,) = doctor._folders()
    assert check.state == "missing" and "HOME" in check.fix


@pytest.mark.parametrize(
    ("script", "state", "value"),
    [
        ("echo 'gpu*'; echo long; echo long", "ok", "partitions: gpu*, long"),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "note", "Unable to contact slurm controller"),
        ("exec sleep 60", "note", "no answer within"),
    ],
)
def test_a_slurm_that_does_not_answer_is_a_note(tmp_path, monkeypatch, script, state, value):
    for name, text in (("sbatch", "exit 0"), ("sinfo", script)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(doctor, "_SLURM_S", 1.0)
    check = doctor._slurm()
    assert check.state == state and value in check.value
