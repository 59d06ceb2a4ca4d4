"""Teachers run again on some rows of each shard, against the targets that the cache holds: *teacher drift*. The part of verify that loads a teacher.

For each view the decoded target may be as far from what the teacher gives now as its encoding loses on that very value, which is measured by
encoding it again, plus a tolerance for what precision, device and batch size change in a forward pass. That is sharper than the
shard's mean fidelity in its record, and needs no assumption on how errors spread over rows.

Legend: B views of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kdcache.augment import Q16
from kdcache.cache import Cache, TeacherLayer
from kdcache.console import ProgressBar, counted
from kdcache.device import resolve_device
from kdcache.errors import CacheError, DriftError, KDCacheError, MismatchError, ShardError
from kdcache.index import rows_of_table
from kdcache.join import to_device
from kdcache.plan import require_same
from kdcache.targets import TargetSpec
from kdcache.teacher import Teacher, TeacherTarget, load_teacher

from ..facts import views_of
from .replay import chosen_views
from .request import Recompute
from .verdict import Problem, Verdict

if TYPE_CHECKING:
    from kdcache.encodings import Encoding

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}
"""Relative L2 of a view's target that another batch size, thread count or library version may cost, by the precision of the forward pass."""
OTHER_DEVICE_TOLERANCE = 5e-3
"""The least that is allowed between two kinds of device: GPUs multiply float32 in TF32 by default in convolutions (10 bits of mantissa)."""


@dataclass
class _Found:
    """What was seen of one target of one shard."""

    worst: float = 0.0
    allowed: float = 0.0
    """Of the worst view."""
    differing: int = 0
    seen: int = 0
    key: str = ""
    view: int = 0


def recompute_targets(cache: Cache, how: Recompute, verdict: Verdict, *, progress: bool) -> None:
    """Run each teacher, or the one named, on `how.rows` views of rows of every shard. Raises UsageError for a teacher that is not there."""
    is_one = how.teacher is not None or how.model is not None or how.checkpoint is not None
    names = [cache.layer(how.teacher).name] if is_one else sorted(cache.teachers)
    for name in names:
        layer = cache.teachers[name]
        try:
            teacher = load_recorded_teacher(layer, model=how.model, checkpoint=how.checkpoint, device=how.device)
        except MismatchError as error:
            verdict.problems.append(Problem("teacher", "", "", f"teacher drift: {error}"))
            continue
        except KDCacheError as error:
            detail = f"teacher {name!r} can't be run again: {error}; pass --model or --checkpoint where it lies now"
            verdict.problems.append(Problem("teacher", "", "", detail))
            continue
        _Recomputation(cache, layer, teacher, how, verdict).run(progress=progress)


def load_recorded_teacher(layer: TeacherLayer, *, model: str | None = None, checkpoint: str | None = None, device: str | None = None) -> Teacher:
    """The teacher of a layer, from where it was recorded or is said to lie now.

    Raises MismatchError if it is another one (its weights, say), TeacherError if it can't be had.
    """
    provenance = layer.document.provenance
    source = model or str(provenance.get("source", layer.document.identity.model))
    file = checkpoint or (provenance.get("checkpoint") if model is None else None)
    teacher = load_teacher(
        source,
        checkpoint=Path(file) if file else None,
        model_args=provenance.get("model_args", {}),
        precision=layer.document.identity.precision,
        device=resolve_device(device),
    )
    where = f"{source}{f' with {file}' if file else ''}"
    require_same(
        f"teacher {layer.name!r}", layer.document.identity, teacher.identity, remedy=f"{where} is not the model that the cache was made with"
    )
    return teacher


def targets_of_layer(teacher: Teacher, layer: TeacherLayer, names: Sequence[str]) -> dict[str, TeacherTarget]:
    """Each recorded target against the model. Raises TeacherError."""
    specs = {}
    for name in names:
        card = layer.targets[name].identity
        specs[name] = TargetSpec(kind=card.kind, node=card.node, encoding=card.encoding)
    resolved = teacher.resolve(list(specs.values()))
    return {name: resolved[spec] for name, spec in specs.items()}


