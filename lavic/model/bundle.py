"""The bundle: everything that a recommender needs besides the base model and the item store.

BUNDLE/vision_adapter/     of stage 1 (absent if stage 2 was trained on the plain base model's tokens)
BUNDLE/language_adapter/   of stage 2 (absent after stage 1 alone)
BUNDLE/tokenizer/          used in training
BUNDLE/bundle.json         written last
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lavic.errors import ConfigError, DataError, first_line
from lavic.model import lora, prompts
from lavic.model.config import Kind, ModelSettings
from lavic.model.hub import fingerprint, resolve, tokenizer_digest
from lavic.model.loading import Backbone
from lavic.model.prompts import ChatFormat
from lavic.storage.atomic import atomic_folder, atomic_write
from lavic.tracking.run_metadata import versions

if TYPE_CHECKING:
    from peft import PeftModel

    from lavic.model.item_store import ItemStore

Tokens = Literal["items", "none"]
"""What follows a candidate's title: its item tokens, or nothing."""

FILE = "bundle.json"
PLAIN = {prompts.version_of("inst"), prompts.version_of("lavic")}
"""Prompt versions that imply the tags around the prompts."""


@dataclass(frozen=True, kw_only=True)
class BundleInfo:
    """`bundle.json`."""

    base: str
    """Name of the base model."""
    revision: str | None
    fingerprint: str
    """Digest of the base model's weights."""
    geometry: dict[str, object]
    vision_adapter: str | None
    """Digest of the vision adapter; None: item tokens of the plain base model."""
    language_adapter: str | None
    """Digest of the language adapter; None: stage 1 only."""
    tokens: Tokens = "items"
    max_length: int = 2048
    """Maximum length of a prompt, tokens."""
    tokens_per_item: int | None = None
    """How many item tokens of each candidate are used, the first ones; None: all."""
    none: bool = False
    """Whether every list ends with "none of these" as a possible answer."""
    list_size: int | None = None
    """Candidates of the longest training list; None in bundles of older versions."""
    prompt_version: str = prompts.VERSION
    chat: dict[str, str | None] | None = None
    """Tags around the prompts (`ChatFormat`); None: those of LLaVA-v1.6-Mistral, or none in the style `lavic`."""
    tokenizer: str | None = None
    """Digest of the base model's tokenizer; None in bundles of older versions."""
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        *,
        vision_adapter: str | None,
        language_adapter: str | None,
        revision: str | None = None,
        **training: Any,
    ) -> BundleInfo:
        """The description of a bundle of a loaded base model; `training`: the fields from `tokens` to `list_size`."""
        return cls(
            base=backbone.name,
            revision=revision,
            fingerprint=backbone.fingerprint,
            geometry=backbone.geometry.as_dict(),
            vision_adapter=vision_adapter,
            language_adapter=language_adapter,
            **training,
            prompt_version=backbone.encoder.version,
            chat=None if backbone.encoder.version in PLAIN else asdict(backbone.encoder.chat),
            tokenizer=backbone.tokenizer_digest,
            versions=versions("lavic", "torch", "transformers", "peft"),
        )

    @classmethod
    def read(cls, folder: Path) -> BundleInfo:
        """Reads `bundle.json`.

        Raises:
            DataError: It is missing, or of another prompt version.
        """
        path = folder / FILE
        if not path.is_file():
            inner = folder / "bundle" / FILE
            hint = f"; did you mean {folder / 'bundle'}?" if inner.is_file() else ": train it with `lavic tune`"
            raise DataError(f"{folder}: not a bundle (no {FILE}){hint}")
        try:
            info = cls(**json.loads(path.read_text(encoding="utf-8")))
            style = prompts.style_of(info.prompt_version)
            damaged = style is not None and prompts.version_of(style, info.chat_format) != info.prompt_version
        except (TypeError, ValueError, OSError) as e:
            raise DataError(f"{path}: not the description of a bundle ({first_line(e)})") from e
        if damaged:
            raise DataError(f"{path}: its chat tags do not match its prompt version: copy the bundle again")
        if prompts.style_of(info.prompt_version) is None:
            raise DataError(
                f"{path}: trained with prompt version {info.prompt_version}, this lavic has {prompts.VERSION}: "
                "use the lavic that trained it, or train again"
            )
        return info

    @property
    def chat_format(self) -> ChatFormat:
        """Tags around the prompts."""
        return prompts.MISTRAL if self.chat is None else ChatFormat(**self.chat)  # type: ignore[arg-type]

    def check_adapters(self, folder: Path, kinds: Sequence[Kind] = ("vision", "language")) -> None:
        """Compares the adapters with their digests.

        Raises:
            DataError: An adapter has changed; names it.
        """
        digests = {"vision": self.vision_adapter, "language": self.language_adapter}
        for kind in kinds:
            name, saved = f"{kind}_adapter", digests[kind]
            if saved is None:
                if (folder / name).exists():
                    raise DataError(
                        f"{folder / name}: {FILE} records no such adapter: remove it, or copy the bundle again"
                    )
                continue
            if (digest := lora.digest(folder / name)) != saved:
                raise DataError(
                    f"{folder / name}: its digest is {digest}, {FILE} records {saved}: the files were changed, "
                    "truncated or taken from another run; copy the bundle again from its run"
                )

    def base_model(self, folder: Path, name: str | None = None) -> ModelSettings:
        """Finds the base model that the bundle was trained on and compares its fingerprint; does not load it.

        Args:
            folder: The bundle.
            name: Folder or Hugging Face name of the base model, if it is not the recorded one.

        Raises:
            ConfigError: The model is not found.
            DataError: It is another model.
        """
        model = ModelSettings(
            name=name or self.base,
            revision=None if name else self.revision,
            views="lavic" if "grids" in self.geometry else "five",
            prompt=prompts.style_of(self.prompt_version) or "inst",
        )
        try:
            source = resolve(model)
            actual = fingerprint(source)
        except ConfigError as error:
            hint = "" if name else "; if it was moved, give its folder with --model.name"
            raise ConfigError(f"{folder}: its base model {model.name}: {error}{hint}") from None
        if actual != self.fingerprint:
            raise DataError(
                f"{folder}: trained on the base model {self.base} with fingerprint {self.fingerprint}; {model.name} "
                f"has {actual}: give the right model with --model.name"
            )
        if self.tokenizer and (actual := tokenizer_digest(source)) != self.tokenizer:
            raise DataError(
                f"{folder}: trained with another tokenizer ({self.tokenizer}) than {model.name} has ({actual}): "
                "restore the base model's tokenizer files, or give the right model with --model.name"
            )
        return model

    def check_store(self, store: ItemStore) -> None:
        """Refuses a store whose tokens do not match the bundle's training. No model needs to be loaded.

        Raises:
            DataError: It does not match.
        """
        store.check_base(self.fingerprint)
        if self.tokens == "items" and store.manifest.geometry != self.geometry:
            raise DataError(
                f"{store.folder}: an item store with other views of the photos than the bundle's: run `lavic embed` "
                "with the --model.views of its training"
            )
        if self.tokens == "items" and store.manifest.vision_adapter != self.vision_adapter:
            raise DataError(
                f"{store.folder}: an item store of another vision adapter ({store.manifest.vision_adapter}) than the "
                f"bundle's ({self.vision_adapter}): run `lavic embed` with the bundle's adapter"
            )


