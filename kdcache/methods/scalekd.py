"""`scalekd`: a student's maps, projected to the teacher's tokens, mimic its final map; those of stage 3 pass through the teacher's own last blocks.

Two views of every map, each with projectors of its own: spatial, and frequency, the map without its spatial mean.

    stage 3 → projector, learned queries → tail ─┬→ mimics the final map
    stage 4 → projector ◀────── queries ─────────┘ → (last blocks of a plain ViT) → mimics the final map

Legend: B batch, C channels, T grid tokens of the teacher's final map, Q of what its tail takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, field_validator
from torch import Tensor, nn

from ..dual_view import View, directions, in_view, mimicking_loss
from ..encodings.dct import BANDS
from ..errors import StudentError, UsageError
from ..losses import soft_cross_entropy
from ..nodes import NORM, list_containers, list_nodes
from ..plan import FrozenModel
from ..projector import CrossAttentionProjector, ProjectorNorm
from ..tail import FINAL_NORM, Tail, load_tail
from ..teacher_card import TeacherCard, card_of_layer
from ..timm_models import architecture_of
from .base import DecodedTargets, DistillationSettings, Method, MethodSettings

if TYPE_CHECKING:
    from ..cache import Cache, TeacherLayer

VIEWS: tuple[View, ...] = ("spatial", "frequency")
POSITION = "pos_embed"
"""timm's name of a ViT's position embedding."""
TARGET = f"features@{NORM}"

Pair = tuple[float, float]
"""A constant of the spatial view and of the frequency view."""


class Preset(FrozenModel):
    """The authors' constants for a pair; the defaults are those of a pair that has none."""

    teachers: tuple[str, ...] = ()
    """How the timm names begin."""
    students: tuple[str, ...] = ()
    alpha_s3: Pair = (0.08, 0.06)
    alpha_s4: Pair = (0.08, 0.06)
    softmax_scale: Pair = (5.0, 5.0)
    heads_s3: int = 8
    heads_s4: int = 8
    projector_norm: ProjectorNorm = "batch"
    kd_alpha: float = 0.5


GENERAL = "general"
AUTO = "auto"

_SWIN_L, _SWIN_S, _EVA_L = ("swin_large",), ("swin_small",), ("eva_large", "beit_large", "beitv2_large")
_VIT_S, _VIT_B = ("vit_small", "deit_small", "deit3_small"), ("vit_base", "deit_base", "deit3_base")
_SMALL: dict[str, Any] = {"alpha_s3": (0.016, 0.008), "alpha_s4": (0.016, 0.008)}

PRESETS: dict[str, Preset] = {
    GENERAL: Preset(),
    "swin_l-resnet50": Preset(teachers=_SWIN_L, students=("resnet50", "resnetv2_50"), heads_s3=16, heads_s4=24),
    "swin_l-mobilenet": Preset(teachers=_SWIN_L, students=("mobilenet",), heads_s3=16, heads_s4=24),
    "swin_l-vit_s": Preset(teachers=_SWIN_L, students=_VIT_S),
    "swin_l-vit_b": Preset(teachers=_SWIN_L, students=_VIT_B),
    "swin_l-mixer_s": Preset(teachers=_SWIN_L, students=("mixer_s",)),
    "swin_l-mixer_b": Preset(teachers=_SWIN_L, students=("mixer_b",)),
    "swin_l-convnext_t": Preset(teachers=_SWIN_L, students=("convnext_tiny",), softmax_scale=(1.0, 1.0), heads_s3=8, heads_s4=16),
    "swin_l-swin_t": Preset(teachers=_SWIN_L, students=("swin_tiny",), softmax_scale=(1.0, 1.0), heads_s3=24, heads_s4=48, projector_norm="layer"),
    "swin_s-resnet50": Preset(teachers=_SWIN_S, students=("resnet50", "resnetv2_50"), alpha_s4=(0.08, 0.0), heads_s3=3, heads_s4=6, kd_alpha=0.0),
    "eva_l-resnet50": Preset(teachers=_EVA_L, students=("resnet50", "resnetv2_50"), softmax_scale=(0.2, 0.2), **_SMALL),
    "eva_l-vit_b": Preset(teachers=_EVA_L, students=_VIT_B, softmax_scale=(1.0, 1.0), **_SMALL),
    "eva_l-mixer_b": Preset(teachers=_EVA_L, students=("mixer_b",), softmax_scale=(1.0, 1.0), **_SMALL),
}
"""Name → constants (research of the authors' configs at 478a7db, those of EVA-L and of most students at 5ba1f04)."""


