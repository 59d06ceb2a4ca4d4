"""What no record owns is shown and, when told, removed; what is dropped leaves the cache that never held it; a kill leaves a sound one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from caches import BLOCK, KILLED, NORM, flip, one, record, run, stored, tree
from click.testing import CliRunner
from helpers import make_shards, make_teacher_dir, run_python

import pipelines.extract
from cli.main import main
from kdcache import open_cache
from kdcache.errors import CorruptError, StoreError
from kdcache.store import LocalStore
from pipelines.gc import GcConfig, GcReport, gc
from pipelines.verify import verify


def collect(cache: Path, **options: Any) -> GcReport:
    return gc(GcConfig(cache=str(cache), **options))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards; two teachers, the first with three targets in two segments of views, the second with logits of fewer views."""
    folder = tmp_path_factory.mktemp("made")
    make_shards(folder / "shards", num_shards=2, num_samples=4, corrupt=(3,))
    make_teacher_dir(folder / "teacher")
    make_teacher_dir(folder / "teacher2", seed=5)
    for views in (2, 5):
        record(folder, "cache", ("logits", BLOCK, NORM), views)
    record(folder, "cache", ("logits",), 3, teacher=f"local-dir:{folder / 'teacher2'}", name="second")
    return folder


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "cache", tmp_path / "cache"))


def litter(cache: Path) -> dict[str, str]:
    """Leave one of everything that killed runs and people leave; path → kind."""
    group = one(cache, "views/train-0000.*.zarr")
    orphan = group.parent / "train-0000.000000000000.aaaaaaaaaaaa.zarr"
    shutil.copytree(group, orphan)
    theirs = one(cache, "teachers/second/train-0001.*.zarr")
    (theirs / "logits" / "left").write_bytes(bytes(10))
    (cache / "teachers" / "teacher" / "targets" / "logits.calibration.safetensors").write_bytes(bytes(20))
    (cache / "notes.txt").write_text("mine")
    (cache / "link").symlink_to("/etc")
    (cache / "index" / "table.000000000000.bin").write_bytes(bytes(32))
    code = "import os, sys\nfrom kdcache.store import LocalStore\nspool = LocalStore(sys.argv[1]).new_spool(); (spool / 'f').write_bytes(bytes(50)); os._exit(1)"
    run_python(code, cache, check=False)
    return {
        str(orphan.relative_to(cache)): "group",
        str((theirs / "logits" / "left").relative_to(cache)): "file",
        "teachers/teacher/targets/logits.calibration.safetensors": "file",
        "notes.txt": "file",
        "link": "file",
        "index/table.000000000000.bin": "index",
        str(one(cache, "tmp/*").relative_to(cache)): "spool",
    }


def test_what_no_record_owns_is_shown_then_removed_and_nothing_else(cache: Path) -> None:
    before = tree(cache)
    report = collect(cache)
    assert (report.garbage, report.dropped, report.bytes, report.deleted) == ([], [], 0, False)
    left = litter(cache)
    littered = tree(cache)
    sizes = {path: sum(file.lstat().st_size for file in [cache / path, *(cache / path).rglob("*")] if not file.is_dir()) for path in left}
    sizes["link"] = 0
    report = collect(cache)
    assert {one.path: one.kind for one in report.garbage} == left
    assert {one.path: one.size for one in report.garbage} == sizes
    assert (report.deleted, report.bytes) == (False, sum(sizes.values()))
    assert tree(cache) == littered, "a dry run changes nothing"
    assert collect(cache, delete=True).deleted
    assert tree(cache) == before
    assert not (cache / "tmp").exists()
    assert not (cache / "link").is_symlink()
    assert collect(cache).garbage == []


def test_a_group_that_was_moved_and_linked_to_is_not_taken_for_a_stray_link(cache: Path) -> None:
    group = one(cache, "teachers/second/train-0000.*.zarr")
    group.rename(cache.parent / group.name)
    group.symlink_to(cache.parent / group.name)
    assert collect(cache, delete=True).garbage == []
    assert group.is_symlink()


def test_a_damaged_document_stops_gc_because_its_group_would_look_like_nobodys(cache: Path) -> None:
    flip(one(cache, "teachers/second/train-0000.*.json"), 300)
    before = tree(cache)
    for delete in (False, True):
        with pytest.raises(CorruptError, match=r"teachers/second/train-0000.*bytes were changed"):
            collect(cache, delete=delete)
    assert tree(cache) == before


