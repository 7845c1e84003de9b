"""What the language model gets of a photo: all its patch tokens, or one for each view: its [CLS]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers.models.llava_next.modeling_llava_next import unpad_image

from lavic.model.inputs.token_loss import unwrap_peft
from lavic.model.tiling import Geometry, Grid


def cls_tokens(model: nn.Module, views: torch.Tensor) -> torch.Tensor:
    """The vision tower's last hidden state at position 0, for every view.

    Taken as the LaViC code takes it (arXiv 2503.23312): before the tower's closing layer norm, one layer after the
    patches that LLaVA's projector was trained on. Stage 1 teaches tower and projector to live with that.

    Args:
        model: A LlavaNext model, wrapped by PEFT or not.
        views: [..., 3, size, size]

    Returns:
        [..., d_vision]
    """
    tower = unwrap_peft(model).model.vision_tower
    hidden = tower(views.reshape(-1, *views.shape[-3:]).to(tower.dtype)).last_hidden_state
    return hidden[:, 0].unflatten(0, views.shape[:-3])


def project(model: nn.Module, cls: torch.Tensor) -> torch.Tensor:
    """Item tokens in the language model's space: [..., d_vision] -> [..., d_text]."""
    projector = unwrap_peft(model).model.multi_modal_projector
    return projector(cls.to(projector.linear_1.weight.dtype))


def patch_tokens(model: nn.Module, views: torch.Tensor) -> torch.Tensor:
    """The projected patches of every view, from the tower's layer that LLaVA's projector was trained on.

    Args:
        model: A LlavaNext model, wrapped by PEFT or not.
        views: [views, 3, size, size]

    Returns:
        [views, patches, d_text]
    """
    llava = unwrap_peft(model).model
    tower = llava.vision_tower
    output = tower(views.to(tower.dtype), output_hidden_states=True)
    return llava.multi_modal_projector(output.hidden_states[llava.config.vision_feature_layer][:, 1:])


def all_tokens(
    model: nn.Module, views: torch.Tensor, sizes: Sequence[tuple[int, int]], grids: Sequence[Grid] | None = None
) -> list[torch.Tensor]:
    """Every patch token of each photo, as LLaVA-NeXT packs them.

    The whole view's patches, then the rows of the grid without the black border, each row closed by the learnt newline.

    Args:
        model: A LlavaNext model, wrapped by PEFT or not.
        views: Of all photos, [..., 3, size, size].
        sizes: (width, height) of each photo before cutting.
        grids: Rows and columns of each photo's tiles; None: 2 x 2 each.

    Returns:
        For each photo [n, d_text]; n depends on its shape alone (2,928 for a square photo and LLaVA-v1.6).
    """
    llava = unwrap_peft(model).model
    config = llava.config
    patches = patch_tokens(model, views.reshape(-1, *views.shape[-3:]))
    grids = grids or [(2, 2)] * len(sizes)
    features = patches.split([1 + rows * columns for rows, columns in grids])
    side = config.vision_config.image_size // config.vision_config.patch_size
    newline = llava.image_newline
    packed = []
    for photo, (width, height), shape in zip(features, sizes, grids, strict=True):
        # [row, column, y, x, d] -> [d, row * y, column * x]
        grid = photo[1:].view(*shape, side, side, -1).permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
        grid = unpad_image(grid, (height, width))
        ends = newline[:, None, None].expand(-1, grid.shape[1], 1).to(grid.dtype)
        lines = torch.cat([grid, ends], dim=2).flatten(1).T
        packed.append(torch.cat([photo[0], lines]))
    return packed


def count_patch_tokens(geometry: Geometry, size: tuple[int, int]) -> int:
    """How many patch tokens `all_tokens` gives for a photo of (width, height) `size`."""
    side = geometry.size // geometry.patch
    width, height = size
    rows, columns = geometry.grid(size)
    grid = unpad_image(torch.empty(1, rows * side, columns * side, device="meta"), (height, width))
    return side**2 + grid.shape[1] * (grid.shape[2] + 1)


def most_patch_tokens(geometry: Geometry) -> int:
    """The most patch tokens that `all_tokens` gives for a photo of any shape."""
    side = geometry.size // geometry.patch
    return side**2 + max(rows * side * (columns * side + 1) for rows, columns in geometry.grids)
