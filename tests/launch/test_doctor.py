"""What the doctor sees."""

from __future__ import annotations

import importlib.metadata

import pytest
from packaging.requirements import Requirement

from lavic.launch import doctor


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("LAVIC_DEVICE", "cpu")


def test_this_machine_is_examined(capsys):
    code = doctor.main([])
    text = capsys.readouterr().out
    for name in ("python", "torch", "pydantic", "memory", "disk"):
        assert f" {name} " in text
    assert code == (1 if "\nmissing " in f"\n{text}" else 0)


def test_packages_are_checked_against_the_bounds_of_setup():
    found = {check.name: check for check in doctor._packages()}
    assert {"pydantic", "ray", "deepspeed", "mlflow", "torch"} <= set(found)
    assert found["pydantic"].state == "ok"


def test_every_package_of_a_command_is_checked_once():
    extras = set(importlib.metadata.metadata("lavic").get_all("Provides-Extra")) - {"dev"}
    requirements = [Requirement(line) for line in importlib.metadata.requires("lavic")]
    needed = [each.name for each in requirements if not each.marker or any(doctor._applies(each, e) for e in extras)]
    assert sorted(check.name for check in doctor._packages()) == sorted(set(needed))


def test_a_missing_package_names_its_extra_and_an_optional_one_is_a_note(monkeypatch):
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {check.name: (check.state, check.fix) for check in doctor._packages()}
    assert found["orjson"] == ("missing", "pip install 'lavic[reddit]'")
    assert found["fastapi"] == ("missing", "pip install 'lavic[serve]'")
    assert found["pillow-heif"] == ("note", "pip install 'lavic[heif]'")


def test_names_stand_in_one_column(capsys):
    doctor.main([])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("ok ", "note ", "missing "))]
    assert len(lines) > 20
    column = 8 + doctor._NAME_WIDTH
    assert all(line[column - 1] == " " and line[column] != " " for line in lines)


def test_folders_that_libraries_write_to_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "a" / "cache"))
    monkeypatch.setattr(doctor.tempfile, "gettempdir", lambda: "/" + "t" * 60)
    found = {check.name: check for check in doctor._folders()}
    assert found["home"].value == str(tmp_path)
    assert found["Hugging Face cache"].value.startswith(f"{tmp_path}/a/cache, ")
    assert "TMPDIR" in found["temporary folder"].fix


def test_no_home_is_missing(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    (check,) = doctor._folders()
    assert check.state == "missing" and "HOME" in check.fix


@pytest.mark.parametrize(
    ("script", "state", "found"),
    [
        ("echo 'gpu*'; echo long; echo long", "ok", "partitions: gpu*, long"),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "note", "Unable to contact slurm controller"),
        ("exec sleep 60", "note", "no answer within"),
    ],
)
def test_a_slurm_that_does_not_answer_is_told_from_one_that_does(tmp_path, monkeypatch, script, state, found):
    for name, text in (("sbatch", "exit 0"), ("sinfo", script)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(doctor, "_SLURM_S", 1.0)
    check = doctor._slurm()
    assert check.state == state and found in check.value