@pytest.mark.parametrize(
    ("drop", "targets", "views"),
    [
        ({"drop_targets": [NORM]}, ("logits", BLOCK), 5),
        ({"drop_targets": ["logits", BLOCK], "teacher": "teacher", "keep_views": 4}, (NORM,), 4),
        ({"keep_views": 2}, ("logits", BLOCK, NORM), 2),
        ({"drop_teachers": ["teacher"]}, (), 5),
    ],
)
def test_what_is_dropped_leaves_the_cache_that_never_held_it(
    made: Path, cache: Path, drop: dict[str, Any], targets: tuple[str, ...], views: int
) -> None:
    before = tree(cache)
    told = collect(cache, **drop)
    assert tree(cache) == before, "a dry run changes nothing"
    assert told.dropped
    assert told.removed_records + told.rewritten_records > 0
    assert told.root == open_cache(cache).root
    sizes = [sum(file.stat().st_size for file in cache.rglob("*.zarr/**/*") if file.is_file())]
    done = collect(cache, delete=True, **drop)
    sizes.append(sum(file.stat().st_size for file in cache.rglob("*.zarr/**/*") if file.is_file()))
    assert sizes[0] - sizes[1] == pytest.approx(done.bytes, rel=0.15)
    alone = cache.parent / "alone"
    for some in (2, views) if views > 2 else (views,):
        if targets:
            record(made, str(alone), targets, some)
    second = {"teacher": f"local-dir:{made / 'teacher2'}", "name": "second"}
    if not targets:  # the second teacher's views were recorded when the first had made more
        shutil.copytree(made / "cache", alone)
        shutil.rmtree(alone / "teachers" / "teacher")
    record(made, str(alone), ("logits",), min(views, 3), **second)
    assert stored(cache) == stored(alone)
    assert done.root == open_cache(cache).root == open_cache(alone).root
    verdict = verify(str(cache), views="all", workers=0)
    assert (verdict.problems, verdict.notes) == ([], [])
    assert set(tree(cache)) - set(tree(alone)) <= {path for path in tree(cache) if path.startswith("index/")}
    assert not (cache / "tmp").exists()
    assert collect(cache).garbage == []


def test_what_was_dropped_can_be_extracted_again(made: Path, cache: Path) -> None:
    collect(cache, drop_targets=[NORM], keep_views=3, delete=True)
    record(made, str(cache), ("logits", BLOCK, NORM), 5)
    assert verify(str(cache), views="all", workers=0).ok
    old, new = open_cache(made / "cache"), open_cache(cache)
    for view in range(5):
        a, b = (one.read("train-0001", "s0002", view, "teacher") for one in (old, new))
        assert all((a[name] == b[name]).all() for name in ("logits", BLOCK, NORM))


def test_gc_killed_at_any_moment_leaves_a_sound_cache_and_the_same_command_finishes(made: Path, tmp_path: Path) -> None:
    code = """
from kdcache import open_cache
from kdcache.errors import UsageError
from pipelines.gc import GcConfig, gc
source, out = sys.argv[1:]

def kept(cache):
    with open_cache(cache) as opened:
        read = lambda target, name: [part.tobytes() for shard in opened.shards for view in range(2)
            for part in opened.read_components(name, target, shard, view, range(3)).values()]
        return read("features@blocks.0", "teacher") + [opened.read_params(shard, 1, range(3)) for shard in opened.shards]

wanted = kept(source)
drop = {"drop_targets": ["features@norm"], "drop_teachers": ["second"], "keep_views": 4, "delete": True}
config = lambda name, **options: GcConfig(cache=f"{out}/{name}", **options)
shutil.copytree(source, f"{out}/whole")
root = gc(config("whole", **drop)).root
moment, kills = 2, 0
while True:
    dest = f"{out}/{moment}"
    shutil.copytree(source, dest)
    if not killed_at(moment, lambda: gc(config(moment, **drop))):
        break
    kills += 1
    assert {problem.kind for problem in verify(dest).problems} <= {"extra"}, (moment, verify(dest).problems)
    assert kept(dest) == wanted, moment
    try:
        gc(config(moment, **drop))
    except UsageError:  # all that was to be dropped is gone, or some of it: nothing is forgotten
        rest = {"keep_views": 4}
        cards = open_cache(dest)
        if "second" in cards.teachers: rest["drop_teachers"] = ["second"]
        if "features@norm" in cards.teachers["teacher"].targets: rest["drop_targets"] = ["features@norm"]
        gc(config(moment, **rest, delete=True))
    verdict = verify(dest)
    assert verdict.ok and not verdict.notes and verdict.root == root and not os.path.exists(dest + "/tmp"), (moment, verdict)
    shutil.rmtree(dest)
    moment += 67
print(kills)
"""
    assert int(run_python(KILLED + code, made / "cache", tmp_path).stdout) > 6


