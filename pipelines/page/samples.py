"""A few rows of a cache, for the page: the original with its crop boxes, the views as rendered, what each teacher said of them.

Whatever can't be read, since a tar is gone or a file is damaged, becomes a note where the picture or the figure would be.

Legend: H W rows and columns, pixels; K classes.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.augment import Q16
from kdcache.cache import Cache, Replay
from kdcache.class_names import ClassNames
from kdcache.distance import log_softmax
from kdcache.errors import CorruptError, KDCacheError, UsageError
from kdcache.images import Decoded, as_pillow, decode_image, require_decoder, size_of
from kdcache.index import rows_of_table
from kdcache.shards import ShardFiles
from kdcache.view_params import CUTMIX, Box, ViewParams
from kdcache.views import pixel_digest

from ..facts import decode_rows, views_of
from ..words import params_in_words
from .opening import PageCache
from .pictures import Picture, thumbnail

if TYPE_CHECKING:
    from kdcache.encodings import Encoding

VIEWS_A_SAMPLE = 4
VIEWS_OF_ONE = 24
"""Views of a sample that was asked for by its key."""
_ORIGINAL_SIDE = 512
_PARTNER_SIDE = 192
_TOP = 5


@dataclass(frozen=True)
class Row:
    """A row by its shard and number there."""

    shard: str
    row: int


@dataclass(frozen=True)
class Guess:
    """A class that a teacher gave a probability."""

    number: int
    name: str | None
    probability: float
    is_label: bool
    is_partner_label: bool


@dataclass(frozen=True)
class Opinion:
    """What one teacher's logits say of one view, by their softmax at T = 1."""

    teacher: str
    guesses: tuple[Guess, ...]
    """The likeliest classes; the label's is added where it is not among them."""
    entropy_nats: float
    rank: int | None
    """Place of the label, from 1; None without one."""


@dataclass(frozen=True)
class FeatureMap:
    """Token features of a view as colours."""

    teacher: str
    target: str
    picture: Picture


@dataclass(frozen=True)
class Partner:
    """What was mixed into a view."""

    key: str
    label: int | None
    label_name: str | None
    weight: float
    """Of the partner, from 0 to 1."""
    params: ViewParams
    original: Picture | None
    size_wh: tuple[int, int] | None


@dataclass
class View:
    """One view of a sample."""

    number: int
    params: ViewParams | None = None
    words: tuple[str, ...] = ()
    picture: Picture | None = None
    note: str = ""
    """Why there is no picture, or what is wrong with it."""
    digest: str = ""
    partner: Partner | None = None
    opinions: list[Opinion] = field(default_factory=list)
    maps: list[FeatureMap] = field(default_factory=list)

    @property
    def cut_box(self) -> Box | None:
        """Where a CutMix partner's pixels are."""
        mix = self.params.mix if self.params is not None else None
        return mix.box if mix is not None and mix.mode == CUTMIX else None


@dataclass
class Sample:
    """One sample of the page."""

    shard: str
    row: int
    key: str = ""
    label: int | None = None
    label_name: str | None = None
    original: Picture | None = None
    size_wh: tuple[int, int] | None = None
    """Of the original; where it can't be read, as much of it as the crops reach."""
    note: str = ""
    views: list[View] = field(default_factory=list)


def choose_rows(cache: Cache, count: int, seed: int, shard: str | None, key: str | None) -> list[Row]:
    """`count` rows, each as likely, in the order of the cache; of one shard, or the one of a key. Raises MissingError, UsageError."""
    if shard is not None and shard not in cache.views:
        raise cache.no_shard(shard)
    if key is not None:
        if shard is None:
            raise UsageError("--key needs --shard: a key is known within its shard only")
        return [Row(shard, cache.row_of(shard, key))]
    counts = {name: cache.views[name][0].identity.rows for name in ([shard] if shard is not None else cache.shards)}
    total = sum(counts.values())
    rows: list[Row] = []
    chosen = iter(sorted(random.Random(seed).sample(range(total), min(count, total))))
    place, start = next(chosen, None), 0
    for name, size in counts.items():
        while place is not None and place < start + size:
            rows.append(Row(name, place - start))
            place = next(chosen, None)
        start += size
    return rows


