"""Accuracy of a student on labelled tars: timm's evaluation transform, top-1 and top-5. Used by train after each epoch.

Legend: B batch, C H W of the student's input, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .console import counted
from .device import autocast, moved
from .distributed import ALONE, Processes
from .errors import ShardError
from .images import UnreadableImageError, decode_image
from .interrupt import is_asked_to_stop, outlast_a_signal
from .shards import NO_LABEL, Sample, ShardFiles, ShardIndex, ShardSource
from .students import Student
from .workers import end_workers, hand_over, iterate


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The figures of one pass."""

    loss: float
    """Cross-entropy without smoothing, mean over images."""
    top1: float
    """Percent of images."""
    top5: float
    """Percent of images; of the first K classes where there are fewer than 5."""
    images: int
    skipped: tuple[str, ...]
    """Images that can't be read, each as 'shard: key: reason'."""


Item = tuple[Tensor | str | ShardError, int]
"""float32 (C, H, W), or why the image is left out, or an error to raise (in a worker it would get wrapped in a traceback); and the label."""


class EvaluationSet(Dataset[Item]):
    """The samples of some tars under a student's evaluation transform."""

    def __init__(self, indexes: Sequence[ShardIndex], student: Student, *, crop_pct: float | None) -> None:
        """crop_pct: share of the image's side that is kept; None for the student's own. Raises ShardError for a label that it can't learn."""
        from timm.data import create_transform

        self._samples = [(index.source, sample) for index in indexes for sample in index.samples]
        for source, sample in self._samples:
            _check_label(source, sample, student.num_classes)
        self._transform = create_transform(
            input_size=student.input_size,
            is_training=False,
            interpolation=student.interpolation,
            mean=student.mean,
            std=student.std,
            crop_pct=student.crop_pct if crop_pct is None else crop_pct,
            crop_mode=student.crop_mode,
        )
        self._files: ShardFiles | None = None

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, position: int) -> Item:
        if self._files is None:
            self._files = ShardFiles()
        source, sample = self._samples[position]
        if sample.problem is not None:
            return f"shard {source.name}: key {sample.key!r}: {sample.problem}", sample.label
        try:
            image = decode_image(self._files.read(source, sample.key, sample.image_offset, sample.image_size))
        except ShardError as error:
            return error, sample.label
        except UnreadableImageError as error:
            return f"shard {source.name}: key {sample.key!r}: {error}", sample.label
        tensor: Tensor = self._transform(image)
        return tensor, sample.label


def _check_label(source: ShardSource, sample: Sample, num_classes: int) -> None:
    if sample.label == NO_LABEL:
        raise ShardError(f"shard {source.name}: key {sample.key!r} has no label; --val needs a .cls or .json label for every sample")
    if sample.label >= num_classes:
        raise ShardError(
            f"shard {source.name}: key {sample.key!r} has label {sample.label}, the student has {counted(num_classes, 'class')} (0 to {num_classes - 1});"
            f" pass --num-classes, or --val shards of the same classes"
        )


def _collate(items: Sequence[Item]) -> Any:
    """(images, labels, what can't be read), or the error that ends the pass."""
    for image, _ in items:
        if isinstance(image, ShardError):
            return image
    images = [(image, label) for image, label in items if isinstance(image, Tensor)]
    stacked = torch.stack([image for image, _ in images]) if images else None
    return hand_over(
        (stacked, torch.tensor([label for _, label in images], dtype=torch.int64), [image for image, _ in items if isinstance(image, str)])
    )


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """What one batch adds to a pass."""

    loss: float = 0.0
    top1: int = 0
    top5: int = 0
    images: int = 0
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """A batch's sums while the device still works on them."""

    sums: Tensor | None
    """float32 (3,): loss, top1, top5; None of no image."""
    images: int
    skipped: tuple[str, ...]


class Evaluator:
    """Runs passes over one EvaluationSet, its workers kept between them. Several processes share the batches of a pass. Close it when done."""

    def __init__(self, dataset: EvaluationSet, *, batch_size: int, num_workers: int, pin_memory: bool = False, processes: Processes = ALONE) -> None:
        """pin_memory: for passes on a GPU."""
        self._processes = processes
        batches = [list(range(start, min(start + batch_size, len(dataset)))) for start in range(0, len(dataset), batch_size)]
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=batches[processes.rank :: processes.world],
            num_workers=num_workers,
            collate_fn=_collate,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            worker_init_fn=outlast_a_signal if processes.world > 1 else None,
            generator=torch.Generator(),  # not from the generator that the student draws from
        )

    def __call__(self, model: nn.Module, device: torch.device, precision: str = "fp32") -> Evaluation:
        """Evaluate `model`, which is left in the mode it was in. precision: fp32, or autocast to this type (bf16, fp16). Raises ShardError if no image can be read.

        Every process gets the figures of the whole set: the batches are those of one process, and their sums are added in the same order.
        """
        was_training = model.training
        model.eval()
        with torch.inference_mode(), autocast(device, precision):
            own = _read([self._measure(model, device, batch) for batch in self._batches()])
        model.train(was_training)
        self._processes.stop_if_asked()
        parts = self._processes.gather(own)
        loss, top1, top5, images = 0.0, 0, 0, 0
        skipped: list[str] = []
        for number in range(sum(len(part) for part in parts)):
            sums = parts[number % len(parts)][number // len(parts)]
            loss, top1, top5, images = loss + sums.loss, top1 + sums.top1, top5 + sums.top5, images + sums.images
            skipped += sums.skipped
        if images == 0:
            raise ShardError(f"--val: none of {counted(len(skipped), 'image')} can be read; first: {skipped[0] if skipped else 'there is none'}")
        return Evaluation(loss=loss / images, top1=100 * top1 / images, top5=100 * top5 / images, images=images, skipped=tuple(skipped))

    def close(self) -> None:
        """End the worker processes. A pass that follows begins new ones."""
        end_workers(self._loader)

    def _batches(self) -> Iterator[Any]:
        """Those of this process; of several no more once a signal waits, for which the others wait too."""
        for batch in iterate(self._loader):
            if self._processes.world > 1 and is_asked_to_stop():
                return
            yield batch

    def _measure(self, model: nn.Module, device: torch.device, batch: Any) -> _Measured:
        images_BCHW, labels, reasons = batch
        if images_BCHW is None:
            return _Measured(sums=None, images=0, skipped=tuple(reasons))
        labels_B = moved(labels, device)
        logits_BK = model(moved(images_BCHW, device)).float()
        ranked = logits_BK.topk(min(5, logits_BK.shape[1]), dim=1).indices == labels_B.unsqueeze(1)
        loss = F.cross_entropy(logits_BK, labels_B, reduction="sum")
        return _Measured(sums=torch.stack([loss, ranked[:, 0].sum(), ranked.sum()]), images=len(labels_B), skipped=tuple(reasons))


def _read(measured: Sequence[_Measured]) -> list[_Sums]:
    """The sums of all batches, by one transfer: a GPU's host never waits within a pass."""
    there = [one.sums for one in measured if one.sums is not None]
    numbers = iter(torch.stack(there).tolist() if there else [])
    found: list[_Sums] = []
    for one in measured:
        loss, top1, top5 = next(numbers) if one.sums is not None else (0.0, 0.0, 0.0)
        found.append(_Sums(loss=loss, top1=int(top1), top5=int(top5), images=one.images, skipped=one.skipped))
    return found
