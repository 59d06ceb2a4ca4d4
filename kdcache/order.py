"""In which order an epoch takes its rows: pure functions of (seed, epoch). `join` cuts batches from what they give.

`full` is a permutation of all rows: the best mixing, and one read at a random place for every row. `block` is for storage where such a read is a
round trip: it permutes blocks of consecutive rows and mixes them in a window that slides over the permuted blocks, so that at any moment rows of the
same few blocks are drawn. A block is then read whole, in one run, when its first row is wanted, and lies in memory until its last one is: in the page
cache, which all workers share, and not in any of them. Window and blocks are bounded in bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from .plan import canonical_json

ORDER_VERSION = 1
"""Bumped whenever `epoch_order` gives another order for the same seed and epoch."""
BLOCK_ORDER_VERSION = 1
"""Likewise of `block_order` and of `Blocks.fitting`."""

WINDOW_BYTES = 512 << 20
"""Of the images in the blocks that are drawn from at once. Their targets lie beside them: 1 % for logits, for a map of 190 kB once or twice as much again."""
BLOCK_BYTES = 8 << 20
"""The least that a block's images have, where that leaves LEAST_BLOCKS of them in a window: a network file system gives runs of this size at its full
speed, and the 32 to 64 blocks of a window lie in few enough shards for all their files to stay open."""
LEAST_BLOCKS = 16
"""In a window; with huge rows blocks get smaller for it."""

Order: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]


def epoch_order(num_rows: int, seed: int, epoch: int) -> Order:
    """A permutation of range(num_rows), int64: a pure function of its arguments on every machine and NumPy version.

    The stable argsort of raw Philox words (4x64, 10 rounds, counter 0), keyed by the BLAKE2b-128 of the canonical JSON
    ["order", 1, seed, epoch], as two little-endian uint64.
    """
    return np.argsort(_words("order", ORDER_VERSION, seed, epoch, num_rows), kind="stable").astype(np.int64)


@dataclass(frozen=True)
class Blocks:
    """The sizes of `block`: what a run's rows decide, hence no setting."""

    rows: int
    """Consecutive rows in a block; the last block may have fewer."""
    window: int
    """Blocks that are drawn from at once."""

    def __post_init__(self) -> None:
        assert self.rows > 0 and self.window > 0

    @classmethod
    def fitting(cls, row_bytes: np.ndarray[Any, np.dtype[np.int64]]) -> Blocks:
        """The largest window whose blocks, whichever they are, hold at most WINDOW_BYTES; at least one block.

        row_bytes: (N,) of each row's image as it is stored, in the rows' order. Blocks have a power of two of rows: the least with BLOCK_BYTES
        in the mean, halved while that leaves less than LEAST_BLOCKS in a window.
        """
        mean = max(1, int(row_bytes.sum()) // max(1, len(row_bytes)))
        rows = 1 << (max(1, -(-BLOCK_BYTES // mean)) - 1).bit_length()
        while True:
            largest = int(np.add.reduceat(row_bytes, np.arange(0, len(row_bytes), rows)).max(initial=1)) if len(row_bytes) else 1
            window = WINDOW_BYTES // max(1, largest)
            if window >= LEAST_BLOCKS or rows == 1:
                return cls(rows, max(1, window))
            rows //= 2

    def count(self, num_rows: int) -> int:
        """Blocks of so many rows."""
        return -(-num_rows // self.rows)


def block_order(num_rows: int, seed: int, epoch: int, blocks: Blocks) -> Order:
    """A permutation of range(num_rows), int64, that at any place has begun and not ended at most `blocks.window` blocks; pure as `epoch_order`.

    P blocks are permuted by the stable argsort of the first P words (key as there, of ["blocks", 1, seed, epoch]). With W = min(window, P), a row of
    the block at place p gets a number drawn evenly from [p - W + 1, p + 1), cut to [0, P - W + 1): `start` · 2^32 + (its own word >> 32) · length.
    The order is the stable argsort of these. Any number lies in the intervals of exactly W blocks, from the first row to the last: no batch is
    mixed of fewer because the window fills or empties. Rows that fit one window are permuted fully.
    """
    count = blocks.count(num_rows)
    words = _words("blocks", BLOCK_ORDER_VERSION, seed, epoch, count + num_rows)
    place_of_block = np.empty(count, np.int64)
    place_of_block[np.argsort(words[:count], kind="stable")] = np.arange(count)
    place = place_of_block[np.arange(num_rows) // blocks.rows]
    window = min(blocks.window, count)
    start, stop = np.maximum(place - window + 1, 0), np.minimum(place + 1, count - window + 1)
    numbers = (start.astype(np.uint64) << np.uint64(32)) + (words[count:] >> np.uint64(32)) * (stop - start).astype(np.uint64)
    return np.argsort(numbers, kind="stable").astype(np.int64)


def labels_per_batch(order: Order, labels: np.ndarray[Any, Any], batch_size: int) -> float:
    """How many different labels a batch has, the mean of at most 64 batches spread over an order. labels: (N,) of the rows that it numbers."""
    size = max(1, min(batch_size, len(order)))
    starts = np.unique(np.linspace(0, max(0, len(order) // size - 1), 64).astype(np.int64)) * size
    return float(np.mean([len(np.unique(labels[order[start : start + size]])) for start in starts.tolist()]))


def first_of_blocks(order: Order, blocks: Blocks) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(n,) which of these rows, in this order, are the first of their block; of a slice of an order the first in it."""
    is_first = np.zeros(len(order), bool)
    is_first[np.unique(order // blocks.rows, return_index=True)[1]] = True
    return is_first


def _words(name: str, version: int, seed: int, epoch: int, count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    digest = hashlib.blake2b(canonical_json([name, version, seed, epoch]), digest_size=16).digest()
    words: np.ndarray[Any, np.dtype[np.uint64]] = np.random.Philox(key=np.frombuffer(digest, "<u8").astype(np.uint64)).random_raw(count)
    return words
