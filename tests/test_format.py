"""Format v1, the JSON half: digests that never change, and no byte of a document that can change unnoticed."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kdcache.errors import CacheError, CorruptError, FormatVersionError, MismatchError, UsageError
from kdcache.format import (
    CacheIdentity,
    Component,
    DigestField,
    Group,
    Preprocessing,
    Skipped,
    TargetIdentity,
    TargetsIdentity,
    TeacherIdentity,
    ViewRange,
    ViewsIdentity,
    body_of,
    digest_of_files,
    digest_of_identity,
    digest_of_pixels,
    document_from_body,
    dump_document,
    parse_document,
    root_digest,
    seal_json,
)
from kdcache.paths import (
    calibration_path,
    check_teacher_name,
    name_on_disk,
    shard_of,
    tail_path,
    tail_weights_path,
    target_path,
    targets_record_path,
    teacher_of,
    teacher_path,
    views_record_path,
)
from kdcache.plan import POLICIES, FrozenModel, ViewPlan, blake2b_128, canonical_json, require_same

PLAN = ViewPlan(dataset="digits", policy=POLICIES["weak"], size=32, seed=5)
FILES = {"zarr.json": DigestField(size=7, digest="1" * 32), "labels/c/0": DigestField(size=9, digest="2" * 32)}
GROUP = Group(name="train-0000.abc.zarr", digest=digest_of_files(FILES), files=FILES)
VIEWS = ViewsIdentity(
    shard="train-0000",
    views=ViewRange(start=0, stop=2),
    plan=PLAN.fingerprint,
    member_table="3" * 32,
    samples=4,
    rows=3,
    skipped=(Skipped(key="é\udce9", index=2, reason="empty file"),),
    pixels_by_view=("4" * 32, "5" * 32),
    group=GROUP,
)
TEACHER = TeacherIdentity(
    model="vit_tiny_patch16_224",
    model_args={"img_size": [32, 32], "drop": 0.1, "act": None},
    weights="6" * 32,
    num_classes=10,
    preprocessing=Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), input_size=32),
    precision="bf16",
)
TARGET = TargetIdentity(
    name="features@norm",
    kind="features",
    node="norm",
    encoding="int8",
    channels=32,
    grid=(4, 4),
    prefix_tokens=0,
    components={"grid": Component(dtype="int8", shape=(16, 32)), "grid_scale": Component(dtype="float16", shape=(16,))},
    calibration=DigestField(size=300, digest="7" * 32),
)
TARGETS = TargetsIdentity(
    shard="train-0000",
    views=ViewRange(start=0, stop=2),
    targets={"features@norm": digest_of_identity(TARGET)},
    teacher=digest_of_identity(TEACHER),
    member_table="3" * 32,
    samples=4,
    rows=3,
    pixels=digest_of_pixels({0: "4" * 32, 1: "5" * 32}),
    group=GROUP,
)
IDENTITIES: list[FrozenModel] = [CacheIdentity(plan=PLAN), VIEWS, TEACHER, TARGET, TARGETS]
GOLDEN_DIGESTS = [
    "540b5bbd3497e5cd9f5e6f816e8e2528",
    "fc14f1122f8dee155f086e7ed1ca8c9d",
    "be06c62954910c54f8feb7ae4c461857",
    "82829ceae3341e2ad942ed3fcd4d1a93",
    "00355c1a0ff9f1a62094ee9c03d06d8d",
]
GOLDEN_ROOT = "15af5cd7315c4f61568e15868f2c0b1d"


def root() -> str:
    cache, views, teacher, target, targets = map(digest_of_identity, IDENTITIES)
    layer = {"teacher": teacher, "targets": {"features@norm": target}, "records": {"teachers/t/train-0000.x.json": targets}}
    return root_digest(cache=cache, views={"views/train-0000.x.json": views}, teachers={"t": layer})


def test_identity_digests_never_change() -> None:
    assert [digest_of_identity(identity) for identity in IDENTITIES] == GOLDEN_DIGESTS


def test_the_root_never_changes_for_equal_content() -> None:
    assert root() == GOLDEN_ROOT


def test_record_paths_never_change() -> None:
    assert views_record_path("train-0000", ViewRange(start=0, stop=8)) == "views/train-0000.dce6a50fe735.json"
    assert targets_record_path("t", "é 0", {"logits": "1" * 32}, ViewRange(start=0, stop=8)) == "teachers/t/%C3%A9%200.6507d2a0a757.json"


@pytest.mark.parametrize("identity", IDENTITIES, ids=lambda identity: type(identity).__name__)
def test_documents_survive_a_round_trip(identity: FrozenModel) -> None:
    data = dump_document(identity, measured={"kl_t1": 1e-5}, provenance={"host": "ä"})
    document = parse_document(data, type(identity), where="w")
    assert document.identity == identity
    assert (document.measured, document.provenance) == ({"kl_t1": 1e-5}, {"host": "ä"})
    assert document.identity_digest == digest_of_identity(identity)
    assert seal_json({**body_of(document), "file_digest": "0" * 32}) == data
    assert document_from_body(body_of(document), type(identity), where="w") == document


def test_provenance_and_measures_are_no_part_of_the_identity() -> None:
    documents = [parse_document(dump_document(TEACHER, provenance={"host": host}), TeacherIdentity, where="w") for host in ("a", "b")]
    assert documents[0].identity_digest == documents[1].identity_digest
    assert documents[0].file_digest != documents[1].file_digest


@pytest.mark.parametrize("identity", IDENTITIES, ids=lambda identity: type(identity).__name__)
def test_every_flipped_byte_of_a_document_is_refused(identity: FrozenModel) -> None:
    data = dump_document(identity, measured={"teacher_top1": 0.5}, provenance={"host": "a"})
    rng = random.Random(0)
    for place in range(len(data)):
        bad = bytearray(data)
        bad[place] ^= 1 << rng.randrange(8)
        with pytest.raises(CacheError):
            parse_document(bytes(bad), type(identity), where="w")


def test_a_cut_or_longer_document_is_refused() -> None:
    data = dump_document(VIEWS)
    for bad in (b"", data[:1], data[:-1], data[:-2], data + b" ", data + data, b" " + data, b"[]", b"null", b"\xff\xfe", b"{}"):
        with pytest.raises(CorruptError, match=r"views/x\.json"):
            parse_document(bad, ViewsIdentity, where="views/x.json")


def sealed(**changes: Any) -> bytes:
    """A views document with some of its body changed and its file digest made right again."""
    body = json.loads(dump_document(VIEWS)) | {"file_digest": "0" * 32} | changes
    return seal_json(body)


def test_a_later_version_is_refused_by_its_number() -> None:
    with pytest.raises(FormatVersionError, match=r"w: format version 2, this kdcache reads version 1; install"):
        parse_document(sealed(version=2), ViewsIdentity, where="w")
    with pytest.raises(FormatVersionError, match="version 2"):
        parse_document(b'{"format": "kdcache", "version": 2, "all_else": "may differ"}', ViewsIdentity, where="w")


@pytest.mark.parametrize("changes", [{"version": "1"}, {"version": True}, {"version": None}, {"format": "other"}])
def test_a_document_without_a_version_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptError, match="version number"):
        parse_document(sealed(**changes), ViewsIdentity, where="w")


def test_a_document_of_another_kind_is_refused() -> None:
    with pytest.raises(CorruptError, match="expected a document of kind 'views', found 'teacher'"):
        parse_document(dump_document(TEACHER), ViewsIdentity, where="w")


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        (None, "identity"),
        ([], "identity"),
        ({**VIEWS.to_json(), "colour": 1}, "colour"),
        ({**VIEWS.to_json(), "rows": 4}, r"rows 4 \+ skipped 1 is not samples 4"),
        ({**VIEWS.to_json(), "rows": -1}, "rows"),
        ({**VIEWS.to_json(), "views": {"start": 2, "stop": 2}}, "empty range"),
        ({**VIEWS.to_json(), "plan": "A" * 32}, "plan"),
        ({**VIEWS.to_json(), "pixels_by_view": ["4" * 32]}, "1 pixel digests for 2 views"),
    ],
)
def test_an_identity_that_does_not_fit_is_refused_with_its_field(identity: Any, message: str) -> None:
    with pytest.raises(CorruptError, match=rf"w: .*{message}"):
        parse_document(sealed(identity=identity), ViewsIdentity, where="w")


def test_an_identity_that_was_swapped_is_refused() -> None:
    with pytest.raises(CorruptError, match="identity_digest"):
        parse_document(sealed(identity={**VIEWS.to_json(), "shard": "train-0001"}), ViewsIdentity, where="w")


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", "./a", "a/.", "a\\b", "a\0b"])
def test_a_group_file_that_leaves_the_group_is_refused(path: str) -> None:
    group = {**GROUP.to_json(), "files": {path: FILES["zarr.json"].to_json()}}
    with pytest.raises(CorruptError, match="leaves the group"):
        parse_document(sealed(identity={**VIEWS.to_json(), "group": group}), ViewsIdentity, where="w")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "a\\b", "a\0b"])
def test_a_group_that_is_no_plain_name_is_refused(name: str) -> None:
    with pytest.raises(CorruptError, match="group"):
        parse_document(sealed(identity={**VIEWS.to_json(), "group": {**GROUP.to_json(), "name": name}}), ViewsIdentity, where="w")


@pytest.mark.parametrize("depth", [200, 500, 950, 3000, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [('{"a":', "}"), ("[", "]")])
def test_deep_nesting_is_a_corrupt_document(depth: int, opening: str, closing: str) -> None:
    nested = opening * depth + "1" + closing * depth
    identity = json.dumps({**TEACHER.to_json(), "model_args": {"x": "NESTED"}}).replace('"NESTED"', nested)
    text = f'{{\n "file_digest": "{"0" * 32}", "format": "kdcache", "version": 1, "kind": "teacher", "identity": {identity}, "measured": {{}}}}'
    data = text.replace("0" * 32, blake2b_128(text.encode()), 1).encode()
    with pytest.raises(CorruptError):
        parse_document(data, TeacherIdentity, where="w")


def test_a_nan_is_never_written() -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        dump_document(TEACHER, measured={"top1": float("nan")})


names = st.text(st.characters() | st.sampled_from("./\\%~ é:\0\udce9")).filter(bool)


@given(names, names)
@example(".", "%2E")
@example("..", "%2E.")
@example("a~", "a%7E")
@example("A", "a")
def test_names_on_disk_are_safe_and_tell_shards_apart(one: str, other: str) -> None:
    on_disk = name_on_disk(one)
    assert on_disk.isascii()
    assert not on_disk.startswith(".")
    assert all(c.isalnum() or c in "._-%" for c in on_disk)
    assert (on_disk == name_on_disk(other)) == (one == other)


@given(names)
def test_a_path_tells_its_shard_and_its_teacher(shard: str) -> None:
    views = ViewRange(start=0, stop=2)
    for record, teacher in ((views_record_path(shard, views), ""), (targets_record_path("vit", shard, {"logits": "0" * 32}, views), "vit")):
        group = record.removesuffix(".json") + ".0123456789ab.zarr"
        for path in (record, group, f"{group}/params/c/0/0/0"):
            assert (shard_of(path), teacher_of(path)) == (shard, teacher)
    for path in (
        teacher_path("vit"),
        tail_path("vit"),
        tail_weights_path("vit"),
        target_path("vit", "logits"),
        calibration_path("vit", "features@norm"),
    ):
        assert (shard_of(path), teacher_of(path)) == ("", "vit")
    for path in ("cache.json", "sources/0123456789ab.json", "index/index.0123456789ab.json", "index/table.0123456789ab.bin"):
        assert (shard_of(path), teacher_of(path)) == ("", "")


def test_plain_shard_names_stay_as_they_are() -> None:
    assert name_on_disk("imagenet1k-train-0000.v2_x") == "imagenet1k-train-0000.v2_x"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "-a", "é", "a" * 101, "a\n"])
def test_a_teacher_name_that_is_no_folder_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="pass --name"):
        check_teacher_name(name)
    assert check_teacher_name("vit-l.16_384") == "vit-l.16_384"


def test_a_difference_names_its_field_expected_and_found() -> None:
    other = PLAN.model_copy(update={"policy": POLICIES["weak"].model_copy(update={"hflip": 0.25})})
    with pytest.raises(MismatchError, match=r"view plan: field 'policy.hflip' differs: the cache has 0.5, this run has 0.25; choose") as error:
        require_same("view plan", PLAN, other, remedy="choose")
    assert (error.value.field, error.value.expected, error.value.found) == ("policy.hflip", 0.5, 0.25)
    require_same("view plan", PLAN, ViewPlan.model_validate(json.loads(canonical_json(PLAN.to_json()))), remedy="-")
