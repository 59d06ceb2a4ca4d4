"""Stage one's decode workers: render tasks in, blocks of views out, in the order the tasks came.

A task is some samples of one shard × the views wanted of them: the image is decoded once for all its views. Views that lie in the
cache are read from there, and a task of nothing else needs no tar. Blocks are
bounded in bytes, and the loader holds a fixed number of them, so the queue between workers and device is bounded in bytes.

Where the policy mixes, a worker also decodes and renders the partner of each mixed view. Partners lie anywhere in the tar, so
that the few decoded images which a worker keeps seldom serve twice: it is the price of mixing, and `MixedViews.prob` its dial.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import google_crc32c
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .arrays import ByteLRU
from .augment import Pixels
from .cache import Cache
from .draws import draw, draw_mix
from .errors import KDCacheError
from .images import Decoded, UnreadableImageError, decode_image, size_of
from .plan import ViewPlan
from .shards import Sample, ShardFiles, ShardIndex, ShardSource
from .stored_views import as_stored
from .view_params import PARAM_FIELDS, Mix
from .views import pixel_digest, render
from .workers import hand_over, iterate

BLOCK_BYTES = 8 << 20
"""Views of one task, if that holds more than one sample; 8 workers with two tasks ahead then hold 128 MiB. A task holds at least one
sample's views: 300 views of 224 pixels are 45 MB."""
PARTNER_BYTES = 64 << 20
"""Decoded partners of mixed views that a worker keeps: about a hundred images of ImageNet's size."""


