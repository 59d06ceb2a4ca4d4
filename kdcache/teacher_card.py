"""What a method may know of a teacher before anything is recorded: extract takes it from the model, train from the cache.

`Method.requires` looks at it, so that `extract --for METHOD` and train arrive at the same targets.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import UsageError
from .targets import absolute_node

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

    def resolve(self, node: str) -> str:
        """The absolute name of `node`: negative numbers count from the end. Raises UsageError for one that the teacher lacks.

        Where the nodes are not known it is given back as it is.
        """
        if not self.nodes:
            return node
        found = absolute_node(node, self.nodes)
        if found is None:
            near = difflib.get_close_matches(node, self.nodes, n=3, cutoff=0.3) or self.nodes[-4:]
            raise UsageError(
                f"teacher model {self.model} has no node {node!r}; near ones: {', '.join(near)}; it has {len(self.nodes)} nodes from"
                f" {self.nodes[0]!r} to {self.nodes[-1]!r}"
            )
        return found


ANY_TEACHER = TeacherCard()
"""No teacher in particular: for listing what methods need."""


def card_of_layer(layer: TeacherLayer) -> TeacherCard:
    """The card of a teacher in a cache. Its nodes are noted beside its identity; a cache that lacks the note has them unknown."""
    identity = layer.document.identity
    nodes: Sequence[str] = layer.document.provenance.get("nodes", ())
    return TeacherCard(model=identity.model, num_classes=identity.num_classes, nodes=tuple(nodes))
