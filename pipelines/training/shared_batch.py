"""A batch that several students are trained on: moved, normalised and decoded once, and seen by each as if it were alone. Used by gang.

What a student takes of a batch is its `Portion`. Everything that two portions have in common is made once, when the first student wants it, and is
handed to each under tensors of its own that share the memory. A student that changes one in place leaves a trace in torch's version counter: the
next gets a fresh one, made from the batch again. (A write that goes round the counter, through `.data` or NumPy, is not noticed.) Labels are small
and copied for each.

Legend: B batch, C H W of the student's input, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdcache.cache import Cache
from kdcache.encodings import Encoding
from kdcache.join import Batch, CachedViews, to_device
from kdcache.losses import soft_labels
from kdcache.pixels import Normalize


class Inputs(NamedTuple):
    """What a method is called with."""

    images_BCHW: Tensor
    """float32, normalised."""
    labels: Tensor
    """int64 (B,), or float32 (B, K): shares of the classes of mixed views."""
    targets: dict[str, dict[str, Tensor]]
    """As the method names them → their values, float32."""


@dataclass(frozen=True, kw_only=True)
class Portion:
    """What one student takes of every batch."""

    normalize: Normalize
    mean_std: tuple[tuple[float, ...], tuple[float, ...]]
    """Of `normalize`."""
    memory_format: torch.memory_format
    soft_classes: int | None
    """K of the labels of mixed views; None where labels are whole, or not looked at."""
    names: Mapping[str, tuple[str, str]]
    """As the method names a target → (teacher, target)."""
    components: Mapping[str, tuple[str, ...]]
    """As the method names a target → those of its components that are read; all of a target that is not here."""
    encodings: Mapping[str, Encoding]
    """As the method names a target → its encoding."""


def union(portions: Sequence[Portion]) -> dict[str, tuple[str, ...]]:
    """All that any of the portions takes: `teacher/target` → its components, in the order in which the encoding has them."""
    wanted: dict[str, set[str]] = {}
    order: dict[str, tuple[str, ...]] = {}
    for portion in portions:
        for name, (teacher, target) in portion.names.items():
            encoding = portion.encodings[name]
            key = f"{teacher}/{target}"
            order[key] = encoding.components_of(tuple(encoding.parts()))
            wanted.setdefault(key, set()).update(portion.components.get(name, order[key]))
    return {key: tuple(name for name in order[key] if name in wanted[key]) for key in sorted(wanted)}


def dataset_of(cache: Cache, wanted: Mapping[str, tuple[str, ...]], *, check_views: float) -> CachedViews:
    """Batches whose targets are called `teacher/target` and have the components of a `union`."""
    dataset = CachedViews(cache, targets=tuple(wanted), check_views=check_views)
    dataset.components = dict(wanted)
    return dataset


class _Made:
    """Tensors that were made once, and how often each had been changed in place by then."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._versions = {name: tensor._version for name, tensor in tensors.items()}

    @property
    def is_untouched(self) -> bool:
        return all(tensor._version == self._versions[name] for name, tensor in self._tensors.items())

    def hand_out(self) -> dict[str, Tensor]:
        """The same memory and version counter under new tensors: requires_grad_, a gradient or another shape stay with who asked for them."""
        return {name: tensor.detach() for name, tensor in self._tensors.items()}


class SharedBatch:
    """One batch of the loader, on the device of its students."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        """batch: its targets are called `teacher/target`."""
        self._batch, self._device = batch, device
        self._made: dict[Hashable, _Made] = {}
        self._moved: dict[Hashable, dict[str, Tensor]] = {}
        """As the loader gave it, on the device; read here only."""

    def inputs(self, portion: Portion) -> Inputs:
        """What a student that takes this portion gets alone, to the last bit."""
        targets = {name: self._target(portion, name, f"{teacher}/{target}") for name, (teacher, target) in portion.names.items()}
        return Inputs(self._images(portion), self._labels(portion), targets)

    def _images(self, portion: Portion) -> Tensor:
        normalize, memory_format = portion.normalize, portion.memory_format

        def make() -> dict[str, Tensor]:
            views_BHWC = self._move("views", {"views": self._batch["views"]})["views"]
            if memory_format == torch.contiguous_format and views_BHWC.shape[1] == normalize.input_size:
                # bytes are put in the order of channels before they are floats: .36 against .83 ms a view of 224 pixels on one core, the same bits
                views_BHWC = views_BHWC.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
            return {"images": normalize(views_BHWC).contiguous(memory_format=memory_format)}

        return self._share(("images", portion.mean_std, normalize.input_size, memory_format), make)["images"]

    def _labels(self, portion: Portion) -> Tensor:
        batch: Mapping[str, Any] = self._batch
        names = ("labels",) if portion.soft_classes is None else ("labels", "partner_labels", "label_weights")
        moved = self._move(names, {name: batch[name] for name in names})
        if portion.soft_classes is None:
            return moved["labels"].clone()
        return soft_labels(moved["labels"], moved["partner_labels"], moved["label_weights"], portion.soft_classes)

    def _target(self, portion: Portion, name: str, key: str) -> dict[str, Tensor]:
        batch = self._batch["targets"][key]
        wanted = tuple(one for one in batch if one in portion.components.get(name, batch))

        def make() -> dict[str, Tensor]:
            encoding = portion.encodings[name]
            encoding.check({one: batch[one] for one in wanted})
            moved = self._move(("target", key), batch)
            return encoding.decode({one: moved[one] for one in wanted})

        # the number of threads may decide the last bit of a product of matrices, and each student has its own
        return self._share((key, wanted, torch.get_num_threads()), make)

    def _share(self, key: Hashable, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if key not in self._made or not self._made[key].is_untouched:
            self._made[key] = _Made(make())
        return self._made[key].hand_out()

    def _move(self, key: Hashable, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if key not in self._moved:
            self._moved[key] = to_device(tensors, self._device)
        return self._moved[key]
