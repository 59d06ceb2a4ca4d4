"""Stage one: shards → seeded views → teacher → encoded targets → cache. Read top to bottom: open, resolve, prepare, loop, index, report.

Workers decode and render, the device runs the teacher and encodes, a pool compresses and writes, and a thread commits; the
four overlap, and every queue between them is bounded in bytes. The unit of commit, retry and resume is a segment of a shard.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm import tqdm

from kdcache.cache import Cache, TeacherLayer, open_cache, open_to_write
from kdcache.console import human_bytes, human_seconds, say
from kdcache.errors import CacheError, KDCacheError, ShardError, TeacherError, UsageError
from kdcache.format import CacheIdentity, Document, SourceIdentity, ViewsIdentity, check_teacher_name, source_path, views_record_path
from kdcache.index import drop_index, is_current, write_index
from kdcache.plan import POLICIES, Policy, ViewPlan, require_same
from kdcache.shards import ShardIndex, ShardSource, default_dataset_id, resolve_shards, scan_shard
from kdcache.store import Store, open_store
from kdcache.targets import TargetSpec, merge_targets, parse_target, parse_targets
from kdcache.teacher_card import ANY_TEACHER, TeacherCard, card_of_layer
from kdcache.teacher_source import default_teacher_name, weight_files

if TYPE_CHECKING:  # these import torch, which a finished run does without
    from torch import Tensor

    from kdcache.cards import TargetPlan
    from kdcache.jobs import JobResult, Missing, ShardJob
    from kdcache.preflight import Preflight
    from kdcache.rendering import RenderTask
    from kdcache.teacher import TeacherTarget

DEFAULT_VIEWS = 8
"""Views of a random policy when the user names no number: about 50 suffice for ImageNet logits (research: peers §6)."""
CALIBRATION_VIEWS = 256
ACCURACY_VIEWS = 64
WRITE_QUEUE_BYTES = 256 << 20
TYPICAL_EPOCHS = 100
"""Of one student's training online, for the break-even line."""


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """What to extract, from where, with what. None means: as the cache has it, else the default named."""

    shards: str | Sequence[str]
    """SHARDS: a tar, a folder of tars, a brace expression, or a list of these."""
    cache: str
    """Folder of the cache; made if it is not there."""
    teacher: str
    """timm name, `hf-hub:…` or `local-dir:…`."""
    checkpoint: str | None = None
    """Weights file to load in place of the pretrained ones."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Constructor arguments of the teacher, e.g. {"img_size": 224}."""
    name: str | None = None
    """The teacher's name in the cache. Default: from its model name."""
    dataset: str | None = None
    """Dataset id. Default: the shards' common name."""
    methods: Sequence[str] = ()
    """Record what these methods need."""
    targets: Sequence[str] = ()
    """Specs. Default: `logits`, unless methods say more."""
    views: int | None = None
    """Views a sample. Default: 8, or 1 for a policy without randomness."""
    augment: str | Policy | None = None
    """Policy name or policy. Default: weak."""
    size: int | None = None
    """Side of a view, pixels. Default: the teacher's input size."""
    seed: int | None = None
    """Plan seed. Default: 0."""
    batch_size: int = 64
    workers: int | None = None
    """Decoding processes; 0: decode in this one. Default: one a core, at most 8."""
    device: str | None = None
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Default: fp32."""
    limit_shards: int | None = None
    """Only the first N shards."""
    min_teacher_top1: float = 0.0
    """Stop before the work if the teacher's top-1 on the first labelled views is below this, percent."""


