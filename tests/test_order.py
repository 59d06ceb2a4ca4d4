"""The order of an epoch's rows: permutations that are pure functions, and the window of `block`, which is what has to lie in memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache import order
from kdcache.order import BLOCK_BYTES, LEAST_BLOCKS, WINDOW_BYTES, Blocks, block_order

seeds, epochs = st.integers(0, 2**63 - 1), st.integers(0, 1000)
some_blocks = st.builds(Blocks, rows=st.integers(1, 40), window=st.integers(1, 12))


@given(st.integers(0, 400), seeds, epochs, some_blocks)
def test_block_order_is_a_permutation_and_a_pure_function(num_rows: int, seed: int, epoch: int, blocks: Blocks) -> None:
    found = block_order(num_rows, seed, epoch, blocks)
    assert sorted(found.tolist()) == list(range(num_rows))
    np.random.seed(epoch)
    np.testing.assert_array_equal(block_order(num_rows, seed, epoch, blocks), found)


@given(st.integers(2, 400), seeds, epochs, some_blocks)
def test_no_more_blocks_than_the_window_are_open_at_once(num_rows: int, seed: int, epoch: int, blocks: Blocks) -> None:
    of_row = block_order(num_rows, seed, epoch, blocks) // blocks.rows
    first, last = ([np.nonzero(of_row == block)[0][end] for block in range(blocks.count(num_rows))] for end in (0, -1))
    open_at = [sum(a < cut <= b for a, b in zip(first, last, strict=True)) for cut in range(1, num_rows)]
    assert max(open_at) <= blocks.window


def test_every_batch_is_mixed_of_the_whole_window_the_first_and_the_last_too() -> None:
    blocks = Blocks(rows=64, window=32)
    for epoch in range(3):
        of_row = block_order(256 * 64, 7, epoch, blocks) // 64
        distinct = [len(set(batch)) for batch in of_row.reshape(-1, 256).tolist()]
        assert min(distinct) >= 29  # 32 blocks drawn from 256 times leave out .01 of one; those that end or begin within the batch add to it


def test_block_order_is_the_same_on_every_machine() -> None:
    assert block_order(12, 42, 0, Blocks(rows=2, window=2)).tolist() == GOLDEN_EPOCH_0
    assert block_order(12, 42, 1, Blocks(rows=2, window=2)).tolist() == GOLDEN_EPOCH_1


GOLDEN_EPOCH_0 = [3, 2, 4, 6, 5, 8, 7, 9, 0, 11, 10, 1]
GOLDEN_EPOCH_1 = [3, 10, 11, 2, 8, 9, 5, 4, 1, 7, 0, 6]


@given(st.lists(st.integers(0, 3 * 2**30) | st.integers(0, 200_000), max_size=300), st.integers(0, 20))
def test_blocks_are_as_large_as_they_should_be_and_the_window_is_bounded_in_bytes(sizes: list[int], epoch: int) -> None:
    row_bytes = np.array(sizes, np.int64)
    blocks = Blocks.fitting(row_bytes)
    assert blocks.rows & (blocks.rows - 1) == 0
    weights = [int(row_bytes[start : start + blocks.rows].sum()) for start in range(0, len(sizes), blocks.rows)]
    assert blocks.window * max(weights, default=0) <= WINDOW_BYTES or (blocks.window == 1 and max(weights) > WINDOW_BYTES)
    assert blocks.window >= LEAST_BLOCKS or blocks.rows == 1
    if sizes and len(set(sizes)) == 1 and 0 < sizes[0] < BLOCK_BYTES // 2:
        assert BLOCK_BYTES <= blocks.rows * sizes[0] < 2 * BLOCK_BYTES


def test_blocks_of_photographs_are_some_dozens() -> None:
    assert Blocks.fitting(np.full(1_281_167, 111_000)) == Blocks(rows=128, window=37)
    assert Blocks.fitting(np.full(1_281_167, 3 * 224**2)) == Blocks(rows=64, window=55)  # stored raw


def test_orders_of_other_versions_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = Blocks(rows=4, window=3)
    before = block_order(100, 1, 2, blocks).tolist()
    monkeypatch.setattr(order, "BLOCK_ORDER_VERSION", 2)
    assert block_order(100, 1, 2, blocks).tolist() != before
