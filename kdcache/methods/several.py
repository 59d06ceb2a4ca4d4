"""Several teachers at once: for each a method of its own, one student, one forward pass, the labels' cross-entropy once.

    loss = Σ over teachers: weight · the method's own loss  +  task weight · cross-entropy

What belongs to one teacher is named `teacher/…`: settings (`a/temperature`), the targets of a batch (`a/logits`), loss parts (`a/distill`). No name
of a teacher has a slash. Teachers are taken in the order of their names, however they are given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from torch import Tensor, nn

from ..errors import UsageError
from ..student_features import StudentFeatures
from ..teacher_card import TeacherCard
from .base import DecodedTargets, Method, MethodSettings
from .sums import is_task_field

if TYPE_CHECKING:
    from ..cache import Cache, TeacherLayer

TeacherChoice: TypeAlias = "str | Sequence[str] | Mapping[str, float] | None"
"""A teacher's name in the cache, several names, each as `name` or as `name=weight`, name → weight, or None: the only teacher."""


def teacher_weights(teacher: TeacherChoice) -> dict[str, float]:
    """Name → weight in the loss, in name order; empty for None or no name. Without weights they are equal and add up to 1, what one teacher has.

    Raises UsageError for a name that is given twice, a weight that is no number above 0, and one of a single teacher that is not 1.
    """
    if not teacher:
        return {}
    given = dict(teacher) if isinstance(teacher, Mapping) else _read([teacher] if isinstance(teacher, str) else teacher)
    for name, weight in given.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not (math.isfinite(weight) and weight > 0):
            raise UsageError(f"--teacher {name}={weight}: expected a weight above 0; leave out a teacher that is not to count")
        if len(given) == 1 and weight != 1:
            raise UsageError(f"--teacher {name}={weight}: one teacher alone has weight 1; expected several, or distill_loss_weight={weight}")
    return {name: float(given[name]) for name in sorted(given)}


def _read(texts: Sequence[str]) -> dict[str, float]:
    """`name` each, or `name=weight` each."""
    split = [text.partition("=") for text in texts]
    weighted = [equals != "" for _, equals, _ in split]
    shown = f"--teacher {' --teacher '.join(texts)}"
    if len({name for name, _, _ in split}) < len(split) or any(weighted) != all(weighted):
        raise UsageError(f"{shown}: expected each name once, and all of them with a weight or none")
    try:
        return {name: float(weight) if equals else 1 / len(split) for name, equals, weight in split}
    except ValueError as error:
        raise UsageError(f"{shown}: expected a number behind the '=' ({error})") from error


