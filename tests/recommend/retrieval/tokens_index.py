"""Indexes of the method `tokens`, and `lavic retrieve` with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pytest

from lavic.cli import main
from lavic.model.config import ModelSettings
from lavic.model.item_store import ItemStore, write_manifest, write_part
from lavic.model.loading import Backbone
from lavic.recommend.retrieval.build import add_methods, prepare_index
from lavic.recommend.retrieval.item_table import Row
from lavic.recommend.retrieval.vectors.tokens_builder import TokensBuilder
from lavic.recommend.retrieval.vectors.two_tower import TokensSettings, TwoTowerEncoder, tokens_settings
from tests.recommend.conftest import Assets


def make_index(folder: Path, ids: list[str], retriever: Path, store: Path, *, folds: bool = True, **more) -> None:
    recorded = tokens_settings(TokensSettings(retriever=retriever, folds=folds))
    folder.mkdir(exist_ok=True)
    manifest, before = prepare_index(folder, lambda: [Row(id, "") for id in ids], text={}, **more)
    add_methods(folder, manifest, [TokensBuilder(recorded, store, chunk_rows=16)], before)


class EmbeddedIds(list):
    """The ids of the items that the retriever embeds, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        embed = TwoTowerEncoder.items

        def items(encoder: TwoTowerEncoder, store: ItemStore, ids: Sequence[str]) -> np.ndarray:
            self.extend(ids)
            return embed(encoder, store, ids)

        monkeypatch.setattr(TwoTowerEncoder, "items", items)


def write_store(assets: Assets, folder: Path, counts: Sequence[int], changed: Collection[str]) -> Path:
    """Writes the item store in parts of the given sizes, with other tokens for the `changed` items."""
    old = ItemStore.open(assets.store)
    shutil.copytree(assets.store / "vision_adapter", folder / "vision_adapter", dirs_exist_ok=True)
    backbone = Backbone.load(ModelSettings(name=str(assets.store.parent / "base")), vision=False)
    parts, start = [], 0
    for number, count in enumerate(counts):
        ids = list(old.ids)[start : start + count]
        tokens = old.lookup(ids).clone()
        tokens[[row for row, id in enumerate(ids) if id in changed]] *= -1
        items = [{"id": id, "key": old.key(id), "title": old.title(id)} for id in ids]
        parts.append(write_part(folder, f"{number:05d}", items, tokens))
        start += count
    write_manifest(folder, backbone, assets.store / "vision_adapter", parts)
    return folder


def write_catalogue(folder: Path, store: ItemStore) -> Path:
    rows = [{"parent_asin": id, "title": store.title(id)} for id in store.ids]
    path = folder / "meta.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lists(path: Path) -> list[list[str]]:
    return [json.loads(line)["candidates_fused"] for line in path.read_text("utf-8").splitlines()]


def retrieve(assets: Assets, retriever: Path, folder: Path, out: str, *options: str) -> list[list[str]]:
    """`lavic retrieve`, with the index in `folder`; returns its lists."""
    argv = ["--items", folder / "meta.jsonl", "--store", assets.store, "--conversations", assets.test]
    argv += ["--index", folder / f"index-{out}", "--out", folder / f"{out}.jsonl", "--tokens.retriever", retriever]
    if "--methods" not in options:
        options += ("--methods", "tokens", "--k", "12")
    assert main(["retrieve", *map(str, argv), "--draws", "100", *options]) == 0
    return read_lists(folder / f"{out}.jsonl")
