"""LoRA adapters: creation, saving and loading.

Stage 1 adapts every linear layer of vision tower and projector, stage 2 those of the language model (not its head). The
patterns are anchored, because a bare `q_proj` would match in the vision tower and in the language model.

A loaded adapter computes the same as in training. It is merged into float32 weights, but not into bfloat16 weights,
whose precision is coarser than most of its updates.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from lavic.errors import ConfigError, DataError, first_line
from lavic.model.config import Kind, LoraSettings
from lavic.model.hub import check_weights
from lavic.model.loading import Backbone
from lavic.storage.atomic import atomic_folder

if TYPE_CHECKING:
    from peft import PeftModel

TARGETS: dict[Kind, str] = {
    "vision": r"model\.vision_tower\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
    r"|model\.multi_modal_projector\.linear_[12]",
    "language": r"model\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
}
NOTE = "lavic.json"
"""Beside PEFT's files: the base model, kind and photo geometry of the adapter."""
WEIGHTS = "adapter_model.safetensors"
MERGE_TOLERANCE = 1e-3
"""Largest rounding error of a merged weight, relative to the adapter's update."""


def add_adapter(backbone: Backbone, kind: Kind, lora: LoraSettings) -> PeftModel:
    """Adds a new trainable adapter to the frozen base model, in place.

    The adapter's weights are float32 even if the base's are bfloat16, in which updates of 5e-5 vanish. DeepSpeed keeps
    them as master weights, and the model then has a bfloat16 copy (`Engine.weights`).
    """
    model = wrap(backbone.model, kind, lora)
    for parameter in trainable(model):
        parameter.data = parameter.data.float()
    return model


