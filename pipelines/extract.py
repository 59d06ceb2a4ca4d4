"""Stage one: shards → seeded views → teacher → encoded targets → cache. Read top to bottom: open, resolve, prepare, loop, index, report.

Workers decode and render, the device runs the teacher and encodes, a pool compresses and writes, and a thread commits; the
four overlap, and every queue between them is bounded in bytes. The unit of commit, retry and resume is a segment of a shard.

Several processes may run this at once, started by a launcher or by hand: each begins with shards of its own (`kdcache.launch`), goes
on with those that nobody is doing (`pipelines.extraction.turns`), and ends when every shard is done. They meet in the cache only.
What is asked for is read by `pipelines.extraction.request`; that there is nothing to do is found by `pipelines.extraction.finished`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache import Cache, TeacherLayer
from kdcache.commit import ChunkPool, create_document
from kdcache.console import ProgressBar, counted, human_bytes, human_seconds, say
from kdcache.errors import CacheError, KDCacheError, ShardError, TeacherError, UsageError
from kdcache.format import CacheIdentity, Document, SourceIdentity, TailIdentity, ViewsIdentity
from kdcache.images import require_decoder
from kdcache.index import drop_index, is_current, read_document, write_index
from kdcache.launch import Launch, default_workers, read_launch
from kdcache.opening import open_cache, open_to_write
from kdcache.paths import check_teacher_name, source_path, targets_record_path, views_record_path
from kdcache.plan import POLICIES, ViewPlan, require_same
from kdcache.shards import ShardIndex, ShardSource, check_same_tar, scan_shard
from kdcache.sources import default_dataset_id
from kdcache.store import Store, open_store
from kdcache.stored_source import index_of_stored
from kdcache.stored_views import estimated_bytes
from kdcache.targets import TargetSpec
from kdcache.teacher_card import ANY_TEACHER
from kdcache.teacher_source import default_teacher_name, weight_files

from .extraction.finished import count_complete, decodes_images, finished_already, is_unchanged
from .extraction.request import (
    ExtractConfig,
    ExtractSummary,
    check_given_plan,
    check_label_key,
    common_label_key,
    num_views,
    policy_of,
    requested_specs,
    requested_tail,
    resolve_sources,
)
from .extraction.turns import Turns

if TYPE_CHECKING:  # these import torch, which a finished run does without
    from torch import Tensor

    from kdcache.cards import TargetPlan
    from kdcache.jobs import JobResult, Missing, ShardJob
    from kdcache.preflight import Preflight
    from kdcache.rendering import RenderTask
    from kdcache.teacher import TeacherTarget

TYPICAL_EPOCHS = 100
"""Of one student's training online, for the break-even line."""
INDEX_ATTEMPTS = 20


def extract(config: ExtractConfig, *, progress: bool = False) -> ExtractSummary:
    """Run stage one. Raises KDCacheError; a problem of a single shard is reported in the summary and the others go on."""
    begin = time.perf_counter()
    requested_specs(config, ANY_TEACHER, None)  # raises UsageError before anything is read
    launch = read_launch()
    store = open_store(config.cache)
    all_sources = resolve_sources(config, store)
    sources = all_sources[: config.limit_shards]
    if store.size("cache.json") is not None:
        summary = finished_already(config, sources, all_sources)
        if summary is not None:
            summary.seconds = time.perf_counter() - begin
            _report(config, summary, launch)
            return summary
    with store.hold():  # from before the documents are read: `kdcache gc` takes away nothing that this run counts on
        cache = open_to_write(config.cache) if store.size("cache.json") is not None else None
        if cache is not None:
            check_given_plan(config, cache, sources)
            sources = [cache.with_labels(source) for source in sources]
        run = _Run(config, store, cache, sources, all_sources, launch, progress=progress and launch.rank == 0)  # imports torch
        summary = run.extract()
    summary.seconds = time.perf_counter() - begin
    _report(config, summary, launch)
    return summary


