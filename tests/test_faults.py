"""Faults of the machine, the person and the data, end to end; after each, rows are counted. docs/faults.md lists them."""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import shutil
import signal
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import psutil
import pytest
from caches import FEATURES, groups, run, tree
from click.testing import CliRunner
from helpers import (
    TINY_VIT,
    Forked,
    Member,
    die_at,
    image_bytes,
    kdcache_command,
    make_cache,
    make_image,
    make_shard,
    make_shards,
    make_teacher_dir,
    sample_members,
    write_tar,
)
from PIL import Image
from torch.utils.data import DataLoader

import kdcache.commit
import kdcache.interrupt
import kdcache.join
import kdcache.rendering
from cli.main import main
from kdcache import open_cache
from kdcache.checkpoint import load_checkpoint
from kdcache.errors import KDCacheError, StoreError
from kdcache.join import BatchLoader, CachedViews, EpochBatches
from kdcache.plan import POLICIES
from kdcache.workers import iterate
from pipelines.train import TrainConfig, train
from pipelines.verify import verify

TARGETS = ("logits", FEATURES)
SHARDS, SAMPLES = 12, 6


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a teacher, and the cache `undisturbed` made of them."""
    folder = tmp_path_factory.mktemp("faults")
    make_shards(folder / "shards", num_shards=SHARDS, num_samples=SAMPLES)
    make_teacher_dir(folder / "teacher")
    run(folder, "undisturbed", targets=TARGETS)
    return folder


def arguments(setup: Path, cache: Path, *more: object) -> list[object]:
    """The command of `test_extract.run`."""
    given = ["extract", setup / "shards", cache, "--teacher", f"local-dir:{setup / 'teacher'}", "--target", "logits", "--target", FEATURES]
    return [*given, "--views", 2, "-b", 5, "--device", "cpu", *(more or ("-j", 0))]


def records(cache: Path) -> int:
    """Shards whose targets are committed."""
    return len(list(cache.glob("teachers/teacher/train-*.json")))


def assert_nothing_lost(cache: Path, setup: Path) -> None:
    """Every stored byte and every row as in `undisturbed`, nothing beside them, all sound."""
    assert groups(cache) == groups(setup / "undisturbed")
    made = open_cache(cache)
    assert made.root == open_cache(setup / "undisturbed").root
    assert [made.keys(shard) for shard in made.shards] == [[f"s{i:04d}" for i in range(SAMPLES)]] * SHARDS
    verdict = verify(str(cache), views="all", workers=0)
    assert verdict.ok, verdict.problems
    assert verdict.rows == SHARDS * SAMPLES
    assert not (cache / "tmp").exists()


# --- SIGKILL ---------------------------------------------------------------------------------------------------------


def twenty_moments() -> Iterator[tuple[str, float]]:
    """(part of the cache, number of the change to it that is not reached), or ('', seconds of start-up)."""
    random = Random(0)
    for _ in range(3):
        yield "", random.uniform(0, 0.12)
    yield "/cache.json", 1
    yield "/sources/", 1
    yield "/teacher.json", 1
    yield "/targets/", 1  # calibration and cards
    yield "/targets/", 2
    for _ in range(5):
        yield "/tmp/", random.randint(20, 420)  # spooling, publishing, cleaning up: about 235 a shard
    for _ in range(3):
        yield "/views/", random.randint(5, 110)  # about 60 a shard
    for _ in range(2):
        yield "/teachers/teacher/train", random.randint(5, 140)  # about 75 a shard
    for change in (1, 2):  # its table, then its documents
        yield "/index/", change


def test_resume_after_kill_gives_identical_bytes(setup: Path, tmp_path: Path) -> None:
    """SIGKILL at 20 moments from start-up to the index, each run resuming the one before: the same files, the same bytes, all sound."""
    cache, reached = tmp_path / "cache", []
    for number, (where, moment) in enumerate(twenty_moments()):
        if where == "/cache.json":  # a fast machine may have come beyond it while others start
            shutil.rmtree(cache, ignore_errors=True)
            reached.clear()

        def action(where: str = where, moment: float = moment, workers: int = number % 2) -> int:
            if where:
                die_at(cache, where, int(moment))
            return kdcache_command(*arguments(setup, cache, "-j", workers))()

        child = Forked(action, tmp_path / "log")
        if not where:
            time.sleep(moment)
            child.kill(group=True)
        assert child.wait() == -signal.SIGKILL, f"the kill at {where} {moment} did not strike: {child.output()}"
        reached.append(records(cache))
        if (cache / "cache.json").exists():
            assert {problem.kind for problem in verify(str(cache)).problems} <= {"extra"}  # a group whose record was not reached
    assert reached == sorted(reached), "a committed shard was lost"
    assert len(set(reached)) > 4, f"the kills struck after {reached} shards"
    run(setup, str(cache), targets=TARGETS)
    assert tree(cache) == tree(setup / "undisturbed")
    assert_nothing_lost(cache, setup)


# --- SIGTERM and Ctrl-C ----------------------------------------------------------------------------------------------


@pytest.fixture
def slow_images(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = kdcache.rendering.decode_image
    monkeypatch.setattr(kdcache.rendering, "decode_image", lambda *given: (time.sleep(0.01), decode(*given))[1])


@pytest.mark.parametrize(
    ("number", "workers", "group", "times"),
    [
        (signal.SIGINT, 0, False, 1),
        (signal.SIGINT, 2, True, 1),  # Ctrl-C goes to the whole group
        (signal.SIGTERM, 2, False, 1),
        (signal.SIGTERM, 2, True, 2),  # `timeout` and torchrun send it to the group, some of them twice
    ],
)
def test_a_signal_ends_an_extraction_soon_and_cleanly(
    setup: Path, tmp_path: Path, slow_images: None, number: signal.Signals, workers: int, group: bool, times: int
) -> None:
    cache = tmp_path / "cache"
    child = Forked(kdcache_command(*arguments(setup, cache, "-j", workers)), tmp_path / "log")
    child.wait_for(lambda: records(cache) > 0)
    for _ in range(times):
        child.kill(number, group=group)
    assert child.wait(60) == 1, child.output()
    assert f"stopped by {number.name}; what was committed is kept: run the same command again to finish the rest" in child.output()
    assert "still busy" not in child.output(), "it took longer than GRACE_S"
    assert "Traceback" not in child.output()
    assert child.group_is_gone(), "a worker was left behind"
    assert not (cache / "tmp").exists()
    assert 0 < records(cache) < SHARDS
    verdict = verify(str(cache))
    assert verdict.ok, verdict.problems
    assert any("unfinished" in note for note in verdict.notes)
    assert run(setup, str(cache), targets=TARGETS).rows == SHARDS * SAMPLES
    assert_nothing_lost(cache, setup)


@pytest.mark.parametrize("second", [True, False])
def test_a_second_signal_or_ten_seconds_end_what_does_not_end(
    setup: Path, tmp_path: Path, slow_images: None, monkeypatch: pytest.MonkeyPatch, second: bool
) -> None:
    def hang(_pool: Any) -> None:
        os.write(2, b"hanging\n")
        time.sleep(600)

    monkeypatch.setattr(kdcache.commit.ChunkPool, "close", hang)
    monkeypatch.setattr(kdcache.interrupt, "REPEAT_S", 0.0)
    monkeypatch.setattr(kdcache.interrupt, "GRACE_S", 300.0 if second else 0.2)
    cache = tmp_path / "cache"
    child = Forked(kdcache_command(*arguments(setup, cache, "-j", 1)), tmp_path / "log")
    child.wait_for(lambda: records(cache) > 0)
    child.kill(signal.SIGTERM)
    if second:
        child.wait_for(lambda: "hanging" in child.output())
        child.kill(signal.SIGINT)
        assert child.wait(30) == -signal.SIGINT
    else:
        assert child.wait(30) == 1
        assert "still busy" in child.output()
    assert child.group_is_gone(timeout_s=30), "workers notice that their parent is gone"
    monkeypatch.undo()
    run(setup, str(cache), targets=TARGETS)
    assert_nothing_lost(cache, setup)


def test_a_killed_worker_is_an_error_that_says_so_and_loses_nothing(setup: Path, tmp_path: Path, slow_images: None) -> None:
    cache = tmp_path / "cache"
    child = Forked(kdcache_command(*arguments(setup, cache, "-j", 2)), tmp_path / "log")
    child.wait_for(lambda: records(cache) > 0)
    psutil.Process(child.pid).children()[0].kill()
    assert child.wait(60) == 1, child.output()
    assert "a worker process was killed" in child.output()
    assert "Traceback" not in child.output()
    assert not (cache / "tmp").exists()
    run(setup, str(cache), targets=TARGETS)
    assert_nothing_lost(cache, setup)


@pytest.mark.parametrize("stage", ["extract", "train"])
def test_full_shared_memory_is_an_error_that_says_so_and_no_wait_for_ever(setup: Path, tmp_path: Path, stage: str) -> None:
    """A container's /dev/shm often has 64 MB. Here no file may pass 50 kB: one of views does, and none of the cache or the run."""
    cache = setup / "undisturbed" if stage == "train" else tmp_path / "cache"
    student = ["--student", TINY_VIT, "--model-kwargs", "embed_dim=8", "--model-kwargs", "depth=1", "--model-kwargs", "num_heads=1"]
    train = ["train", cache, *student, "--model-kwargs", "patch_size=8", "--epochs", 1, "-b", 20, "--device", "cpu", "--out", tmp_path / "runs"]
    command = [*train, "-j", 1] if stage == "train" else arguments(setup, cache, "-j", 1, "--size", 64)

    def action() -> int:
        os.register_at_fork(after_in_child=lambda: os.write(2, f"worker {os.getpid()}\n".encode()))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return kdcache_command(*command)()

    child = Forked(action, tmp_path / "log")
    assert child.wait(60) == 1, child.output()
    assert "has no shared memory left for its batch" in child.output()
    assert "--workers 0 needs none" in child.output()
    assert "Traceback" not in child.output()
    workers = re.findall(r"worker (\d+)\n", child.output())
    assert workers
    assert not [path for worker in workers for path in Path("/dev/shm").glob(f"torch_{worker}_*")]
    if stage == "extract":
        assert run(setup, str(cache), targets=TARGETS, size=64).rows == SHARDS * SAMPLES


