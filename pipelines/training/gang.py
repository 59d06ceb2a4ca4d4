"""One process, one loader, several students: each batch is read, rendered, moved and decoded once, and every student takes its step on it. Used by
train, for which a run alone is a gang of one.

* Runs that train on the same stream of batches may be in one gang (`gangs_of`). The loader reads what any of its members wants; each sees what it
  would see alone (`shared_batch`).
* A member owns all that decides its result: weights, optimizer, schedule, average, generators, its place in its epochs, its files. Its generators
  and its number of threads are put in place for its turn, so that its bits are those of a run alone.
* Members that see validation images alike share the processes that load them.
* The stream begins where the least advanced member is; those that are ahead wait for it. So members killed at different steps, new ones and ones
  that failed before go on together.
* What goes wrong in a member's turn ends that member (`Gang._in_turn`); what goes wrong in the loader ends the gang, and every member's checkpoints
  are kept.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch

from kdcache.console import ProgressBar, say
from kdcache.device import fitting_threads, generator_states, release_memory, set_generator_states
from kdcache.errors import KDCacheError, StoreError, StudentError
from kdcache.evaluate import Evaluator
from kdcache.interrupt import Stopped, finishing_first, stop, stopping_together
from kdcache.join import Batch, BatchLoader, CachedViews
from kdcache.workers import is_killed_worker, naming_killed_workers

from .loop import StudentLoop
from .run import Run, describe_error
from .shared_batch import Portion, SharedBatch, dataset_of, union
from .watching import replace_file

ERROR_FILE = "error.txt"
"""In the folder of a run that an error ended: the error in its first line, when and where, the traceback."""


# --- who trains with whom --------------------------------------------------------------------------------------------


def gangs_of(runs: Sequence[Run], size: int) -> list[list[Run]]:
    """The runs in gangs of at most `size`: each in the first that trains on the same stream of batches and has a place. Order is kept.

    Finished runs are by themselves, and so is one that is there twice: the second is finished, or failed, by its turn. Says on stderr why runs
    are kept apart.
    """
    gangs: list[list[Run]] = []
    open_gangs: list[tuple[dict[str, Any], list[Run]]] = []
    for run in runs:
        if run.is_finished or any(run.folder == other.folder for gang in gangs for other in gang):
            gangs.append([run])
            continue
        stream = stream_of(run)
        gang = next((gang for other, gang in open_gangs if len(gang) < size and other == stream), None)
        if gang is None:
            gang = []
            gangs.append(gang)
            open_gangs.append((stream, gang))
        gang.append(run)
    if size > 1:
        _say_gangs(open_gangs)
    return gangs


def stream_of(run: Run) -> dict[str, Any]:
    """Option → value of all that decides the batches of a run, their order, and what loads them: two runs may share a loader if these are equal."""
    config, data = run.config, run.data
    return {
        "CACHE": data.cache.store.url,
        "--data": config.data,
        "--limit-shards": len(data.shards),  # the first so many in name order
        "--views": data.num_views,
        "--batch-size": config.batch_size,
        "--grad-accum-steps": config.grad_accum_steps,
        "--seed": config.seed,
        "--shuffle": "block" if data.blocks is not None else "full",
        "--check-views": config.check_views,
        "--workers": config.num_workers,
        "--prefetch-bytes": config.prefetch_bytes,
        "--device": str(run.processes.device(config.device)),
    }


_WHY = {"--seed": ", and the seed orders the rows", "--views": ", of all that each learns from"}
"""Of fields that do not speak for themselves: why they keep runs apart."""


def _say_gangs(gangs: Sequence[tuple[Mapping[str, Any], Sequence[Run]]]) -> None:
    """Who is in which gang, what keeps a gang from joining the first (fields with both values), and whether any loader is shared at all.

    gangs: (stream, runs) of each.
    """
    if len(gangs) < 2:
        return
    first, _ = gangs[0]
    lines = []
    for number, (stream, runs) in enumerate(gangs, 1):
        reasons = [f"{name} {value!r}, not {first[name]!r}{_WHY.get(name, '')}" for name, value in stream.items() if value != first[name]]
        why = f" (apart from gang 1: {'; '.join(reasons)})" if reasons else " (gang 1 is full)" if number > 1 else ""
        lines.append(f"gang {number} of {len(gangs)}: {', '.join(run.id for run in runs)}{why}")
    if all(len(runs) == 1 for _, runs in gangs):
        lines.append("no two of these runs train on the same batches in the same order: each loads for itself, and --gang gains nothing")
    say("\n".join(lines))


# --- one student of a gang -------------------------------------------------------------------------------------------


class _Member:
    """A run in its gang: its loop, what it takes of a batch, and the state of this process that is its own."""

    def __init__(self, run: Run, loop: StudentLoop) -> None:
        """After `run.begin()`, with the generators as that left them."""
        self.run, self.loop = run, loop
        self.portion = portion_of(loop)
        with fitting_threads(loop.method, loop.device):
            self._threads = torch.get_num_threads()
        self._generators = generator_states(loop.device)
        self.losses: Mapping[str, float] = {}
        """Of its last step."""

    @property
    def place(self) -> tuple[int, int]:
        """(epoch, steps of it that are done): the batch that it wants next."""
        return self.loop.epoch, self.loop.step

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Within, torch's generators and threads are this member's."""
        threads = torch.get_num_threads()
        if threads != self._threads:
            torch.set_num_threads(self._threads)
        try:
            set_generator_states(self._generators, self.loop.device)
            try:
                yield
            finally:
                self._generators = generator_states(self.loop.device)
        finally:
            if threads != self._threads:
                torch.set_num_threads(threads)

    def clear(self) -> None:
        """Let go of all that takes memory, whoever still holds this member."""
        del self.loop, self.portion, self._generators

    def train_step(self, batch: SharedBatch) -> None:
        inputs = batch.inputs(self.portion)  # not in its own time: it is made for all
        with self.loop.own:
            self.losses = self.loop.train_step(inputs) or {}

    def end_epoch(self) -> None:
        with self.loop.own:
            self.loop.end_epoch()