def split_settings(settings: Mapping[str, Any], teachers: Sequence[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(settings of all teachers, teacher → those of it alone, `teacher/field` without its prefix). Raises UsageError."""
    common: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {name: {} for name in teachers}
    for key, value in settings.items():
        teacher, slash, field = key.partition("/")
        if not slash:
            common[key] = value
        elif teacher not in own:
            known = f"one of {', '.join(teachers)}" if teachers else f"'--teacher {teacher}' beside it"
            raise UsageError(f"setting {key!r}: {teacher!r} is no teacher of this run; expected {known}")
        elif is_task_field(field):
            raise UsageError(f"setting {key!r}: the labels' cross-entropy counts once; set {field} without a teacher")
        else:
            own[teacher][field] = value
    return common, own


def override(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`common` with the fields of `own` in place of its; of a sum's parts field by field."""
    merged = dict(common)
    for field, value in own.items():
        before = merged.get(field)
        merged[field] = override(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return merged


class SeveralSettings(MethodSettings):
    """Constants of a method for each of several teachers, and the teachers' weights."""

    teacher_weights: Mapping[str, float]
    """Teacher → factor on all of its method's own loss."""
    teachers: Mapping[str, MethodSettings]
    """Teacher → the constants that its method has."""

    @property
    def smoothing(self) -> float:
        """Of the labels' cross-entropy: alike for all."""
        return float(getattr(next(iter(self.teachers.values())), "smoothing", 0.0))

    def to_json(self) -> dict[str, Any]:
        """As settings are given: `teacher/field`, and without a teacher what counts once. The weights are no settings."""
        body: dict[str, Any] = {}
        for teacher, settings in self.teachers.items():
            body |= {field if is_task_field(field) else f"{teacher}/{field}": value for field, value in settings.to_json().items()}
        return body


class SeveralTeachers(Method[SeveralSettings]):
    """One method for each of several teachers, added up. Made by `several_of`."""

    paper: ClassVar[str] = ""
    Settings: ClassVar[type[MethodSettings]] = SeveralSettings
    method: ClassVar[type[Method[Any]]]
    """What each teacher teaches by; may be a sum."""

    def __init__(self, *, student: nn.Module, cache: Cache, teachers: Mapping[str, TeacherLayer], settings: SeveralSettings) -> None:
        super().__init__(student=student, cache=cache, teacher=None, settings=settings)
        self.terms = nn.ModuleList()  # by number: a teacher's name may have dots
        nodes: list[str] = []
        for name, own in settings.teachers.items():
            part = self.method(student=student, cache=cache, teacher=teachers[name], settings=own)
            nodes += [node for node in part.student_channels if node not in nodes]
            part.give_up_student()
            self.terms.append(part)
        self.settings = settings.model_copy(update={"teachers": {name: part.settings for name, _, part in self._parts()}})  # presets filled in
        self.target_names = tuple(f"{name}/{target}" for name, _, part in self._parts() for target in part.target_names)
        self.teacher_shapes = {f"{name}/{target}": shape for name, _, part in self._parts() for target, shape in part.teacher_shapes.items()}
        self.teacher_encodings = {f"{name}/{target}": one for name, _, part in self._parts() for target, one in part.teacher_encodings.items()}
        self.features = StudentFeatures(student, nodes, view_size=cache.plan.size) if nodes else None

    def _parts(self) -> Iterator[tuple[str, float, Method[Any]]]:
        """(teacher, its weight, its method)"""
        for (name, weight), part in zip(self.settings.teacher_weights.items(), self.terms, strict=True):
            assert isinstance(part, Method)
            yield name, weight, part

    @classmethod
    def requires(cls, settings: SeveralSettings, teacher: TeacherCard) -> Sequence[str]:
        """All that any of the teachers must have: which one is not known here."""
        return list(dict.fromkeys(text for own in settings.teachers.values() for text in cls.method.requires(own, teacher)))

    @classmethod
    def weights(cls, settings: SeveralSettings) -> tuple[float, float]:
        """(1, the task weight): the mean over the teachers, by weight, where constants of their pairs make it differ."""
        tasks = [cls.method.weights(own)[1] for own in settings.teachers.values()]
        factors = settings.teacher_weights.values()
        mean = sum(factor * task for factor, task in zip(factors, tasks, strict=True)) / sum(factors)
        return 1.0, tasks[0] if len({*tasks}) == 1 else mean

    def target_parts(self) -> Mapping[str, Sequence[str]]:
        return {f"{name}/{target}": chosen for name, _, part in self._parts() for target, chosen in part.target_parts().items()}

    def losses(self, outputs: Mapping[str, Tensor], labels: Tensor, targets: DecodedTargets) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        for name, weight, part in self._parts():
            of_teacher = {target: targets[f"{name}/{target}"] for target in part.target_names}
            factor = weight * part.weights(part.settings)[0]
            parts |= {f"{name}/{key}": factor * value for key, value in part.losses(outputs, labels, of_teacher).items()}
        return parts

    def no_weight_decay(self) -> set[str]:
        """The student's, and what each teacher's method says of its own modules."""
        named = super().no_weight_decay()
        for number, (_, _, part) in enumerate(self._parts()):
            named |= {f"terms.{number}.{one}" for one in part.no_weight_decay() if not one.startswith("student.")}
        return named


def several_of(method: type[Method[Any]]) -> type[SeveralTeachers]:
    """The method for several teachers. Raises UsageError for one that runs the student in a way of its own: there is one pass for all."""
    if method.run_student is not Method.run_student or method.forward is not Method.forward:
        raise UsageError(f"method {method.name!r} runs the student in a way of its own and takes one teacher; expected one --teacher")
    body = {"name": method.name, "summary": method.summary, "needs_labels": method.needs_labels, "method": method}
    return type(f"SeveralTeachers[{method.name}]", (SeveralTeachers,), body)
