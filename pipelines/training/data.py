"""What a training run is trained on: the cache, its teachers' targets, the rows and views of every epoch, the validation tars. First step of train."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kdcache.cache import Cache
from kdcache.console import counted, say
from kdcache.errors import MissingError, ShardError, UsageError
from kdcache.join import image_bytes, target_keys, usable_views
from kdcache.methods import MethodSettings, method_class, needed_targets, parse_settings, teacher_weights, teachers_of_logits
from kdcache.mounts import far_path
from kdcache.opening import open_cache
from kdcache.order import Blocks, block_order, epoch_order, labels_per_batch
from kdcache.shards import NO_LABEL, ShardIndex, scan_shard
from kdcache.sources import resolve_shards

from .config import TrainConfig

_WELL_MIXED = 0.9
"""Share of the labels of a fully shuffled batch that one of blocks must have for `auto` to take them: of shards in a random order it has them all."""
_METHOD_OPTIONS = {
    "kd_temperature": "temperature",
    "distill_loss_weight": "distill_loss_weight",
    "task_loss_weight": "task_loss_weight",
    "smoothing": "smoothing",
}
"""Options that stand for a field of the method."""

NOT_OF_DATA = (
    "students", "pretrained", "model_kwargs", "epochs", "grad_accum_steps", "opt", "lr", "weight_decay", "momentum", "opt_betas", "clip_grad", "sched",
    "warmup_epochs", "min_lr", "amp", "amp_dtype", "sync_bn", "torchcompile", "model_ema", "model_ema_decay", "model_ema_warmup", "val_interval",
    "val_crop_pct", "check_views", "workers", "prefetch_bytes", "device", "channels_last", "log_interval", "log_tensorboard", "log_wandb",
    "wandb_project", "recovery_interval", "out", "resume", "allow_other_cache",
)  # fmt: skip
"""Fields of TrainConfig that `open_data` does not look at: configs that differ in these alone have the same TrainingData."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What all students of a command have in common: the cache, the rows, the method's settings, the validation tars."""

    cache: Cache
    settings: MethodSettings
    teachers: dict[str, float]
    """Name → weight in the loss, 1 of one alone; empty for a method that needs no target."""
    targets: dict[str, tuple[str, ...]]
    """Teacher → what is read of it."""
    shards: tuple[str, ...]
    row_numbers: np.ndarray[Any, np.dtype[np.int64]]
    num_views: int
    """Epoch e trains on view e mod this."""
    num_classes: int
    blocks: Blocks | None
    """Of the rows' order, where it is `block`."""
    val: tuple[ShardIndex, ...]

    def describe(self) -> dict[str, Any]:
        """All that decides what is read, JSON types: growth of the cache by what this run does not read changes nothing here."""
        teachers = {name: self.cache.layer(name).document.identity_digest for name in self.teachers}
        keys = target_keys(self.targets).items()
        return {
            "fingerprint": self.cache.fingerprint,
            "views": self.num_views,
            "shards": {shard: self.cache.views_record(shard, 0).member_table for shard in self.shards},
            "teacher": teachers if len(teachers) > 1 else next(iter(teachers.values()), None),
            "targets": {key: self.cache.layer(teacher).targets[target].identity_digest for key, (teacher, target) in keys},
            "val": {index.source.name: index.member_table for index in self.val},
        }

    def in_words(self) -> str:
        """For the person at the terminal, before the first step."""
        taught = " and ".join(f"{', '.join(targets)} of {teacher}" for teacher, targets in self.targets.items()) or "no teacher, labels alone"
        images = sum(len(index.samples) for index in self.val)
        measured = f"measured on {counted(images, 'image')}" if self.val else "no --val, so no accuracy is measured"
        return (
            f"training on {counted(len(self.row_numbers), 'row')} x {counted(self.num_views, 'view')} of {self.cache.store.url}:"
            f" {taught}; {counted(self.num_classes, 'class')}; {measured}"
        )