def portion_of(loop: StudentLoop) -> Portion:
    """Raises what the dataset of a run alone raises: UsageError for parts of a target that is not there."""
    data, method, student = loop.data, loop.method, loop.student
    teacher = next(iter(data.teachers), None)  # of several each target says whose it is
    alone = CachedViews(data.cache, teacher=teacher, targets=tuple(loop.encodings), parts=method.target_parts())
    is_mixed = data.cache.plan.policy.mix is not None and method.needs_labels_with(method.settings)
    return Portion(
        normalize=loop.normalize,
        mean_std=(tuple(student.mean), tuple(student.std)),
        memory_format=loop.memory_format,
        soft_classes=data.num_classes if is_mixed else None,
        names=alone.targets,
        components=alone.components,
        encodings=loop.encodings,
    )


# --- the gang --------------------------------------------------------------------------------------------------------


class Gang:
    """Trains runs that have one `stream_of` on it: `train`, once."""

    def __init__(self, runs: Sequence[Run], *, isolate: bool, progress: bool) -> None:
        """isolate: whether a member's error ends that member only, or is raised. progress: a bar on stderr."""
        self._runs, self._isolate = runs, isolate
        self._processes = runs[0].processes
        self._device = self._processes.device(runs[0].config.device)
        self._left = list(runs)
        """Those that have not ended."""
        self._members: list[_Member] = []
        """Those of them that train."""
        self._ended: list[dict[str, Any]] = []
        """Entries of those that ended since the last were handed on."""
        self._evaluators: dict[Any, Evaluator] = {}
        self._bar = _Bar(runs, enabled=progress and self._processes.is_first)

    def train(self) -> Iterator[dict[str, Any]]:
        """The report's entry of each run as soon as it ends. Raises KDCacheError of the loader after the entries of all whom it ended."""
        try:
            with naming_killed_workers(), self._processes.naming_lost():
                for run in self._runs:
                    self._begin(run)
                    yield from self._hand_on()
                with stopping_together(is_first=self._processes.is_first) if self._processes.world > 1 else nullcontext():
                    yield from self._feed()
                    self._processes.stop_if_asked()
        except KDCacheError as error:
            for run in list(self._left):
                self._end(run, error)
            yield from self._hand_on()
            raise
        except Stopped as stopped:  # between two turns, or while one is measured
            for member in self._members if self._processes.world == 1 or stopped.is_agreed else ():
                try:
                    with member.turn():
                        member.loop.save_if_behind()
                except KDCacheError as error:  # the others are saved all the same
                    say(f"run {member.run.id}: not saved: {error}")
            raise
        finally:
            with ExitStack() as stack:
                for run in self._runs:
                    stack.callback(run.release)
                for evaluator in self._evaluators.values():
                    stack.callback(evaluator.close)
                stack.callback(self._bar.close)
                for member in self._members:
                    stack.callback(member.loop.close)

    def _hand_on(self) -> Iterator[dict[str, Any]]:
        ended, self._ended = self._ended, []
        yield from ended

    # --- the course of its members ---

    def _begin(self, run: Run) -> None:
        """Build a member, and put it where its last checkpoint left it."""

        def begin() -> None:
            if not run.claim():
                self._ended.append(run.already_done())
                self._forget(run)
                return
            loop = run.begin()
            loop.evaluator = self._shared_evaluator(run, loop)
            member = _Member(run, loop)
            loop.begin()
            (run.folder / ERROR_FILE).unlink(missing_ok=True)
            self._members.append(member)

        if self._in_turn(run, begin) and run.loop is not None and run.loop.is_done:
            self._finish(self._members[-1])

    def _finish(self, member: _Member) -> None:
        """Export a member that has no epoch left."""
        run = member.run

        def finish() -> None:
            member.loop.close()
            self._ended.append(run.finish())

        if self._in_turn(run, finish):
            self._forget(run)

    def _in_turn(self, run: Run, action: Callable[[], None]) -> bool:
        """Let a member act; False if that failed, and ended it.

        The one place where every exception is caught, because isolation is just that: a method or a model of anyone's, a full disk, a full device or
        a damaged checkpoint may raise anything, and the students beside it have nothing to do with it. Left alone are what ends the process, and a
        killed worker, whose signal torch raises in whoever's turn it is.
        """
        member = next((member for member in self._members if member.run is run), None)
        try:
            with member.turn() if member is not None else nullcontext():
                action()
        except Exception as error:
            if not self._isolate and isinstance(error, torch.OutOfMemoryError):
                reason = str(error).splitlines()[0].rstrip(".")
                raise StudentError(
                    f"student {run.student_name}: {reason}; try a smaller --batch-size with more --grad-accum-steps, or --amp; run {run.folder}"
                    f" keeps its last checkpoint"
                ) from error
            if not self._isolate or is_killed_worker(error):
                raise
            self._end(run, error)
            say(f"run {run.id} failed, the others go on: {describe_error(error)}")
        else:
            return True
        self._release()  # here, where the traceback no longer holds the frames that hold its tensors
        return False

    def _end(self, run: Run, error: Exception) -> None:
        """Leave a record of what ended a run, and forget it."""
        self._ended.append(run.failed(error))
        if run.is_claimed:  # else its folder is another process's
            _write_record(run, error)
        if run.loop is not None:
            with suppress(Exception):  # the disk may be what failed: the first error is the one that counts
                run.loop.close()
        self._forget(run)

    def _forget(self, run: Run) -> None:
        """Drop what holds its memory."""
        for member in [member for member in self._members if member.run is run]:
            self._members.remove(member)
            member.clear()
        self._left.remove(run)
        run.release()
        run.loop = None
        self._release()

    def _release(self) -> None:
        gc.collect()  # an optimizer and its schedule hold each other
        release_memory(self._device)

    # --- its batches ---

    def _feed(self) -> Iterator[dict[str, Any]]:
        """The batches of all epochs that are left."""
        wanted: dict[str, tuple[str, ...]] | None = None
        loader: BatchLoader | None = None
        try:
            while self._members:
                reads = union([member.portion for member in self._members])
                if loader is None or reads != wanted:  # at first, and where those who wanted more have ended
                    if loader is not None:
                        loader.close()
                    wanted, loader = reads, self._loader(reads)
                yield from self._feed_epoch(loader, *min(member.place for member in self._members))
        finally:
            if loader is not None:
                loader.close()

    def _loader(self, reads: Mapping[str, tuple[str, ...]]) -> BatchLoader:
        loop, config = self._members[0].loop, self._members[0].loop.config  # any: they agree in all of this
        dataset = dataset_of(loop.data.cache, reads, check_views=config.check_views)
        pinned, ahead = self._device.type == "cuda", config.prefetch_bytes
        loader = BatchLoader(dataset, loop.batches, num_workers=config.num_workers, pin_memory=pinned, prefetch_bytes=ahead)
        if loader.num_workers < config.num_workers:
            say(f"{loader.num_workers} of {config.num_workers} workers: --prefetch-bytes {ahead} holds no more batches")
        return loader

    def _feed_epoch(self, loader: BatchLoader, epoch: int, start: int) -> Iterator[dict[str, Any]]:
        """The batches of an epoch from its step `start`, for members that want them; ends early where none wants the next one."""
        step, batches = start, list[Batch]()
        for batch in loader.epoch(epoch, start=start, until=max(member.loop.config.epochs for member in self._members)):
            batches.append(batch)
            if len(batches) < self._runs[0].config.grad_accum_steps:
                continue
            here = [member for member in self._members if member.place == (epoch, step)]
            self._bar.move(epoch, step, len(loader), loader.step_size)
            step += 1
            self._save_together(here, step)
            self._update(here, batches)
            batches = []
            self._bar.update()
            yield from self._hand_on()
            if any(member.loop.is_stopping for member in self._members):
                raise stop()
            if not self._members or min(member.place for member in self._members) > (epoch, step):
                return
        for member in [member for member in self._members if member.place == (epoch, step)]:
            if self._in_turn(member.run, member.end_epoch):
                self._bar.note_top1(member.run, member.loop.history)
                if member.loop.is_done:
                    self._finish(member)
            yield from self._hand_on()

    @finishing_first()
    def _update(self, members: Sequence[_Member], batches: Sequence[Batch]) -> None:
        """A step of each on these: one batch, or as many as are accumulated. A signal waits for its end."""
        for batch in batches:
            shared = SharedBatch(batch, self._device)
            for member in [member for member in members if member in self._members]:
                if self._in_turn(member.run, partial(member.train_step, shared)) and member.losses:
                    self._bar.note(member.run, member.losses)

    @staticmethod
    def _save_together(here: Sequence[_Member], step: int) -> None:
        """Where one is to save after this step, all who save by the clock do: killed, they go on together."""
        checkpoints = [member.loop.checkpoints for member in here]
        if any(one.is_due(step) for one in checkpoints):
            for one in checkpoints:
                one.join_in()

    def _shared_evaluator(self, run: Run, loop: StudentLoop) -> Evaluator | None:
        """The evaluator of a member before it that sees validation images as this one does, with its worker processes; else its own."""
        if loop.evaluator is None:
            return None
        student = loop.student
        crop_pct = student.crop_pct if run.config.val_crop_pct is None else run.config.val_crop_pct
        transform = (student.input_size, student.interpolation, student.mean, student.std, crop_pct, student.crop_mode)
        tars = tuple((index.source.path, index.member_table) for index in run.data.val)
        labels = (run.config.label_key, run.data.num_classes)
        return self._evaluators.setdefault((transform, tars, labels), loop.evaluator)