class _Recomputation:
    """One teacher over all shards."""

    def __init__(self, cache: Cache, layer: TeacherLayer, teacher: Teacher, how: Recompute, verdict: Verdict) -> None:
        self.cache, self.layer, self.teacher, self.how, self.verdict = cache, layer, teacher, how, verdict
        self.targets = targets_of_layer(teacher, layer, sorted(layer.targets))
        self.encodings: dict[str, Encoding] = {}
        self._worst: dict[str, _Found] = {}
        for name in self.targets:
            try:
                self.encodings[name] = cache.encoding(layer.name, name)
            except CacheError:  # its calibration is damaged, and reported as such
                continue

    def run(self, *, progress: bool) -> None:
        shards = [shard for shard in self.cache.shards if self.layer.records.get(shard)]
        before = len(self.verdict.problems)
        with ProgressBar(total=len(shards) * self.how.rows, unit="view", desc=f"verify {self.layer.name}", disable=not progress) as bar:
            for shard in shards:
                self._shard(shard)
                bar.update(self.how.rows)
        if len(self.verdict.problems) == before and shards:
            limits = ", ".join(f"{name} {found.worst:.2g} of {found.allowed:.2g}" for name, found in sorted(self._worst.items()))
            self.verdict.notes.append(f"teacher {self.layer.name}: outputs as recorded; farthest view, relative L2 of what is allowed: {limits}")

    def _shard(self, shard: str) -> None:
        views = views_of(self.layer.records[shard])
        try:
            keys = self.cache.keys(shard)
        except CacheError:  # damaged or missing views: reported
            return
        found: dict[str, _Found] = {}
        chosen = chosen_views(self.cache, shard, self.how.rows, len(keys), views, salt=f"recompute {self.layer.name}")
        for start in range(0, len(chosen), self.how.batch_size):
            batch = [(row, view, keys[row], pixels) for row, view, pixels in self._pixels(shard, keys, chosen[start : start + self.how.batch_size])]
            if batch:
                self._compare(shard, batch, found)
        for name, one in found.items():
            if one.differing:
                detail = (
                    f"teacher drift: teacher {self.layer.name!r}, {name!r}: {one.differing} of {one.seen} views differ though its weights are those of"
                    f" then; view {one.view} is off by {one.worst:.2g} (relative L2), allowed are {one.allowed:.2g}: {self._words()};"
                    f" {_libraries(self.layer, shard)}"
                )
                self.verdict.problems.append(Problem("teacher", shard, one.key, detail))
            if name not in self._worst or one.worst > self._worst[name].worst:
                self._worst[name] = one

    def _pixels(self, shard: str, keys: Sequence[str], chosen: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, np.ndarray[Any, Any]]]:
        """(row, view, uint8 view) of those whose pixels are what the teacher saw; of the others a teacher can't be judged."""
        lost: list[str] = []
        for row, view in chosen:
            try:
                yield row, view, self.cache.view(shard, keys[row], view)
            except (DriftError, ShardError, CacheError) as error:
                lost.append(str(error))
        if lost:
            is_gone = any("can't be read" in text for text in lost)
            detail = f"{counted(len(lost), 'view')} can't be shown to the teacher again: {lost[0]}"
            if not any(problem.shard == shard and problem.kind in ("pixels", "source", "corrupt", "missing") for problem in self.verdict.problems):
                self.verdict.problems.append(Problem("source" if is_gone else "pixels", shard, "", detail))

    def _compare(self, shard: str, batch: Sequence[tuple[int, int, str, np.ndarray[Any, Any]]], found: dict[str, _Found]) -> None:
        values = self.teacher(torch.from_numpy(np.stack([pixels for *_, pixels in batch])), list(self.targets.values()))
        self.verdict.rows_recomputed += len(batch)
        labels = rows_of_table(self.cache.table_from_group(self.cache.views[shard][0].identity))[:, 2]
        labels_B = torch.tensor([self._label(shard, labels, row, view) for row, view, _, _ in batch], dtype=torch.int64, device=self.teacher.device)
        for name, encoding in self.encodings.items():
            now = values[name]
            with torch.inference_mode():
                again = {part: tensor.cpu() for part, tensor in encoding.decode(encoding.encode(now, labels_B)).items()}
            now = {part: tensor.float().cpu() for part, tensor in now.items()}
            for place, (row, view, key, _) in enumerate(batch):
                stored = self._decoded(encoding, name, shard, view, row)
                if stored is None:
                    continue
                off = _relative(stored, now, place)
                allowed = _relative({part: tensor[place : place + 1] for part, tensor in again.items()}, now, place) + self._tolerance(
                    shard, view, name
                )
                one = found.setdefault(name, _Found())
                one.seen += 1
                one.differing += not off <= allowed
                if not off - allowed <= one.worst - one.allowed or one.seen == 1:
                    one.worst, one.allowed, one.key, one.view = off, allowed, key, view

    def _decoded(self, encoding: Encoding, name: str, shard: str, view: int, row: int) -> dict[str, Tensor] | None:
        """The stored target, or None where there is none or it is damaged, which is told elsewhere."""
        try:
            components = self.cache.read_components(self.layer.name, name, shard, view, [row])
        except CacheError:
            return None
        tensors = {part: torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array) for part, array in components.items()}
        encoding.check(tensors)
        with torch.inference_mode():
            return {part: tensor.float().cpu() for part, tensor in encoding.decode(to_device(tensors, self.teacher.device)).items()}

    def _label(self, shard: str, labels: np.ndarray[Any, Any], row: int, view: int) -> int:
        """The label that encodings were given: of a mixed view that with the greater weight. labels: of the shard's rows."""
        (params,) = self.cache.read_params(shard, view, [row])
        if params.mix is not None and 2 * params.mix.lambda_q16 < Q16:
            row = self.cache.row_at(shard, params.mix.partner)
        return int(labels[row])

    def _tolerance(self, shard: str, view: int, name: str) -> float:
        tolerance = TOLERANCE[self.teacher.identity.precision]
        then = next((r.provenance.get("device", "") for r in self.layer.segments(shard, name) if view in r.identity.views), "")
        return tolerance if str(then).split(":")[0] == self.teacher.device.type else max(tolerance, OTHER_DEVICE_TOLERANCE)

    def _words(self) -> str:
        precision = self.teacher.identity.precision
        return (
            f"what its encoding loses, and {TOLERANCE[precision]:g} for {precision} ({OTHER_DEVICE_TOLERANCE:g} at least on another kind of device)"
        )


def _relative(value: Mapping[str, Tensor], truth: Mapping[str, Tensor], place: int) -> float:
    """Relative L2 of a view's target, all its parts together. value: batch of one."""
    error_sq = norm_sq = 0.0
    for part, tensor in value.items():
        expected = truth[part][place].double()
        error_sq += float((tensor[0].double() - expected).square().sum())
        norm_sq += float(expected.square().sum())
    return float((error_sq / norm_sq) ** 0.5) if norm_sq > 0 else float(error_sq**0.5)


def _libraries(layer: TeacherLayer, shard: str) -> str:
    import timm

    packages = layer.records[shard][0].provenance.get("packages", {})
    return f"torch {packages.get('torch')}, timm {packages.get('timm')} then; torch {torch.__version__}, timm {timm.__version__} now"
