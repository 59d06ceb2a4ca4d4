"""Stage one's decode workers: render tasks in, blocks of views out, in the order the tasks came.

A task is some samples of one shard × the views wanted of them: the image is decoded once for all its views. Views that lie in the
cache are read from there, and a task of nothing else needs no tar. Blocks are
bounded in bytes, and the loader holds a fixed number of them, so the queue between workers and device is bounded in bytes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .cache import Cache
from .errors import KDCacheError
from .images import UnreadableImageError, decode_image
from .plan import ViewPlan
from .shards import Sample, ShardFiles, ShardSource
from .stored_views import as_stored
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
    stored: frozenset[int] = frozenset()
    """Those of `views` that are read from the cache and not rendered."""
    rows: tuple[int, ...] = ()
    """The samples' rows in the cache, where `stored` is not empty."""


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
    """(n, V, fields), zeros for views that were read from the cache"""
    digests: np.ndarray[Any, np.dtype[np.uint64]]
    """(n, V)"""
    encoded: torch.Tensor | None
    """uint8 (bytes,): the image files to store, row-major and view-minor; None for a plan that stores none."""
    sizes: np.ndarray[Any, np.dtype[np.int64]]
    """(n, V) bytes of each in `encoded`"""


def samples_per_task(plan: ViewPlan, num_views: int) -> int:
    """How many samples a task takes to stay within BLOCK_BYTES, at least one. An image file may be as large as its pixels."""
    bytes_per_view = plan.size * plan.size * 3 * (2 if plan.stored_views in ("jpeg95", "png") else 1)
    return max(1, BLOCK_BYTES // (bytes_per_view * max(1, num_views)))


@dataclass
class FailedTask:
    """A task that could not be done, and why."""

    task: RenderTask
    error: KDCacheError


class Renderer(Dataset[RenderedBlock | FailedTask]):
    """Renders tasks; the dataset's index is the task itself. Each process keeps tars of its own open."""

    def __init__(self, plan: ViewPlan, cache: Cache | None = None) -> None:
        """cache: where stored views are read from, for tasks that name any."""
        self._plan, self._cache = plan, cache
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
        params = np.zeros((len(task.samples), num_views, len(PARAM_FIELDS)), np.int32)
        digests = np.empty((len(task.samples), num_views), np.uint64)
        encoded: list[bytes] = []
        sizes = np.zeros((len(task.samples), num_views), np.int64)
        rendered = [(column, view) for column, view in enumerate(task.views) if view not in task.stored]
        if not rendered:
            kept = list(range(len(task.samples)))
        for place, (_, sample) in enumerate(task.samples if rendered else ()):
            data = self._files.read(task.source, sample.key, sample.image_offset, sample.image_size)
            try:
                image = decode_image(data)
            except UnreadableImageError as error:
                reasons[place] = error
                continue
            row = len(kept)
            for column, view in rendered:
                drawn = draw(plan, task.source.name, sample.key, view, image.size)
                pixels[row, column], stored_as = as_stored(plan, render(image, drawn))
                encoded.append(stored_as)
                sizes[row, column] = len(stored_as)
                params[row, column] = drawn.to_row()
                digests[row, column] = pixel_digest(pixels[row, column])
            kept.append(place)
        n = len(kept)
        self._read_stored(task, kept, pixels, digests)
        files = torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy()) if plan.stored_views is not None else None
        return RenderedBlock(task, kept, reasons, torch.from_numpy(pixels[:n]), params[:n], digests[:n], files, sizes[:n])

    def _read_stored(self, task: RenderTask, kept: Sequence[int], pixels: np.ndarray[Any, Any], digests: np.ndarray[Any, Any]) -> None:
        """Fill in the columns of views that the cache holds."""
        for column, view in enumerate(task.views):
            if view not in task.stored:
                continue
            assert self._cache is not None
            for row, found in enumerate(self._cache.read_stored(task.source.name, view, [task.rows[place] for place in kept])):
                pixels[row, column] = found
                digests[row, column] = pixel_digest(found)


def rendered_blocks(
    plan: ViewPlan, tasks: Iterable[RenderTask], *, num_workers: int, cache: Cache | None = None
) -> Generator[RenderedBlock | FailedTask, None, None]:
    """Blocks in task order. `tasks` is drawn from as workers become free; 0 workers render in this process. cache: for tasks with stored views.

    Raises StoreError if a worker process was killed. Close it to end the workers early.
    """
    loader: DataLoader[RenderedBlock | FailedTask] = DataLoader(
        Renderer(plan, cache),
        sampler=tasks,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=as_it_is,
        prefetch_factor=2 if num_workers else None,
    )
    return iterate(loader)
