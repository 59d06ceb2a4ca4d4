"""Augmentation policies by name or from a YAML file: what `--augment` takes, before there is a plan.

A file holds the fields of `kdcache.plan.Policy`; `base: NAME` starts from a named policy, of which the file changes fields.
The plan keeps the policy's values, not the file's name, so that two files which say the same make the same plan.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from .errors import UsageError
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

_MAX_BYTES = 1 << 16
"""A number of the form 1:1:1:… takes PyYAML a time that grows as the square of its length."""
_CROPS: dict[Any, type[FrozenModel]] = {"center": CenterCrop, "random_resized": RandomResizedCrop}
_PARTS: dict[str, type[FrozenModel]] = {
    "three_augment": ThreeAugment,
    "rand_augment": RandAugment,
    "color_jitter": ColorJitter,
    "erase": RandomErasing,
    "mix": MixedViews,
}


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, with 1e-3 as the number it is, without the later of two equal keys winning in silence, and without aliases.

    Aliases can hold themselves, and a small file of aliases of aliases is a large value.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, f"the alias *{event.anchor} is not taken: write the value itself", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _number(loader: _Loader, node: yaml.ScalarNode) -> int:
    """A whole number that can be shown: Python prints none of thousands of digits."""
    value: int = loader.construct_yaml_int(node)
    if value.bit_length() > 64:
        raise yaml.constructor.ConstructorError(None, None, "a number of more than 64 bits", node.start_mark)
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _number)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def parse_policy(text: str) -> Policy:
    """The policy called `text`, or of the YAML file `text`. Raises UsageError that lists the known names, or says what is wrong in the file."""
    if text in POLICIES:
        return POLICIES[text]
    if text.lower().endswith((".yaml", ".yml")):
        return load_policy(text)
    names = ", ".join(POLICIES)
    raise UsageError(f"augmentation policy {text!r} is not known{_suggest(text, POLICIES)}; expected one of: {names}, or a FILE.yaml")


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """The policy of a YAML file. Raises UsageError naming the file, the path of the key, what was expected and what was found."""
    where = f"policy file {os.fspath(path)}"
    try:
        with open(Path(path).expanduser(), encoding="utf-8") as file:
            text = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{where}: can't be read: {error.strerror}; expected a YAML file, or one of: {', '.join(POLICIES)}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not UTF-8 text; expected a YAML file") from error
    if len(text) > _MAX_BYTES:
        raise UsageError(f"{where}: larger than {_MAX_BYTES} bytes; expected a YAML file with the fields of a policy")
    try:
        given = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UsageError(f"{where}: not a policy: hundreds of lists in each other; expected fields such as 'base: strong'") from error
    except (ValueError, KeyError, AttributeError) as error:  # what PyYAML's constructors raise: of 2001-99-99, !!bool 'x', !!timestamp 'x'
        raise UsageError(f"{where}: a value can't be read: {error}; expected numbers, names and lists of them") from error
    if not isinstance(given, dict):
        raise UsageError(f"{where}: expected fields such as 'base: strong', found {given!r:.80}")
    base: dict[str, Any] = {}
    if "base" in given:
        name = given.pop("base")
        if not isinstance(name, str) or name not in POLICIES:
            raise UsageError(f"{where}: base: expected one of: {', '.join(POLICIES)}, found {name!r:.80}{_suggest(str(name), POLICIES)}")
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
            raise UsageError(f"{where}: {prefix}{name}: there is no such key{_suggest(str(name), known)}; the keys here are: {', '.join(known)}")


def _changed(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the fields of `given`: part by part, but a crop of another kind replaces the base's."""
    result = dict(base)
    for name, value in given.items():
        before = base.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping) and value.get("kind", before.get("kind")) == before.get("kind"):
            value = {**before, **value}
        result[name] = value
    return result


def _suggest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