def wrap(model: nn.Module, kind: Kind, lora: LoraSettings) -> PeftModel:
    """Adds a new adapter to a LlavaNext model, in place, in the model's precision."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=TARGETS[kind])
    with quiet():
        return get_peft_model(model, config)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses warnings of PEFT and transformers that do not concern the user."""
    with warnings.catch_warnings():
        # The base model may have another name here ("mini" or its path); its fingerprint is compared instead.
        warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path` was renamed")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters for an optimizer."""
    return [p for p in model.parameters() if p.requires_grad]


def save_adapter(
    model: PeftModel,
    folder: Path,
    backbone: Backbone,
    kind: Kind,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes a PEFT adapter folder with our note, atomically.

    Args:
        model: The base model with the adapter.
        folder: Of the adapter.
        backbone: The base model.
        kind: Of the adapter.
        weights: The adapter's weights in full precision, by their names in the task, which prefixes them with `model.`
            (`Engine.weights`); None: the model's.
    """
    state = None if weights is None else {k.removeprefix("model."): w for k, w in weights.items()}
    with atomic_folder(folder) as part:
        model.save_pretrained(str(part), safe_serialization=True, state_dict=state)
        config = json.loads((part / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = backbone.name
        (part / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (part / "README.md").unlink(missing_ok=True)  # an empty model card
        note = {
            "kind": kind,
            "base": backbone.name,
            "fingerprint": backbone.fingerprint,
            "geometry": backbone.geometry.as_dict(),
        }
        (part / NOTE).write_text(json.dumps(note, indent=2) + "\n")


def check_adapter(folder: Path, kind: Kind, fingerprint: str, geometry: Mapping[str, object] | None = None) -> None:
    """Checks that a folder has a complete adapter of this kind for this base model.

    Raises:
        DataError: It has not.
    """
    missing = [name for name in (NOTE, WEIGHTS, "adapter_config.json") if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder}: not an adapter of LaViC ({missing[0]} is missing)")
    note = read_note(folder)
    if note["kind"] != kind:
        raise DataError(f"{folder}: a {note['kind']} adapter, but a {kind} adapter is needed")
    if note["fingerprint"] != fingerprint:
        raise DataError(
            f"{folder}: made for another base model ({note['base']}, {note['fingerprint']}) than the one loaded "
            f"({fingerprint}): give its base model with --model.name, or train again"
        )
    if kind == "vision" and geometry and note.get("geometry", geometry) != geometry:
        raise DataError(f"{folder}: trained on other views of the photos: use the --model.views of its training")
    try:
        check_weights(folder / WEIGHTS)
    except (ConfigError, OSError) as error:
        raise DataError(f"{folder}: the adapter cannot be read ({first_line(error)})") from None


def read_note(folder: Path) -> dict[str, Any]:
    """The note that `save_adapter` wrote beside an adapter.

    Raises:
        DataError: The note cannot be read.
    """
    try:
        note = json.loads((folder / NOTE).read_text("utf-8"))
        if not {"kind", "base", "fingerprint"} <= set(note):
            raise ValueError("keys are missing")
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{folder / NOTE}: not the note of an adapter ({first_line(error)}): copy the adapter again"
        ) from None
    return dict(note)


class AdaptedLinear(nn.Linear):
    """A frozen linear layer with a low-rank update that is computed separately, as in training: W x + scale B (A x).

    Args:
        linear: The layer, not changed.
        a: [r, inputs]
        b: [outputs, r]
        scale: Of the update.
    """

    def __init__(self, linear: nn.Linear, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale
        self.enabled = True
        """Whether the update is added; see `adapter_off`."""
        # Parameters, so that they are treated like all frozen weights.
        self.down = nn.Parameter(a.to(linear.weight), requires_grad=False)
        self.up = nn.Parameter(b.to(linear.weight), requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs], with PEFT's order of operations."""
        if not self.enabled:
            return super().forward(input)
        update = functional.linear(functional.linear(input, self.down), self.up)
        return super().forward(input) + update * self.scale


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Disables adapters that are not merged (`merge=False`) for the length of a block; not thread-safe.

    Args:
        model: The model, or the part of it whose adapters are disabled.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, AdaptedLinear)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def adapted(linear: nn.Linear, a: torch.Tensor, b: torch.Tensor, scale: float, *, merge: bool = True) -> nn.Linear:
    """A linear layer with an adapter, which is merged if the precision of the weights allows it.

    Args:
        linear: The layer, not changed.
        a: float32 [r, inputs]
        b: float32 [outputs, r]
        scale: Of the update.
        merge: False never merges, so that `adapter_off` can disable the adapter.
    """
    weight = linear.weight.detach()
    if merge and weight.dtype == torch.float32:
        delta = b @ a * scale
        merged = weight + delta
        if torch.linalg.vector_norm(merged - weight - delta) <= MERGE_TOLERANCE * torch.linalg.vector_norm(delta):
            merged_linear = copy.copy(linear)
            merged_linear._parameters = {**linear._parameters, "weight": nn.Parameter(merged, requires_grad=False)}
            return merged_linear
    return AdaptedLinear(linear, a, b, scale)


def apply_adapter(backbone: Backbone, folder: Path, kind: Kind, *, merge: bool = True) -> None:
    """Loads an adapter into a base model, in place; every key must match. See `adapted` for `merge`.

    A backbone without vision tower gets the projector's part of a vision adapter.

    Raises:
        DataError: It is not a complete adapter of this kind for this base model.
    """
    check_adapter(folder, kind, backbone.fingerprint, backbone.geometry.as_dict())
    backbone.model = install(backbone.model, folder, merge=merge)


@torch.no_grad()
def install(model: Any, folder: Path, *, merge: bool = True) -> Any:
    """Loads an adapter folder into a LlavaNext model, without a check of its base model.

    Args:
        model: The model; its linear layers are replaced, their weights are not changed.
        merge: See `adapted`.

    Returns:
        The model, frozen and in evaluation mode.

    Raises:
        DataError: The adapter cannot be read, or does not fit the model.
    """
    from peft import get_peft_model, set_peft_model_state_dict
    from peft.tuners import lora
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = _read_config(folder)
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder}: the adapter cannot be read ({first_line(error)}): copy it again") from None
    if broken := sorted(key for key, value in state.items() if not value.isfinite().all()):
        raise DataError(f"{folder}: {broken[0]} has numbers that are not finite: copy the adapter again")
    if not hasattr(model.model, "vision_tower"):
        state = {key: value for key, value in state.items() if ".vision_tower." not in key}
    with quiet():
        wrapped: Any = get_peft_model(model, config)
    result = set_peft_model_state_dict(wrapped, state)
    missing = [key for key in result.missing_keys if "lora_" in key]
    if missing or result.unexpected_keys:
        raise DataError(
            f"{folder}: does not fit the base model: {len(missing)} weights missing, "
            f"{len(result.unexpected_keys)} unknown (first: {[*missing, *result.unexpected_keys][0]})"
        )
    layers = {name: m for name, m in wrapped.get_base_model().named_modules() if isinstance(m, lora.Linear)}
    model = wrapped.unload()
    for name, layer in layers.items():
        a, b = (pair["default"].weight.float() for pair in (layer.lora_A, layer.lora_B))
        model.set_submodule(name, adapted(layer.base_layer, a, b, layer.scaling["default"], merge=merge))
    return model.requires_grad_(False).eval()


def _read_config(folder: Path) -> Any:
    """The PEFT configuration of an adapter, with only the values that its digest or weights confirm.

    Raises:
        OSError, ValueError, TypeError, KeyError: It cannot be read.
        DataError: It is another kind of adapter.
    """
    from peft import LoraConfig

    saved = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    if other := [name for name in ("use_rslora", "use_dora", "alora_invocation_tokens") if saved.get(name)]:
        raise DataError(f"{folder}: adapter_config.json sets {other[0]}, which lavic's adapters never have")
    return LoraConfig(
        r=saved["r"], lora_alpha=saved["lora_alpha"], target_modules=saved["target_modules"], inference_mode=True
    )


def copy_adapter(source: Path, target: Path) -> None:
    """Copies an adapter folder, atomically."""
    with atomic_folder(target) as part:
        shutil.copytree(source, part, dirs_exist_ok=True)


def digest(folder: Path) -> str:
    """A digest of an adapter's weights and scale.

    Raises:
        DataError: It is not a complete adapter.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        hashed = hashlib.sha256(json.dumps([config["r"], config["lora_alpha"]]).encode())
        hashed.update((folder / WEIGHTS).read_bytes())
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder}: not a complete adapter ({first_line(error)}): copy it again") from None
    return hashed.hexdigest()[:16]


def untouched(model: nn.Module) -> bool:
    """Whether every LoRA B is still zero: nothing was trained."""
    return not any(torch.count_nonzero(p) for name, p in model.named_parameters() if "lora_B" in name)
