"""The store interface: the four operations that a cache needs, and the whole contract of an implementation.

* `get_range` and `get` read bytes of one object. A missing object raises MissingError, a short read CorruptError.
* `put_new` creates an object if it is absent, atomically: readers see all of it or nothing, of two writers exactly one
  succeeds. It never overwrites.
* `list` names every object under a prefix with its size. `delete` removes one object; a missing one is no error.
* `hold` keeps those who add and who remove apart; readers ask for no leave.

Paths are relative, '/'-separated, and never leave the cache. Stores are cheap to pickle and safe to use after a fork.
`kdcache.testing.check_store` holds the checks that every implementation must pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from ..errors import StoreError


@dataclass(frozen=True)
class Spool:
    """A folder in which an attempt prepares what it will put."""

    path: str
    size: int
    """Bytes of all that it holds."""
    is_alive: bool
    """Whether its attempt still runs."""


class Store(ABC):
    """A flat namespace of immutable objects."""

    url: str
    """What the user typed, made absolute; for messages."""

    @abstractmethod
    def get_range(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`. Raises MissingError without the object, CorruptError if it is too short."""

    @abstractmethod
    def get(self, path: str, *, max_size: int) -> bytes:
        """The whole object, at most `max_size` bytes. Raises MissingError without it, CorruptError if it is larger."""

    @abstractmethod
    def size(self, path: str) -> int | None:
        """Size in bytes, or None if there is no such object."""

    @abstractmethod
    def put_new(self, path: str, source: bytes | Path) -> bool:
        """Create `path` from bytes or from a spooled file (which it may move); False if it already exists. Raises StoreError."""

    @abstractmethod
    def list(self, prefix: str = "", *, deep: bool = True) -> Iterator[tuple[str, int]]:
        """(path, size in bytes) of every object below `prefix` (a folder ending in '/', or ''); with deep=False only those right
        in it, and each sub-folder as its path with a trailing '/' and size 0."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove the object if it is there."""

    def close(self) -> None:
        """Release what is kept open for reading; the store can still be used. Nothing to do by default."""
        return

    def free_bytes(self) -> int | None:
        """Bytes that can still be put, None where nobody can tell. For who would rather not begin."""
        return None

    @abstractmethod
    def new_spool(self, label: str = "") -> Path:
        """A new empty local folder, unique to this attempt, from which `put_new` is cheap. Remove it with `drop_spool`.

        label: what the attempt works on, shown to others by `live_labels`.
        """

    @abstractmethod
    def drop_spool(self, spool: Path) -> None:
        """Remove a folder made by `new_spool`."""

    @abstractmethod
    def drop_spools(self) -> None:
        """Remove every folder that this process made by `new_spool` and has not dropped."""

    @abstractmethod
    def live_labels(self) -> set[str]:
        """Labels of the attempts that are alive, this process's own included; what killed ones left behind is swept.

        A hint, and no lock: it may miss an attempt, and an object store sees those of this machine only.
        """

    @abstractmethod
    def sweep_spools(self) -> int:
        """Remove what killed attempts left behind; the number of folders removed. Never touches a live attempt."""

    @abstractmethod
    def spools(self) -> Sequence[Spool]:
        """The spools that are there, of live attempts and of killed ones."""

    @abstractmethod
    def hold(self, *, alone: bool = False) -> AbstractContextManager[None]:
        """Within the context objects may be added (many processes may hold a store so), or, with `alone`, also removed.

        A process that dies lets go. Raises StoreError at once if another process holds the store in a way that does not allow it.
        """


def check_relative(path: str) -> str:
    """`path` if it stays inside the cache. Raises StoreError."""
    parts = path.split("/")
    if not path or path.startswith("/") or any(part in {"", ".", ".."} for part in parts) or "\\" in path or "\0" in path:
        raise StoreError(f"object path {path!r}: expected a relative path of plain names")
    return path