@dataclass
class Bundle:
    """A loaded bundle: the base model with its adapters."""

    backbone: Backbone
    info: BundleInfo
    merged: bool = True
    """Whether the language adapter may be merged into the weights; if not, `lora.adapter_off` can disable it."""

    @classmethod
    def load(
        cls,
        folder: Path,
        device: torch.device | str = "cpu",
        *,
        vision: bool = False,
        language: bool = True,
        merge: bool = True,
        adapted: bool = True,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        base: str | None = None,
    ) -> Bundle:
        """Loads base model and adapters.

        Args:
            folder: A bundle.
            device: Of the model.
            vision: Whether to load the vision tower; item tokens need only the projector.
            language: Whether to apply the language adapter; False gives the model before stage 2.
            merge: False keeps the language adapter separate, so that `lora.adapter_off` can disable it.
            adapted: False applies no adapter: the base model.
            dtype: Of the weights.
            base: Folder or Hugging Face name of the base model, if it is not the recorded one.

        Raises:
            ConfigError: The base model is not found.
            DataError: The bundle is incomplete, an adapter has changed, or the base model is another one.
        """
        info = BundleInfo.read(folder)
        info.check_adapters(folder)
        model = replace(info.base_model(folder, base), dtype=dtype)
        backbone = Backbone.load(model, device, vision=vision, chat=info.chat_format)
        if info.vision_adapter and adapted:
            lora.apply_adapter(backbone, folder / "vision_adapter", "vision")
        if info.language_adapter and language and adapted:
            lora.apply_adapter(backbone, folder / "language_adapter", "language", merge=merge)
        return cls(backbone, info, merge)


def save_bundle(
    folder: Path,
    backbone: Backbone,
    *,
    vision: PeftModel | Path | None,
    language: PeftModel | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
    **info: Any,
) -> BundleInfo:
    """Writes a bundle, atomically.

    Args:
        folder: The bundle; an older one is replaced.
        backbone: The base model of the adapters.
        vision: The trained stage-1 model, or the folder of its adapter, or None for the plain base model's tokens.
        language: The trained stage-2 model.
        weights: Of the trained model in full precision, see `save_adapter`.
        info: Revision of the base model, and fields of `BundleInfo` about the training, see `BundleInfo.of`.
    """
    with atomic_folder(folder) as part:
        if isinstance(vision, Path):
            lora.check_adapter(vision, "vision", backbone.fingerprint)
            lora.copy_adapter(vision, part / "vision_adapter")
        elif vision is not None:
            lora.save_adapter(vision, part / "vision_adapter", backbone, "vision", weights)
        if language is not None:
            lora.save_adapter(language, part / "language_adapter", backbone, "language", weights)
        backbone.tokenizer.save_pretrained(str(part / "tokenizer"))
        bundle_info = BundleInfo.of(
            backbone,
            vision_adapter=lora.digest(part / "vision_adapter") if vision is not None else None,
            language_adapter=lora.digest(part / "language_adapter") if language is not None else None,
            **info,
        )
        atomic_write(part / FILE, json.dumps(asdict(bundle_info), indent=2) + "\n")
    return bundle_info
