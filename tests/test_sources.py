"""SHARDS in all its forms, and a dataset on its way through both stages: labels by key, names of every kind, tars that moved or changed."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import TINY_VIT, Forked, image_bytes, make_cache, make_image, make_shard, make_shards, make_teacher_dir, sample_members, write_tar

from cli.main import main
from kdcache.errors import DriftError, MismatchError, ShardError, UsageError
from kdcache.opening import open_cache
from kdcache.shards import NO_LABEL, ShardSource, scan_shard
from kdcache.sources import default_dataset_id, locate_shards, resolve_shards
from pipelines.extract import ExtractConfig, ExtractSummary, extract
from pipelines.train import TrainConfig, train
from pipelines.verify import verify

STUDENT_ARGS: dict[str, Any] = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def names_of(spec: Any) -> list[str]:
    return [source.name for source in resolve_shards(spec)]


def write_info(folder: Path, splits: Mapping[str, Any], name: str = "_info.json") -> None:
    (folder / name).write_text(json.dumps({"splits": splits}))


def split_of(name: str, paths: list[Path], length: int, **fields: Any) -> dict[str, Any]:
    """A split as timm's ReaderWds reads it."""
    lengths = [length] * len(paths)
    return {"name": name, "num_samples": sum(lengths), "filenames": [path.name for path in paths], "shard_lengths": lengths, **fields}


# --- forms -----------------------------------------------------------------------------------------------------------


def test_every_form_names_the_same_shards_in_the_order_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "été {1} [日本]"
    paths = [str(path) for path in make_shards(folder, num_shards=3, num_samples=1)]
    (folder / "notes.txt").write_text("not a shard")
    (folder / "._train-0000.tar").write_bytes(b"left by macOS")
    (folder / ".train-0003.tar").write_bytes(b"left by a copy")
    (folder / "all.list").write_text("\ufeff# the shards\r\n\r\n  train-0000.tar\r\ntrain-000[1-9].tar\r\n", encoding="utf-8")
    (tmp_path / "two.txt").write_text(f"{paths[0]}\n{folder.name}/train-0001.tar\n# the last one\n{paths[2]}")
    expected = [ShardSource(name=f"train-{i:04d}", path=path) for i, path in enumerate(paths)]
    forms: list[Any] = [
        folder,
        f"{folder}/all.list",
        tmp_path / "two.txt",
        [paths[0], f"file://{paths[1]}", Path(paths[2])],
        "::".join(paths),
        f"{paths[0]}::{tmp_path}/été*/train-000[12].tar",
        f"{tmp_path}/**/train-*.tar",
    ]
    assert all(resolve_shards(form) == expected for form in forms)
    assert all(list(locate_shards(form).values()) == expected for form in forms)
    monkeypatch.chdir(folder)
    for text in (
        ".",
        "train-{0000..0002}.tar",
        "train-*.tar",
        "*.tar",
        "train-{0000,0001,0002}.tar",
        "train-{0000..0001}.tar::train-*2.tar",
        "all.list",
    ):
        assert resolve_shards(text) == expected, text
    assert names_of("train-{2..0}.tar".replace("{", "{000").replace("..", "..000")) == ["train-0002", "train-0001", "train-0000"]
    Path("train-0000.tar").rename("a tar by another name")
    assert names_of("a tar by another name") == ["a tar by another name"]


