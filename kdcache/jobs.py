"""One shard's work in stage one: what it lacks, then rendering blocks in, committed segments out.

A job renders the views that are wanted, writes those the views layer lacks, and runs the teacher segment by segment: batches
never cross a segment, so that a resumed run makes the same batches and hence the same bytes. The order of commit is views
first, then targets, each record last.

A device that works ahead is given a batch before the host waits for the results of the one before, so that it never stands still for the host's share of a
batch: cutting, pinning, launching, taking in. Elsewhere a batch is collected as soon as it is launched. The sums and the bytes are the same.

Legend: B batch, n rows of a block, V views of a block.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .augment import Q16
from .commit import ChunkPool, GroupWriter, create_document, publish_group, unpublish_group
from .device import HostCopies, fitting_threads, moved, pinned, works_ahead
from .encodings import Encoding
from .errors import DriftError, TeacherError
from .fidelity import Fidelity, Terms, combine_fidelity
from .format import Digest, Document, Group, Skipped, TargetIdentity, TargetsIdentity, ViewRange, ViewsIdentity, digest_of_pixels
from .layout import key_bytes_spec, keys_to_arrays, row_spec, target_specs
from .paths import name_on_disk, targets_record_path, targets_segment_id, views_record_path, views_segment_id
from .plan import ViewPlan, blake2b_128
from .rendering import Neighbours, RenderedBlock, RenderTask
from .shards import Sample, ShardIndex, digest_of_images
from .store import Store
from .storing import ViewsWriter
from .teacher import Teacher, TeacherTarget
from .view_params import PARAM_FIELDS

_MIX_MODE, _MIX_PARTNER, _MIX_LAMBDA = (PARAM_FIELDS.index(name) for name in ("mix_mode", "mix_partner", "mix_lambda"))


@dataclass(frozen=True, kw_only=True)
class RecordedTarget:
    """A target that this run records: what the teacher gives and how it is stored."""

    target: TeacherTarget
    card: Document[TargetIdentity]
    encoding: Encoding
    calibration: Mapping[str, Tensor] | None
    """Channel statistics of a feature target, None for logits."""


@dataclass(frozen=True, kw_only=True)
class Missing:
    """What a shard lacks: ranges of the views layer, and (targets, views) of the teacher's."""

    views: tuple[ViewRange, ...]
    segments: tuple[tuple[tuple[str, ...], ViewRange], ...]

    def __bool__(self) -> bool:
        return bool(self.views or self.segments)

    @property
    def all_views(self) -> tuple[int, ...]:
        """Every view that must be rendered, in order."""
        ranges = [*self.views, *(views for _, views in self.segments)]
        return tuple(sorted({view for views in ranges for view in views.numbers}))


def find_missing(
    have_views: Sequence[ViewRange], have_targets: Mapping[str, Sequence[ViewRange]], *, want_views: int, want_targets: Mapping[str, int]
) -> Missing:
    """Compare what a shard has with what is wanted: views [0, want_views), and each target in its first views.

    Consecutive views that lack the same targets make one segment, so one forward pass serves them all.
    """
    views = _runs([None if any(view in have for have in have_views) else () for view in range(want_views)])
    lacking: list[tuple[str, ...] | None] = []
    for view in range(max(want_targets.values(), default=0)):
        names = tuple(
            sorted(name for name, count in want_targets.items() if view < count and not any(view in have for have in have_targets.get(name, ())))
        )
        lacking.append(names or None)
    return Missing(views=tuple(run for _, run in views), segments=tuple(_runs(lacking)))