def _write_record(run: Run, error: Exception) -> None:
    """error.txt in the run's folder, which is made if it is not there; where the disk refuses even that, it is said."""
    loop = run.loop
    where = (
        f"epoch {loop.epoch + 1} of {loop.config.epochs}, after {loop.step} of its {len(loop.batches)} steps"
        if loop is not None
        else "at its beginning"
    )
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    text = "".join([f"{type(error).__name__}: {error}\n\n", f"{when}, {where}\n\n", *traceback.format_exception(error)])
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        replace_file(run.folder / ERROR_FILE, text)
    except (OSError, StoreError) as problem:
        say(f"run {run.id}: no record of its error could be left: {problem}")


class _Bar:
    """Progress of the stream on stderr: one bar, however many students. img/s are views that were loaded."""

    def __init__(self, runs: Sequence[Run], *, enabled: bool) -> None:
        self._runs, self._enabled = runs, enabled
        self._names = _short_names(runs)
        self._epochs = max(run.config.epochs for run in runs)
        self._shown: dict[str, dict[str, str]] = {run.id: {} for run in runs}
        self._top1: dict[str, str] = {}
        self._bar: ProgressBar | None = None
        self._images = self._epoch = 0

    def move(self, epoch: int, step: int, steps: int, images: int) -> None:
        """To the batch at this step of an epoch of `steps`, which has `images`: others than the next were taken before the last kill."""
        place = (epoch * steps + step) * images
        if self._bar is None:
            desc = self._runs[0].id if len(self._runs) == 1 else f"gang of {len(self._runs)}"
            total = self._epochs * steps * images
            self._bar = ProgressBar(total=total, initial=place, unit="img", unit_scale=True, desc=desc, disable=not self._enabled)
            for run in self._runs:
                if run.loop is not None:
                    self.note_top1(run, run.loop.history)
        elif self._enabled and place > self._bar.n:
            self._bar.initial += place - self._bar.n  # not counted as done in the time that passed
            self._bar.n = place
        self._epoch, self._images = epoch, images

    def note(self, run: Run, losses: Mapping[str, float]) -> None:
        """A member's step."""
        self._shown[run.id] = {name: f"{value:.3f}" for name, value in losses.items()}

    def note_top1(self, run: Run, history: Sequence[Mapping[str, Any]]) -> None:
        """A member's last measurement."""
        measured = [row["eval_top1"] for row in history if "eval_top1" in row]
        if measured:
            self._top1[run.id] = f"{measured[-1]:.2f}"

    def update(self) -> None:
        """The batch is done: of one student all parts of the loss are shown, of several the loss and the last top-1 of each."""
        if self._bar is None or not self._enabled:
            return
        self._bar.update(self._images)
        shown = {"epoch": f"{self._epoch + 1}/{self._epochs}"}
        for run in self._runs:
            top1 = self._top1.get(run.id)
            if len(self._runs) == 1:
                shown |= self._shown[run.id] | ({"top1": top1} if top1 is not None else {})
            elif run.loop is not None and "loss" in self._shown[run.id]:
                shown[self._names[run.id]] = self._shown[run.id]["loss"] + (f" {top1} %" if top1 is not None else "")
        self._bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _short_names(runs: Sequence[Run]) -> dict[str, str]:
    """Run id → what tells it from the others in a few characters: its student; else its method; else its number."""
    for names in ([run.student_name for run in runs], [run.config.method for run in runs]):
        if len(set(names)) == len(runs):
            return {run.id: name.rpartition("/")[2][:16] for run, name in zip(runs, names, strict=True)}
    return {run.id: str(number) for number, run in enumerate(runs, 1)}
