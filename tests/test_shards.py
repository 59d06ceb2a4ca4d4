"""Shards: what kdcache reads from a tar's headers is what webdataset reads from the whole tar, and damage is named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from helpers import Member, image_bytes, make_image, make_shard, make_shards, make_teacher_dir, sample_members, write_tar

from kdcache.errors import ShardError
from kdcache.shards import NO_LABEL, NOT_UTF8, ShardFiles, ShardIndex, ShardSource, scan_shard


def scan(path: Path) -> ShardIndex:
    return scan_shard(ShardSource(name=path.stem, path=str(path)))


def read_with_webdataset(path: Path) -> list[dict[str, Any]]:
    """Every sample as webdataset yields it: `__key__` and extension → bytes."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with open(path, "rb") as stream:  # WebDataset(path) itself leaves its file open
        return list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))


MIXED: list[Member] = [
    *sample_members("a/n01_7", 1, label=3),
    *sample_members("a/n01_8", 2, label=4, extension="png", label_extension="json"),
    *sample_members("été/日本 x", 3, label=None, extension="webp"),
    *sample_members("./dot", 4, label=0, extension="jpeg"),
    ("UPPER.JPG", image_bytes(make_image(5))),
    ("UPPER.CLS", b" 7\n"),
    ("__meta__/x.jpg", b"skipped by both"),
    ("__kept.jpg", image_bytes(make_image(6))),
    ("no_extension", b"skipped by both"),
    ("dots.in.name.jpg", image_bytes(make_image(7))),
    ("a/noimage.cls", b"1"),
    ("two.jpg", image_bytes(make_image(8))),
    ("two.png", image_bytes(make_image(8), "png")),
    ("both.jpg", image_bytes(make_image(9))),
    ("both.cls", b"5"),
    ("both.json", b'{"label": 6}'),
    ("json_without_label.jpg", image_bytes(make_image(9))),
    ("json_without_label.json", b'{"caption": "a"}'),
    ("long/" * 40 + "name.jpg", image_bytes(make_image(10))),
]


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_samples_are_webdatasets(tmp_path: Path, tar_format: int) -> None:
    path = write_tar(tmp_path / "mixed.tar", MIXED, format=tar_format)
    index, files = scan(path), ShardFiles()
    theirs = read_with_webdataset(path)
    assert [sample.key for sample in index.samples] == [sample["__key__"] for sample in theirs]
    assert index.cut is None
    problems = {}
    for ours, sample in zip(index.samples, theirs, strict=True):
        if ours.problem is None:
            image = next(sample[extension] for extension in ("jpg", "jpeg", "png", "webp") if extension in sample)
            assert files.read(index.source, ours.key, ours.image_offset, ours.image_size) == image
        else:
            problems[ours.key] = ours.problem
    assert problems.keys() == {"a/noimage", "two", "dots"}
    assert "found jpg and png" in problems["two"]
    assert [sample.label for sample in index.samples] == [3, 4, NO_LABEL, 0, 7, NO_LABEL, NO_LABEL, 1, NO_LABEL, 5, NO_LABEL, NO_LABEL]


def test_tar_order_is_row_order(tmp_path: Path) -> None:
    keys = ["b", "a", "10", "9", "Z"]
    path = write_tar(tmp_path / "x.tar", [member for i, key in enumerate(keys) for member in sample_members(key, i)])
    assert [sample.key for sample in scan(path).samples] == keys


def test_every_truncation_keeps_the_whole_samples_and_is_reported(tmp_path: Path) -> None:
    whole_path = make_shard(tmp_path / "whole.tar", num_samples=4, size_wh=(24, 20), extension="png")
    data = whole_path.read_bytes()
    whole = scan(whole_path)
    assert whole.cut is None
    with tarfile.open(whole_path) as tar:
        members = tar.getmembers()
    content_end = members[-1].offset_data + 512
    ends = [member.offset_data + member.size for member in members[1::2]]
    path = tmp_path / "cut.tar"
    odd = {member.offset_data + extra for member in members for extra in (-1, 1, member.size - 1, member.size, member.size + 1)}
    for size in sorted({*range(512, content_end + 1, 512), *odd} - {511}):
        path.write_bytes(data[:size])
        cut = scan(path)
        assert cut.cut is not None, size
        num_whole = sum(end <= size for end in ends)
        assert list(cut.samples) == list(whole.samples[: len(cut.samples)]), size
        # the only sample may have lost its label to a cut between two headers: it has none to compare with
        assert len(cut.samples) == num_whole or (num_whole == 1 and not cut.samples), size
    path.write_bytes(data[: content_end + 512])
    assert scan(path).cut is None