def _runs(marks: Sequence[tuple[str, ...] | None]) -> list[tuple[tuple[str, ...], ViewRange]]:
    """Maximal runs of equal marks that are not None."""
    runs: list[tuple[tuple[str, ...], ViewRange]] = []
    for view, mark in enumerate(marks):
        if mark is None:
            continue
        if runs and runs[-1][0] == mark and runs[-1][1].stop == view:
            runs[-1] = (mark, ViewRange(start=runs[-1][1].start, stop=view + 1))
        else:
            runs.append((mark, ViewRange(start=view, stop=view + 1)))
    return runs


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    """A batch that a device was given, and its results on their way to the host."""

    values: Mapping[str, Mapping[str, Tensor]]
    """On the device, for the error that names a view whose values are not finite."""
    terms: Mapping[str, Terms]
    copies: HostCopies
    """TARGET/COMPONENT of what is stored; TARGET: the numbers of its terms; `predicted`: classes, of a batch with logits."""
    labels: list[int]
    """-1 where unknown, and of a mixed view, which has two."""
    keys: list[tuple[str, int]]


class TargetSegment:
    """Targets × a range of views of one shard: batches views, runs the teacher, encodes, measures, writes."""

    def __init__(
        self, folder: Path, targets: Sequence[RecordedTarget], views: ViewRange, index: ShardIndex, *, pool: ChunkPool, batch_size: int
    ) -> None:
        self.targets, self.views = targets, views
        self._index, self._batch_size = index, batch_size
        cards = {recorded.target.name: recorded.card.identity for recorded in targets}
        self.folder = folder
        self.writer = GroupWriter(folder, target_specs(cards, len(views), len(index.samples)), pool, num_views=len(views))
        self.fidelity = {recorded.target.name: Fidelity(recorded.calibration, recorded.encoding.bands) for recorded in targets}
        self.correct = self.labelled = 0
        self._pixels: list[Tensor] = []
        self._labels: list[int] = []
        self._mixed: list[bool] = []
        self._keys: list[tuple[str, int]] = []
        self._launched: _Batch | None = None
        """Not collected yet; None between batches of a device that does not work ahead."""

    def add(
        self,
        pixels: Tensor,
        labels: np.ndarray[Any, np.dtype[np.int64]],
        keys: Sequence[str],
        teacher: Teacher,
        *,
        mixed: np.ndarray[Any, np.dtype[np.bool_]],
    ) -> None:
        """Queue rows: pixels uint8 (n, views, S, S, 3), labels and mixed (n, views), one key a row; full batches go to the teacher."""
        self._pixels.append(pixels.flatten(0, 1))
        self._labels += labels.ravel().tolist()
        self._mixed += mixed.ravel().tolist()
        self._keys += [(key, view) for key in keys for view in self.views.numbers]
        while len(self._labels) >= self._batch_size:
            self._run_batch(teacher, self._batch_size)

    def finish(self, teacher: Teacher) -> None:
        """Run the last, partial batch, and collect what is still on its way."""
        if self._labels:
            self._run_batch(teacher, len(self._labels))
        if self._launched is not None:
            last, self._launched = self._launched, None
            self._collect(last)
        self.writer.finish()

    def abandon(self) -> None:
        """Drop the batch that is on its way, and close the files."""
        self._launched = None
        self.writer.abandon()

    def _run_batch(self, teacher: Teacher, size: int) -> None:
        """Launch the next batch; collect the one before, or this one where the device does not work ahead."""
        batch: _Batch | None = self._launch(teacher, size)
        if works_ahead(teacher.device):
            batch, self._launched = self._launched, batch
        if batch is not None:
            self._collect(batch)

    def _launch(self, teacher: Teacher, size: int) -> _Batch:
        """Give the device the next `size` views. Nothing in here may let the host wait for it, but for constants that are moved there once."""
        queued = torch.cat(self._pixels) if len(self._pixels) > 1 else self._pixels[0]
        views, self._pixels = pinned(queued[:size], teacher.device), [queued[size:]] if len(queued) > size else []
        labels, self._labels = self._labels[:size], self._labels[size:]
        mixed, self._mixed = self._mixed[:size], self._mixed[size:]
        keys, self._keys = self._keys[:size], self._keys[size:]
        values = teacher(views, [recorded.target for recorded in self.targets])
        labels_B = moved(pinned(torch.tensor(labels, dtype=torch.int64), teacher.device), teacher.device)
        terms: dict[str, Terms] = {}
        results: dict[str, Tensor] = {}
        with torch.inference_mode(), fitting_threads(teacher.model, teacher.device):
            for recorded in self.targets:
                name = recorded.target.name
                encoded = recorded.encoding.encode(values[name], labels_B)
                terms[name] = self.fidelity[name].measure(values[name], recorded.encoding.decode(encoded))
                results[name] = terms[name].numbers
                results |= {f"{name}/{component}": tensor for component, tensor in encoded.items()}
        if "logits" in values:
            results["predicted"] = values["logits"]["logits"].argmax(dim=1)
        return _Batch(
            values=values,
            terms=terms,
            copies=HostCopies(results, teacher.device),
            labels=[label if not is_mixed else -1 for label, is_mixed in zip(labels, mixed, strict=True)],
            keys=keys,
        )

    def _collect(self, batch: _Batch) -> None:
        """Wait for a batch's results, add them up and hand them to the writer."""
        results = batch.copies.wait()
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        for recorded in self.targets:
            name = recorded.target.name
            if not self.fidelity[name].add(batch.terms[name], results[name]):
                raise self._not_finite(name, batch.values[name], batch.keys)
            for component, description in recorded.card.identity.components.items():
                arrays[f"{name}/{component}"] = results[f"{name}/{component}"].numpy().view(description.dtype)
        if "predicted" in results:
            self.correct += sum(label == guess for label, guess in zip(batch.labels, results["predicted"].tolist(), strict=True))
            self.labelled += sum(label >= 0 for label in batch.labels)
        self.writer.append(arrays)

    def _not_finite(self, name: str, value: Mapping[str, Tensor], keys: Sequence[tuple[str, int]]) -> TeacherError:
        bad = torch.stack([~tokens.flatten(1).isfinite().all(dim=1) for tokens in value.values()]).any(dim=0).nonzero()
        key, view = keys[int(bad[0])] if len(bad) else keys[0]
        return TeacherError(
            f"shard {self._index.source.name}: key {key!r}, view {view}: the teacher gave values for {name!r} that are not finite;"
            f" nothing of this shard was kept; try --precision bf16 or fp32"
        )

    def measured(self) -> dict[str, Any]:
        """For the record: fidelity by target with its sums, and the teacher's accuracy on those of these views that are not mixed."""
        body: dict[str, Any] = {
            "fidelity": {name: {**combine_fidelity([fidelity.sums]), "sums": fidelity.sums} for name, fidelity in self.fidelity.items()}
        }
        if any(recorded.target.kind == "logits" for recorded in self.targets):
            body["accuracy"] = {"correct": self.correct, "labelled": self.labelled}
        return body


