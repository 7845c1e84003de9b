"""Narrow bases in the shape of LLaVA-NeXT's other language models: their special tokens, their chat templates.

Vocabularies are drawn, templates are in our own words; what they write is what the hub's write.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
)

WORDS = """Seeker: Comment: I want a red striped shirt. Candidates: Which ID fits? Title: Describe how it looks. none of
these Acme Nova Classic Urban Shirt Mug The photo shows a blue dotted mug. B0MN1234567890: word, word."""
PARTS = """
{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>SEP' -}}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- 'BEFORE' + part['text'] + 'BEHIND' -}}{%- endfor -%}
"""


def parts(separator: str, before: str, behind: str) -> str:
    return PARTS.replace("SEP", separator).replace("BEFORE", before).replace("BEHIND", behind)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One family of bases."""

    bos: str
    eos: str
    others: tuple[str, ...] = ()
    """Special tokens besides."""
    bytes: bool = False
    """Whether the vocabulary is of bytes, as Llama 3's."""
    add_bos: bool = True
    """Whether the tokenizer puts `bos` before a text."""
    template: str


KINDS = {
    "vicuna": Kind(
        bos="<s>",
        eos="</s>",
        template="{%- for message in messages -%}{{- message['role'].upper() + ': ' -}}"
        + parts("\\n", "", " ")
        + "{%- endfor -%}{{- 'ASSISTANT:' if add_generation_prompt -}}",
    ),
    "llama3": Kind(
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        others=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bytes=True,
        template="{%- for message in messages -%}"
        "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}"
        + parts("", "\\n", "<|eot_id|>")
        + "{%- endfor -%}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' if add_generation_prompt -}}",
    ),
    "chatml": Kind(  # the 34b: its tokenizer puts no beginning-of-sequence token
        bos="<|startoftext|>",
        eos="<|im_end|>",
        others=("<|im_start|>",),
        add_bos=False,
        template="{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}"
        + parts("\\n", "", "<|im_end|>")
        + "{%- endfor -%}{{- '<|im_start|>assistant\\n' if add_generation_prompt -}}",
    ),
}


def make_tokenizer(kind: Kind) -> PreTrainedTokenizerFast:
    special = ["<unk>", kind.bos, kind.eos, *kind.others, "<pad>", "<image>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind.bytes:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet: Sequence[str] = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        alphabet = [chr(code) for code in (10, *range(33, 127))]
    tokenizer.train_from_iterator(
        [WORDS, kind.template],
        trainers.BpeTrainer(vocab_size=600, special_tokens=[], initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    bos_id = tokenizer.token_to_id(kind.bos)
    around = {"single": f"{kind.bos} $A" if kind.add_bos else "$A", "special_tokens": [(kind.bos, bos_id)]}
    tokenizer.post_processor = processors.TemplateProcessing(**around)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=kind.bos,
        eos_token=kind.eos,
        unk_token="<unk>",
        pad_token="<pad>",
    )


def make_base(folder: Path, name: str, *, template: bool = True) -> Path:
    """Writes a base of a family with random weights."""
    kind = KINDS[name]
    tokenizer = make_tokenizer(kind)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=24,
            patch_size=12,
        ).to_dict(),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1 if name == "llama3" else 2,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
        ).to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config)
    for parameter in model.parameters():  # further from zero than usual, so that every word counts
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not kind.add_bos:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "add_bos_token": False}))
    processor = {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": 24},
        "crop_size": {"height": 24, "width": 24},
        "image_grid_pinpoints": config.image_grid_pinpoints,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.28, 0.28, 0.28],
        "resample": 3,
        "do_pad": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    if template:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": kind.template}))
    return folder
