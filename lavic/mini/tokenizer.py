"""The miniature's tokenizer: one token a word, and two digits a token inside ids."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
SPACE = "▁"
# An id's letters, with the zeros that pad its number, are one token; the following tokens distinguish ids.
_SPLIT = rf"{SPACE}?B0[A-Z]+|{SPACE}?[A-Z]+00+|[0-9]{{2}}|[0-9]|{SPACE}?[^\w{SPACE}]"


def make_tokenizer(texts: Iterable[str], *, minimum: int = 1, limit: int = 4000) -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose vocabulary is the words of `texts`.

    Args:
        texts: All text of the training data.
        minimum: Words seen less often become `<unk>`.
        limit: Largest vocabulary; the most frequent words stay.
    """
    splitter = _pipeline(Tokenizer(models.WordLevel({UNKNOWN: 0}, unk_token=UNKNOWN)))
    counts: Counter[str] = Counter()
    for text in texts:
        normal = splitter.normalizer.normalize_str(re.sub(r"\[/?INST\]|<image>", " ", text))
        counts.update(word for word, _ in splitter.pre_tokenizer.pre_tokenize_str(normal))
    special = [PAD, BOS, EOS, UNKNOWN, IMAGE, "[INST]", "[/INST]"]
    pairs = [f"{n:02d}" for n in range(100)] + [str(n) for n in range(10)]
    words = [w for w, n in counts.most_common(limit) if n >= minimum and w not in {*special, *pairs}]
    vocabulary = {w: i for i, w in enumerate([*special, *pairs, *sorted(words)])}

    tokenizer = _pipeline(Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN)))
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, lstrip=True, rstrip=True) for t in special]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN
    )


def word_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that are words: keys of the curriculum's first levels."""
    return sorted(i for word, i in tokenizer.get_vocab().items() if word.startswith(SPACE) and word[1:].isalpha())


def digit_pair_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the hundred two-digit tokens."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[f"{n:02d}"] for n in range(100)]


def _pipeline(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace("\n", " \n "), normalizers.Replace(Regex(" +"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always"),
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    return tokenizer
