"""A part of a cache elsewhere: equal to an extraction of that part alone, proved while it is read, continued when it was killed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import BLOCK, KILLED, NORM, flip, one, read_everything, record, stored, tree
from click.testing import CliRunner
from helpers import make_shard, make_shards, make_teacher_dir, run_python

from cli.main import main
from kdcache import open_cache
from kdcache.arrays import array_spec, write_array
from kdcache.errors import CorruptError, KDCacheError, MismatchError, UsageError
from kdcache.format import Document, Group, ViewRange, ViewsIdentity, digest_of_files, dump_document
from kdcache.index import drop_index
from kdcache.opening import refresh_index
from kdcache.paths import views_record_path
from kdcache.store import open_store
from pipelines.copy import CopyConfig, CopySummary, copy
from pipelines.facts import owned_bytes
from pipelines.inspect import inspect_cache, inspect_shard
from pipelines.inspection.inspect_text import cache_as_text, shard_as_text
from pipelines.verify import verify


def take(setup: Path, dest: str = "copy", **options: Any) -> CopySummary:
    return copy(CopyConfig(**{"cache": str(setup / "cache"), "dest": str(setup / dest), **options}))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with skipped samples and one without rows; a cache of three targets, in two segments of views."""
    folder = tmp_path_factory.mktemp("made")
    make_shards(folder / "shards", num_shards=2, num_samples=5, corrupt=(3,))
    make_shard(folder / "shards" / "train-0002.tar", num_samples=2, corrupt=(0, 1), seed=2)
    make_teacher_dir(folder / "teacher")
    for views in (2, 5):
        record(folder, "cache", ("logits", BLOCK, NORM), views)
    return folder


def test_a_copy_of_the_whole_is_the_cache_to_the_byte(made: Path, tmp_path: Path) -> None:
    summary = take(made, str(tmp_path / "copy"))
    assert tree(tmp_path / "copy") == tree(made / "cache")
    assert (summary.root, summary.rows, summary.cut_segments) == (open_cache(made / "cache").root, 8, 0)
    assert summary.bytes == owned_bytes(open_cache(made / "cache"))
    again = take(made, str(tmp_path / "copy"))
    assert (again.bytes, again.resumed_segments) == (0, again.segments)


@pytest.mark.parametrize(("targets", "views"), [(("logits",), 5), ((BLOCK, NORM), 4), (("logits", NORM), 1), (("logits", BLOCK, NORM), 2)])
def test_a_part_is_what_an_extraction_of_that_part_alone_gives(made: Path, tmp_path: Path, targets: tuple[str, ...], views: int) -> None:
    summary = take(made, str(tmp_path / "copy"), targets=targets, views=views)
    for some in (2, views) if views > 2 else (views,):
        record(made, str(tmp_path / "alone"), targets, some)
    assert stored(tmp_path / "copy") == stored(tmp_path / "alone")
    assert summary.root == open_cache(tmp_path / "alone").root
    verdict = verify(str(tmp_path / "copy"), views="all", workers=0)
    assert (verdict.problems, verdict.root, verdict.notes) == ([], summary.root, [])
    assert take(made, str(tmp_path / "copy"), targets=targets, views=views).bytes == 0


def test_the_first_shards_are_a_finished_cache_of_their_own_and_grow_with_the_limit(made: Path, tmp_path: Path) -> None:
    take(made, str(tmp_path / "copy"), limit_shards=1)
    assert open_cache(tmp_path / "copy").all_shards == ["train-0000"]
    assert verify(str(tmp_path / "copy"), views="all", workers=0).notes == []
    assert take(made, str(tmp_path / "copy")).root == open_cache(made / "cache").root


def test_what_was_left_out_can_be_extracted_into_the_copy(made: Path, tmp_path: Path) -> None:
    take(made, str(tmp_path / "copy"), targets=(NORM,), views=3)
    record(made, str(tmp_path / "copy"), ("logits", BLOCK, NORM), 5)
    assert verify(str(tmp_path / "copy"), views="all", workers=0).ok
    assert read_everything(tmp_path / "copy") == read_everything(made / "cache")


