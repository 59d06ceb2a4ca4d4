"""Stage one on real tars with real tiny teachers: what is recorded is what the teacher gave, and nothing can be lost or torn."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from caches import FEATURES, groups, replay, run, tree
from click.testing import CliRunner
from helpers import make_shard, make_shards, make_teacher_dir, save_local_dir, tiny_model

import kdcache.jobs
import pipelines.extraction.turns
from cli.main import main
from kdcache import open_cache
from kdcache.errors import DriftError, KDCacheError, MismatchError, NotACacheError, TeacherError, UsageError
from kdcache.format import ViewRange
from kdcache.jobs import find_missing
from kdcache.plan import POLICIES, MixedViews, Policy, RandomResizedCrop
from kdcache.teacher import Teacher, load_teacher
from pipelines.extract import ExtractConfig, extract
from pipelines.verify import verify


def test_cached_targets_are_what_timm_gives_for_the_replayed_views(setup: Path) -> None:
    summary = run(setup, targets=("logits", FEATURES, "features@norm:fp16"))
    assert (summary.shards, summary.rows, summary.views, summary.skipped, summary.problems) == (2, 12, 2, 0, [])
    cache = open_cache(setup / "cache")
    for shard in cache.shards:
        keys = cache.keys(shard)
        assert keys == [f"s{i:04d}" for i in range(6)]
        for view in range(2):
            truth = replay(cache, setup / "teacher", shard, keys, view)
            rows = [cache.read(shard, key, view) for key in keys]
            logits = torch.from_numpy(np.stack([row["logits"] for row in rows]))
            assert torch.nn.functional.kl_div(logits.log_softmax(1), truth["logits"].log_softmax(1), log_target=True, reduction="batchmean") < 1e-5
            block = torch.from_numpy(np.stack([row["features@blocks.1"] for row in rows]))
            assert (block - truth["block"]).norm() < 0.01 * truth["block"].norm()
            norm = torch.from_numpy(np.stack([row["features@norm"] for row in rows]))
            assert (norm - truth["norm"][:, 1:]).norm() < 1e-3 * truth["norm"].norm()
            prefix = torch.from_numpy(np.stack([row["features@norm.prefix"] for row in rows]))
            assert (prefix - truth["norm"][:, :1]).norm() < 1e-3 * truth["norm"].norm()
            assert [row["label"] for row in rows] == [(int(shard[-1]) + i) % 10 for i in range(6)]


def test_every_array_opens_in_zarr_python_with_the_same_values(setup: Path) -> None:
    run(setup, targets=("logits", FEATURES))
    cache = open_cache(setup / "cache")
    layer = cache.layer(None)
    seen = 0
    for shard, records in layer.records.items():
        for record in records:
            group = zarr.open_group(str(setup / "cache" / "teachers" / layer.name / record.identity.group.name), mode="r")
            for target in record.identity.targets:
                for view in range(2):
                    for name, values in cache.read_components(layer.name, target, shard, view, range(6)).items():
                        np.testing.assert_array_equal(group[f"{target}/{name}"][view], values)
                        seen += 1
    assert seen == 2 * 2 * (2 + 4)  # 2 shards, 2 views; dense has 2 components, int8 of grid and prefix 4


def test_worker_count_and_batches_of_views_change_no_pixel_and_worker_count_no_byte(setup: Path) -> None:
    run(setup, "a", workers=0)
    run(setup, "b", workers=2)
    assert groups(setup / "a") == groups(setup / "b")
    assert open_cache(setup / "a").root == open_cache(setup / "b").root


def test_second_run_does_nothing_and_touches_no_file(setup: Path) -> None:
    run(setup)
    before = {path: path.stat().st_mtime_ns for path in (setup / "cache").rglob("*")}
    summary = run(setup)
    assert (summary.resumed_shards, summary.bytes, summary.rows) == (2, 0, 12)
    assert {path: path.stat().st_mtime_ns for path in (setup / "cache").rglob("*")} == before


def test_finished_run_is_found_without_loading_torch(setup: Path) -> None:
    run(setup)
    code = (
        "import sys; from pipelines.extract import *;"
        f"s = extract(ExtractConfig(shards={str(setup / 'shards')!r}, cache={str(setup / 'cache')!r}, teacher={'local-dir:' + str(setup / 'teacher')!r}));"
        "assert s.resumed_shards == 2, s; assert 'torch' not in sys.modules and 'webdataset' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_growth_adds_files_and_changes_none(setup: Path) -> None:
    run(setup)
    before = tree(setup / "cache")
    run(setup, targets=("logits", FEATURES), views=3)
    make_teacher_dir(setup / "second", seed=7)
    run(setup, teacher=f"local-dir:{setup / 'second'}", targets=("logits",), views=3)
    after = tree(setup / "cache")
    kept = {path: digest for path, digest in before.items() if not path.startswith("index/")}
    assert kept.items() <= after.items()
    cache = open_cache(setup / "cache")
    assert cache.num_views == 3
    assert {name: {t: cache.target_views(name, t) for t in layer.targets} for name, layer in cache.teachers.items()} == {
        "teacher": {"logits": 3, "features@blocks.1": 3},
        "second": {"logits": 3},
    }
    assert verify(str(setup / "cache"), views="all", workers=0).ok
    a, b = cache.read("train-0000", "s0000", 2, "teacher"), cache.read("train-0000", "s0000", 2, "second")
    assert not np.allclose(a["logits"], b["logits"])


def test_views_of_a_grown_cache_equal_those_extracted_at_once(setup: Path) -> None:
    run(setup, "grown", views=2)
    run(setup, "grown", views=4)
    run(setup, "whole", views=4)
    grown, whole = open_cache(setup / "grown"), open_cache(setup / "whole")
    for view in range(4):
        np.testing.assert_array_equal(grown.read_pixel_digests("train-0001", view, range(6)), whole.read_pixel_digests("train-0001", view, range(6)))
        np.testing.assert_allclose(grown.read("train-0001", "s0003", view)["logits"], whole.read("train-0001", "s0003", view)["logits"], atol=2e-2)


@pytest.mark.parametrize("store_views", [None, "png"])
def test_blocks_of_a_sample_give_the_bytes_of_one_block_a_shard(setup: Path, monkeypatch: pytest.MonkeyPatch, store_views: str | None) -> None:
    """Shards of photographs have dozens of blocks, those of tests one. Here with a sample that can't be decoded, mixed views, and views added."""
    make_shards(setup / "shards", num_shards=2, num_samples=6, corrupt=[2])
    mixed = POLICIES["strong"].model_copy(update={"mix": MixedViews(prob=0.5, mixup_alpha=0.8, cutmix_alpha=1.0)})
    for name, block_bytes in (("one", 8 << 20), ("many", 1)):
        monkeypatch.setattr("kdcache.rendering.BLOCK_BYTES", block_bytes)
        for views in (2, 3):
            run(setup, name, views=views, augment=mixed, store_views=store_views, targets=("logits", FEATURES))
    assert groups(setup / "many") == groups(setup / "one")
    assert open_cache(setup / "many").root == open_cache(setup / "one").root
    verdict = verify(str(setup / "many"), views="all", workers=0)
    assert (verdict.problems, verdict.views_replayed) == ([], 2 * 5 * 3)


