"""Distillation methods: one a file, under the interface of `base`. Chosen by name in train, built around a student.

method = kdcache.methods.build("kd", student=model, cache=cache, settings={"temperature": 2.0})
method = kdcache.methods.build("kd", student=model, cache=cache, teacher={"swin": 0.7, "vit": 0.3}, settings={"vit/temperature": 2.0})

A name is one of METHODS, `package.module:Class` for a method of one's own (docs/adding-a-method.md), or a sum of these, `nkd+vitkd`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from torch import nn

from ..errors import MissingError, UsageError, did_you_mean
from ..plan import explain_validation_error
from ..targets import TargetSpec, merge_wishes, parse_target
from ..teacher_card import ANY_TEACHER, TeacherCard, card_of_layer
from .base import DecodedTargets, DistillationSettings, Method, MethodSettings, required_targets
from .ce import CrossEntropy
from .dkd import DKD
from .frequency import Frequency
from .kd import KD
from .mgd import MGD
from .mimic import Mimic
from .nkd import NKD
from .scalekd import ScaleKD
from .several import SeveralSettings, TeacherChoice, override, several_of, split_settings, teacher_weights
from .sums import Sum, is_task_field, place_settings, sum_of
from .uskd import USKD
from .vitkd import ViTKD
from .wsld import WSLD

if TYPE_CHECKING:
    from ..cache import Cache, TeacherLayer

METHODS: dict[str, type[Method[Any]]] = {
    method.name: method for method in (CrossEntropy, KD, DKD, NKD, WSLD, ViTKD, ScaleKD, Mimic, MGD, Frequency, USKD)
}


@lru_cache(maxsize=64)
def method_class(name: str) -> type[Method[Any]]:
    """The method called `name`. Raises UsageError with the near and known names, or for a class that is no method."""
    if "+" in name:
        return sum_of([method_class(part.strip()) for part in name.split("+")], name=name.replace(" ", ""))
    if ":" in name:
        return _imported(name)
    if name not in METHODS:
        raise UsageError(
            f"method {name!r} is not known{did_you_mean(name, METHODS)}; expected one of: {', '.join(METHODS)}; a sum of them such as nkd+vitkd; or"
            f" package.module:Class"
        )
    return METHODS[name]


def _imported(name: str) -> type[Method[Any]]:
    """The class that `package.module:Class` names. Errors that its own code raises are left as they are."""
    module_name, _, class_name = name.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # an import of its own
        raise UsageError(
            f"method {name!r}: no module {error.name!r} can be imported; expected package.module:Class, its folder on PYTHONPATH"
        ) from error
    except (ValueError, TypeError) as error:
        if module_name and not module_name.startswith("."):
            raise  # of its own code
        raise UsageError(f"method {name!r}: {module_name!r} is no module name; expected package.module:Class") from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type) or not issubclass(found, Method):
        raise UsageError(f"method {name!r}: module {module_name} has no class {class_name!r} that derives from kdcache.methods.Method")
    lacks = sorted({one for one in ("name", "summary", "paper", "Settings") if not hasattr(found, one)} | found.__abstractmethods__)
    if lacks:
        raise UsageError(
            f"method {name!r}: class {class_name} does not say its {', '.join(lacks)}; expected every one of them: docs/adding-a-method.md"
        )
    return found


def parse_settings(name: str, settings: Mapping[str, Any] | None = None, teacher: TeacherChoice = None) -> MethodSettings:
    """The settings of method `name`, its defaults overridden by `settings`. Raises UsageError for an unknown field or a bad value.

    A sum's are named `part.field`, or `field` where one part only has it; {"part": {"field": value}} is the same. teacher: whom the method
    learns from; `teacher/field` is a field of one of them, before what is said of all. Of several they are SeveralSettings, unless the
    method needs none.
    """
    method = method_class(name)
    weights = teacher_weights(teacher)
    common, own = split_settings(settings or {}, list(weights))

    def place(given: Mapping[str, Any]) -> dict[str, Any]:
        return place_settings(method, given) if issubclass(method, Sum) else dict(given)

    if len(weights) < 2:
        return _parse(name, override(place(common), place(next(iter(own.values()), {}))))
    teachers = {one: _parse(name, override(place(common), place(fields))) for one, fields in own.items()}
    if any(method.requires(one, ANY_TEACHER) for one in teachers.values()):
        return SeveralSettings(teacher_weights=weights, teachers=teachers)
    if set_for := [one for one, fields in own.items() if fields]:
        raise UsageError(f"method {name!r} needs nothing of a teacher; expected its settings without {set_for[0]}/")
    return _parse(name, place(common))


def _parse(name: str, given: Mapping[str, Any]) -> MethodSettings:
    method = method_class(name)
    _check_fields(name, method.Settings, given)
    try:
        parsed = method.Settings.model_validate(given)
    except ValidationError as error:
        raise UsageError(f"method {name!r}: {explain_validation_error(error)}") from error
    return parsed


def _check_fields(name: str, model: type[BaseModel], given: Mapping[str, Any], prefix: str = "") -> None:
    for field, value in given.items():
        if field not in model.model_fields:
            known = ", ".join(f"{prefix}{one}" for one in own_first(model) if not (prefix and is_task_field(one))) or "none"
            raise UsageError(f"method {name!r} has no field {prefix + field!r}{did_you_mean(field, model.model_fields)}; its fields: {known}")
        inner = model.model_fields[field].annotation
        if isinstance(inner, type) and issubclass(inner, MethodSettings) and isinstance(value, Mapping):
            _check_fields(name, inner, value, f"{field}.")


def own_first(model: type[BaseModel]) -> list[str]:
    """Names of a model's fields, those of the method itself before those that all have."""
    shared = set(DistillationSettings.model_fields)
    return sorted(model.model_fields, key=lambda field: field in shared)


