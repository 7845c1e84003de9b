"""Files and folders that are whole or not there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lavic.storage.atomic import atomic_folder, atomic_write, remove_partial_files


def test_a_folder_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "bundle") as aside:
            (aside / "file").write_text(text)
    assert (tmp_path / "bundle" / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_block_that_fails_leaves_the_old_folder(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "bundle") as aside:
        (aside / "file").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "bundle") as aside:
        (aside / "file").write_text("half")
        raise RuntimeError
    assert (tmp_path / "bundle" / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_whose_writer_died_between_the_renames_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with atomic_folder(tmp_path / "bundle") as aside:
        (aside / "file").write_text("old")
    moved = Path.replace

    def dies(self: Path, target: Path) -> Path:
        if Path(target).name == "bundle":
            raise KeyboardInterrupt
        return moved(self, target)

    with (
        monkeypatch.context() as patched,
        pytest.raises(KeyboardInterrupt),
        atomic_folder(tmp_path / "bundle") as aside,
    ):
        patched.setattr(Path, "replace", dies)
    assert not (tmp_path / "bundle").exists()
    remove_partial_files(tmp_path)
    assert (tmp_path / "bundle" / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_an_old_folder_that_cannot_be_removed_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS a removed file that another process reads stays in its folder."""
    removed = shutil.rmtree

    def keep(folder: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(39, "Directory not empty", str(folder))

    for text in ("old", "new"):
        with monkeypatch.context() as patched, atomic_folder(tmp_path / "bundle") as aside:
            patched.setattr(shutil, "rmtree", keep)
            (aside / "file").write_text(text)
    assert (tmp_path / "bundle" / "file").read_text() == "new"
    assert len([*tmp_path.iterdir()]) == 2
    removed(tmp_path / "bundle")
    remove_partial_files(tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    atomic_write(tmp_path / "file", "whole")
    (tmp_path / ".file.12345678.part").write_text("half")
    (tmp_path / ".bundle.12345678.part").mkdir()
    remove_partial_files(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