def test_fidelity_stays_with_the_targets_and_says_what_it_was_measured_over(made: Path, tmp_path: Path) -> None:
    figures = ("rel_l2", "cosine", "kl_t1", "kl_t4")

    def logits(folder: Path) -> dict[str, Any]:
        return dict(inspect_cache(open_cache(folder))["teachers"]["teacher"]["targets"]["logits"])

    whole = logits(made / "cache")
    take(made, str(tmp_path / "logits"), targets=("logits",))
    take(made, str(tmp_path / "features"), targets=(NORM,))
    take(made, str(tmp_path / "views"), views=3)
    assert [logits(tmp_path / "logits")[name] for name in figures] == [whole[name] for name in figures]
    assert not logits(tmp_path / "logits")["measured_on_more"]
    assert [logits(tmp_path / "views")[name] for name in figures] == [whole[name] for name in figures]
    assert logits(tmp_path / "views")["measured_on_more"]
    cut = open_cache(tmp_path / "views")
    assert [segment["measured_on"] for segment in inspect_shard(cut, "train-0000")["segments"]] == [[0, 2], [2, 5]]
    assert "(over views 2 to 4)" in shard_as_text(inspect_shard(cut, "train-0000"))
    assert "left out since" in cache_as_text(inspect_cache(cut), "views")
    features = inspect_cache(open_cache(tmp_path / "features"))["teachers"]["teacher"]
    assert features["top1"] is None  # of the logits that were not taken
    assert features["targets"][NORM]["z_l2"] > 0


def test_a_flipped_byte_in_the_source_is_refused_and_nothing_half_lands(made: Path, tmp_path: Path) -> None:
    """One byte of a document and of one file of each array and card, one file at a time; whole and cut segments."""
    shutil.copytree(made / "cache", tmp_path / "cache")
    expected = {views: take(made, str(tmp_path / f"whole-{views}"), views=views, limit_shards=1).root for views in (None, 4)}
    random = np.random.default_rng(0)
    files = sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file() and "index" not in path.parts)
    groups = [path for path in files if "train-0000" in str(path) and ".zarr" in str(path)]
    documents = [path for path in files if ".zarr" not in str(path) and "sources" not in path.parts]
    assert len(groups) > 50
    files = [*documents, *groups[::7]]
    for number, path in enumerate(files):
        views = (None, 4)[number % 2]
        flip(path, int(random.integers(path.stat().st_size)))
        dest = tmp_path / f"copy-{number}"
        with pytest.raises(KDCacheError) as caught:
            copy(CopyConfig(cache=str(tmp_path / "cache"), dest=str(dest), views=views, limit_shards=1))
        assert str(path.relative_to(tmp_path / "cache")) in str(caught.value).replace("%40", "@")
        assert not (dest / "cache.json").exists() or verify(str(dest)).ok
        shutil.copy2(made / "cache" / path.relative_to(tmp_path / "cache"), path)
        if number % 8 < 2:  # and the same command finishes what it had begun
            assert copy(CopyConfig(cache=str(tmp_path / "cache"), dest=str(dest), views=views, limit_shards=1)).root == expected[views]
        shutil.rmtree(dest, ignore_errors=True)


def test_a_copy_killed_at_any_moment_is_sound_and_the_same_command_finishes_it(made: Path, tmp_path: Path) -> None:
    code = """
from pipelines.copy import CopyConfig, copy
source, out = sys.argv[1:]
for views in (None, 4):
    config = lambda name: CopyConfig(cache=source, dest=f"{out}/{name}", views=views, limit_shards=2)
    expected = copy(config(f"whole-{views}")).root
    moment, kills = 2, 0
    while killed_at(moment, lambda: copy(config(f"{moment}-{views}"))):
        kills += 1
        dest = f"{out}/{moment}-{views}"
        if os.path.exists(dest + "/cache.json"):
            assert {problem.kind for problem in verify(dest).problems} <= {"extra"}, (moment, verify(dest).problems)
        assert copy(config(f"{moment}-{views}")).root == expected, moment
        verdict = verify(dest)
        assert verdict.ok and not verdict.notes and not os.path.exists(dest + "/tmp"), (moment, verdict)
        shutil.rmtree(dest)
        moment += 61
    print(kills)
"""
    kills = [int(line) for line in run_python(KILLED + code, made / "cache", tmp_path).stdout.split()]
    assert min(kills) > 2, kills


def test_a_group_whose_copy_was_damaged_before_its_record_is_replaced(made: Path, tmp_path: Path) -> None:
    take(made, str(tmp_path / "copy"))
    one(tmp_path / "copy", "teachers/teacher/train-0000.*.json").unlink()
    flip(one(tmp_path / "copy", "teachers/teacher/train-0000.*.zarr/logits/codes/c/0/0/0"))
    flip(one(tmp_path / "copy", "teachers/teacher/targets/*norm.calibration.safetensors"))
    one(tmp_path / "copy", "teachers/teacher/targets/*norm.json").unlink()
    take(made, str(tmp_path / "copy"))
    assert tree(tmp_path / "copy") == tree(made / "cache")


