"""`train --shuffle` and `--prefetch-bytes`: what is chosen, that it is part of the run, that it resumes, and that its bounds hold."""

from __future__ import annotations

import dataclasses
import gc
import os
import re
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers import CNN, CNN_ARGS, Forked, assert_same_state, make_cache, python_script, state_of
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data._utils.pin_memory import pin_memory

import kdcache.workers
import pipelines.training.checkpoints
import pipelines.training.data
from cli.main import main
from kdcache import mounts
from kdcache.cache import Cache
from kdcache.checkpoint import save_checkpoint
from kdcache.dataset import CachedDataset
from kdcache.errors import StoreError, StudentError, UsageError
from kdcache.join import MOST_PREFETCHED, BatchLoader, CachedViews, EpochBatches, Items, plan_prefetch
from kdcache.mounts import file_system_of, is_network_type
from kdcache.opening import open_cache
from kdcache.order import Blocks
from kdcache.shards import RUN_BYTES, ShardFiles, runs_of
from kdcache.workers import pack
from pipelines.train import TrainConfig, train
from pipelines.training.recipes import how_to_continue

TARGETS = ("logits", "features@norm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shuffle")
    make_cache(folder, num_shards=3, num_samples=12, views=2)
    return folder


@pytest.fixture
def cache(folder: Path) -> Cache:
    return open_cache(folder / "cache")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 rows, 3 in a window, of images of 1 kB."""
    monkeypatch.setattr(Blocks, "fitting", classmethod(lambda cls, _sizes: cls(rows=4, window=3)))


# --- batches in blocks ---


@given(
    st.integers(1, 120),
    st.integers(1, 20),
    st.integers(0, 5),
    st.integers(0, 30),
    st.builds(Blocks, rows=st.integers(1, 9), window=st.integers(1, 5)),
)
def test_batches_from_any_step_are_those_of_the_whole_epoch(num_rows: int, batch_size: int, epoch: int, start: int, blocks: Blocks) -> None:
    batches = EpochBatches(np.arange(1000, 1000 + num_rows), batch_size=batch_size, num_views=2, seed=3, blocks=blocks)
    batches.set_epoch(epoch)
    whole = list(batches)
    assert len(whole) == len(batches)
    batches.set_epoch(epoch, start=start)
    assert list(batches) == whole[start:]
    rows = [item.row for items in whole for item in items]
    assert len(set(rows)) == len(rows) == len(batches) * batches.batch_size
    assert rows == (1000 + batches.order(epoch))[: len(rows)].tolist()


@given(st.integers(1, 120), st.integers(1, 20), st.integers(0, 4), st.builds(Blocks, rows=st.integers(1, 9), window=st.integers(1, 5)))
def test_each_block_is_opened_once_whole_and_before_its_rows(num_rows: int, batch_size: int, start: int, blocks: Blocks) -> None:
    """Wherever the epoch is begun: what a resumed run finds in no page cache it opens too."""
    batches = EpochBatches(np.arange(num_rows), batch_size=batch_size, num_views=1, seed=3, blocks=blocks)
    batches.set_epoch(1, start=start)
    opened: list[int] = []
    for items in batches:
        assert isinstance(items, Items)
        opened += items.opened.tolist()
        assert {item.row for item in items} <= set(opened)
    assert len(set(opened)) == len(opened)
    assert all(row // blocks.rows * blocks.rows in opened for row in opened), "whole blocks"


def test_each_machine_reads_every_block_that_it_draws_from_once_by_whichever_of_its_ranks_comes_first() -> None:
    rows, blocks, world = np.arange(600), Blocks(rows=20, window=4), 4
    for machine in (range(2), range(2, 3), range(3, 4)):
        ranks = [EpochBatches(rows, batch_size=5, num_views=1, seed=3, blocks=blocks, rank=rank, world=world, beside=machine) for rank in machine]
        opened: list[int] = []
        for together in zip(*ranks, strict=True):
            for items in together:
                assert isinstance(items, Items)
                opened += items.opened.tolist()
                assert {item.row for item in items} <= set(opened)
        assert len(set(opened)) == len(opened)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_block_batches_are_the_same_for_any_number_of_workers(cache: Cache, num_workers: int) -> None:
    dataset = CachedViews(cache, targets=TARGETS)
    batches = EpochBatches(np.arange(36), batch_size=5, num_views=2, seed=5, blocks=Blocks(rows=4, window=3))
    loader = BatchLoader(dataset, batches, num_workers=num_workers)
    for epoch, start in ((0, 0), (1, 3)):
        found = list(loader.epoch(epoch, start=start))
        batches.set_epoch(epoch, start=start)
        for batch, items in zip(found, list(batches), strict=True):
            torch.testing.assert_close(batch, dataset.__getitems__(list(items)), rtol=0, atol=0)
    loader.close()


def test_blocks_are_opened_for_a_loader_of_ones_own_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = CachedDataset(folder / "cache", shards=["train-0001", "train-0002"])
    opened: list[int] = []
    monkeypatch.setattr(CachedViews, "read_ahead", lambda self, rows, view: opened.extend(rows.tolist()))
    batches = EpochBatches(range(len(dataset)), batch_size=6, num_views=2, seed=0, blocks=Blocks(rows=4, window=2))
    assert sum(len(labels) for _, labels, _ in torch.utils.data.DataLoader(dataset, batch_sampler=batches)) == 24
    assert sorted(opened) == list(range(12, 36))


@pytest.mark.parametrize("store_views", [None, "raw", "png"])
def test_a_block_is_read_in_one_run_before_its_rows(store_views: str | None, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.extract import ExtractConfig, extract

    path = str(tmp_path / "cache")
    extract(
        ExtractConfig(shards=str(folder / "shards"), cache=path, teacher=f"local-dir:{folder / 'teacher'}", targets=TARGETS, views=1, workers=0,
                      store_views=store_views)
    )  # fmt: skip
    cache = open_cache(path)
    dataset = CachedViews(cache, targets=TARGETS)
    reads: list[tuple[str, int, int]] = []
    get_range, preadv = cache.store.get_range, os.preadv

    def spy(name: str, offset: int, size: int) -> bytes:
        reads.append((name, offset, size))
        return get_range(name, offset, size)

    def spy_tar(descriptor: int, buffers: Any, offset: int) -> int:
        reads.append(("tar", offset, sum(map(len, buffers))))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(cache.store, "get_range", spy)
    monkeypatch.setattr(os, "preadv", spy_tar)
    dataset.__getitems__([(12, 0)])  # what opening an array reads is read
    reads.clear()
    batches = EpochBatches(np.arange(12, 24), batch_size=1, num_views=1, seed=0, blocks=Blocks(rows=12, window=1))
    items = next(iter(batches))
    assert isinstance(items, Items)
    dataset.__getitems__(items)
    rows = cache.rows
    if store_views is None:
        start, stop = int(rows.offset[12]), int(rows.offset[23] + rows.size[23])
        assert [read for read in reads if read[0] == "tar"] == [("tar", start, stop - start)]
    elif store_views == "raw":
        assert next(size for name, _, size in reads if "stored/pixels" in name) == 12 * (3 * cache.plan.size**2 + 4)
    else:
        assert not [read for read in reads if read[0] == "tar"]
        assert [name for name, _, _ in reads if "stored/bytes" in name]
    assert {name.split("zarr/")[1].split("/c/")[0] for name, _, _ in reads if "teachers" in name} >= {"logits/codes", "features@norm/grid"}


def test_images_that_lie_together_come_with_one_read(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = ShardFiles.read
    monkeypatch.setattr(ShardFiles, "read", lambda self, *args: reads.append(args[3]) or read(self, *args))
    dataset = CachedViews(cache)
    alone = [dataset.__getitems__([(number, 1)])["views"][0] for number in range(36)]
    reads.clear()
    together = dataset.__getitems__([(number, 1) for number in (35, *range(24), 29)])["views"]
    assert len(reads) == 3, "one a shard: what lies between rows 29 and 35 is less than the gap that is read over"
    torch.testing.assert_close(together, torch.stack([alone[number] for number in (35, *range(24), 29)]), rtol=0, atol=0)


@given(st.lists(st.tuples(st.integers(-50, 30_000), st.integers(0, 400_000)), max_size=40))
def test_runs_cover_each_span_once_and_stay_small(spans: list[tuple[int, int]]) -> None:
    offsets, sizes, at = [], [], 1000
    for gap, size in spans:
        at = max(0, at + gap)
        offsets.append(at)
        sizes.append(size)
        at += size
    runs = runs_of(np.array(offsets, np.int64), np.array(sizes, np.int64), gap=16 << 10)
    assert [place for first, last in runs for place in range(first, last + 1)] == list(range(len(spans)))
    for first, last in runs:
        assert first == last or offsets[last] + sizes[last] - offsets[first] <= RUN_BYTES
        assert all(0 <= offsets[i + 1] - offsets[i] - sizes[i] <= 16 << 10 for i in range(first, last))


# --- prefetch ---


@given(st.integers(0, 2**34), st.integers(0, 64), st.integers(1, 2**36))
def test_batches_under_way_are_bounded_in_bytes_and_every_worker_has_one(batch_bytes: int, num_workers: int, budget: int) -> None:
    if num_workers and batch_bytes > budget:
        with pytest.raises(UsageError, match=rf"--prefetch-bytes {budget}: one batch has {batch_bytes} bytes"):
            plan_prefetch(batch_bytes, num_workers, budget)
        return
    workers, each = plan_prefetch(batch_bytes, num_workers, budget)
    assert workers * each * batch_bytes <= budget
    assert workers <= num_workers and 0 <= each <= MOST_PREFETCHED
    assert (workers, each) == (0, 0) if num_workers == 0 else workers >= 1 and each >= 1
    if num_workers and num_workers * batch_bytes <= budget:
        assert workers == num_workers


@pytest.mark.parametrize("targets", [(), TARGETS])
def test_the_size_of_a_batch_is_what_its_tensors_hold(cache: Cache, targets: tuple[str, ...]) -> None:
    dataset = CachedViews(cache, targets=targets)
    batch = dataset.__getitems__([(number, 0) for number in range(7)])
    tensors = [batch["views"], batch["labels"], *(part for parts in batch["targets"].values() for part in parts.values())]
    assert sum(tensor.nbytes for tensor in tensors) == 7 * dataset.row_bytes


def test_a_loader_never_has_more_under_way_than_its_bytes(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = CachedViews(cache, targets=TARGETS)
    batches = EpochBatches(np.arange(36), batch_size=2, num_views=2, seed=5)
    asked: list[int] = []
    iterate = EpochBatches.__iter__

    def counting(self: EpochBatches) -> Any:
        for items in iterate(self):
            asked.append(len(items))
            yield items

    monkeypatch.setattr(EpochBatches, "__iter__", counting)
    for budget, workers, each in ((1 << 30, 2, MOST_PREFETCHED), (5 * 2 * dataset.row_bytes, 2, 2), (2 * dataset.row_bytes, 1, 1)):
        loader = BatchLoader(dataset, batches, num_workers=2, prefetch_bytes=budget)
        assert (loader.num_workers, loader.prefetched) == (workers, each)
        asked.clear()
        for taken, _ in enumerate(loader.epoch(0), start=1):
            assert len(asked) - taken <= workers * each
        assert taken == 18
        loader.close()


def shared_descriptors() -> set[int]:
    """Those of this process that are of shared memory, as torch has it."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that lists them
            if "/torch_" in str(link.readlink()):
                found.add(int(link.name))
    return found