def gather_samples(
    opened: PageCache, rows: Sequence[Row], names: Mapping[str, ClassNames | None], label_names: ClassNames | None, *, all_views: bool
) -> list[Sample]:
    """The samples of these rows. names: of each teacher's classes. all_views: as many as VIEWS_OF_ONE."""
    gatherer = _Gatherer(opened, names, label_names, VIEWS_OF_ONE if all_views else VIEWS_A_SAMPLE)
    return [gatherer.sample(row) for row in rows]


def pictures_of(samples: Iterable[Sample]) -> Iterator[Picture]:
    """Every picture of them, in the order of the page."""
    for sample in samples:
        if sample.original is not None:
            yield sample.original
        for view in sample.views:
            yield from (picture for picture in (view.picture, view.partner.original if view.partner else None) if picture is not None)
            yield from (shown.picture for shown in view.maps)


class _Gatherer:
    """Reads rows; remembers per shard whether its tar serves."""

    def __init__(self, opened: PageCache, names: Mapping[str, ClassNames | None], label_names: ClassNames | None, max_views: int) -> None:
        self._opened, self._cache, self._names, self._max_views = opened, opened.cache, names, max_views
        self._label_names = label_names
        self._files = ShardFiles()
        self._notes: dict[str, str] = {}
        self._tables: dict[str, np.ndarray[Any, Any]] = {}
        self._encodings: dict[str, Encoding] = {}

    def sample(self, row: Row) -> Sample:
        sample = Sample(row.shard, row.row)
        try:
            sample.key = self._key(row.shard, row.row)
            label = int(self._table(row.shard)[row.row, 2])
        except KDCacheError as error:
            sample.note = self._opened.tell(error, row.shard)
            return sample
        sample.label = label if label >= 0 else None
        sample.label_name = self._name(label)
        sample.note = self._tar_note(row.shard)
        image = self._original(sample)
        if image is not None:
            sample.original, sample.size_wh = thumbnail(as_pillow(image), _ORIGINAL_SIDE), size_of(image)
        sample.views = [self._view(sample, view) for view in views_of(self._cache.views.get(row.shard, []))[: self._max_views]]
        if sample.size_wh is None:
            crops = [view.params.crop for view in sample.views if view.params is not None]
            if crops:
                sample.size_wh = max(crop.left + crop.width for crop in crops), max(crop.top + crop.height for crop in crops)
        return sample

    def _name(self, label: int) -> str | None:
        return self._label_names.of(label) if self._label_names is not None and label >= 0 else None

    def _key(self, shard: str, row: int) -> str:
        keys = self._cache.keys(shard)
        if row >= len(keys):  # a key that stands there twice
            raise CorruptError(f"shard {shard}: {len(keys)} different keys, expected one for row {row}")
        return keys[row]

    def _table(self, shard: str) -> np.ndarray[Any, Any]:
        """int64 (rows, 4) of a shard; read from its own group, so that a damaged one does no harm to others."""
        if shard not in self._tables:
            table = self._cache.table_from_group(self._cache.views[shard][0].identity)
            self._tables[shard] = rows_of_table(table)
        return self._tables[shard]

    # --- images ---

    def _tar_note(self, shard: str) -> str:
        """Why a shard's tar does not serve; '' if it does."""
        if shard not in self._notes:
            try:
                require_decoder(self._cache.plan.decoder)
            except UsageError:
                decoder = self._cache.plan.decoder
                self._notes[shard] = f"The original is not shown: the plan's decoder {decoder} is not installed. Run pip install 'kdcache[fast]'."
                return self._notes[shard]
            try:
                path = self._cache.source(shard).path
                self._notes[shard] = "" if os.path.isfile(path) else "The original is not shown: its tar is not where it was. Pass --data SHARDS."
                if not self._notes[shard]:
                    self._cache.check_source(shard)
            except UsageError:
                self._notes[shard] = "The original is not shown: its tar is not among those given with --data."
            except KDCacheError:
                self._notes[shard] = "The original is not shown: its tar is another one than the cache was made from."
        return self._notes[shard]

    def _image(self, shard: str, row: int) -> Decoded:
        """Raises KDCacheError or ValueError for what can't be read."""
        offset, size = (int(value) for value in self._table(shard)[row, :2])
        return decode_image(self._files.read(self._cache.source(shard), self._key(shard, row), offset, size), self._cache.plan.decoder)

    def _original(self, sample: Sample) -> Decoded | None:
        if sample.note:
            return None
        try:
            return self._image(sample.shard, sample.row)
        except (KDCacheError, ValueError):
            sample.note = "The original is not shown: its bytes in the tar are no longer an image."
            return None

    def _view(self, sample: Sample, number: int) -> View:
        view, cache = View(number), self._cache
        try:
            (replay,) = cache.read_replays(sample.shard, number, [sample.row])
            digest = int(cache.read_pixel_digests(sample.shard, number, [sample.row])[0])
            view.params, view.digest = replay.params, f"{digest:016x}"
            view.partner = self._partner(sample, replay)
            view.words = tuple(params_in_words(replay.params, f"“{view.partner.key}”" if view.partner is not None else None))
            if view.partner is not None:
                view.words += (f"the partner: {', '.join(params_in_words(view.partner.params))}",)
            pixels = self._pixels(sample, number, replay)
        except KDCacheError as error:
            view.note = self._opened.tell(error, sample.shard)
            pixels = None
        except ValueError:
            view.note = "can't be rendered: an image that it needs is no longer one"
            pixels = None
        if pixels is not None:
            view.picture = Picture(pixels)
            if pixel_digest(pixels) != digest:
                view.note = (
                    "These are not the pixels that the teacher saw: the decoder or the image is another one. Run 'kdcache verify --views all'."
                )
                self._opened.add(
                    f"shard {sample.shard}: key {sample.key!r}, view {number}: its pixels are not those that the teacher saw", sample.shard
                )
        elif not view.note:
            view.note = "Not stored in the cache, and its tar is not at hand."
        for teacher, layer in sorted(cache.teachers.items()):
            if "logits" in layer.targets and any(number in record.identity.views for record in layer.segments(sample.shard, "logits")):
                try:
                    view.opinions.append(self._opinion(sample, view, teacher))
                except KDCacheError as error:
                    text = self._opened.tell(error, sample.shard)
                    view.note = view.note or text
        return view

    def _pixels(self, sample: Sample, number: int, replay: Replay) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        if self._cache.plan.stored_views is not None:
            return next(iter(self._cache.read_stored(sample.shard, number, [sample.row])))
        if self._tar_note(sample.shard):
            return None
        return replay.render(lambda row: self._image(sample.shard, row))

    def _partner(self, sample: Sample, replay: Replay) -> Partner | None:
        mix, partner = replay.params.mix, replay.partner
        if mix is None or partner is None:
            return None
        original, size_wh = None, None
        if not self._tar_note(sample.shard):
            try:
                image = self._image(sample.shard, partner.row)
                original, size_wh = thumbnail(as_pillow(image), _PARTNER_SIDE), size_of(image)
            except (KDCacheError, ValueError):  # the view itself will say so
                original = None
        label = int(self._table(sample.shard)[partner.row, 2])
        key = self._key(sample.shard, partner.row)
        return Partner(key, label if label >= 0 else None, self._name(label), 1 - mix.lambda_q16 / Q16, partner.params, original, size_wh)

    # --- logits ---

    def _opinion(self, sample: Sample, view: View, teacher: str) -> Opinion:
        if teacher not in self._encodings:
            self._encodings[teacher] = self._cache.encoding(teacher, "logits")
        value = decode_rows(self._cache, teacher, "logits", self._encodings[teacher], sample.shard, view.number, np.array([sample.row]))
        if not np.isfinite(value["logits"]).all():
            raise CorruptError(f"shard {sample.shard}: logits that are not finite")
        log_p = log_softmax(value["logits"])[0]
        p = np.exp(log_p)
        order = np.argsort(-p, kind="stable")
        label = sample.label if sample.label is not None and sample.label < len(p) else None
        partner = view.partner.label if view.partner is not None else None
        shown = order[:_TOP].tolist()
        if label is not None and label not in shown:
            shown.append(label)
        names = self._names[teacher]
        return Opinion(
            teacher,
            tuple(Guess(i, names.of(i) if names else None, float(p[i]), i == label, i == partner) for i in shown),
            max(0.0, float(-(p * log_p).sum())),
            int(np.flatnonzero(order == label)[0]) + 1 if label is not None else None,
        )
