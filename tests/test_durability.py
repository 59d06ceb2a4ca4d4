"""What a loss of power may take: no name is given to bytes that are not on disk, and what vouches for others comes after them.

`conftest.py` lets os.fsync do nothing, for speed. Here it does nothing either, but is listened to.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY_VIT, image_bytes, make_image, make_shard, make_shards, make_teacher_dir

from pipelines.extract import ExtractConfig, extract
from pipelines.pack import PackConfig, pack
from pipelines.train import TrainConfig, train


@dataclass(frozen=True)
class Event:
    what: str
    """"sync" of a folder, or "name": a file or a folder gets one."""
    path: Path


class Watched:
    """What os was asked for: every name that was given, and the folders synced since. A file gets its name as it was synced, or the test fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[Event] = []
        self.synced: dict[tuple[int, int], tuple[int, int]] = {}
        """Of each file (device, inode) → (size, time of the last change) when it was synced."""
        self.unsynced: list[Path] = []
        monkeypatch.setattr(os, "fsync", self._sync)
        for name in ("link", "rename", "replace"):
            monkeypatch.setattr(os, name, self._watching(getattr(os, name)))

    def _sync(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        self.synced[status.st_dev, status.st_ino] = status.st_size, status.st_mtime_ns
        if stat.S_ISDIR(status.st_mode):
            self.events.append(Event("sync", Path(f"{status.st_dev}/{status.st_ino}")))

    def _watching(self, function: Any) -> Any:
        def give(source: Any, target: Any) -> None:
            function(source, target)
            path = Path(target)
            self.unsynced += [one for one in (path.rglob("*") if path.is_dir() else [path]) if not self.is_synced(one)]
            self.events.append(Event("name", path))

        return give

    def is_synced(self, path: Path) -> bool:
        """Whether a file is on disk as it is now, or a folder was synced at all since its last change."""
        status = path.stat()
        return self.synced.get((status.st_dev, status.st_ino)) == (status.st_size, status.st_mtime_ns)

    def named(self, pattern: str) -> list[int]:
        """The moments when a name that matches was given."""
        return [moment for moment, event in enumerate(self.events) if event.what == "name" and event.path.match(pattern)]

    def lasting(self, moment: int) -> int:
        """The moment when a name that was given is on disk: its folder's next sync. Fails if there is none."""
        status = self.events[moment].path.parent.stat()
        folder = Event("sync", Path(f"{status.st_dev}/{status.st_ino}"))
        return self.events.index(folder, moment)


def test_what_a_record_names_is_on_disk_before_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path / "shards", num_shards=2, num_samples=3)
    teacher, cache = make_teacher_dir(tmp_path / "teacher"), tmp_path / "cache"
    watched = Watched(monkeypatch)
    extract(
        ExtractConfig(shards=str(tmp_path / "shards"), cache=str(cache), teacher=teacher, targets=["logits", "features@norm"], views=2, workers=0)
    )
    assert watched.unsynced == []
    given = {watched.events[moment].path: moment for moment in watched.named("*")}
    assert {path for path in cache.rglob("*") if path.is_file()} <= given.keys()
    records = [path for path in given if path.match("views/train-*.json") or path.match("teachers/*/train-*.json")]
    assert len(records) == 4
    for record in records:
        files = json.loads(record.read_text())["identity"]["group"]
        group = [given[record.parent / files["name"] / path] for path in files["files"]]
        assert len(group) > 3
        assert max(map(watched.lasting, group)) < given[record] < watched.lasting(given[record])
    (index,) = (moment for path, moment in given.items() if path.match("index/index.*.json"))
    assert max(watched.lasting(given[record]) for record in records) < index


def test_a_checkpoint_and_an_export_are_on_disk_before_they_have_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path / "shards", num_shards=1, num_samples=4)
    make_shard(tmp_path / "val" / "val-00.tar", num_samples=2)
    teacher, runs = make_teacher_dir(tmp_path / "teacher"), tmp_path / "runs"
    extract(ExtractConfig(shards=str(tmp_path / "shards"), cache=str(tmp_path / "cache"), teacher=teacher, targets=["logits"], views=1, workers=0))
    watched = Watched(monkeypatch)
    student: dict[str, Any] = {"patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 1}
    train(
        TrainConfig(
            cache=str(tmp_path / "cache"), students=(TINY_VIT,), model_kwargs=student, out=str(runs), val=str(tmp_path / "val"), epochs=3,
            batch_size=2, workers=0, device="cpu", log_interval=1, recovery_interval=1,
        )
    )  # fmt: skip
    checkpoints = [moment for place in ("last", "best") for moment in watched.named(f"{place}/checkpoint.pt")]
    assert len(checkpoints) >= 6 + 1  # after each of two steps of three epochs
    (export,) = watched.named("export")
    assert {path.name for path in watched.unsynced} <= {"args.yaml", "summary.csv"}  # from which no run goes on
    assert max(map(watched.lasting, checkpoints)) < export < watched.lasting(export)
    (metrics,) = runs.glob("*/metrics.jsonl")
    assert watched.is_synced(metrics)


def test_a_packed_tar_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "a.jpg").write_bytes(image_bytes(make_image(0)))
    watched = Watched(monkeypatch)
    pack(PackConfig(images=str(tmp_path / "images"), out=str(tmp_path / "out")))
    assert len(watched.named("*.tar")) == 1 and watched.unsynced == []
