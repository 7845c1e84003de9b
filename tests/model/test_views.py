"""Views and photo tokens are those of LLaVA-NeXT with one grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextImageProcessorPil

from lavic.model.backbone import Backbone
from lavic.model.compress import all_tokens, cls_tokens, project
from lavic.model.views import VIEWS, Geometry

GEOMETRY = Geometry(size=24, patch=12, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
SIZES = [(60, 60), (100, 40), (33, 120), (48, 48), (7, 300), (500, 499)]


def photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", SIZES)
def test_five_views_are_the_stock_processor_s_with_a_two_by_two_grid(size: tuple[int, int]) -> None:
    stock = LlavaNextImageProcessorPil(
        size={"shortest_edge": 24},
        crop_size={"height": 24, "width": 24},
        image_grid_pinpoints=[[48, 48]],
        image_mean=list(GEOMETRY.mean),
        image_std=list(GEOMETRY.std),
    )
    expected = np.asarray(stock(photo(size), return_tensors="np")["pixel_values"][0])
    views = GEOMETRY.cut(photo(size))
    assert views.shape == expected.shape == (VIEWS, 3, 24, 24)
    np.testing.assert_allclose(views, expected, atol=1e-5)


def test_grey_and_transparent_photos_become_rgb() -> None:
    assert GEOMETRY.cut(Image.new("L", (30, 20), 128)).shape == (VIEWS, 3, 24, 24)
    assert GEOMETRY.cut(Image.new("RGBA", (30, 20), (1, 2, 3, 4))).shape == (VIEWS, 3, 24, 24)


@pytest.mark.parametrize("size", SIZES)
def test_all_tokens_are_what_the_stock_model_makes(backbone: Backbone, size: tuple[int, int]) -> None:
    views = torch.from_numpy(backbone.geometry.cut(photo(size)))[None]
    stock = backbone.model.model.get_image_features(
        views, torch.tensor([[size[1], size[0]]]), vision_feature_layer=-2, vision_feature_select_strategy="default"
    )
    ours = all_tokens(backbone.model, views, [size])
    torch.testing.assert_close(ours[0], stock.pooler_output[0])


def test_a_photo_s_tokens_do_not_depend_on_its_batch_mates(backbone: Backbone) -> None:
    views = torch.from_numpy(np.stack([backbone.geometry.cut(photo(s, i)) for i, s in enumerate(SIZES)]))
    together = project(backbone.model, cls_tokens(backbone.model, views))
    assert together.shape == (len(SIZES), VIEWS, backbone.model.config.text_config.hidden_size)
    for row in range(len(SIZES)):
        alone = project(backbone.model, cls_tokens(backbone.model, views[row : row + 1]))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-6)
