"""Before stage one: what could be recorded of a teacher, and what a view of it would cost. Needs no weights: shapes do not depend on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcache.console import aligned, counted, human_bytes
from kdcache.encodings import TargetShape, build_encoding, default_encoding
from kdcache.nodes import list_nodes
from kdcache.teacher import load_teacher


@dataclass(frozen=True, kw_only=True)
class NodesConfig:
    """Which model to look at."""

    teacher: str
    """timm name, `hf-hub:…` or `local-dir:…`."""
    checkpoint: str | None = None
    """Weights file: says how many classes the model has."""
    model_args: Mapping[str, Any] = field(default_factory=dict)


def describe_nodes(config: NodesConfig) -> dict[str, Any]:
    """The model and its nodes in forward order. Raises TeacherError for a model that can't be built.

    Each node has `grid` [rows, columns], `channels`, `prefix_tokens` and `bytes_per_view` in the default encoding, before compression; or
    `reason`, why it can't be recorded. `logits` is None for a model without a classifier.
    """
    checkpoint = Path(config.checkpoint) if config.checkpoint else None
    teacher = load_teacher(config.teacher, pretrained=False, checkpoint=checkpoint, model_args=config.model_args)
    shapes, reasons = teacher.examine_nodes()
    identity = teacher.identity
    return {
        "model": identity.model,
        "input_size": identity.preprocessing.input_size,
        "logits": _cost("logits", TargetShape(num_classes=identity.num_classes)) | {"classes": identity.num_classes} if teacher.has_logits else None,
        "nodes": [{"node": node, **(_node(shapes[node]) if node in shapes else {"reason": reasons[node]})} for node in list_nodes(teacher.model)],
    }


def _node(shape: TargetShape) -> dict[str, Any]:
    return {"grid": list(shape.grid), "channels": shape.channels, "prefix_tokens": shape.prefix_tokens, **_cost("features", shape)}


def _cost(kind: str, shape: TargetShape) -> dict[str, Any]:
    encoding = default_encoding(kind)
    return {"encoding": encoding, "bytes_per_view": build_encoding(kind, encoding, shape).bytes_per_view}


def nodes_as_text(facts: Mapping[str, Any]) -> str:
    """For the person at the terminal: a line on the model, then one line a node."""
    logits = facts["logits"]
    head = (
        f"{counted(logits['classes'], 'class')}: logits:{logits['encoding']} takes {human_bytes(logits['bytes_per_view'])} a view"
        if logits
        else "no classifier"
    )
    rows = [("node", "grid", "channels", "prefix", f"{default_encoding('features')} a view")]
    for node in facts["nodes"]:
        if "reason" not in node:
            grid = f"{node['grid'][0]}x{node['grid'][1]}"
            rows.append((node["node"], grid, str(node["channels"]), str(node["prefix_tokens"]), human_bytes(node["bytes_per_view"])))
    lines = [aligned(rows, left=1)]
    lines += [f"{node['node']}: can't be recorded: {node['reason']}" for node in facts["nodes"] if "reason" in node]
    return "\n".join([f"{facts['model']}: input {facts['input_size']} px, {head}", *lines, "Sizes are before compression."])
