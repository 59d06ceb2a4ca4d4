"""What inspect says of caches of every kind is what is in them: finished and not, with labels and without, with names only where they are sure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import run, tree
from click.testing import CliRunner
from helpers import TINY_VIT, TINY_VIT_ARGS, make_cache, make_shard, make_shards, make_teacher_dir, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from cli.main import main
from kdcache import open_cache
from kdcache.class_names import read_class_names, teacher_class_names
from kdcache.errors import UsageError
from kdcache.format import Document, TeacherIdentity, dump_document
from kdcache.plan import POLICIES, MixedViews, RandAugment
from pipelines.copy import CopyConfig, copy
from pipelines.diff import diff
from pipelines.facts import find_lacks, sample_logits, sample_rows, spread
from pipelines.inspect import inspect_cache, inspect_row
from pipelines.inspection.diff_text import diff_as_text
from pipelines.inspection.inspect_text import cache_as_text, row_as_text
from pipelines.page import PageConfig, build_page
from pipelines.words import policy_in_words, policy_name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cache/: two shards with a skipped sample each and one without rows, three views, logits and features."""
    folder = tmp_path_factory.mktemp("inspect")
    make_shard(folder / "shards" / "train-0002.tar", num_samples=2, corrupt=(0, 1), seed=2)
    make_cache(folder, num_shards=2, num_samples=7, num_classes=4, corrupt=(3,))
    return folder