def test_a_mistake_in_a_worker_is_shown_whole_and_not_called_a_kill(setup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_given: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(kdcache.rendering, "decode_image", decode)
    child = Forked(kdcache_command(*arguments(setup, tmp_path / "cache", "-j", 1)), tmp_path / "log")
    assert child.wait(60) != 0
    assert "a mistake of ours" in child.output()
    assert "was killed" not in child.output()


def test_a_signal_before_the_work_leaves_no_cache(setup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import kdcache.teacher

    def load(*_args: Any, **_options: Any) -> None:
        os.write(2, b"loading\n")
        time.sleep(600)

    monkeypatch.setattr(kdcache.teacher, "load_teacher", load)
    child = Forked(kdcache_command(*arguments(setup, tmp_path / "cache")), tmp_path / "log")
    child.wait_for(lambda: "loading" in child.output())
    child.kill(signal.SIGTERM)
    assert child.wait(30) == 1
    assert "run the same command again" in child.output()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("second", [False, True])
def test_what_must_be_finished_first_is_however_long_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: bool) -> None:
    monkeypatch.setattr(kdcache.interrupt, "REPEAT_S", 0.0)
    monkeypatch.setattr(kdcache.interrupt, "GRACE_S", 0.2)

    def command() -> None:
        with kdcache.interrupt.stopping_cleanly():
            try:
                with kdcache.interrupt.finishing_first(), kdcache.interrupt.finishing_first():
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.4)
                    os.write(1, b"updated\n")
                    if second:
                        os.kill(os.getpid(), signal.SIGTERM)
                os.write(1, b"not reached\n")
            except kdcache.interrupt.Stopped as stopped:
                os.write(1, f"{stopped}\n".encode())
                with kdcache.interrupt.finishing_first():
                    time.sleep(0.4)
                    os.write(1, b"saved\n")
                time.sleep(60)

    child = Forked(command, tmp_path / "log")
    status = child.wait(30)
    said = child.output()
    if second:
        assert (status, said.splitlines()[-1]) == (-signal.SIGTERM, "updated")
    else:
        assert status == 1
        assert [line for line in said.splitlines() if line in ("updated", "not reached", "SIGINT", "saved")] == ["updated", "SIGINT", "saved"]
        assert "still busy" in said


