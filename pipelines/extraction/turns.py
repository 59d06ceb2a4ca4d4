"""Which shard is done next by one of several processes that extract into a cache. Used by extract only.

Nobody is told who does what: a process shows the label of its shard while it works (`kdcache.store`), passes over those that others show,
and comes back to them. A label is a hint: what decides is the record, which exists once whoever made it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from kdcache.launch import Launch, shard_order
from kdcache.shards import ShardSource
from kdcache.store import Store

POLL_S = 0.2
"""Between looks at the shards that other processes are doing."""
MIN_PATIENCE_S = 30.0
"""How long such a shard is waited for at least, before it is done twice."""


class Turns:
    """The shards that are still to be done: first those of this rank, then what others left."""

    def __init__(self, store: Store, sources: Sequence[ShardSource], pending: Sequence[ShardSource], launch: Launch, *, teacher_name: str) -> None:
        """sources: all shards asked for, the same for every rank. pending: those of them that lack something."""
        self._store, self._teacher_name = store, teacher_name
        names = {source.name for source in pending}
        self.remaining = [source for source in shard_order(sources, launch) if source.name in names]
        self.own = self.remaining[: sum(source.name in names for source in sources[launch.rank :: launch.world_size])]
        """With which this rank begins."""
        self._number = 0
        self._started: dict[int, float] = {}
        self._patience_s = MIN_PATIENCE_S

    def label(self, source: ShardSource) -> str:
        """What a process shows while it does this shard."""
        return f"{self._teacher_name}/{source.name}"

    def take(self, insist: str, was_done_meanwhile: Callable[[str], bool]) -> Iterator[tuple[int, ShardSource]]:
        """(a number for its job, shard) of every remaining shard that is not done meanwhile and that no other process is doing now.

        Those that others are doing stay in `remaining`. insist: the name of one to do in any case.
        """
        remaining, self.remaining = self.remaining, []
        for source in remaining:
            if source.name != insist and self.label(source) in self._store.live_labels():
                self.remaining.append(source)
                continue
            if was_done_meanwhile(source.name):
                continue
            self._number += 1
            self._started[self._number] = time.monotonic()
            yield self._number, source

    def wait(self) -> str:
        """Wait for the remaining shards, which other processes are doing; '' when one of them was finished or given up.

        A hint must not stop the work: after twice the time that this rank's slowest shard took, the name of one to do all the same.
        """
        waited_for = {self.label(source) for source in self.remaining}
        deadline = time.monotonic() + self._patience_s
        while time.monotonic() < deadline:
            if waited_for - self._store.live_labels():
                return ""
            time.sleep(POLL_S)
        return self.remaining[0].name

    def done(self, number: int) -> None:
        """A shard is committed."""
        self._patience_s = max(self._patience_s, 2 * (time.monotonic() - self._started.pop(number)))

    def failed(self, number: int) -> None:
        """A shard can't be done; its time says nothing."""
        del self._started[number]
