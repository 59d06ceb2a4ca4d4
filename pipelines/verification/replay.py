"""The pixels of a cache, rendered again from its tars and compared with the digests of what the teacher saw. Needs no teacher and no GPU.

A view that differs has one of three causes, and each needs something else: *corruption* (stored bytes: found by their digests before), *source
drift* (the tar's member table, or the bytes of an image, changed) and *decoder drift* (members and bytes as they were, pixels not).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kdcache import drift
from kdcache.cache import Cache
from kdcache.console import ProgressBar, counted
from kdcache.errors import CacheError, KDCacheError, UsageError
from kdcache.images import Decoded, decode_image, require_decoder
from kdcache.index import rows_of_table
from kdcache.launch import available_cores, default_workers
from kdcache.plan import canonical_json
from kdcache.shards import Sample, ShardFiles, ShardIndex, ShardSource, scan_shard
from kdcache.stored_views import as_stored

from .verdict import MAX_LISTED, Kind, Problem, Verdict

if TYPE_CHECKING:
    from kdcache.rendering import Neighbours, RenderedBlock, RenderTask

MAX_MEASURED = 4
"""Differing views of a shard whose distance is measured."""


def replay(cache: Cache, views: int | Literal["all"], verdict: Verdict, *, workers: int | None, progress: bool) -> None:
    """Render views again from the tars, decode stored ones, and compare params and pixel digests; what differs becomes problems."""
    from kdcache.rendering import FailedTask, rendered_blocks

    plan = _Replay(cache, views, verdict)
    total = sum(plan.count(shard) for shard in cache.shards)
    num_workers = workers if workers is not None else default_workers(available_cores())
    with ProgressBar(total=total, unit="view", desc="verify views", disable=not progress) as bar:
        for block in rendered_blocks(cache.plan, plan.tasks(), num_workers=num_workers, cache=cache):
            if isinstance(block, FailedTask):
                if not plan.is_known_corrupt(block.task):
                    verdict.problems.append(Problem("corrupt" if block.task.stored else "source", block.task.source.name, "", str(block.error)))
            else:
                plan.compare(block)
            bar.update(len(block.task.samples) * len(block.task.views))
    if plan.gone:
        verdict.notes.append(
            f"{len(plan.gone)} of {len(cache.shards)} tars are gone, {plan.gone[0]} is the first: their stored views were compared, not rendered again"
        )
    plan.explain()


def require_decoder_of_tars(cache: Cache) -> None:
    """Raise UsageError, with its cure, if a cache stores its views, has tars to render them again from, and the plan's decoder is not installed."""
    if cache.plan.stored_views is None or cache.plan.decoder == "pillow":
        return
    for shard in cache.shards:
        try:
            source = cache.source(shard)
        except UsageError:  # not among those of --data: told as a problem
            continue
        if os.path.exists(source.path):
            require_decoder(cache.plan.decoder)
            return