def test_an_ignored_interrupt_stays_ignored(setup: Path, tmp_path: Path) -> None:
    """As under nohup, or in the background of a script."""

    def action() -> int:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with kdcache.interrupt.stopping_cleanly():
            os.kill(os.getpid(), signal.SIGINT)
        return 0

    assert Forked(action, tmp_path / "log").wait(30) == 0


def test_a_signal_that_python_drops_ends_the_loop_it_came_in(tmp_path: Path) -> None:
    """In a destructor, as in a hook of fork while workers begin: its exception is printed and forgotten there."""

    class Dropping:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    def action() -> int:
        with kdcache.interrupt.stopping_cleanly():
            seen = 0
            try:
                for _ in iterate(DataLoader(range(3))):  # type: ignore[arg-type]
                    seen += 1
                    Dropping()
            except kdcache.interrupt.Stopped:
                return seen
        return 3

    assert Forked(action, tmp_path / "log").wait(30) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_during_training_keeps_the_last_epoch_and_says_how_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    cache = make_cache(tmp_path, targets=("logits",), views=1)
    options = ["--model-kwargs", "embed_dim=16", "--model-kwargs", "depth=1", "--model-kwargs", "num_heads=2", "--model-kwargs", "patch_size=8"]
    command = ["train", cache, "--student", TINY_VIT, *options, "--epochs", 6, "-b", 4, "-j", workers, "--device", "cpu", "--out", tmp_path / "runs"]
    decode = kdcache.join.decode_image
    monkeypatch.setattr(kdcache.join, "decode_image", lambda *given: (time.sleep(0.03), decode(*given))[1])
    child = Forked(kdcache_command(*command), tmp_path / "log")
    child.wait_for(lambda: list(tmp_path.glob("runs/*/last/checkpoint.pt")))
    child.kill(signal.SIGTERM, group=True)
    assert child.wait(60) == 1, child.output()
    assert "stopped by SIGTERM; the last checkpoint is kept: run the same command again with --resume" in child.output()
    assert child.group_is_gone(timeout_s=2)  # less than workers need to notice by themselves
    (last,) = tmp_path.glob("runs/*/last/checkpoint.pt")
    assert 1 <= load_checkpoint(last, fingerprint=open_cache(cache).fingerprint)["epoch"] < 6
    monkeypatch.undo()
    result = CliRunner().invoke(main, [*map(str, command), "--resume", "--json"])
    assert result.exit_code == 0, result.stderr
    assert [(entry["status"], entry["epochs"]) for entry in json.loads(result.stdout)["runs"]] == [("done", 6)]