@dataclass(frozen=True)
class Opened:
    """What several configs have opened: a sweep over one cache holds it, its rows and the validation tars once."""

    caches: dict[tuple[str, str | None], Cache] = field(default_factory=dict)
    val: dict[tuple[str, str | None], tuple[ShardIndex, ...]] = field(default_factory=dict)

    said: set[str] = field(default_factory=set)

    def say_once(self, text: str) -> None:
        """What holds for all of them."""
        if text not in self.said:
            self.said.add(text)
            say(text)

    def cache(self, path: str, data: str | None) -> Cache:
        if (path, data) not in self.caches:
            self.caches[path, data] = open_cache(path, data=data)
        return self.caches[path, data]

    def scan(self, shards: str, label_key: str | None) -> tuple[ShardIndex, ...]:
        """The index of labelled tars."""
        if (shards, label_key) not in self.val:
            self.val[shards, label_key] = tuple(scan_shard(source) for source in resolve_shards(shards, label_key=label_key))
        return self.val[shards, label_key]


def open_data(config: TrainConfig, opened: Opened | None = None) -> TrainingData:
    """Open the cache and settle what is trained on. Raises KDCacheError for whatever would fail an hour later.

    opened: by configs before this one. Default: nothing.
    """
    opened = Opened() if opened is None else opened
    settings = parse_settings(config.method, method_settings(config), config.teacher)
    cache = opened.cache(config.cache, config.data)
    shards = _choose_shards(cache, config.limit_shards)
    targets = needed_targets(config.method, settings, cache, config.teacher)
    weights = teacher_weights(config.teacher)
    num_views = _choose_views(cache, targets, shards, config.views)
    rows = cache.rows
    wanted = set(shards)
    chosen = np.array([shard in wanted for shard in rows.shards], dtype=bool)
    row_numbers = np.nonzero(chosen[rows.shard])[0].astype(np.int64)
    if len(row_numbers) == 0:
        raise MissingError(f"{cache.store.url}: no rows in its {counted(len(shards), 'shard')}; every sample was skipped when the cache was made")
    cache.require_decoder()
    for shard in shards if cache.plan.stored_views is None else ():
        cache.check_source(shard)  # raises for a shard that --data lacks, a tar that is gone or one of another size and other members
    num_classes = _num_classes(config, cache, targets, settings)
    blocks = _choose_blocks(cache, shards, row_numbers, config, opened)
    label_key = config.label_key if config.label_key is not None else cache.label_key
    return TrainingData(
        cache=cache,
        settings=settings,
        teachers={name: weights.get(name, 1.0) for name in targets},
        targets=targets,
        shards=tuple(shards),
        row_numbers=row_numbers,
        num_views=num_views,
        num_classes=num_classes,
        blocks=blocks,
        val=opened.scan(config.val, label_key) if config.val is not None else (),
    )


def _choose_blocks(
    cache: Cache, shards: Sequence[str], row_numbers: np.ndarray[Any, np.dtype[np.int64]], config: TrainConfig, opened: Opened
) -> Blocks | None:
    """The blocks of the rows' order, None for a full permutation: what --shuffle comes to, and with `auto` a line that says why."""
    if config.shuffle == "full":
        return None
    tars = [] if cache.plan.stored_views is not None else [os.path.dirname(cache.source(shard).path) for shard in shards]
    far = far_path([cache.store.url, *dict.fromkeys(tars)]) if config.shuffle == "auto" else None
    if config.shuffle == "auto" and far is None:
        return None
    blocks = Blocks.fitting(image_bytes(cache, row_numbers))
    labels, count = cache.rows.label[row_numbers], len(row_numbers)
    orders = block_order(count, config.seed, 0, blocks), epoch_order(count, config.seed, 0)
    in_blocks, in_full = (labels_per_batch(order, labels, config.batch_size) for order in orders)
    is_mixed = in_blocks >= _WELL_MIXED * in_full
    where = f"{far[0]} lies on a network file system ({far[1]})" if far is not None else ""
    if far is not None and not is_mixed:
        opened.say_once(
            f"--shuffle auto: full, though {where}: the shards are sorted by label, and in blocks a batch would have {in_blocks:.0f} labels in place of"
            f" {in_full:.0f}; pass --shuffle block if reading turns out too slow, or shuffle the images before packing them"
        )
        return None
    if far is not None:
        opened.say_once(f"--shuffle auto: block, since {where}: it is read in long runs, mixed in memory; --shuffle full mixes better")
    elif not is_mixed:
        opened.say_once(f"--shuffle block: the shards are sorted by label: a batch has {in_blocks:.0f} labels, with --shuffle full {in_full:.0f}")
    return blocks


