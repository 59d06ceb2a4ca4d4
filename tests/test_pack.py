"""Pack: an ImageFolder becomes shards, byte for byte the same each time; what can't be packed is refused or counted, never dropped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from helpers import image_bytes, make_image

from cli.main import main
from kdcache.errors import ShardError, StoreError, UsageError
from kdcache.shards import scan_shard
from kdcache.sources import resolve_shards
from pipelines.pack import PackConfig, pack
from pipelines.quickstart import QuickstartConfig, quickstart


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """3 classes of 3 images, with names that need care."""
    root = tmp_path / "images"
    for label, name in enumerate(["cat", "dog.v2", "été"]):
        for i, file in enumerate(["a.jpg", "b.PNG", "more/c.d.webp"]):
            path = root / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_bytes(make_image(10 * label + i), path.suffix.lower().lstrip(".")))
    return root


def pack_into(images: Path, out: Path, **options: Any) -> dict[str, bytes]:
    pack(PackConfig(images=str(images), out=str(out), **{"name": "x", "samples_per_shard": 4, **options}))
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_packing_twice_gives_the_same_bytes_whatever_the_times(images: Path, tmp_path: Path) -> None:
    first = pack_into(images, tmp_path / "first")
    assert sorted(first) == ["x-0000.tar", "x-0001.tar", "x-0002.tar"]
    for i, path in enumerate(sorted(images.rglob("*"))):
        os.utime(path, (1_000_000 * i, 1_000_000 * i))
        if path.is_file():
            path.chmod(0o600)
    assert pack_into(images, tmp_path / "second") == first
    assert pack_into(images, tmp_path / "third", shuffle_seed=1) != first


def test_samples_have_their_images_and_labels(images: Path, tmp_path: Path) -> None:
    pack_into(images, tmp_path / "out")
    indexes = [scan_shard(source) for source in resolve_shards(tmp_path / "out")]
    found = {sample.key: sample.label for index in indexes for sample in index.samples}
    keys = ("a", "b", "more/c_d")
    assert found == {f"{folder}/{key}": label for label, folder in enumerate(["cat", "dog_v2", "été"]) for key in keys}
    assert all(sample.problem is None for index in indexes for sample in index.samples)


def test_hidden_folders_take_no_class_number(images: Path, tmp_path: Path) -> None:
    expected = pack_into(images, tmp_path / "expected")
    for folder in (".ipynb_checkpoints", "cat/.ipynb_checkpoints"):
        (images / folder).mkdir()
        (images / folder / "a-checkpoint.jpg").write_bytes(b"x")
    assert pack_into(images, tmp_path / "out") == expected


@pytest.mark.parametrize("content", [None, "notes.txt", ".hidden.jpg"])
def test_a_class_folder_without_images_is_an_error_that_names_it(images: Path, tmp_path: Path, content: str | None) -> None:
    (images / "cow").mkdir()
    if content:
        (images / "cow" / content).write_bytes(b"x")
    with pytest.raises(UsageError, match=r"class folder 'cow' holds no jpg, .* file, but would take class number 1; remove the folder"):
        pack_into(images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_of_splits_are_refused_and_no_classes(images: Path, tmp_path: Path) -> None:
    images.rename(tmp_path / "val")
    (tmp_path / "both" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "val" / "cat" / "a.jpg").rename(tmp_path / "both" / "train" / "cat" / "a.jpg")
    (tmp_path / "val").rename(tmp_path / "both" / "val")
    with pytest.raises(UsageError, match=r"its folders, train and val, are splits and no classes; pack each by itself, '.*/both/train' first"):
        pack_into(tmp_path / "both", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mistyped_command_names_the_near_one() -> None:
    assert CliRunner().invoke(main, ["pakc"]).output.endswith("No such command 'pakc'. (Did you mean 'pack'?)\n")
    assert ShellComplete(main, {}, "kdcache", "").get_completions(["pakc"], "")  # what a shell asks for is no error


def test_files_that_are_not_packed_are_counted_and_said(images: Path, tmp_path: Path) -> None:
    expected = pack_into(images, tmp_path / "expected")
    for name in ("cat/a.bmp", "cat/b.GIF", "cat/c.gif", "README", "cat/.hidden.jpg"):
        (images / name).write_bytes(b"x")
    (images / "cat" / "gone.jpg").symlink_to("nowhere.jpg")
    (images / "cat" / "linked").symlink_to(images / "été")
    result = CliRunner().invoke(main, ["pack", str(images), str(tmp_path / "out"), "--name", "x", "--samples-per-shard", "4", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"shards": 3, "samples": 9, "classes": 3, "bytes": sum(map(len, expected.values())), "ignored": 7}
    assert "7 files not packed (1 .bmp, 2 .gif, 1 hidden, 1 link to a folder, 1 link to nothing, 1 no extension); first:" in result.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == expected


def test_a_file_that_webdataset_would_skip_is_refused_by_name(images: Path, tmp_path: Path) -> None:
    (images / "__meta__").mkdir()
    (images / "__meta__" / "a.jpg").write_bytes(b"x")
    with pytest.raises(ShardError, match=r"'__meta__/a.jpg': webdataset would not read it as a sample"):
        pack_into(images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["cat/line\nbreak.jpg", "line\nbreak/a.jpg", "cat/__a__.jpg", "cat/__meta__/a.jpg", "cat/ .jpg"])
def test_an_odd_name_is_read_back(images: Path, tmp_path: Path, name: str) -> None:
    (images / name).parent.mkdir(exist_ok=True)
    (images / name).write_bytes(b"x")
    pack_into(images, tmp_path / "out")
    keys = {sample.key for source in resolve_shards(tmp_path / "out") for sample in scan_shard(source).samples}
    assert name.removesuffix(".jpg") in keys


def test_a_file_whose_name_is_not_utf8_is_refused_by_name(images: Path, tmp_path: Path) -> None:
    with open(os.fsencode(images / "cat") + b"/caf\xe9.jpg", "wb") as file:
        file.write(b"x")
    with pytest.raises(ShardError, match=r"'cat/caf.*xe9.jpg': its name is not UTF-8"):
        pack_into(images, tmp_path / "out")


@pytest.mark.parametrize("name", ["a/b", "../up", "/tmp/x", "a\\b", ""])
def test_a_name_with_separators_is_refused(images: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"--name .*expected the first part of a file name"):
        pack_into(images, tmp_path / "out", name=name)


def test_shards_that_are_there_are_not_overwritten(images: Path, tmp_path: Path) -> None:
    before = pack_into(images, tmp_path / "out")
    with pytest.raises(StoreError, match="is there already"):
        pack_into(images, tmp_path / "out", shuffle_seed=1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_folder_that_is_no_image_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        pack_into(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match="no class folders; expected IMAGES/<class>/<file>"):
        pack_into(tmp_path / "flat", tmp_path / "out")


@pytest.mark.parametrize("inside", [False, True])
def test_quickstart_into_a_file_is_an_error(tmp_path: Path, inside: bool) -> None:
    file = tmp_path / "file"
    file.write_text("keep me")
    with pytest.raises(StoreError, match=r"can't be used as a folder: .*name a new one"):
        quickstart(QuickstartConfig(out=str(file / "x" if inside else file)), progress=False)
    assert file.read_text() == "keep me"