@dataclass(frozen=True)
class Neighbours:
    """Every sample of a tar by position: where a mixed view takes its partner from."""

    keys: tuple[str, ...]
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    """(samples,) first byte of the image in the tar."""
    sizes: np.ndarray[Any, np.dtype[np.int64]]
    """(samples,) bytes of the image; -1: the sample can be no partner."""

    @classmethod
    def of(cls, index: ShardIndex, skipped: Iterable[int]) -> Neighbours:
        """skipped: positions that are known to have no row."""
        without_row = set(skipped)
        unusable = [i in without_row or sample.problem is not None for i, sample in enumerate(index.samples)]
        return cls(
            keys=tuple(sample.key for sample in index.samples),
            offsets=np.array([sample.image_offset for sample in index.samples], np.int64),
            sizes=np.array([-1 if bad else sample.image_size for bad, sample in zip(unusable, index.samples, strict=True)], np.int64),
        )


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
    neighbours: Neighbours | None = None
    """Given where the plan's policy mixes."""


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
    """(n, V, fields); of views that were read from the cache as they are stored where the policy mixes, else zeros"""
    digests: np.ndarray[Any, np.dtype[np.uint64]]
    """(n, V)"""
    encoded: torch.Tensor | None
    """uint8 (bytes,): the image files to store, row-major and view-minor; None for a plan that stores none."""
    sizes: np.ndarray[Any, np.dtype[np.int64]]
    """(n, V) bytes of each in `encoded`"""
    image_crcs: np.ndarray[Any, np.dtype[np.uint32]]
    """(n,) crc32c of each image's bytes in the tar; zeros where no view was rendered"""


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
        self._partners: ByteLRU[tuple[str, int], Decoded | None] = ByteLRU(PARTNER_BYTES)

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
        image_crcs = np.zeros(len(task.samples), np.uint32)
        rendered = [(column, view) for column, view in enumerate(task.views) if view not in task.stored]
        if not rendered:
            kept = list(range(len(task.samples)))
        for place, (position, sample) in enumerate(task.samples if rendered else ()):
            data = self._files.read(task.source, sample.key, sample.image_offset, sample.image_size)
            try:
                image = decode_image(data, plan.decoder)
            except UnreadableImageError as error:
                reasons[place] = error
                continue
            row = len(kept)
            image_crcs[row] = google_crc32c.value(data)
            for column, view in rendered:
                drawn = draw(plan, task.source.name, sample.key, view, size_of(image))
                mix, partner = self._mix(task, position, sample, view)
                drawn = replace(drawn, mix=mix)
                pixels[row, column], stored_as = as_stored(plan, render(image, drawn, partner))
                encoded.append(stored_as)
                sizes[row, column] = len(stored_as)
                params[row, column] = drawn.to_row()
                digests[row, column] = pixel_digest(pixels[row, column])
            kept.append(place)
        n = len(kept)
        self._read_stored(task, kept, pixels, params, digests)
        files = torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy()) if plan.stored_views is not None else None
        return RenderedBlock(task, kept, reasons, torch.from_numpy(pixels[:n]), params[:n], digests[:n], files, sizes[:n], image_crcs[:n])

    def _read_stored(
        self, task: RenderTask, kept: Sequence[int], pixels: np.ndarray[Any, Any], params: np.ndarray[Any, Any], digests: np.ndarray[Any, Any]
    ) -> None:
        """Fill in the columns of views that the cache holds. Raises CorruptError for stored bytes that changed, or a partner that has no row."""
        for column, view in enumerate(task.views):
            if view not in task.stored:
                continue
            assert self._cache is not None
            rows = [task.rows[place] for place in kept]
            if self._plan.policy.mix is not None:  # whoever measures must know which views have two labels
                for row, drawn in enumerate(self._cache.read_params(task.source.name, view, rows)):
                    if drawn.mix is not None:
                        self._cache.row_at(task.source.name, drawn.mix.partner)
                    params[row, column] = drawn.to_row()
            for row, found in enumerate(self._cache.read_stored(task.source.name, view, rows)):
                pixels[row, column] = found
                digests[row, column] = pixel_digest(found)

    def _mix(self, task: RenderTask, position: int, sample: Sample, view: int) -> tuple[Mix | None, Pixels | None]:
        """What is mixed into a view, and the partner's own unmixed view of the same number; the rule of probing is `draw_mix`'s."""
        plan, neighbours = self._plan, task.neighbours
        if plan.policy.mix is None:
            return None, None
        assert neighbours is not None
        count = len(neighbours.keys)
        mix = draw_mix(plan, task.source.name, sample.key, view, position=position, num_samples=count)
        if mix is None:
            return None, None
        for step in range(count):
            candidate = (mix.partner + step) % count
            image = self._partner_image(task.source, neighbours, candidate) if candidate != position else None
            if image is not None:
                own = draw(plan, task.source.name, neighbours.keys[candidate], view, size_of(image))
                return replace(mix, partner=candidate), render(image, own)
        return None, None

    def _partner_image(self, source: ShardSource, neighbours: Neighbours, position: int) -> Decoded | None:
        """The decoded image at this position of the tar, or None for one that has no row."""

        def decode() -> Decoded | None:
            assert self._files is not None
            offset, size = int(neighbours.offsets[position]), int(neighbours.sizes[position])
            if size < 0:
                return None
            try:
                return decode_image(self._files.read(source, neighbours.keys[position], offset, size), self._plan.decoder)
            except UnreadableImageError:  # skipped, with its reason, where its own turn comes
                return None

        return self._partners.get_or((source.path, position), decode, lambda image: 100 if image is None else 3 * prod(size_of(image)))


def rendered_blocks(
    plan: ViewPlan, tasks: Iterable[RenderTask], *, num_workers: int, cache: Cache | None = None
) -> Generator[RenderedBlock | FailedTask, None, None]:
    """Blocks in task order. `tasks` is drawn from as workers become free; 0 workers render in this process. cache: for tasks with stored views.

    Raises StoreError if a worker process was killed or has no shared memory left. Close it to end the workers early.
    """
    loader: DataLoader[RenderedBlock | FailedTask] = DataLoader(
        Renderer(plan, cache),
        sampler=tasks,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=hand_over,
        prefetch_factor=2 if num_workers else None,
    )
    return iterate(loader)