def test_a_destination_that_holds_anything_else_is_refused_and_left_alone(made: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"expected an empty folder, found a\.jpg"):
        take(made, str(tmp_path / "photos"))
    record(made, str(tmp_path / "other"), ("logits",), 1, seed=7)
    before = tree(tmp_path / "other")
    with pytest.raises(MismatchError, match=r"view plan: field 'seed' differs"):
        take(made, str(tmp_path / "other"))
    assert tree(tmp_path / "other") == before
    take(made, str(tmp_path / "three"), views=3)
    before = tree(tmp_path / "three")
    with pytest.raises(UsageError, match="which this copy has no place for"):
        take(made, str(tmp_path / "three"), views=4)
    assert tree(tmp_path / "three") == before
    make_teacher_dir(tmp_path / "teacher", seed=9)
    os.symlink(made / "shards", tmp_path / "shards")
    record(tmp_path, "another", ("logits",), 2)
    with pytest.raises(KDCacheError, match=r"teacher\.json.*field 'weights' differs"):
        take(made, str(tmp_path / "another"), targets=("logits",), views=2)
    for dest in (made / "cache", made / "cache" / "views" / "copy", made):
        with pytest.raises(UsageError, match="can't lie in each other"):
            take(made, str(dest))


def test_an_array_of_a_later_version_is_cut_by_its_shape_or_refused(made: Path, tmp_path: Path) -> None:
    """What a views group may hold one day: something a row of a view, or bytes that nobody here can divide."""
    for kind in ("divisible", "indivisible"):
        shutil.copytree(made / "cache", tmp_path / kind)
        old = tmp_path / kind / views_record_path("train-0000", ViewRange(start=0, stop=2))
        document: Document[ViewsIdentity] = open_cache(tmp_path / kind).documents[f"views/{old.name}"]
        identity = document.identity
        inner, views = ((3,), len(identity.views)) if kind == "divisible" else ((), None)
        shape = (views, identity.rows, 3) if views else (77,)
        values = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
        group = tmp_path / kind / "views" / identity.group.name
        spec = array_spec("extra", "uint8", inner, views=views, max_rows=identity.samples if views else 77)
        files = {**identity.group.files, **write_array(group, spec, values)}
        digest = digest_of_files(files)
        name = f"{identity.group.name.rsplit('.', 2)[0]}.{digest[:12]}.zarr"
        group.rename(group.parent / name)
        later = identity.model_copy(update={"group": Group(name=name, digest=digest, files=files)})
        old.write_bytes(dump_document(later, measured=document.measured, provenance=document.provenance))
        drop_index(open_store(tmp_path / kind))
        refresh_index(tmp_path / kind)
        assert copy(CopyConfig(cache=str(tmp_path / kind), dest=str(tmp_path / f"{kind}-whole"))).root == open_cache(tmp_path / kind).root
        config = CopyConfig(cache=str(tmp_path / kind), dest=str(tmp_path / f"{kind}-part"), views=1)
        if kind == "divisible":
            copy(config)
            import zarr

            group = one(tmp_path / f"{kind}-part", "views/train-0000.*.zarr")
            assert np.array_equal(zarr.open_group(str(group), mode="r")["extra"][...], values[:1])
        else:
            with pytest.raises(CorruptError, match=r"extra/zarr\.json: expected an array of views and rows"):
                copy(config)
            assert verify(str(tmp_path / f"{kind}-part")).ok


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--target", "logitz"], "teacher teacher has: features@blocks.0, features@norm, logits"),
        (["--teacher", "other"], "the cache has: teacher"),
        (["--views", "6"], "--views 6: the cache has 5 views"),
    ],
)
def test_what_the_cache_does_not_have_is_a_usage_error_that_says_what_it_has(made: Path, tmp_path: Path, options: list[str], text: str) -> None:
    result = CliRunner().invoke(main, ["copy", str(made / "cache"), str(tmp_path / "copy"), *options])
    assert result.exit_code == 2
    assert text in result.stderr
    assert not (tmp_path / "copy").exists()


def test_copy_command_prints_json_and_damage_is_exit_code_1(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "cache", tmp_path / "cache")
    result = CliRunner().invoke(main, ["copy", str(tmp_path / "cache"), str(tmp_path / "copy"), "--target", "logits", "--json"])
    assert result.exit_code == 0, result.stderr
    body = json.loads(result.stdout)
    assert (body["teachers"], body["rows"], body["views"], body["shards"]) == ({"teacher": ["logits"]}, 8, 5, 3)
    assert body["root"] == open_cache(tmp_path / "copy").root
    assert body["root"] in result.stderr
    flip(one(tmp_path / "cache", "views/train-0000.*.zarr/pixels/c/0/0"), 3)
    result = CliRunner().invoke(main, ["copy", str(tmp_path / "cache"), str(tmp_path / "second")])
    assert result.exit_code == 1
    assert "pixels/c/0/0: bytes were changed" in result.stderr
    assert CliRunner().invoke(main, ["copy", str(tmp_path / "nothing"), str(tmp_path / "third")]).exit_code == 1
    assert not (tmp_path / "third").exists()
