"""A cache in anyone's training loop: a map-style dataset for a plain `DataLoader`, and a stage for a webdataset pipeline over the same tars.

    CachedDataset ─▶ torch's DataLoader ─▶ (views, labels, targets) ─▶ Normalize, Decoder ─▶ any method, any loss
    wds.WebDataset(tars) … .compose(dataset.join) ─▶ samples with the view in the image's place, "label" and "targets"

Both are thin layers over `join.CachedViews`, which reads, renders and checks. Our own loop (`pipelines.train`) takes whole batches from
`join.BatchLoader` instead; here a batch is a list of samples that share its memory, so that torch's own collation and samplers serve.

Legend: B batch, H W of the view, K classes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate, get_worker_info

from .cache import Cache
from .console import counted
from .encodings import Encoding
from .errors import MissingError, ShardError, UsageError
from .images import IMAGE_EXTENSIONS
from .join import Batch, CachedViews, Item, Items, to_device, usable_views
from .losses import soft_labels
from .opening import open_cache
from .pixels import Normalize
from .shards import ShardFiles, ShardSource, printable

Sample: TypeAlias = tuple[Any, Any, dict[str, dict[str, Tensor]]]
"""(view, label, targets): as `CachedDataset` says, of one row."""

_READ_AHEAD = 32
"""Samples of a pipeline that `join` reads targets for at once: neighbours in a tar share chunks."""
_COUNTERS = 256
"""Of dropped samples and of rows read again, one a worker process: two that add to one number at once would lose some."""
_LOOKS = 64
"""Rows, and as large a part of all, that may be read again before an epoch was chosen: people look at a batch or two first."""


class Decoder(nn.Module):
    """Encoded targets of a batch → float32 values, on the device that the module was moved to. Has no parameters."""

    def __init__(self, encodings: Mapping[str, Encoding]) -> None:
        """encodings: of each target, by the name that a batch gives it."""
        super().__init__()
        self.encodings = dict(encodings)
        self.register_buffer("place", torch.empty(0), persistent=False)  # knows the device

    def forward(self, targets: Mapping[str, Mapping[str, Tensor]] | Sequence[Mapping[str, Mapping[str, Tensor]]]) -> dict[str, dict[str, Tensor]]:
        """Target → {"logits": (B, K)}, or {"grid": (B, tokens, C)[, "prefix": (B, prefix tokens, C)]}: what methods take.

        targets: target → component → (B, …), as a collated batch has them, or a list of every sample's, as webdataset's own collation leaves them.
        """
        batch = targets if isinstance(targets, Mapping) else default_collate(list(targets))
        device = self.get_buffer("place").device
        for key, encoding in self.encodings.items():
            if all(component.device.type == "cpu" for component in batch[key].values()):
                encoding.check(batch[key])
        return {key: encoding.decode(to_device(batch[key], device)) for key, encoding in self.encodings.items()}


class CachedDataset(Dataset[Sample]):
    """Rows of a cache, each as (view, label, targets), for `DataLoader(dataset, batch_size=…, shuffle=True, num_workers=…)` and any sampler.

    * view: uint8 (H, W, 3), the pixels that the teacher saw; `normalize_for(student)` makes (B, 3, S, S) of a batch of them on any device.
      With `transform`, what that gives of the view as uint8 (3, H, W).
    * label: int, -1 where the tar has none; of a policy that mixes float32 (K,), the share of each class in the view.
    * targets: target → component → still encoded tensors, which `decoder()` decodes on any device; with `decode` target → float32 values. A
      target is called as it was asked for, `logits`, or `teacher/logits`.

    An index takes the view of the epoch that `set_epoch` chose, (index, view) or a `join.Item` any view, so that a sampler may choose: `join.EpochBatches` does.
    Nothing may flip, crop or jitter a view: targets are of these very pixels. Pickles; each process opens files of its own.
    """

    def __init__(
        self,
        cache: Cache | str | os.PathLike[str],
        targets: str | Sequence[str] = (),
        *,
        teacher: str | None = None,
        parts: Mapping[str, Sequence[str]] | None = None,
        shards: Sequence[str] | None = None,
        views: int | None = None,
        decode: bool = False,
        transform: Callable[[Tensor], Any] | None = None,
        labels: bool = True,
        num_classes: int | None = None,
        check_views: float = 0.05,
    ) -> None:
        """cache: open, or its folder. targets: what to read of `teacher` (None: the only one), or `TEACHER/TARGET` of any; a method's `target_names`.

        parts: as `CachedViews`; a method's `target_parts()`. shards: which of the cache's; None for all of a finished cache. views: how many
        views the epochs go round; None for all that there are of everything. decode: decode in the loading process, which costs it about a quarter
        of its throughput. transform: a view, uint8 (3, H, W) → what the sample has in its place, in the loading process; normalisation
        belongs here or on the device, augmentation nowhere. labels: False leaves labels int and unchecked where the policy mixes. num_classes: K of
        those; None for the teacher's whose logits are read, else the largest label + 1. check_views: fraction of an epoch's rows whose pixel
        digest is checked.

        Raises MissingError for what the cache does not hold or has not finished, UsageError for a request that can't be right, ShardError
        for a tar that is another than the cache was made from, or rows without a label where views are mixed.
        """
        self.cache = cache if isinstance(cache, Cache) else open_cache(cache)
        names = (targets,) if isinstance(targets, str) else tuple(targets)
        self._views = CachedViews(self.cache, teacher=teacher, targets=names, parts=parts, check_views=check_views)
        self.shards = _chosen(self.cache, shards)
        self.num_views = self._choose_views(views)
        rows = self.cache.rows
        wanted = np.isin(rows.shards, self.shards)
        self.row_numbers: np.ndarray[Any, np.dtype[np.int64]] = np.nonzero(wanted[rows.shard])[0].astype(np.int64)
        """(N,) the number in Cache.rows of each index."""
        if len(self.row_numbers) == 0:
            raise MissingError(
                f"{self.cache.store.url}: no rows in its {counted(len(self.shards), 'shard')}; every sample was skipped when the cache was made"
            )
        for shard in self.shards if self.cache.plan.stored_views is None else ():
            if os.path.exists(self.cache.source(shard).path):  # one that is elsewhere may come through a pipeline
                self.cache.check_source(shard)
        first: list[int] = np.searchsorted(rows.shard, np.arange(len(rows.shards))).tolist()
        self._first_rows: dict[str, int] = {
            shard: number for shard, number, chosen in zip(rows.shards, first, wanted.tolist(), strict=True) if chosen
        }
        """Shard → the number of its first row in Cache.rows."""
        self.transform = transform
        self.num_classes = self._count_classes(num_classes) if labels and self.cache.plan.policy.mix is not None else None
        """K of soft labels; None where labels are int."""
        self._decoder = self.decoder() if decode else None
        self._epoch = _shared(torch.full((1,), -1, dtype=torch.int64))
        """-1 until one was chosen."""
        self._dropped, self._again = (_shared(torch.zeros(_COUNTERS, dtype=torch.int64)) for _ in range(2))
        self._seen = _shared(torch.zeros(len(rows) if self.num_views > 1 else 0, dtype=torch.bool))
        """(rows of the cache,) those that were read before an epoch was chosen."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name in ("_epoch", "_dropped", "_again", "_seen"):
            setattr(self, name, _shared(getattr(self, name)))

    def _choose_views(self, wanted: int | None) -> int:
        of_teachers: dict[str, list[str]] = {}
        for teacher, target in self._views.targets.values():
            of_teachers.setdefault(teacher, []).append(target)
        counts = [usable_views(self.cache, teacher, names, self.shards) for teacher, names in of_teachers.items()]
        usable = min(counts) if counts else usable_views(self.cache, None, (), self.shards)
        if wanted is not None and wanted < 1:
            raise UsageError(f"views={wanted}: expected at least 1")
        if wanted is not None and wanted > usable:
            raise MissingError(
                f"{self.cache.store.url}: views={wanted}: the cache has {counted(usable, 'view')} of all that is read; expected at most that, or run 'kdcache"
                f" extract' again with --views {wanted} to add them"
            )
        return usable if wanted is None else wanted

    def _count_classes(self, given: int | None) -> int:
        rows = self.cache.rows
        labels = rows.label[self.row_numbers]
        logits = [teacher for teacher, target in self._views.targets.values() if target == "logits"]
        of_teacher = self.cache.layer(logits[0]).document.identity.num_classes if logits else int(labels.max()) + 1
        num_classes = of_teacher if given is None else given
        bad = np.nonzero((labels < 0) | (labels >= num_classes))[0]
        if len(bad):
            number = self.row_numbers[bad[0]]
            shard = rows.shards[rows.shard[number]]
            raise ShardError(
                f"shard {shard}: key {self.cache.keys(shard)[rows.row[number]]!r} has label {labels[bad[0]]}, expected 0 to {num_classes - 1} in every row,"
                f" since views are mixed and labels with them; pass num_classes, or labels=False to train without labels"
            )
        return num_classes

    # --- epochs ---

    @property
    def epoch(self) -> int:
        """The epoch that was chosen last, 0 at first."""
        return max(0, int(self._epoch))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose view, `epoch` mod `num_views`, an index gives. To be called before an epoch's iteration begins, beside the sampler's own.

        It reaches worker processes that are running already, so `persistent_workers=True` is fine. A loop that never calls it would train on
        view 0 for ever: where there are more, reading rows over again without it raises UsageError.
        """
        if epoch < 0:
            raise UsageError(f"set_epoch({epoch}): expected a number from 0")
        self._epoch.fill_(epoch)

    def _count_reading(self, row_numbers: Sequence[int]) -> None:
        """Raise UsageError if rows are read over and over while no epoch was chosen."""
        if self.num_views == 1 or int(self._epoch) >= 0 or not row_numbers:
            return
        seen, worker = self._seen.numpy(), get_worker_info()
        self._again[worker.id % _COUNTERS if worker is not None else 0] += int(seen[row_numbers].sum())
        seen[row_numbers] = True
        again = int(self._again.sum())
        if again > _LOOKS + len(self) // _LOOKS:
            raise UsageError(
                f"CachedDataset: {counted(again, 'row')} were read again and no epoch was ever chosen, so that each gave view 0 of {self.num_views} again; call"
                f" dataset.set_epoch(epoch) before every epoch, or pass views=1 to train on the first view only"
            )

    # --- rows ---

    def __len__(self) -> int:
        return len(self.row_numbers)

    def __getitem__(self, index: int | tuple[int, ...]) -> Sample:
        """One sample. Raises IndexError beyond the last, and as `__getitems__`."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int | tuple[int, ...]]) -> list[Sample]:
        """The samples of these indices, in this order, read as one batch whose memory they share; torch's DataLoader calls this.

        Raises MissingError for a view or target that is not there, DriftError for pixels that the teacher did not see, CorruptError for stored
        bytes that changed, ShardError for a tar that can't be read, UsageError if `set_epoch` was forgotten.
        """
        epoch = self.epoch
        items = [self._item(index, epoch) for index in indices]
        self._count_reading([item.row for item, index in zip(items, indices, strict=True) if not isinstance(index, tuple)])
        if isinstance(indices, Items):  # of an EpochBatches in blocks
            items = Items(items, self.row_numbers[indices.opened])
        return self._samples(self._views.__getitems__(items))

    def _item(self, index: int | tuple[int, ...], epoch: int) -> Item:
        if isinstance(index, tuple):
            return Item(int(self.row_numbers[index[0]]), *index[1:])
        return Item(int(self.row_numbers[index]), epoch % self.num_views, epoch)

    def _samples(self, batch: Batch) -> list[Sample]:
        views: Sequence[Any] = batch["views"].unbind()
        if self.transform is not None:
            views = [self.transform(view.permute(2, 0, 1)) for view in views]
        labels: Sequence[Any] = batch["labels"].tolist()
        if self.num_classes is not None:
            labels = soft_labels(batch["labels"], batch["partner_labels"], batch["label_weights"], self.num_classes).unbind()
        encoded = batch["targets"]
        parts = {
            key: {name: tensor.unbind() for name, tensor in value.items()}
            for key, value in (self._decoder(encoded) if self._decoder else encoded).items()
        }
        return [
            (view, label, {key: {name: rows[i] for name, rows in value.items()} for key, value in parts.items()})
            for i, (view, label) in enumerate(zip(views, labels, strict=True))
        ]

    # --- on the device ---

    def decoder(self) -> Decoder:
        """The module that decodes a batch's targets: `dataset.decoder().to(device)`."""
        return Decoder({key: self.cache.encoding(*one) for key, one in self._views.targets.items()})

    def normalize_for(self, model: nn.Module) -> Normalize:
        """The module that makes a timm model's input of a batch of views: uint8 (B, H, W, 3) → float32 (B, 3, S, S), by its data config."""
        from .students import input_size_for
        from .timm_models import mean_std_of

        mean, std = mean_std_of(model)
        return Normalize(mean, std, input_size_for(model, self.cache.plan.size))

    # --- webdataset ---

    @property
    def dropped(self) -> int:
        """Samples that `join` has passed over so far, in every process, since they were skipped when the cache was made."""
        return int(self._dropped.sum())

    def join(self, samples: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """A stage of a webdataset pipeline over the cache's tars: `wds.WebDataset(…).shuffle(1000).compose(dataset.join)`, before any `decode`.

        Each sample is found by its `__url__`'s base name and `__key__`. The view takes the place of its image (under the same key, as `view` above),
        "label" and "targets" are added as above, all else stays. Image bytes are the pipeline's, wherever its tars lie; only partners of mixed views
        are read from where the cache knows its tars. A sample that was skipped when the cache was made is dropped and counted. Order and
        number are the pipeline's otherwise, the view is the epoch's.

        Raises MissingError for a sample that the cache does not know, UsageError for one without its image's bytes, and as `__getitems__`.
        """
        files = _ImagesAtHand()
        reader = self._views.reading_from(files)
        source = iter(samples)
        while run := list(islice(source, _READ_AHEAD)):
            epoch = self.epoch
            found: list[tuple[Mapping[str, Any], str, Item]] = []
            files.images.clear()
            for sample in run:
                number = self._find(sample)
                if number is not None:
                    found.append((sample, self._image_key(sample, number, files), Item(number, epoch % self.num_views, epoch)))
            if not found:
                continue
            self._count_reading([item.row for _, _, item in found])
            joined = self._samples(reader.__getitems__([item for _, _, item in found]))
            for (sample, image, _), (view, label, targets) in zip(found, joined, strict=True):
                yield {**sample, image: view, "label": label, "targets": targets}

    def _find(self, sample: Mapping[str, Any]) -> int | None:
        """The number in Cache.rows of a pipeline's sample; None for one that was skipped."""
        if "__url__" not in sample or "__key__" not in sample:
            raise UsageError(f"join: a sample without __url__ and __key__ ({', '.join(sample)}); expected those of webdataset's tarfile_to_samples")
        shard, key = self._shard_of(str(sample["__url__"])), printable(str(sample["__key__"]))
        try:
            row = self.cache.row_of(shard, key)
        except MissingError:
            if any(skip.key == key for skip in self.cache.views_record(shard, 0).skipped):
                worker = get_worker_info()
                self._dropped[worker.id % _COUNTERS if worker is not None else 0] += 1
                return None
            raise
        return self._first_rows[shard] + row

    def _shard_of(self, url: str) -> str:
        """The name of the shard that a URL means: a path, an address with a query, or a command such as `pipe:curl -s https://…/a-0.tar`."""
        known = self._first_rows
        in_command: list[str] = re.findall(r"([^/\s'\"=]+)\.tar\b", url)
        for name in (url.rpartition("/")[2].removesuffix(".tar"), *reversed(in_command)):
            if name in known:
                return name
        raise MissingError(
            f"{self.cache.store.url}: join: no shard of {url!r}; the cache has {counted(len(known), 'shard')}, from {self.shards[:1]} on"
        )

    def _image_key(self, sample: Mapping[str, Any], number: int, files: _ImagesAtHand) -> str:
        """Under what key the sample has its image, whose bytes are kept at hand where views are rendered."""
        rows = self.cache.rows
        shard = rows.shards[rows.shard[number]]
        is_stored = self.cache.plan.stored_views is not None
        for extension in IMAGE_EXTENSIONS:
            if is_stored and extension in sample:
                return extension
            if isinstance(sample.get(extension), bytes):
                files.images[shard, int(rows.offset[number])] = sample[extension]
                return extension
        raise UsageError(
            f"shard {shard}: key {sample['__key__']!r}: expected the bytes of its image under one of {', '.join(IMAGE_EXTENSIONS)}, found"
            f" {', '.join(f'{key} ({type(value).__name__})' for key, value in sample.items() if not key.startswith('__'))}; put the stage before any decode"
        )


class _ImagesAtHand(ShardFiles):
    """Image bytes that a pipeline has read already, in place of their tars."""

    reads_runs = False

    def __init__(self) -> None:
        super().__init__()
        self.images: dict[tuple[str, int], bytes] = {}
        """(shard, offset of the image in its tar) → its bytes."""

    def read(self, source: ShardSource, key: str, offset: int, size: int) -> bytes:
        data = self.images.get((source.name, offset))
        if data is None:
            return super().read(source, key, offset, size)
        if len(data) != size:
            raise ShardError(
                f"shard {source.name}: key {key!r}: expected an image of {size} bytes, the pipeline has {len(data)}; the tar was changed"
            )
        return data


def _shared(tensor: Tensor) -> Tensor:
    """The tensor in memory that worker processes share; as it is for one of torch's workers, which was handed it so."""
    if not tensor.is_shared():  # type: ignore[no-untyped-call]
        tensor.share_memory_()  # type: ignore[no-untyped-call]
    return tensor


def _chosen(cache: Cache, shards: Sequence[str] | None) -> list[str]:
    """The shards to read, in name order. Raises MissingError for one that is not done."""
    done, asked = cache.shards, cache.all_shards
    missing = sorted(set(asked if shards is None else shards) - set(done))
    if not done or missing:
        first = repr(missing[0]) if missing else "none"
        raise MissingError(
            f"{cache.store.url}: {len(done)} of {len(asked)} shards are done, {first} is not; run 'kdcache extract' again with the same arguments to"
            f" finish the cache, or pass shards=cache.shards to read what is there"
        )
    return done if shards is None else sorted(set(shards))
