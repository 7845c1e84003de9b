"""A miniature with random weights and adapters, and an item store of random tokens."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lavic.data.conversations import read_conversations
from lavic.data.schema import Conversation
from lavic.mini import architecture
from lavic.mini.tokenizer import make_tokenizer
from lavic.model.bundle import save_bundle
from lavic.model.config import LoraSettings, ModelSettings
from lavic.model.item_store import ItemStore, write_manifest, write_part
from lavic.model.loading import Backbone
from lavic.model.lora import add_adapter, save_adapter
from lavic.recommend.retrieval.bm25.build import Bm25Builder, Bm25Settings
from lavic.recommend.retrieval.build import add_methods, prepare_index
from lavic.recommend.retrieval.item_table import Row

KEY = "candidates_st"
WORDS = "I want a red blue green striped plain dotted mug shoe bag . ? Any ideas one please Acme Nova Candidates"
ROLES = "Seeker: Comment: Which one? Answer with its ID. Title: Describe how it looks."


@dataclass(frozen=True)
class Assets:
    """Files that an evaluation starts from."""

    bundle: Path
    titles_only: Path
    store: Path
    test: Path
    conversations: list[Conversation]


def scramble(model: torch.nn.Module, seed: int) -> None:
    """Random values for the B matrices of a new adapter, so that it changes the scores."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_rows(ids: list[str], count: int, seed: int, size: int = 10) -> list[dict]:
    """Conversations of different lengths with lists of `size` items that include the target."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        words = rng.choices(WORDS.split(), k=rng.randrange(4, 40))
        context = f"<submission>{' '.join(words)} {number}</submission>\n"
        for _ in range(rng.randrange(3)):
            context += f"<comment>{' '.join(rng.choices(WORDS.split(), k=8))}</comment>\n"
        listed = rng.sample(ids, size)
        rows.append({"context": context, "context_items": [], "gt_items": [rng.choice(listed)], KEY: listed})
    return rows


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    folder = tmp_path_factory.mktemp("assets")
    torch.manual_seed(0)
    tokenizer = make_tokenizer([WORDS, ROLES, "B0MN"])
    architecture.save(architecture.build(architecture.Architecture(), tokenizer), tokenizer, folder / "base")
    settings = ModelSettings(name=str(folder / "base"))

    backbone = Backbone.load(settings)
    vision = add_adapter(backbone, "vision", LoraSettings(r=2))
    scramble(vision, 1)
    save_adapter(vision, folder / "vision", backbone, "vision")

    ids = [f"B0MN{number:06d}" for number in random.Random(0).sample(range(10**6), 60)]
    items = [{"id": item, "key": f"{item}_0", "title": f"Acme mug {item[-2:]}"} for item in ids]
    (folder / "store").mkdir()
    tokens = torch.randn(len(ids), 5, backbone.vision_width, generator=torch.Generator().manual_seed(2))
    part = write_part(folder / "store", "00000", items, tokens.half())
    write_manifest(folder / "store", backbone, folder / "vision", [part])

    for name, kind, seed in (("bundle", "items", 3), ("titles", "none", 4)):
        backbone = Backbone.load(settings)
        language = add_adapter(backbone, "language", LoraSettings(r=2))
        scramble(language, seed)
        save_bundle(folder / name, backbone, vision=folder / "vision", language=language, tokens=kind, max_length=512)

    write_rows(folder / "test.jsonl", make_rows(ids, 24, seed=5))
    conversations = read_conversations(folder / "test.jsonl", candidates=KEY)
    return Assets(folder / "bundle", folder / "titles", folder / "store", folder / "test.jsonl", conversations)


@pytest.fixture(scope="session")
def index(assets: Assets) -> Path:
    """A BM25 index of the store's items and of two items that are not in the store."""
    store = ItemStore.open(assets.store)
    rows = [Row(item, store.title(item)) for item in store.ids] + [Row(f"B0NOSTORE{n}", "Acme mug 00") for n in (1, 2)]
    folder = assets.store.with_name("index")
    folder.mkdir()
    manifest, before = prepare_index(folder, lambda: rows, text={"fields": ["title"]})
    add_methods(folder, manifest, [Bm25Builder(Bm25Settings())], before)
    return folder