@dataclass
class ExtractSummary:
    """What is there now, and what this run added. The keys of `kdcache extract --json`."""

    shards: int = 0
    """Shards asked for that are complete now."""
    rows: int = 0
    """Samples with a row in these shards; not times views."""
    views: int = 0
    skipped: int = 0
    """Samples without a row in these shards."""
    bytes: int = 0
    """Added by this run."""
    seconds: float = 0.0
    teacher_seconds: float = 0.0
    """Of these in the teacher and the encoders."""
    resumed_shards: int = 0
    """Shards that were complete before this run and were left alone."""
    problems: list[dict[str, str]] = field(default_factory=list)
    """[{"kind", "shard", "key", "detail"}]: shards that were cut, or could not be done."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def extract(config: ExtractConfig, *, progress: bool = False) -> ExtractSummary:
    """Run stage one. Raises KDCacheError; a problem of a single shard is reported in the summary and the others go on."""
    begin = time.perf_counter()
    _requested_specs(config, ANY_TEACHER, None)  # raises UsageError before anything is loaded
    sources = resolve_shards(config.shards)[: config.limit_shards]
    store = open_store(config.cache)
    cache: Cache | None = None
    if store.size("cache.json") is not None:
        summary = _finished_already(config, sources)
        if summary is not None:
            summary.seconds = time.perf_counter() - begin
            _report(config, summary)
            return summary
        cache = open_to_write(config.cache)
        _check_given_plan(config, cache, sources)

    run = _Run(config, store, cache, sources, progress=progress)  # imports torch
    summary = run.extract()
    summary.seconds = time.perf_counter() - begin
    _report(config, summary)
    return summary


def _requested_specs(config: ExtractConfig, card: TeacherCard, layer: TeacherLayer | None) -> list[TargetSpec]:
    """What the user named, and what the methods need of this teacher.

    A method's own choice of encoding gives way to one that the user names, and to the one in the cache.
    """
    specs = parse_targets(config.targets)
    if config.methods:
        from kdcache.methods import requirements

        named = {spec.name for spec in specs} | set(layer.targets if layer is not None else ())
        for method in config.methods:
            for spec in parse_targets(requirements(method, card)):
                specs.append(replace(spec, encoding=None) if spec.name in named else spec)
    return merge_targets(specs) or [parse_target("logits")]


# --- the plan --------------------------------------------------------------------------------------------------------


def _policy(config: ExtractConfig) -> Policy | None:
    if config.augment is None or isinstance(config.augment, Policy):
        return config.augment
    from kdcache.plan import parse_policy

    return parse_policy(config.augment)


def _check_given_plan(config: ExtractConfig, cache: Cache, sources: Sequence[ShardSource]) -> None:
    """What the user gave must be what the cache has; what was not given is taken from it. Raises MismatchError."""
    given: dict[str, Any] = {"dataset": config.dataset, "policy": _policy(config), "size": config.size, "seed": config.seed}
    if config.dataset is None and not {source.name for source in sources} & set(cache.all_shards):
        given["dataset"] = default_dataset_id(sources)  # other shards altogether: most likely the wrong cache
    asked = cache.plan.model_copy(update={key: value for key, value in given.items() if value is not None})
    require_same("view plan", cache.plan, asked, remedy="a cache holds one plan: use another folder, or leave the option out")


def _num_views(config: ExtractConfig, specs: Sequence[TargetSpec], plan: ViewPlan, cache: Cache | None) -> int:
    """Views wanted of targets that name no number. Raises UsageError for several views of a policy without randomness."""
    default = DEFAULT_VIEWS if plan.policy.is_random else 1
    wanted = config.views or (cache.num_views if cache is not None and cache.num_views else default)
    most = max([wanted, *(spec.views or 0 for spec in specs)])
    if most > 1 and not plan.policy.is_random:
        raise UsageError(f"{most} views were asked for, but the policy has no randomness: every view would be the same; expected --views 1")
    return wanted


# --- nothing to do? --------------------------------------------------------------------------------------------------


def _finished_already(config: ExtractConfig, sources: Sequence[ShardSource]) -> ExtractSummary | None:
    """The summary, if everything asked for is there already; found without loading torch or scanning a tar that has not changed."""
    try:
        cache = open_cache(config.cache)
    except CacheError:
        return None  # what an extraction can't mend is raised again on opening to write
    _check_given_plan(config, cache, sources)
    layer = cache.teachers.get(config.name or default_teacher_name(config.teacher))
    if layer is None or not _same_teacher(config, layer.document.provenance) or config.precision not in (None, layer.document.identity.precision):
        return None
    specs = _requested_specs(config, card_of_layer(layer), layer)
    names = {spec: _recorded_name(layer, spec) for spec in specs}
    wanted_views = _num_views(config, specs, cache.plan, cache)
    views = max(wanted_views, *(spec.views or 0 for spec in specs))
    summary = ExtractSummary(views=views)
    for source in sources:
        records = cache.views.get(source.name, [])
        if not records or not all(any(view in record.identity.views for record in records) for view in range(views)):
            return None
        for spec in specs:
            card = layer.targets.get(names[spec])
            if card is None or spec.encoding not in (None, card.identity.encoding):
                return None
            segments = layer.segments(source.name, names[spec])
            if not all(any(view in segment.identity.views for segment in segments) for view in range(spec.views or wanted_views)):
                return None
        if not _unchanged(source, records[0]):
            return None
        _count_finished(summary, records[0])
    if not is_current(cache.store, cache.documents) or not {source.name for source in resolve_shards(config.shards)} <= set(cache.all_shards):
        return None
    return summary


def _recorded_name(layer: TeacherLayer, spec: TargetSpec) -> str:
    """The name under which a spec was recorded: a negative node was written down beside the card it led to."""
    asked = (name for name, card in layer.targets.items() if card.provenance.get("requested") == spec.name)
    return spec.name if spec.name in layer.targets else next(asked, spec.name)


def _count_finished(summary: ExtractSummary, record: Document[Any]) -> None:
    summary.shards += 1
    summary.resumed_shards += 1
    summary.rows += record.identity.rows
    summary.skipped += len(record.identity.skipped)
    _note_cut(summary, record.identity.shard, record.identity.cut)


def _note_cut(summary: ExtractSummary, shard: str, cut: str | None) -> None:
    if cut is not None:
        summary.problems.append(
            {"kind": "source", "shard": shard, "key": "", "detail": f"the tar is cut short: {cut}; its samples before the cut are kept"}
        )


def _unchanged(source: ShardSource, record: Document[Any]) -> bool:
    """Whether the tar is the one that was scanned: by size and time of change, else by its member table."""
    remembered = record.provenance.get("source", {})
    try:
        stat = os.stat(source.path)
    except OSError:
        return False  # told when its turn comes
    if (stat.st_size, stat.st_mtime_ns) == (remembered.get("size"), remembered.get("mtime_ns")):
        return True
    try:
        return bool(scan_shard(source).member_table == record.identity.member_table)
    except ShardError:
        return False  # told when its turn comes


def _same_teacher(config: ExtractConfig, provenance: Mapping[str, Any]) -> bool:
    found = weight_files(config.teacher, config.checkpoint)
    same_files = sorted(found.values()) == sorted(provenance.get("weight_files", {}).values())
    same_model = provenance.get("source") == config.teacher or (bool(found) and config.checkpoint is None)  # a folder may be moved
    return bool(same_files and same_model and provenance.get("model_args") == dict(config.model_args))


# --- the run ---------------------------------------------------------------------------------------------------------


class _Run:
    """A run that has work to do: the teacher, the targets' cards, the queue."""

    def __init__(
        self,
        config: ExtractConfig,
        store: Store,
        cache: Cache | None,
        sources: Sequence[ShardSource],
        *,
        progress: bool,
    ) -> None:
        from kdcache.device import resolve_device
        from kdcache.teacher import load_teacher

        self.config, self.store, self.sources, self.progress = config, store, sources, progress
        self.teacher_name = check_teacher_name(config.name or default_teacher_name(config.teacher))
        known = cache.teachers.get(self.teacher_name) if cache is not None else None
        precision = config.precision or (known.document.identity.precision if known is not None else "fp32")
        self.teacher = load_teacher(
            config.teacher,
            checkpoint=Path(config.checkpoint) if config.checkpoint else None,
            model_args=config.model_args,
            precision=precision,
            device=resolve_device(config.device),
        )
        if known is not None:
            require_same(
                f"teacher {self.teacher_name!r}",
                known.document.identity,
                self.teacher.identity,
                remedy="a teacher's targets must come from one model: restore it, or record this one under another --name",
            )
        specs = _requested_specs(config, self.teacher.card, known)
        resolved = self.teacher.resolve(specs)
        self.cache = cache
        self.plan = cache.plan if cache is not None else self._make_plan()
        self.wanted_views = _num_views(config, specs, self.plan, cache)
        self.num_workers = config.workers if config.workers is not None else min(8, os.cpu_count() or 1)
        self.summary = ExtractSummary()
        self.calibrated_on: list[str] = []
        self._indexes: dict[str, ShardIndex] = {}
        self._prepare(specs, resolved)

    def _make_plan(self) -> ViewPlan:
        config = self.config
        return ViewPlan(
            dataset=config.dataset or default_dataset_id(self.sources),
            policy=_policy(config) or POLICIES["weak"],
            size=config.size or self.teacher.identity.preprocessing.input_size,
            seed=config.seed or 0,
        )

    def _create_cache(self) -> Cache:
        """cache.json, if it is not there; and the note of which shards this run was asked for, done or not."""
        from kdcache.commit import create_document

        document, _ = create_document(self.store, "cache.json", CacheIdentity(plan=self.plan))
        require_same("view plan", document.identity.plan, self.plan, remedy="another run has just made this cache; use another folder")
        source = SourceIdentity(shards=tuple(sorted(one.name for one in resolve_shards(self.config.shards))))
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
        for spec in specs:  # two spellings of a node are one target
            name = resolved[spec].name
            self.wanted[name] = max(self.wanted.get(name, 0), spec.views or self.wanted_views)
        self.views = max(self.wanted_views, *self.wanted.values())
        plans = plan_targets(self.store, resolved, layer, teacher_name=self.teacher_name)
        self.pending = [source for source in self.sources if not self._is_complete(source)]
        statistics: dict[str, dict[str, Tensor]] = {}
        uncalibrated = [plan.target for plan in plans if plan.needs_statistics]
        if self.pending or uncalibrated:
            statistics = self._preflight(plans, uncalibrated)
        self.cache = self._create_cache()
        config = self.config
        provenance = {
            "source": config.teacher,
            "model_args": dict(config.model_args),
            "weight_files": weight_files(config.teacher, config.checkpoint),
            "nodes": list(self.teacher.card.nodes),
        }
        self.teacher_document = create_teacher(self.store, self.teacher_name, self.teacher.identity, provenance=provenance)
        making = {"shards": self.calibrated_on, "batch_size": config.batch_size, "device": str(self.teacher.device)}
        self.recorded = create_cards(self.store, self.teacher_name, plans, statistics, making=making)

    def _layer(self) -> TeacherLayer | None:
        return self.cache.teachers.get(self.teacher_name) if self.cache is not None else None

    def _records(self, shard: str) -> list[Document[ViewsIdentity]]:
        return self.cache.views.get(shard, []) if self.cache is not None else []

    def _is_complete(self, source: ShardSource) -> bool:
        records = self._records(source.name)
        if not records:
            return False
        if not _unchanged(source, records[0]):
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

    def _preflight(self, plans: Sequence[TargetPlan], uncalibrated: Sequence[TeacherTarget]) -> dict[str, dict[str, Tensor]]:
        """Run the teacher on view 0 of the first samples; its channel statistics for targets that have none yet.

        Raises TeacherError for an accuracy below what the user expects.
        """
        from kdcache.preflight import first_views, run_preflight

        targets = [plan.target for plan in plans]
        remembered = {shard for plan in plans if plan.card is not None for shard in plan.card.provenance.get("calibration", {}).get("shards", [])}
        sources = [source for source in self.sources if source.name in remembered] if uncalibrated else []
        count = CALIBRATION_VIEWS if uncalibrated else ACCURACY_VIEWS
        views, labels, self.calibrated_on = first_views(self.plan, sources or self.sources, self._scan, count)
        found = run_preflight(self.teacher, targets, uncalibrated, views, labels, batch_size=self.config.batch_size)
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
                f"the teacher has {num_classes} classes, labels reach {found.highest_label}: its classes are not the dataset's; only losses"
                f" that need no label match apply"
            )
        if not found.labelled:
            if wanted:
                raise UsageError("--min-teacher-top1: none of the first samples has a label of the teacher's classes; leave the option out")
            return
        top1 = 100 * found.correct / found.labelled
        if self.progress:
            say(f"teacher: {top1:.1f} % top-1 on the first {found.labelled} labelled views")
        if top1 < wanted:
            raise TeacherError(
                f"teacher {self.config.teacher}: {top1:.1f} % top-1 on the first {found.labelled} labelled views, expected at least"
                f" {wanted:g} %; check its normalisation, its class order and the labels; nothing was extracted"
            )

    def _say_estimate(self, plans: Sequence[TargetPlan], seconds_per_view: float) -> None:
        samples = self._estimated_samples()
        passes = max(self.wanted[plan.target.name] for plan in plans)
        say(
            f"{len(self.pending)} of {len(self.sources)} shards to do: about {samples:,} samples x {self.views} views;"
            f" the teacher needs about {human_seconds(samples * passes * seconds_per_view)} ({1e3 * seconds_per_view:.1f} ms a view)"
        )
        size = samples * sum(self.wanted[plan.target.name] * plan.encoding.bytes_per_view for plan in plans)
        free = shutil.disk_usage(_existing(self.config.cache)).free
        say(f"at most {human_bytes(size)} of targets, before compression; {human_bytes(free)} are free")
        students = -(-passes // TYPICAL_EPOCHS)
        say(
            f"break-even: {passes} teacher passes an image once, in place of {TYPICAL_EPOCHS} for each student trained online for {TYPICAL_EPOCHS}"
            f" epochs: it pays from {'the first student' if students == 1 else f'{students} students'} on"
        )

    # --- the work ---

    def extract(self) -> ExtractSummary:
        """Do every pending shard, write the index, sum up."""
        from kdcache.commit import ChunkPool

        self.store.sweep_spools()
        self.pool = ChunkPool(num_threads=min(4, os.cpu_count() or 1), max_bytes=WRITE_QUEUE_BYTES)
        self.committed: dict[str, np.ndarray[Any, Any]] = {}
        self.jobs: dict[int, ShardJob] = {}
        total = self._estimated_samples() * self.views
        try:
            with tqdm(total=total, unit="view", desc="extract", disable=not self.progress or not self.pending) as bar:
                self._work(bar)
        except KDCacheError:
            with contextlib.suppress(KDCacheError):  # the first error is the one to tell; what was committed stays indexed
                self._finish_index()
            raise
        finally:
            self.pool.close()
            for job in self.jobs.values():
                job.abandon()
        self._finish_index()
        self._sum_up()
        return self.summary

    def _estimated_samples(self) -> int:
        """Samples of the pending shards, from the sizes of their tars and what the scanned ones hold a byte."""
        scanned = list(self._indexes.values())
        per_byte = sum(len(index.samples) for index in scanned) / max(1, sum(index.size for index in scanned))
        size = 0
        for source in self.pending:
            with contextlib.suppress(OSError):  # told when its turn comes
                size += os.path.getsize(source.path)
        return round(size * per_byte)

    def _work(self, bar: Any) -> None:
        from kdcache.rendering import FailedTask, rendered_blocks

        committing: tuple[int, Future[JobResult]] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="kdcache-commit") as committer:
            for block in rendered_blocks(self.plan, self._tasks(), num_workers=self.num_workers):
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
                            provenance={"device": str(self.teacher.device), "batch_size": self.config.batch_size},
                        ),
                    )
                    self.summary.teacher_seconds += job.teacher_seconds
            if committing is not None:
                self._settle(*committing)
        bar.total = bar.n
        bar.refresh()

    def _fail(self, number: int, error: KDCacheError) -> None:
        """One shard can't be done: it becomes a problem, and the others go on. Anything else ends the run."""
        if not isinstance(error, ShardError):
            raise error
        job = self.jobs.pop(number)
        job.abandon()
        self.summary.problems.append({"kind": "source", "shard": job.index.source.name, "key": "", "detail": str(error)})

    def _settle(self, number: int, committed: Future[JobResult]) -> None:
        result = committed.result()
        del self.jobs[number]
        self.summary.bytes += result.size_bytes
        shard = next(iter(result.documents.values())).identity.shard
        self.committed[shard] = result.table

    def _tasks(self) -> Iterator[RenderTask]:
        """Render tasks of every pending shard in order. Drawn from by the loader, in this process, as workers become free."""
        from kdcache.jobs import ShardJob, check_same_tar
        from kdcache.rendering import samples_per_task

        for number, source in enumerate(self.pending):
            records = self._records(source.name)
            known = records[0].identity if records else None
            try:
                index = self._scan(source)
                if known is not None:
                    check_same_tar(index, known)
            except ShardError as error:
                self.summary.problems.append({"kind": "source", "shard": source.name, "key": "", "detail": str(error)})
                continue
            finally:
                self._indexes.pop(source.name, None)
            missing = self._missing(source.name)
            if not missing:
                continue
            known_digests = {}
            if known is not None:
                rows = np.arange(known.rows)
                have = [view for view in missing.all_views if any(view in record.identity.views for record in records)]
                have = have or [known.views.start]  # new views only: one old view is rendered too, to notice drift
                assert self.cache is not None
                known_digests = {view: self.cache.read_pixel_digests(source.name, view, rows) for view in have}
            job = self.jobs[number] = ShardJob(
                index=index,
                missing=missing,
                targets=self.recorded,
                fingerprint=self.plan.fingerprint,
                store=self.store,
                pool=self.pool,
                batch_size=self.config.batch_size,
                known=known,
                known_digests=known_digests,
            )
            yield from job.tasks(number, samples_per_task(self.plan, len(job.rendered_views)))

    # --- after the work ---

    def _finish_index(self) -> None:
        """Bring the index up to date with the documents, those of other runs included."""
        fresh = open_to_write(self.config.cache)
        if is_current(self.store, fresh.documents):
            return
        tables = dict(self.committed)
        for shard in fresh.views.keys() - tables.keys():
            try:
                tables[shard] = fresh.table_from_group(fresh.views[shard][0].identity)
            except CacheError as error:
                remedy = f"delete {views_record_path(shard, fresh.views[shard][0].identity.views)} and run the command again to make it anew"
                self.summary.problems.append({"kind": "corrupt", "shard": shard, "key": "", "detail": f"{error}; {remedy}"})
        write_index(self.store, fresh.documents, tables)

    def _sum_up(self) -> None:
        fresh = open_cache(self.config.cache)
        failed = {problem["shard"] for problem in self.summary.problems}
        pending = {source.name for source in self.pending}
        self.summary.views = self.views
        for source in self.sources:
            records = fresh.views.get(source.name)
            if not records or source.name in failed:
                continue
            before = self.summary.resumed_shards
            _count_finished(self.summary, records[0])
            if source.name in pending:
                self.summary.resumed_shards = before


def _existing(path: str) -> str:
    """The nearest folder above `path` that is there."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return str(folder)


def _report(config: ExtractConfig, summary: ExtractSummary) -> None:
    """The summary for people, on stderr."""
    for problem in summary.problems:
        say(f"problem: shard {problem['shard']}: {problem['detail']}")
    say(
        f"{config.cache}: {summary.shards} shards, {summary.rows:,} rows x {summary.views} views, {summary.skipped} samples skipped;"
        f" added {human_bytes(summary.bytes)} in {human_seconds(summary.seconds)}"
        f" ({human_seconds(summary.teacher_seconds)} in the teacher); {summary.resumed_shards} shards were there already"
    )
