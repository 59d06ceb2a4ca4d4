"""A student's logits and feature maps of one forward pass, through timm's `forward_intermediates`. Used by methods that match maps.

Nodes have the names that a teacher's have (`kdcache.nodes`): `blocks.i`, `stages.i`, `layers.i`, `layer1`, … are timm's own raw maps,
`norm` is the output of `forward_features()`; negative numbers count from the end. That the pass gives the model's own logits is
checked once, when the method is built.

Legend: B batch, C channels, H W rows and columns of a map, P prefix tokens.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import StudentError, TeacherError
from .feature_maps import tokens_to_map
from .nodes import NORM, intermediate_indices, list_containers, list_nodes, to_tokens
from .students import input_size_for
from .targets import absolute_node


class StudentFeatures:
    """How to run one student for its logits and its maps at some nodes. Holds no module."""

    def __init__(self, student: nn.Module, nodes: Sequence[str], *, view_size: int) -> None:
        """view_size: side of the cache's views, pixels. Raises StudentError for a node that the student lacks or a model that timm can't run so."""
        self._model = type(student).__name__
        self._indices = self._resolve(student, nodes)
        run = getattr(student, "forward_intermediates", None)
        parameters = inspect.signature(run).parameters if callable(run) else {}
        has_prefix = int(getattr(student, "num_prefix_tokens", 0) or 0) > 0
        self._options: dict[str, Any] = {"return_prefix_tokens": True} if has_prefix and "return_prefix_tokens" in parameters else {}
        outputs = self._probe(student, input_size_for(student, view_size))
        self.channels = {node: outputs[f"features@{node}"].shape[1] for node in nodes}
        """Node, as it was asked for → channels of its map."""
        self.grids = {node: (outputs[f"features@{node}"].shape[2], outputs[f"features@{node}"].shape[3]) for node in nodes}
        """Likewise → rows and columns of its map."""

    def _resolve(self, student: nn.Module, nodes: Sequence[str]) -> dict[str, int | None]:
        """Node → its index in forward_intermediates, None for `norm`."""
        if not hasattr(student, "forward_features") or not hasattr(student, "forward_head"):
            raise StudentError(f"student {self._model}: it has no forward_features and forward_head; expected a timm classifier")
        known, places = list_nodes(student), intermediate_indices(student)
        containers = list_containers(known, student)
        indices: dict[str, int | None] = {}
        for node in nodes:
            found = absolute_node(node, known, containers)
            if found is None:
                near = difflib.get_close_matches(node, known, n=3, cutoff=0.3) or known[-4:]
                raise StudentError(
                    f"student {self._model}: no node {node!r}; near ones: {', '.join(near)}; it has {len(known)} nodes from {known[0]!r} to {known[-1]!r}"
                )
            if found != NORM and (found not in places or not hasattr(student, "forward_intermediates")):
                raise StudentError(
                    f"student {self._model}: timm's forward_intermediates gives no map of node {found!r}; choose {NORM!r}, another student, or a"
                    f" method on logits"
                )
            indices[node] = None if found == NORM else places[found]
        return indices

    def _probe(self, student: nn.Module, size: int) -> dict[str, Tensor]:
        """Outputs for two images of noise. Raises StudentError if the logits are not those of the model's own pass."""
        first = next(student.parameters())
        images_BCHW = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(first)
        with torch.no_grad(), _in_eval_mode(student):
            outputs = self(student, images_BCHW)
            own = student(images_BCHW)
        if not isinstance(own, Tensor) or not torch.equal(own, outputs["logits"]):
            raise StudentError(
                f"student {self._model}: its logits differ when its maps are taken in the same pass (timm's forward_intermediates, forward_head);"
                f" choose another student, or a method on logits"
            )
        return outputs

    def __call__(self, student: nn.Module, images_BCHW: Tensor) -> dict[str, Tensor]:
        """{"logits": (B, K), "features@NODE": (B, C, H, W)[, "features@NODE.prefix": (B, P, C)]}, with a gradient, of one forward pass."""
        wanted = sorted({index for index in self._indices.values() if index is not None})
        maps: dict[int | None, tuple[Tensor, Tensor | None]] = {}
        if wanted:
            features, entries = student.forward_intermediates(  # type: ignore[operator]  # timm's own method
                images_BCHW, indices=wanted, norm=False, output_fmt="NCHW", **self._options
            )
            for number, entry in zip(wanted, entries, strict=True):
                maps[number] = (entry[0], entry[1]) if isinstance(entry, tuple | list) else (entry, None)
        else:
            features = student.forward_features(images_BCHW)  # type: ignore[operator]
        if None in self._indices.values():
            try:
                value, grid = to_tokens(student, features)
            except TeacherError as error:
                raise StudentError(f"student node {NORM!r}: {error}; choose another node") from error
            maps[None] = (tokens_to_map(value["grid"], grid), value.get("prefix"))
        outputs: dict[str, Tensor] = {"logits": student.forward_head(features)}  # type: ignore[operator]
        for node, index in self._indices.items():
            map_BCHW, prefix_BPC = maps[index]
            outputs[f"features@{node}"] = map_BCHW
            if prefix_BPC is not None:
                outputs[f"features@{node}.prefix"] = prefix_BPC
        return outputs


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and afterwards in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
