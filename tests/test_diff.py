"""kdcache diff: nothing where caches are equal, every kind of difference where they are not, and the same seen from both sides."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import run, tree
from click.testing import CliRunner
from helpers import make_shard, make_shards, make_teacher_dir

from cli.main import main
from kdcache import open_cache
from kdcache.cache import Cache
from kdcache.distance import Distance
from pipelines.diff import diff
from pipelines.inspection.diff_text import diff_as_text

NORM = "features@norm"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches that differ from `base` in one thing each, with one view a batch, so that equal views have equal targets."""
    folder = tmp_path_factory.mktemp("diff")
    for shards in ("shards", "fewer", "labelled"):
        make_shards(folder / shards, num_shards=2, num_samples=5)
    make_shard(folder / "fewer" / "train-0001.tar", num_samples=5, seed=1, corrupt=(2,))
    make_shard(folder / "fewer" / "train-0002.tar", num_samples=3, seed=2)
    (folder / "labelled" / "train-0000.tar").unlink()
    make_shard(folder / "labelled" / "train-0000.tar", num_samples=5, num_classes=3)
    make_teacher_dir(folder / "teacher")
    make_teacher_dir(folder / "other", seed=5)
    small: dict[str, Any] = {"batch_size": 1, "dataset": "d", "targets": ("logits", NORM)}
    run(folder, "base", **small)
    run(folder, "again", **small)
    run(folder, "stored", **{**small, "targets": ("logits:topk=3", f"{NORM}:fp16", "features@blocks.0"), "views": 3})
    run(folder, "seed", **small, seed=1)
    run(folder, "teacher-2", **small, teacher=f"local-dir:{folder / 'other'}", name="teacher")
    run(folder, "rows", **small, shards=str(folder / "fewer"))
    run(folder, "labels", **small, shards=str(folder / "labelled"))
    run(folder, "bf16", **small, precision="bf16")
    run(folder, "two", **small)
    run(folder, "two", **small, teacher=f"local-dir:{folder / 'other'}", name="other")
    return folder


OTHERS = ("again", "stored", "seed", "teacher-2", "rows", "labels", "bf16", "two")


def compare(made: Path, name: str, *, rows: int | None = None, **options: Any) -> dict[str, Any]:
    return diff(str(made / "base"), str(made / name), rows=rows, **options)


def command(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["diff", *map(str, arguments)])


def test_equal_caches_are_equal_whoever_made_them(made: Path) -> None:
    shutil.copytree(made / "base", made / "copied")
    for name in ("base", "again", "copied"):
        result = command(made / "base", made / name, "--json")
        facts = json.loads(result.stdout)
        assert (result.exit_code, facts["identical"], facts["a"]["root"]) == (0, True, facts["b"]["root"])
        assert facts["plan"] == [] and facts["labels"]["differ"] == facts["skipped"]["differ"] == facts["rows"]["only_a"] == 0
        assert facts["pixels"]["columns"] == facts["pixels"]["columns_equal"] == 4
        assert "identical" in command(made / "base", made / name).stdout