def test_growth_is_estimated_by_what_is_missing(setup: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(setup, views=4)
    capsys.readouterr()
    given = {"shards": str(setup / "shards"), "cache": str(setup / "cache"), "teacher": f"local-dir:{setup / 'teacher'}", "device": "cpu"}
    extract(ExtractConfig(**given, views=5, workers=0), progress=True)
    said = capsys.readouterr().err
    assert "teacher 'teacher' gives logits:dense\n" in said
    assert "2 of 2 shards to do: about 12 samples x 1 view; the teacher needs" in said
    assert "0/24 [" in said  # the new view, and an old one that is compared
    assert "60 [" not in said


def test_fewer_views_for_one_target(setup: Path) -> None:
    run(setup, targets=("logits", FEATURES + ",views=1"), views=3)
    cache = open_cache(setup / "cache")
    assert (cache.target_views("teacher", "logits"), cache.target_views("teacher", "features@blocks.1")) == (3, 1)
    assert "features@blocks.1" not in cache.read("train-0000", "s0000", 1)


@pytest.mark.parametrize(
    ("have_views", "have", "want_views", "want", "views", "segments"),
    [
        ([], {}, 2, {"a": 2}, [(0, 2)], [(("a",), (0, 2))]),
        ([(0, 2)], {"a": [(0, 2)]}, 2, {"a": 2}, [], []),
        ([], {}, 4, {"a": 4, "b": 2}, [(0, 4)], [(("a", "b"), (0, 2)), (("a",), (2, 4))]),
        ([(0, 4)], {"a": [(0, 2)]}, 4, {"a": 4, "b": 2}, [], [(("b",), (0, 2)), (("a",), (2, 4))]),
        ([(0, 1), (2, 3)], {}, 4, {"a": 1}, [(1, 2), (3, 4)], [(("a",), (0, 1))]),
    ],
)
def test_missing_segments_are_exactly_what_is_wanted_and_not_there(
    have_views: Any, have: Any, want_views: int, want: Any, views: Any, segments: Any
) -> None:
    def ranges(pairs: Any) -> list[ViewRange]:
        return [ViewRange(start=start, stop=stop) for start, stop in pairs]

    missing = find_missing(ranges(have_views), {name: ranges(pairs) for name, pairs in have.items()}, want_views=want_views, want_targets=want)
    assert [(v.start, v.stop) for v in missing.views] == views
    assert [(names, (v.start, v.stop)) for names, v in missing.segments] == segments


# --- kill (also test_faults) -----------------------------------------------------------------------------------------


def test_who_comes_second_to_a_record_keeps_the_firsts_values_and_leaves_none_of_its_own(setup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run, on a device that rounds otherwise, does all shards while this one is about to record its first."""
    create, forward = kdcache.jobs.create_document, Teacher.__call__
    monkeypatch.setattr(pipelines.extraction.turns, "MIN_PATIENCE_S", 0.0)

    def rounding(self: Teacher, *given: Any) -> dict[str, dict[str, torch.Tensor]]:
        return {name: {part: tensor * 1.01 for part, tensor in value.items()} for name, value in forward(self, *given).items()}

    def create_second(*given: Any, **options: Any) -> Any:
        monkeypatch.setattr(kdcache.jobs, "create_document", create)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Teacher, "__call__", rounding)
            run(setup)
        return create(*given, **options)

    monkeypatch.setattr(kdcache.jobs, "create_document", create_second)
    assert run(setup).rows == 12
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "__call__", rounding)
        run(setup, "first")
    run(setup, "other")
    assert groups(setup / "cache") == groups(setup / "first") != groups(setup / "other")
    assert verify(str(setup / "cache")).ok


def test_group_published_without_its_record_is_adopted(setup: Path) -> None:
    """The instant between publishing a group and creating its record."""
    run(setup)
    expected = tree(setup / "cache")
    for record in [*(setup / "cache").glob("views/train-0001.*.json"), *(setup / "cache").glob("teachers/teacher/train-0001.*.json")]:
        record.unlink()
    shutil.rmtree(setup / "cache" / "index")
    run(setup)
    assert groups(setup / "cache") == {path: digest for path, digest in expected.items() if ".zarr/" in path}
    assert verify(str(setup / "cache")).ok


# --- bad input -------------------------------------------------------------------------------------------------------


def test_unreadable_image_is_a_counted_skip_with_its_reason(tmp_path: Path) -> None:
    make_shard(tmp_path / "shards" / "train-0000.tar", num_samples=6, corrupt=(2, 5))
    make_teacher_dir(tmp_path / "teacher")
    summary = run(tmp_path)
    assert (summary.rows, summary.skipped, summary.problems) == (4, 2, [])
    cache = open_cache(tmp_path / "cache")
    assert cache.keys("train-0000") == ["s0000", "s0001", "s0003", "s0004"]
    with pytest.raises(KDCacheError, match=r"key 's0002' was skipped when the cache was made: damaged image"):
        cache.read("train-0000", "s0002")
    assert cache.read("train-0000", "s0003")["label"] == 3
    assert verify(str(tmp_path / "cache"), views="all", workers=0).ok
    run(tmp_path, targets=("logits", FEATURES))  # a later target skips the same samples
    assert open_cache(tmp_path / "cache").read("train-0000", "s0004")["features@blocks.1"].shape == (16, 32)


def test_shard_without_a_readable_image_has_no_rows_and_is_sound(tmp_path: Path) -> None:
    make_shard(tmp_path / "shards" / "train-0000.tar", num_samples=3)
    make_shard(tmp_path / "shards" / "train-0001.tar", num_samples=2, corrupt=(0, 1), seed=1)
    make_teacher_dir(tmp_path / "teacher")
    summary = run(tmp_path, targets=("logits", FEATURES))
    assert (summary.shards, summary.rows, summary.skipped) == (2, 3, 2)
    assert verify(str(tmp_path / "cache"), views="all", workers=0).ok


def test_truncated_tar_keeps_its_rows_before_the_cut_and_is_a_problem(tmp_path: Path) -> None:
    whole = make_shard(tmp_path / "shards" / "train-0000.tar", num_samples=6)
    make_shard(tmp_path / "shards" / "train-0001.tar", num_samples=6, seed=1)
    whole.write_bytes(whole.read_bytes()[:6000])
    make_teacher_dir(tmp_path / "teacher")
    summary = run(tmp_path)
    assert 6 < summary.rows < 12
    assert [(problem["kind"], problem["shard"]) for problem in summary.problems] == [("source", "train-0000")]
    assert "cut short" in summary.problems[0]["detail"]


def test_duplicate_key_names_both_members_and_the_other_shards_are_done(setup: Path) -> None:
    import io
    import tarfile

    with tarfile.open(setup / "shards" / "train-0000.tar", "a") as tar:
        info = tarfile.TarInfo("s0001.jpg")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"1234"))
    summary = run(setup)
    assert summary.shards == 1
    assert summary.problems[0]["shard"] == "train-0000"
    assert "key 's0001' appears twice: member 's0001.jpg' at byte" in summary.problems[0]["detail"]
    assert open_cache(setup / "cache").shards == ["train-0001"]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"seed": 5}, "seed"),
        ({"size": 64}, "size"),
        ({"augment": "none", "views": 1}, "policy.crop.crop_pct"),
        ({"dataset": "other"}, "dataset"),
        ({"augment": Policy(crop=RandomResizedCrop(scale=(0.5, 1.0)), hflip=0.5)}, "policy.crop.scale"),
    ],
)
def test_another_plan_is_refused_and_says_which_field(setup: Path, options: dict[str, Any], field: str) -> None:
    run(setup)
    before = tree(setup / "cache")
    with pytest.raises(MismatchError) as caught:
        run(setup, **options)
    assert caught.value.field == field
    assert "the cache has" in str(caught.value)
    assert tree(setup / "cache") == before


def test_changed_teacher_weights_are_refused_even_when_nothing_is_left_to_do(setup: Path) -> None:
    run(setup)
    shutil.rmtree(setup / "teacher")
    make_teacher_dir(setup / "teacher", seed=3)
    with pytest.raises(MismatchError) as caught:
        run(setup)
    assert (caught.value.what, caught.value.field) == ("teacher 'teacher'", "weights")


def test_changed_precision_or_encoding_is_refused(setup: Path) -> None:
    run(setup, targets=("logits", FEATURES))
    with pytest.raises(MismatchError, match="precision"):
        run(setup, precision="bf16")
    with pytest.raises(MismatchError, match="encoding"):
        run(setup, targets=("features@blocks.-1:fp16",))


def test_replaced_tar_is_noticed_by_its_member_table(setup: Path) -> None:
    run(setup)
    make_shard(setup / "shards" / "train-0001.tar", num_samples=7, seed=1)
    summary = run(setup, views=3)
    assert [problem["shard"] for problem in summary.problems] == ["train-0001"]
    assert "was changed: expected member table" in summary.problems[0]["detail"]
    verdict = verify(str(setup / "cache"), views=2, workers=0)
    assert [(problem.kind, problem.shard) for problem in verdict.problems] == [("source", "train-0001")]


def test_image_replaced_in_place_is_noticed_by_its_pixels(setup: Path) -> None:
    """Same names, sizes and offsets, other pixels: only the pixel digest can tell."""
    run(setup)
    path = setup / "shards" / "train-0001.tar"
    data = bytearray(path.read_bytes())
    start = data.index(b"\xff\xda") + 30  # inside the first image's scan
    data[start : start + 4] = bytes(255 - byte if byte not in (0, 255) else byte for byte in data[start : start + 4])
    path.write_bytes(data)
    with pytest.raises(DriftError, match=r"shard train-0001: key 's0000'"):
        run(setup, views=3)
    verdict = verify(str(setup / "cache"), views="all", workers=0)
    assert {(problem.kind, problem.shard, problem.key) for problem in verdict.problems} == {("pixels", "train-0001", "s0000")}


def test_values_that_are_not_finite_are_an_error_naming_shard_and_key(setup: Path) -> None:
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    model = tiny_model(**args)
    with torch.no_grad():
        model.head.bias[3] = float("inf")
    save_local_dir(model, setup / "broken", args)
    with pytest.raises(TeacherError, match=r"shard train-0000: key 's0000', view 0: .* not finite"):
        run(setup, teacher=f"local-dir:{setup / 'broken'}")
    assert not list((setup / "cache" / "views").glob("*.json"))


def test_low_teacher_accuracy_stops_before_the_work(setup: Path) -> None:
    with pytest.raises(TeacherError, match=r"top-1 on the first 12 labelled views, expected at least 99"):
        run(setup, min_teacher_top1=99.0)
    assert not (setup / "cache" / "views").exists()


def test_more_views_of_a_policy_without_randomness_are_refused(setup: Path) -> None:
    assert run(setup, "still", augment="none", views=None).views == 1
    with pytest.raises(UsageError, match="no randomness"):
        run(setup, "many", augment="none", views=4)


def test_limit_shards_extracts_the_first_ones_and_remembers_all(setup: Path) -> None:
    assert run(setup, limit_shards=1).shards == 1
    cache = open_cache(setup / "cache")
    assert (cache.shards, cache.all_shards) == (["train-0000"], ["train-0000", "train-0001"])
    assert run(setup).resumed_shards == 1
    assert open_cache(setup / "cache").shards == ["train-0000", "train-0001"]


def test_batch_split_moves_fp32_logits_by_float_noise_only(setup: Path) -> None:
    run(setup, "a", batch_size=1)
    run(setup, "b", batch_size=64)
    a, b = open_cache(setup / "a"), open_cache(setup / "b")
    for key in a.keys("train-0000"):
        one, other = a.read("train-0000", key, 1), b.read("train-0000", key, 1)
        span = one["logits"].max() - one["logits"].min()
        np.testing.assert_allclose(one["logits"], other["logits"], atol=span / 255 + 1e-5)  # a rounding may fall the other way


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_stays_near_fp32(setup: Path, precision: str) -> None:
    run(setup, "full")
    run(setup, precision, precision=precision)
    full, reduced = open_cache(setup / "full"), open_cache(setup / precision)
    assert reduced.layer(None).document.identity.precision == precision
    a, b = (np.stack([cache.read("train-0000", key)["logits"] for key in cache.keys("train-0000")]) for cache in (full, reduced))
    assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(a)


def test_checkpoint_file_gives_the_same_teacher_as_local_dir(setup: Path) -> None:
    run(setup, "folder")
    state = load_teacher(f"local-dir:{setup / 'teacher'}").model.state_dict()
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, setup / "weights.pth")
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    run(setup, "file", teacher="vit_tiny_patch16_224", checkpoint=str(setup / "weights.pth"), model_args=args)
    a, b = open_cache(setup / "folder"), open_cache(setup / "file")
    assert a.layer(None).document.identity.weights == b.layer(None).document.identity.weights
    np.testing.assert_array_equal(a.read("train-0000", "s0001")["logits"], b.read("train-0000", "s0001")["logits"])


# --- the command -----------------------------------------------------------------------------------------------------


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_extract_inspect_verify_commands_print_the_promised_json(setup: Path) -> None:
    extracted = invoke(
        "extract", setup / "shards", setup / "cache", "--teacher", f"local-dir:{setup / 'teacher'}", "--views", 2, "-j", 0, "--target", FEATURES,
        "--target", "logits", "--json",
    )  # fmt: skip
    assert extracted.exit_code == 0, extracted.stderr
    body = json.loads(extracted.stdout)
    assert {"shards", "rows", "views", "skipped", "bytes", "seconds", "teacher_seconds", "resumed_shards"} <= body.keys()
    assert (body["shards"], body["rows"], body["views"]) == (2, 12, 2)
    inspected = json.loads(invoke("inspect", setup / "cache", "--json").stdout)
    assert inspected["shards"] == {"done": 2, "total": 2}
    target = inspected["teachers"]["teacher"]["targets"]["features@blocks.1"]
    assert target["encoding"] == "int8"
    assert target["views"] == 2
    assert target["z_l2"] < 0.01
    assert target["bytes_per_view"] > 0
    logits = inspected["teachers"]["teacher"]["targets"]["logits"]
    assert 0 <= logits["kl_t1"] < 1e-4
    assert 0 <= logits["kl_t4"] < 1e-4
    verified = invoke("verify", setup / "cache", "--views", "all", "-j", 0, "--json")
    assert verified.exit_code == 0
    body = json.loads(verified.stdout)
    assert (body["ok"], body["root"], body["shards"], body["rows"], body["problems"]) == (True, inspected["root"], 2, 12, [])
    row = json.loads(invoke("inspect", setup / "cache", "--shard", "train-0001", "--key", "s0002", "--view", 1, "--json").stdout)
    assert (row["label"], row["view"], row["teachers"]["teacher"]["logits"]["shape"]) == (3, 1, [10])
    for arguments in ([], ["--shard", "train-0001"], ["--shard", "train-0001", "--key", "s0002"]):
        shown = invoke("inspect", setup / "cache", *arguments)
        assert shown.exit_code == 0
        assert "train" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--teacher", "vit_tinny_patch16_224"], 1, "near ones: vit_tiny_patch16_224"),
        (["--teacher", "resnet18.a1_in1k"], 1, "local-dir:FOLDER"),
        (["--teacher", "local-dir:/nowhere"], 1, "save_for_hf"),
        (["--teacher", "TEACHER", "--target", "features@blocks.9"], 1, "near ones: blocks."),
        (["--teacher", "TEACHER", "--target", "logitz"], 2, "expected target[@node]"),
        (["--teacher", "TEACHER", "--target", "logits:zip"], 2, "expected one of: dense"),
        (["--teacher", "TEACHER", "--augment", "wild"], 2, "expected one of: none, weak"),
        (["--teacher", "TEACHER", "--device", "cuda:77"], 2, "this machine can't use it"),
        ([], 2, "--teacher"),
    ],
)
def test_bad_requests_say_what_to_do(setup: Path, arguments: list[str], code: int, text: str) -> None:
    given = [argument.replace("TEACHER", f"local-dir:{setup / 'teacher'}") for argument in arguments]
    result = invoke("extract", setup / "shards", setup / "cache", "-j", 0, *given)
    assert result.exit_code == code, result.stderr
    assert text in result.stderr
    assert "Traceback" not in result.stderr


def test_empty_shard_list_and_missing_tars_are_usage_errors(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    with pytest.raises(UsageError, match=r"holds no \.tar file"):
        run(tmp_path)
    with pytest.raises(UsageError, match=r"no file .*train-0000\.tar and 2 more; expected 3 tar files"):
        run(tmp_path, shards=str(tmp_path / "shards" / "train-{0000..0002}.tar"))


def test_folder_that_is_no_cache_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotACacheError, match=r"no cache\.json"):
        open_cache(tmp_path)
    assert invoke("inspect", tmp_path).exit_code == 1
    assert invoke("verify", tmp_path).exit_code == 1
