"""Where a run's figures go while it trains: metrics.jsonl and summary.csv always, TensorBoard and Weights & Biases if asked. Used by train.

A line is a dict of figures: of one step, with "step", or of a whole epoch. Lines are written before the checkpoint that follows them, and a
resumed run drops those that came after its checkpoint: it writes them again. So no line is missing and none is there twice.

metrics.jsonl is the record; the others can be written again from it. W&B's process may lose what it was given when the run is killed, and a
run may be watched from its resumption only: what they lack of the lines before is given to them then.

TensorBoard and W&B count updates from the run's beginning: step k of epoch e is e × steps + k, whole epoch e is (e + 1) × steps.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any, Protocol

from kdcache.errors import StoreError, UsageError

Line = Mapping[str, Any]


def check_watchers(*, tensorboard: bool, wandb: bool) -> None:
    """Raise UsageError for one that is asked for and not installed, before anything is trained."""
    if tensorboard:
        _import("torch.utils.tensorboard", option="--log-tensorboard", extra="tensorboard")
    if wandb:
        _import("wandb", option="--log-wandb", extra="wandb")


def _import(module: str, *, option: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"{option}: {extra} can't be imported ({error}); install it: pip install 'kdcache[{extra}]'") from error


Listener = Callable[[str, Line], None]
"""Is told a run's id and each line of it."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def telling(listener: Listener) -> Iterator[None]:
    """Within, every run that begins tells `listener` its lines too: how a process that trains for another one reports."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class Watcher(Protocol):
    """Takes lines."""

    def write(self, line: Line, updates: int) -> None:
        """updates: done when the line was measured."""

    def flush(self) -> None:
        """Make what was written outlive a kill: a checkpoint follows."""

    def close(self, *, failed: bool) -> None:
        """Write no more."""


class Watch:
    """All watchers of one run. Close it when done."""

    def __init__(
        self,
        folder: Path,
        *,
        run_id: str,
        recipe: Mapping[str, Any],
        steps: int,
        epoch: int,
        step: int,
        tensorboard: bool = False,
        wandb_project: str | None = None,
    ) -> None:
        """steps: of an epoch. epoch, step: where the run begins or goes on: what was written after that is dropped.

        wandb_project: None for no W&B.
        """
        self._steps = steps
        file = _MetricsFile(folder / "metrics.jsonl", epoch=epoch, step=step)
        self._watchers: list[Watcher] = [file]
        if (listener := _listener.get()) is not None:
            self._watchers.append(_Teller(listener, run_id))
        try:
            if tensorboard:
                self._begin(_TensorBoard(folder / "tensorboard", updates=epoch * steps + step), file.kept)
            if wandb_project is not None:
                self._begin(_WandB(folder, project=wandb_project, run_id=run_id, recipe=recipe), file.kept)
        except BaseException:
            self.close(failed=True)
            raise

    def _begin(self, watcher: _TensorBoard | _WandB, kept: Sequence[Line]) -> None:
        self._watchers.append(watcher)
        for line in kept:
            if (updates := self._updates(line)) >= watcher.lacks_from:
                watcher.write(line, updates)

    def _updates(self, line: Line) -> int:
        return int(line["epoch"] * self._steps + line.get("step", self._steps))

    def write(self, line: Line) -> None:
        """A line with "epoch", and "step", counted from 1, if it is of one step. Raises StoreError."""
        updates = self._updates(line)
        for watcher in self._watchers:
            watcher.write(line, updates)

    def flush(self) -> None:
        """Before a checkpoint. Raises StoreError."""
        for watcher in self._watchers:
            watcher.flush()

    def close(self, *, failed: bool = False) -> None:
        """failed: the run ends before its last epoch."""
        for watcher in self._watchers:
            watcher.close(failed=failed)


class _MetricsFile:
    def __init__(self, path: Path, *, epoch: int, step: int) -> None:
        self._path = path
        self.kept: list[Line] = []
        if path.is_file():
            self.kept = [line for line in read_lines(path) if _is_before(line, epoch, step)]
            replace_file(path, "".join(json.dumps(line) + "\n" for line in self.kept))
        self._file: IO[str] = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by `close`

    def write(self, line: Line, updates: int) -> None:
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise _cannot_write(self._path, error) from error

    def flush(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _cannot_write(self._path, error) from error

    def close(self, *, failed: bool) -> None:
        try:
            self._file.close()
        except OSError as error:  # the rest of a line that did not fit
            if not failed:
                raise _cannot_write(self._path, error) from error


class _Teller:
    def __init__(self, listener: Listener, run_id: str) -> None:
        self._listener, self._run_id = listener, run_id

    def write(self, line: Line, updates: int) -> None:
        self._listener(self._run_id, line)

    def flush(self) -> None:
        """Nothing is kept."""

    def close(self, *, failed: bool) -> None:
        """Nothing is open."""


def _is_before(line: Line, epoch: int, step: int) -> bool:
    """Whether a line was written before the checkpoint at a step of an epoch."""
    return bool(line["epoch"] < epoch or (line["epoch"] == epoch and line.get("step", step + 1) <= step))


class _TensorBoard:
    """Event files; `purge_step` tells TensorBoard to forget what the files before them say of later steps."""

    def __init__(self, folder: Path, *, updates: int) -> None:
        self.lacks_from = updates + 1 if folder.is_dir() else 0
        """The first update whose lines are not there."""
        writer = _import("torch.utils.tensorboard", option="--log-tensorboard", extra="tensorboard").SummaryWriter
        try:
            self._writer = writer(str(folder), purge_step=self.lacks_from or None)
        except OSError as error:
            raise _cannot_write(folder, error) from error

    def write(self, line: Line, updates: int) -> None:
        for name, value in _curves(line).items():
            self._writer.add_scalar(name, value, updates)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _WandB:
    """A W&B run under the run's id: a resumed one goes on with the same curves. WANDB_MODE=offline keeps it on this disk, in RUN/wandb, where
    the newest folder has the whole curves."""

    def __init__(self, folder: Path, *, project: str, run_id: str, recipe: Mapping[str, Any]) -> None:
        wandb = _import("wandb", option="--log-wandb", extra="wandb")
        try:
            self._run = wandb.init(
                project=project, id=run_id, name=run_id, dir=str(folder), config=dict(recipe), resume="allow",
                reinit="create_new",  # beside others of a gang: the default ends the run before
            )  # fmt: skip
        except wandb.Error as error:
            raise UsageError(f"--log-wandb: {error}; WANDB_MODE=offline needs no account and no network") from error
        self.lacks_from = int(self._run.starting_step)
        """The first update that its server lacks; lines before are there already, the same."""

    def write(self, line: Line, updates: int) -> None:
        if updates >= self.lacks_from:  # else W&B drops it, with a warning each
            self._run.log({"epoch": line["epoch"], **_curves(line)}, step=updates)

    def flush(self) -> None:
        """Its own process has it."""

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _curves(line: Line) -> dict[str, float]:
    """Curve → value: 'step/loss' of a step, 'train/loss' and 'eval/top1' of an epoch."""
    if "step" in line:
        return {f"step/{name}": value for name, value in line.items() if name not in ("epoch", "step")}
    curves = {name.replace("_", "/", 1): value for name, value in line.items() if name.startswith(("train_", "eval_"))}
    rate = {"epoch/images_per_second": line["images"] / line["seconds"]} if line["seconds"] else {}
    return {**curves, "epoch/lr": line["lr"], **rate}


def write_summary(path: Path, history: Sequence[Line]) -> None:
    """summary.csv: one row an epoch; those that were not measured leave eval_* empty. Raises StoreError."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=max((list(row) for row in history), key=len), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    replace_file(path, text.getvalue())


def replace_file(path: Path, text: str) -> None:
    """Replace a text file whole. Raises StoreError, with the file as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> StoreError:
    return StoreError(f"{path}: can't be written: {error.strerror or error}; the last checkpoint is whole, run again with --resume")


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a metrics.jsonl, without what is none: a kill may leave half of the last one, a loss of power zeros after the last checkpoint's."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text) if text.endswith("\n") else None
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("epoch"), int):
                yield line
