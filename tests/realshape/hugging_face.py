"""What plain Hugging Face code makes of a model folder, an adapter, photos and lists.

Nothing of `lavic` is imported: the processor cuts photos and makes tokens, the stock model computes, one photo or one
candidate at a time, the head over every position. LoRA is two matrices beside a linear.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

DESCRIBE = "Title: {title}\nDescribe how it looks."
DESCRIBE_RELEASED = (
    "Describe how the product on the photo looks, in detail and without repeating its title.\n"
    "Title: {title}\nPhoto: {photo}\nAssistant:"
)


class HuggingFace:
    """The stock model and processor of a folder."""

    def __init__(self, base: Path, dtype: str, *, released: bool) -> None:
        """Loads a folder.

        Args:
            base: The folder.
            dtype: `float32` or `bfloat16`.
            released: Ask as the released code does, with the model's own choice of grids; else in the chat template's
                tags, with one grid of 2 x 2 for every shape.
        """
        self.released = released
        self._wanted: tuple[Path, ...] = ()
        self._enabled: set[Path] = set()
        self._item_tokens: dict[int, torch.Tensor] = {}
        self.known: dict[str, torch.Tensor] = {}
        """For the caller: what it has asked before."""
        loaded: Any = LlavaNextForConditionalGeneration.from_pretrained(
            base, dtype=getattr(torch, dtype), output_loading_info=True
        )
        self._model, info = loaded
        assert not any(info.values()), info
        self._model.requires_grad_(False).eval()
        self.processor = AutoProcessor.from_pretrained(base)
        self.tokenizer = self.processor.tokenizer
        if not released:
            size = self.model.config.vision_config.image_size
            self.processor.image_processor.image_grid_pinpoints = [[2 * size, 2 * size]]
            self.model.config.image_grid_pinpoints = [[2 * size, 2 * size]]

    @property
    def model(self) -> Any:
        """The stock model, with the adapters of this view of it."""
        self._enabled.clear()
        self._enabled.update(self._wanted)
        return self._model

    def adapted(self, *folders: Path) -> HuggingFace:
        """The same weights with saved adapters beside the linears that they are for: y = W x + (alpha / r) B A x."""
        view = copy.copy(self)
        view._wanted, view._item_tokens, view.known = folders, {}, {}
        for folder in folders:
            self._add(folder)
        return view

    def _add(self, folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        scale, enabled = config["lora_alpha"] / config["r"], self._enabled
        state = load_file(folder / "adapter_model.safetensors")
        modules = dict(self._model.named_modules())
        for key in sorted(k for k in state if k.endswith(".lora_A.weight")):
            name = key.removesuffix(".lora_A.weight")
            a, b = (state[f"{name}.lora_{x}.weight"].to(self._model.dtype) for x in "AB")
            modules[name.removeprefix("base_model.model.")].register_forward_hook(
                lambda _, inputs, output, a=a, b=b: (
                    output + (inputs[0] @ a.T) @ b.T * scale if folder in enabled else output
                )
            )

    # --- prompts ----------------------------------------------------------------------------------------

    def chat(self, *content: dict[str, str]) -> str:
        """A message in the tags of the chat template."""
        messages = [{"role": "user", "content": list(content)}]
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=True))

    def describe(self, photo: Image.Image, title: str) -> dict[str, torch.Tensor]:
        """Tokens and pixels of the question for a description."""
        if self.released:
            text = DESCRIBE_RELEASED.format(title=title, photo="<image>")
        else:
            text = self.chat({"type": "image"}, {"type": "text", "text": DESCRIBE.format(title=title)})
        return dict(self.processor(images=photo.convert("RGB"), text=text, return_tensors="pt"))

    def recommend(self, request: str, listed: Sequence[tuple[str, str, int]]) -> str:
        """The question for one of some (id, title, item tokens)."""
        lines = "".join(f"{id}: {title} {'<image>' * tokens}\n" for id, title, tokens in listed)
        if self.released:
            return (
                "Recommend one of the candidates in this conversation.\n"
                f"<submission>{request}</submission>\nCandidates:\n{lines}"
                "Answer with one ID and nothing else.\nAssistant:"
            )
        return self.chat({"type": "text", "text": f"Seeker: {request}\nCandidates:\n{lines}Which ID fits?"})

    # --- what the model makes of them -----------------------------------------------------------------

    @torch.no_grad()
    def item_tokens(self, photo: Image.Image) -> torch.Tensor:
        """The tower's last hidden state at [CLS] of each view, before the projector: [views, d_vision]."""
        if id(photo) not in self._item_tokens:
            pixels = self.processor.image_processor(photo.convert("RGB"), return_tensors="pt")["pixel_values"][0]
            tower = self.model.model.vision_tower
            self._item_tokens[id(photo)] = tower(pixels.to(self.model.dtype)).last_hidden_state[:, 0]
        return self._item_tokens[id(photo)]

    @torch.no_grad()
    def described(self, photo: Image.Image, title: str, most: int) -> str:
        """The greedy description, by the stock model's own way for photos."""
        prompt = self.describe(photo, title)
        prompt["pixel_values"] = prompt["pixel_values"].to(self.model.dtype)
        written = self.model.generate(**prompt, max_new_tokens=most, do_sample=False, temperature=None, top_p=None)
        return str(self.tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))

    @torch.no_grad()
    def description_losses(self, photo: Image.Image, title: str, text: str) -> torch.Tensor:
        """-log p of each token of a description and the end, from all tokens of the photo."""
        prompt = self.describe(photo, title)
        target = self._target(text)
        ids = torch.cat([prompt["input_ids"][0], target])[None]
        logits = self.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=prompt["pixel_values"].to(self.model.dtype),
            image_sizes=prompt["image_sizes"],
        ).logits
        return self._losses(logits, target)

    @torch.no_grad()
    def student_losses(self, photo: Image.Image, title: str, text: str) -> torch.Tensor:
        """The same from the [CLS] of each view."""
        vectors = self.model.model.multi_modal_projector(self.item_tokens(photo))
        if self.released:
            prompt = DESCRIBE_RELEASED.format(title=title, photo="<image>" * len(vectors))
        else:
            prompt = self.chat({"type": "image"}, {"type": "text", "text": DESCRIBE.format(title=title)})
            prompt = prompt.replace("<image>", "<image>" * len(vectors))
        return self.losses(prompt, vectors, text)

    @torch.no_grad()
    def losses(self, prompt: str, vectors: torch.Tensor, text: str) -> torch.Tensor:
        """-log p of each token of an answer and the end; `vectors` [n, d_text] stand at the image tokens."""
        target = self._target(text)
        ids = torch.cat([torch.tensor(self.tokenizer(prompt).input_ids), target])[None]
        embeds = self._embed(ids, vectors)
        return self._losses(self.model(inputs_embeds=embeds, attention_mask=torch.ones_like(ids)).logits, target)

    @torch.no_grad()
    def answer(self, prompt: str, vectors: torch.Tensor, most: int) -> str:
        """The greedy answer."""
        ids = torch.tensor([self.tokenizer(prompt).input_ids])
        written = self.model.generate(
            inputs_embeds=self._embed(ids, vectors),
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            do_sample=False,
            temperature=None,
            top_p=None,
        )
        return str(self.tokenizer.decode(written[0], skip_special_tokens=True))

    def _embed(self, ids: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        embeds = self.model.get_input_embeddings()(ids).clone()
        embeds[ids == self.model.config.image_token_id] = vectors.to(embeds.dtype)
        return embeds

    def _target(self, text: str) -> torch.Tensor:
        return torch.tensor([*self.tokenizer(text, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id])

    def _losses(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logprobs = logits[0, -len(target) - 1 : -1].float().log_softmax(-1)
        return -logprobs.gather(-1, target[:, None])[:, 0]
