"""Both stages written out plainly: what the toolkit's training is checked against.

One process, one sample at a time, one view at a time, the vision tower in the loop. Built on transformers, torch,
tarfile and json alone: photos are cut by the stock processor, prompts are spelled out here, LoRA is two matrices beside
a linear. Nothing of `lavic` is imported, so that a mistake of the toolkit cannot be made here as well.
"""

from __future__ import annotations

import io
import json
import random
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, LlavaNextForConditionalGeneration, LlavaNextImageProcessorPil


class PlainLavic:
    """A frozen LLaVA-NeXT with LoRA matrices beside its linears.

    Attributes:
        trained: The LoRA matrices that get gradients, by the name that PEFT gives them.
    """

    def __init__(self, base: Path, *, pinpoints: Sequence[Sequence[int]] | None = None) -> None:
        """Loads a model folder.

        Args:
            base: The folder.
            pinpoints: (height, width) of each grid; None: one grid of 2 x 2 views for every shape.
        """
        self.model = LlavaNextForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
        self.model.requires_grad_(False).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        processor = json.loads((base / "preprocessor_config.json").read_text())
        size = self.model.config.vision_config.image_size
        self.pinpoints = [list(p) for p in pinpoints or [(2 * size, 2 * size)]]
        self.model.config.image_grid_pinpoints = self.pinpoints
        self.processor = LlavaNextImageProcessorPil(
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            image_grid_pinpoints=self.pinpoints,
            image_mean=processor["image_mean"],
            image_std=processor["image_std"],
        )
        self.image_token = self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        self.trained: dict[str, nn.Parameter] = {}

    def adapt(self, folder: Path, *, train: bool) -> None:
        """Adds a saved adapter: y = W x + (alpha / r) B A x."""
        config = json.loads((folder / "adapter_config.json").read_text())
        scale = config["lora_alpha"] / config["r"]
        state = load_file(folder / "adapter_model.safetensors")
        modules = dict(self.model.named_modules())
        for key in sorted(k for k in state if k.endswith(".lora_A.weight")):
            name = key.removesuffix(".lora_A.weight")
            a, b = (nn.Parameter(state[f"{name}.lora_{x}.weight"].clone(), requires_grad=train) for x in "AB")
            modules[name.removeprefix("base_model.model.")].register_forward_hook(
                lambda _, inputs, output, a=a, b=b: output + scale * ((inputs[0] @ a.T) @ b.T)
            )
            if train:
                self.trained |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}

    # --- what the language model reads --------------------------------------------------------------

    def item_tokens(self, photo: Image.Image) -> torch.Tensor:
        """One vector for each view: the tower's last hidden state at [CLS], through the projector; [n, d_text]."""
        pixels = torch.tensor(self.processor(photo.convert("RGB"))["pixel_values"][0])
        rows = [self.model.model.vision_tower(view[None]).last_hidden_state[0, 0] for view in pixels]
        return torch.stack([self.model.model.multi_modal_projector(row) for row in rows])

    def losses(self, prompt: str, target: str, vectors: torch.Tensor | None) -> torch.Tensor:
        """-log p of each token of the target and of the end-of-sequence token behind it."""
        asked = self.tokenizer(prompt).input_ids
        answer = [*self.tokenizer(target, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
        ids = torch.tensor([[*asked, *answer]])
        embeds = self.model.get_input_embeddings()(ids)
        if vectors is not None:
            embeds = embeds.clone()
            embeds[ids == self.model.config.image_token_id] = vectors
        logits = self.model(inputs_embeds=embeds, attention_mask=torch.ones_like(ids)).logits[0].double()
        logprobs = logits.log_softmax(-1)
        return torch.stack([-logprobs[len(asked) + n - 1, token] for n, token in enumerate(answer)])

    # --- stage 1 --------------------------------------------------------------------------------------

    def student(self, photo: Image.Image, title: str, description: str) -> torch.Tensor:
        """Losses of a description read from one vector per view."""
        vectors = self.item_tokens(photo)
        return self.losses(self._describe(title, len(vectors)), description, vectors)

    def teacher(self, photo: Image.Image, title: str, description: str) -> torch.Tensor:
        """Losses of a description read from every patch, by the stock model's own path for photos."""
        cut = self.processor(photo.convert("RGB"), return_tensors="pt")
        features = self.model.model.get_image_features(
            cut["pixel_values"],
            cut["image_sizes"],
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
        vectors = features.pooler_output[0]
        return self.losses(self._describe(title, len(vectors)), description, vectors)

    def _describe(self, title: str, count: int) -> str:
        return f"[INST] {self.image_token * count}\nTitle: {title}\nDescribe how it looks. [/INST]"

    # --- stage 2 --------------------------------------------------------------------------------------

    def choice(
        self, context: str, listed: Sequence[str], target: str, titles: dict[str, str], photos: dict[str, Image.Image]
    ) -> torch.Tensor:
        """Losses of the right candidate's ID."""
        lines, vectors = "", []
        for item in listed:
            vectors.append(self.item_tokens(photos[item]))
            lines += f"{item}: {titles[item]} {self.image_token * len(vectors[-1])}\n"
        seeker = re.findall(r"<submission>(.*?)</submission>", context, re.DOTALL)
        comments = re.findall(r"<comment>(.*?)</comment>", context, re.DOTALL)
        turns = "".join(f"Seeker: {text}\n" for text in seeker) + "".join(f"Comment: {text}\n" for text in comments)
        prompt = f"[INST] {turns}Candidates:\n{lines}Which ID fits? [/INST]"
        return self.losses(prompt, target, torch.cat(vectors))


def read_photos(folder: Path) -> Iterator[tuple[str, str, str, Image.Image]]:
    """(item, title, description, photo) of each sample of a set of shards, in order."""
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
        for name in (name for name in members if name.endswith(".jpg")):
            meta = json.loads(members[name.replace(".jpg", ".json")])
            text = members[name.replace(".jpg", ".txt")].decode()
            yield meta["item_id"], meta["title"], text, Image.open(io.BytesIO(members[name]))


def read_choices(file: Path, key: str, seed: int) -> list[tuple[str, list[str], str]]:
    """(context, list, target) of each target of each row, as the documentation of `TuneDataset` says it.

    Other targets leave the list; a target that it lacks takes the place of a candidate, drawn from seed and position.
    """
    samples = []
    for row in map(json.loads, file.read_text().splitlines()):
        for target in row["gt_items"]:
            listed = [item for item in row[key] if item == target or item not in row["gt_items"]]
            if target not in listed:
                at = random.Random(f"{seed}/{len(samples)}").randrange(len(listed))
                listed = [*listed[:at], target, *listed[at + 1 :]]
            samples.append((row["context"], listed, target))
    return samples


def adamw_step(
    parameters: dict[str, nn.Parameter], loss: torch.Tensor, adam: torch.optim.Optimizer, clip: float
) -> float:
    """One optimizer step of one process; returns the gradient's norm before clipping."""
    adam.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), clip)
    adam.step()
    return float(norm)
