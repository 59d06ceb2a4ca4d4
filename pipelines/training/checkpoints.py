"""The checkpoints of a run: when one is due, where it goes, and which one a resumed run goes on from. Used by train.

    RUN/last/checkpoint.pt       after every epoch, and within one every --recovery-interval steps
    RUN/previous/checkpoint.pt   the last before that: a run goes on from it if the last is torn
    RUN/best/checkpoint.pt       of the epoch with the best eval_top1

Each is the whole state of the run at one step, so that it does not matter to the result which of them is taken.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdcache.cache import Cache
from kdcache.checkpoint import load_checkpoint, save_checkpoint
from kdcache.console import counted, say
from kdcache.errors import CorruptError, MismatchError, StoreError
from kdcache.store.local import sync_folder

from .recipes import differences

RECOVERY_SECONDS = 600.0
"""Seconds between two checkpoints where --recovery-interval does not say otherwise: what a kill costs at most."""

NAME = "checkpoint.pt"


def can_resume(folder: Path) -> bool:
    """Whether a run's folder has a checkpoint to go on from."""
    return any((folder / place / NAME).is_file() for place in ("last", "previous"))


class RunCheckpoints:
    """Saves and loads the checkpoints of one run's folder."""

    def __init__(self, folder: Path, cache: Cache, *, interval: int | None = None, allow_other_cache: bool = False) -> None:
        """interval: steps between checkpoints within an epoch; 0 for none, None for one every `RECOVERY_SECONDS`."""
        self.last, self.previous, self.best = (folder / place / NAME for place in ("last", "previous", "best"))
        self._cache, self._interval, self._allow_other_cache = cache, interval, allow_other_cache
        self._saved = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether to save after `step` steps of an epoch that has more."""
        if self._interval is None:
            return time.monotonic() - self._saved >= RECOVERY_SECONDS
        return self._interval > 0 and step % self._interval == 0

    def join_in(self) -> None:
        """Another run of the gang saves at the next step: so does this one, if it saves by the clock, and both go on from there after a kill."""
        self._saved = float("-inf")

    def save(self, state: Mapping[str, Any]) -> None:
        """Make `state` the last checkpoint, and the last the previous. Raises StoreError, with both as they were."""
        self._save(self.last, state, previous=self.previous)
        self._saved = time.monotonic()

    def save_best(self, state: Mapping[str, Any]) -> None:
        """Replace the best checkpoint. Raises StoreError, with the one before as it was."""
        self._save(self.best, state)

    def _save(self, path: Path, state: Mapping[str, Any], **options: Any) -> None:
        cache = self._cache
        save_checkpoint(path, {**state, "plan": cache.plan.to_json()}, fingerprint=cache.fingerprint, root=cache.root, **options)

    def load(self) -> dict[str, Any] | None:
        """The state to go on from, None if nothing was saved yet: the last checkpoint's, or the previous one's if the last is torn, which is said.

        Raises CorruptError if neither can be used, MismatchError for one that was trained on another cache, unless that is allowed.
        """
        damage: CorruptError | None = None
        for path in (self.last, self.previous):
            if not path.is_file():
                continue
            try:
                state = load_checkpoint(path)
            except CorruptError as error:
                damage = damage or error
                continue
            self._check_cache(path, state)
            if damage is not None:
                say(f"{damage}\ngoing on from {path} instead: {describe(state)}")
                _remove(self.last)  # or the next save would make it the previous one
            elif path == self.previous:
                say(f"no {self.last}: going on from {path}, {describe(state)}")
            return state
        if damage is not None:
            raise damage
        return None

    def _check_cache(self, path: Path, state: Mapping[str, Any]) -> None:
        if state["fingerprint"] == self._cache.fingerprint:
            return
        changed = describe_plan_differences(state.get("plan"), self._cache)
        if not self._allow_other_cache:
            raise MismatchError(
                f"checkpoint {path}",
                "fingerprint",
                expected=self._cache.fingerprint,
                found=state["fingerprint"],
                remedy=f"{changed}train against the cache it was begun with, or pass --allow-other-cache to go on with this one, or another --out",
            )
        say(f"{path} was trained on cache {state['fingerprint']}, goes on with {self._cache.fingerprint}; {changed.removesuffix('; ')}")

    def load_last(self) -> dict[str, Any]:
        """The last state. Raises CorruptError if it is torn or gone."""
        return load_checkpoint(self.last)

    def load_best(self) -> dict[str, Any]:
        """The state after the best epoch; if that is torn, the better one of the last two, which is said. Raises CorruptError if none can be used."""
        try:
            return load_checkpoint(self.best)
        except CorruptError as error:
            damage = error
        found: list[tuple[float, Path, dict[str, Any]]] = []
        for path in (self.last, self.previous):
            with contextlib.suppress(CorruptError):
                state = load_checkpoint(path)
                if state.get("step", 0) == 0 and "eval_top1" in state["history"][-1]:
                    found.append((state["history"][-1]["eval_top1"], path, state))
        if not found:
            raise damage
        top1, path, state = max(found, key=lambda candidate: candidate[0])
        best = max(row["eval_top1"] for row in state["history"] if "eval_top1" in row)
        say(f"{damage}\nexporting {path} instead, {describe(state)}: top-1 {top1:.2f} %, the best was {best:.2f} %")
        return state

    def remove_debris(self) -> None:
        """Remove what a save that was killed has left."""
        for place in (self.last, self.best):
            for file in place.parent.glob(".checkpoint-*.tmp"):
                _remove(file)


def describe(state: Mapping[str, Any]) -> str:
    """Where in its run a checkpoint is, for messages: 'epoch 3, step 120' is after that many of each."""
    return f"after {counted(state['epoch'], 'epoch')}" + (f" and {counted(state['step'], 'step')}" if state.get("step") else "")


def describe_plan_differences(plan: Mapping[str, Any] | None, cache: Cache) -> str:
    """'its views differ in policy.hflip (0.5 there, 0.0 here)…; ', or '' if the other plan is not known."""
    if plan is None:
        return ""
    found = [f"{name.removeprefix('.')} ({theirs!r} there, {ours!r} here)" for name, theirs, ours in differences(plan, cache.plan.to_json(), ".")]
    if not found:
        return ""
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return f"the views differ in {', '.join(found[:5])}{more}; "


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
        if path.parent.is_dir():
            sync_folder(path.parent)
    except OSError as error:
        raise StoreError(f"{path}: can't be removed: {os.strerror(error.errno or 0)}") from error
