"""YAML files that people write: policies and sweeps. Read safely, and so that nothing in them means something else than it looks."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from .errors import UsageError

_MAX_BYTES = 1 << 16
"""A number of the form 1:1:1:… takes PyYAML a time that grows as the square of its length."""


class StrictLoader(yaml.SafeLoader):
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


def _number(loader: StrictLoader, node: yaml.ScalarNode) -> int:
    """A whole number that can be shown: Python prints none of thousands of digits."""
    return _of_64_bits(loader.construct_yaml_int(node), node)


def _of_64_bits(value: int, node: yaml.Node) -> int:
    if value.bit_length() > 64:
        raise yaml.constructor.ConstructorError(None, None, "a number of more than 64 bits", node.start_mark)
    return value


StrictLoader.add_constructor("tag:yaml.org,2002:int", _number)
StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


class CoreLoader(StrictLoader):
    """The same with the scalars of YAML 1.2's core schema (https://yaml.org/spec/1.2.2/#103-core-schema) and no others: `on`, `no`, `1:30` and
    `2024-01-01` are text, `010` is ten."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own attribute: none of the parent's


def _whole(loader: CoreLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return _of_64_bits(int(text if base == 10 else text[2:], base), node)


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?[0-9]{1,40}|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    ("float", r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", list("-+.0123456789")),
):
    CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
CoreLoader.add_constructor("tag:yaml.org,2002:int", _whole)


def read_yaml(path: str | os.PathLike[str], *, where: str, expected: str, loader: type[StrictLoader] = StrictLoader) -> Any:
    """The value of a file. Raises UsageError that begins with `where` and says that `expected`, "a YAML file with …", was expected."""
    try:
        with open(Path(path).expanduser(), encoding="utf-8") as file:
            text = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{where}: can't be read: {error.strerror}; expected {expected}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not UTF-8 text; expected {expected}") from error
    if len(text) > _MAX_BYTES:
        raise UsageError(f"{where}: larger than {_MAX_BYTES} bytes; expected {expected}")
    try:
        return yaml.load(text, loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise UsageError(f"{where}: not YAML: {' '.join(filter(None, (error.context, error.problem)))}{place}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UsageError(f"{where}: hundreds of lists in each other; expected {expected}") from error
    except (ValueError, KeyError, AttributeError) as error:  # what PyYAML's constructors raise: of 2001-99-99, !!bool 'x', !!timestamp 'x'
        raise UsageError(f"{where}: a value can't be read: {error}; expected numbers, names and lists of them") from error
