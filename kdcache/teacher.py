"""The teacher: a frozen timm model in eval mode that gives targets for uint8 views. Stage one only; stage two may not import this.

Eval mode is a deviation from the originals that is wanted: a train-mode teacher has DropPath on, and two passes over one
image then differ by up to 3 (research: methods, headline 3).

Legend: B batch, H W C of the uint8 view, K classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .device import autocast, fitting_threads, moved
from .encodings import TargetShape
from .errors import TeacherError
from .format import Preprocessing, TeacherIdentity
from .nodes import NORM, Value, capture, examine_nodes, list_containers, list_nodes, read_nodes, resolve_node, to_tokens
from .pixels import Normalize
from .targets import TargetSpec
from .teacher_card import TeacherCard
from .timm_models import architecture_of, build_model, input_size_of, mean_std_of, model_args_of

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class TeacherTarget:
    """A target resolved against a model: its absolute name, node and shape."""

    name: str
    kind: Literal["logits", "features"]
    node: str | None
    shape: TargetShape


def weights_digest(model: nn.Module) -> str:
    """BLAKE2b-128 over the state dict sorted by name: name, dtype, shape and little-endian bytes of each tensor."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return digest.hexdigest()


class Teacher:
    """A frozen model on a device. Calling it gives the value of every target asked for, in one forward pass."""

    def __init__(self, model: nn.Module, identity: TeacherIdentity, *, device: torch.device, source: str) -> None:
        self.identity, self.device, self.source = identity, device, source
        self.model = model.to(device).eval().requires_grad_(False)
        preprocessing = identity.preprocessing
        self.normalize = Normalize(preprocessing.mean, preprocessing.std, preprocessing.input_size).to(device)

    @property
    def has_logits(self) -> bool:
        return self.identity.num_classes > 0

    @property
    def card(self) -> TeacherCard:
        """What methods may ask of it before anything is recorded."""
        nodes = list_nodes(self.model)
        return TeacherCard(
            model=self.identity.model, num_classes=self.identity.num_classes, nodes=tuple(nodes), containers=list_containers(nodes, self.model)
        )

    def resolve(self, specs: Sequence[TargetSpec]) -> dict[TargetSpec, TeacherTarget]:
        """Each spec against this model. Raises TeacherError for an unknown node, one that can't be explained, or logits of a model without a head."""
        resolved: dict[TargetSpec, TeacherTarget] = {}
        nodes: dict[TargetSpec, str] = {}
        for spec in specs:
            if spec.kind == "logits" and not self.has_logits:
                raise TeacherError(f"teacher {self.source}: it has no classifier, hence no logits; ask for features, or pass a teacher with a head")
            if spec.node is not None:
                nodes[spec] = resolve_node(self.model, spec.node, model_name=self.source)
        shapes = self._feature_shapes(sorted(set(nodes.values()))) if nodes else {}
        for spec in specs:
            if spec.kind == "logits":
                resolved[spec] = TeacherTarget(name="logits", kind="logits", node=None, shape=TargetShape(num_classes=self.identity.num_classes))
            else:
                node = nodes[spec]
                resolved[spec] = TeacherTarget(name=f"features@{node}", kind="features", node=node, shape=shapes[node])
        return resolved

    def _feature_shapes(self, nodes: Sequence[str]) -> dict[str, TargetShape]:
        """Each node's shape, from two images of noise: the batch axis and the order of the tokens show on no less."""
        with torch.inference_mode(), autocast(self.device, self.identity.precision):
            values = read_nodes(self.model, self._noise(), nodes, model_name=self.source)
        return {node: _shape_of(value) for node, value in values.items()}

    def examine_nodes(self) -> tuple[dict[str, TargetShape], dict[str, str]]:
        """(node → shape of what it gives, node → why it can't be recorded), together every node of the model in forward order."""
        with torch.inference_mode(), autocast(self.device, self.identity.precision):
            values, reasons = examine_nodes(self.model, self._noise(), list_nodes(self.model))
        return {node: _shape_of(value) for node, value in values.items()}, reasons

    def _noise(self) -> Tensor:
        """Two normalised images of noise, the same each time."""
        side = self.identity.preprocessing.input_size
        views_BHWC = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        images_BCHW: Tensor = self.normalize(views_BHWC.to(self.device))
        return images_BCHW

    def __call__(self, views_BHWC: Tensor, targets: Sequence[TeacherTarget]) -> dict[str, dict[str, Tensor]]:
        """Target name → value (float32, see `encodings.base`) for uint8 views on any device. One pass, no gradient."""
        nodes = [target.node for target in targets if target.node is not None]
        values: dict[str, dict[str, Tensor]] = {}
        with (
            fitting_threads(self.model, self.device),
            torch.inference_mode(),
            autocast(self.device, self.identity.precision),
            capture(self.model, nodes) as captured,
        ):
            features = self.model.forward_features(self.normalize(moved(views_BHWC, self.device)))  # type: ignore[operator]
            for target in targets:
                if target.node is None:
                    values[target.name] = {"logits": self.model.forward_head(features).float()}  # type: ignore[operator]
                else:
                    value, _ = to_tokens(self.model, features if target.node == NORM else captured[target.node])
                    values[target.name] = {part: tokens.float() for part, tokens in value.items()}
        return values


def _shape_of(value: Value) -> TargetShape:
    tokens, grid = value
    return TargetShape(grid=grid, channels=tokens["grid"].shape[2], prefix_tokens=tokens["prefix"].shape[1] if "prefix" in tokens else 0)


def load_teacher(
    name: str,
    *,
    pretrained: bool = True,
    checkpoint: Path | None = None,
    model_args: Mapping[str, Any] | None = None,
    precision: Precision = "fp32",
    device: torch.device | str = "cpu",
) -> Teacher:
    """Build and freeze a teacher. name: a timm name, `hf-hub:…` or `local-dir:…`. Raises TeacherError.

    pretrained: False for a model whose shapes alone are of interest: its weights are fresh, and nothing is fetched for them.
    """
    args = dict(model_args or {})
    model = build_model(name, pretrained=pretrained, checkpoint=checkpoint, model_args=args, error=TeacherError, role="teacher")
    if not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
        raise TeacherError(f"teacher {name!r}: {type(model).__name__} has no forward_features and forward_head; expected a timm classifier")
    mean, std = mean_std_of(model)
    identity = TeacherIdentity(
        model=architecture_of(model, name),
        model_args=model_args_of(model, args),
        weights=weights_digest(model),
        num_classes=int(getattr(model, "num_classes", 0) or 0),
        preprocessing=Preprocessing(mean=mean, std=std, input_size=input_size_of(model)),
        precision=precision,
    )
    return Teacher(model, identity, device=torch.device(device), source=name)
