"""Nodes: named points inside a timm model, and the value there as tokens. Used for the teacher; knows any timm model.

`blocks.i`, `stages.i`, `layers.i`, `layer1`, … are raw outputs of that module, read by a forward hook, so that the logits
of the same pass are exactly the model's own; negative numbers count from the end. `norm` is the output of
`forward_features()`. A value becomes {"grid": (B, T, C)[, "prefix": (B, P, C)]}, the grid row-major.

timm has no rule for what a block gives: some families keep tokens in window order, leave the cls token out, or swap axes. What
a node gives is therefore checked once, by `examine_nodes`, against timm's own maps, and refused where it can't be explained.

Legend: B batch, T grid tokens, P prefix tokens, C channels, H W height and width of the grid.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isqrt
from typing import Any

from torch import Tensor, nn

from .errors import TeacherError
from .targets import absolute_node

NORM = "norm"

Value = tuple[dict[str, Tensor], tuple[int, int]]
"""{"grid": (B, T, C)[, "prefix": (B, P, C)]} and the grid's (rows, columns)."""

_MAX_DEVIATION = 0.05
"""Of a node from timm's own map, in standard deviations of a channel: half precision gives about 0.01, tokens in another order 1.4."""


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


def list_containers(nodes: Sequence[str], model: nn.Module) -> dict[str, int]:
    """Modules that hold numbered nodes, `blocks` or `stages` → how many modules each holds: not all of them need be nodes."""
    matches = (re.fullmatch(r"(.+)\.[0-9]+", node) for node in nodes)
    return {match[1]: len(list(model.get_submodule(match[1]).children())) for match in matches if match}


def intermediate_indices(model: nn.Module) -> dict[str, int]:
    """Node → its index in timm's `forward_intermediates`: its place in `feature_info`, else its number in the container. `norm` has none."""
    modules = [info.get("module") if isinstance(info, dict) else None for info in getattr(model, "feature_info", None) or []]
    nodes = [node for node in list_nodes(model) if node != NORM]
    if any(node in modules for node in nodes):
        return {node: modules.index(node) for node in nodes if node in modules}
    return {node: number for number, node in enumerate(nodes)}