@pytest.mark.parametrize("damage", ["checksum", "field", "number", "member"])
def test_how_a_tar_is_cut_is_said_in_our_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """It is part of an identity: another Python's wording must not change it."""
    path = make_shard(tmp_path / "x.tar", num_samples=4)
    with tarfile.open(path) as tar:
        member = tar.getmembers()[4]
    if damage == "member":
        path.write_bytes(path.read_bytes()[: member.offset_data + 10])
        assert scan(path).cut == f"member 's0002.jpg' ends at byte {member.offset_data + member.size}, the file has {member.offset_data + 10}"
        return
    raised = {"checksum": tarfile.ReadError("words of Python"), "field": ValueError("words of Python"), "number": OverflowError("words of Python")}
    next_member, calls = tarfile.TarFile.next, iter(range(100))

    def fail(self: tarfile.TarFile) -> tarfile.TarInfo | None:
        if next(calls) == 5:  # the first header is read by tarfile.open
            raise raised[damage]
        return next_member(self)

    monkeypatch.setattr(tarfile.TarFile, "next", fail)
    cut = scan(path).cut
    assert cut is not None
    assert re.fullmatch(rf"header at byte \d+ of {path.stat().st_size} can't be read", cut)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@pytest.mark.parametrize("size", [1 << 40, 1 << 62, (1 << 63) - 1])
def test_a_header_that_claims_more_than_memory_is_a_cut_or_no_tar(tmp_path: Path, kind: bytes, size: int) -> None:
    info = tarfile.TarInfo("a")
    info.type, info.size = kind, size
    header = info.tobuf(tarfile.GNU_FORMAT)
    path = make_shard(tmp_path / "x.tar", num_samples=2)
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + 512
    data = path.read_bytes()
    path.write_bytes(data[:end] + header + data[end:])
    index = scan(path)
    assert ([sample.key for sample in index.samples], index.cut) == (["s0000", "s0001"], f"header at byte {end} of {len(data) + 512} can't be read")
    path.write_bytes(header + data)
    with pytest.raises(ShardError, match=r"shard x: .* is not an uncompressed tar"):
        scan(path)


LATIN1 = b"caf\xe9".decode("utf-8", "surrogateescape")


def test_a_name_that_is_not_utf8_is_a_skip_with_a_key_that_can_be_written(tmp_path: Path) -> None:
    members = [*sample_members("a", 1, label=3), *sample_members(f"{LATIN1}/x", 2, label=4), *sample_members("b", 3, label=5)]
    path = write_tar(tmp_path / "x.tar", members, format=tarfile.GNU_FORMAT)
    samples = scan(path).samples
    assert [(sample.key, sample.label, sample.problem) for sample in samples] == [("a", 3, None), (r"caf\xe9/x", 4, NOT_UTF8), ("b", 5, None)]
    json.dumps([sample.key for sample in samples], ensure_ascii=False).encode()
    odd = write_tar(tmp_path / "odd.tar", [*sample_members("a", 1), (f"a.{LATIN1}", b""), (f"b.{LATIN1}", b"")], format=tarfile.GNU_FORMAT)
    assert [(sample.key, sample.problem) for sample in scan(odd).samples] == [("a", NOT_UTF8), ("b", NOT_UTF8)]


def test_a_name_that_is_not_utf8_reads_alike_in_every_locale(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [*sample_members(LATIN1, 2), *sample_members("été", 1)], format=tarfile.GNU_FORMAT)
    code = "import sys; from kdcache.shards import *; print(ascii([s.key for s in scan_shard(ShardSource(name='x', path=sys.argv[1])).samples]))"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=environment, timeout=120)
    assert result.stdout.strip() == ascii([sample.key for sample in scan(path).samples]), result.stderr


def test_one_key_for_two_names_names_both(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"{LATIN1}.jpg", b"1"), (r"caf\xe9.jpg", b"2")], format=tarfile.GNU_FORMAT)
    with pytest.raises(ShardError, match=r"appears twice: member 'caf.*' at byte 0 and member 'caf"):
        scan(path)


def test_an_extraction_counts_a_name_that_is_not_utf8_as_a_skip(tmp_path: Path) -> None:
    from pipelines.extract import ExtractConfig, extract
    from pipelines.verify import verify

    members = [*sample_members("a", 1, label=3), *sample_members(LATIN1, 2, label=4), *sample_members("b", 3, label=5)]
    write_tar(tmp_path / "shards" / "x.tar", members, format=tarfile.GNU_FORMAT)
    teacher = make_teacher_dir(tmp_path / "teacher")
    config = ExtractConfig(shards=str(tmp_path / "shards"), cache=str(tmp_path / "cache"), teacher=teacher, views=1, workers=0)
    summary = extract(config)
    assert (summary.rows, summary.skipped) == (2, 1)
    assert verify(str(tmp_path / "cache"), views="all", workers=0).ok