def method_settings(config: TrainConfig) -> dict[str, Any]:
    """--set fields, and the options that stand for one. Raises UsageError for a field that is given twice."""
    settings = dict(config.settings)
    for option, name in _METHOD_OPTIONS.items():
        value = getattr(config, option)
        if value is not None:
            if name in settings:
                raise UsageError(f"--set {name}={settings[name]} and --{option.replace('_', '-')} {value} are the same field; give one of them")
            settings[name] = value
    return settings


def _choose_shards(cache: Cache, limit: int | None) -> list[str]:
    """The shards to train on, in name order. Raises MissingError for a cache that is not finished, unless a limit leaves that out."""
    shards, wanted = cache.shards, cache.all_shards
    if not shards:
        raise MissingError(
            f"{cache.store.url}: the cache is empty: no shard of {len(wanted)} is done; run 'kdcache extract' again with the same arguments"
            f" to fill it"
        )
    if limit is not None:
        if limit > len(shards):
            raise UsageError(f"--limit-shards {limit}: the cache has {counted(len(shards), 'shard')}; expected at most that")
        return shards[:limit]
    if len(shards) < len(wanted):
        first = next(shard for shard in wanted if shard not in set(shards))
        raise MissingError(
            f"{cache.store.url}: {len(shards)} of {len(wanted)} shards are done, {first!r} is not; run 'kdcache extract' again with the same"
            f" arguments to finish the cache, or train on what is there with --limit-shards {len(shards)}"
        )
    return shards


def _choose_views(cache: Cache, targets: Mapping[str, Sequence[str]], shards: Sequence[str], wanted: int | None) -> int:
    """How many views to train on: as many as there are of everything, or as asked. Raises MissingError for more than there are."""
    usable = (
        min(usable_views(cache, teacher, names, shards) for teacher, names in targets.items()) if targets else usable_views(cache, None, (), shards)
    )
    if wanted is None:
        return usable
    if wanted > usable:
        raise MissingError(
            f"--views {wanted}: the cache has {counted(usable, 'view')} of all that is trained on; expected at most that, or run 'kdcache extract' again with"
            f" --views {wanted} to add them"
        )
    return wanted


def _num_classes(config: TrainConfig, cache: Cache, targets: Mapping[str, Sequence[str]], settings: MethodSettings) -> int:
    """The student's classes: the teacher's if its logits are matched, else what was asked for, else the largest label + 1."""
    teacher = next(iter(teachers_of_logits(config.method, settings, targets)), None)
    if teacher is not None:
        of_teacher = cache.layer(teacher).document.identity.num_classes
        if config.num_classes not in (None, of_teacher):
            raise UsageError(
                f"--num-classes {config.num_classes}: teacher {teacher!r} has {counted(of_teacher, 'class')} and method {config.method!r} matches its logits;"
                f" leave the option out"
            )
        return of_teacher
    if config.num_classes is not None:
        return config.num_classes
    largest = int(cache.rows.label.max())
    if largest == NO_LABEL:
        raise UsageError(f"{cache.store.url}: its images have no labels, so the number of classes is not known; pass --num-classes")
    return largest + 1


def check_labels(data: TrainingData, config: TrainConfig) -> None:
    """Raise ShardError naming the first row whose label the student can't be trained on."""
    rows = data.cache.rows
    labels = rows.label[data.row_numbers]
    bad = np.nonzero((labels < 0) | (labels >= data.num_classes))[0]
    if len(bad) == 0:
        return
    number = data.row_numbers[bad[0]]
    shard = rows.shards[rows.shard[number]]
    where = f"shard {shard}: key {data.cache.keys(shard)[rows.row[number]]!r}"
    is_needed = not data.targets or method_class(config.method).needs_labels
    without_labels = "choose a method that needs none, such as kd, with --task-loss-weight 0" if is_needed else "pass --task-loss-weight 0"
    if labels[bad[0]] == NO_LABEL:
        without = int((labels == NO_LABEL).sum())
        remedy = f"{without_labels} to train without labels"
        raise ShardError(
            f"{where} has no label ({without} of {len(labels)} rows have none), and method {config.method!r} learns from labels; {remedy}"
        )
    raise ShardError(
        f"{where} has label {labels[bad[0]]}, the student has {counted(data.num_classes, 'class')} (0 to {data.num_classes - 1});"
        + (
            f" the teacher's classes are not the dataset's: {without_labels}"
            if teachers_of_logits(config.method, data.settings, data.targets)
            else " pass a larger --num-classes"
        )
    )