def _has_module(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def resolve_node(model: nn.Module, node: str, *, model_name: str) -> str:
    """The absolute name of `node`, see `targets.absolute_node`. Raises TeacherError that names near ones."""
    nodes = list_nodes(model)
    resolved = absolute_node(node, nodes, list_containers(nodes, model))
    if resolved is not None:
        return resolved
    near = difflib.get_close_matches(node, nodes, n=3, cutoff=0.3) or nodes[-4:]
    raise TeacherError(
        f"teacher {model_name}: no node {node!r}; near ones: {', '.join(near)}; it has {len(nodes)} nodes from {nodes[0]!r} to {nodes[-1]!r}:"
        f" 'kdcache extract --list-nodes --teacher {model_name}' lists them"
    )


@contextmanager
def capture(model: nn.Module, nodes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Within the context every forward pass leaves the raw outputs of `nodes` in the yielded dict: tensors, once `read_nodes` let them pass."""
    captured: dict[str, Any] = {}

    def hook_for(node: str):  # type: ignore[no-untyped-def]  # the hook's own types follow torch's
        def hook(_module: nn.Module, _inputs: object, output: Any) -> None:
            captured[node] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [model.get_submodule(node).register_forward_hook(hook_for(node)) for node in nodes if node != NORM]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def to_tokens(model: nn.Module, output: Tensor) -> Value:
    """A node's raw output as {"grid": (B, T, C)[, "prefix": (B, P, C)]} and the grid's (rows, columns).

    output: (B, N, C) tokens with the prefix first, (B, H, W, C) or (B, C, H, W) maps as the model says, or (B, C) pooled. Raises
    TeacherError for tokens that make no grid.
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
        raise TeacherError(f"{type(model).__name__}: expected 2 to 4 dimensions, found a tensor of shape {tuple(output.shape)}")
    num_prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)
    grid = _grid_size(model, output.shape[1], num_prefix)
    value = {"grid": output[:, num_prefix:]}
    if num_prefix:
        value["prefix"] = output[:, :num_prefix]
    return value, grid


def _grid_size(model: nn.Module, num_tokens: int, num_prefix: int) -> tuple[int, int]:
    """(rows, columns) of the tokens after the prefix: the model's own, or a square. Raises TeacherError for tokens that make neither."""
    count = num_tokens - num_prefix
    known = getattr(getattr(model, "patch_embed", None) or getattr(model, "stem", None), "grid_size", None)
    if known is not None and known[0] * known[1] == count:
        return int(known[0]), int(known[1])
    side = isqrt(max(count, 0))
    if count > 0 and side * side == count and (known is None or known[0] == known[1]):
        return side, side
    expected = f"the model's grid of {known[0]}x{known[1]}, or a square," if known is not None else "a square grid"
    raise TeacherError(
        f"{type(model).__name__}: expected {expected} after {num_prefix} prefix tokens, found {num_tokens} tokens, which leave {count} for the grid"
    )


# --- what a node gives -----------------------------------------------------------------------------------------------


def read_nodes(model: nn.Module, images_BCHW: Tensor, nodes: Sequence[str], *, model_name: str) -> dict[str, Value]:
    """Node → its value for these images. Raises TeacherError that names model and node for one that `examine_nodes` gives a reason for."""
    values, reasons = examine_nodes(model, images_BCHW, nodes)
    for node in nodes:
        if node in reasons:
            others = [name for name in list_nodes(model) if name != node]
            raise TeacherError(
                f"teacher {model_name}: node {node!r} can't be recorded: {reasons[node]}; choose another node ({', '.join(others[-4:])}) or another teacher"
            )
    return values


def examine_nodes(model: nn.Module, images_BCHW: Tensor, nodes: Sequence[str]) -> tuple[dict[str, Value], dict[str, str]]:
    """(node → its value for these images, node → why it can't be recorded), after all that can be known of it was checked. For start-up: two passes.

    images_BCHW: normalised, at least two that differ. A node can't be recorded that the pass does not go through, that gives no tensor, has
    another batch axis, makes no grid, or differs from what timm's `forward_intermediates` gives at the same place.
    """
    with capture(model, nodes) as captured:
        features = model.forward_features(images_BCHW)  # type: ignore[operator]  # timm's own method
    if NORM in nodes:
        captured[NORM] = features
    values: dict[str, Value] = {}
    reasons: dict[str, str] = {}
    for node in nodes:
        output = captured.get(node)
        if node not in captured:
            reasons[node] = "expected one output in a forward pass, found none: the model calls the parts of this module by themselves"
        elif not isinstance(output, Tensor):
            reasons[node] = f"expected a tensor, found a {type(output).__name__}"
        elif output.shape[:1] != images_BCHW.shape[:1]:
            reasons[node] = f"expected a batch of {len(images_BCHW)} first, found a tensor of shape {tuple(output.shape)}"
        else:
            try:
                values[node] = to_tokens(model, output)
            except TeacherError as error:
                reasons[node] = str(error)
    if hasattr(model, "forward_intermediates"):
        pooled = isinstance(features, Tensor) and features.ndim == 2
        reasons |= _differences(model, images_BCHW, {node: value for node, value in values.items() if node != NORM or not pooled})
    return {node: value for node, value in values.items() if node not in reasons}, reasons


def _differences(model: nn.Module, images_BCHW: Tensor, values: Mapping[str, Value]) -> dict[str, str]:
    """What is wrong with each value that is not the map that timm says is at its node: `norm`'s in its size, the others' in every token."""
    modules = [info.get("module") if isinstance(info, dict) else None for info in getattr(model, "feature_info", None) or []]
    wanted = {modules.index(node): node for node in values if node in modules}
    last = len(modules) - 1
    indices = sorted({*wanted, *([last] if NORM in values and last >= 0 else [])})
    if not indices:
        return {}
    known = inspect.signature(model.forward_intermediates).parameters  # type: ignore[arg-type]
    has_prefix = any("prefix" in value for value, _ in values.values())  # asked for none, vit_relpos of timm 1.0.31 fails
    options = {"return_prefix_tokens": True} if has_prefix and "return_prefix_tokens" in known else {}
    maps = model.forward_intermediates(  # type: ignore[operator]  # timm's own method
        images_BCHW, indices=indices, norm=False, output_fmt="NCHW", intermediates_only=True, **options
    )
    found: dict[str, str] = {}
    for index, entry in zip(indices, maps, strict=True):
        map_BCHW, prefix_BPC = entry if isinstance(entry, tuple | list) else (entry, None)
        theirs = (int(map_BCHW.shape[2]), int(map_BCHW.shape[3]))
        if index in wanted:
            node = wanted[index]
            value, grid = values[node]
            if grid != theirs or value["grid"].shape[2] != map_BCHW.shape[1]:
                shape = f"{theirs[0]}x{theirs[1]} with {map_BCHW.shape[1]} channels"
                found[node] = f"expected timm's own grid of {shape}, found its output to read as {grid[0]}x{grid[1]} with {value['grid'].shape[2]}"
            elif not _agree(value["grid"], map_BCHW.flatten(2).transpose(1, 2)):
                found[node] = "expected the grid row by row, as timm's forward_intermediates gives it, found its tokens in another order"
            elif prefix_BPC is not None and "prefix" in value and not _agree(value["prefix"], prefix_BPC):
                found[node] = "expected the prefix tokens that timm's forward_intermediates gives, found others"
        if index == last and NORM in values:
            grid = values[NORM][1]
            if grid != theirs:
                found[NORM] = f"expected the last map's grid of {theirs[0]}x{theirs[1]}, found {grid[0]}x{grid[1]}"
    return found


def _agree(ours_BTC: Tensor, theirs_BTC: Tensor) -> bool:
    """Whether two values are the same tokens in the same order, rounding aside. Outlier channels, or dead ones, hide no difference."""
    if ours_BTC.shape != theirs_BTC.shape:
        return False
    ours, theirs = (tokens_BTC.cpu().double().flatten(0, 1) for tokens_BTC in (ours_BTC, theirs_BTC))  # mps has no float64
    error, spread = (ours - theirs).square().mean(0).sqrt(), theirs.std(0, correction=0)
    live = spread > 0
    if not live.any():
        return bool((error == 0).all())
    return bool((error[live] / spread[live]).median() <= _MAX_DEVIATION)
