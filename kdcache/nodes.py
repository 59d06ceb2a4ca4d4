"""Nodes: named points inside a timm model, and the value there as tokens. Used for the teacher; knows any timm model.

`blocks.i`, `stages.i`, `layers.i`, `layer1`, … are raw outputs of that module, read by a forward hook, so that the logits
of the same pass are exactly the model's own; negative numbers count from the end. `norm` is the output of
`forward_features()`. A value becomes {"grid": (B, T, C)[, "prefix": (B, P, C)]}, the grid row-major.

Legend: B batch, T grid tokens, P prefix tokens, C channels, H W height and width of the grid.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isqrt

from torch import Tensor, nn

from .errors import TeacherError

NORM = "norm"


def list_nodes(model: nn.Module) -> list[str]:
    """Every node of the model in forward order, `norm` last."""
    names: list[str] = []
    for info in getattr(model, "feature_info", None) or []:
        module = info.get("module") if isinstance(info, dict) else None
        if module and _has_module(model, module) and module not in names:
            names.append(module)
    for container in ("blocks", "stages", "layers"):
        modules = getattr(model, container, None)
        if isinstance(modules, nn.Sequential | nn.ModuleList) and not any(name.startswith(f"{container}.") for name in names):
            names += [f"{container}.{i}" for i in range(len(modules))]
    return [*names, NORM]


def _has_module(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def resolve_node(model: nn.Module, node: str, *, model_name: str) -> str:
    """The absolute name of `node` (negative numbers resolved). Raises TeacherError that names near ones."""
    nodes = list_nodes(model)
    match = re.match(r"^(.+)\.(-[0-9]+)$", node)
    resolved = node
    if match:
        count = sum(1 for name in nodes if re.match(rf"^{re.escape(match[1])}\.[0-9]+$", name))
        resolved = f"{match[1]}.{count + int(match[2])}"
    if resolved in nodes:
        return resolved
    near = difflib.get_close_matches(node, nodes, n=3, cutoff=0.3) or nodes[-4:]
    raise TeacherError(
        f"teacher {model_name}: no node {node!r}; near ones: {', '.join(near)}; it has {len(nodes)} nodes from {nodes[0]!r} to {nodes[-1]!r}"
    )


@contextmanager
def capture(model: nn.Module, nodes: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within the context every forward pass leaves the raw outputs of `nodes` in the yielded dict."""
    captured: dict[str, Tensor] = {}

    def hook_for(node: str):  # type: ignore[no-untyped-def]  # the hook's own types follow torch's
        def hook(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            captured[node] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [model.get_submodule(node).register_forward_hook(hook_for(node)) for node in nodes if node != NORM]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def to_tokens(model: nn.Module, output: Tensor) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """A node's raw output as {"grid": (B, T, C)[, "prefix": (B, P, C)]} and the grid's (rows, columns).

    output: (B, N, C) tokens with the prefix first, (B, H, W, C) or (B, C, H, W) maps as the model says, or (B, C) pooled.
    """
    if output.ndim == 4:
        if getattr(model, "output_fmt", "NCHW") == "NHWC":
            grid = (output.shape[1], output.shape[2])
            return {"grid": output.flatten(1, 2)}, grid
        grid = (output.shape[2], output.shape[3])
        return {"grid": output.flatten(2).transpose(1, 2)}, grid
    if output.ndim == 2:
        return {"grid": output.unsqueeze(1)}, (1, 1)
    if output.ndim != 3:
        raise TeacherError(f"{type(model).__name__}: a node gives a tensor of shape {tuple(output.shape)}; expected 2 to 4 dimensions")
    num_prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)
    value = {"grid": output[:, num_prefix:]}
    if num_prefix:
        value["prefix"] = output[:, :num_prefix]
    return value, _grid_size(model, output.shape[1] - num_prefix)


def _grid_size(model: nn.Module, num_tokens: int) -> tuple[int, int]:
    known = getattr(getattr(model, "patch_embed", None) or getattr(model, "stem", None), "grid_size", None)
    if known is not None and known[0] * known[1] == num_tokens:
        return int(known[0]), int(known[1])
    side = isqrt(num_tokens)
    return (side, side) if side * side == num_tokens else (1, num_tokens)
