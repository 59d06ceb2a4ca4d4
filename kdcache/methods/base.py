"""The method interface: what the training loop asks of a distillation method, and the whole contract of one.

A method is an nn.Module that owns the student, any modules of its own (adapters, masks, frozen tails), and the student's forward call.
The loop hands it normalised images, labels and the *decoded* targets that it asked for, sums the loss parts that it returns, and
trains whatever parameters of it want a gradient. Its state dict is what a checkpoint holds; the export holds the student alone.

* `requires(settings, teacher)` says which targets must be in the cache, as specs that `kdcache extract --target` takes.
* `student_nodes()` says which feature maps of the student it wants; they come out of the one forward pass.
* `losses` turns outputs, labels and targets into named parts, each a scalar that is already weighted. Labels are int64 (B,); where the
  plan's policy mixes, and labels are used, float32 (B, K): the share of each class in the view. Targets are always the teacher's
  of the very view, mixed or not.
* `Settings` holds every constant of the method; `--set FIELD=VALUE` fills it.

The labels' cross-entropy is not a method's business: `forward` adds it as the part "task", once, so that `a+b` counts it once too.
Of several teachers each has an instance of the method (`several`), which knows of no other.
docs/adding-a-method.md is a worked example.

Legend: B batch, C H W channels, height and width, T grid tokens, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import ConfigDict, Field, model_validator
from torch import Tensor, nn

from ..encodings import TargetShape
from ..losses import cross_entropy
from ..plan import FrozenModel
from ..student_features import StudentFeatures
from ..targets import parse_target
from ..teacher_card import ANY_TEACHER, TeacherCard, card_of_layer

if TYPE_CHECKING:
    from ..cache import Cache, TeacherLayer

DecodedTargets = Mapping[str, Mapping[str, Tensor]]
"""Target name → value as `encodings.base` defines it: {"logits": (B, K)} or {"grid": (B, T, C)[, "prefix": (B, P, C)]}, float32."""


class MethodSettings(FrozenModel):
    """The constants of a method. Unknown fields and numbers that are not finite are refused."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class DistillationSettings(MethodSettings):
    """Constants that every method with a loss of its own has: how it is weighed against the labels' cross-entropy, by timm's rule."""

    distill_loss_weight: float | None = Field(default=None, ge=0)
    """Weight of the method's own loss. Default: 1; 1 - W if only the task's weight W is given."""
    task_loss_weight: float | None = Field(default=None, ge=0)
    """Weight of the labels' cross-entropy; 0 leaves it out. Default: 1."""
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Label smoothing of the cross-entropy; timm's default."""

    @model_validator(mode="after")
    def _check_weights(self) -> DistillationSettings:
        _ = self.weights  # raises
        return self

    @property
    def weights(self) -> tuple[float, float]:
        """(distillation weight, task weight)."""
        return loss_weights(distill=self.distill_loss_weight, task=self.task_loss_weight)


SettingsT = TypeVar("SettingsT", bound=MethodSettings)


