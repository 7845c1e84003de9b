"""Views and photo tokens are those of LLaVA-NeXT, with one grid or with its own choice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaNextImageProcessorPil

from lavic.model.loading import Backbone
from lavic.model.tiling import VIEWS, Geometry
from lavic.model.visual_tokens import all_tokens, cls_tokens, project

GEOMETRY = Geometry(size=24, patch=12, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
RELEASED = replace(GEOMETRY, grids=((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))
"""The grids of LLaVA-v1.6."""
SIZES = [(60, 60), (100, 40), (33, 120), (48, 48), (7, 300), (500, 499)]


def photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def stock_views(size: tuple[int, int], geometry: Geometry) -> np.ndarray:
    """What the processor of transformers makes of a photo."""
    stock = LlavaNextImageProcessorPil(
        size={"shortest_edge": 24},
        crop_size={"height": 24, "width": 24},
        image_grid_pinpoints=[[24 * rows, 24 * columns] for rows, columns in geometry.grids],
        image_mean=list(GEOMETRY.mean),
        image_std=list(GEOMETRY.std),
    )
    return np.asarray(stock(photo(size), return_tensors="np")["pixel_values"][0])


@pytest.mark.parametrize("size", SIZES)
def test_five_views_are_the_stock_processor_s_with_a_two_by_two_grid(size: tuple[int, int]) -> None:
    expected, views = stock_views(size, GEOMETRY), GEOMETRY.cut(photo(size))
    assert views.shape == expected.shape == (VIEWS, 3, 24, 24)
    np.testing.assert_allclose(views, expected, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(size=st.tuples(st.integers(1, 400), st.integers(1, 400)), geometry=st.sampled_from([GEOMETRY, RELEASED]))
def test_views_of_any_shape_are_the_stock_processor_s(size: tuple[int, int], geometry: Geometry) -> None:
    expected = stock_views(size, geometry)
    views = geometry.cut(photo(size))
    assert views.shape == expected.shape == (geometry.count(size), 3, 24, 24)
    np.testing.assert_allclose(views, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "views"),
    [((500, 500), 5), ((500, 350), 5), ((333, 500), 3), ((500, 333), 3), ((1500, 500), 4), ((336, 336), 3)],
)
def test_the_released_views_of_llava_1_6(size: tuple[int, int], views: int) -> None:
    """What was measured of the released code, at the model's own size."""
    geometry = replace(RELEASED, size=336, patch=14)
    assert geometry.count(size) == len(geometry.cut(Image.new("RGB", size))) == views
    assert geometry.most == 5


def test_grey_and_transparent_photos_become_rgb() -> None:
    assert GEOMETRY.cut(Image.new("L", (30, 20), 128)).shape == (VIEWS, 3, 24, 24)
    assert GEOMETRY.cut(Image.new("RGBA", (30, 20), (1, 2, 3, 4))).shape == (VIEWS, 3, 24, 24)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("geometry", [GEOMETRY, RELEASED], ids=["five", "lavic"])
def test_all_tokens_are_what_the_stock_model_makes(
    backbone: Backbone, size: tuple[int, int], geometry: Geometry
) -> None:
    views = torch.from_numpy(geometry.cut(photo(size)))[None]
    backbone.model.config.image_grid_pinpoints = [[24 * rows, 24 * columns] for rows, columns in geometry.grids]
    stock = backbone.model.model.get_image_features(
        views, torch.tensor([[size[1], size[0]]]), vision_feature_layer=-2, vision_feature_select_strategy="default"
    )
    ours = all_tokens(backbone.model, views, [size], [geometry.grid(size)])
    torch.testing.assert_close(ours[0], stock.pooler_output[0])


def test_a_photo_s_tokens_do_not_depend_on_its_batch_mates(backbone: Backbone) -> None:
    views = torch.from_numpy(np.stack([backbone.geometry.cut(photo(s, i)) for i, s in enumerate(SIZES)]))
    together = project(backbone.model, cls_tokens(backbone.model, views))
    assert together.shape == (len(SIZES), VIEWS, backbone.model.config.text_config.hidden_size)
    for row in range(len(SIZES)):
        alone = project(backbone.model, cls_tokens(backbone.model, views[row : row + 1]))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-6)
