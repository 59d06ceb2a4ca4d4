"""What a method may know of a teacher before anything is recorded: extract takes it from the model, train from the cache.

`Method.requires` looks at it, so that `extract --for METHOD` and train arrive at the same targets.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .errors import UsageError
from .targets import TargetSpec, absolute_node

if TYPE_CHECKING:
    from .cache import TeacherLayer


@dataclass(frozen=True, kw_only=True)
class TeacherCard:
    """A teacher's model and the nodes that it has."""

    model: str = ""
    """timm architecture name; empty for any teacher."""
    num_classes: int = 0
    """0: no head, or not known."""
    nodes: tuple[str, ...] = ()
    """Every node in forward order, `norm` last; empty where they are not known."""
    containers: Mapping[str, int] = field(default_factory=dict)
    """Modules that hold numbered nodes, such as `blocks` → how many they hold: what negative numbers count from."""

    def resolve(self, node: str) -> str:
        """The absolute name of `node`: negative numbers count from the end. Raises UsageError for one that the teacher lacks.

        Where the nodes are not known it is given back as it is.
        """
        if not self.nodes:
            return node
        found = absolute_node(node, self.nodes, self.containers)
        if found is None:
            near = difflib.get_close_matches(node, self.nodes, n=3, cutoff=0.3) or self.nodes[-4:]
            raise UsageError(
                f"teacher model {self.model} has no node {node!r}; near ones: {', '.join(near)}; it has {len(self.nodes)} nodes from"
                f" {self.nodes[0]!r} to {self.nodes[-1]!r}"
            )
        return found

    def absolute(self, spec: TargetSpec) -> TargetSpec:
        """The spec with the absolute name of its node; as it is where that is not known, or the teacher lacks it."""
        return spec if spec.node is None else replace(spec, node=absolute_node(spec.node, self.nodes, self.containers) or spec.node)


ANY_TEACHER = TeacherCard()
"""No teacher in particular: for listing what methods need."""


def card_of_layer(layer: TeacherLayer) -> TeacherCard:
    """The card of a teacher in a cache. Its nodes are noted beside its identity; a cache that lacks the note has them unknown."""
    identity, provenance = layer.document.identity, layer.document.provenance
    return TeacherCard(
        model=identity.model,
        num_classes=identity.num_classes,
        nodes=tuple(provenance.get("nodes", ())),
        containers=dict(provenance.get("containers", {})),
    )