def chosen_views(cache: Cache, shard: str, count: int, num_rows: int, views: Sequence[int], *, salt: str = "") -> list[tuple[int, int]]:
    """A sample of `count` (row, view) of a shard that is the same in every run, spread by a hash of the plan."""
    total = num_rows * len(views)
    if total == 0:
        return []
    seed = hashlib.blake2b(canonical_json([cache.fingerprint, shard, *([salt] if salt else [])]), digest_size=16).digest()
    words = np.random.Philox(key=np.frombuffer(seed, "<u8").astype(np.uint64)).random_raw(total)
    chosen = np.sort(np.argsort(words, kind="stable")[:count])
    return [(int(place) // len(views), views[int(place) % len(views)]) for place in chosen]


@dataclass
class _Differing:
    """Views of one shard that were rendered from its tar and differ."""

    source: ShardSource
    count: int = 0
    listed: list[tuple[int, Sample, int, int, int]] = field(default_factory=list)
    """(row, sample, view, expected digest, found digest), up to MAX_LISTED."""


class _Replay:
    """Which views to render again, and what they should be."""

    def __init__(self, cache: Cache, views: int | Literal["all"], verdict: Verdict) -> None:
        self.cache, self.views, self.verdict = cache, views, verdict
        self.gone: list[str] = []
        """Tars that are not there, of a cache that stores its views."""
        self._differing: dict[str, _Differing] = {}
        self._listed: dict[str, int] = {}
        self._unlisted: dict[str, int] = {}
        self._corrupt = {
            problem.shard for problem in verdict.problems if problem.kind in ("corrupt", "missing") and problem.path.startswith("views/")
        }

    def is_known_corrupt(self, task: RenderTask) -> bool:
        """Whether the shard's bytes in the cache are reported already."""
        return task.source.name in self._corrupt

    def count(self, shard: str) -> int:
        every = sum(record.identity.rows * len(record.identity.views) for record in self.cache.views[shard])
        once = every if self.views == "all" else min(every, self.views)
        return 2 * once if self.cache.plan.stored_views is not None else once

    def tasks(self) -> Iterator[Any]:
        """Render tasks, shard after shard; a tar that is gone or was changed becomes a problem instead."""
        from kdcache.rendering import Neighbours

        for shard in self.cache.shards:
            if self.cache.plan.stored_views is not None:
                yield from self._stored_tasks(shard)
            source, index = self._source(shard)
            if source is None or index is None:
                continue
            by_key = {sample.key: (position, sample) for position, sample in enumerate(index.samples)}
            try:
                rows = [by_key[key] for key in self.cache.keys(shard)]
            except KDCacheError as error:
                self.verdict.problems.append(Problem("corrupt", shard, "", str(error)))
                continue
            except KeyError as error:
                self.verdict.problems.append(
                    Problem("plan", shard, "", f"key {error} of the cache is not in the tar, though its member table is the same")
                )
                continue
            neighbours = Neighbours.of(index, self._skipped(shard)) if self.cache.plan.policy.mix is not None else None
            yield from self._cut(source, rows, stored=False, neighbours=neighbours)

    def _skipped(self, shard: str) -> list[int]:
        return [skip.index for skip in self.cache.views[shard][0].identity.skipped]

    def _stored_tasks(self, shard: str) -> Iterator[Any]:
        """Tasks that read the stored views and need no tar."""
        skipped = set(self._skipped(shard))
        positions = [position for position in range(self.cache.views[shard][0].identity.samples) if position not in skipped]
        try:
            rows = [(position, Sample(key, 0, 0, -1, None)) for position, key in zip(positions, self.cache.keys(shard), strict=True)]
        except KDCacheError:  # reported with the bytes
            return
        yield from self._cut(ShardSource(shard, ""), rows, stored=True)

    def _cut(
        self, source: ShardSource, samples: Sequence[tuple[int, Sample]], *, stored: bool, neighbours: Neighbours | None = None
    ) -> Iterator[Any]:
        """A shard's rows, all or a sample of them, as tasks. samples: position in the tar and sample of every row."""
        from kdcache.rendering import RenderTask, samples_per_task

        records = self.cache.views[source.name]
        all_views = tuple(view for record in records for view in record.identity.views.numbers)
        wanted: list[tuple[Sequence[int], tuple[int, ...]]]
        if self.views == "all":
            step = samples_per_task(self.cache.plan, len(all_views))
            wanted = [(range(start, min(start + step, len(samples))), all_views) for start in range(0, len(samples), step)]
        else:
            wanted = [([row], (view,)) for row, view in chosen_views(self.cache, source.name, self.views, len(samples), all_views)]
        for rows, views in wanted:
            chosen = tuple(samples[row] for row in rows)
            yield RenderTask(0, source, chosen, views, False, frozenset(views if stored else ()), tuple(rows), neighbours)

    def _source(self, shard: str) -> tuple[ShardSource | None, ShardIndex | None]:
        record = self.cache.views[shard][0].identity
        try:
            source = self.cache.source(shard)
            if self.cache.plan.stored_views is not None and not os.path.exists(source.path):
                self.gone.append(source.path)
                return None, None
            index = scan_shard(source)
        except KDCacheError as error:
            self.verdict.problems.append(Problem("source", shard, "", f"{error}; pass --data with SHARDS where the tars lie now"))
            return None, None
        if index.member_table != record.member_table:
            try:
                differences = drift.member_differences(self.cache, index)
            except CacheError:  # reported with the bytes
                differences = "which members differ can't be told, since the cache's own list of them is damaged"
            detail = (
                f"source drift: {source.path} is not the tar that the cache was made from: expected member table {record.member_table}, found"
                f" {index.member_table}: {differences}; restore the tar"
            )
            self.verdict.problems.append(Problem("source", shard, "", detail))
            return None, None
        return source, index

    def compare(self, block: RenderedBlock) -> None:
        """A block of views that were rendered or read, against the stored params and digests."""
        task = block.task
        stores = self.cache.plan.stored_views is not None
        shard = task.source.name
        for place, reason in block.reasons.items():
            text = f"source drift: can't be decoded now ({reason}), it could when the cache was made: its bytes or the decoder changed"
            self._problem(shard, task.samples[place][1], text, kind="source" if stores else "pixels")
        for column, view in enumerate(task.views):
            try:
                rows = [self.cache.row_at(shard, task.samples[place][0]) for place in block.kept]
                digests = self.cache.read_pixel_digests(shard, view, rows)
                params = self.cache.read_params(shard, view, rows)
            except CacheError as error:
                if shard not in self._corrupt:
                    self.verdict.problems.append(Problem("corrupt", shard, "", str(error)))
                return
            for i, place in enumerate(block.kept):
                self.verdict.views_replayed += view in task.stored or not stores  # a stored view is counted once
                sample = task.samples[place][1]
                expected, found = int(digests[i]), int(block.digests[i, column])
                if expected != found and view in task.stored:
                    text = f"decoder drift: view {view}: decoded as stored: expected pixel digest {expected:016x}, found {found:016x}"
                    self._problem(shard, sample, f"{text}; the stored bytes are sound; {self._libraries(shard, view)}; {_REMEDY}")
                elif expected != found:
                    self._note_differing(task.source, rows[i], sample, view, expected, found)
                elif view not in task.stored and not np.array_equal(block.params[i, column], params[i].to_row()):
                    self._problem(shard, sample, f"view {view}: the stored params are not those that the plan draws")

    def _note_differing(self, source: ShardSource, row: int, sample: Sample, view: int, expected: int, found: int) -> None:
        differing = self._differing.setdefault(source.name, _Differing(source))
        differing.count += 1
        if len(differing.listed) < MAX_LISTED:
            differing.listed.append((row, sample, view, expected, found))

    # --- why ---

    def explain(self) -> None:
        """Name the cause of what differs, shard by shard, and how far the pixels are where that can be known."""
        kind: Kind = "source" if self.cache.plan.stored_views is not None else "pixels"
        counts: dict[drift.Cause, int] = {}
        for shard, differing in self._differing.items():
            cause, why = self._cause(differing.source)
            counts[cause] = counts.get(cause, 0) + differing.count
            for number, (row, sample, view, expected, found) in enumerate(differing.listed):
                text = f"{cause}: view {view}: rendered again: expected pixel digest {expected:016x}, found {found:016x}; {why}"
                if cause == "decoder drift":
                    text += f"; {self._libraries(shard, view)}"
                if number < MAX_MEASURED:
                    text += f"; {self._how_far(differing.source, row, view, expected)}"
                text += "; training reads what is stored" if kind == "source" else f"; {_REMEDY}" if cause == "decoder drift" else "; restore the tar"
                self._problem(shard, sample, text, kind=kind)
            if differing.count > len(differing.listed):
                self._unlisted[shard] = self._unlisted.get(shard, 0) + differing.count - len(differing.listed)
        for cause, count in counts.items():
            self.verdict.notes.append(f"{cause}: {count} of {self.verdict.views_replayed} compared views differ")
        for shard, more in self._unlisted.items():
            self.verdict.problems.append(Problem(kind, shard, "", f"{counted(more, 'more view')} of this shard differ{'s' if more == 1 else ''}"))

    def _cause(self, source: ShardSource) -> tuple[drift.Cause, str]:
        try:
            changed = drift.images_changed(self.cache, source)
        except KDCacheError as error:
            return "drift", f"whether the images' bytes changed can't be told ({error})"
        if changed is None:
            remembered = self.cache.views[source.name][0].provenance.get("source", {})
            status = os.stat(source.path)
            is_same = (status.st_size, status.st_mtime_ns) == (remembered.get("size"), remembered.get("mtime_ns"))
            hint = (
                "its size and time are those of then: most likely the decoder" if is_same else "its time is not that of then: most likely its images"
            )
            return "drift", f"the image or the decoder changed; the cache has no digest of the images' bytes that would tell which, {hint}"
        if changed:
            return "source drift", f"the bytes of images in {source.path} were changed, names, places and sizes were not"
        return "decoder drift", "the images' bytes are those of then"

    def _libraries(self, shard: str, view: int) -> str:
        document = next((one for one in self.cache.views[shard] if view in one.identity.views), self.cache.views[shard][0])
        return f"rendered with {drift.libraries_then_and_now(document.provenance, self.cache.plan)}"

    def _how_far(self, source: ShardSource, row: int, view: int, expected: int) -> str:
        shard = source.name
        files = ShardFiles()
        places = rows_of_table(self.cache.table_from_group(self.cache.views[shard][0].identity))

        def image_of(number: int) -> Decoded:
            return decode_image(files.read(source, "", int(places[number, 0]), int(places[number, 1])), self.cache.plan.decoder)

        try:
            if self.cache.plan.stored_views is not None:
                (one,) = self.cache.read_replays(shard, view, [row])
                now, _ = as_stored(self.cache.plan, one.render(image_of))
                far = drift.distance_from_stored(self.cache, shard, view, row, now)
                return f"the pixels differ from the stored ones by {far}" if far is not None else "the stored view can't be read"
            named = drift.resizer_of(self.cache, shard, view, row, expected, image_of)
        except (KDCacheError, ValueError) as error:
            return f"how far the pixels are can't be told ({error})"
        finally:
            files.close()
        if named is None:
            return "how far the pixels are can't be told: only their digest is kept, and no resizer that is known here gives it"
        return f"{named[0]} renders what the teacher saw: pixels then and now differ by {named[1]}"

    def _problem(self, shard: str, sample: Sample, detail: str, *, kind: Kind = "pixels") -> None:
        self._listed[shard] = self._listed.get(shard, 0) + 1
        if self._listed[shard] > MAX_LISTED:
            self._unlisted[shard] = self._unlisted.get(shard, 0) + 1
        else:
            self.verdict.problems.append(Problem(kind, shard, sample.key, detail))


_REMEDY = "install the versions of then"