def test_an_empty_file_is_a_cut_tar(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(b"")
    assert (scan(path).samples, scan(path).cut) == ((), "empty file, expected a tar")


def test_a_damaged_header_in_the_middle_is_reported(tmp_path: Path) -> None:
    path = make_shard(tmp_path / "x.tar", num_samples=4)
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[4].offset
    data = bytearray(path.read_bytes())
    data[offset + 3] ^= 0x10
    path.write_bytes(data)
    index = scan(path)
    assert [sample.key for sample in index.samples] == ["s0000", "s0001"]
    assert index.cut is not None


@pytest.mark.parametrize("content", [b"hello", b"\x1f\x8b" + b"x" * 2000, b"x" * 5000])
def test_a_file_that_is_no_tar_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(ShardError, match=r"shard x: .* not an uncompressed tar"):
        scan(path)


def test_a_missing_or_unreadable_tar_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"shard x: .*No such file"):
        scan(tmp_path / "x.tar")
    with pytest.raises(ShardError, match=r"Is a directory"):
        scan(tmp_path)


def test_a_duplicate_key_names_both_members(tmp_path: Path) -> None:
    again = write_tar(tmp_path / "again.tar", [*sample_members("a", 0), *sample_members("b", 1), *sample_members("a", 2)])
    with pytest.raises(ShardError, match=r"key 'a' appears twice: member 'a.jpg' at byte 0 and member 'a.jpg' at byte \d{4}"):
        scan(again)
    within = write_tar(tmp_path / "within.tar", [("a.jpg", b"1"), ("a.JPG", b"2")])
    with pytest.raises(ShardError, match=r"member 'a.jpg' at byte 0 and member 'a.JPG' at byte"):
        scan(within)
    apart = write_tar(tmp_path / "apart.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"3")])
    with pytest.raises(ShardError, match=r"expected the members of a sample next to each other"):
        scan(apart)


@pytest.mark.parametrize(
    ("extension", "content"),
    [
        ("cls", b"-1"),
        ("cls", b"cat"),
        ("cls", b""),
        ("cls", b"1.5"),
        ("cls", b"1_0"),
        ("cls", b"+4"),
        ("cls", "٣".encode()),
        ("cls", b"1 2"),
        ("cls", b"99999999999"),
        ("cls", b"1" * 5000),
        ("json", b"{"),
        ("json", b'{"label": "3"}'),
        ("json", b'{"label": true}'),
        ("json", b'{"label": 1.0}'),
        ("json", b"[" * 100_000),
        ("json", b"\xff"),
    ],
)
def test_a_bad_label_is_an_error_with_shard_and_key(tmp_path: Path, extension: str, content: bytes) -> None:
    path = write_tar(tmp_path / "x.tar", [("k.jpg", b"1"), (f"k.{extension}", content)])
    with pytest.raises(ShardError, match=rf"shard x: key 'k': .*k.{extension}"):
        scan(path)


def test_the_member_table_notices_replaced_members(tmp_path: Path) -> None:
    members = sample_members("a", 0) + sample_members("b", 1)
    table = scan(write_tar(tmp_path / "x.tar", members)).member_table
    assert scan(write_tar(tmp_path / "moved" / "y.tar", members)).member_table == table
    assert scan(write_tar(tmp_path / "x.tar", members[2:] + members[:2])).member_table != table
    assert scan(write_tar(tmp_path / "x.tar", [("c.jpg", members[0][1]), *members[1:]])).member_table != table
    assert scan(write_tar(tmp_path / "x.tar", [(members[0][0], members[0][1] + b"0"), *members[1:]])).member_table != table


def test_reading_past_the_end_names_shard_and_key(tmp_path: Path) -> None:
    path = make_shard(tmp_path / "x.tar", num_samples=1)
    source = ShardSource(name="x", path=str(path))
    with pytest.raises(ShardError, match=r"shard x: key 'k': expected 10 bytes at 999999"):
        ShardFiles().read(source, "k", 999_999, 10)
    with pytest.raises(ShardError, match=r"--data"):
        ShardFiles().read(ShardSource(name="y", path=str(tmp_path / "y.tar")), "k", 0, 1)


def test_open_files_are_bounded(tmp_path: Path) -> None:
    sources = [ShardSource(name=path.stem, path=str(path)) for path in make_shards(tmp_path, num_shards=5, num_samples=1)]
    files = ShardFiles(capacity=2)
    first = [files.read(source, "k", 0, 10) for source in sources]
    assert [files.read(source, "k", 0, 10) for source in reversed(sources)] == first[::-1]
    assert len(files._files) == 2
