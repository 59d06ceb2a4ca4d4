"""Augmentation policies by name or from a YAML file: what `--augment` takes, before there is a plan.

A file holds the fields of `kdcache.plan.Policy`; `base: NAME` starts from a named policy, of which the file changes fields.
The plan keeps the policy's values, not the file's name, so that two files which say the same make the same plan.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from .errors import UsageError, did_you_mean
from .plan import (
    POLICIES,
    CenterCrop,
    ColorJitter,
    FrozenModel,
    MixedViews,
    Policy,
    RandAugment,
    RandomErasing,
    RandomResizedCrop,
    ThreeAugment,
    explain_validation_error,
)
from .yaml_file import read_yaml

_CROPS: dict[Any, type[FrozenModel]] = {"center": CenterCrop, "random_resized": RandomResizedCrop}
_PARTS: dict[str, type[FrozenModel]] = {
    "three_augment": ThreeAugment,
    "rand_augment": RandAugment,
    "color_jitter": ColorJitter,
    "erase": RandomErasing,
    "mix": MixedViews,
}


def parse_policy(text: str) -> Policy:
    """The policy called `text`, or of the YAML file `text`. Raises UsageError that lists the known names, or says what is wrong in the file."""
    if text in POLICIES:
        return POLICIES[text]
    if text.lower().endswith((".yaml", ".yml")):
        return load_policy(text)
    names = ", ".join(POLICIES)
    raise UsageError(f"augmentation policy {text!r} is not known{did_you_mean(text, POLICIES)}; expected one of: {names}, or a FILE.yaml")


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """The policy of a YAML file. Raises UsageError naming the file, the path of the key, what was expected and what was found."""
    where = f"policy file {os.fspath(path)}"
    given = read_yaml(
        path, where=where, expected=f"a YAML file with the fields of a policy, such as 'base: strong', or one of: {', '.join(POLICIES)}"
    )
    if not isinstance(given, dict):
        raise UsageError(f"{where}: expected fields such as 'base: strong', found {given!r:.80}")
    base: dict[str, Any] = {}
    if "base" in given:
        name = given.pop("base")
        if not isinstance(name, str) or name not in POLICIES:
            raise UsageError(f"{where}: base: expected one of: {', '.join(POLICIES)}, found {name!r:.80}{did_you_mean(str(name), POLICIES)}")
        base = POLICIES[name].to_json()
    _check_keys(given, base, where)
    try:
        text = json.dumps(_changed(base, given), default=str)
    except (TypeError, RecursionError) as error:
        raise UsageError(f"{where}: a value that is no field of a policy: {error}; expected numbers, names and lists of them") from error
    try:
        return Policy.model_validate_json(text, strict=True)  # lists are tuples in JSON only
    except ValidationError as error:
        raise UsageError(
            f"{where}: {explain_validation_error(error).replace('crop.center.', 'crop.').replace('crop.random_resized.', 'crop.')}"
        ) from error


def _check_keys(given: Mapping[Any, Any], base: Mapping[str, Any], where: str) -> None:
    _check_fields(given, Policy, "", where, more=("base",))
    for name, value in given.items():
        if not isinstance(value, Mapping):
            continue
        model = _PARTS.get(name)
        if name == "crop":
            kind = value.get("kind", base.get("crop", {}).get("kind"))
            if kind is None:
                raise UsageError(f"{where}: crop.kind: expected one of: {', '.join(_CROPS)}, found none")
            model = _CROPS.get(kind) if isinstance(kind, str) else None
        if model is not None:
            _check_fields(value, model, f"{name}.", where)


def _check_fields(given: Mapping[Any, Any], model: type[FrozenModel], prefix: str, where: str, more: tuple[str, ...] = ()) -> None:
    known = [*more, *model.model_fields]
    for name in given:
        if name not in known:
            raise UsageError(f"{where}: {prefix}{name}: there is no such key{did_you_mean(str(name), known)}; the keys here are: {', '.join(known)}")


def _changed(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the fields of `given`: part by part, but a crop of another kind replaces the base's."""
    result = dict(base)
    for name, value in given.items():
        before = base.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping) and value.get("kind", before.get("kind")) == before.get("kind"):
            value = {**before, **value}
        result[name] = value
    return result
