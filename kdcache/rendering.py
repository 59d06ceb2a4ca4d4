"""Stage one's decode workers: render tasks in, blocks of views out, in the order the tasks came.

A task is some samples of one shard × the views wanted of them: the image is decoded once for all its views. Blocks are
bounded in bytes, and the loader holds a fixed number of them, so the queue between workers and device is bounded in bytes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .errors import KDCacheError
from .images import UnreadableImageError, decode_image
from .plan import ViewPlan
from .shards import Sample, ShardFiles, ShardSource
from .views import PARAM_FIELDS, draw, pixel_digest, render
from .workers import as_it_is, iterate

BLOCK_BYTES = 8 << 20
"""Views of one task, if that holds more than one sample; 8 workers with two tasks ahead then hold 128 MiB. A task holds at least one
sample's views: 300 views of 224 pixels are 45 MB."""


@dataclass(frozen=True)
class RenderTask:
    """Samples of one shard to be rendered. `job` and `is_last` are the caller's, handed through."""

    job: int
    source: ShardSource
    samples: tuple[tuple[int, Sample], ...]
    """(position in the tar, sample)."""
    views: tuple[int, ...]
    is_last: bool


@dataclass
class RenderedBlock:
    """What became of a task. n of its samples could be decoded; V views each."""

    task: RenderTask
    kept: list[int]
    """Which of the task's samples have a row."""
    reasons: dict[int, UnreadableImageError]
    """Which have none, and why."""
    pixels: torch.Tensor
    """uint8 (n, V, S, S, 3)"""
    params: np.ndarray[Any, np.dtype[np.int32]]
    """(n, V, fields)"""
    digests: np.ndarray[Any, np.dtype[np.uint64]]
    """(n, V)"""


def samples_per_task(plan: ViewPlan, num_views: int) -> int:
    """How many samples a task takes to stay within BLOCK_BYTES, at least one."""
    return max(1, BLOCK_BYTES // (plan.size * plan.size * 3 * max(1, num_views)))


@dataclass
class FailedTask:
    """A task that could not be done, and why."""

    task: RenderTask
    error: KDCacheError


class Renderer(Dataset[RenderedBlock | FailedTask]):
    """Renders tasks; the dataset's index is the task itself. Each process keeps tars of its own open."""

    def __init__(self, plan: ViewPlan) -> None:
        self._plan = plan
        self._files: ShardFiles | None = None

    def __getitem__(self, task: RenderTask) -> RenderedBlock | FailedTask:
        try:
            return self._render(task)
        except KDCacheError as error:  # raised in a worker, it would arrive wrapped in that worker's traceback
            return FailedTask(task, type(error)(*error.args))

    def _render(self, task: RenderTask) -> RenderedBlock:
        if self._files is None:
            self._files = ShardFiles()
        plan, num_views = self._plan, len(task.views)
        kept: list[int] = []
        reasons: dict[int, UnreadableImageError] = {}
        pixels = np.empty((len(task.samples), num_views, plan.size, plan.size, 3), np.uint8)
        params = np.empty((len(task.samples), num_views, len(PARAM_FIELDS)), np.int32)
        digests = np.empty((len(task.samples), num_views), np.uint64)
        for place, (_, sample) in enumerate(task.samples):
            data = self._files.read(task.source, sample.key, sample.image_offset, sample.image_size)
            try:
                image = decode_image(data)
            except UnreadableImageError as error:
                reasons[place] = error
                continue
            row = len(kept)
            for column, view in enumerate(task.views):
                drawn = draw(plan, task.source.name, sample.key, view, image.size)
                pixels[row, column] = render(image, drawn)
                params[row, column] = drawn.to_row()
                digests[row, column] = pixel_digest(pixels[row, column])
            kept.append(place)
        n = len(kept)
        return RenderedBlock(task, kept, reasons, torch.from_numpy(pixels[:n]), params[:n], digests[:n])


def rendered_blocks(plan: ViewPlan, tasks: Iterable[RenderTask], *, num_workers: int) -> Generator[RenderedBlock | FailedTask, None, None]:
    """Blocks in task order. `tasks` is drawn from as workers become free; 0 workers render in this process.

    Raises StoreError if a worker process was killed. Close it to end the workers early.
    """
    loader: DataLoader[RenderedBlock | FailedTask] = DataLoader(
        Renderer(plan),
        sampler=tasks,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=as_it_is,
        prefetch_factor=2 if num_workers else None,
    )
    return iterate(loader)
