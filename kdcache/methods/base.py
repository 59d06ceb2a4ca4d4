"""The method interface: what the training loop asks of a distillation method, and the whole contract of one.

A method is an nn.Module that owns the student, any modules of its own (projectors, frozen tails), and the student's forward call.
The loop hands it normalised images, labels and the *decoded* targets that it asked for, sums the loss parts that it returns, and
trains whatever parameters of it want a gradient. Its state dict is what a checkpoint holds.

* `requires(settings)` says which targets must be in the cache, as specs that `kdcache extract --target` takes.
* `run_student` is the one forward pass. A method that wants more than logits overrides it and adds entries, for example from
  timm's `forward_intermediates`.
* `losses` turns outputs, labels and targets into named parts, each a scalar that is already weighted: their sum is the loss.
  Labels are int64 (B,); where the plan's policy mixes, and the method uses labels, float32 (B, K): the share of each class in the
  view. `kdcache.losses.cross_entropy` takes both. Targets are always the teacher's of the very view, mixed or not.
* `Settings` holds every constant of the method; `--set FIELD=VALUE` fills it.

Legend: B batch, C H W channels, height and width of the student's input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from ..plan import FrozenModel
from ..targets import parse_target

if TYPE_CHECKING:
    from ..cache import Cache, TeacherLayer

DecodedTargets = Mapping[str, Mapping[str, Tensor]]
"""Target name → value as `encodings.base` defines it: {"logits": (B, K)} or {"grid": (B, T, C)[, "prefix": (B, P, C)]}, float32."""


class MethodSettings(FrozenModel):
    """The constants of a method. Unknown fields and numbers that are not finite are refused."""


SettingsT = TypeVar("SettingsT", bound=MethodSettings)


class Method(nn.Module, ABC, Generic[SettingsT]):
    """One way to train a student. Made by `kdcache.methods.build`."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for help texts."""
    paper: ClassVar[str]
    """Where the formula comes from, or '' for none."""
    Settings: ClassVar[type[MethodSettings]]

    def __init__(self, *, student: nn.Module, cache: Cache, teacher: TeacherLayer | None, settings: SettingsT) -> None:
        """cache, teacher: for methods that take more than targets from the cache; teacher is None for one that requires no target."""
        super().__init__()
        self.student = student
        self.settings = settings
        self.target_names = tuple(parse_target(spec).name for spec in self.requires(settings))

    @classmethod
    @abstractmethod
    def requires(cls, settings: SettingsT) -> list[str]:
        """Specs of the targets that must be in the cache, e.g. ['logits']."""

    @classmethod
    def uses_labels(cls, settings: SettingsT) -> bool:  # noqa: ARG003 - the usual method does, whatever its settings
        """Whether `losses` looks at the labels. Where it does not, images without one can be trained on."""
        return True

    def run_student(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """The student's outputs by name, at least "logits" (B, K)."""
        return {"logits": self.student(images_BCHW)}

    @abstractmethod
    def losses(self, outputs: Mapping[str, Tensor], labels: Tensor, targets: DecodedTargets) -> dict[str, Tensor]:
        """Named, weighted scalar parts of the loss; the same names in every step."""

    def forward(self, images_BCHW: Tensor, labels: Tensor, targets: DecodedTargets) -> dict[str, Tensor]:
        """One step's loss parts. labels: int64 (B,), -1 where there is none, or shares (B, K) of mixed views."""
        return self.losses(self.run_student(images_BCHW), labels, targets)

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimizer factory leaves without weight decay: those that the student names."""
        of_student = getattr(self.student, "no_weight_decay", None)
        return {f"student.{name}" for name in of_student()} if of_student is not None else set()