def test_imagenet_as_timm_names_it(tmp_path: Path) -> None:
    training = [tmp_path / f"imagenet1k-train-{i:04d}.tar" for i in range(1024)]
    validation = [tmp_path / f"imagenet1k-validation-{i:02d}.tar" for i in range(64)]
    for path in training + validation:
        path.write_bytes(bytes(1024))
    wanted = {"train": [path.stem for path in training], "validation": [path.stem for path in validation]}
    digits = {"train": "{0000..1023}", "validation": "{00..63}"}
    for split, names in wanted.items():
        assert names_of(f"{tmp_path}/imagenet1k-{split}-{digits[split]}.tar") == names
        assert names_of(f"{tmp_path}/imagenet1k-{split}-*.tar") == names
        assert default_dataset_id(resolve_shards(f"{tmp_path}/*{split}*.tar")) == f"imagenet1k-{split}"
    with pytest.raises(UsageError, match=r"no file .*imagenet1k-validation-0000.tar and 63 more; expected 64 tar files"):
        resolve_shards(f"{tmp_path}/imagenet1k-validation-{{0000..0063}}.tar")  # as the data card prints it
    with pytest.raises(UsageError, match=r"training and held-out shards, 1024 as imagenet1k-train-0000.tar and 64 as .*'.*/imagenet1k-train-\*.tar'"):
        resolve_shards(tmp_path)
    assert default_dataset_id(resolve_shards(f"{tmp_path}/*.tar")) == "imagenet1k"
    assert len(locate_shards(tmp_path)) == 1088
    write_info(tmp_path, {"train": split_of("train", training, 0), "validation": split_of("validation", validation, 0)})
    with pytest.raises(UsageError, match=r"2 splits: train \(1,024 tars\), validation \(64 tars\); say which, for example '.*:train'"):
        resolve_shards(tmp_path)
    assert {split: names_of(f"{tmp_path}:{split}") for split in wanted} == wanted
    assert names_of(f"{tmp_path}:validation::{tmp_path}:train") == wanted["validation"] + wanted["train"]
    assert len(locate_shards(tmp_path)) == 1088
    with pytest.raises(UsageError, match=r"no split 'val', it has: train"):
        resolve_shards(f"{tmp_path}:val")
    assert scan_shard(resolve_shards(f"{tmp_path}:validation")[0]).cut is None


def test_a_split_is_what_its_info_says_and_its_tars_must_hold_it(tmp_path: Path) -> None:
    paths = make_shards(tmp_path, num_shards=3, num_samples=2)
    write_info(tmp_path, {"all": split_of("all", [paths[2], paths[0]], 2)})
    sources = resolve_shards(tmp_path)
    assert [(source.name, source.num_samples) for source in sources] == [("train-0002", 2), ("train-0000", 2)]
    assert all(len(scan_shard(source).samples) == 2 for source in sources)
    assert sorted(locate_shards(tmp_path)) == ["train-0000", "train-0001", "train-0002"]
    make_shard(paths[0], num_samples=3)
    with pytest.raises(ShardError, match=r"shard train-0000: .* holds 3 samples, its _info.json says 2"):
        scan_shard(resolve_shards(f"{tmp_path}:all")[1])
    config = ExtractConfig(
        shards=f"{tmp_path}:all", cache=str(tmp_path / "cache"), teacher=make_teacher_dir(tmp_path / "teacher"), views=1, workers=0
    )
    summary = extract(config)
    assert (summary.rows, [problem["shard"] for problem in summary.problems]) == (2, ["train-0000"])
    make_shard(paths[0], num_samples=3, truncate_at=2100)
    assert scan_shard(resolve_shards(tmp_path)[1]).cut is not None  # where a tar is cut says more than how many are left
    paths[2].unlink()
    with pytest.raises(UsageError, match=r"no file .*train-0002.tar; its _info.json lists 2 tar files"):
        resolve_shards(tmp_path)


