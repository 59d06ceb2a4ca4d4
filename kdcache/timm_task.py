"""timm's distillation tasks with a cache in place of their online teacher. For loops built on `timm.task`; our own methods need none of this.

A task calls its teacher with the student's images. This one looks at their number only and gives what the cache holds for them, which
the loop has fed to it the line before:

    teacher = CachedTeacher(cache)
    task = timm.task.LogitDistillationTask(student, teacher, criterion=…, temperature=4.0)
    for views, labels, targets in loader:
        teacher.feed(decode(targets))
        losses = task(normalize(views), labels)

Legend: B batch, T grid tokens, P prefix tokens, C channels, K classes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.task import DistillationTeacher
from torch import Tensor, nn

from .cache import Cache, TeacherLayer
from .errors import MissingError, TeacherError, UsageError
from .format import TargetIdentity
from .methods.base import DecodedTargets
from .timm_models import build_model

FEATURES = "features@norm"
"""The target that pooled features are taken from: the output of `forward_features()`."""


class CachedTeacher(DistillationTeacher):
    """Stands where timm's tasks want a `DistillationTeacher`: logits of target `logits`, pooled features of target `features@norm`.

    Every batch is fed before the task's step and taken by it: a step without its own batch raises.
    """

    def __init__(self, cache: Cache, teacher: str | None = None) -> None:
        """teacher: its name in the cache, or None for the only one. Raises UsageError for one that is not there."""
        layer = cache.layer(teacher)
        super().__init__(_Pooling(layer))
        self.layer = layer
        self._fed: DecodedTargets | None = None

    def feed(self, targets: DecodedTargets) -> None:
        """Hand over the decoded targets of the next step's batch, as `Decoder` gives them, on the student's device; may hold other targets too."""
        self._fed = targets

    def normalize_input(self, input: Tensor, student_mean: Tensor | None = None, student_std: Tensor | None = None) -> Tensor:
        """The images as they are: no teacher sees them."""
        return input

    def compile(self, *_: Any, **__: Any) -> CachedTeacher:  # type: ignore[override]  # timm's gives itself too
        """Nothing is computed here that compiling would make faster."""
        return self

    def forward(self, input: Tensor, return_features: bool = False) -> Tensor:
        """float32: logits (B, K), or the teacher's pooled features before its classifier (B, C), of the batch that was fed.

        input: (B, …), the student's images. Raises UsageError if no batch of this size was fed since the last step, MissingError if it
        lacks the target.
        """
        fed, self._fed = self._fed, None
        if fed is None:
            raise UsageError("CachedTeacher: no batch was fed since the last step; call teacher.feed(decode(targets)) before every step of the task")
        target = FEATURES if return_features else "logits"
        value = fed.get(target, fed.get(f"{self.layer.name}/{target}"))
        if value is None:
            raise MissingError(
                f"CachedTeacher: the batch has no {target!r} of teacher {self.layer.name!r}, it has: {', '.join(fed) or 'none'}; add it to the dataset's"
                f" targets, or to the cache by 'kdcache extract --target {target}'"
            )
        found: Tensor = cast(_Pooling, self.model)(value) if return_features else value["logits"]
        if len(found) != len(input):
            raise UsageError(f"CachedTeacher: {len(found)} rows were fed, the task's batch has {len(input)}; feed the targets of the very batch")
        return found


class _Pooling(nn.Module):
    """From the cached output of a teacher's `forward_features` to its pooled features, by timm's own `forward_head`.

    The teacher is built without memory and without weights, so a head that has any before its classifier (a norm behind the pooling) can't be run.
    """

    def __init__(self, layer: TeacherLayer) -> None:
        super().__init__()
        self.name = layer.name
        self.card: TargetIdentity | None = layer.targets[FEATURES].identity if FEATURES in layer.targets else None
        if self.card is not None:
            self.skeleton, self.layout = _skeleton(layer)

    @property
    def head_hidden_size(self) -> int:
        """C of the pooled features, which timm asks for to build its projection. Raises MissingError, TeacherError where there can be none."""
        card = self.card
        if card is None:
            raise MissingError(
                f"teacher {self.name!r} has no target {FEATURES!r} in the cache; run 'kdcache extract' with --target {FEATURES} to add it"
            )
        assert card.grid is not None
        shapes = {"grid": (1, card.grid[0] * card.grid[1], card.channels or 0), "prefix": (1, card.prefix_tokens or 0, card.channels or 0)}
        pooled = self({part: torch.zeros(shape) for part, shape in shapes.items() if shape[1]})
        return int(pooled.shape[1])

    def forward(self, value: dict[str, Tensor]) -> Tensor:
        """float32 (B, C) of {"grid": (B, T, C)[, "prefix": (B, P, C)]}."""
        assert self.card is not None and self.card.grid is not None
        tokens_BTC = torch.cat([value["prefix"], value["grid"]], dim=1) if "prefix" in value else value["grid"]
        x = tokens_BTC
        if self.layout in ("NHWC", "NCHW"):
            x = tokens_BTC.reshape(len(tokens_BTC), *self.card.grid, -1)
            x = x if self.layout == "NHWC" else x.permute(0, 3, 1, 2)
        elif self.layout == "NC":
            x = tokens_BTC[:, 0]
        pooled: Tensor = self.skeleton.forward_head(x, pre_logits=True)  # type: ignore[operator]  # timm's own method
        return pooled


class _NotCached(nn.Module):
    """In place of a module that has weights."""

    def __init__(self, model: str, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, *_: Any, **__: Any) -> Tensor:
        raise TeacherError(
            f"teacher {self.model}: its pooled features need the weights of {self.name!r}, which no cache of {FEATURES!r} holds; use LogitDistillationTask, or"
            f" a method on feature maps such as mimic"
        )


def _skeleton(layer: TeacherLayer) -> tuple[nn.Module, str]:
    """The teacher's modules without any weight, and how its `forward_features` lays its output out: NLC, NHWC, NCHW or NC."""
    card = layer.document.identity
    with torch.device("meta"):
        model = build_model(card.model, pretrained=False, checkpoint=None, model_args=card.model_args, error=TeacherError, role="teacher").eval()
        side = card.preprocessing.input_size
        try:
            with torch.no_grad():
                output = model.forward_features(torch.empty(1, 3, side, side))  # type: ignore[operator]  # timm's own method
        except RuntimeError as error:
            raise TeacherError(f"teacher {card.model}: timm can't tell the shape of its features without weights: {error}") from error
    layout = {2: "NC", 3: "NLC"}.get(output.ndim, "NHWC" if getattr(model, "output_fmt", "NCHW") == "NHWC" else "NCHW")
    _strip(model, card.model)
    return model, layout


def _strip(module: nn.Module, model: str, prefix: str = "") -> None:
    for registry in (module._parameters, module._buffers):
        for name in registry:
            registry[name] = None
    for name, child in list(module.named_children()):
        if any(True for _ in child.parameters(recurse=False)) or any(True for _ in child.buffers(recurse=False)):
            setattr(module, name, _NotCached(model, f"{prefix}{name}"))
        else:
            _strip(child, model, f"{prefix}{name}.")
