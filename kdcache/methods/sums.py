"""Sums of methods, `a+b`: each part with its own constants and modules, one student, one forward pass, the labels' cross-entropy once.

The class of a sum is made on demand: its `Settings` has a field for each part, beside the weights and the smoothing of the whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, create_model
from torch import Tensor, nn

from ..errors import UsageError
from ..student_features import StudentFeatures
from ..targets import merge_wishes, parse_target
from ..teacher_card import TeacherCard
from .base import DecodedTargets, DistillationSettings, Method

if TYPE_CHECKING:
    from ..cache import Cache, TeacherLayer

WHOLE = tuple(DistillationSettings.model_fields)
"""Fields that a sum has for itself: its parts have no cross-entropy of their own."""


def is_task_field(field: str) -> bool:
    """Whether a field is about the labels' cross-entropy, which the parts of a sum do not have."""
    return field in ("task_loss_weight", "smoothing")


class SumSettings(DistillationSettings):
    """Constants of a sum: a field for each part, and these for the whole."""

    def to_json(self) -> dict[str, Any]:
        """Without the parts' smoothing, which means nothing in a sum."""
        body = super().to_json()
        for fields in body.values():
            if isinstance(fields, dict):
                fields.pop("smoothing", None)
        return body


class Sum(Method[Any]):
    """Methods added up. Made by `sum_of`."""

    paper: ClassVar[str] = ""
    parts: ClassVar[Mapping[str, type[Method[Any]]]]
    """Name of each part, as it stands in settings → its class."""

    def __init__(self, *, student: nn.Module, cache: Cache, teacher: TeacherLayer | None, settings: Any) -> None:
        super().__init__(student=student, cache=cache, teacher=teacher, settings=settings)
        self.terms = nn.ModuleDict()
        nodes: list[str] = []
        for name, method in self.parts.items():
            part = method(student=student, cache=cache, teacher=teacher, settings=getattr(settings, name))
            nodes += [node for node in part.student_nodes() if node not in nodes]
            part.give_up_student()
            self.terms[name] = part
        self.settings = settings.model_copy(update={name: part.settings for name, part in self.terms.items()})  # presets filled in
        self.features = StudentFeatures(student, nodes, view_size=cache.plan.size) if nodes else None

    def target_parts(self) -> Mapping[str, Sequence[str]]:
        """What any part of the sum looks at: a target is read whole as soon as one part wants it so."""
        wanted: dict[str, list[str] | None] = {}
        for part in self.terms.values():
            assert isinstance(part, Method)
            chosen = part.target_parts()
            for target in part.target_names:
                before = wanted.get(target, [])
                wanted[target] = None if before is None or target not in chosen else [*before, *(one for one in chosen[target] if one not in before)]
        return {target: names for target, names in wanted.items() if names is not None}

    @classmethod
    def requires(cls, settings: Any, teacher: TeacherCard) -> Sequence[str]:
        """What the parts need, each target once: in the encoding that the first part with a wish has."""
        texts = [text for name, method in cls.parts.items() for text in method.requires(getattr(settings, name), teacher)]
        return [spec.text for spec in merge_wishes(teacher.absolute(parse_target(text)) for text in texts)]

    @classmethod
    def tail_modules(cls, settings: Any, teacher: TeacherCard) -> Sequence[str]:
        """What the parts run, in the teacher's order."""
        wanted = {module for name, method in cls.parts.items() for module in method.tail_modules(getattr(settings, name), teacher)}
        return sorted(wanted, key=teacher.nodes.index)

    @classmethod
    def alternatives(cls, settings: Any, teacher: TeacherCard, tail: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """Those of the parts, alone and together: {part: {field: value}}."""
        of_parts = [
            [{}, *({name: fields} for fields in method.alternatives(getattr(settings, name), teacher, tail))] for name, method in cls.parts.items()
        ]
        for chosen in product(*of_parts):
            yield {name: fields for part in chosen for name, fields in part.items()}

    @classmethod
    def computes_logits(cls, settings: Any) -> bool:
        return any(method.computes_logits(getattr(settings, name)) for name, method in cls.parts.items())

    def losses(self, outputs: Mapping[str, Tensor], labels: Tensor, targets: DecodedTargets) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        for name, part in self.terms.items():
            assert isinstance(part, Method)
            weight = part.weights(part.settings)[0]
            parts |= {f"{name}_{key}": weight * value for key, value in part.losses(outputs, labels, targets).items()}
        return parts

    def no_weight_decay(self) -> set[str]:
        """The student's, and what each part says of its own modules."""
        named = super().no_weight_decay()
        for name, part in self.terms.items():
            assert isinstance(part, Method)
            named |= {f"terms.{name}.{one}" for one in part.no_weight_decay() if not one.startswith("student.")}
        return named


def sum_of(methods: Sequence[type[Method[Any]]], *, name: str) -> type[Sum]:
    """The sum of these methods. Raises UsageError for two of one name, and for one that can't be part of a sum."""
    parts: dict[str, type[Method[Any]]] = {}
    for method in methods:
        if method.name in parts:
            raise UsageError(f"method {name!r}: {method.name!r} is in it twice; expected each method once, its weight is a field of it")
        if method.name == "ce":
            raise UsageError(f"method {name!r}: every method has the labels' cross-entropy already; leave 'ce' out and set task_loss_weight")
        if method.run_student is not Method.run_student or method.forward is not Method.forward:
            raise UsageError(f"method {name!r}: {method.name!r} runs the student in a way of its own and can't be part of a sum")
        if not re.fullmatch("[a-z][a-z0-9_]*", method.name) or method.name in WHOLE:
            raise UsageError(f"method {name!r}: part {method.name!r} can't be told apart in --set; expected a name of a-z, 0-9 and _")
        parts[method.name] = method
    fields: dict[str, Any] = {part: (method.Settings, Field(default_factory=method.Settings)) for part, method in parts.items()}
    settings = create_model(f"SumSettings[{name}]", __base__=SumSettings, __doc__=f"Constants of `{name}`.", **fields)
    body = {
        "name": "+".join(parts),
        "summary": "; ".join(method.summary for method in parts.values()),
        "Settings": settings,
        "needs_labels": any(method.needs_labels for method in parts.values()),
        "parts": parts,
    }
    return type(f"Sum[{name}]", (Sum,), body)


def place_settings(method: type[Sum], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they were given, `vitkd.alpha` or `alpha`, in the shape of `method.Settings`. Raises UsageError.

    A name without a part is a field of the whole, or of the only part that has it.
    """
    placed: dict[str, Any] = {}

    def put(part: str, field: str, value: Any) -> None:
        if is_task_field(field):
            raise UsageError(f"method {method.name!r}: {part}.{field}: the labels' cross-entropy counts once in a sum; set {field} without a part")
        fields = placed.setdefault(part, {})
        if not isinstance(fields, dict) or field in fields:
            raise UsageError(f"method {method.name!r}: field {part}.{field} is given twice; expected it once")
        fields[field] = value

    for key, value in given.items():
        part, dot, field = key.partition(".")
        if dot and part in method.parts:
            put(part, field, value)
        elif key in method.parts and isinstance(value, Mapping):
            for name, item in value.items():
                put(key, str(name), item)
        elif key in WHOLE:
            placed[key] = value
        else:
            owners = [part for part, one in method.parts.items() if key in one.Settings.model_fields]
            if len(owners) > 1:
                raise UsageError(
                    f"method {method.name!r}: {key!r} is a field of {' and of '.join(owners)}; say {' or '.join(f'{p}.{key}' for p in owners)}"
                )
            if not owners:
                placed[key] = value  # refused with the known names
            else:
                put(owners[0], key, value)
    return placed