def test_a_batch_costs_one_descriptor_however_many_tensors_it_has(cache: Cache) -> None:
    """Batches under way hold theirs in both processes; of 1024 that a process usually may have, 98 tensors a batch and 8 workers took 2160."""
    dataset = CachedViews(cache, targets=TARGETS)
    batches = EpochBatches(np.arange(36), batch_size=6, num_views=1, seed=5)
    loader = BatchLoader(dataset, batches, num_workers=2)
    gc.collect()
    before = shared_descriptors()
    held = list(loader.epoch(0))
    loader.close()
    assert len(shared_descriptors() - before) == len(held) == 6
    tensors = [held[0]["labels"], *(part for parts in held[0]["targets"].values() for part in parts.values())]
    versions = [tensor._version for tensor in tensors]
    held[0]["views"].zero_()
    assert [tensor._version for tensor in tensors] == versions, "a change in place is no change of the others"
    batches.set_epoch(0)
    torch.testing.assert_close(held[0]["targets"], dataset.__getitems__(next(iter(batches)))["targets"], rtol=0, atol=0)


def test_a_worker_that_runs_out_of_descriptors_says_so_before_a_batch_is_lost(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    read = CachedViews.__getitems__

    def read_with_few_left(self: CachedViews, items: Any) -> Any:
        batch = read(self, items)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 12, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        return batch

    monkeypatch.setattr(CachedViews, "__getitems__", read_with_few_left)  # in a worker: it is forked
    loader = BatchLoader(CachedViews(cache), EpochBatches(np.arange(36), batch_size=6, num_views=1, seed=5), num_workers=1)
    with pytest.raises(StoreError, match=r"fewer than 32 file descriptors left .*ulimit -n"):
        list(loader.epoch(0))
    loader.close()


def test_what_is_pinned_is_the_same_batch(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU there is no pinned memory: here it is any other memory."""
    monkeypatch.setattr(kdcache.workers, "get_worker_info", lambda: object())
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    dataset, items = CachedViews(cache, targets=TARGETS), [(number, 1) for number in (7, 3, 30)]
    packed = pack(dataset.handed_over().__getitems__(items))
    torch.testing.assert_close(pin_memory(packed).item(), dataset.__getitems__(items), rtol=0, atol=0)


# --- train ---


def config(folder: Path, out: Path, **options: Any) -> TrainConfig:
    return TrainConfig(
        cache=str(folder / "cache"), students=(CNN,), model_kwargs=CNN_ARGS, out=str(out), epochs=2, batch_size=4, workers=0, device="cpu", **options
    )


def test_block_is_part_of_a_run_and_resumes_in_mid_epoch_to_the_same_bits(
    folder: Path, tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (full,) = train(config(folder, tmp_path / "full", shuffle="full"))
    assert "shuffle" not in yaml.safe_load(Path(full["path"], "args.yaml").read_text())
    (whole,) = train(config(folder, tmp_path / "whole", shuffle="block"))
    assert whole["id"] != full["id"]
    assert yaml.safe_load(Path(whole["path"], "args.yaml").read_text())["shuffle"] == "block"

    def save_then_die(path: Path, state: dict[str, Any], **kwargs: Any) -> None:
        save_checkpoint(path, state, **kwargs)
        if path.parent.name == "last" and (state["epoch"], state["step"]) == (1, 5):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipelines.training.checkpoints, "save_checkpoint", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            train(config(folder, tmp_path / "cut", shuffle="block", recovery_interval=5))
    with pytest.raises(StudentError, match=r"field 'shuffle' differs: that run has 'block', this command None; pass --shuffle block to continue it"):
        train(config(folder, tmp_path / "cut", shuffle="full", resume=True))
    assert how_to_continue("shuffle", None) == "pass --shuffle full to continue it"
    (cut,) = train(config(folder, tmp_path / "cut", shuffle="block", resume=True))
    assert_same_state(state_of(cut), state_of(whole))
    export = Path("export", "model.safetensors")
    assert Path(cut["path"], export).read_bytes() == Path(whole["path"], export).read_bytes()
    assert Path(full["path"], export).read_bytes() != Path(whole["path"], export).read_bytes()


def test_auto_takes_blocks_on_a_network_file_system_and_says_why(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = os.path.realpath(folder)
    table = tmp_path / "mountinfo"
    monkeypatch.setattr(mounts, "MOUNTS", str(table))
    for kind, expected in (("ext4", "full"), ("nfs4", "block"), ("fuse.s3fs", "block")):
        table.write_text(f"22 1 0:1 / / rw - ext4 /dev/vda rw\n23 22 0:2 / {where}/shards rw shared:1 - {kind} server:/x rw\n")
        data = pipelines.training.data.open_data(config(folder, tmp_path))
        assert (data.blocks is not None) == (expected == "block")
        said = capsys.readouterr().err
        assert (f"--shuffle auto: block, since {folder}/shards lies on a network file system ({kind})" in said) == (expected == "block")
        assert ("--shuffle" in said) == (expected == "block"), "what is usual is not said"
        pipelines.training.data.open_data(config(folder, tmp_path, shuffle="full"))
        assert "--shuffle" not in capsys.readouterr().err
    table.unlink()
    assert pipelines.training.data.open_data(config(folder, tmp_path)).blocks is None, "a machine that does not say"


def test_auto_leaves_shards_that_are_sorted_by_label_to_the_full_permutation(
    folder: Path, tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipelines.training.data, "far_path", lambda paths: (next(iter(paths)), "nfs4"))
    rows = open_cache(folder / "cache").rows
    for labels, expected in ((np.arange(36) // 4, "full"), (np.arange(36) % 9, "block"), (np.full(36, -1), "block")):
        monkeypatch.setattr(Cache, "rows", dataclasses.replace(rows, label=labels.astype(np.int64)))
        for shuffle in ("auto", "block"):
            data = pipelines.training.data.open_data(config(folder, tmp_path, shuffle=shuffle, task_loss_weight=0.0))
            assert (data.blocks is None) == (shuffle == "auto" and expected == "full")
            said = capsys.readouterr().err
            assert (f"--shuffle {shuffle}: {expected}" in said) == (shuffle == "auto")
            assert ("sorted by label" in said) == (expected == "full")


def test_the_deepest_and_latest_mount_counts() -> None:
    table = (
        "22 1 0:1 / / rw - overlay overlay rw\n"
        "23 22 0:2 / /data rw,relatime shared:5 master:1 - nfs4 server:/x rw\n"
        "24 23 0:3 / /data/my\\040disk rw - ext4 /dev/sdb rw\n"
        "25 22 0:4 / /data2 rw - ceph mon:/ rw\n"
        "26 25 0:5 / /data2 rw - xfs /dev/sdc rw\n"
        "a line of another kind\n"
    )
    for path, expected in (("/home/a", "overlay"), ("/data", "nfs4"), ("/data/x/y", "nfs4"), ("/data/my disk/z", "ext4"), ("/data2/x", "xfs")):
        assert file_system_of(path, table) == expected
    assert file_system_of("/x", "") is None
    for name in ("nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "ceph", "fuse", "fuse.sshfs", "fuse.gcsfuse", "fuse.ceph", "9p", "beegfs"):
        assert is_network_type(name), name
    for name in ("ext4", "xfs", "btrfs", "zfs", "overlay", "tmpfs", "apfs", "fuseblk", "fuse.fuse-overlayfs", "f2fs"):
        assert not is_network_type(name), name


def test_options_are_checked(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--shuffle 'blocks': expected one of auto, full, block"):
        config(folder, tmp_path, shuffle="blocks")
    with pytest.raises(UsageError, match=r"--prefetch-bytes 1000: one batch has \d+ bytes of views and encoded targets"):
        train(dataclasses.replace(config(folder, tmp_path), workers=1, prefetch_bytes=1000))
    for text, bad in (("1.5GiB", False), ("500MB", False), ("2000000", False), ("many", True), ("0", True), ("-1", True), ("3 parsecs", True)):
        result = CliRunner().invoke(main, ["train", str(tmp_path / "no-cache"), "--student", CNN, "--prefetch-bytes", text])
        assert ("expected a number of bytes" in result.output) == bad, result.output


def test_the_benchmark_of_steps_runs(tmp_path: Path) -> None:
    options = ["--parts", "step", "--small", "--samples", "8", "--batch-size", "2", "--rounds", "1"]
    child = Forked(python_script(Path(__file__).parent.parent / "benchmarks" / "train_step.py", *options), tmp_path / "log")
    assert child.wait(240) == 0, child.output()
    assert re.search(r"tiny → tiny +\d+ ms +\d+ ms, \d\.\d{3} × +\d+ ms, \d\.\d{3} × \(vitkd\) +\d+ ms, \d\.\d{3} ×", child.output())