def _as_pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int | float) and not isinstance(value, bool) else value


class ScaleKDSettings(DistillationSettings):
    """Constants of `scalekd`. Those that are not given are the preset's."""

    distill_loss_weight: float | None = Field(default=None, ge=0)
    """Weight of all but the labels' cross-entropy. Default: 1, whatever the task's weight."""
    task_loss_weight: float | None = Field(default=None, ge=0)
    """Weight of the labels' cross-entropy; 0 leaves it out. Default: 1 - kd_alpha."""
    preset: str = AUTO
    """Constants of a pair, such as swin_l-resnet50; auto: those of this student and teacher, else general's, which are Swin-L → ViT's."""
    alpha_s3: Pair | None = None
    """Weights of stage 3's spatial and frequency losses. Default: .08, .06 (EVA-L: .016, .008)."""
    alpha_s4: Pair | None = None
    """Likewise of stage 4. Default: as stage 3 (Swin-S: .08, 0)."""
    softmax_scale: Annotated[Pair | None, BeforeValidator(_as_pair)] = None
    """Factor on the attention's logits, spatial and frequency; one number for both. Default: 5, 1 or .2 by pair."""
    heads_s3: int | None = Field(default=None, ge=1)
    """Attention heads of stage 3's projectors: a divisor of the channels that the tail takes. Default: 8, or the pair's."""
    heads_s4: int | None = Field(default=None, ge=1)
    """Attention heads of stage 4's projectors: a divisor of the final map's channels. Default: 8, or the pair's."""
    projector_norm: ProjectorNorm | None = None
    """Behind the projectors' convolution: batch, or layer (over channels). Default: batch; layer for Swin-L → Swin-T."""
    kd_alpha: float | None = Field(default=None, ge=0, le=1)
    """Weight of the logits' loss; the labels' cross-entropy has 1 - kd_alpha, unless task_loss_weight says otherwise. Default: .5."""
    temperature: float = Field(default=1.0, gt=0)
    """Softmax temperature of the logits' loss."""
    logits: Literal["cache", "head"] = "cache"
    """The teacher's logits: as cached, or from the cached final map through the head in its tail, for which nothing more is stored."""
    student_s3: str | None = None
    """The student's stage 3. Default: its last map of twice the final resolution; of a model of one resolution the block at three quarters."""
    student_s4: str = NORM
    """The student's stage 4."""
    s3_blocks: int | None = Field(default=None, ge=1)
    """Blocks (stages) of the teacher that stage 3 passes through. Default: Swin 1 stage; a plain ViT of 12 blocks 3, others 2."""
    s4_blocks: int | None = Field(default=None, ge=0)
    """Blocks after those, which stage 4 passes through. Default: 1 of a plain ViT of 12 blocks, else none."""
    s4_repeats: bool = False
    """Whether these are not after those, but the last of them once more: s3_blocks=2, s4_blocks=1 as the originals' VisionTransformerN."""

    @field_validator("preset")
    @classmethod
    def _check_preset(cls, name: str) -> str:
        if name not in (AUTO, *PRESETS):
            raise ValueError(f"no preset {name!r}; expected one of: {AUTO}, {', '.join(PRESETS)}")
        return name

    @field_validator("alpha_s3", "alpha_s4", "softmax_scale")
    @classmethod
    def _check_pair(cls, pair: Pair | None) -> Pair | None:
        if pair is not None and min(pair) < 0:
            raise ValueError(f"{pair}: expected two numbers from 0")
        return pair

    def resolve(self, student: str, teacher: str) -> ScaleKDSettings:
        """With every constant of the preset filled in. student, teacher: timm architecture names."""
        name = self.preset if self.preset != AUTO else preset_for(student, teacher)
        constants = PRESETS[name].model_dump(exclude={"teachers", "students"})
        return self.model_copy(update={"preset": name} | {field: value for field, value in constants.items() if getattr(self, field) is None})

    @property
    def logits_weight(self) -> float:
        """kd_alpha as far as it is known without student and teacher."""
        if self.kd_alpha is not None:
            return self.kd_alpha
        return PRESETS[GENERAL if self.preset == AUTO else self.preset].kd_alpha

    @property
    def weights(self) -> tuple[float, float]:
        """(distillation weight, task weight): 1 and 1 - kd_alpha, unless given."""
        task = 1 - self.logits_weight if self.task_loss_weight is None else self.task_loss_weight
        return 1.0 if self.distill_loss_weight is None else self.distill_loss_weight, task