def test_timm_reads_the_same_samples_from_the_same_splits(tmp_path: Path) -> None:
    training = make_shards(tmp_path, num_shards=3, num_samples=4)
    validation = [make_shard(tmp_path / "validation-00.tar", num_samples=3, seed=5)]
    write_info(tmp_path, {"train": split_of("train", training[::-1], 4), "validation": split_of("validation", validation, 3)})

    def read() -> None:
        from timm.data import create_dataset

        sets = [create_dataset("wds/x", root=str(tmp_path), split=split, is_training=False, batch_size=1) for split in ("train", "validation")]
        (tmp_path / "theirs.json").write_text(json.dumps([[len(dataset), [int(target) for _, target in dataset]] for dataset in sets]))

    child = Forked(read, tmp_path / "log")  # it leaves its files open
    assert child.wait() == 0, child.output()
    theirs = json.loads((tmp_path / "theirs.json").read_text())
    for (length, labels), split in zip(theirs, ("train", "validation"), strict=True):
        sources = resolve_shards(f"{tmp_path}:{split}")
        assert [sample.label for source in sources for sample in scan_shard(source).samples] == labels
        assert sum(source.num_samples or 0 for source in sources) == length == len(labels)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected an object with 'splits'"),
        ('{"splits": []}', "expected an object with 'splits'"),
        ('{"splits": {"a": 1}}', "expected 'filenames' with at least one name"),
        ('{"splits": {"a": {"filenames": []}}}', "expected 'filenames' with at least one name"),
        ('{"splits": {"a": {"filenames": [1]}}}', "expected 'filenames' with at least one name"),
        ('{"splits": {"a": {"filenames": ["train-0000.tar"], "shard_lengths": [1, 2]}}}', "as many whole numbers in 'shard_lengths'"),
        ('{"splits": {"a": {"filenames": ["train-0000.tar"], "shard_lengths": ["1"]}}}', "as many whole numbers in 'shard_lengths'"),
        ('{"splits": {"a": {"filenames": ["train-0000.tar"], "alt_label": 3}}}', "expected a key of .json members as 'alt_label'"),
    ],
)
def test_an_info_file_that_says_nothing_is_a_usage_error(tmp_path: Path, content: str, message: str) -> None:
    make_shards(tmp_path, num_shards=1, num_samples=1)
    (tmp_path / "_info.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        resolve_shards(tmp_path)
    (tmp_path / "_info.json").rename(tmp_path / "info.json")
    if "'splits'" in message:  # a file of that name may be anyone's
        assert names_of(tmp_path) == ["train-0000"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty name"),
        ("{0}/none-*.tar", r"'.*/none-\*.tar': no file matches"),
        ("{0}/*.list", r"it matches 3 names, .*bad.list first, of which none is a .tar file"),
        ("{0}/train-{{0000..0003}}.tar", r"no file .*train-0001.tar and 2 more; expected 4"),
        ("{0}/train-{{0..9999999}}.tar", "more than 2,000 names"),
        ("{0}/train-{{0000..0003.tar", r"braces are not balanced; expected a brace expression such as 'train-\{0000..0007\}.tar'"),
        ("{0}/train-0000}}.tar", "braces are not balanced"),
        ("{0}/train-0000.tar::{0}/absent.tar", "no file or folder .*absent.tar.*; expected a tar, a folder of tars or a list file"),
        ("{0}/train-00000.tar", "no file or folder .*/train-00000.tar; did you mean '.*/train-0000.tar'"),
        ("{0}/gone.link", r"no file or folder \S*/gone.link; expected"),
        ("{0}:train", "no _info.json in .*, hence no split 'train'.*'train-\\*.tar'"),
        ("{0}/empty", r"no shards: '.*/empty' holds no .tar file; expected a folder of tars"),
        ("{0}/above", r"sub-folders hold some \(a, b\): name one of them, or all as '.*/above/\*/\*.tar'"),
        ("s3://bucket/train-{{0000..0003}}.tar", "only local files"),
        ("pipe:cat x.tar", "only local files"),
        ("{0}/bad.list", r"bad.list, line 3: shards 'absent-\{{0..1\}}.tar': no file .*absent-0.tar and 1 more"),
        ("{0}/nested.list", r"nested.list, line 1: .*bad.list.*a list file can't name another one"),
        ("{0}/comments.list", "comments.list names no shards"),
        ("{0}/picture", "neither a tar nor a list file"),
        ("{0}/train-0000.tar::{0}/train-*.tar", r"shard .*train-0000.tar is named twice"),
        ("{0}::{0}/above/a", r"two shards are called 'train-0000': .*a/train-0000.tar"),
        ("{0}/above/b::{0}/above/a", r"shards 'TRAIN-0000' and 'train-0000' differ in case only"),
        ("/dev/null", "neither a file nor a folder"),
        ("{0}/train-{{0..99999999999}}.tar", "its braces give more than 2,000 names"),
        ("{{" * 3000 + "}}" * 3000, "its braces are not balanced"),
    ],
)
def test_shards_that_cannot_be_are_usage_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.setattr("kdcache.sources._MAX_SHARDS", 2000)
    make_shards(tmp_path, num_shards=1, num_samples=1)
    make_shards(tmp_path / "above" / "a", num_shards=1, num_samples=1)
    make_shard(tmp_path / "above" / "b" / "TRAIN-0000.tar", num_samples=1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "gone.link").symlink_to("nowhere")
    (tmp_path / "bad.list").write_text("# one is there\ntrain-0000.tar\nabsent-{0..1}.tar\n")
    (tmp_path / "nested.list").write_text("bad.list\n")
    (tmp_path / "comments.list").write_text("# nothing\n\n")
    (tmp_path / "picture").write_bytes(image_bytes(make_image(0)))
    with pytest.raises(UsageError, match=message.replace("{{", "{").replace("}}", "}")):
        resolve_shards(text.format(tmp_path))


