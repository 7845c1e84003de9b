"""The tokenizer of LLaVA-v1.6-Mistral-7B: Mistral's SentencePiece vocabulary, then `<image>` and `<pad>`.

The vocabulary is not part of this package. It is `tokenizer.model.v1` of the Python package mistral-common. Beside
transformers and without its dependencies, that package breaks transformers' processors: it is installed apart.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from lavic.errors import ConfigError
from lavic.mini.realshape.sentencepiece_file import BPE, BYTE, CONTROL, NORMAL, UNKNOWN, SentencePieceFile

INSTALL = "pip install --no-deps --target vocabulary mistral-common"
FILE = "tokenizer.model.v1"
INNER = f"mistral_common/data/{FILE}"
SPACE = "▁"
IMAGE, PAD = "<image>", "<pad>"
PIECES = 32000
"""Pieces of Mistral's vocabulary; `<image>` and `<pad>` come next."""


def find_model(file: Path | None) -> Path:
    """The SentencePiece model: the file that is named, or that of the installed package.

    Raises:
        ConfigError: There is none; says how to get it.
    """
    if file is not None:
        if not file.is_file():
            raise ConfigError(f"--tokenizer {file}: no such file: `{INSTALL}` brings vocabulary/{INNER}")
        return file
    spec = importlib.util.find_spec("mistral_common")  # found, not imported: what it depends on may be missing
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (model := Path(folder).parent / INNER).is_file():
            return model
    raise ConfigError(
        f"Mistral's vocabulary is not here: get it with `{INSTALL}` (6.6 MB), then add --tokenizer vocabulary/{INNER}"
    )


def write_tokenizer(model: Path, folder: Path) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`, as the hub's folder has them.

    Raises:
        ConfigError: The file is of another kind of model.
        DataError: It cannot be read.
    """
    model_file = SentencePieceFile.read(model)
    is_plain_bpe = (
        model_file.byte_fallback
        and model_file.add_dummy_prefix
        and not (model_file.remove_extra_whitespaces or model_file.charsmap)
    )
    if model_file.model_type != BPE or len(model_file.pieces) != PIECES or not is_plain_bpe:
        raise ConfigError(
            f"--tokenizer {model}: not the vocabulary of Mistral-7B-Instruct-v0.2 (byte-pair encoding of {PIECES:,} "
            f"pieces with bytes as fallback): `{INSTALL}` brings it as vocabulary/{INNER}"
        )
    names = {kind: [piece.text for piece in model_file.pieces if piece.kind == kind] for kind in (UNKNOWN, CONTROL)}
    (unknown,), (bos, eos) = names[UNKNOWN], names[CONTROL]
    _convert(model_file, bos, unknown).save(str(folder / "tokenizer.json"))
    special = {"bos_token": bos, "eos_token": eos, "pad_token": PAD, "unk_token": unknown}
    special_tokens = {
        str(number): {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        | {"special": True}
        for number, text in enumerate((unknown, bos, eos))
    }
    added_tokens = {str(PIECES + n): {**special_tokens["0"], "content": text} for n, text in enumerate((IMAGE, PAD))}
    config: dict[str, Any] = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {**special_tokens, **added_tokens},
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": int(1e30),
        "padding_side": "left",
        "processor_class": "LlavaNextProcessor",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": False,
        **special,
    }
    for name, value in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def merges_of(model_file: SentencePieceFile) -> list[tuple[str, str]]:
    """Every pair of pieces that joins to a piece, the best first.

    SentencePiece joins the neighbours that make the piece of the highest score. A list of merges says the same if it is
    sorted by that score.
    """
    ids = {piece.text: number for number, piece in enumerate(model_file.pieces)}
    pairs: list[tuple[float, int, int, str, str]] = []
    for piece in model_file.pieces:
        if piece.kind != NORMAL:
            continue
        for split in range(1, len(piece.text)):
            left, right = piece.text[:split], piece.text[split:]
            if left in ids and right in ids:
                pairs.append((-piece.score, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(pairs)]


def _convert(model_file: SentencePieceFile, bos: str, unknown: str) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    ids = {piece.text: number for number, piece in enumerate(model_file.pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=ids, merges=merges_of(model_file), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [piece.text for piece in model_file.pieces if piece.kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in (*special, IMAGE, PAD)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, ids[bos])]
    )
    assert not any(piece.kind == BYTE and len(piece.text) != 6 for piece in model_file.pieces), (
        "bytes are written <0x00>"
    )
    return tokenizer
