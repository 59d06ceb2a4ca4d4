"""Files in a store against the digests that records and cards hold of them: read in pieces, whatever their size. Used by whoever vouches for bytes."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .errors import KDCacheError
from .format import DigestField
from .launch import available_cores
from .store import Store

READ_BYTES = 1 << 20
"""Of one read: larger ones leave the core's cache before they are hashed."""


def read_pieces(store: Store, path: str, size: int) -> Iterator[bytes]:
    """The first `size` bytes of an object. Raises MissingError without it, CorruptError if it is shorter."""
    for offset in range(0, size, READ_BYTES):
        yield store.get_range(path, offset, min(READ_BYTES, size - offset))


def digest_of_file(store: Store, path: str) -> DigestField:
    """Size and digest of an object as it is now. Raises MissingError."""
    digest, size = hashlib.blake2b(digest_size=16), store.size(path) or 0
    for piece in read_pieces(store, path, size):
        digest.update(piece)
    return DigestField(size=size, digest=digest.hexdigest())


def find_changed(
    store: Store, files: Sequence[tuple[str, DigestField]], advance: Callable[[int], Any] = lambda _size: None
) -> Iterator[tuple[str, str]]:
    """(path, what is wrong) of each file that is not as recorded; a few threads, since reading and hashing leave the GIL.

    Each thread has a store of its own: one store reads under a lock, and cold files would be read one after another. advance: takes the bytes
    of each file that was looked at.
    """
    own, stores = threading.local(), list[Store]()

    def begin() -> None:
        own.store = copy.copy(store)
        stores.append(own.store)

    def check(item: tuple[str, DigestField]) -> tuple[str, str | None, int]:
        path, expected = item
        size = own.store.size(path)
        if size != expected.size:
            return path, f"{path} has {size} bytes, expected {expected.size}", expected.size
        try:
            found = digest_of_file(own.store, path)
        except KDCacheError as error:
            return path, str(error), expected.size
        wrong = f"{path}: bytes were changed: expected digest {expected.digest}, found {found.digest}" if found != expected else None
        return path, wrong, expected.size

    with ThreadPoolExecutor(min(8, available_cores()), initializer=begin) as pool:
        for path, detail, size in pool.map(check, files):
            advance(size)
            if detail is not None:
                yield path, detail
    for one in stores:
        one.close()
