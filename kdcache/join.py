"""Stage two's input: the views that the teacher saw, rendered again or read, beside the targets that the cache holds for them.

Everything is driven by an index: the order of rows is a pure function of (seed, epoch) (`order`), a batch is a list of (row number, view, epoch),
and a worker that is given one reads images by their place in the tar, renders them from the *stored* params (or, from a cache that
stores its views, reads those and opens no tar), checks their pixels against the stored digests at a sampled rate, and reads the
encoded targets by chunk; neighbours, in a tar and in a target, come with one read. Targets stay encoded: they are decoded on the student's device,
since dequantising in a worker was measured to cost a quarter of its throughput. Batches are made where they are handed over, in shared memory, and
those under way are bounded in bytes.

Legend: B batch, H W of the view.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .augment import Q16, Pixels
from .cache import Cache, Replay, Rows, pixel_drift
from .device import moved
from .errors import CorruptError, DriftError, KDCacheError, MissingError, ShardError, UsageError
from .format import Component, ViewRange
from .images import Decoded, UnreadableImageError, decode_image
from .interrupt import outlast_a_signal
from .order import Blocks, Order, block_order, epoch_order, first_of_blocks
from .plan import canonical_json
from .shards import ShardFiles, ShardSource, runs_of
from .stored_views import estimated_bytes
from .views import pixel_digest
from .workers import Room, end_workers, iterate, pack

DEFAULT_PREFETCH_BYTES = 1 << 30
"""Of the batches that are under way."""
MOST_PREFETCHED = 4
"""Batches under way, a worker: more would not help."""
_OPEN_TARS = 128
"""More than a window of blocks lies in; with the files of the store well under the usual limit of 1024."""
_TAR_GAP_BYTES = 16 << 10
"""Images with no more than this between them (headers, a label) come with one read."""


class Item(NamedTuple):
    """One row of a batch to be: all that a worker needs to know of it."""

    row: int
    """Its number in Cache.rows."""
    view: int
    epoch: int = 0
    """Chooses which rows have their pixels checked, and nothing else: batches of a (row, view) are alike in every epoch."""


class Items(list[Item]):
    """A batch to be, of an order in blocks."""

    def __init__(self, items: Iterable[Item], opened: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        super().__init__(items)
        self.opened = opened
        """(n,) row numbers of all blocks that this batch is the first to draw from: they are read whole before its own."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Items, (list(self), self.opened)


class Batch(TypedDict):
    """What the workers hand over. Row b of everything is the b-th of the items asked for."""

    views: Tensor
    """uint8 (B, H, W, 3)"""
    labels: Tensor
    """int64 (B,), -1 where the tar has none"""
    partner_labels: NotRequired[Tensor]
    """int64 (B,), where the policy mixes: labels of the samples mixed in, the row's own for a view that is not mixed"""
    label_weights: NotRequired[Tensor]
    """float32 (B,), likewise: the weight of the row's own label, in [0, 1]; its partner's label has the rest"""
    targets: dict[str, dict[str, Tensor]]
    """target (of several teachers: teacher/target) → component → (B, …), still encoded; uint16 as its int16 bits"""


# --- order -----------------------------------------------------------------------------------------------------------