def shown(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


def test_figures_are_those_of_every_row_read_by_itself(made: Path) -> None:
    cache = open_cache(made / "cache")
    facts = inspect_cache(cache, rows=None)
    rows = [cache.read(shard, key) for shard in cache.shards for key in cache.keys(shard)]
    entropies = []
    for row in rows:
        p = np.exp(row["logits"].astype(np.float64))
        p /= p.sum()
        entropies.append(-(p * np.log(p)).sum())
    logits = facts["teachers"]["teacher"]["logits"]
    assert (logits["rows"], logits["of_rows"], logits["shards"]) == (12, 12, 2)
    assert logits["entropy"]["mean"] == pytest.approx(np.mean(entropies))
    assert logits["entropy"]["q50"] == pytest.approx(np.median(entropies))
    labels = [row["label"] for row in rows]
    assert facts["labels"]["classes"] == len(set(labels))
    assert facts["labels"]["per_class"] == {
        "min": min(labels.count(one) for one in set(labels)),
        "median": np.median([labels.count(one) for one in set(labels)]),
        "max": max(labels.count(one) for one in set(labels)),
    }
    assert facts["labels"]["commonest"][0]["rows"] == facts["labels"]["per_class"]["max"]
    assert (facts["complete"], facts["unfinished"], sum(facts["skipped"].values())) == (True, [], 4)


def test_the_worst_shard_is_named_and_sizes_add_up(made: Path) -> None:
    cache = open_cache(made / "cache")
    facts = inspect_cache(cache)
    for name, target in facts["teachers"]["teacher"]["targets"].items():
        figure = target["worst"]["figure"]
        by_shard = {
            shard: record.measured["fidelity"][name][figure]
            for shard, records in cache.teachers["teacher"].records.items()
            for record in records
            if record.identity.rows
        }
        assert by_shard[target["worst"]["shard"]] == pytest.approx(max(by_shard.values())) == pytest.approx(target["worst"]["value"])
        assert target["worst"]["value"] >= target[figure]
        assert {shard: own[figure] for shard, own in target["by_shard"].items()} == pytest.approx(by_shard) and len(by_shard) > 1
        assert all(own.keys() == {*own} & target.keys() for own in target["by_shard"].values())
    parts = {part["name"]: part["bytes"] for part in facts["sizes"]}
    assert parts.keys() == {"views", "teacher: logits", "teacher: features@norm", "array metadata, calibration"}
    assert parts["views"] == facts["views_bytes"]
    documents = {*cache.documents, *(path for path, _ in cache.store.list() if path.startswith("index/"))}
    assert facts["bytes"] == sum(parts.values()) == sum(size for path, size in cache.store.list() if path not in documents)
    text = cache_as_text(facts, "cache")
    assert facts["root"] in text and facts["teachers"]["teacher"]["weights"] in text
    assert all(f"in {target['worst']['shard']}" in text for target in facts["teachers"]["teacher"]["targets"].values())
    assert "UNFINISHED" not in text and "complete" in text
    long = cache.plan.policy.model_copy(update={"rand_augment": RandAugment(), "mix": MixedViews(mixup_alpha=0.8, cutmix_alpha=1.0)})
    facts["policy"]["words"] = policy_in_words(long)
    facts["made_with"] = facts["provenance"] = {
        name: ["1.2.3+cu126"] for name in ("kdcache", "torch", "timm", "numpy", "numcodecs", "pillow", "zarr")
    }
    facts["teachers"]["teacher"]["source"] = "local-dir:a-folder-of-usual-length/teacher"
    assert max(len(line) for line in cache_as_text(facts, "cache").splitlines()) <= 100


def test_names_and_provenance_of_a_cache_from_elsewhere_write_no_line_of_their_own(made: Path, tmp_path: Path) -> None:
    hostile = "x\n  root         0123\r\x1b[2J\u202e<script>alert(1)</script>"
    path = Path(shutil.copytree(made / "cache", tmp_path / "cache"))
    cache = open_cache(path)
    for place, document in cache.documents.items():
        made_by = {**document.provenance, "packages": {hostile: hostile, "torch": hostile}}
        made_by |= {"host": hostile, "device": hostile, "source": hostile, "checkpoint": hostile} if "source" not in document.provenance else {}
        if document.kind == "teacher":
            made_by |= {"source": hostile, "checkpoint": hostile, "weight_files": {hostile: "0" * 32}}
        (path / place).write_bytes(dump_document(document.identity, measured=document.measured, provenance=made_by))
    shutil.rmtree(path / "index")
    shard = cache.shards[0]
    for arguments in ([path], [path, "--shard", shard], [path, "--shard", shard, "--key", cache.keys(shard)[0]]):
        result = CliRunner().invoke(main, ["inspect", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        assert sum(line.startswith("  root  ") for line in result.stdout.splitlines()) == (len(arguments) == 1)
        assert not set("\x1b\r\u202e") & set(result.stdout)
    assert "<script>alert" not in build_page(str(path), PageConfig(samples=1))[0].decode()
    facts = diff(str(path), str(made / "cache"), rows=0)
    facts["plan"] = [{"field": "dataset", "a": hostile, "b": "x"}]
    facts["identical"] = False
    text = diff_as_text(facts)
    assert "\\n  root" in text and not any(line.startswith("  root") for line in text.splitlines())


def test_what_is_unfinished_is_named_and_nothing_else(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", num_shards=3, num_samples=3)
    make_teacher_dir(tmp_path / "teacher")
    run(tmp_path, targets=("logits",), limit_shards=2)
    cache = open_cache(tmp_path / "cache")
    assert [(lack.what, lack.shards) for lack in find_lacks(cache)] == [("shards", ("train-0002",))]
    assert "1 shard not begun: train-0002" in cache_as_text(inspect_cache(cache), "cache")
    run(tmp_path, targets=("logits", "features@norm"), views=3, limit_shards=1)
    cache = open_cache(tmp_path / "cache")
    found = {lack.what: (lack.views, lack.shards) for lack in find_lacks(cache)}
    assert found == {
        "shards": (3, ("train-0002",)), "views": (3, ("train-0001",)), "teacher: features@norm": (3, ("train-0001",)), "teacher: logits": (3, ("train-0001",)),
    }  # fmt: skip
    facts = json.loads(shown(tmp_path / "cache", "--json").stdout)
    assert (facts["complete"], facts["shards"]) == (False, {"done": 2, "total": 3})
    assert {one["what"]: (one["views"], tuple(one["shards"])) for one in facts["unfinished"]} == found
    run(tmp_path, targets=("logits", "features@norm"), views=3)
    assert inspect_cache(open_cache(tmp_path / "cache"))["complete"]


def test_caches_without_rows_labels_or_logits_and_with_huge_labels_are_shown(tmp_path: Path) -> None:
    make_shard(tmp_path / "shards" / "a.tar", num_samples=2, corrupt=(0, 1))
    make_shard(tmp_path / "shards" / "b.tar", num_samples=2, seed=10**9, num_classes=10**10)
    make_teacher_dir(tmp_path / "teacher")
    run(tmp_path, "full")
    copy(CopyConfig(cache=str(tmp_path / "full"), dest=str(tmp_path / "cache"), limit_shards=1))
    facts = inspect_cache(open_cache(tmp_path / "full"))
    assert (facts["labels"]["highest"], facts["labels"]["bins"]) == (10**9 + 1, [])
    assert "labels up to 1000000001" in cache_as_text(facts, "full")
    facts = inspect_cache(open_cache(tmp_path / "cache"))
    assert (facts["rows"], facts["teachers"]["teacher"]["logits"]["rows"], facts["teachers"]["teacher"]["targets"]["logits"]["worst"]) == (0, 0, None)
    assert "labels       none" in cache_as_text(facts, "cache")
    make_shard(tmp_path / "others" / "b.tar", labels=False)
    run(tmp_path, "other", shards=str(tmp_path / "others"), targets=("features@norm",))
    facts = inspect_cache(open_cache(tmp_path / "other"))
    assert (facts["labels"]["classes"], facts["teachers"]["teacher"]["logits"]) == (0, None)
    assert "entropy" not in cache_as_text(facts, "other")
    key = inspect_row(open_cache(tmp_path / "other"), "b", "s0001")
    assert "label        none" in row_as_text(key)


def test_one_key_shows_all_its_views_and_one_view_only_that(made: Path) -> None:
    cache = open_cache(made / "cache")
    facts = inspect_row(cache, "train-0000", "s0004")
    params = [cache.read_params("train-0000", view, [cache.row_of("train-0000", "s0004")])[0] for view in range(3)]
    assert [one["crop"] for one in facts["views"]] == [[p.crop.left, p.crop.top, p.crop.width, p.crop.height] for p in params]
    assert (facts["view"], facts["crop"], facts["pixels"]) == (0, facts["views"][0]["crop"], facts["views"][0]["pixels"])
    single = inspect_row(cache, "train-0000", "s0004", 2)
    assert [one["view"] for one in single["views"]] == [2]
    assert (single["crop"], single["flip"]) == (facts["views"][2]["crop"], facts["views"][2]["flip"])
    logits = cache.read("train-0000", "s0004", 2)["logits"]
    assert [one["class"] for one in single["teachers"]["teacher"]["logits"]["top5"]] == np.argsort(-logits, kind="stable")[:5].tolist()
    assert ("flipped" in row_as_text(single)) == params[2].flip


# --- names -----------------------------------------------------------------------------------------------------------


def test_names_of_the_user_are_shown_and_those_that_fit_nothing_are_refused(made: Path, tmp_path: Path) -> None:
    names = [f"kind {number}" for number in range(10)]
    for path, text in ((tmp_path / "n.txt", "\n".join(names)), (tmp_path / "n.json", json.dumps({str(i): name for i, name in enumerate(names)}))):
        path.write_text(text)
        result = shown(made / "cache", "--shard", "train-0001", "--key", "s0002", "--class-names", path)
        assert "label        3 'kind 3'" in result.stdout
        facts = json.loads(shown(made / "cache", "--shard", "train-0001", "--key", "s0002", "--class-names", path, "--json").stdout)
        assert all(one["name"] == f"kind {one['class']}" for one in facts["teachers"]["teacher"]["logits"]["top5"])
    for text, said in (("one\ntwo", "names 2 classes; expected 10"), ("", "expected a name a line"), ("a\n\nb", "expected a name a line")):
        (tmp_path / "few.txt").write_text(text)
        result = shown(made / "cache", "--class-names", tmp_path / "few.txt")
        assert result.exit_code == 2 and said in result.stderr
    for text in ("[1, 2]", "{", '{"0": "a", "2": "b"}', "[" * 100_000):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UsageError, match="class names"):
            read_class_names(str(tmp_path / "bad.json"))


@pytest.mark.parametrize(
    ("source", "num_classes", "first"),
    [
        ("resnet50.a1_in1k", 1000, "tench"),
        ("hf-hub:timm/vit_base_patch16_224.augreg_in21k", 21843, "organism"),
        ("vit_large_patch16_224", 1000, "tench"),
        ("resnet50.a1_in1k", 10, None),  # built with another head
        ("vit_base_patch16_224.augreg_in21k", 1000, None),
        ("resmlp_12_224.fb_dino", 1000, None),  # its tag names no ImageNet
        ("hf-hub:someone/resnet50.a1_in1k", 1000, None),
        ("python:my:net", 1000, None),
        ("local-dir:/gone", 1000, None),
    ],
)
def test_names_are_taken_from_timm_only_where_its_tag_says_which_imagenet(made: Path, source: str, num_classes: int, first: str | None) -> None:
    layer = open_cache(made / "cache").teachers["teacher"]
    card: TeacherIdentity = layer.document.identity.model_copy(update={"num_classes": num_classes})

    def names(**provenance: Any) -> Any:
        document = Document(kind="teacher", identity=card, measured={}, provenance={"source": source, **provenance}, file_digest="")
        return teacher_class_names(type(layer)("teacher", document))

    found = names()
    assert (found and (found.names[0], len(found))) == (first and (first, num_classes))
    assert names(checkpoint="mine.pth") is None and names(model_args={"num_classes": num_classes}) is None


def test_names_in_a_teachers_folder_count_while_it_is_the_one_that_was_loaded(tmp_path: Path) -> None:
    from timm.models import save_for_hf

    names = [f"digit {number}" for number in range(10)]
    folder = tmp_path / "teacher"
    save_for_hf(tiny_model(TINY_VIT), str(folder), safe_serialization=True, model_args=TINY_VIT_ARGS, model_config={"label_names": names})
    make_shards(tmp_path / "shards", num_shards=1, num_samples=2)
    run(tmp_path, targets=("logits",), views=1)
    row = inspect_row(open_cache(tmp_path / "cache"), "train-0000", "s0001")
    assert [one["name"] for one in row["teachers"]["teacher"]["logits"]["top5"]] == [
        f"digit {one['class']}" for one in row["teachers"]["teacher"]["logits"]["top5"]
    ]
    top1 = inspect_cache(open_cache(tmp_path / "cache"))["teachers"]["teacher"]["top1"]
    assert row["label_name"] == ("digit 1" if top1 >= 50 else None)  # a teacher that knows nothing of the labels does not name them
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert teacher_class_names(open_cache(tmp_path / "cache").teachers["teacher"]) is None


# --- the sample ------------------------------------------------------------------------------------------------------


@given(length=st.integers(0, 5000), count=st.integers(0, 5000))
def test_what_is_spread_is_ascending_unique_and_reaches_everywhere(length: int, count: int) -> None:
    chosen = spread(length, count)
    assert len(chosen) == min(length, count)
    if len(chosen):
        edges = np.concatenate([[-1], chosen, [length]])
        assert (np.diff(edges) > 0).all() and np.diff(edges).max() <= length // len(chosen) + 1 + length % len(chosen)


@given(max_rows=st.integers(0, 40), max_bytes=st.integers(1, 3000))
def test_a_sample_is_bounded_and_the_same_each_time(made: Path, max_rows: int, max_bytes: int) -> None:
    cache = open_cache(made / "cache")
    sample = sample_rows(cache, "teacher", "logits", max_rows=max_rows, max_bytes=max_bytes)
    again = sample_rows(cache, "teacher", "logits", max_rows=max_rows, max_bytes=max_bytes)
    assert [(shard, rows.tolist()) for shard, rows in sample] == [(shard, rows.tolist()) for shard, rows in again]
    assert sum(len(rows) for _, rows in sample) <= max_rows
    assert all(len(rows) and (np.diff(rows) > 0).all() and rows[-1] < cache.views[shard][0].identity.rows for shard, rows in sample)
    assert len(sample_logits(cache, "teacher", max_rows=max_rows, max_bytes=max_bytes).entropy) == sum(len(rows) for _, rows in sample)


def test_inspect_reads_a_bounded_part_of_the_chunks_and_says_so(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdcache.arrays import ArrayReader

    opened: list[str] = []
    before = ArrayReader.__init__

    def counting(self: ArrayReader, store: Any, group: str, *arguments: Any, **options: Any) -> None:
        opened.append(group)
        before(self, store, group, *arguments, **options)

    monkeypatch.setattr(ArrayReader, "__init__", counting)
    facts = inspect_cache(open_cache(made / "cache"), rows=0)
    assert opened == [] and facts["teachers"]["teacher"]["logits"]["rows"] == 0
    facts = inspect_cache(open_cache(made / "cache"), rows=2)
    assert facts["teachers"]["teacher"]["logits"]["rows"] == 2 and len(set(opened)) == 2
    assert "softmax of 2 of 12 rows, view 0, from 2 shards" in cache_as_text(facts, "cache")
    digests = tree(made / "cache")
    assert shown(made / "cache", "--rows", "all").exit_code == 0 and shown(made / "cache", "--rows", "-3").exit_code == 2
    assert shown(made / "cache", "--shard", "train-0000", "--rows", "3").exit_code == 2
    assert tree(made / "cache") == digests


def test_policies_in_words() -> None:
    assert [policy_name(policy) for policy in POLICIES.values()] == list(POLICIES)
    for policy in POLICIES.values():
        words = " ".join(policy_in_words(policy))
        assert ("RandAugment" in words) == (policy.rand_augment is not None)
        assert ("erased" in words) == (policy.erase is not None)
        assert ("colour jitter" in words) == (policy.color_jitter is not None)
    assert policy_name(POLICIES["weak"].model_copy(update={"hflip": 0.4})) == "custom"
