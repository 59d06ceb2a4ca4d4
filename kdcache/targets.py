"""Target specs: what the user asks to record, `target[@node][:encoding[=argument]][,views=N]`, parsed. First step of extract.

A target's name is what stands before the colon (`logits`, `features@blocks.22`); it is the key under which the cache, the
reader and the methods know it. A name has one encoding in a cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from typing import Literal

from .errors import UsageError

_SPEC = re.compile(r"^(?P<name>logits|features@(?P<node>[A-Za-z0-9_.-]+))(?::(?P<encoding>[a-z0-9]+(?:=[^,]+)?))?(?:,views=(?P<views>[0-9]{1,7}))?$")
_MAX_SPEC = 300
_NODE = re.compile(r"^[A-Za-z0-9_]+(\.-?[A-Za-z0-9_]+)*$")

SPEC_HELP = "target[@node][:encoding[=argument]][,views=N], e.g. 'logits', 'features@blocks.22:int8' or 'features@norm:klt=0.99,views=4'"


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """One thing to record. `encoding` and `views` are None where the user left the choice to us."""

    kind: Literal["logits", "features"]
    node: str | None = None
    encoding: str | None = None
    """In canonical form, `name` or `name=argument`."""
    views: int | None = None

    @property
    def name(self) -> str:
        return self.kind if self.node is None else f"{self.kind}@{self.node}"

    @property
    def text(self) -> str:
        """As it is written."""
        return self.name + (f":{self.encoding}" if self.encoding is not None else "") + (f",views={self.views}" if self.views is not None else "")


def parse_target(text: str) -> TargetSpec:
    """The spec that `text` writes. Raises UsageError with the grammar."""
    match = _SPEC.fullmatch(text) if len(text) <= _MAX_SPEC else None
    if match is None or (match["node"] and not _NODE.fullmatch(match["node"])):
        raise UsageError(f"target {text!r:.200}: expected {SPEC_HELP}")
    views = int(match["views"]) if match["views"] else None
    if views == 0:
        raise UsageError(f"target {text!r}: views must be at least 1")
    kind: Literal["logits", "features"] = "features" if match["node"] else "logits"
    return TargetSpec(kind=kind, node=match["node"], encoding=canonical_encoding(match["encoding"]), views=views)


def canonical_encoding(text: str | None) -> str | None:
    """An encoding as it stands in cards: a number that is its argument in one form only, so that klt=0.990 and klt=.99 are one.

    Without exponent, leading or trailing zeros; what is no number is left as it is, for the encoding to refuse.
    """
    if text is None or "=" not in text:
        return text
    name, _, argument = text.partition("=")
    if len(argument) > _MAX_SPEC:
        return text
    try:
        number = Decimal(argument)
    except InvalidOperation:
        return text
    if not number.is_finite() or abs(number.adjusted()) > 30:
        return text
    plain = f"{number.normalize():f}"
    return f"{name}={plain}"


def merge_targets(given: Iterable[TargetSpec]) -> list[TargetSpec]:
    """All specs, one a name: what one leaves open another may say, and the most views win. Raises UsageError when one name is given two encodings."""
    specs: dict[str, TargetSpec] = {}
    for spec in given:
        earlier = specs.get(spec.name)
        if earlier is None:
            specs[spec.name] = spec
            continue
        if earlier.encoding and spec.encoding and earlier.encoding != spec.encoding:
            raise UsageError(f"target {spec.name!r} is asked for as {earlier.encoding!r} and as {spec.encoding!r}; expected one encoding a name")
        views = max(earlier.views or 0, spec.views or 0) or None
        specs[spec.name] = replace(earlier, encoding=earlier.encoding or spec.encoding, views=views)
    return list(specs.values())


def merge_wishes(given: Iterable[TargetSpec], settled: Iterable[str] = ()) -> list[TargetSpec]:
    """As `merge_targets`, of what methods wish: of several encodings of one name the first is taken, and none of a name in `settled`."""
    heard = set(settled)
    specs: list[TargetSpec] = []
    for spec in given:
        specs.append(replace(spec, encoding=None) if spec.name in heard else spec)
        if spec.encoding is not None:
            heard.add(spec.name)
    return merge_targets(specs)


def absolute_node(node: str, nodes: Sequence[str], containers: Mapping[str, int]) -> str | None:
    """The one of `nodes` that `node` names, or None. A negative number counts from the end of the module that holds the blocks, blocks.-1 is its last.

    containers: such a module → how many it holds. EfficientNet's nodes are blocks 0, 1, 2, 4 and 6 of 7: their names alone would not say it.
    """
    match = re.match(r"^(.+)\.(-[0-9]+)$", node)
    if match and match[1] in containers:
        node = f"{match[1]}.{containers[match[1]] + int(match[2])}"
    return node if node in nodes else None
