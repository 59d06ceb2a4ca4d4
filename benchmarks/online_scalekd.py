"""`scalekd` with the whole teacher in memory, as a method of one's own: the control that the cached one is held against.

    PYTHONPATH=.:benchmarks kdcache train CACHE --student NAME --method online_scalekd:OnlineScaleKD --num-classes K

Everything but the teacher's side is `scalekd`'s, and is drawn from the same seeds: student, projectors, order and views are alike to the bit. Swin teachers.

Legend: B batch, T tokens, C channels, H W of an image or of a map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from kdcache.cache import Cache, TeacherLayer
from kdcache.methods import DecodedTargets, Method, MethodSettings, TeacherCard
from kdcache.methods.scalekd import ScaleKD, ScaleKDSettings
from kdcache.tail import Tail
from kdcache.targets import parse_target
from kdcache.teacher import Teacher, load_teacher
from kdcache.timm_models import mean_std_of


class OnlineScaleKD(Method[ScaleKDSettings]):
    """A pass of the teacher in every step gives the targets, its own modules are the tail. Of the cache only the views are replayed, and shapes read."""

    name: ClassVar[str] = "scalekd-online"
    summary: ClassVar[str] = "scalekd with the teacher live"
    paper: ClassVar[str] = ScaleKD.paper
    Settings: ClassVar[type[MethodSettings]] = ScaleKDSettings

    def __init__(self, *, student: nn.Module, cache: Cache, teacher: TeacherLayer | None, settings: ScaleKDSettings) -> None:
        super().__init__(student=student, cache=cache, teacher=teacher, settings=settings)
        layer = cache.layer(None)
        self.cached = ScaleKD(student=student, cache=cache, teacher=layer, settings=settings)
        self.teacher = load_teacher(str(layer.document.provenance["source"]))
        self.targets = list(self.teacher.resolve([parse_target(target) for target in self.cached.target_names]).values())
        object.__setattr__(self.cached, "tail", LiveTail(self.teacher, self.cached.tail))
        mean, std = mean_std_of(student)
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        self.live: DecodedTargets = {}

    @classmethod
    def requires(cls, settings: ScaleKDSettings, teacher: TeacherCard) -> Sequence[str]:  # noqa: ARG003 - the interface
        return ()

    def run_student(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        views_BHWC = (images_BCHW * self.std + self.mean).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)  # the very pixels
        self.live = self.teacher(views_BHWC, self.targets)
        return self.cached.run_student(images_BCHW)

    def losses(self, outputs: Mapping[str, Tensor], labels: Tensor, targets: DecodedTargets) -> dict[str, Tensor]:
        return self.cached.losses(outputs, labels, self.live)


class LiveTail(nn.Module):
    """The last modules of a teacher in memory, called as a `Tail` is."""

    def __init__(self, teacher: Teacher, cached: Tail) -> None:
        super().__init__()
        self.model, self.card = teacher.model, cached.card

    def forward(self, tokens_BTC: Tensor, prefix_BPC: None = None, *, modules: Sequence[str]) -> dict[str, Tensor]:
        x_BHWC = tokens_BTC.unflatten(1, self.card.grid)  # Swin's layout
        for name in modules:
            x_BHWC = self.model.get_submodule(name)(x_BHWC)
        return {"grid": x_BHWC.flatten(1, 2)}