class EpochBatches(Sampler[list[Item]]):
    """Batches of an epoch's items, or of several in turn; `set_epoch` chooses which.

    Epoch e takes view e mod num_views of every row. A step takes the next `step_size` rows of the epoch's order, whoever shares them: `world`
    processes of which this is number `rank`, in `accumulate` batches each. So the rows of a step are those of one process with a batch as
    large. The last, partial step is dropped unless it is the only one.
    """

    def __init__(
        self,
        row_numbers: Sequence[int] | np.ndarray[Any, Any],
        *,
        batch_size: int,
        num_views: int,
        seed: int,
        blocks: Blocks | None = None,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        beside: range | None = None,
    ) -> None:
        """batch_size: rows of one batch of one process. blocks: of the order in blocks of neighbours in `row_numbers`; None for a full permutation.
        beside: the ranks on this machine, this one among them: they share the page cache, so one of them reads a block for all. Default: all.

        Raises UsageError for more batches in a step than there are rows.
        """
        self._rows = np.asarray(row_numbers, dtype=np.int64)
        assert len(self._rows) > 0
        assert num_views > 0
        shares = world * accumulate
        if len(self._rows) < shares:
            raise UsageError(
                f"{len(self._rows)} images for {world} processes and {accumulate} batches in a step; expected one for each at least: start fewer"
                f" processes, or pass a smaller --grad-accum-steps"
            )
        self.batch_size = min(batch_size, len(self._rows) // shares)
        self.step_size = self.batch_size * shares
        """Rows of one step, of all its batches in all processes."""
        self._accumulate, self._rank, self.world = accumulate, rank, world
        self._beside = range(world) if beside is None else beside
        self.num_views, self.seed, self.blocks = num_views, seed, blocks
        self.set_epoch(0)

    def set_epoch(self, epoch: int, *, start: int = 0, until: int | None = None) -> None:
        """Choose what the next iteration gives: the batches of an epoch from its step `start`, then those of the epochs after it that are below `until`."""
        self.epoch, self.start, self.until = epoch, start, max(epoch + 1, until or 0)

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        return len(self._rows) // self.step_size

    def order(self, epoch: int) -> Order:
        """The places in `row_numbers`, all of them, in the order in which an epoch takes them: what batches are cut from."""
        if self.blocks is None:
            return epoch_order(len(self._rows), self.seed, epoch)
        return block_order(len(self._rows), self.seed, epoch, self.blocks)

    @property
    def batches_of_step(self) -> int:
        """Of this process."""
        return self._accumulate

    def __iter__(self) -> Iterator[list[Item]]:
        """The batches of this process: `accumulate` for each step."""
        first, start, until = self.epoch, self.start, self.until
        for epoch in range(first, until):
            yield from self._epoch(epoch, start if epoch == first else 0)

    def _epoch(self, epoch: int, start: int) -> Iterator[list[Item]]:
        view = epoch % self.num_views
        places = self.order(epoch)[start * self.step_size : len(self) * self.step_size]
        opening = self._opening(places)
        of_all = self.batch_size * self.world  # the batches that the processes take at one time lie side by side
        for start in range(self._rank * self.batch_size, len(places), of_all):
            taken = slice(start, start + self.batch_size)
            items = [Item(row, view, epoch) for row in self._rows[places[taken]].tolist()]
            if self.blocks is not None and opening is not None:
                numbers = np.sort(places[taken][opening[taken]] // self.blocks.rows)
                opened = [self._rows[number * self.blocks.rows : (number + 1) * self.blocks.rows] for number in numbers.tolist()]
                items = Items(items, np.concatenate(opened) if opened else np.zeros(0, np.int64))
            yield items

    def _opening(self, places: Order) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        """(n,) at which of these places a block is drawn from for the first time on this machine; None without blocks."""
        if self.blocks is None:
            return None
        ranks = np.arange(len(places)) // self.batch_size % self.world
        here = (self._beside.start <= ranks) & (ranks < self._beside.stop)
        opening = np.zeros(len(places), bool)
        opening[here] = first_of_blocks(places[here], self.blocks)
        return opening


def usable_views(cache: Cache, teacher: str | None, targets: Sequence[str], shards: Sequence[str]) -> int:
    """V: how many views, counted from 0, every one of `shards` has of the views layer and of every target.

    teacher may be None if `targets` is empty. Raises MissingError naming the first shard and target without any.
    """
    for target in targets:
        assert teacher is not None
        cache.target_views(teacher, target)  # raises MissingError for a target that no shard has
    count: int | None = None
    for shard in shards:
        layers: list[tuple[str, list[ViewRange]]] = [("views", [document.identity.views for document in cache.views.get(shard, [])])]
        for target in targets:
            segments = cache.layer(teacher).segments(shard, target)
            layers.append((f"{target!r} of teacher {teacher!r}", [document.identity.views for document in segments]))
        for what, ranges in layers:
            have = 0
            while any(have in views for views in ranges):
                have += 1
            if have == 0:
                raise MissingError(
                    f"shard {shard}: the cache has no {what} for it; run 'kdcache extract' again with the same arguments to finish the cache"
                )
            count = have if count is None else min(count, have)
    return count or 0


def image_bytes(cache: Cache, row_numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(n,) what each row's image has in the tar, or its view where views are stored (an estimate of compressed ones): what `Blocks.fitting` takes.

    A function of the plan and the tars alone. Targets are not counted: runs that read different ones must agree on the order to share a loader.
    """
    plan = cache.plan
    if plan.stored_views is not None:
        return np.full(len(row_numbers), int(estimated_bytes(plan.stored_views, plan.size)), np.int64)
    sizes: np.ndarray[Any, np.dtype[np.int64]] = cache.rows.size[row_numbers]
    return sizes


# --- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """The part of a batch that lies in one shard and one view: where its rows go, and which they are, sorted."""

    shard: str
    view: int
    places: np.ndarray[Any, np.dtype[np.int64]]
    """(n,) places in the batch."""
    row_numbers: np.ndarray[Any, np.dtype[np.int64]]
    """(n,) numbers in Cache.rows, ascending: neighbours share chunks and lie next to each other in the tar."""
    epochs: np.ndarray[Any, np.dtype[np.int64]]
    """(n,) the epoch that each row was asked for in."""


def target_keys(targets: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, str]]:
    """What `CachedViews` and its batches call the targets of each teacher → (teacher, target): `target` of one, `teacher/target` of several."""
    return {target if len(targets) == 1 else f"{teacher}/{target}": (teacher, target) for teacher, names in targets.items() for target in names}


class CachedViews(Dataset[Batch]):
    """A map-style dataset over items, (row number of `Cache.rows`, view) and the epoch. Pickles cheaply; each process opens files of its own."""

    def __init__(
        self,
        cache: Cache,
        *,
        teacher: str | None = None,
        targets: Sequence[str] = (),
        parts: Mapping[str, Sequence[str]] | None = None,
        check_views: float = 1.0,
    ) -> None:
        """targets: what to read, as a batch then names it: targets of `teacher` (None: the only one), or `TEACHER/TARGET` of any. check_views:
        fraction of an epoch's rows whose pixel digest is checked.

        parts: one of these → the parts of it to read, as its encoding names them: the bands `dc`, `low`, `mid`, `high` of `dct`, or `grid` without
        `prefix`. Of the others no byte is read. Default: all. Raises MissingError for a target, UsageError for a part that is not there, or for a
        decoder that is not installed.
        """
        self.cache = cache
        named = {key: key.rpartition("/")[::2] for key in targets}
        self.targets = {key: (of or cache.layer(teacher).name, target) for key, (of, target) in named.items()}
        """Name in a batch → (teacher, target)."""
        self.check_views = check_views
        self._files = ShardFiles(_OPEN_TARS)
        self._is_handed_over = False
        cache.require_decoder()
        for one in self.targets.values():
            cache.target_views(*one)  # raises MissingError
        self.components: dict[str, tuple[str, ...]] = {}
        for target, chosen in (parts or {}).items():
            if target not in self.targets:
                raise UsageError(
                    f"parts {', '.join(chosen)} of {target!r}: expected one of the targets that are read: {', '.join(self.targets) or 'none'}"
                )
            self.components[target] = cache.encoding(*self.targets[target]).components_of(chosen)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._files = ShardFiles(_OPEN_TARS)

    def reading_from(self, files: ShardFiles) -> CachedViews:
        """The same dataset, which takes image bytes from `files`."""
        other = copy(self)
        other._files = files
        return other

    def handed_over(self) -> CachedViews:
        """The same dataset, whose batches are handed over as they are: in a worker they are made in shared memory."""
        other = copy(self)
        other._is_handed_over = True
        return other

    @property
    def row_bytes(self) -> int:
        """Of one row of a batch: its view, its label, and its targets as they are encoded."""
        labels = 20 if self.cache.plan.policy.mix is not None else 8
        return 3 * self.cache.plan.size**2 + labels + sum(self._target_bytes(key) for key in self.targets)

    @property
    def _num_tensors(self) -> int:
        """At most so many has a batch."""
        return 4 + sum(len(self._target_parts(key)) for key in self.targets)

    def _target_bytes(self, key: str) -> int:
        return sum(prod(part.shape) * np.dtype(part.dtype).itemsize for part in self._target_parts(key))

    def _target_parts(self, key: str) -> list[Component]:
        teacher, target = self.targets[key]
        chosen = self.components.get(key)
        parts = self.cache.layer(teacher).targets[target].identity.components
        return [part for name, part in parts.items() if chosen is None or name in chosen]

    def __len__(self) -> int:
        return len(self.cache.rows)

    def __getitem__(self, item: Item | tuple[int, int]) -> Batch:
        """A batch of one."""
        return self.__getitems__([item])

    def __getitems__(self, items: Sequence[Item | tuple[int, int]]) -> Batch:
        """The batch of these items, in this order; a (row number, view) alone is of epoch 0.

        Raises MissingError for a target that is not there, DriftError for pixels that the teacher did not see, CorruptError for stored
        bytes that changed, ShardError for a tar that can't be read.
        """
        rows = self.cache.rows
        row_numbers = np.array([item[0] for item in items], dtype=np.int64)
        size = self.cache.plan.size
        room = Room(len(items) * self.row_bytes, self._num_tensors, shared=self._is_handed_over)
        views = room.empty((len(items), size, size, 3), np.dtype(np.uint8))
        views_BHWC = views.numpy()
        tensors: dict[str, dict[str, Tensor]] = {target: {} for target in self.targets}
        arrays: dict[str, dict[str, np.ndarray[Any, Any]]] = {target: {} for target in self.targets}
        if isinstance(items, Items) and len(items.opened):
            self.read_ahead(items.opened, items[0].view)
        is_mixed, is_stored = self.cache.plan.policy.mix is not None, self.cache.plan.stored_views is not None
        partners, weights = row_numbers.copy(), np.ones(len(items), np.float32)
        for group in self._groups(items):
            shard_rows = rows.row[group.row_numbers]
            replays = self.cache.read_replays(group.shard, group.view, shard_rows) if is_mixed or not is_stored else []
            for place, pixels in self._render(group, replays):
                views_BHWC[place] = pixels
            for place, replay in zip(group.places.tolist(), replays, strict=not is_stored):
                if replay.partner is not None and replay.params.mix is not None:
                    partners[place] += replay.partner.row - replay.row
                    weights[place] = replay.params.mix.lambda_q16 / Q16
            for key, (teacher, target) in self.targets.items():
                components = self.cache.read_components(teacher, target, group.shard, group.view, shard_rows, components=self.components.get(key))
                for name, values in components.items():
                    if name not in arrays[key]:
                        tensor = tensors[key][name] = room.empty((len(items), *values.shape[1:]), values.dtype)
                        arrays[key][name] = tensor.numpy().view(values.dtype)
                    arrays[key][name][group.places] = values

        def column(values: np.ndarray[Any, Any]) -> Tensor:
            tensor = room.empty(values.shape, values.dtype)
            tensor.numpy()[:] = values
            return tensor

        batch = Batch(views=views, labels=column(rows.label[row_numbers]), targets=tensors)
        if is_mixed:
            batch["partner_labels"] = column(rows.label[partners])
            batch["label_weights"] = column(weights)
        return batch

    def read_ahead(self, row_numbers: np.ndarray[Any, Any], view: int) -> None:
        """Read all that the batches of these rows, of one view, will need, in runs as long as they lie, and drop it: it is in the page cache then."""
        rows, cache = self.cache.rows, self.cache
        numbers = np.sort(row_numbers)
        for group in np.split(numbers, np.nonzero(np.diff(rows.shard[numbers]))[0] + 1):
            shard, shard_rows = rows.shards[rows.shard[group[0]]], rows.row[group]
            if cache.plan.stored_views is not None:
                cache.touch_stored(shard, view, shard_rows)
            else:
                for first, last in runs_of(rows.offset[group], rows.size[group], gap=_TAR_GAP_BYTES, limit=2**62):
                    start, stop = int(rows.offset[group[first]]), int(rows.offset[group[last]] + rows.size[group[last]])
                    self._files.touch(cache.source(shard), start, stop)
            for key, (teacher, target) in self.targets.items():
                cache.touch_components(teacher, target, shard, view, shard_rows, components=self.components.get(key))

    def _groups(self, items: Sequence[Item | tuple[int, int]]) -> Iterator[_Group]:
        rows = self.cache.rows
        row_numbers, views, epochs = (np.array(column, dtype=np.int64) for column in zip(*(Item(*item) for item in items), strict=True))
        shards = rows.shard[row_numbers]
        order = np.lexsort((row_numbers, views, shards))
        changes = np.nonzero((np.diff(shards[order]) != 0) | (np.diff(views[order]) != 0))[0] + 1
        for places in np.split(order, changes):
            first = places[0]
            yield _Group(rows.shards[shards[first]], int(views[first]), places, row_numbers[places], epochs[places])

    def _render(self, group: _Group, replays: Sequence[Replay]) -> Iterator[tuple[int, Pixels]]:
        """(place in the batch, view) for the rows of a group, checked at the sampled rate. replays: of views that are not stored."""
        rows, cache = self.cache.rows, self.cache
        shard_rows = rows.row[group.row_numbers]
        is_stored = cache.plan.stored_views is not None
        found_views = cache.read_stored(group.shard, group.view, shard_rows) if is_stored else self._render_rows(group, replays)
        asked = zip(shard_rows.tolist(), group.epochs.tolist(), strict=True)
        checked = np.array([is_checked(group.shard, row, epoch, fraction=self.check_views) for row, epoch in asked], dtype=bool)
        digests = np.zeros(len(shard_rows), np.uint64)
        if checked.any():
            digests[checked] = cache.read_pixel_digests(group.shard, group.view, shard_rows[checked])
        for i, (place, number, pixels) in enumerate(zip(group.places.tolist(), group.row_numbers.tolist(), found_views, strict=True)):
            if checked[i] and (found := pixel_digest(pixels)) != int(digests[i]):
                raise pixel_drift(group.shard, self._key(number), group.view, expected=int(digests[i]), found=found)
            yield place, pixels

    def _render_rows(self, group: _Group, replays: Sequence[Replay]) -> Iterator[Pixels]:
        images = _ImageBytes(self._files, self.cache.source(group.shard), self.cache.rows, group.row_numbers)
        for number, replay in zip(group.row_numbers.tolist(), replays, strict=True):
            yield self._render_row(group, number, replay, images)

    def _render_row(self, group: _Group, number: int, replay: Replay, images: _ImageBytes) -> Pixels:
        first = number - replay.row  # of the shard's rows
        try:
            return replay.render(lambda row: self._decode(group, first + row, images))
        except CorruptError as error:
            raise self._cannot_render(group, number, error) from error

    def _decode(self, group: _Group, number: int, images: _ImageBytes) -> Decoded:
        try:
            data = images.read(number)
        except ShardError:
            data = images.read(number, self._key(number))  # keys are read for messages only
        try:
            return decode_image(data, self.cache.plan.decoder)
        except UnreadableImageError as error:
            raise self._cannot_render(group, number, error) from error

    def _cannot_render(self, group: _Group, number: int, error: Exception) -> DriftError:
        return DriftError(
            f"shard {group.shard}: key {self._key(number)!r}, view {group.view}: can't be rendered now ({error}), it could when the cache"
            f" was made; the tar was changed: restore it, or pass --data with the folder that holds the original"
        )

    def _key(self, number: int) -> str:
        rows = self.cache.rows
        return self.cache.keys(rows.shards[int(rows.shard[number])])[int(rows.row[number])]


class _ImageBytes:
    """The images of a group's rows as their tar has them; neighbours come with one read."""

    def __init__(self, files: ShardFiles, source: ShardSource, rows: Rows, numbers: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        """numbers: of rows, ascending; others may be asked for too, and come alone."""
        self._files, self._source, self._rows = files, source, rows
        self._run_of: dict[int, tuple[int, int]] = {}
        """Row number → first byte of its run and the byte after its last, for those that have neighbours."""
        self._begin, self._run = 0, b""
        if len(numbers) > 1 and files.reads_runs:
            offsets, sizes = rows.offset[numbers], rows.size[numbers]
            for first, last in runs_of(offsets, sizes, gap=_TAR_GAP_BYTES):
                if last > first:
                    span = int(offsets[first]), int(offsets[last] + sizes[last])
                    self._run_of |= dict.fromkeys(numbers[first : last + 1].tolist(), span)

    def read(self, number: int, key: str | None = None) -> bytes:
        """Raises ShardError. key: of the row, for the message; with it the image is read alone."""
        offset, size = int(self._rows.offset[number]), int(self._rows.size[number])
        begin, end = self._run_of.get(number, (0, 0))
        if not end or key is not None:
            return self._files.read(self._source, key or "", offset, size)
        if begin != self._begin or not self._run:
            self._run, self._begin = self._files.read(self._source, "", begin, end - begin), begin
        return self._run[offset - begin : offset - begin + size]


_GOLDEN_Q64 = 11400714819323198485
"""2^64 / the golden ratio."""


def is_checked(shard: str, row: int, epoch: int, *, fraction: float) -> bool:
    """Whether this row's pixels are compared with their stored digest in this epoch.

    A pure function, so that a repeated run repeats its checks. Each row starts at a hash of its own on a circle, moves by the golden
    ratio an epoch, and is checked in the first `fraction` of the circle. Every epoch checks about that share of the rows; and since
    no multiple of the golden ratio is whole, every view of a row comes round too, however many views there are.
    """
    if fraction >= 1 or fraction <= 0:
        return fraction >= 1
    start = int.from_bytes(hashlib.blake2b(canonical_json(["check", shard, row]), digest_size=8).digest(), "little")
    return (start + epoch * _GOLDEN_Q64) % 2**64 < int(fraction * 2**64)


# --- loading ---------------------------------------------------------------------------------------------------------


class _CarryErrors(Dataset[Any]):
    """Hands an error over as a value: raised in a worker, it would arrive wrapped in that worker's traceback."""

    def __init__(self, dataset: CachedViews) -> None:
        self._dataset = dataset

    def __getitems__(self, items: Sequence[Item | tuple[int, int]]) -> Batch | KDCacheError:
        try:
            return self._dataset.__getitems__(items)
        except KDCacheError as error:
            return type(error)(*error.args)


def plan_prefetch(batch_bytes: int, num_workers: int, prefetch_bytes: int) -> tuple[int, int]:
    """(worker processes, batches under way of each) so that workers · batches · batch_bytes <= prefetch_bytes; (0, 0) to load in this process.

    As many workers as asked for if each may have a batch under way, else fewer; at most MOST_PREFETCHED batches each. Raises UsageError if not
    one batch fits.
    """
    if num_workers == 0:
        return 0, 0
    fitting = prefetch_bytes // max(1, batch_bytes)
    if fitting == 0:
        raise UsageError(
            f"--prefetch-bytes {prefetch_bytes}: one batch has {batch_bytes} bytes of views and encoded targets; expected at least that, or a smaller"
            f" --batch-size, or --workers 0, which has none under way"
        )
    workers = min(num_workers, fitting)
    return workers, min(MOST_PREFETCHED, fitting // workers)


class BatchLoader:
    """Batches of a dataset in an EpochBatches' order, from persistent worker processes with one thread each. Close it when done."""

    def __init__(
        self,
        dataset: CachedViews,
        batches: EpochBatches,
        *,
        num_workers: int,
        pin_memory: bool = False,
        prefetch_bytes: int = DEFAULT_PREFETCH_BYTES,
    ) -> None:
        """num_workers: 0 loads in this process. prefetch_bytes: the most that batches hold which are being made or wait to be asked for.

        Raises UsageError as `plan_prefetch`.
        """
        self._batches = batches
        self.num_workers, self.prefetched = plan_prefetch(batches.batch_size * dataset.row_bytes, num_workers, prefetch_bytes)
        """Worker processes, and batches under way of each."""
        self._loader: DataLoader[Any] = DataLoader(
            _CarryErrors(dataset.handed_over()),
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=pack,
            pin_memory=pin_memory,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=outlast_a_signal if batches.world > 1 else None,
            prefetch_factor=self.prefetched or None,
            generator=torch.Generator(),  # the loader draws a seed for a stream: not from the generator that the student draws from
        )
        self._stream: Generator[Batch, None, None] | None = None
        """Of one epoch or several in turn."""
        self._place = (0, 0, 0)
        """(epoch, batch of it, until) that the stream gives next, and where it ends."""

    def __len__(self) -> int:
        """Steps of an epoch."""
        return len(self._batches)

    @property
    def step_size(self) -> int:
        """Rows of a step, in all processes."""
        return self._batches.step_size

    def epoch(self, epoch: int, *, start: int = 0, until: int | None = None) -> Iterator[Batch]:
        """The batches of an epoch, without those of its first `start` steps, of which nothing is read.

        until: of the epochs below it the first batches are made while this one ends, as many as may be under way; asked for in turn, these
        epochs are one stream. Default: of none.

        Raises what the dataset raises, StoreError if a worker was killed or has no shared memory left.
        """
        until = max(epoch + 1, until or 0)
        batches_of_step = self._batches.batches_of_step
        stream, place = self._stream, (epoch, start * batches_of_step, until)
        if stream is None or self._place != place:
            stream = self._begin(epoch, start, until)
        for number in range(start * batches_of_step, len(self) * batches_of_step):
            self._stream = None  # what raises ends it
            batch = next(stream)
            self._stream = stream
            self._place = (epoch, number + 1, until) if number + 1 < len(self) * batches_of_step else (epoch + 1, 0, until)
            yield batch

    def _begin(self, epoch: int, start: int, until: int) -> Generator[Batch, None, None]:
        self._end_stream()
        self._batches.set_epoch(epoch, start=start, until=until)
        return iterate(self._loader)

    def _end_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def close(self) -> None:
        """End the worker processes. An epoch that is asked for later begins new ones."""
        self._end_stream()
        end_workers(self._loader)


def to_device(components: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Encoded components on the student's device; pinned memory is copied while a GPU works."""
    return {name: moved(tensor, device) for name, tensor in components.items()}