def rows_of(cache: Cache, other: Cache, views: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for shard in cache.shards:
        for key in cache.keys(shard):
            for view in range(views):
                yield cache.read(shard, key, view), other.read(shard, key, view)


def test_distances_are_those_of_every_decoded_row(made: Path) -> None:
    facts = compare(made, "stored")
    base, other = open_cache(made / "base"), open_cache(made / "stored")
    pairs = list(rows_of(base, other, 2))
    (pair,) = facts["teachers"]["pairs"]
    assert (pair["identity"], pair["only_a"], pair["only_b"]) == ([], [], ["features@blocks.0"])
    logits, features = pair["targets"]["logits"], pair["targets"][NORM]
    assert (logits["encoding"], features["encoding"]) == ({"a": "dense", "b": "topk=3"}, {"a": "int8", "b": "fp16"})
    assert logits["rows"] == features["rows"] == len(pairs) == 20
    x, y = (np.stack([row["logits"].astype(np.float64) for row in side]) for side in zip(*pairs, strict=True))
    assert logits["rel_l2"] == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x))
    assert logits["max_abs"] == pytest.approx(np.abs(y - x).max())
    p, q = (np.exp(one) / np.exp(one).sum(axis=1, keepdims=True) for one in (x, y))
    assert logits["kl_ab"] == pytest.approx((p * np.log(p / q)).sum(axis=1).mean())
    assert logits["kl_ba"] == pytest.approx((q * np.log(q / p)).sum(axis=1).mean())
    assert logits["top1_agreement"] == pytest.approx(100 * (x.argmax(axis=1) == y.argmax(axis=1)).mean())
    tokens = [np.stack([np.concatenate([row[NORM], row[f"{NORM}.prefix"]]) for row in side]) for side in zip(*pairs, strict=True)]
    error, value = (np.linalg.norm(one.reshape(20, -1), axis=1) for one in (tokens[1] - tokens[0], tokens[0]))
    assert features["rel_l2"] == pytest.approx(np.linalg.norm(error) / np.linalg.norm(value), rel=1e-5)
    assert features["worst"]["rel_l2"] == pytest.approx((error / value).max(), rel=1e-5)
    assert features["rel_l2"] < features["stored_rel_l2"]["a"] + features["stored_rel_l2"]["b"]
    dot = (tokens[0] * tokens[1]).sum(axis=-1) / np.linalg.norm(tokens[0], axis=-1) / np.linalg.norm(tokens[1], axis=-1)
    assert features["cosine"] == pytest.approx(dot.mean(), rel=1e-6)
    assert (facts["views"]["a"], facts["views"]["b"], facts["pixels"]["columns"]) == (2, 3, facts["pixels"]["columns_equal"])


def test_each_difference_is_told_and_only_it(made: Path) -> None:
    seed = compare(made, "seed")
    assert seed["plan"] == [{"field": "plan.seed", "a": 0, "b": 1}]
    assert (seed["pixels"]["columns_equal"], seed["pixels"]["differ"], seed["pixels"]["rows"]) == (0, 20, 20)
    teacher = compare(made, "teacher-2")
    (pair,) = teacher["teachers"]["pairs"]
    assert [one["field"] for one in pair["identity"]] == ["weights"]
    assert pair["targets"]["logits"]["rel_l2"] > 0.1 > teacher["pixels"]["differ"] == 0
    bf16 = compare(made, "bf16")["teachers"]["pairs"][0]
    assert bf16["identity"] == [{"field": "precision", "a": "fp32", "b": "bf16"}]
    assert 0 < bf16["targets"][NORM]["rel_l2"] < 0.1
    two = compare(made, "two")
    assert (two["teachers"]["only_a"], two["teachers"]["only_b"]) == ([], ["other"])
    assert two["teachers"]["pairs"][0]["targets"]["logits"]["equal_rows"] == 20
    partly = compare(made, "stored")["teachers"]["pairs"][0]["targets"][NORM]
    assert partly["shards_differ"] == ["train-0000", "train-0001"] and two["teachers"]["pairs"][0]["targets"][NORM]["shards_differ"] == []
    for facts, text in ((seed, "seed: A 0, B 1"), (teacher, "weights: A "), (two, "only in B: other")):
        assert text in diff_as_text(facts) and "they differ" in diff_as_text(facts)


def test_rows_labels_and_skipped_samples_that_differ_are_named(made: Path) -> None:
    facts = compare(made, "rows")
    assert facts["shards"] == {"shared": 2, "only_a": [], "only_b": ["train-0002"]}
    assert facts["rows"] == {"shared": 9, "only_a": 1, "only_b": 3, "examples": [{"shard": "train-0001", "key": "s0002", "in": "a"}]}
    assert [(one["key"], one["a"]) for one in facts["skipped"]["examples"]] == [("s0002", None)] and facts["skipped"]["differ"] == 1
    assert facts["tars"] == ["train-0001"]
    assert (facts["pixels"]["columns_equal"], facts["pixels"]["differ"], facts["pixels"]["rows"]) == (2, 0, 18)  # by key, not by row
    targets = facts["teachers"]["pairs"][0]["targets"]
    assert targets["logits"]["equal_rows"] == 18 and targets["logits"]["card"] == []
    assert targets[NORM]["rel_l2"] < 0.01 and "calibration.digest" in {one["field"] for one in targets[NORM]["card"]}  # of other first views
    labels = compare(made, "labels")
    assert labels["labels"]["differ"] == 2
    assert labels["labels"]["examples"] == [{"shard": "train-0000", "key": f"s000{i}", "a": i, "b": i % 3} for i in (3, 4)]
    assert "key s0003: A 3, B 0" in diff_as_text(labels) and "only in A: shard train-0001, key s0002" in diff_as_text(facts)