def test_nothing_is_removed_while_an_extraction_runs_and_none_begins_while_gc_removes(
    made: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    litter(cache)
    before = {path: digest for path, digest in tree(cache).items() if not path.startswith("index/")}  # which a run that has work to do drops
    original, asked = pipelines.extract._Run.extract, []

    def extract_meanwhile(self: Any) -> Any:
        with pytest.raises(StoreError, match="another process is writing to it; nothing was changed"):
            collect(cache, delete=True)
        assert {path: digest for path, digest in tree(cache).items() if path in before} == before
        asked.append(len(collect(cache).garbage))  # a dry run may look
        return original(self)

    monkeypatch.setattr(pipelines.extract._Run, "extract", extract_meanwhile)
    record(made, str(cache), ("logits",), 6, teacher=f"local-dir:{made / 'teacher2'}", name="third")
    assert asked == [6]
    with LocalStore(cache).hold(alone=True), pytest.raises(StoreError, match="'kdcache gc' is removing from it"):
        run(made, str(cache), targets=("logits",), views=7)
    assert collect(cache, delete=True).deleted


def test_a_live_spool_of_anyone_else_stops_gc(cache: Path) -> None:
    code = "import sys\nfrom kdcache.store import LocalStore\nprint(LocalStore(sys.argv[1]).new_spool(), flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, str(cache)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        spool = other.stdout.readline().strip()
        assert collect(cache).alive == [f"tmp/{os.path.basename(spool)}"]
        with pytest.raises(StoreError, match="nothing was deleted: wait until it ends"):
            collect(cache, delete=True)
        other.stdin.close()
    assert collect(cache, delete=True).deleted


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--drop-target", "logitz"], "teacher second has: logits; teacher teacher has: features@blocks.0, features@norm, logits"),
        (["--drop-target", "logits"], "is there of the teachers second, teacher; pass --teacher"),
        (["--drop-target", NORM, "--teacher", "second"], "no target 'features@norm'; teacher second has: logits"),
        (["--drop-teacher", "third"], "no teacher 'third'; the cache has: second, teacher"),
        (["--teacher", "second"], "to drop a whole teacher pass --drop-teacher"),
        (["--keep-views", "6"], "the cache has 5 views"),
    ],
)
def test_what_the_cache_does_not_have_is_a_usage_error_that_says_what_it_has(made: Path, options: list[str], text: str) -> None:
    before = tree(made / "cache")
    result = CliRunner().invoke(main, ["gc", str(made / "cache"), *options, "--delete"])
    assert result.exit_code == 2
    assert text in result.stderr
    assert tree(made / "cache") == before


def test_gc_command_shows_sizes_and_prints_json(cache: Path) -> None:
    litter(cache)
    result = CliRunner().invoke(main, ["gc", str(cache), "--drop-target", NORM, "--json"])
    assert result.exit_code == 0, result.stderr
    body = json.loads(result.stdout)
    assert (body["deleted"], len(body["garbage"]), body["rewritten_records"]) == (False, 7, 4)
    assert {one["kind"] for one in body["garbage"]} == {"group", "file", "index", "spool"}
    for text in ("orphan group", "stray file", "stale index", "dead spool", "notes.txt", "target features@norm of teacher teacher", "pass --delete"):
        assert text in result.stderr
    result = CliRunner().invoke(main, ["gc", str(cache), "--delete", "--json"])
    assert json.loads(result.stdout)["deleted"]
    assert CliRunner().invoke(main, ["gc", str(cache)]).stderr.endswith("nothing to remove: records own every file\n")
    assert CliRunner().invoke(main, ["gc", str(cache / "nowhere"), "--delete"]).exit_code == 1
    assert not (cache / "nowhere").exists()