def requirements(name: str, teacher: TeacherCard = ANY_TEACHER, settings: Mapping[str, Any] | None = None) -> list[str]:
    """Specs of the targets that method `name` needs with these settings, as `extract --for` records them. Raises UsageError."""
    return list(method_class(name).requires(parse_settings(name, settings), teacher))


def tail_of(settings: Mapping[str, Mapping[str, Any]], teacher: TeacherCard) -> list[str]:
    """Modules of the teacher's tail that any of these methods (name → settings) runs, in order. Raises UsageError."""
    wanted = {module for name, given in settings.items() for module in method_class(name).tail_modules(parse_settings(name, given), teacher)}
    return sorted(wanted, key=teacher.nodes.index)


def share_out(names: Iterable[str], settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Method → those of the settings that are its own: a field goes to every method that has it, `method.field` to that one alone.

    Raises UsageError for a field that none of them has.
    """
    shared: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in settings.items():
        owners = {name: field for name in shared if (field := _own_field(name, key)) is not None}
        if not owners:
            known = sorted({field for name in shared for field, _ in _constants(method_class(name).Settings)})
            near = did_you_mean(key, known) or f"; their fields: {', '.join(known)}"
            raise UsageError(f"--set {key}: none of the methods {', '.join(shared) or 'that were asked for'} has this field{near}")
        for name, field in owners.items():
            shared[name][field] = value
    return shared


def _own_field(name: str, key: str) -> str | None:
    """The field of method `name` that a setting means, as `parse_settings` takes it; None if it has none of that name."""
    method = method_class(name)
    part, _, field = key.partition(".")
    if issubclass(method, Sum):
        fields = {one for part in method.parts.values() for one in part.Settings.model_fields} | set(method.Settings.model_fields)
        return key if key in fields or part in method.parts else None
    if part == method.name and field:
        return field
    return key if key in method.Settings.model_fields else None


def describe(name: str) -> dict[str, Any]:
    """What a person wants to know of method `name`, JSON types: {"name", "summary", "paper", "needs", "needs_tail", "needs_labels", "constants"}.

    needs: specs of targets; where they depend on the teacher, those of a plain ViT. constants: field → {"default", "help"}; a
    sum's parts as `part.field`. Raises UsageError for an unknown method.
    """
    method = method_class(name)
    return {
        "name": method.name,
        "summary": method.summary,
        "paper": method.paper,
        "needs": requirements(name),
        "needs_tail": _runs_tail(method),
        "needs_labels": method.needs_labels,
        "constants": dict(_constants(method.Settings)),
    }


def _runs_tail(method: type[Method[Any]]) -> bool:
    """Whether a method, or a part of a sum, may run modules of the teacher: which ones, its nodes decide."""
    parts = getattr(method, "parts", {}).values()
    return any(map(_runs_tail, parts)) if parts else method.tail_modules.__func__ is not Method.tail_modules.__func__  # type: ignore[attr-defined]


def _constants(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name in own_first(model):
        field = model.model_fields[name]
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, MethodSettings):
            own = {one: fact for one, fact in _constants(inner, f"{name}.") if not is_task_field(one.removeprefix(f"{name}."))}
            if issubclass(inner, DistillationSettings):
                own[f"{name}.distill_loss_weight"]["help"] = "Weight of this part. Default: 1."
            yield from own.items()
        else:
            yield f"{prefix}{name}", {"default": field.get_default(call_default_factory=True), "help": " ".join((field.description or "").split())}


def needed(name: str, settings: MethodSettings, cache: Cache, teacher: str | None = None) -> tuple[TeacherLayer | None, tuple[str, ...]]:
    """The teacher of `cache` that method `name` learns from and the names of the targets it needs; (None, ()) for a method that needs none.

    teacher: its name in the cache, or None for the only one. Raises UsageError for one that is not there, MissingError that names what
    the cache lacks and the command that adds it.
    """
    method = method_class(name)
    if not method.requires(settings, ANY_TEACHER):
        return None, ()
    if teacher is None and len(cache.teachers) > 1:
        one, other, *_ = sorted(cache.teachers)
        raise UsageError(
            f"{cache.store.url}: the cache has {len(cache.teachers)} teachers ({', '.join(sorted(cache.teachers))}); pass --teacher NAME, or several that"
            f" teach at once: --teacher {one} --teacher {other}; from Python, teacher={one!r}"
        )
    layer = cache.layer(teacher)
    card = card_of_layer(layer)
    targets = required_targets(method, settings, card)
    missing, modules = _lacking(method, settings, layer, card)
    if missing:
        names = ", ".join(repr(spec.name) for spec in missing)
        noun, them = ("target", "it") if len(missing) == 1 else ("targets", "them")
        raise MissingError(
            f"{cache.store.url}: teacher {layer.name!r} has no {noun} {names}, it has: {', '.join(sorted(layer.targets)) or 'none'}; method {name!r}"
            f" needs {them}: run '{_extract_line(cache, layer, [spec.text for spec in missing])}' to add {them}{_what_would_do(method, settings, layer, card)}"
        )
    if modules:
        found = f"has modules {', '.join(layer.tail.identity.modules)}" if layer.tail is not None else "is not there"
        raise MissingError(
            f"{cache.store.url}: method {name!r} runs {', '.join(modules)} of teacher {layer.name!r}, whose tail {found}:"
            f" run '{_extract_line(cache, layer, [], method=name, settings=_that_matter(name, settings, card))}' to add it"
            f"{_what_would_do(method, settings, layer, card)}"
        )
    return layer, targets


def _lacking(method: type[Method[Any]], settings: MethodSettings, layer: TeacherLayer, card: TeacherCard) -> tuple[list[TargetSpec], Sequence[str]]:
    """The targets that the method needs and the cache does not have, and the tail, if it does not hold all of that."""
    specs = [card.absolute(parse_target(text)) for text in method.requires(settings, card)]
    modules = method.tail_modules(settings, card)
    has = layer.tail.identity.modules if layer.tail is not None else ()
    return merge_wishes(spec for spec in specs if spec.name not in layer.targets), () if set(modules) <= set(has) else modules


def _what_would_do(method: type[Method[Any]], settings: MethodSettings, layer: TeacherLayer, card: TeacherCard) -> str:
    """For the end of an error: the fields with which the method needs no more than the cache has; '' if none would do."""
    tail = layer.tail.identity.modules if layer.tail is not None else ()
    would_do: list[Mapping[str, Any]] = []
    for fields in method.alternatives(settings, card, tail):
        other = method.Settings.model_validate(override(settings.model_dump(exclude_unset=True), fields))
        options = dict(_flat(fields))
        if not any(_lacking(method, other, layer, card)) and not any(one.items() <= options.items() for one in would_do):
            would_do.append(options)
    return f"; what is there serves with {', or with '.join(map(_as_options, would_do))}" if would_do else ""


def needed_targets(name: str, settings: MethodSettings, cache: Cache, teacher: TeacherChoice = None) -> dict[str, tuple[str, ...]]:
    """Each teacher that method `name` learns from → the names of the targets that it needs of that one; empty for a method that needs none.

    settings, teacher: as `parse_settings` gave and took them. Raises as `needed`, and UsageError for logits of teachers that differ in
    their number of classes.
    """
    if isinstance(settings, SeveralSettings):
        targets = {one: needed(name, own, cache, one)[1] for one, own in settings.teachers.items()}
        classes = {one: cache.layer(one).document.identity.num_classes for one in teachers_of_logits(name, settings, targets)}
        if len({*classes.values()}) > 1:
            counts = ", ".join(f"{one!r} has {count}" for one, count in classes.items())
            raise UsageError(
                f"{cache.store.url}: method {name!r} matches the logits of teachers that differ in their number of classes: {counts}; expected one"
                f" number; train from one of them, or by a method on features, such as mimic"
            )
        return targets
    chosen = list(teacher_weights(teacher))
    for one in chosen:
        cache.layer(one)  # raises UsageError, also for a method that needs none
    layer, names = needed(name, settings, cache, chosen[0] if chosen else None)
    return {layer.name: names} if layer is not None else {}


def teachers_of_logits(name: str, settings: MethodSettings, targets: Mapping[str, Sequence[str]]) -> list[str]:
    """The teachers among `needed_targets` whose logits the student's are compared with, read from the cache or computed by the method."""
    method = method_class(name)
    own = settings.teachers if isinstance(settings, SeveralSettings) else dict.fromkeys(targets, settings)
    return [teacher for teacher, names in targets.items() if "logits" in names or method.computes_logits(own[teacher])]


def uses_labels(name: str, settings: MethodSettings) -> bool:
    """Whether method `name` looks at any label, with settings as `parse_settings` gave them."""
    method = method_class(name)
    return several_of(method).needs_labels_with(settings) if isinstance(settings, SeveralSettings) else method.needs_labels_with(settings)


def _that_matter(name: str, settings: MethodSettings, card: TeacherCard) -> dict[str, Any]:
    """Of the settings that differ from the default, flat, those without which other targets or another tail are needed."""
    method = method_class(name)

    def needs(given: Mapping[str, Any]) -> tuple[Any, ...]:
        parsed = parse_settings(name, given)
        return tuple(method.requires(parsed, card)), tuple(method.tail_modules(parsed, card))

    given = dict(_flat(settings.model_dump(exclude_unset=True)))
    wanted = needs(given)
    for key in list(given):
        without = {other: value for other, value in given.items() if other != key}
        if needs(without) == wanted:
            given = without
    return given


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _extract_line(
    cache: Cache, layer: TeacherLayer, specs: Iterable[str], *, method: str | None = None, settings: Mapping[str, Any] | None = None
) -> str:
    """The command that adds targets of a teacher, or all that a method needs of it, as far as the cache remembers how it was made."""
    provenance = layer.document.provenance
    folders = {str(PurePath(cache.source(shard).path).parent) for shard in cache.shards}
    shards = shlex.quote(folders.pop()) if len(folders) == 1 else "SHARDS"
    words = ["kdcache", "extract", shards, shlex.quote(cache.store.url), "--teacher", shlex.quote(str(provenance.get("source", "...")))]
    for key, value in provenance.get("model_args", {}).items():
        words += ["--model-kwargs", shlex.quote(f"{key}={value}")]
    if "checkpoint" in provenance:
        words += ["--checkpoint", shlex.quote(str(provenance["checkpoint"]))]
    words += ["--name", layer.name]
    for spec in specs:
        words += ["--target", spec]
    if method is not None:
        words += ["--for", shlex.quote(method)]
    if settings:
        words.append(_as_options(settings))
    return " ".join(words)


def _as_options(settings: Mapping[str, Any]) -> str:
    """Fields as the command line takes them."""
    return " ".join(f"--set {shlex.quote(f'{field}={value if isinstance(value, str) else json.dumps(value)}')}" for field, value in settings.items())


def build(name: str, *, student: nn.Module, cache: Cache, teacher: TeacherChoice = None, settings: Mapping[str, Any] | None = None) -> Method[Any]:
    """The method `name` around a student: an nn.Module that gives the loss parts of a batch.

    student: a timm model. teacher: its name in the cache, or None for the only one; several as ["a", "b"], of equal weights, or {"a": 0.7,
    "b": 0.3}: targets and loss parts are then named `a/logits`, `a/distill`. settings: fields of the method to override, `a/field` of one teacher.
    Raises UsageError for an unknown method, field or teacher, MissingError for a target that the cache does not hold, StudentError
    for a student that does not have what the method looks at.
    """
    parsed = parse_settings(name, settings, teacher)
    layers = {one: cache.layer(one) for one in needed_targets(name, parsed, cache, teacher)}
    method = method_class(name)
    if isinstance(parsed, SeveralSettings):
        return several_of(method)(student=student, cache=cache, teachers=layers, settings=parsed)
    return method(student=student, cache=cache, teacher=next(iter(layers.values()), None), settings=parsed)


__all__ = [
    "METHODS", "DecodedTargets", "DistillationSettings", "Method", "MethodSettings", "SeveralSettings", "TeacherCard", "TeacherChoice", "build", "describe",
    "method_class", "needed", "needed_targets", "own_first", "parse_settings", "requirements", "share_out", "tail_of", "teacher_weights",
    "teachers_of_logits", "uses_labels",
]  # fmt: skip