def test_names_that_can_be_no_identity_are_usage_errors(tmp_path: Path) -> None:
    for name, message in [(b".tar", "has no name before .tar.*rename"), (b"caf\xe9.tar", "name is not UTF-8.*rename")]:
        path = os.fsdecode(os.path.join(os.fsencode(tmp_path), name))
        Path(path).write_bytes(bytes(1024))
        with pytest.raises(UsageError, match=message):
            resolve_shards(path)
    with pytest.raises(UsageError, match="no shards"):
        resolve_shards([])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["imagenet1k-train-0000", "imagenet1k-train-1023"], "imagenet1k-train"),
        (["train-07"], "train"),
        (["0000", "0001"], "000"),
        (["a", "b"], "dataset"),
    ],
)
def test_the_default_dataset_id_is_the_common_name(names: list[str], expected: str) -> None:
    assert default_dataset_id([ShardSource(name=name, path=f"/{name}.tar") for name in names]) == expected


# --- labels ----------------------------------------------------------------------------------------------------------


def labelled(path: Path, bodies: list[Any], *, cls: bool = False) -> Path:
    """A shard of samples k0, k1, … with these .json members (None: without), and if asked .cls members that say 9."""
    members = []
    for i, body in enumerate(bodies):
        members.append((f"k{i}.jpg", image_bytes(make_image(i))))
        members += [(f"k{i}.cls", b"9")] if cls else []
        members += [(f"k{i}.json", json.dumps(body).encode())] if body is not None else []
    return write_tar(path, members)


NESTED = [{"label": 1, "fine": 2, "cls": {"id": 3, "a.b": 5}, "cls.id": 4}, {"label": -1, "fine": None, "cls": {"id": 0, "a.b": 6}, "cls.id": 7}]


@pytest.mark.parametrize(
    ("key", "labels", "with_cls"),
    [
        (None, [1, NO_LABEL], [9, 9]),
        ("label", [1, NO_LABEL], [1, NO_LABEL]),
        ("fine", [2, NO_LABEL], [2, NO_LABEL]),
        ("cls.id", [4, 7], [4, 7]),
        ("cls", None, None),
        ("cls.a", None, None),
        ("fine.x", None, None),
        ("colour", None, None),
    ],
)
def test_labels_are_read_where_the_key_says(tmp_path: Path, key: str | None, labels: list[int] | None, with_cls: list[int] | None) -> None:
    for cls, expected in ((False, labels), (True, with_cls)):
        source = ShardSource("x", str(labelled(tmp_path / "x.tar", NESTED, cls=cls)), label_key=key)
        if expected is None:
            found = (
                r"label \{.*\} in k0.json"
                if key == "cls"
                else f"k0.json has no '{key}', its keys are: cls, cls.id, fine, label; pass one of them as --label"
            )
            with pytest.raises(ShardError, match=rf"shard x: key 'k0': {found}"):
                scan_shard(source)
        else:
            assert [sample.label for sample in scan_shard(source).samples] == expected
    plain = [{"cls": body["cls"]} for body in NESTED]
    assert [s.label for s in scan_shard(ShardSource("x", str(labelled(tmp_path / "x.tar", plain)), "cls.id")).samples] == [3, 0]
    bare = ShardSource("x", str(labelled(tmp_path / "x.tar", [None])), "fine")
    assert scan_shard(bare).samples[0].label == NO_LABEL
    with pytest.raises(ShardError, match=r"key 'k0': expected a label at 'fine' of a .json member, found only .cls; leave --label-key out"):
        scan_shard(ShardSource("x", str(labelled(tmp_path / "x.tar", [None], cls=True)), "fine"))


