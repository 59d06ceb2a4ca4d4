"""Before hours are spent: the teacher on view 0 of the first samples. Gives channel statistics, its accuracy, and seconds a view.

Views are not mixed here: a mixed view has two labels, and channel statistics need no partner.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cache import Cache
from .console import counted
from .draws import draw
from .encodings import Calibrator, TargetShape
from .errors import ShardError
from .images import UnreadableImageError, decode_image, size_of
from .index import rows_of_table
from .plan import ViewPlan
from .shards import ShardFiles, ShardIndex, ShardSource
from .stored_views import as_stored
from .teacher import Teacher, TeacherTarget
from .views import render

CALIBRATION_VIEWS = 256
"""Over which channel statistics are taken: a lost calibration is made again of as many."""
ACCURACY_VIEWS = 64
"""For the teacher's accuracy alone."""
TAIL_VIEWS = 8
"""That a tail is tried on."""
MAX_BYTES = 512 << 20
"""Views held at once."""
SPREAD = 8
"""Shards that the views come from: scanning one costs up to half a second."""


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What the first views showed."""

    statistics: dict[str, dict[str, Tensor]]
    """Target name → its calibrator's result, for the targets that were asked for."""
    correct: int
    labelled: int
    """Views with a label of the teacher's classes; of these `correct` were classified right."""
    highest_label: int
    seconds_per_view: float


def first_views(
    plan: ViewPlan, sources: Sequence[ShardSource], scan: Callable[[ShardSource], ShardIndex], count: int, cache: Cache | None = None
) -> tuple[Tensor, list[int], list[str]]:
    """View 0 of up to `count` readable samples, the first of each of a few shards spread over the list; unmixed, unless a shard's tar is gone.

    Returns uint8 (n, S, S, 3), n labels, and the names of the shards. Spread, because shards are often sorted by class. A shard that can't be read is
    passed over: its turn comes. cache: where a view 0 that is stored is read from, so that its tar need not be there. A mixed view has no label
    here: it has two.
    Raises ShardError if no sample can be decoded, with the first shard's own error if it has one.
    """
    files = ShardFiles()
    count = max(1, min(count, MAX_BYTES // (3 * plan.size * plan.size)))
    num_shards = min(SPREAD, len(sources))
    quota = -(-count // num_shards)
    first_error: ShardError | None = None
    views: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    labels: list[int] = []
    chosen = [sources[i * len(sources) // num_shards] for i in range(num_shards)]
    for source in chosen:
        wanted = min(count, len(views) + quota)
        unmixed = plan.policy.mix is not None and os.path.exists(source.path)  # a lost calibration was made on these, and must come out the same
        stored = None if unmixed else _stored_views(cache, source.name, wanted - len(views))
        if stored is not None:
            views += stored[0]
            labels += stored[1]
            continue
        try:
            samples = [sample for sample in scan(source).samples if sample.problem is None]
        except ShardError as error:
            first_error = first_error or error
            continue
        for sample in samples:
            if len(views) == wanted:
                break
            try:
                image = decode_image(files.read(source, sample.key, sample.image_offset, sample.image_size), plan.decoder)
            except UnreadableImageError:
                continue
            except ShardError as error:
                first_error = first_error or error
                break
            views.append(as_stored(plan, render(image, draw(plan, source.name, sample.key, 0, size_of(image))))[0])
            labels.append(sample.label)
    if not views and first_error is not None:
        raise first_error
    if not views:
        raise ShardError(
            f"no sample of {num_shards} of {counted(len(sources), 'shard')} can be decoded; the first is {sources[0].path}; look at its images"
        )
    return torch.from_numpy(np.stack(views)), labels, [source.name for source in chosen]


def _stored_views(cache: Cache | None, shard: str, count: int) -> tuple[list[np.ndarray[Any, np.dtype[np.uint8]]], list[int]] | None:
    """View 0 of a shard's first rows and their labels, -1 for a mixed one; None where they are not stored."""
    records = cache.views.get(shard, []) if cache is not None and cache.plan.stored_views is not None else []
    if cache is None or not any(0 in record.identity.views for record in records):
        return None
    table = cache.table_from_group(records[0].identity)
    labels = rows_of_table(table)[:count, 2].tolist()
    rows = range(len(labels))
    labels = [label if params.mix is None else -1 for label, params in zip(labels, cache.read_params(shard, 0, rows), strict=True)]
    return list(cache.read_stored(shard, 0, rows)), labels


def run_preflight(
    teacher: Teacher,
    targets: Sequence[TeacherTarget],
    calibrators: Mapping[str, Calibrator],
    views_BHWC: Tensor,
    labels: Sequence[int],
    *,
    batch_size: int,
) -> Preflight:
    """Run the teacher over the views in batches. calibrators: target name → what gathers its statistics."""
    num_classes = teacher.identity.num_classes
    if teacher.has_logits and all(target.kind != "logits" for target in targets):  # for the accuracy
        targets = [*targets, TeacherTarget(name="logits", kind="logits", node=None, shape=TargetShape(num_classes=num_classes))]
    correct = labelled = 0
    seconds: list[float] = []
    for start in range(0, len(views_BHWC), batch_size):
        batch = views_BHWC[start : start + batch_size]
        begin = time.perf_counter()
        values = teacher(batch, targets)
        if "logits" in values:
            guesses = values["logits"]["logits"].argmax(dim=1).cpu().tolist()
            scored = [(label, guess) for label, guess in zip(labels[start : start + batch_size], guesses, strict=True) if 0 <= label < num_classes]
            labelled += len(scored)
            correct += sum(label == guess for label, guess in scored)
        for name, calibrator in calibrators.items():
            calibrator.update(values[name])
        seconds.append((time.perf_counter() - begin) / len(batch))
    return Preflight(
        statistics={name: calibrator.result() for name, calibrator in calibrators.items()},
        correct=correct,
        labelled=labelled,
        highest_label=max(labels),
        seconds_per_view=median(seconds),
    )