@dataclass
class JobResult:
    """What a finished job added."""

    size_bytes: int
    """Of groups that this job published."""
    documents: dict[str, Document[Any]]
    """Path → record, made by it or by who was faster."""
    table: np.ndarray[Any, Any]
    """int64 (samples, 4), as `kdcache.index.TABLE_COLUMNS`."""


@dataclass
class ShardJob:
    """One shard being done. `add` takes its blocks in order; `finish`, then `commit`, end it; `abandon` drops it."""

    index: ShardIndex
    missing: Missing
    targets: Mapping[str, RecordedTarget]
    plan: ViewPlan
    store: Store
    pool: ChunkPool
    batch_size: int
    known: ViewsIdentity | None
    """The shard's first views record, if it has one: its skipped samples have no row here either."""
    known_digests: Mapping[int, np.ndarray[Any, np.dtype[np.uint64]]]
    """View → stored pixel digests, of views that the cache holds and this job renders again or reads."""
    stored: frozenset[int] = frozenset()
    """Those of `known_digests` that are read from the cache; if every view is, the tar is not opened."""
    label: str = ""
    """Shown to other ranks while this job is alive."""
    spool: Path = field(init=False)
    segments: list[TargetSegment] = field(init=False)
    teacher_seconds: float = 0.0
    rows: int = 0

    @property
    def rendered_views(self) -> tuple[int, ...]:
        """What is missing, and what is compared."""
        return tuple(sorted({*self.missing.all_views, *self.known_digests}))

    def __post_init__(self) -> None:
        self.spool = self.store.new_spool(self.label)
        self._kept: list[int] = []
        self._skipped: list[Skipped] = []
        self._details: dict[str, str] = {}
        self._digests: list[np.ndarray[Any, np.dtype[np.uint64]]] = []
        self._image_crcs: list[np.ndarray[Any, np.dtype[np.uint32]]] = []
        samples = len(self.index.samples)
        self._views_writers = [ViewsWriter(self.spool / f"views-{views.start}", self.plan, views, samples, self.pool) for views in self.missing.views]
        self.segments = [
            TargetSegment(
                self.spool / f"targets-{number}",
                [self.targets[name] for name in names],
                views,
                self.index,
                pool=self.pool,
                batch_size=self.batch_size,
            )
            for number, (names, views) in enumerate(self.missing.segments)
        ]

    def tasks(self, job: int, samples_per_task: int) -> list[RenderTask]:
        """The shard's samples that may have rows, cut into render tasks; the last one ends the job, even if it is empty."""
        skipped = {skip.index for skip in self.known.skipped} if self.known is not None else set()
        usable = [(i, sample) for i, sample in enumerate(self.index.samples) if sample.problem is None and i not in skipped]
        starts = range(0, max(1, len(usable)), samples_per_task)
        neighbours = Neighbours.of(self.index, skipped) if self.plan.policy.mix is not None else None
        tasks: list[RenderTask] = []
        for start in starts:
            samples = tuple(usable[start : start + samples_per_task])
            rows = tuple(range(start, start + len(samples))) if self.stored else ()  # of a known shard, every usable sample has a row
            tasks.append(RenderTask(job, self.index.source, samples, self.rendered_views, start == starts[-1], self.stored, rows, neighbours))
        return tasks

    def add(self, block: RenderedBlock, teacher: Teacher | None) -> None:
        """Take the next block: write its views, compare those that are known, give the rest to the teacher."""
        samples = block.task.samples
        for place, reason in block.reasons.items():
            position, sample = samples[place]
            if self.known is not None:
                raise DriftError(
                    f"shard {self.index.source.name}: key {sample.key!r}: can't be decoded now ({reason}), it could when the cache was made;"
                    f" install the recorded versions, or make a new cache"
                )
            self._skipped.append(Skipped(key=sample.key, index=position, reason=reason.reason))
            self._details[sample.key] = reason.detail
        rows = [samples[place] for place in block.kept]
        columns = {view: column for column, view in enumerate(block.task.views)}
        self._compare_known(block, rows, columns)
        for views, writer in zip(self.missing.views, self._views_writers, strict=True):
            writer.append_block(block, [columns[view] for view in views.numbers])
        self._digests.append(block.digests)
        self._image_crcs.append(block.image_crcs)
        self._kept += [position for position, _ in rows]
        self.rows += len(rows)
        if rows and teacher is not None:
            begin = time.perf_counter()
            keys, labels, mixed = [sample.key for _, sample in rows], self._labels(block, rows), block.params[:, :, _MIX_MODE] != 0
            for segment in self.segments:
                first = columns[segment.views.start]
                chosen = slice(first, first + len(segment.views))
                segment.add(block.pixels[:, chosen], labels[:, chosen], keys, teacher, mixed=mixed[:, chosen])
            self.teacher_seconds += time.perf_counter() - begin

    def _labels(self, block: RenderedBlock, rows: Sequence[tuple[int, Sample]]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """(n, V): the label of each view, of a mixed one that with the greater weight: a method that looks for the likeliest finds that one."""
        own = np.array([sample.label for _, sample in rows], np.int64)[:, None]
        mode, partner, weight = (block.params[:, :, field] for field in (_MIX_MODE, _MIX_PARTNER, _MIX_LAMBDA))
        is_partners = (mode != 0) & (2 * weight.astype(np.int64) < Q16)
        partners = np.array([sample.label for sample in self.index.samples], np.int64)[np.where(is_partners, partner, 0)]
        return np.where(is_partners, partners, own)

    def _compare_known(self, block: RenderedBlock, rows: Sequence[tuple[int, Any]], columns: Mapping[int, int]) -> None:
        for view, digests in self.known_digests.items():
            found = block.digests[:, columns[view]]
            wrong = np.nonzero(found != digests[self.rows : self.rows + len(found)])[0]
            if len(wrong):
                key = rows[int(wrong[0])][1].key
                raise DriftError(
                    f"shard {self.index.source.name}: key {key!r}, view {view}: the pixels differ from those in the cache; the image or the"
                    f" decoder is not the one it was made with: run 'kdcache verify CACHE --views all' and install the recorded versions"
                )

    def finish(self, teacher: Teacher | None) -> None:
        """All blocks are in: run the last batches and hand the last chunks over. On the thread that adds."""
        begin = time.perf_counter()
        for segment in self.segments:
            if teacher is not None:
                segment.finish(teacher)
        for writer in self._views_writers:
            writer.finish()
        self.teacher_seconds += time.perf_counter() - begin

    def commit(self, *, teacher_name: str | None, teacher_digest: Digest | None, provenance: Mapping[str, Any]) -> JobResult:
        """Publish the groups and create the records, views first. On any thread; removes the spool."""
        documents: dict[str, Document[Any]] = {}
        size_bytes = 0
        pixels = self._pixels_by_view()
        for views, writer in zip(self.missing.views, self._views_writers, strict=True):
            path, document, size = self._commit_views(views, writer, pixels, provenance)
            documents[path] = document
            size_bytes += size
        for segment in self.segments:
            assert teacher_name is not None and teacher_digest is not None
            path, targets_document, size = self._commit_targets(segment, pixels, teacher_name, teacher_digest, provenance)
            documents[path] = targets_document
            size_bytes += size
        self.store.drop_spool(self.spool)
        return JobResult(size_bytes, documents, self._table())

    def _pixels_by_view(self) -> dict[int, Digest]:
        digests = np.concatenate(self._digests) if self._digests else np.zeros((0, len(self.rendered_views)), np.uint64)
        return {view: blake2b_128(np.ascontiguousarray(digests[:, column], dtype="<u8").tobytes()) for column, view in enumerate(self.rendered_views)}

    def _table(self) -> np.ndarray[Any, Any]:
        """int64 (samples, 4), as `kdcache.index.TABLE_COLUMNS`."""
        table = np.zeros((len(self.index.samples), 4), np.int64)
        table[:] = (0, 0, -1, 1)
        for position in self._kept:
            sample = self.index.samples[position]
            table[position] = (sample.image_offset, sample.image_size, sample.label, 0)
        return table

    def _commit_views(
        self, views: ViewRange, writer: GroupWriter, pixels: Mapping[int, Digest], provenance: Mapping[str, Any]
    ) -> tuple[str, Document[ViewsIdentity], int]:
        self._add_rows(writer)
        files = writer.close()
        shard = self.index.source.name
        stem = f"{name_on_disk(shard)}.{views_segment_id(views)}"
        group = publish_group(self.store, self.spool / f"views-{views.start}", files, layer="views", stem=stem)
        identity = ViewsIdentity(
            shard=shard,
            views=views,
            plan=self.plan.fingerprint,
            member_table=self.index.member_table,
            samples=len(self.index.samples),
            rows=self.rows,
            skipped=self._all_skipped(),
            cut=self.index.cut,
            pixels_by_view=tuple(pixels[view] for view in views.numbers),
            group=group,
        )
        path = views_record_path(shard, views)
        source = {
            "path": self.index.source.path,
            "size": self.index.size,
            "mtime_ns": self.index.mtime_ns,
            "images": digest_of_images(self._image_crcs),
        }
        document, created = create_document(
            self.store,
            path,
            identity,
            measured={"skip_details": self._details},
            provenance={**provenance, "source": source},
            packages=self.plan.packages,
        )
        self._settle(document.identity.group, group, created, layer="views")
        if (document.identity.rows, document.identity.pixels_by_view) != (identity.rows, identity.pixels_by_view):
            remedy = "run the command again to go on with the views that are stored, or " if self.plan.stored_views is not None else ""
            raise DriftError(
                f"shard {shard}: another run has just recorded other views for it; both must decode and encode alike: {remedy}compare the versions"
                f" of {', '.join(self.plan.packages)}"
            )
        return path, document, document.identity.group.size_of() if created else 0

    def _add_rows(self, writer: GroupWriter) -> None:
        """The arrays of one number a row, and the keys."""
        rows = [self.index.samples[position] for position in self._kept]
        data, ends = keys_to_arrays([sample.key for sample in rows])
        writer.add_array(key_bytes_spec(len(data)), data)
        columns = {
            "keys/ends": ends,
            "labels": [sample.label for sample in rows],
            "image/offset": [sample.image_offset for sample in rows],
            "image/size": [sample.image_size for sample in rows],
        }
        for name, values in columns.items():
            writer.add_array(row_spec(name, len(self.index.samples)), np.asarray(values, np.int64))

    def _all_skipped(self) -> tuple[Skipped, ...]:
        """Samples without a row, in tar order: those of before if the shard is known, else what headers and decoder refused."""
        if self.known is not None:
            return self.known.skipped
        problems = [
            Skipped(key=sample.key, index=position, reason=sample.problem)
            for position, sample in enumerate(self.index.samples)
            if sample.problem is not None
        ]
        return tuple(sorted([*self._skipped, *problems], key=lambda skip: skip.index))

    def _commit_targets(
        self, segment: TargetSegment, pixels: Mapping[int, Digest], teacher_name: str, teacher_digest: Digest, provenance: Mapping[str, Any]
    ) -> tuple[str, Document[TargetsIdentity], int]:
        shard, views = self.index.source.name, segment.views
        cards = {recorded.target.name: recorded.card.identity_digest for recorded in segment.targets}
        layer = f"teachers/{teacher_name}"
        stem = f"{name_on_disk(shard)}.{targets_segment_id(cards, views)}"
        group = publish_group(self.store, segment.folder, segment.writer.close(), layer=layer, stem=stem)
        identity = TargetsIdentity(
            shard=shard,
            views=views,
            targets=cards,
            teacher=teacher_digest,
            member_table=self.index.member_table,
            samples=len(self.index.samples),
            rows=self.rows,
            pixels=digest_of_pixels({view: pixels[view] for view in views.numbers}),
            group=group,
        )
        path = targets_record_path(teacher_name, shard, cards, views)
        document, created = create_document(self.store, path, identity, measured=segment.measured(), provenance=provenance)
        self._settle(document.identity.group, group, created, layer=layer)
        return path, document, document.identity.group.size_of() if created else 0

    def _settle(self, recorded: Group, ours: Group, created: bool, *, layer: str) -> None:
        """The loser of a race for a record removes its own group and goes on with the winner's."""
        if not created and recorded != ours:
            unpublish_group(self.store, ours, layer=layer)

    def abandon(self) -> None:
        """Drop everything of this job that is not committed."""
        for writer in self._views_writers:
            writer.abandon()
        for segment in self.segments:
            segment.abandon()
        self.store.drop_spool(self.spool)