def test_a_cache_has_one_label_key_for_both_stages(tmp_path: Path) -> None:
    shards, val, cache, teacher = tmp_path / "shards", tmp_path / "val", str(tmp_path / "cache"), make_teacher_dir(tmp_path / "teacher")
    for i in range(2):
        labelled(shards / f"train-{i}.tar", [{"label": 0, "fine": 4 + i}, {"label": 1, "fine": 7}], cls=True)
    labelled(val / "val-0.tar", [{"fine": 1, "other": 99}])

    def run(**overrides: Any) -> ExtractSummary:
        options: dict[str, Any] = {"shards": str(shards), "cache": cache, "teacher": teacher, "views": 1, "workers": 0, "limit_shards": 1}
        return extract(ExtractConfig(**{**options, **overrides}))

    run(label_key="fine")
    assert run().resumed_shards == 1
    assert run(views=2, limit_shards=None).problems == []  # a new shard and new views, read by the same key
    with open_cache(cache) as opened:
        assert opened.rows.label.tolist() == [4, 7, 5, 7]
    for key in ("label", "cls"):
        with pytest.raises(MismatchError, match=rf"labels: field 'label_key' differs: the cache has 'fine', this run has '{key}'"):
            run(label_key=key)
    os.utime(shards / "train-0.tar")
    assert run().resumed_shards == 1  # scanned again, by the same key
    assert verify(cache, views="all", workers=0).ok
    assert verify(cache, views="all", data=str(shards), workers=0).ok
    result = CliRunner().invoke(main, ["extract", str(shards), str(tmp_path / "plain"), "--teacher", teacher, "--views", "1", "-j", "0"])
    assert result.exit_code == 0, result.output
    with pytest.raises(MismatchError, match="the cache has None, this run has 'fine'"):
        run(cache=str(tmp_path / "plain"), label_key="fine", limit_shards=None)

    options: dict[str, Any] = {"cache": cache, "students": (TINY_VIT,), "model_kwargs": STUDENT_ARGS, "epochs": 1, "batch_size": 2, "workers": 0}
    options |= {"device": "cpu", "val": str(val), "out": str(tmp_path / "runs")}
    assert train(TrainConfig(**options))[0]["status"] == "done"
    with pytest.raises(ShardError, match="has label 99, the student has 10 classes"):
        train(TrainConfig(**options, label_key="other"))


def test_a_split_with_a_label_of_its_own_is_read_as_timm_reads_it(tmp_path: Path) -> None:
    path = labelled(tmp_path / "x.tar", [{"label_12k": 3}, {"label_12k": -1}], cls=True)
    write_info(tmp_path, {"all": split_of("all", [path], 1, alt_label="label_12k"), "cls": split_of("cls", [path], 2)})
    (alternative,), (plain,) = resolve_shards(f"{tmp_path}:all"), resolve_shards(f"{tmp_path}:cls")
    assert [sample.label for sample in scan_shard(alternative).samples] == [3, NO_LABEL]
    assert [sample.label for sample in scan_shard(plain).samples] == [9, 9]
    assert resolve_shards(f"{tmp_path}:all", label_key="other")[0].label_key == "other"