# --- the disk --------------------------------------------------------------------------------------------------------

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_REMOUNT, MS_PRIVATE, MS_REC = 32, 1 << 18, 1 << 14


class SmallDisk:
    """A tmpfs of so many bytes on `folder`, in a mount namespace of this process; where that is forbidden, a limit on the size of files."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder = folder
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.is_mounted = (
            self._unshare() and self._mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) and self._mount_tmpfs(0, size)
        )  # fmt: skip
        if not self.is_mounted:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            self.resize(size)

    def _unshare(self) -> bool:
        uid, gid = os.getuid(), os.getgid()
        if self._libc.unshare(CLONE_NEWNS) == 0:
            return True
        if self._libc.unshare(CLONE_NEWNS | CLONE_NEWUSER) != 0:
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
        return True

    def _mount(self, source: bytes, target: bytes, kind: bytes | None, flags: int, options: bytes | None) -> bool:
        return self._libc.mount(source, target, kind, ctypes.c_ulong(flags), options) == 0

    def _mount_tmpfs(self, flags: int, size: int) -> bool:
        return self._mount(b"tmpfs", os.fsencode(self._folder), b"tmpfs", flags, f"size={size}".encode())

    def resize(self, size: int) -> None:
        if self.is_mounted:
            assert self._mount_tmpfs(MS_REMOUNT, size)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_loses_nothing_and_a_larger_one_finishes(setup: Path, tmp_path: Path) -> None:
    cache = tmp_path / "disk" / "cache"
    (tmp_path / "disk").mkdir()

    def action() -> int:
        disk = SmallDisk(tmp_path / "disk", 4096)
        done = []
        for size in (30_000, 100_000, 300_000, 600_000, 1_000_000):
            disk.resize(size)
            with pytest.raises(StoreError, match=r"No space left on device|File too large"):
                run(setup, str(cache), targets=TARGETS)
            assert not (cache / "tmp").exists()
            done.append(records(cache))
            if (cache / "cache.json").exists():
                assert {problem.kind for problem in verify(str(cache)).problems} <= {"extra", "index"}
        assert done == sorted(done)
        assert 0 < done[-1] < SHARDS or not disk.is_mounted, done  # a limit on files stops the index only
        disk.resize(1 << 30)
        assert run(setup, str(cache), targets=TARGETS).rows == SHARDS * SAMPLES
        assert_nothing_lost(cache, setup)
        return 0

    child = Forked(action, tmp_path / "log")
    assert child.wait() == 0, child.output()


@pytest.fixture
def public(setup: Path) -> Iterator[Path]:
    """A copy of the shards and the teacher that every user may read: pytest's own folders are closed to others."""
    with tempfile.TemporaryDirectory(prefix="kdcache-") as folder:
        for name in ("shards", "teacher"):
            shutil.copytree(setup / name, Path(folder, name))
        for path in (Path(folder), *Path(folder).rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield Path(folder)


def test_a_read_only_cache_is_an_error_of_extract_and_none_of_its_readers(public: Path, tmp_path: Path) -> None:
    cache = public / "cache"
    run(public, targets=TARGETS, limit_shards=2)
    before = tree(cache)
    folders = [cache, *(path for path in cache.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)

    def as_another_user(*command: object) -> tuple[int, str]:
        def action() -> int:
            if os.getuid() == 0:
                os.setuid(65534)
            return kdcache_command(*command)()

        child = Forked(action, tmp_path / "log")
        return child.wait(), child.output()

    try:
        status, said = as_another_user(*arguments(public, cache))
        assert (status, "Permission denied" in said, "Traceback" in said) == (1, True, False), said
        for command in (arguments(public, cache, "-j", 0, "--limit-shards", 2), ("verify", cache, "--views", "all", "-j", 0), ("inspect", cache)):
            status, said = as_another_user(*command)
            assert status == 0, said
    finally:
        for path in folders:
            path.chmod(0o755)
    assert tree(cache) == before
    assert run(public, targets=TARGETS).rows == SHARDS * SAMPLES
    assert verify(str(cache)).ok


# --- the data --------------------------------------------------------------------------------------------------------


def bomb() -> bytes:
    """A sound grey PNG of 20,000 × 20,000 pixels in 400 kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeeze = zlib.compressobj(1)
    pixels = b"".join([*(squeeze.compress(bytes(20_001)) for _ in range(20_000)), squeeze.flush()])
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def kinds_of_images() -> dict[str, tuple[str, bytes]]:
    """Key → (extension, file): what can be decoded, under names that are hard to bear."""
    with_alpha = make_image(0)
    with_alpha.putalpha(make_image(1, mode="L"))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    sixteen_bits = Image.fromarray(np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40))
    return {
        "plain": ("jpg", image_bytes(make_image(0))),
        "exif": ("jpeg", image_bytes(make_image(0), exif=rotated)),
        "cmyk": ("jpg", image_bytes(make_image(1, mode="CMYK"))),
        "grey": ("jpg", image_bytes(make_image(2, mode="L"))),
        "one bit": ("png", image_bytes(make_image(3, mode="1"), "png")),
        "../../up": ("png", image_bytes(make_image(4).quantize(64), "png", transparency=bytes([0, 128, 255] * 20))),
        "a/../b": ("png", image_bytes(with_alpha, "png")),
        "a/b c/grey and alpha": ("png", image_bytes(make_image(5, mode="L").convert("LA"), "png")),
        "ñandú/日本": ("png", image_bytes(sixteen_bits, "png")),
        " space ": ("webp", image_bytes(make_image(6), "webp")),
        "1x1": ("png", image_bytes(make_image(7, (1, 1)), "png")),
        "900x3": ("jpg", image_bytes(make_image(8, (900, 3)))),
        "3x900": ("png", image_bytes(make_image(9, (3, 900)), "png")),
    }


def kinds_of_damage() -> dict[str, tuple[str, bytes, str]]:
    """Key → (extension, file, reason of the skip): what can't."""
    return {
        "bomb": ("png", bomb(), "decompression bomb"),
        "zero bytes": ("jpg", b"", "empty file"),
        "cut": ("jpg", image_bytes(make_image(0))[:-100], "damaged image"),
        "text": ("jpg", b"<html>404 Not Found</html>", "not a JPEG, PNG or WebP image"),
        "gif": ("png", b"GIF89a" + bytes(100), "not a JPEG, PNG or WebP image"),
    }


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards: images of every kind, plain ones with labels beyond the teacher's classes, a cut tar, a negative label, a huge one."""
    folder = tmp_path_factory.mktemp("hostile")
    members: list[Member] = []
    for key, (extension, data, *_) in {**kinds_of_images(), **kinds_of_damage()}.items():
        members += [(f"{key}.{extension}", data), (f"{key}.cls", b"3")]
    write_tar(folder / "shards" / "train-0000.tar", members)
    make_shard(folder / "shards" / "train-0001.tar", num_samples=6, seed=8, num_classes=12)
    make_shard(folder / "shards" / "train-0002.tar", num_samples=6, seed=2, truncate_at=6000)
    for shard, label in ((3, b"-1"), (4, b'{"label": 99999999999999999999}')):
        bad = ("s0009.jpg", image_bytes(make_image(9))), (f"s0009.{'cls' if shard == 3 else 'json'}", label)
        write_tar(folder / "shards" / f"train-{shard:04d}.tar", [*sample_members("s0000", shard), *bad])
    make_teacher_dir(folder / "teacher")
    return folder


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_hostile_data_are_counted_skips_and_problems_and_both_stages_see_the_same_rows(
    hostile: Path, tmp_path: Path, policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    views = 2 if POLICIES[policy].is_random else 1
    summary = run(hostile, str(tmp_path / "cache"), augment=policy, views=views, targets=TARGETS)
    good, bad = kinds_of_images(), kinds_of_damage()
    cache = open_cache(tmp_path / "cache")
    kept = cache.views_record("train-0002", 0).rows
    assert 1 <= kept < 6
    assert (summary.shards, summary.rows, summary.skipped) == (3, len(good) + 6 + kept, len(bad))
    assert {problem["shard"]: problem["kind"] for problem in summary.problems} == dict.fromkeys(("train-0002", "train-0003", "train-0004"), "source")
    details = {problem["shard"]: problem["detail"] for problem in summary.problems}
    assert "cut short" in details["train-0002"]
    assert "key 's0009': s0009.cls holds b'-1'" in details["train-0003"]
    assert "key 's0009': label 99999999999999999999 in s0009.json, expected a whole number from 0" in details["train-0004"]
    assert "the teacher has 10 classes, labels reach 11" in capsys.readouterr().err

    assert cache.keys("train-0000") == list(good)
    skipped = {skip.key: skip.reason for skip in cache.views_record("train-0000", 0).skipped}
    assert skipped.keys() == bad.keys()
    assert skipped == {key: reason for key, (_, _, reason) in bad.items()}
    for key in bad:
        with pytest.raises(KDCacheError, match=f"key '{key}' was skipped when the cache was made"):
            cache.read("train-0000", key)
    np.testing.assert_array_equal(cache.view("train-0000", "plain"), cache_view_of_the_same_image(cache, hostile))

    rows = np.arange(len(cache.rows))
    dataset = CachedViews(cache, targets=cache.layer(None).targets, check_views=1.0)
    loader = BatchLoader(dataset, EpochBatches(rows, batch_size=len(rows), num_views=views, seed=0), num_workers=0)
    for epoch in range(views):
        (batch,) = loader.epoch(epoch)
        assert batch["views"].shape == (summary.rows, 32, 32, 3)
        assert sorted(batch["labels"].tolist()) == sorted([3] * len(good) + [8, 9, 10, 11, 0, 1] + [2 + i for i in range(kept)])
        assert {len(component) for target in batch["targets"].values() for component in target.values()} == {summary.rows}
    verdict = verify(str(tmp_path / "cache"), views="all", workers=0)
    assert (verdict.ok, verdict.rows) == (True, summary.rows), verdict.problems
    assert run(hostile, str(tmp_path / "cache"), augment=policy, views=views, targets=TARGETS).bytes == 0, "a second run finds nothing more to do"


def cache_view_of_the_same_image(cache: Any, hostile: Path) -> np.ndarray[Any, Any]:
    """The rule for EXIF: its orientation is ignored, so that 'exif' is rendered from its params as 'plain' is from its own."""
    from kdcache.images import decode_image
    from kdcache.views import render

    image = decode_image(kinds_of_images()["exif"][1])
    return render(image, cache.read_params("train-0000", 0, [cache.row_of("train-0000", "plain")])[0])


def test_labels_beyond_the_classes_of_a_student_are_refused_by_name_and_train_without_labels(hostile: Path, tmp_path: Path) -> None:
    run(hostile, str(tmp_path / "cache"), views=1)
    args = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    config: dict[str, Any] = {"cache": str(tmp_path / "cache"), "students": (TINY_VIT,), "model_kwargs": args, "out": str(tmp_path / "runs")}
    config |= {"epochs": 1, "batch_size": 4, "workers": 0, "device": "cpu", "limit_shards": 3}
    with pytest.raises(KDCacheError, match=r"shard train-0001: key 's0002' has label 10, the student has 10 classes"):
        train(TrainConfig(**config))
    (trained,) = train(TrainConfig(**config, task_loss_weight=0.0))
    assert trained["status"] == "done"
