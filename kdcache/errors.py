"""Every error that kdcache raises on purpose. Raised anywhere in the flow, turned into an exit code by `cli`.

    KDCacheError                 exit 1 unless said otherwise
    ├── UsageError               a request that can't be right: a bad spec, policy, shard expression; exit 2
    ├── ShardError               a tar that can't be used: missing, duplicate key, bad label
    ├── TeacherError             unknown model or node, weights that can't be had, values that are not finite
    ├── StudentError             a student that can't be built or trained as asked
    ├── StoreError               the disk or object store refused: full, read-only, vanished
    ├── ProcessError             a process of several that train one student is gone, or can't be reached
    │   └── ToldError            another of them has said why
    └── CacheError
        ├── NotACacheError       no cache.json where one is needed
        ├── FormatVersionError   written by a later format than this kdcache reads
        ├── MismatchError        an identity field differs from the plan, teacher or target on disk
        ├── CorruptError         bytes that are not the ones that were written
        │   └── MisplacedError   a sound document that lies where another belongs
        ├── MissingError         a row, view, target or teacher that the cache does not hold
        └── DriftError           a replayed view whose pixels are not those the teacher saw

A message says what was expected, what was found, in which shard and key, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """For a message on a name that is not known: '; did you mean …?' where one of `known` is near, else ''."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


class KDCacheError(Exception):
    """Base of all errors that kdcache raises on purpose."""


class UsageError(KDCacheError):
    """The request itself can't be right."""


class ShardError(KDCacheError):
    """A tar shard can't be used as it is."""


class TeacherError(KDCacheError):
    """The teacher can't be built, hooked or trusted."""


class StudentError(KDCacheError):
    """The student can't be built or trained as asked."""


class StoreError(KDCacheError):
    """The file system or object store refused an operation."""


class ProcessError(KDCacheError):
    """A process of several that train one student is gone, or can't be reached."""


class ToldError(ProcessError):
    """This process ends because another one does, which has said why: a command that ends by it says nothing."""


class CacheError(KDCacheError):
    """Something about a cache on disk."""


class NotACacheError(CacheError):
    """There is no cache at this place."""


class FormatVersionError(CacheError):
    """The cache or checkpoint is of a format version that this kdcache does not read."""


class CorruptError(CacheError):
    """Stored bytes are not the bytes that were written."""


class MisplacedError(CorruptError):
    """A document that is sound in itself and lies where another belongs."""


class MissingError(CacheError):
    """The cache does not hold what was asked of it."""


class DriftError(CacheError):
    """A view rendered now differs from the view that the teacher saw."""


class MismatchError(CacheError):
    """An identity field differs from what the cache holds.

    what: the thing compared, e.g. ``view plan``; field: dotted path; expected: the value in the cache; found: the value asked for.
    """

    def __init__(self, what: str, field: str, *, expected: object, found: object, remedy: str) -> None:
        self.what, self.field, self.expected, self.found = what, field, expected, found
        super().__init__(f"{what}: field '{field}' differs: the cache has {expected!r}, this run has {found!r}; {remedy}")