# --- the run ---------------------------------------------------------------------------------------------------------


class _Run:
    """A run that has work to do: the teacher, the targets' cards, the queue."""

    def __init__(
        self,
        config: ExtractConfig,
        store: Store,
        cache: Cache | None,
        sources: Sequence[ShardSource],
        all_sources: Sequence[ShardSource],
        launch: Launch,
        *,
        progress: bool,
    ) -> None:
        from kdcache.device import resolve_device, share_machine
        from kdcache.teacher import load_teacher

        decoder = cache.plan.decoder if cache is not None else config.decoder or "pillow"
        if decoder != "pillow" and decodes_images(config, cache, sources):
            require_decoder(decoder)
        self.config, self.store, self.sources, self.launch, self.progress = config, store, sources, launch, progress
        self.all_sources = all_sources
        self.label_key = common_label_key(sources)
        self.teacher_name = check_teacher_name(config.name or default_teacher_name(config.teacher))
        known = cache.teachers.get(self.teacher_name) if cache is not None else None
        precision = config.precision or (known.document.identity.precision if known is not None else "fp32")
        self.teacher = load_teacher(
            config.teacher,
            checkpoint=Path(config.checkpoint) if config.checkpoint else None,
            model_args=config.model_args,
            precision=precision,
            device=share_machine(resolve_device(config.device), launch),
        )
        if known is not None:
            require_same(
                f"teacher {self.teacher_name!r}",
                known.document.identity,
                self.teacher.identity,
                remedy="a teacher's targets must come from one model: restore it, or record this one under another --name",
            )
        specs = requested_specs(config, self.teacher.card, known)
        resolved = self.teacher.resolve(specs)
        self.cache = cache
        self.plan = cache.plan if cache is not None else self._make_plan()
        self.wanted_views = num_views(config, specs, self.plan, cache)
        self.num_workers = config.workers if config.workers is not None else default_workers(launch.cores)
        self.summary = ExtractSummary()
        self._unreadable: set[str] = set()
        self.calibrated_on: list[str] = []
        self._indexes: dict[str, ShardIndex] = {}
        self._prepare(specs, resolved)

    def _make_plan(self) -> ViewPlan:
        config = self.config
        return ViewPlan(
            dataset=config.dataset or default_dataset_id(self.sources),
            policy=policy_of(config) or POLICIES["weak"],
            size=config.size or self.teacher.identity.preprocessing.input_size,
            seed=config.seed or 0,
            decoder=config.decoder or "pillow",
            resizer=config.resizer or "pillow",
            stored_views=config.store_views,
        )

    def _create_cache(self) -> Cache:
        """cache.json, if it is not there; and the note of which shards this run was asked for, done or not."""
        document, _ = create_document(self.store, "cache.json", CacheIdentity(plan=self.plan, label_key=self.label_key))
        require_same("view plan", document.identity.plan, self.plan, remedy="another run has just made this cache; use another folder")
        check_label_key(document.identity, self.label_key)
        source = SourceIdentity(shards=tuple(sorted(one.name for one in self.all_sources)))
        create_document(self.store, source_path(source), source)
        cache = open_to_write(self.config.cache)
        if self.pending and not is_current(self.store, cache.documents):
            drop_index(self.store)  # what it holds beyond the documents may be committed again with other content
        return cache

    # --- before the work: teacher's card, calibration, accuracy, estimate ---

    def _prepare(self, specs: Sequence[TargetSpec], resolved: Mapping[TargetSpec, TeacherTarget]) -> None:
        from kdcache.cards import create_cards, create_teacher, plan_targets

        layer = self._layer()
        self.wanted: dict[str, int] = {}
        for spec in specs:
            self.wanted[resolved[spec].name] = spec.views or self.wanted_views
        self.views = max(self.wanted_views, *self.wanted.values())
        plans = plan_targets(self.store, resolved, layer, teacher_name=self.teacher_name)
        self.pending = [source for source in self.sources if not self._is_complete(source)]
        lost = [self._views_lost(source) for source in self.sources]
        if all(lost):  # before anything is written that no shard would use
            raise ShardError(f"{lost[0]}; {len(lost)} of {counted(len(lost), 'shard')} can't be done, and nothing was extracted")
        statistics: dict[str, dict[str, Tensor]] = {}
        if self.pending or any(plan.needs_statistics for plan in plans):
            statistics = self._preflight(plans)
        record_tail = self._plan_tail()
        self.cache = self._create_cache()
        config = self.config
        provenance = {
            "source": config.teacher,
            "model_args": dict(config.model_args),
            "weight_files": weight_files(config.teacher, config.checkpoint),
            "nodes": list(self.teacher.card.nodes),
            "containers": dict(self.teacher.card.containers),
            **({"checkpoint": config.checkpoint} if config.checkpoint else {}),
        }
        self.teacher_document = create_teacher(self.store, self.teacher_name, self.teacher.identity, provenance=provenance)
        self.cache.teachers.setdefault(self.teacher_name, TeacherLayer(self.teacher_name, self.teacher_document))  # to take records of others
        record_tail()
        making = {"shards": self.calibrated_on, **self._making()}
        self.recorded, added = create_cards(self.store, self.teacher_name, plans, statistics, making=making)
        self.summary.bytes += added

    def _making(self) -> dict[str, Any]:
        """Provenance: with these the same bytes come out again, as `verify --repair` wants them."""
        import torch

        return {"device": str(self.teacher.device), "batch_size": self.config.batch_size, "threads": torch.get_num_threads()}

    def _plan_tail(self) -> Callable[[], None]:
        """Cut the teacher's last modules, if a method runs them; what records them. A teacher that has no such tail leaves nothing in the cache."""
        modules = requested_tail(self.config, self.teacher.card)
        if not modules:
            return lambda: None
        from kdcache.cards import create_tail, plan_tail
        from kdcache.preflight import TAIL_VIEWS, first_views

        views, _, _ = first_views(self.plan, self.sources, self._scan, TAIL_VIEWS, self.cache)
        plan = plan_tail(self.store, self.teacher_name, self.teacher, modules, views)

        def record() -> None:
            tail, added = create_tail(self.store, self.teacher_name, plan, self.teacher, views)
            self.summary.bytes += added
            if self.progress:
                self._say_tail(tail)

        return record

    def _layer(self) -> TeacherLayer | None:
        return self.cache.teachers.get(self.teacher_name) if self.cache is not None else None

    def _records(self, shard: str) -> list[Document[ViewsIdentity]]:
        return self.cache.views.get(shard, []) if self.cache is not None else []

    def _is_complete(self, source: ShardSource) -> bool:
        records = self._records(source.name)
        if not records:
            return False
        if not is_unchanged(source, records[0], may_be_gone=self.plan.stored_views is not None):
            return False  # scanned again, and refused if its members differ
        return not self._missing(source.name)

    def _missing(self, shard: str) -> Missing:
        from kdcache.jobs import find_missing

        layer = self._layer()
        have = {name: [r.identity.views for r in layer.segments(shard, name)] for name in self.wanted} if layer is not None else {}
        have_views = [record.identity.views for record in self._records(shard)]
        return find_missing(have_views, have, want_views=self.views, want_targets=self.wanted)

    def _scan(self, source: ShardSource) -> ShardIndex:
        if source.name not in self._indexes:
            self._indexes[source.name] = scan_shard(source)
        return self._indexes[source.name]

    def _preflight(self, plans: Sequence[TargetPlan]) -> dict[str, dict[str, Tensor]]:
        """Run the teacher on view 0 of the first samples; its channel statistics for targets that have none yet.

        Raises TeacherError for an accuracy below what the user expects.
        """
        from kdcache.preflight import ACCURACY_VIEWS, CALIBRATION_VIEWS, first_views, run_preflight

        targets = [plan.target for plan in plans]
        names = {plan.target.name: plan.encoding for plan in plans if plan.needs_statistics}
        layer = self._layer()
        cards = [plan.card for plan in plans if plan.needs_statistics and plan.card is not None]  # lost: must come out the same
        cards = cards or (list(layer.targets.values()) if layer is not None else [])  # new: on what its neighbours were
        remembered = {shard for card in cards for shard in card.provenance.get("calibration", {}).get("shards", [])}
        calibrators = {name: one for name, encoding in names.items() if (one := encoding.calibrator(name)) is not None}
        sources = [source for source in self.sources if source.name in remembered] if calibrators else []
        count = CALIBRATION_VIEWS if calibrators else ACCURACY_VIEWS
        views, labels, self.calibrated_on = first_views(self.plan, sources or self.sources, self._scan, count, self.cache)
        found = run_preflight(self.teacher, targets, calibrators, views, labels, batch_size=self.config.batch_size)
        if self.progress:
            self._say_estimate(plans, found.seconds_per_view)
        if self.teacher.has_logits:
            self._check_accuracy(found)
        elif self.config.min_teacher_top1:
            raise UsageError("--min-teacher-top1: the teacher has no classifier; leave the option out")
        return found.statistics

    def _check_accuracy(self, found: Preflight) -> None:
        wanted, num_classes = self.config.min_teacher_top1, self.teacher.identity.num_classes
        if found.highest_label >= num_classes:
            say(
                f"the teacher has {counted(num_classes, 'class')}, labels reach {found.highest_label}: its classes are not the dataset's; only losses"
                f" that need no label match apply"
            )
        if not found.labelled:
            if wanted:
                raise UsageError("--min-teacher-top1: none of the first samples has a label of the teacher's classes; leave the option out")
            return
        top1 = 100 * found.correct / found.labelled
        if self.progress:
            say(f"teacher: {top1:.1f} % top-1 on the first {counted(found.labelled, 'labelled view')}")
        if top1 < wanted:
            raise TeacherError(
                f"teacher {self.config.teacher}: {top1:.1f} % top-1 on the first {counted(found.labelled, 'labelled view')}, expected at least"
                f" {wanted:g} %; check its normalisation, its class order and the labels; nothing was extracted"
            )

    def _say_tail(self, tail: Document[TailIdentity]) -> None:
        identity, distance = tail.identity, tail.measured.get("without_prefix")
        prefix = ""
        if identity.prefix_tokens and distance is not None:
            prefix = f"; without prefix tokens, as scalekd runs it, {distance:.2g} away from the teacher (relative L2)"
        say(f"tail: {', '.join(identity.modules)}{' and the head' if identity.head else ''}, {human_bytes(identity.weights.size)}{prefix}")

    def _say_estimate(self, plans: Sequence[TargetPlan], seconds_per_view: float) -> None:
        samples, ranks = self._estimated_samples(self.pending), self.launch.world_size
        bytes_per_view = {plan.target.name: plan.encoding.bytes_per_view for plan in plans}
        views = passes = size = 0.0
        for source, count in self._samples_of(self.pending):
            missing = self._missing(source.name)
            views += count * len(missing.all_views)
            for names, segment in missing.segments:
                passes += count * len(segment)
                size += count * len(segment) * sum(bytes_per_view[name] for name in names)
        takes = self.teacher.identity.preprocessing.input_size
        resized = f"; views of {self.plan.size} px are resized to its {takes}" if takes != self.plan.size else ""
        say(f"teacher {self.teacher_name!r} gives {', '.join(f'{plan.target.name}:{plan.encoding.full_name}' for plan in plans)}{resized}")
        each = f"{views / max(1, samples):.3g}"
        say(
            f"{len(self.pending)} of {counted(len(self.sources), 'shard')} to do: about {counted(samples, 'sample')} x {each} view{'' if each == '1' else 's'};"
            f" the teacher needs about {human_seconds(passes * seconds_per_view / ranks)} ({1e3 * seconds_per_view:.1f} ms a view)"
            + (f" on each of {ranks} ranks" if ranks > 1 else "")
        )
        free = self.store.free_bytes()
        stored = ""
        if stored_bytes := self._estimated_stored_bytes():
            stored = f", and about {human_bytes(stored_bytes)} of stored views ({self.plan.stored_views}; by their area, an estimate)"
        say(f"at most {human_bytes(size)} of targets, before compression{stored}" + (f"; {human_bytes(free)} are free" if free is not None else ""))
        cached = max(self.wanted.values())
        students = -(-cached // TYPICAL_EPOCHS)
        say(
            f"break-even: {counted(cached, 'teacher pass')} an image once, in place of {TYPICAL_EPOCHS} for each student trained online for {TYPICAL_EPOCHS}"
            f" epochs: it pays from {'the first student' if students == 1 else f'{students} students'} on"
        )

    # --- the work ---

    def extract(self) -> ExtractSummary:
        """Do every pending shard that no other rank does, write the index, sum up."""
        from kdcache.workers import naming_killed_workers

        self.store.sweep_spools()
        self.pool = ChunkPool(num_threads=min(4, self.launch.cores))
        self.committed: dict[str, np.ndarray[Any, Any]] = {}
        self.jobs: dict[int, ShardJob] = {}
        self.turns = Turns(self.store, self.sources, self.pending, self.launch, teacher_name=self.teacher_name)
        total = round(sum(samples * self._rendered_views(source.name) for source, samples in self._samples_of(self.turns.own)))
        try:
            with naming_killed_workers(), ProgressBar(total=total, unit="view", desc="extract", disable=not self.progress or not self.pending) as bar:
                self._work(bar)
                while self.turns.remaining:
                    self._work(bar, insist=self.turns.wait())
                bar.total = bar.n
                bar.refresh()
        except KDCacheError:
            with contextlib.suppress(KDCacheError):  # the first error is the one to tell; what was committed stays indexed
                self._finish_index()
            raise
        finally:
            self.pool.close()
            for job in self.jobs.values():
                job.abandon()
            self.store.drop_spools()
            self.store.sweep_spools()  # of ranks that were killed meanwhile
        self._finish_index()
        self._sum_up()
        return self.summary

    def _estimated_samples(self, sources: Sequence[ShardSource]) -> int:
        """Samples of these shards, of those that are pending."""
        return round(sum(samples for _, samples in self._samples_of(sources)))

    def _rendered_views(self, shard: str) -> int:
        """Views of each sample that are rendered or read for what a shard lacks, an old one that is compared with its digest included."""
        missing = set(self._missing(shard).all_views)
        have = {view for record in self._records(shard) for view in range(record.identity.views.start, record.identity.views.stop)}
        return len(missing) + bool(have and not have & missing)

    def _estimated_stored_bytes(self) -> float:
        """What the views that the pending shards lack will weigh, as they are stored."""
        if self.plan.stored_views is None:
            return 0
        views = sum(samples * sum(map(len, self._missing(source.name).views)) for source, samples in self._samples_of(self.pending))
        return views * estimated_bytes(self.plan.stored_views, self.plan.size)

    def _samples_of(self, sources: Sequence[ShardSource]) -> Iterator[tuple[ShardSource, float]]:
        """Each shard and its samples: as recorded, else from the size of its tar and what the scanned ones hold a byte."""
        scanned = list(self._indexes.values())
        per_byte = sum(len(index.samples) for index in scanned) / max(1, sum(index.size for index in scanned))
        for source in sources:
            records = self._records(source.name)
            if records:
                yield source, records[0].identity.samples
                continue
            with contextlib.suppress(OSError):  # told when its turn comes
                yield source, os.path.getsize(source.path) * per_byte

    def _work(self, bar: Any, *, insist: str = "") -> None:
        """Do the remaining shards that no other process is doing; those stay in `turns`. insist: a shard to do in any case."""
        from kdcache.rendering import FailedTask, rendered_blocks

        committing: tuple[int, Future[JobResult]] | None = None
        making = self._making()
        blocks = rendered_blocks(self.plan, self._tasks(insist), num_workers=self.num_workers, cache=self.cache)
        with contextlib.closing(blocks), ThreadPoolExecutor(1, thread_name_prefix="kdcache-commit") as committer:
            for block in blocks:
                number = block.task.job
                if number not in self.jobs:
                    continue  # the shard has failed
                if isinstance(block, FailedTask):
                    self._fail(number, block.error)
                    continue
                job = self.jobs[number]
                job.add(block, self.teacher)
                bar.update(len(block.task.samples) * len(block.task.views))
                if block.task.is_last:
                    job.finish(self.teacher)
                    if committing is not None:
                        self._settle(*committing)
                    committing = (
                        number,
                        committer.submit(
                            job.commit,
                            teacher_name=self.teacher_name,
                            teacher_digest=self.teacher_document.identity_digest,
                            provenance=making,
                        ),
                    )
                    self.summary.teacher_seconds += job.teacher_seconds
            if committing is not None:
                self._settle(*committing)

    def _fail(self, number: int, error: KDCacheError) -> None:
        """One shard can't be done: it becomes a problem, and the others go on. Anything else ends the run."""
        if not isinstance(error, ShardError):
            raise error
        job = self.jobs.pop(number)
        job.abandon()
        self.turns.failed(number)
        self.summary.problems.append({"kind": "source", "shard": job.index.source.name, "key": "", "detail": str(error)})

    def _settle(self, number: int, committed: Future[JobResult]) -> None:
        result = committed.result()
        del self.jobs[number]
        self.turns.done(number)
        self.summary.bytes += result.size_bytes
        shard = next(iter(result.documents.values())).identity.shard
        self.committed[shard] = result.table

    def _was_done_meanwhile(self, shard: str) -> bool:
        """Look for the records that this run would make of a shard; whether others have made all of them."""
        missing, cache = self._missing(shard), self.cache
        assert cache is not None
        paths = [views_record_path(shard, views) for views in missing.views]
        for names, views in missing.segments:
            paths.append(targets_record_path(self.teacher_name, shard, {name: self.recorded[name].card.identity_digest for name in names}, views))
        found = [path for path in paths if self.store.size(path) is not None]
        for path in found:
            cache.add_record(path, read_document(self.store, path))
        return bool(found) and not self._missing(shard)

    def _tasks(self, insist: str) -> Iterator[RenderTask]:
        """Render tasks of the shards whose turn it is. Drawn from by the loader, in this process, as workers become free."""
        from kdcache.jobs import ShardJob
        from kdcache.rendering import samples_per_task

        for number, source in self.turns.take(insist, self._was_done_meanwhile):
            records = self._records(source.name)
            known = records[0].identity if records else None
            try:
                index = self._index(source, known)
            except ShardError as error:
                self.summary.problems.append({"kind": "source", "shard": source.name, "key": "", "detail": str(error)})
                continue
            finally:
                self._indexes.pop(source.name, None)
            missing = self._missing(source.name)
            if not missing:
                continue
            known_digests = {}
            stored: list[int] = []
            if known is not None:
                rows = np.arange(known.rows)
                have = [view for view in missing.all_views if any(view in record.identity.views for record in records)]
                if self.plan.stored_views is not None:
                    stored = have[1:] if missing.views else have
                have = have or [known.views.start]  # new views only: one old view is rendered too, to notice drift
                assert self.cache is not None
                known_digests = {view: self.cache.read_pixel_digests(source.name, view, rows) for view in have}
            job = self.jobs[number] = ShardJob(
                index=index,
                missing=missing,
                targets=self.recorded,
                plan=self.plan,
                store=self.store,
                pool=self.pool,
                batch_size=self.config.batch_size,
                known=known,
                known_digests=known_digests,
                stored=frozenset(stored),
                label=self.turns.label(source),
            )
            yield from job.tasks(number, samples_per_task(self.plan, len(job.rendered_views)))

    def _index(self, source: ShardSource, known: ViewsIdentity | None) -> ShardIndex:
        """The shard's samples: from its tar, or from the cache if the tar is gone and all views that are wanted are stored. Raises ShardError."""
        if lost := self._views_lost(source):
            raise ShardError(lost)
        if known is not None and self._is_gone(source):
            assert self.cache is not None
            return index_of_stored(self.cache, source)
        index = self._scan(source)
        if known is not None:
            check_same_tar(index, known)
        return index

    def _is_gone(self, source: ShardSource) -> bool:
        """Whether a tar is not there, of a cache that may do without."""
        return self.plan.stored_views is not None and not os.path.exists(source.path)

    def _views_lost(self, source: ShardSource) -> str:
        """That the tar is gone from which views that a shard lacks would be rendered; '' if it is not, or none are lacking."""
        if not self._records(source.name) or not self._is_gone(source):
            return ""
        lacking = [view for views in self._missing(source.name).views for view in views.numbers]
        if not lacking:
            return ""
        return (
            f"shard {source.name}: {source.path} is gone, and views {lacking} are not stored; expected the tar, to render them from:"
            f" restore it, or ask for at most {counted(lacking[0], 'view')}"
        )

    # --- after the work ---

    def _finish_index(self) -> None:
        """Bring the index up to date with the documents, those of other runs included.

        Another rank may be replacing it at the same time, and remove what this one has written: whoever writes last looks last.
        """
        for _ in range(INDEX_ATTEMPTS):
            fresh = open_to_write(self.config.cache)
            if is_current(self.store, fresh.documents):
                return
            self._write_index(fresh)

    def _write_index(self, fresh: Cache) -> None:
        tables = dict(self.committed)
        for shard in fresh.views.keys() - tables.keys():
            try:
                tables[shard] = fresh.table_from_group(fresh.views[shard][0].identity)
            except CacheError as error:
                if shard in self._unreadable:
                    continue
                self._unreadable.add(shard)
                remedy = f"delete {views_record_path(shard, fresh.views[shard][0].identity.views)} and run the command again to make it anew"
                self.summary.problems.append({"kind": "corrupt", "shard": shard, "key": "", "detail": f"{error}; {remedy}"})
        write_index(self.store, fresh.documents, tables)

    def _sum_up(self) -> None:
        self.cache = fresh = open_cache(self.config.cache)
        failed = {problem["shard"] for problem in self.summary.problems}
        pending = {source.name for source in self.pending}
        self.summary.views = self.views
        for source in self.sources:
            records = fresh.views.get(source.name)
            if not records or source.name in failed or self._missing(source.name):
                continue
            count_complete(self.summary, records[0])
            self.summary.resumed_shards += source.name not in pending


def _report(config: ExtractConfig, summary: ExtractSummary, launch: Launch) -> None:
    """The summary for people, on stderr; of ranks but the first only the problems."""
    who = f"rank {launch.rank}: " if launch.world_size > 1 else ""
    for problem in summary.problems:
        where = f"shard {problem['shard']}: "
        say(f"{who}problem: {where}{problem['detail'].removeprefix(where)}")
    if launch.rank > 0:
        return
    say(
        f"{config.cache}: {counted(summary.shards, 'shard')}, {counted(summary.rows, 'row')} x {counted(summary.views, 'view')}, {counted(summary.skipped, 'sample')} skipped;"
        f" added {human_bytes(summary.bytes)} in {human_seconds(summary.seconds)}"
        f" ({human_seconds(summary.teacher_seconds)} in the teacher); {counted(summary.resumed_shards, 'shard')} there already"
    )


__all__ = ["ExtractConfig", "ExtractSummary", "extract"]
