"""What the doctor sees."""

from __future__ import annotations

import pytest

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