def preset_for(student: str, teacher: str) -> str:
    """The preset of a pair of timm architectures; the general one where it has none."""
    matching = (name for name, preset in PRESETS.items() if teacher.startswith(preset.teachers) and student.startswith(preset.students))
    return next(matching, GENERAL)


class ScaleKD(Method[ScaleKDSettings]):
    """α₀ · spatial + α₁ · frequency mimicking of stages 3 and 4, α · cross-entropy with the teacher's classes."""

    name: ClassVar[str] = "scalekd"
    summary: ClassVar[str] = "projected maps mimic the teacher's last one, stage 3 through the teacher's own last blocks"
    paper: ClassVar[str] = "Fan et al.: ScaleKD: Strong Vision Transformers Could Be Excellent Teachers (NeurIPS 2024), arXiv:2411.06786"
    Settings: ClassVar[type[MethodSettings]] = ScaleKDSettings
    tail: Tail

    def __init__(self, *, student: nn.Module, cache: Cache, teacher: TeacherLayer | None, settings: ScaleKDSettings) -> None:
        assert teacher is not None  # it requires a target
        model = teacher.document.identity.model
        settings = settings.resolve(architecture_of(student, type(student).__name__.lower()), model)
        super().__init__(student=student, cache=cache, teacher=teacher, settings=settings)
        assert self.features is not None
        assert settings.alpha_s3 is not None and settings.alpha_s4 is not None and settings.softmax_scale is not None
        assert settings.heads_s3 is not None and settings.heads_s4 is not None and settings.projector_norm is not None
        self.alphas = {view: (settings.alpha_s3[i], settings.alpha_s4[i]) for i, view in enumerate(VIEWS)}
        self.s3_modules, self.s4_modules = split_tail(settings, card_of_layer(teacher))
        self.grid = self.teacher_shapes[TARGET].grid
        tail = load_tail(cache.store, teacher)
        if tail.card.layout != "NLC" and self.s3_modules[0] != tail.card.modules[0]:
            raise UsageError(
                f"method 'scalekd': stage 3 is to pass through {', '.join(self.s3_modules)}, the cached tail begins with {tail.card.modules[0]!r};"
                f" set s3_blocks so that it begins there"
            )
        object.__setattr__(self, "tail", tail)  # no part of the state dict: it lies in the cache
        self.s3, self.s4 = self.student_nodes()
        self._check_grids()
        self.projectors = nn.ModuleDict()
        for i, view in enumerate(VIEWS):
            alpha_s3, alpha_s4 = self.alphas[view]
            if alpha_s3 > 0 or alpha_s4 > 0:
                self.projectors[f"s3_{view}"] = CrossAttentionProjector(
                    self.student_channels[self.s3], tail.card.channels, grid=self.features.grids[self.s3], num_queries=tail.card.grid[0] * tail.card.grid[1],
                    num_heads=settings.heads_s3, softmax_scale=settings.softmax_scale[i], norm=settings.projector_norm,
                )  # fmt: skip
            if alpha_s4 > 0:
                self.projectors[f"s4_{view}"] = CrossAttentionProjector(
                    self.student_channels[self.s4], self.teacher_shapes[TARGET].channels, grid=self.features.grids[self.s4], num_queries=None,
                    num_heads=settings.heads_s4, softmax_scale=settings.softmax_scale[i], norm=settings.projector_norm,
                )  # fmt: skip
        if self.computes_logits(settings):
            self._check_head(teacher)

    def _check_grids(self) -> None:
        """Raise StudentError for a frequency view of a map of one position: attention to one key answers every query alike, and nothing but the mean is left."""
        assert self.features is not None
        for node, alpha, field in ((self.s3, self.alphas["frequency"][0], "alpha_s3"), (self.s4, self.alphas["frequency"][1], "alpha_s4")):
            if alpha > 0 and self.features.grids[node] == (1, 1):
                raise StudentError(
                    f"method 'scalekd': the student's map at {node!r} has one position, hence no frequency view; expected at least two: use larger views,"
                    f" another node, or a second number of 0 in {field}"
                )

    def _check_head(self, teacher: TeacherLayer) -> None:
        classes = teacher.document.identity.num_classes
        found = int(getattr(self.student, "num_classes", classes))
        if found != classes:
            raise UsageError(
                f"method 'scalekd': the student has {found} classes, the teacher's head {classes}; pass --num-classes {classes}, or kd_alpha=0"
            )

    @classmethod
    def requires(cls, settings: ScaleKDSettings, teacher: TeacherCard) -> Sequence[str]:
        if teacher.model and teacher.num_classes == 0 and settings.logits_weight > 0:
            raise UsageError(f"method 'scalekd': teacher {teacher.model} has no classifier, hence no logits to match; expected --set kd_alpha=0")
        return (TARGET, "logits") if settings.logits == "cache" and settings.logits_weight > 0 else (TARGET,)

    @classmethod
    def tail_modules(cls, settings: ScaleKDSettings, teacher: TeacherCard) -> Sequence[str]:
        if not teacher.nodes:
            return ()
        s3, s4 = split_tail(settings, teacher)
        return [*s3, *(module for module in s4 if module not in s3)]

    @classmethod
    def alternatives(cls, settings: ScaleKDSettings, teacher: TeacherCard, tail: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """Presets of this teacher, logits out of its head, none at all; each with this split of the blocks, or another of those that are there."""
        logits: list[dict[str, Any]] = []
        if settings.preset == AUTO:
            logits += [{"preset": name} for name, preset in PRESETS.items() if preset.teachers and teacher.model.startswith(preset.teachers)]
        if settings.logits == "cache" and teacher.num_classes > 0:
            logits.append({"logits": "head"})
        logits.append({"kd_alpha": 0.0})
        blocks = len([module for module in tail if module.startswith("blocks.")])
        splits = [{"s3_blocks": blocks - s4, "s4_blocks": s4} for s4 in (0, 1) if s4 < blocks and not settings.s4_repeats]
        yield from logits
        yield from splits
        yield from ({**one, **split} for one in logits for split in splits)

    @classmethod
    def computes_logits(cls, settings: ScaleKDSettings) -> bool:
        return settings.logits == "head" and settings.logits_weight > 0

    def student_nodes(self) -> Sequence[str]:
        return (self.settings.student_s3 or stage_3_of(self.student), self.settings.student_s4)

    def target_parts(self) -> Mapping[str, Sequence[str]]:
        """Of `dct` bands all but `dc` where only the frequency view counts."""
        uses_dc = any(self.alphas["spatial"]) or (self.settings.logits == "head" and self.settings.logits_weight > 0)
        return {TARGET: BANDS[1:]} if self.teacher_encodings[TARGET] == "dct" and not uses_dc and self.grid != (1, 1) else {}

    def no_weight_decay(self) -> set[str]:
        """The student's; and the projectors' position embeddings where its own has none, as in the originals: their key `.pos_embed` takes both.

        It is in the recipes of their ViT students only; queries are decayed in all.
        """
        named = super().no_weight_decay()
        return named | {f"projectors.{name}.position" for name in self.projectors} if f"student.{POSITION}" in named else named

    def _apply(self, fn: Any, recurse: bool = True) -> ScaleKD:
        """The tail goes where the method goes."""
        self.tail._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def losses(self, outputs: Mapping[str, Tensor], labels: Tensor, targets: DecodedTargets) -> dict[str, Tensor]:
        s3_BCHW, s4_BCHW = (outputs[f"features@{node}"] for node in (self.s3, self.s4))
        views = [view for view in VIEWS if any(self.alphas[view])]
        passed = self._through_tail({view: self.projectors[f"s3_{view}"](s3_BCHW) for view in views}, self.s3_modules)
        queries = {view: tokens_BTC for view, tokens_BTC in passed.items() if self.alphas[view][1] > 0}
        asked = self._through_tail({view: self.projectors[f"s4_{view}"](s4_BCHW, queries[view]) for view in queries}, self.s4_modules)
        parts: dict[str, Tensor] = {}
        for view in views:
            wanted_BTC = directions(in_view(targets[TARGET]["grid"], view))  # the same for both stages
            for stage, alpha, found in zip(("s3", "s4"), self.alphas[view], (passed, asked), strict=True):
                if alpha > 0:
                    parts[f"{stage}_{view}"] = alpha * mimicking_loss(in_view(found[view], view), wanted_BTC)
        weight = self.settings.logits_weight
        if weight > 0:
            parts["logits"] = weight * soft_cross_entropy(outputs["logits"], self._teacher_logits(targets), temperature=self.settings.temperature)
        return parts

    def _through_tail(self, tokens: Mapping[View, Tensor], modules: Sequence[str]) -> dict[View, Tensor]:
        """View → its tokens behind these modules of the tail, in one pass: nothing in there looks beyond an image, and its weights are read once."""
        if not tokens or not modules:
            return dict(tokens)
        passed_NTC = self.tail(torch.cat([*tokens.values()]), modules=modules)["grid"]
        return dict(zip(tokens, passed_NTC.chunk(len(tokens)), strict=True))

    def _teacher_logits(self, targets: DecodedTargets) -> Tensor:
        if self.settings.logits == "cache":
            return targets["logits"]["logits"]
        value = targets[TARGET]
        with torch.no_grad(), torch.autocast(value["grid"].device.type, enabled=False):
            logits: Tensor = self.tail.head(value, self.grid)
        return logits


def split_tail(settings: ScaleKDSettings, teacher: TeacherCard) -> tuple[list[str], list[str]]:
    """Modules that stage 3 passes through, and those that stage 4 passes through after its projector, by their timm names.

    Swin: its last stage, downsample included, and the norm; nothing for stage 4. A plain ViT of 12 blocks: 8 to 10; 11 and the norm, as in the
    originals. BEiT and EVA: the last two blocks; nothing (their norm comes after the pooling). Other depths as BEiT, with the norm. The norm
    follows the last block of stage 4 if it has one, also where that is stage 3's last block too. Raises UsageError for a teacher of another
    kind, or with fewer blocks.
    """
    container = next((name for name in ("layers", "blocks") if name in teacher.containers), None)
    if container is None:
        raise UsageError(
            f"method 'scalekd' needs a ViT or a Swin for a teacher, with blocks or layers; {teacher.model or 'this one'} has none; mimic takes any teacher"
        )
    depth = teacher.containers[container]
    as_original_vit = container == "blocks" and depth == 12 and not teacher.model.startswith(("beit", "eva"))
    s4 = settings.s4_blocks if settings.s4_blocks is not None else int(as_original_vit)
    s3 = settings.s3_blocks if settings.s3_blocks is not None else 1 if container == "layers" else 3 if as_original_vit else min(2, depth - s4)
    if container == "layers" and s4 > 0:
        raise UsageError(f"method 'scalekd': s4_blocks {s4}: a stage of a Swin halves the grid and takes no final map; expected 0")
    count = s3 if settings.s4_repeats else s3 + s4
    if s3 < 1 or count > depth or s4 > count:
        together = "s4_blocks at most s3_blocks, these at most that" if settings.s4_repeats else "at most that together"
        raise UsageError(f"method 'scalekd': s3_blocks {s3} and s4_blocks {s4}: teacher {teacher.model} has {depth} {container}; expected {together}")
    names = [f"{container}.{i}" for i in range(depth - count, depth)]
    if teacher.nodes and not {*names} <= {*teacher.nodes}:
        raise UsageError(
            f"method 'scalekd' needs a ViT or a Swin for a teacher; {teacher.model} has nodes {', '.join(teacher.nodes)}; mimic takes any teacher"
        )
    if s4 == 0:
        return [*names, FINAL_NORM], []
    return names[:s3], [*names[count - s4 :], FINAL_NORM]


def stage_3_of(student: nn.Module) -> str:
    """The node of a student's stage 3: its last map of more resolution than the final one; of a model of one resolution block 8 of 12, in proportion."""
    nodes = [node for node in list_nodes(student) if node != NORM]
    info = {one.get("module"): one.get("reduction") for one in getattr(student, "feature_info", None) or [] if isinstance(one, dict)}
    reductions = [info.get(node) for node in nodes]
    if None not in reductions and len({*reductions}) > 1:
        return [node for node, reduction in zip(nodes, reductions, strict=True) if reduction != reductions[-1]][-1]
    depth = max(list_containers(nodes, student).values(), default=0)
    if not nodes or depth < 2:
        raise StudentError(
            f"student {type(student).__name__}: which of its maps is stage 3 is not known; set student_s3, expected one of: {', '.join(nodes) or 'none'}"
        )
    return nodes[round(0.75 * depth) - 1]