# --- names, places, changes ------------------------------------------------------------------------------------------


KEYS = [
    "n01440764/n01440764_10026",
    "日本/é",
    "with space/and ' quote",
    "../../up",
    "/absolute/name",
    "a\nb",
    "\x1b[31mred",
    "-rf",
    "~/home",
    "C:\\x",
]


def odd_tar(path: Path) -> Path:
    """Every key of KEYS as a sample, then links, a device and a pipe that stand for samples."""
    members = [member for i, key in enumerate(KEYS) for member in sample_members(key, i, label=i)]
    write_tar(path, members)
    with tarfile.open(path, "a") as tar:
        specials = [
            ("hard.jpg", tarfile.LNKTYPE),
            ("sym.jpg", tarfile.SYMTYPE),
            ("device.jpg", tarfile.CHRTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
            ("folder.jpg", tarfile.DIRTYPE),
            ("link.txt", tarfile.SYMTYPE),
        ]
        for name, kind in specials:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        label = tarfile.TarInfo("half.cls")
        label.type, label.linkname = tarfile.SYMTYPE, "../../up.cls"
        image = tarfile.TarInfo("half.jpg")
        image.size = 5
        tar.addfile(image, io.BytesIO(b"12345"))
        tar.addfile(label)
        again = tarfile.TarInfo(f"{KEYS[0]}.jpg")  # GNU tar writes a file that is named twice so
        again.type, again.linkname = tarfile.LNKTYPE, again.name
        tar.addfile(again)
    return path


def test_hostile_names_are_samples_or_skips_and_nothing_leaves_the_tar(tmp_path: Path) -> None:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    path = odd_tar(tmp_path / "in" / "é 日本.tar")
    before = sorted(tmp_path.rglob("*"))
    index = scan_shard(ShardSource("x", str(path)))
    with open(path, "rb") as stream:
        theirs = [sample["__key__"] for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))]
    ours = [sample.key for sample in index.samples if sample.problem is None]
    assert ours == theirs[:-1]
    assert {*KEYS} - {*ours} <= {"a\nb"}  # by webdataset's rule
    assert {sample.key: sample.problem for sample in index.samples if sample.problem is not None} == {
        "hard": "expected plain files, found a hard link",
        "sym": "expected plain files, found a symbolic link",
        "device": "expected plain files, found a device or a pipe",
        "pipe": "expected plain files, found a device or a pipe",
        "half": "expected plain files, found a symbolic link",
    }
    assert sorted(tmp_path.rglob("*")) == before
    config = ExtractConfig(shards=str(path), cache=str(tmp_path / "cache"), teacher=make_teacher_dir(tmp_path / "teacher"), views=1, workers=0)
    summary = extract(config)
    assert (summary.rows, summary.skipped, summary.problems) == (len(ours), 5, [])
    assert verify(str(tmp_path / "cache"), views="all", workers=0).ok
    with open_cache(tmp_path / "cache") as cache:
        assert cache.keys("é 日本") == ours
        assert all(cache.view("é 日本", key).shape == (32, 32, 3) for key in ours)