class Method(nn.Module, ABC, Generic[SettingsT]):
    """One way to train a student. Made by `kdcache.methods.build`."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for help texts."""
    paper: ClassVar[str]
    """Where the formula comes from, or '' for none."""
    Settings: ClassVar[type[MethodSettings]]
    needs_labels: ClassVar[bool] = False
    """Whether `losses` looks at the labels."""

    def __init__(self, *, student: nn.Module, cache: Cache, teacher: TeacherLayer | None, settings: SettingsT) -> None:
        """cache, teacher: for methods that take more than targets from the cache; teacher is None for one that requires no target.

        Subclasses make their modules here, from torch's global generator, which the run has seeded. Raises StudentError for a node
        that the student lacks.
        """
        super().__init__()
        self.student = student
        self.settings = settings
        card = card_of_layer(teacher) if teacher is not None else ANY_TEACHER
        self.target_names = required_targets(type(self), settings, card)
        self.teacher_shapes = {name: _shape_of(teacher, name) for name in self.target_names} if teacher is not None else {}
        self.teacher_encodings = {name: teacher.targets[name].identity.encoding for name in self.target_names} if teacher is not None else {}
        nodes = self.student_nodes()
        self.features = StudentFeatures(student, nodes, view_size=cache.plan.size) if nodes else None

    @classmethod
    @abstractmethod
    def requires(cls, settings: SettingsT, teacher: TeacherCard) -> Sequence[str]:
        """Specs of the targets that must be in the cache, e.g. ['logits', 'features@blocks.-1']; the same for every student.

        An encoding in a spec is what `extract --for` records where the target is not there yet; one that is there in another
        encoding serves as well. Raises UsageError for a teacher that the method can't use.
        """

    @classmethod
    def tail_modules(cls, settings: SettingsT, teacher: TeacherCard) -> Sequence[str]:
        """Modules of the teacher that `losses` runs (`kdcache.tail`), by their timm names in order: `extract --for` stores them. Default: none."""
        return ()

    @classmethod
    def alternatives(cls, settings: SettingsT, teacher: TeacherCard, tail: Sequence[str]) -> Iterable[Mapping[str, Any]]:
        """Fields that, set beside these, ask for other targets or another tail. An error names those that do with what a cache has. Default: none.

        tail: the modules of the one that is in the cache.
        """
        return ()

    @classmethod
    def computes_logits(cls, settings: SettingsT) -> bool:
        """Whether `losses` matches logits of the teacher that are no target, but come out of its tail: the student then has its classes."""
        return False

    def student_nodes(self) -> Sequence[str]:
        """Nodes of the student whose maps `losses` finds in `outputs`, e.g. ['blocks.0', 'norm']. Default: none, logits are enough."""
        return ()

    def target_parts(self) -> Mapping[str, Sequence[str]]:
        """Target → the parts of it that `losses` looks at, as its encoding names them; of the others no byte needs to be read. Default: all of every target."""
        return {}

    @classmethod
    def needs_labels_with(cls, settings: SettingsT) -> bool:
        """Whether any label is looked at, with these settings. Where none is, images without one can be trained on."""
        return cls.needs_labels or cls.weights(settings)[1] > 0

    @classmethod
    def weights(cls, settings: SettingsT) -> tuple[float, float]:
        """(weight of what `losses` gives, weight of the labels' cross-entropy)."""
        return settings.weights if isinstance(settings, DistillationSettings) else (1.0, 0.0)

    @property
    def student_channels(self) -> Mapping[str, int]:
        """Student node → channels of its map."""
        return self.features.channels if self.features is not None else {}

    def run_student(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """The student's outputs of one pass: "logits" (B, K); of each of `student_nodes` "features@NODE" (B, C, H, W), and
        "features@NODE.prefix" (B, P, C) where the model has cls or register tokens."""
        if self.features is None:
            return {"logits": self.student(images_BCHW)}
        return self.features(self.student, images_BCHW)

    def give_up_student(self) -> None:
        """Become part of a whole that owns the student: its parameters count once, in the optimizer and in checkpoints."""
        student = self.student
        del self.student
        object.__setattr__(self, "student", student)

    @abstractmethod
    def losses(self, outputs: Mapping[str, Tensor], labels: Tensor, targets: DecodedTargets) -> dict[str, Tensor]:
        """Named, weighted scalar parts of the method's own loss; the same names in every step.

        labels: int64 (B,), -1 where there is none, or shares (B, K) of mixed views. Under autocast `outputs` may be half precision:
        sums belong into float32.
        """

    def forward(self, images_BCHW: Tensor, labels: Tensor, targets: DecodedTargets) -> dict[str, Tensor]:
        """One step's loss parts, "task" last; their sum is the loss."""
        outputs = self.run_student(images_BCHW)
        own_weight, task_weight = self.weights(self.settings)
        parts = {name: own_weight * part for name, part in self.losses(outputs, labels, targets).items()}
        if task_weight > 0:
            smoothing = getattr(self.settings, "smoothing", 0.0)
            parts["task"] = task_weight * cross_entropy(outputs["logits"], labels, smoothing=smoothing)
        return parts

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimizer factory leaves without weight decay: those that the student names."""
        of_student = getattr(self.student, "no_weight_decay", None)
        return {f"student.{name}" for name in of_student()} if of_student is not None else set()


def required_targets(method: type[Method[SettingsT]], settings: SettingsT, teacher: TeacherCard) -> tuple[str, ...]:
    """Names of the targets that a method needs of this teacher, as the cache has them."""
    specs = [parse_target(text) for text in method.requires(settings, teacher)]
    return tuple(dict.fromkeys(spec.name if spec.node is None else f"{spec.kind}@{teacher.resolve(spec.node)}" for spec in specs))


def loss_weights(*, distill: float | None, task: float | None) -> tuple[float, float]:
    """(distillation weight, task weight) by timm's rule (timm 1.0.31, task/distillation.py).

    Both given: as they are. Only the task weight: the distillation weight is 1 - task. Only the distillation weight: the task
    weight is 1. None: 1 and 1. Raises ValueError for a task weight above 1 that is given alone.
    """
    if distill is not None:
        return distill, 1.0 if task is None else task
    if task is None:
        return 1.0, 1.0
    if task > 1:
        raise ValueError(f"task loss weight {task} alone gives a distillation weight of {1 - task}; expected at most 1, or both weights")
    return 1.0 - task, task


def _shape_of(layer: TeacherLayer, target: str) -> TargetShape:
    card = layer.targets[target].identity
    return TargetShape(
        num_classes=card.num_classes or 0, grid=card.grid or (0, 0), channels=card.channels or 0, prefix_tokens=card.prefix_tokens or 0
    )
