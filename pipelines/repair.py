"""Mend a cache: put back documents that the index holds, make bad or missing segments again, remove what nobody owns, rebuild the index.

What is sound is never touched. A segment is made again in a spool, with the settings that its record holds; if the bytes come out as its record says,
only its bad files are replaced, and the record stays. Otherwise (another device, another codec version) the whole segment is
replaced, provided that its pixels are those of before. An index needs neither tars nor teacher, views need their tar, targets their teacher and the
views' tar, or the stored views.

The order makes a kill harmless, as in an extraction: documents, views, calibration and tails, targets, index; and what is bad goes last before its
replacement comes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache import Cache
from kdcache.commit import ChunkPool, create_document
from kdcache.console import say
from kdcache.digests import find_changed
from kdcache.errors import CorruptError, DriftError, KDCacheError, MismatchError, ShardError, StoreError, UsageError
from kdcache.format import Document, SourceIdentity
from kdcache.index import document_paths, drop_index, is_current, read_document
from kdcache.launch import available_cores, default_workers
from kdcache.opening import refresh_index
from kdcache.ownership import group_path
from kdcache.paths import calibration_path, source_path, tail_weights_path
from kdcache.plan import blake2b_128
from kdcache.shards import ShardIndex, ShardSource, check_same_tar, scan_shard
from kdcache.sources import locate_shards
from kdcache.store import LocalStore, Store, open_store
from kdcache.stored_source import index_of_stored

from .verification.repair_plan import RepairPlan, Segment, group_prefix

if TYPE_CHECKING:
    from kdcache.jobs import Missing, RecordedTarget
    from kdcache.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class RepairConfig:
    """What may be done, and where teachers and tars lie now."""

    data: str | None = None
    """SHARDS. Default: where they lay."""
    model: str | None = None
    """Where the teacher lies now. Default: as it was named when it was recorded."""
    checkpoint: str | None = None
    teacher: str | None = None
    """Of which teacher `model` and `checkpoint` speak. Default: the only one that is needed."""
    batch_size: int | None = None
    """Default: as the segment was made, so that its bytes come out the same. Likewise the device."""
    device: str | None = None
    workers: int | None = None


def carry_out(path: str, plan: RepairPlan, config: RepairConfig) -> list[str]:
    """Do what the plan says; what could not be done, in words.

    Raises StoreError while another process writes to the cache, or if one has since the plan was made; UsageError for a `model` or `checkpoint`
    that may be of several teachers.
    """
    if (config.model or config.checkpoint) and config.teacher is None and len(plan.teachers) > 1:
        raise UsageError(f"--model and --checkpoint are of one teacher, and {', '.join(sorted(plan.teachers))} are needed: pass --teacher NAME too")
    store = open_store(path)
    with store.hold(alone=True):
        if dict(store.list()) != plan.sizes:
            raise StoreError(f"{store.url}: another process has changed it since it was verified; nothing was changed: run the command again")
        try:
            return _Repair(store, plan, config).run()
        finally:
            store.drop_spools()
            store.sweep_spools()  # of a repair or an extraction that was killed


class _Repair:
    """A plan being carried out."""

    def __init__(self, store: Store, plan: RepairPlan, config: RepairConfig) -> None:
        self.store, self.plan, self.config = store, plan, config
        self.failures: list[str] = []
        self._lost = {segment.path for segment in plan.segments if segment.document is None}
        """Records that can't be read, till their segment is made again."""
        self._teachers: dict[str, Teacher] = {}
        self._cache: Cache | None = None
        self._spool: Path | None = None
        """In which a segment is made; what is made lies in `_made`."""

    def run(self) -> list[str]:
        kept = {f"{group_path(s.path, s.document)}/{name}" for s in self.plan.segments if s.document is not None for name in s.bad_files}
        kept |= self._lost
        kept |= {calibration_path(*one) for one in self.plan.calibrations} | {tail_weights_path(one) for one in self.plan.tails}
        for path in self.plan.delete:
            if path not in kept:  # those go when what replaces them is at hand
                self.store.delete(path)
        for path, data in self.plan.restore.items():
            self.store.delete(path)
            self.store.put_new(path, data)
        self._cache = self._open()
        if self.plan.rewrite_sources:
            self._rewrite_sources()
        for segment in self.plan.views:
            self._try(segment.words, self._make_views, segment)
        for teacher, target in self.plan.calibrations:
            self._try(f"calibration of {target} of teacher {teacher}", self._make_calibration, teacher, target)
        for teacher in self.plan.tails:
            self._try(f"the tail of teacher {teacher}", self._make_tail, teacher)
        for segment in self.plan.targets:
            self._try(segment.words, self._make_targets, segment)
        self._finish_index()
        return self.failures

    def _open(self) -> Cache:
        documents: dict[str, Document[Any]] = {}
        for path, _ in document_paths(self.store):
            if path not in self._lost:
                documents[path] = read_document(self.store, path)
        return self._with(documents)

    def _with(self, documents: Mapping[str, Document[Any]]) -> Cache:
        return Cache(self.store, documents, sources=locate_shards(self.config.data) if self.config.data is not None else {})

    @property
    def cache(self) -> Cache:
        assert self._cache is not None
        return self._cache

    def _try(self, what: str, action: Any, *arguments: Any) -> None:
        """One thing that can't be mended does not stop the others."""
        try:
            action(*arguments)
        except KDCacheError as error:
            self.failures.append(f"{what}: {error}")
        else:
            say(f"{'mended':>13}  {'':>8}  {what}")

    def _rewrite_sources(self) -> None:
        source = SourceIdentity(shards=tuple(self.cache.shards))
        create_document(self.store, source_path(source), source)

    def _finish_index(self) -> None:
        if any(self.store.size(path) is not None for path in self._lost):
            return  # could not be made again, as the failures say: no index while they are there
        documents = self._open().documents
        if is_current(self.store, documents):
            return
        self._try("the index", refresh_index, self.store.url)

    # --- segments ---

    def _make_views(self, segment: Segment) -> None:
        """Render a views segment again; its pixels must be those of before, since targets were made of them."""
        from kdcache.jobs import Missing

        source = self.cache.source(segment.shard) if segment.shard in self.cache.views or self.config.data is not None else self._remembered(segment)
        index = scan_shard(source)
        known = segment.document or next(iter(self.cache.views.get(segment.shard, [])), None)
        if known is not None:
            check_same_tar(index, known.identity)
        document = self._do(segment, index, Missing(views=(segment.views,), segments=()), known, {}, {}, batch_size=1)
        old = segment.document
        if old is not None and document.identity.pixels_by_view != old.identity.pixels_by_view:
            raise DriftError(
                f"shard {segment.shard}: the views come out with other pixels than the teacher saw; nothing of it was replaced: run 'kdcache verify"
                f" CACHE --views all' to see why, and install the versions of then"
            )
        self._settle(segment, document)

    def _remembered(self, segment: Segment) -> ShardSource:
        """Where a shard's tar may lie of which no views record is left: beside those of the others."""
        folders = {os.path.dirname(self.cache.source(shard).path) for shard in self.cache.shards}
        for folder in sorted(folders):
            path = os.path.join(folder, f"{segment.shard}.tar")
            if os.path.exists(path):
                return ShardSource(segment.shard, path, self.cache.label_key)
        raise ShardError(
            f"shard {segment.shard}: its record was lost, and with it where its tar lies; pass --data with SHARDS where the tars lie now"
        )

    def _make_targets(self, segment: Segment) -> None:
        """Show a segment's views to the teacher again, in the batches of then."""
        from kdcache.jobs import Missing, RecordedTarget

        from .verification.recompute import targets_of_layer

        layer = self.cache.layer(segment.teacher)
        records = self.cache.views.get(segment.shard, [])
        if not records:
            raise CorruptError(f"shard {segment.shard}: its views could not be mended, and targets need them")
        made = segment.document.provenance if segment.document is not None else self._made_like(segment)
        teacher = self._teacher(segment.teacher, made.get("device"))
        recorded: dict[str, RecordedTarget] = {}
        for name, target in targets_of_layer(teacher, layer, segment.targets).items():
            card, encoding = layer.targets[name], self.cache.encoding(segment.teacher, name)
            calibration = encoding.calibration if card.identity.calibration is not None else None
            recorded[name] = RecordedTarget(target=target, card=card, encoding=encoding, calibration=calibration)
        source = self.cache.source(segment.shard)
        stores = self.cache.plan.stored_views is not None
        index = index_of_stored(self.cache, source) if stores and not os.path.exists(source.path) else scan_shard(source)
        check_same_tar(index, records[0].identity)
        views = segment.views.numbers
        digests = {view: self.cache.read_pixel_digests(segment.shard, view, np.arange(records[0].identity.rows)) for view in views}
        missing = Missing(views=(), segments=((segment.targets, segment.views),))
        with _threads(made):
            batch_size = self.config.batch_size or int(made.get("batch_size", 64))
            document = self._do(
                segment, index, missing, records[0], recorded, digests, batch_size=batch_size, stored=frozenset(views if stores else ())
            )
        self._settle(segment, document)

    def _made_like(self, segment: Segment) -> Mapping[str, Any]:
        """How the teacher's other segments were made."""
        records = [record for one in self.cache.layer(segment.teacher).records.values() for record in one]
        return records[0].provenance if records else {}

    def _do(
        self,
        segment: Segment,
        index: ShardIndex,
        missing: Missing,
        known: Document[Any] | None,
        targets: Mapping[str, RecordedTarget],
        known_digests: Mapping[int, Any],
        *,
        batch_size: int,
        stored: frozenset[int] = frozenset(),
    ) -> Document[Any]:
        """Make a segment in a spool; the record that is there then, beside its group."""
        import torch

        from kdcache.jobs import ShardJob
        from kdcache.rendering import FailedTask, rendered_blocks, samples_per_task

        plan, pool = self.cache.plan, ChunkPool(num_threads=min(4, available_cores()))
        teacher = self._teachers.get(segment.teacher)
        self._drop_spool()
        self._spool = self.store.new_spool(f"repair/{segment.shard}")
        job = ShardJob(
            index=index, missing=missing, targets=targets, plan=plan, store=LocalStore(self._made), pool=pool, batch_size=batch_size,
            known=known.identity if known is not None else None, known_digests=known_digests, stored=stored,
        )  # fmt: skip
        try:
            tasks = job.tasks(0, samples_per_task(plan, len(job.rendered_views)))
            workers = self.config.workers if self.config.workers is not None else default_workers(available_cores())
            with contextlib.closing(rendered_blocks(plan, tasks, num_workers=workers, cache=self.cache)) as blocks:
                for block in blocks:
                    if isinstance(block, FailedTask):
                        raise block.error
                    job.add(block, teacher)
            job.finish(teacher)
            provenance = {"device": str(teacher.device), "batch_size": batch_size, "threads": torch.get_num_threads()} if teacher is not None else {}
            digest = self.cache.layer(segment.teacher).document.identity_digest if segment.teacher else None
            result = job.commit(teacher_name=segment.teacher or None, teacher_digest=digest, provenance=provenance)
        finally:
            pool.close()
            job.abandon()
        (document,) = result.documents.values()
        return document

    @property
    def _made(self) -> Path:
        assert self._spool is not None
        return self._spool / "made"

    def _drop_spool(self) -> None:
        if self._spool is not None:
            self.store.drop_spool(self._spool)
            self._spool = None

    def _settle(self, segment: Segment, document: Document[Any]) -> None:
        """Put what was made in the place of what was bad: files alone if the record vouches for them, else the whole segment."""
        old, group = segment.document, group_path(segment.path, document)
        if old is not None and document.identity.group == old.identity.group:
            for name in segment.bad_files:
                self._replace(f"{group}/{name}")
        else:
            for name, expected in document.identity.group.files.items():
                path = f"{group}/{name}"
                if self.store.size(path) is None or list(find_changed(self.store, [(path, expected)])):
                    self._replace(path)
            if old is not None:
                say(
                    f"{'note':>13}  {'':>8}  {segment.words}: came out with other bytes, made on another device or with other versions: replaced as a whole"
                )
                drop_index(self.store)
            self._replace(segment.path)
            self._lost.discard(segment.path)
            if old is not None:
                for name in old.identity.group.files:
                    self.store.delete(f"{group_path(segment.path, old)}/{name}")
            for path, _ in list(self.store.list(f"{group.rpartition('/')[0]}/")):
                if path.startswith(group_prefix(segment)) and path != segment.path and not path.startswith(f"{group}/"):
                    self.store.delete(path)  # what the lost record named
            self._cache = self._with({**self.cache.documents, segment.path: document})
        self._drop_spool()

    def _replace(self, path: str) -> None:
        self.store.delete(path)
        self.store.put_new(path, self._made / path)

    # --- what belongs to a teacher ---

    def _teacher(self, name: str, device: str | None) -> Teacher:
        """The teacher of a layer, on the device of then where this machine has it. Raises MismatchError for another model."""
        from .verification.recompute import load_recorded_teacher

        if name not in self._teachers:
            config = self.config
            model, checkpoint = (config.model, config.checkpoint) if config.teacher in (None, name) else (None, None)
            self._teachers[name] = load_recorded_teacher(
                self.cache.layer(name), model=model, checkpoint=checkpoint, device=config.device or _usable(device)
            )
        return self._teachers[name]

    def _make_calibration(self, teacher_name: str, target: str) -> None:
        """Channel statistics of the views that they were taken over. Raises MismatchError if they come out otherwise."""
        import safetensors.torch

        from kdcache.encodings import TargetShape, build_encoding
        from kdcache.preflight import CALIBRATION_VIEWS, first_views, run_preflight

        from .verification.recompute import targets_of_layer

        layer = self.cache.layer(teacher_name)
        card = layer.targets[target]
        made = card.provenance.get("calibration", {})
        teacher = self._teacher(teacher_name, made.get("device"))
        sources = [self.cache.source(shard) for shard in made.get("shards", [])]
        views, labels, _ = first_views(self.cache.plan, sources, scan_shard, CALIBRATION_VIEWS, self.cache)
        resolved = targets_of_layer(teacher, layer, [target])
        expected = card.identity.calibration
        assert expected is not None
        calibrator = build_encoding(card.identity.kind, card.identity.encoding, TargetShape.of_card(card.identity)).calibrator(target)
        assert calibrator is not None
        with _threads(made):
            batch_size = self.config.batch_size or int(made.get("batch_size", 64))
            found = run_preflight(teacher, list(resolved.values()), {target: calibrator}, views, labels, batch_size=batch_size)
        data, path = safetensors.torch.save(dict(found.statistics[target])), calibration_path(teacher_name, target)
        if blake2b_128(data) != expected.digest:
            raise MismatchError(
                f"target {target!r} of teacher {teacher_name!r}", "calibration", expected=expected.digest, found=blake2b_128(data),
                remedy=f"it was made with {made}: use the same device, batch size and threads, or record the target under another --name",
            )  # fmt: skip
        self.store.delete(path)
        self.store.put_new(path, data)

    def _make_tail(self, teacher_name: str) -> None:
        from kdcache.cards import create_tail, plan_tail
        from kdcache.preflight import TAIL_VIEWS, first_views

        layer = self.cache.layer(teacher_name)
        assert layer.tail is not None
        teacher = self._teacher(teacher_name, None)
        sources = [self.cache.source(shard) for shard in self.cache.shards]
        views, _, _ = first_views(self.cache.plan, sources, scan_shard, TAIL_VIEWS, self.cache)
        plan = plan_tail(self.store, teacher_name, teacher, layer.tail.identity.modules, views)
        create_tail(self.store, teacher_name, plan, teacher, views)


def _usable(device: str | None) -> str | None:
    """The device of then if this machine has it; None for the best there is, whose bytes may come out otherwise."""
    from kdcache.device import resolve_device

    try:
        return str(resolve_device(device)) if device is not None else None
    except UsageError:
        return None


def _threads(made: Mapping[str, Any]) -> AbstractContextManager[None]:
    """As many torch threads as then: they decide the order of sums."""
    from kdcache.device import torch_threads

    return torch_threads(int(made["threads"]) if made.get("threads") else None)
