"""Distillation methods: one a file, under the interface of `base`. Chosen by name in train, built around a student.

method = kdcache.methods.build("kd", student=model, cache=cache, settings={"temperature": 2.0})
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from torch import nn

from ..errors import UsageError
from ..plan import explain_validation_error
from .base import DecodedTargets, Method, MethodSettings
from .ce import CrossEntropy
from .kd import KD

if TYPE_CHECKING:
    from ..cache import Cache

METHODS: dict[str, type[Method[Any]]] = {"ce": CrossEntropy, "kd": KD}


def method_class(name: str) -> type[Method[Any]]:
    """The method called `name`. Raises UsageError with the near and known names."""
    if name not in METHODS:
        raise UsageError(f"method {name!r} is not known{_suggest(name, METHODS)}; expected one of: {', '.join(METHODS)}")
    return METHODS[name]


def parse_settings(name: str, settings: Mapping[str, Any] | None = None) -> MethodSettings:
    """The settings of method `name`, its defaults overridden by `settings`. Raises UsageError for an unknown field or a bad value."""
    model = method_class(name).Settings
    for field in settings or {}:
        if field not in model.model_fields:
            known = ", ".join(model.model_fields) or "none"
            raise UsageError(f"method {name!r} has no field {field!r}{_suggest(field, model.model_fields)}; its fields: {known}")
    try:
        parsed = model.model_validate(dict(settings or {}))
    except ValidationError as error:
        raise UsageError(f"method {name!r}: {explain_validation_error(error)}") from error
    return parsed


def requirements(name: str) -> list[str]:
    """Specs of the targets that method `name` needs with its default settings, as `extract --for` records them. Raises UsageError."""
    specs: list[str] = method_class(name).requires(parse_settings(name))
    return specs


def build(name: str, *, student: nn.Module, cache: Cache, teacher: str | None = None, settings: Mapping[str, Any] | None = None) -> Method[Any]:
    """The method `name` around a student: an nn.Module that gives the loss parts of a batch.

    student: a timm model. teacher: its name in the cache, or None for the only one. settings: fields of the method to override.
    Raises UsageError for an unknown method, field or teacher, MissingError for a target that the cache does not hold.
    """
    method = method_class(name)
    parsed = parse_settings(name, settings)
    layer = cache.layer(teacher) if method.requires(parsed) else None
    built = method(student=student, cache=cache, teacher=layer, settings=parsed)
    for target in built.target_names:
        assert layer is not None
        cache.target_views(layer.name, target)  # raises MissingError, saying how to add it
    return built


def _suggest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


__all__ = ["METHODS", "DecodedTargets", "Method", "MethodSettings", "build", "method_class", "parse_settings", "requirements"]
