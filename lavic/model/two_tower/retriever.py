"""A trained two-tower retriever: a bundle without language adapter, with its heads.

BUNDLE/bundle.json, vision_adapter/, tokenizer/   see `lavic.model.bundle`
BUNDLE/retriever/head.safetensors      trained on all conversations
                 fold-0.safetensors    trained on all conversations outside of a fold, and so on
                 submissions.npy       hashes of the training requests
                 retriever.json        written last
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file

from lavic.data.schema import Conversation
from lavic.errors import DataError, first_line
from lavic.model.bundle import Bundle
from lavic.model.item_store import ItemStore
from lavic.model.two_tower.features import FeatureExtractor
from lavic.model.two_tower.folds import FINAL, fold_of
from lavic.model.two_tower.head import load_head
from lavic.storage.atomic import atomic_folder
from lavic.storage.checksummed_json import digest_json
from lavic.storage.file_digest import file_sha256

FOLDER, FILE = "retriever", "retriever.json"
HEAD, SUBMISSIONS = "head.safetensors", "submissions.npy"
FORMAT = 1


def head_file(fold: int) -> str:
    """Name of the file of a fold's head; with `FINAL`, of the head trained on all conversations."""
    return HEAD if fold == FINAL else f"fold-{fold}.safetensors"


@dataclass(frozen=True, kw_only=True)
class RetrieverInfo:
    """`retriever.json`."""

    query_features: int
    """Width of a conversation's features."""
    item_features: int
    """Width of an item's features."""
    dim: int
    """Width of the vectors."""
    hidden: int
    """Width of the projections' hidden layers; 0: linear."""
    folds: int
    """Number of folds."""
    max_length: int
    """Maximum length of a conversation, tokens."""
    sha256: dict[str, str]
    """Digests of the other files, by name."""
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """Digest of the heads and of everything else that their vectors depend on besides the base model."""
        return digest_json(asdict(self))

    @classmethod
    def read(cls, bundle: Path) -> RetrieverInfo:
        """Reads `retriever.json` and compares the files with it.

        Raises:
            DataError: The retriever is missing or incomplete.
        """
        path = bundle / FOLDER / FILE
        if not path.is_file():
            raise DataError(f"{bundle}: no retriever (no {FOLDER}/{FILE}): train it with `lavic tune-retriever`")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["format"] != FORMAT:
                raise DataError(f"{path}: format {raw['format']}, this version reads {FORMAT}: train it again")
            info = cls(**raw)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: not the description of a retriever ({first_line(error)})") from None
        for name, digest in info.sha256.items():
            file = bundle / FOLDER / name
            if not file.is_file() or file_sha256(file) != digest:
                raise DataError(f"{file}: missing or changed since training: copy the bundle again from its run")
        return info


def save_retriever(
    bundle: Path, heads: Mapping[int, Path], submissions: np.ndarray, *, dim: int, hidden: int, max_length: int
) -> RetrieverInfo:
    """Adds a retriever to a bundle, atomically.

    Args:
        heads: Files by fold, with `FINAL`.
        submissions: `submission_hashes` of the training conversations.
    """
    state = load_file(heads[FINAL])
    with atomic_folder(bundle / FOLDER) as part:
        for fold, file in heads.items():
            shutil.copyfile(file, part / head_file(fold))
        np.save(part / SUBMISSIONS, submissions)
        info = RetrieverInfo(
            query_features=len(state["query.mean"]),
            item_features=len(state["item.mean"]),
            dim=dim,
            hidden=hidden,
            folds=len(heads) - 1,
            max_length=max_length,
            sha256={file.name: file_sha256(file) for file in sorted(part.iterdir())},
        )
        (part / FILE).write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")
    return info


def find_retriever(folder: Path) -> Path:
    """The bundle of a retriever: the folder itself, or that of a run.

    Raises:
        DataError: It has none.
    """
    for bundle in (folder / "bundle", folder):
        if (bundle / FOLDER / FILE).is_file():
            return bundle
    raise DataError(f"{folder}: no retriever here (no bundle/{FOLDER}): run `lavic tune-retriever` to its end")


class Retriever:
    """A retriever with its base model: embeds conversations and items in the same space.

    Raises:
        DataError: A head cannot be read.
    """

    def __init__(self, bundle: Bundle, folder: Path, info: RetrieverInfo) -> None:
        self.bundle, self.info = bundle, info
        self.features = FeatureExtractor(bundle.backbone, tokens=bundle.info.tokens, max_length=info.max_length)
        sizes = {"dim": info.dim, "hidden": info.hidden}
        sizes |= {"query_features": info.query_features, "item_features": info.item_features}
        self.heads = {
            fold: load_head(folder / FOLDER / head_file(fold), **sizes) for fold in (FINAL, *range(info.folds))
        }
        self._submissions = np.load(folder / FOLDER / SUBMISSIONS, allow_pickle=False)

    @classmethod
    def load(
        cls,
        folder: Path,
        device: torch.device | str = "cpu",
        *,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        base: str | None = None,
    ) -> Retriever:
        """Loads a retriever and its base model.

        Args:
            folder: A run of `lavic tune-retriever`, or its bundle.
            device: Of the base model; the heads stay on the CPU.
            dtype: Of the base model's weights.
            base: Folder or Hugging Face name of the base model, if it is not the recorded one.

        Raises:
            ConfigError: The base model is not found.
            DataError: The retriever is incomplete, or the base model is another one.
        """
        bundle = find_retriever(folder)
        info = RetrieverInfo.read(bundle)
        return cls(Bundle.load(bundle, device, dtype=dtype, base=base), bundle, info)

    def folds(self, conversations: Sequence[Conversation]) -> list[int]:
        """The fold of each conversation, see `fold_of`."""
        return [fold_of(conversation, self._submissions, self.info.folds) for conversation in conversations]

    @torch.inference_mode()
    def embed_queries(self, conversations: Sequence[Conversation], folds: Sequence[int] | None = None) -> torch.Tensor:
        """Vectors of conversations, float32 [n, dim], to compare with items of the same head.

        Args:
            folds: The head of each; None: its fold.
        """
        folds = self.folds(conversations) if folds is None else folds
        features = self.features.queries(conversations)
        vectors = torch.zeros(len(conversations), self.info.dim)
        for head in set(folds):
            rows = [row for row, fold in enumerate(folds) if fold == head]
            vectors[rows] = self.heads[head].query(features[rows])
        return vectors

    @torch.inference_mode()
    def embed_items(self, store: ItemStore, ids: Sequence[str], folds: Sequence[int] = (FINAL,)) -> torch.Tensor:
        """Vectors of items by several heads, float32 [heads, n, dim]; of a store that `check_store` accepts."""
        features = self.features.items(store, ids)
        return torch.stack([self.heads[fold].item(features) for fold in folds])
