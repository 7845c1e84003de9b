"""The packaged base model: its files, its skills, and the weights that a new miniature copies."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from lavic.errors import DataError
from lavic.mini import catalog
from lavic.mini.architecture import Architecture, build, copy_weights
from lavic.mini.catalog import make_conversation, pick_candidates
from lavic.mini.drawing import draw
from lavic.mini.tokenizer import SPACE, make_tokenizer
from lavic.model.config import ModelSettings
from lavic.model.hub import resolve
from lavic.model.inputs.label_mask import collate
from lavic.model.inputs.token_loss import token_losses
from lavic.model.loading import Backbone
from lavic.model.prompts import Candidate, describe, recommend
from lavic.model.visual_tokens import all_tokens, cls_tokens, project

pytestmark = pytest.mark.slow


def test_the_packaged_model_is_small_and_has_no_pickles() -> None:
    folder = resolve(ModelSettings(name="mini"))
    assert sum(f.stat().st_size for f in folder.iterdir()) < 5_000_000
    assert not [f for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pkl")]
    # its training log is in the folder
    log = [json.loads(line) for line in (folder / "pretrain.jsonl").read_text().splitlines()]
    assert log[-1]["phase"] == "vision" and log[-1]["held_out_perplexity"] < 1.1


def test_descriptions_need_all_tokens_of_a_photo(mini: Backbone, products: list[catalog.Product]) -> None:
    sample = products[:64]
    photos = [draw(p.kind, p.colour, p.pattern, p.seed) for p in sample]
    views = torch.from_numpy(np.stack([mini.geometry.cut(photo) for photo in photos]))
    with torch.no_grad():
        all_views = all_tokens(mini.model, views, [photo.size for photo in photos])
        five = list(project(mini.model, cls_tokens(mini.model, views)))
        loss = {}
        for name, tokens in (("all", all_views), ("five", five)):
            examples = [
                mini.encoder.example(describe(p.title, len(t)), p.description)
                for p, t in zip(sample, tokens, strict=True)
            ]
            loss[name] = token_losses(mini.model, collate(examples, mini.encoder.pad), torch.cat(tokens)).mean().item()
    assert loss["all"] < 0.15
    assert loss["five"] > 1.0


def test_the_candidate_whose_text_fits_the_request_is_chosen(mini: Backbone, products: list[catalog.Product]) -> None:
    """The language model finds the line that fits the request, which comes first in the prompt."""
    rng = random.Random(5)
    correct = 0
    for target in rng.sample(products, 40):
        listed = pick_candidates(target, products, rng)
        candidates = [Candidate(p.id, p.title, p.look_words) for p in listed]
        turns = [("seeker", make_conversation(target, rng).split(">")[1].split("<")[0])]
        pieces = recommend(turns, candidates, photo_tokens=0)
        answers = [mini.encoder.example(pieces, p.id) for p in listed]
        with torch.no_grad():
            losses = token_losses(mini.model, collate(answers, mini.encoder.pad), None).view(10, -1).sum(1)
        correct += listed[int(losses.argmin())].id == target.id
    assert correct >= 30


def test_copy_weights_copies_language_model_and_vision_side(mini: Backbone) -> None:
    tokenizer = make_tokenizer(["blue circle", "a bicycle in turquoise", "blue bicycle"])
    model = build(Architecture(), tokenizer)
    new = tokenizer.get_vocab()[f"{SPACE}bicycle"]
    copied = copy_weights(model, tokenizer, resolve(ModelSettings(name="mini")))
    assert 100 < copied.words < len(tokenizer) and copied.vision
    packaged = mini.model.model.language_model
    assert torch.equal(model.model.language_model.layers[2].mlp.up_proj.weight, packaged.layers[2].mlp.up_proj.weight)
    for word in (f"{SPACE}blue", "17"):
        row, packaged_row = tokenizer.get_vocab()[word], mini.tokenizer.get_vocab()[word]
        assert torch.equal(model.lm_head.weight[row], mini.model.lm_head.weight[packaged_row])
    assert model.model.language_model.embed_tokens.weight[new].std() > 0.1
    for side in ("vision_tower", "multi_modal_projector"):
        packaged_side = getattr(mini.model.model, side).state_dict()
        side_weights = getattr(model.model, side).state_dict()
        assert all(torch.equal(value, packaged_side[name]) for name, value in side_weights.items())
    # a larger vision tower keeps its random weights, another language model is refused
    larger = build(Architecture(vision_width=128), tokenizer)
    assert not copy_weights(larger, tokenizer, resolve(ModelSettings(name="mini"))).vision
    with pytest.raises(DataError, match="another hidden_size"):
        copy_weights(build(Architecture(width=64), tokenizer), tokenizer, resolve(ModelSettings(name="mini")))
