"""Stage two's input: an order that is a pure function, the pixels that the teacher saw, the targets that the cache holds."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_cache, make_shards
from hypothesis import given
from hypothesis import strategies as st

from kdcache.cache import Cache
from kdcache.errors import CorruptError, DriftError, MissingError, ShardError, StoreError
from kdcache.join import BatchLoader, CachedViews, EpochBatches, epoch_order, is_checked, usable_views
from kdcache.opening import open_cache

TARGETS = ("logits", "features@norm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("join")
    make_cache(folder, num_shards=2, num_samples=5, views=3, corrupt=[1])
    return folder


@pytest.fixture
def cache(folder: Path) -> Cache:
    return open_cache(folder / "cache")


# --- order ---


@given(st.integers(0, 300), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_order_is_a_permutation_and_a_pure_function(num_rows: int, seed: int, epoch: int) -> None:
    order = epoch_order(num_rows, seed, epoch)
    assert sorted(order.tolist()) == list(range(num_rows))
    np.random.seed(epoch)
    np.testing.assert_array_equal(epoch_order(num_rows, seed, epoch), order)


def test_order_is_the_same_on_every_machine() -> None:
    assert epoch_order(12, seed=42, epoch=0).tolist() == GOLDEN_EPOCH_0
    assert epoch_order(12, seed=42, epoch=1).tolist() == GOLDEN_EPOCH_1


GOLDEN_EPOCH_0 = [5, 8, 4, 11, 3, 7, 0, 1, 10, 2, 6, 9]
GOLDEN_EPOCH_1 = [10, 4, 0, 3, 7, 11, 9, 1, 6, 8, 5, 2]


def test_an_epoch_takes_one_view_of_each_row_and_drops_only_the_partial_batch() -> None:
    batches = EpochBatches(np.arange(100, 110), batch_size=3, num_views=4, seed=1)
    assert len(batches) == 3
    for epoch in (0, 3, 4, 9):
        batches.set_epoch(epoch)
        items = [item for batch in batches for item in batch]
        assert len(items) == len({item.row for item in items}) == 9
        assert {(item.view, item.epoch) for item in items} == {(epoch % 4, epoch)}
        assert {item.row for item in items} <= set(range(100, 110))


def test_a_dataset_smaller_than_a_batch_is_one_batch() -> None:
    batches = EpochBatches([4, 2], batch_size=64, num_views=1, seed=0)
    assert [sorted(batch) for batch in batches] == [[(2, 0, 0), (4, 0, 0)]]


# --- rows ---


def test_a_batch_holds_what_the_cache_holds_in_the_order_asked(cache: Cache) -> None:
    dataset = CachedViews(cache, targets=TARGETS)
    items = [(7, 2), (0, 0), (3, 1), (6, 2), (0, 2), (7, 0)]
    batch = dataset.__getitems__(items)
    assert batch["views"].shape == (6, 32, 32, 3)
    assert batch["views"].dtype == torch.uint8
    decoded = {target: cache.encoding("teacher", target).decode(batch["targets"][target]) for target in TARGETS}
    for place, (number, view) in enumerate(items):
        shard = cache.rows.shards[cache.rows.shard[number]]
        key = cache.keys(shard)[cache.rows.row[number]]
        expected = cache.read(shard, key, view)
        np.testing.assert_array_equal(batch["views"][place].numpy(), cache.view(shard, key, view))
        assert int(batch["labels"][place]) == expected["label"]
        np.testing.assert_array_equal(decoded["logits"]["logits"][place].numpy(), expected["logits"])
        np.testing.assert_array_equal(decoded["features@norm"]["grid"][place].numpy(), expected["features@norm"])


def test_an_image_that_extract_skipped_has_no_row_here_either(cache: Cache) -> None:
    assert len(CachedViews(cache)) == 8
    assert all("s0001" not in cache.keys(shard) for shard in cache.shards)


def test_each_target_is_read_once_for_each_shard_of_a_batch(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str, list[int]]] = []
    read = cache.read_components

    def spy(teacher: str, target: str, shard: str, view: int, rows: np.ndarray, **options: Any) -> dict:
        calls.append((target, shard, list(rows)))
        return read(teacher, target, shard, view, rows, **options)

    monkeypatch.setattr(cache, "read_components", spy)
    CachedViews(cache, targets=("logits",)).__getitems__([(number, 0) for number in (7, 1, 4, 0, 6)])
    assert calls == [("logits", "train-0000", [0, 1]), ("logits", "train-0001", [0, 2, 3])]


def test_uint16_components_travel_as_int16_bits(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.array([[0], [1], [65535]], np.uint16)
    monkeypatch.setattr(cache, "read_components", lambda *_args, **_options: {"grid": values})
    tensor = CachedViews(cache, targets=("logits",)).__getitems__([(0, 0), (1, 0), (2, 0)])["targets"]["logits"]["grid"]
    assert tensor.dtype == torch.int16
    np.testing.assert_array_equal(tensor.numpy().view(np.uint16), values)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_the_same_for_any_number_of_workers(cache: Cache, num_workers: int) -> None:
    dataset = CachedViews(cache, targets=TARGETS)
    batches = EpochBatches(np.arange(8), batch_size=3, num_views=3, seed=5)
    loader = BatchLoader(dataset, batches, num_workers=num_workers)
    before = torch.get_rng_state()
    for epoch in (0, 1, 0):
        found = list(loader.epoch(epoch))
        batches.set_epoch(epoch)
        for batch, items in zip(found, list(batches), strict=True):
            expected = dataset.__getitems__(items)
            torch.testing.assert_close(batch["views"], expected["views"], rtol=0, atol=0)
            torch.testing.assert_close(batch["targets"], expected["targets"], rtol=0, atol=0)
    loader.close()
    assert torch.equal(torch.get_rng_state(), before), "loading must not draw from the student's generator"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epochs_of_one_stream_have_the_batches_that_they_have_alone(cache: Cache, num_workers: int) -> None:
    """Asked for in turn, left early, entered at a step, or in another order than was expected."""
    batches = EpochBatches(np.arange(8), batch_size=1, num_views=3, seed=5, accumulate=2)
    loader, alone = BatchLoader(CachedViews(cache), batches, num_workers=num_workers), CachedViews(cache)
    for epoch, start, until, taken in [
        (0, 1, 4, 6),
        (1, 0, 4, 8),
        (2, 0, 4, 3),
        (3, 0, 4, 8),
        (0, 0, 2, 8),
        (1, 0, 3, 8),
        (2, 2, 3, 4),
        (2, 0, None, 8),
    ]:
        found = list(itertools.islice(loader.epoch(epoch, start=start, until=until), taken))
        batches.set_epoch(epoch, start=start)
        for batch, items in zip(found, itertools.islice(batches, taken), strict=True):
            torch.testing.assert_close(batch["views"], alone.__getitems__(items)["views"], rtol=0, atol=0)
        assert len(found) == taken
    loader.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_that_was_closed_begins_anew(cache: Cache, num_workers: int) -> None:
    loader = BatchLoader(CachedViews(cache), EpochBatches(np.arange(8), batch_size=4, num_views=3, seed=5), num_workers=num_workers)
    first, _ = loader.epoch(0)
    assert len(multiprocessing.active_children()) == num_workers
    loader.close()
    assert not multiprocessing.active_children()
    again, _ = loader.epoch(0)
    torch.testing.assert_close(again["views"], first["views"], rtol=0, atol=0)
    loader.close()
    assert not multiprocessing.active_children()


def test_a_loader_whose_worker_was_killed_begins_anew(cache: Cache) -> None:
    loader = BatchLoader(CachedViews(cache), EpochBatches(np.arange(8), batch_size=4, num_views=3, seed=5), num_workers=1)
    first, _ = loader.epoch(0)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(StoreError, match="a worker process was killed"):
        list(itertools.chain.from_iterable(map(loader.epoch, range(9))))  # of a few batches it had made some
    again, _ = loader.epoch(0)
    torch.testing.assert_close(again["views"], first["views"], rtol=0, atol=0)
    loader.close()


def test_the_next_epochs_batches_are_made_while_one_ends(cache: Cache) -> None:
    """And none after the last; what goes wrong in one of them is raised in its place, and not kept."""
    batches = EpochBatches(np.arange(8), batch_size=4, num_views=3, seed=5)
    batches.set_epoch(0, until=2)
    assert [items[0].epoch for items in batches] == [0, 0, 1, 1]

    class Noting(CachedViews):
        made = multiprocessing.get_context("fork").SimpleQueue()

        def __getitems__(self, items: Sequence[Any]) -> Any:
            self.made.put(items[0].epoch)
            if items[0].epoch == 1:
                raise MissingError("of epoch 1")
            return super().__getitems__(items)

    loader = BatchLoader(Noting(cache), batches, num_workers=1)
    assert len(list(loader.epoch(0, until=2))) == 2
    assert [Noting.made.get() for _ in range(4)] == [0, 0, 1, 1]
    for _ in range(2):  # the first time what was made already
        with pytest.raises(MissingError, match="of epoch 1"):
            next(iter(loader.epoch(1, until=2)))
    assert len(list(loader.epoch(0))) == 2
    loader.close()


def test_a_pickled_dataset_opens_files_of_its_own(cache: Cache) -> None:
    dataset = CachedViews(cache, targets=TARGETS)
    expected = dataset.__getitems__([(0, 0)])
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy._files is not dataset._files
    torch.testing.assert_close(copy.__getitems__([(0, 0)]), expected, rtol=0, atol=0)


# --- what is checked ---


def test_checks_are_a_pure_function_and_as_many_as_asked() -> None:
    for epoch in (0, 1, 2, 3, 17):
        checked = [is_checked("train-0000", row, epoch, fraction=0.25) for row in range(2000)]
        assert checked == [is_checked("train-0000", row, epoch, fraction=0.25) for row in range(2000)]
        assert 0.2 < np.mean(checked) < 0.3
    assert not any(is_checked("a", row, 0, fraction=0) for row in range(50))
    assert all(is_checked("a", row, 0, fraction=1) for row in range(50))


@pytest.mark.parametrize("num_views", [1, 4, 5, 8, 10, 20, 50])
def test_every_view_of_every_row_is_checked_in_time(num_views: int) -> None:
    """Epoch e trains on view e mod V: no view of a row may hide behind the rhythm of the checks."""
    for row in range(60):
        checked = {epoch % num_views for epoch in range(100 * num_views) if is_checked("s", row, epoch, fraction=0.05)}
        assert checked == set(range(num_views))


@pytest.mark.parametrize(("fraction", "epochs"), [(0.05, 60), (0.3, 10), (0.9, 4)])
def test_every_row_is_checked_within_three_over_the_fraction_of_epochs(fraction: float, epochs: int) -> None:
    for first in (0, 7):
        unchecked = [row for row in range(500) if not any(is_checked("s", row, first + epoch, fraction=fraction) for epoch in range(epochs))]
        assert unchecked == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_checks_other_rows_than_the_one_before(cache: Cache, tmp_path: Path, num_workers: int) -> None:
    """One view, over and over: what one epoch does not look at, a later one does; the batches are the same bits for any worker count."""
    dataset = CachedViews(cache, check_views=0.25)
    batches = EpochBatches(np.arange(8), batch_size=4, num_views=1, seed=0)
    read, seen = cache.read_pixel_digests, []

    def spy(shard: str, view: int, rows: np.ndarray) -> np.ndarray:
        seen.extend((shard, row) for row in rows.tolist())
        return read(shard, view, rows)

    loader = BatchLoader(dataset, batches, num_workers=num_workers)
    for epoch in range(12):
        found = list(loader.epoch(epoch))
        batches.set_epoch(epoch)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache, "read_pixel_digests", spy)
            expected = [dataset.__getitems__(items) for items in batches]
        for batch, other in zip(found, expected, strict=True):
            torch.testing.assert_close(batch["views"], other["views"], rtol=0, atol=0)
    loader.close()
    assert set(seen) == {(cache.rows.shards[cache.rows.shard[i]], int(cache.rows.row[i])) for i in range(8)}, "every row within 12 epochs"
    assert 16 <= len(seen) <= 32, "a quarter of 8 rows in each of 12 epochs"


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Path:
    """The same shards, but one image has other pixels behind the same headers."""
    tars = tmp_path / "shards"
    shutil.copytree(folder / "shards", tars)
    cache = open_cache(folder / "cache")
    number = 2
    offset, size = int(cache.rows.offset[number]), int(cache.rows.size[number])
    path = tars / "train-0000.tar"
    data = bytearray(path.read_bytes())
    scan = data.index(b"\xff\xda", offset, offset + size)
    data[scan + 20 : offset + size - 2] = bytes(byte ^ 1 for byte in data[scan + 20 : offset + size - 2])
    path.write_bytes(bytes(data))
    return tars


@pytest.mark.parametrize("num_workers", [0, 1])
def test_changed_pixels_are_an_error_that_names_shard_key_and_view(folder: Path, changed: Path, num_workers: int) -> None:
    cache = open_cache(folder / "cache", data=str(changed))
    key = cache.keys("train-0000")[2]
    loader = BatchLoader(CachedViews(cache, check_views=1.0), EpochBatches([2], batch_size=1, num_views=3, seed=0), num_workers=num_workers)
    with pytest.raises(DriftError, match=rf"^shard train-0000: key '{key}', view 1: ") as caught:
        list(loader.epoch(1))
    assert "Traceback" not in str(caught.value)
    loader.close()


def test_unchecked_views_are_not_compared(folder: Path, changed: Path) -> None:
    cache = open_cache(folder / "cache", data=str(changed))
    assert CachedViews(cache, check_views=0.0).__getitems__([(3, 1)])["views"].shape == (1, 32, 32, 3)


def test_a_tar_that_is_gone_names_the_key_and_the_option_that_helps(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "shards", tmp_path / "shards")
    cache = open_cache(folder / "cache", data=str(tmp_path / "shards"))
    (tmp_path / "shards" / "train-0001.tar").unlink()
    with pytest.raises(ShardError, match=r"shard train-0001: key 's0000': .*pass --data"):
        CachedViews(cache).__getitems__([(4, 0)])


def test_another_tar_of_the_same_name_is_noticed(folder: Path, tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", num_shards=2, num_samples=5, size_wh=(20, 20))
    cache = open_cache(folder / "cache", data=str(tmp_path / "shards"))
    with pytest.raises((DriftError, ShardError), match="shard train-0000: key 's0004'"):
        CachedViews(cache).__getitems__([(3, 0)])


def test_a_flipped_byte_in_a_target_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "cache", tmp_path / "cache")
    (path,) = (tmp_path / "cache" / "teachers" / "teacher").glob("train-0000*.zarr/logits/codes/c/0/0/0")
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(bytes(data))
    dataset = CachedViews(open_cache(tmp_path / "cache"), targets=("logits",))
    items = [(number, view) for number in range(4) for view in range(3)]
    with pytest.raises(CorruptError, match="crc32c"):
        dataset.__getitems__(items)


# --- views ---


def test_usable_views_are_the_least_that_every_shard_and_target_has(tmp_path: Path) -> None:
    make_cache(tmp_path, num_shards=2, num_samples=2, views=4, targets=["logits", "features@norm,views=2"])
    cache = open_cache(tmp_path / "cache")
    assert usable_views(cache, None, [], cache.shards) == 4
    assert usable_views(cache, "teacher", ["logits"], cache.shards) == 4
    assert usable_views(cache, "teacher", ["logits", "features@norm"], cache.shards) == 2


def test_a_shard_without_the_target_is_an_error_that_names_it(tmp_path: Path) -> None:
    make_cache(tmp_path, num_shards=2, num_samples=2, views=1, targets=["logits"])
    (record,) = (tmp_path / "cache" / "teachers" / "teacher").glob("train-0001.*.json")
    record.unlink()
    cache = open_cache(tmp_path / "cache")
    with pytest.raises(MissingError, match=r"shard train-0001: the cache has no 'logits' of teacher 'teacher'.*kdcache extract"):
        usable_views(cache, "teacher", ["logits"], cache.shards)
    assert usable_views(cache, "teacher", ["logits"], ["train-0000"]) == 1
    with pytest.raises(MissingError, match="shard train-0001"):
        CachedViews(cache, targets=("logits",)).__getitems__([(0, 0), (2, 0)])


def test_rows_without_labels_have_minus_one(tmp_path: Path) -> None:
    make_cache(tmp_path, num_shards=1, num_samples=2, views=1, targets=["logits"], labels=False)
    assert CachedViews(open_cache(tmp_path / "cache")).__getitems__([(0, 0), (1, 0)])["labels"].tolist() == [-1, -1]