def mirrored(value: Any) -> Any:
    """What diff(B, A) must say where diff(A, B) says `value`; figures that are relative to A are left out."""
    swap = {"a": "b", "b": "a", "only_a": "only_b", "only_b": "only_a", "kl_ab": "kl_ba", "kl_ba": "kl_ab"}
    if isinstance(value, dict):
        found = {swap.get(name, name): mirrored(one) for name, one in value.items() if name not in ("rel_l2", "norm_ratio", "worst")}
        if "rel_l2" in value:
            found["relative to B"] = value["rel_l2"] / value["norm_ratio"]
        return found | ({"in": swap[value["in"]]} if "in" in value else {})
    return [mirrored(one) for one in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """The same of diff(B, A) itself."""
    if isinstance(value, dict):
        found = {name: plain(one) for name, one in value.items() if name not in ("rel_l2", "norm_ratio", "worst")}
        return found | ({"relative to B": value["rel_l2"]} if "rel_l2" in value else {})
    return [plain(one) for one in value] if isinstance(value, list) else value


def approximate(value: Any) -> Any:
    """Equal but for the last bits of sums that were added in another order."""
    if isinstance(value, dict):
        return {name: approximate(one) for name, one in value.items()}
    return [approximate(one) for one in value] if isinstance(value, list) else float(f"{value:.9e}") if isinstance(value, float) else value


@pytest.mark.parametrize("rows", [None, 0, 5])
def test_both_sides_see_the_same(made: Path, rows: int | None) -> None:
    for name in OTHERS:
        there, back = (diff(str(made / one), str(made / other), rows=rows) for one, other in (("base", name), (name, "base")))
        assert approximate(mirrored(there)) == approximate(plain(back)), name
        compared = {t["rows"] for pair in there["teachers"]["pairs"] for t in pair["targets"].values()}
        assert name == "again" or compared == {{None: 20 - 2 * (name == "rows"), 0: 0, 5: 5}[rows]}, name


def test_two_teachers_of_one_cache_are_compared_by_name(made: Path) -> None:
    digests = tree(made / "two")
    result = command(made / "two", made / "two", "--teacher", "teacher=other", "--json")
    (pair,) = json.loads(result.stdout)["teachers"]["pairs"]
    assert (result.exit_code, pair["a"], pair["b"]) == (1, "teacher", "other")
    assert pair["targets"]["logits"]["rows"] == 10 and pair["targets"]["logits"]["rel_l2"] > 0.1
    for arguments, said in ((["--teacher", "nobody"], "no teacher 'nobody'"), (["--rows", "some"], "expected a number of rows or 'all'")):
        wrong = command(made / "two", made / "two", *arguments)
        assert wrong.exit_code == 2 and said in wrong.stderr
    assert command(made / "two", made / "nowhere").exit_code == 1
    assert tree(made / "two") == digests


def test_a_distance_of_zeros_and_of_huge_values_is_finite() -> None:
    distance = Distance()
    zeros, ones = np.zeros((2, 3, 4), np.float32), np.full((2, 3, 4), 1e37, np.float32)
    names = [("s", "k", 0), ("s", "l", 0)]
    distance.update({"grid": zeros}, {"grid": zeros}, names)
    assert distance.result()["rel_l2"] == 0 and distance.result()["cosine"] == 1
    distance.update({"grid": zeros}, {"grid": ones}, names)
    distance.update({"grid": ones}, {"grid": ones}, names)
    found = distance.result()
    assert found["equal_rows"] == 4 and found["rel_l2"] == pytest.approx(1) and found["worst"]["key"] == "k"
    assert json.loads(json.dumps(found, allow_nan=False)) == found