def test_data_moves_with_every_command(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, num_shards=2, num_samples=4, views=2)
    moved = tmp_path / "neu é 日本"
    (tmp_path / "shards").rename(moved)
    (moved / "both.txt").write_text("train-0000.tar\ntrain-0001.tar\n")
    write_info(moved, {"a": split_of("a", [moved / "train-0000.tar"], 4), "b": split_of("b", [moved / "train-0001.tar"], 4)})
    options: dict[str, Any] = {
        "cache": str(cache),
        "students": (TINY_VIT,),
        "model_kwargs": STUDENT_ARGS,
        "batch_size": 4,
        "workers": 0,
        "device": "cpu",
    }
    with pytest.raises(ShardError, match=r"shard train-0000: .*shards/train-0000.tar can't be read: No such file.*; pass --data with SHARDS where"):
        train(TrainConfig(**options, out=str(tmp_path / "runs")))
    with open_cache(cache) as opened, pytest.raises(ShardError, match=r"shard train-0001: key 's0001': .*pass --data"):
        opened.view("train-0001", "s0001")
    assert {(p.kind, "pass --data with SHARDS" in p.detail) for p in verify(str(cache), views=1, workers=0).problems} == {("source", True)}
    assert CliRunner().invoke(main, ["inspect", str(cache), "--shard", "train-0001", "--key", "s0001"]).exit_code == 0
    views = []
    forms = [str(moved), f"{moved}:a::{moved}:b", f"{moved}/both.txt", f"{moved}/train-{{0000..0001}}.tar", f"{moved}/*.tar"]
    for number, form in enumerate(forms):
        assert verify(str(cache), views="all", data=form, workers=0).ok
        with open_cache(cache, data=form) as opened:
            views.append(opened.view("train-0001", "s0001", view=1))
        if number == 0:
            assert train(TrainConfig(**options, out=str(tmp_path / "runs"), data=form, epochs=1))[0]["status"] == "done"
    assert all(np.array_equal(view, views[0]) for view in views)
    summary = extract(ExtractConfig(shards=f"{moved}/*.tar", cache=str(cache), teacher=f"local-dir:{tmp_path / 'teacher'}", views=3, workers=0))
    assert (summary.shards, summary.problems) == (2, [])
    with open_cache(cache) as opened:
        assert opened.view("train-0001", "s0001").shape == (32, 32, 3)  # the latest place is remembered


def test_a_tar_that_was_replaced_is_noticed_by_both_stages(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, num_shards=2, num_samples=4, views=1)
    path = tmp_path / "shards" / "train-0001.tar"
    original, stat = path.read_bytes(), path.stat()
    options: dict[str, Any] = {
        "cache": str(cache),
        "students": (TINY_VIT,),
        "model_kwargs": STUDENT_ARGS,
        "batch_size": 4,
        "workers": 0,
        "device": "cpu",
    }
    config = TrainConfig(**options, out=str(tmp_path / "runs"), epochs=1, check_views=1.0)
    again = ExtractConfig(shards=str(tmp_path / "shards"), cache=str(cache), teacher=f"local-dir:{tmp_path / 'teacher'}", views=1, workers=0)

    make_shard(path, num_samples=12, seed=1)  # another size: its members tell
    assert path.stat().st_size != stat.st_size
    with pytest.raises(ShardError, match=r"shard train-0001: .* was changed: expected member table"):
        train(config)
    assert [problem["shard"] for problem in extract(again).problems] == ["train-0001"]
    path.write_bytes(original + bytes(10240))  # another size, the same members
    assert extract(again).problems == []
    assert train(config)[0]["status"] == "done"

    with tarfile.open(path) as tar:
        first, second = (tar.getmember(f"s000{i}.jpg") for i in range(2))
    image = original[second.offset_data : second.offset_data + min(first.size, second.size)].ljust(first.size, b"\0")
    path.write_bytes(original[: first.offset_data] + image + original[first.offset_data + first.size :])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same members, size and time: the pixels tell
    assert extract(again).resumed_shards == 2
    assert [(p.kind, p.shard, p.key) for p in verify(str(cache), views="all", workers=0).problems] == [("pixels", "train-0001", "s0000")]
    with pytest.raises(DriftError, match=r"shard train-0001: key 's0000', view 0"):
        train(TrainConfig(**{**options, "out": str(tmp_path / "more"), "epochs": 1, "check_views": 1.0}))


def test_a_shard_that_differs_in_case_from_the_caches_is_refused(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, num_shards=1, num_samples=2, views=1)
    path = make_shard(tmp_path / "more" / "Train-0000.tar", num_samples=2)
    with pytest.raises(UsageError, match="shards 'train-0000' and 'Train-0000' differ in case only"):
        extract(ExtractConfig(shards=str(path), cache=str(cache), teacher=f"local-dir:{tmp_path / 'teacher'}", dataset="train", views=1, workers=0))
