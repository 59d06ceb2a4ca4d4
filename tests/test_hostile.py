"""A cache, checkpoint, policy or tar from a stranger: a KDCacheError that says why, and no code run, no path outside, no hang, no memory without bound.

The fuzzing runs in a process of its own whose memory is limited, and that ends at whatever a cache must never cause.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import Forked, image_bytes, make_image, make_shard, write_tar
from hostile import VALUES, change_something, nested, resign, use_everything
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache import open_cache
from kdcache.checkpoint import load_checkpoint, save_checkpoint
from kdcache.console import harmless
from kdcache.errors import CorruptError, KDCacheError, ShardError, TeacherError
from kdcache.images import UnreadableImageError, decode_image
from kdcache.policy_file import load_policy
from kdcache.shards import ShardSource, scan_shard
from kdcache.sources import resolve_shards
from kdcache.tail import Tail, load_tail
from kdcache.targets import canonical_encoding, parse_target
from kdcache.timm_models import load_weights
from pipelines.copy import CopyConfig, copy
from pipelines.sweep import read_sweep
from pipelines.verify import verify

FIXTURE = Path(__file__).parent / "fixtures" / "format-v1"
MEMORY = 1 << 30
"""What reading a cache of 100 kB may take beyond what the process has already."""
CASES = 80


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of the fixture: every kind of file, every encoding."""
    folder = tmp_path_factory.mktemp("hostile") / "cache"
    copy(CopyConfig(cache=str(FIXTURE), dest=str(folder), limit_shards=1, views=1))
    return folder


@pytest.fixture
def cache(small: Path, tmp_path: Path) -> Path:
    shutil.copytree(small, tmp_path / "cache")
    return tmp_path / "cache"


@contextlib.contextmanager
def only_errors_of_ours(word: str = "") -> Iterator[None]:
    """What happens within ends well, or in a KDCacheError that says where."""
    try:
        yield
    except KDCacheError as error:
        if word not in str(error):
            raise AssertionError(f"{word!r} is not in the message: {error}") from error


def watched(action: Callable[[], None], log: Path, *, writes_below: Path) -> None:
    """Run it in a fork with little memory, that fails for a process or connection begun and a file opened for writing elsewhere."""

    def forbid(event: str, details: tuple[Any, ...]) -> None:
        is_write = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn") or (
            is_write and isinstance(details[0], str) and not details[0].startswith((str(writes_below), "/dev/"))
        ):
            print("FORBIDDEN", event, details[:2], flush=True)  # noqa: T201 - into the log
            os._exit(99)

    def run() -> None:
        with open("/proc/self/statm", encoding="ascii") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
        sys.addaudithook(forbid)
        action()

    process = Forked(run, log)
    assert process.wait(240) == 0, process.output()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of statistics of numbers without sense
@pytest.mark.parametrize("seeds", [range(start, start + CASES // 4) for start in range(0, CASES, CASES // 4)], ids=str)
def test_a_changed_cache_whose_digests_are_right_gives_values_or_an_error_of_ours(small: Path, tmp_path: Path, seeds: range) -> None:
    """One change at a time, of documents, arrays, chunks, index and tensors; then all that inspect, verify and train read of it."""

    def fuzz() -> None:
        refused = 0
        for seed in seeds:
            work = tmp_path / "work"
            shutil.copytree(small, work)
            done = change_something(work, random.Random(seed))
            signal.alarm(60)  # ends the process: a hang
            try:
                refused += not use_everything(work)
            except Exception as error:
                raise AssertionError(f"seed {seed}: {done}") from error
            signal.alarm(0)
            shutil.rmtree(work)
        assert len(seeds) // 4 < refused < len(seeds), refused  # else the changes change nothing, or the digests are not right

    use_everything(small)  # what is imported and warmed up counts for nothing
    watched(fuzz, tmp_path / "log", writes_below=tmp_path)


def test_what_the_forger_signs_again_is_sound(cache: Path) -> None:
    """Else the digests would stop the fuzz, and it would prove nothing."""
    before = open_cache(cache).root
    resign(cache)
    assert use_everything(cache) and open_cache(cache).root == before
    path = next(iter(cache.glob("teachers/vit/targets/*norm.calibration.safetensors")))
    tensors = safetensors.torch.load(path.read_bytes())
    path.write_bytes(safetensors.torch.save({**tensors, "grid_mean": tensors["grid_mean"] + 1}))
    with pytest.raises(CorruptError):
        open_cache(cache)
    resign(cache)
    assert use_everything(cache) and open_cache(cache).root != before


# --- what the tail may ask timm for ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "hf-hub:evil/model"}, "nothing is fetched or loaded"),
        ({"model": "local-dir:/etc"}, "nothing is fetched or loaded"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "'checkpoint_path'"),
        ({"model_args": {"pretrained": True}}, "'pretrained'"),
        ({"model_args": {"pretrained_cfg": {"url": "http://localhost/x.pth", "custom_load": True}}}, "'pretrained_cfg'"),
        ({"model_args": {"pretrained_cfg_overlay": {"file": "/etc/passwd"}}}, "'pretrained_cfg_overlay'"),
        ({"model_args": {"features_only": True}}, "'features_only'"),
        ({"model_args": {"depth": 1_200}}, "more than 2000 modules"),
        ({"model_args": {"depth": 10**9}}, "at most 65536"),
        ({"model_args": {"norm_layer": "os.system"}}, "can't be built"),
        ({"model_args": {"patch_size": 0}}, "can't be built"),
        ({"modules": ["blocks.2", "blocks.3", "norm", "x"]}, "tail"),
        ({"grid": [4096, 4096]}, "more than a tail takes"),
        ({"layout": "NCHW"}, "can't be run"),
        ({"arguments": {"blocks.2": {"x": "argument.7"}}}, "can't be run"),
    ],
)
def test_a_tail_gets_nothing_but_an_architecture_of_timm(cache: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers import reseal

    path = cache / "teachers" / "vit" / "tail.json"
    body = json.loads(path.read_bytes())
    if "model_args" in changes:
        changes = {"model_args": body["identity"]["model_args"] | changes["model_args"]}
    body["identity"] |= changes
    path.write_bytes(reseal(body, identity=True))
    resign(cache)
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr("kdcache.timm_models.MAX_MODULES", 2_000)  # it takes 8 s to count to the real one

    def load() -> Tail:
        opened = open_cache(cache)
        return load_tail(opened.store, opened.layer("vit"))

    with pytest.raises((TeacherError, CorruptError), match=message):
        load()


# --- paths, links and pipes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", ["cache.json", "views/*.json", "index/*.json", "teachers/vit/tail.safetensors", "teachers/vit/*.zarr/logits/codes/c/0/0/0"]
)
def test_a_pipe_or_a_device_in_place_of_a_file_is_an_error_and_no_wait(cache: Path, pattern: str) -> None:
    path = next(iter(cache.glob(pattern)))
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        path.unlink()
        make(path)
        assert not use_everything(cache) if pattern != "cache.json" else not path.is_file()
        if pattern != "cache.json":
            assert not verify(str(cache)).ok


def test_a_remembered_tar_that_is_a_pipe_is_an_error_and_no_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train-0000.tar")
    with pytest.raises(ShardError, match="no file"):
        scan_shard(ShardSource("train-0000", str(tmp_path / "train-0000.tar")))


def test_a_document_in_another_s_place_is_refused(cache: Path) -> None:
    """Or two records of one segment would both be heard."""
    path = next(iter(cache.glob("views/*.json")))
    shutil.copy(path, path.with_name("train-0000.0123456789ab.json"))
    with pytest.raises(CorruptError, match="what it describes belongs at 'views/train-0000"):
        open_cache(cache)
    assert {problem.kind for problem in verify(str(cache)).problems} >= {"plan"}


def test_names_in_a_message_command_no_terminal() -> None:
    assert harmless("a\x1b]0;b\x07\x9b2J\u202e\ud800é\n\t") == "a\\x1b]0;b\\x07\\x9b2J\\u202e\\ud800é\n\t"


# --- policies, targets, lists ----------------------------------------------------------------------------------------

SNIPPETS = ["base: strong\n", "crop: {kind: center}\n", "hflip: 0.5\n", "mix: {prob: 1, mixup_alpha: .nan}\n", "&a [*a]\n", "a: &b {c: *b}\n", "<<: {x: 1}\n",
            "!!python/object/apply:os.system [x]\n", "!!python/name:os.system\n", "!!binary x\n", "!!set {a, b}\n", "!!timestamp 9999-99-99\n", "? [a, b]\n: c\n",
            "hflip: 0x" + "f" * 20_000 + "\n", "hflip: " + "1:" * 9000 + "1\n", "hflip: " + "9" * 5000 + "\n", "hflip: 1e999\n", "hflip: -.inf\n", "[" * 3000, "{a: " * 3000,
            "- " * 3000, "".join(f"k{i}: 1\n" for i in range(6000)), "%YAML 9.9\n---\n", "\0", "\ufeff", "a: !!int '" + "7" * 5000 + "'\n", "erase: [1, 2]\n"]  # fmt: skip


@given(st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=30), min_size=1, max_size=4).map("".join))
@settings(max_examples=150)
def test_any_policy_file_is_a_policy_or_an_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "policy.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with only_errors_of_ours(str(path)):
        load_policy(path)


SWEEP_SNIPPETS = [
    "base: {lr: 1}\n", "grid: {student: [a]}\n", "runs: [{method: kd}]\n", "runs: [{settings: {? !!binary aGk= : 1}}]\n", "runs: [{grid: null}]\n",
    "grid: {model_kwargs.x: [!!binary aGk=]}\n", "grid: {set.temperature: [.nan, 1e999]}\n", "grid: {'a, b': [[1, 2]]}\n", "grid: {', ': [[1, 2]]}\n",
    "base: {teacher: {a: .nan}}\n",
]  # fmt: skip


@given(st.lists(st.sampled_from(SWEEP_SNIPPETS) | st.sampled_from(SNIPPETS) | st.text(max_size=30), min_size=1, max_size=4).map("".join))
@settings(max_examples=150)
def test_any_sweep_file_is_a_sweep_or_an_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "sweep.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with only_errors_of_ours(str(path)):
        read_sweep(str(path), cache="c")


@pytest.mark.parametrize("text", SNIPPETS, ids=range(len(SNIPPETS)))
def test_every_odd_policy_file_is_read_soon(tmp_path: Path, text: str) -> None:
    signal.alarm(20)
    (tmp_path / "p.yaml").write_text(text)
    with only_errors_of_ours("p.yaml"):
        load_policy(tmp_path / "p.yaml")
    signal.alarm(0)


@given(
    st.text()
    | st.sampled_from(
        ["logits:topk=" + "9" * 5000, "features@x:klt=1e999", "features@a:klt=" + "1" * 100_000, "logits:topk=-1", "logits,views=" + "9" * 5000]
    )
)
def test_any_target_is_a_spec_or_an_error(text: str) -> None:
    canonical_encoding(text)
    with only_errors_of_ours():
        parse_target(text)


@pytest.mark.parametrize(
    "value",
    [*VALUES, {"splits": {"train": {"filenames": ["/dev/zero", "../../x.tar"], "shard_lengths": [10**30, -1]}}}, {"splits": {"a": nested(900)}}],
)
def test_any_info_file_is_an_error_or_a_list(tmp_path: Path, value: Any) -> None:
    make_shard(tmp_path / "train-0000.tar", num_samples=1)
    for body in (value, {"splits": value}, {"splits": {"train": value}}, {"splits": {"train": {"filenames": value}}},
                 {"splits": {"train": {"filenames": ["train-0000.tar"], "shard_lengths": value, "alt_label": value}}}):  # fmt: skip
        (tmp_path / "_info.json").write_text(json.dumps(body))
        with only_errors_of_ours(str(tmp_path)):
            resolve_shards(str(tmp_path))


# --- tars and images -------------------------------------------------------------------------------------------------


def header(size: bytes = b"00000000005\0", kind: bytes = b"0", name: bytes = b"a.jpg", prefix: bytes = b"") -> bytes:
    """A ustar header whose checksum holds, whatever it says."""
    body = bytearray(name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0") + b"00000000000\0" + b" " * 8 + kind)
    body = body.ljust(257, b"\0") + b"ustar\x0000" + b"\0" * 80 + prefix.ljust(155, b"\0") + b"\0" * 12
    body[148:156] = f"{sum(body):06o}\0 ".encode()
    return bytes(body)


def pax(text: bytes, kind: bytes = b"x") -> bytes:
    return header(f"{len(text):011o}\0".encode(), kind, b"p") + text.ljust(-(-len(text) // 512) * 512, b"\0")


NEGATIVE = b"\xff" * 10 + b"\xfe\x00"
HUGE = b"\x80" + b"\x7f" * 11
TARS = [
    header(NEGATIVE), header(HUGE), header(NEGATIVE, b"5"), header(NEGATIVE, b"x"), header(HUGE, b"x"), header(HUGE, b"L"), header(HUGE, b"g"), header(NEGATIVE, b"L"),
    b"".join(pax(b"30 mtime=1234567890.123456789\n") for _ in range(3000)), pax(b"20 size=-5000000000\n") + header(), pax(b"25 size=99999999999999999\n") + header(),
    pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n28 GNU.sparse.realsize=9999\n") + header(b"99999999999\0"), pax(b"999999999999 a=b\n") + header(),
    pax(b"0 a=b\n") + header(), pax(b"-5 a=b\n") + header(), pax(b"11 path=\xff\n") + header(), pax(b"12 path=a\0b\n") + header(), header(kind=b"S"), header(kind=b"1"),
    header(kind=b"3"), header(kind=b"6"), header(kind=b"\xff"), header(name=b"../../../x.jpg"), header(name=b"/etc/passwd.jpg"), header(name=b"\0"),
    header(size=b"-0000000001\0"), header(size=b"9999999999x\0"), b"".join(header(kind=b"L", size=b"00000000001\0") + b"a".ljust(512, b"\0") for _ in range(3000)),
]  # fmt: skip


def scan(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with only_errors_of_ours("train-0000"):
        index = scan_shard(ShardSource("train-0000", str(path)))
        assert all(sample.image_offset >= 0 and 0 <= sample.image_size <= len(data) for sample in index.samples)


def test_hostile_tar_headers_are_cuts_or_errors(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "x.tar", [("b.jpg", b"12345"), ("b.cls", b"1")]).read_bytes()

    def scan_all() -> None:
        for bad in TARS:
            for data in (bad, bad + whole, whole[:3072] + bad + whole, whole[:1024] + bad):
                signal.alarm(30)
                scan(tmp_path / "t.tar", data)
        signal.alarm(0)

    scan(tmp_path / "t.tar", whole)
    watched(scan_all, tmp_path / "log", writes_below=tmp_path)


@given(st.randoms(use_true_random=False))
@settings(max_examples=150)
def test_any_changed_tar_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, rng: random.Random) -> None:
    folder = tmp_path_factory.getbasetemp()
    data = bytearray(make_shard(folder / "f.tar", num_samples=2, size_wh=(8, 8)).read_bytes())
    for _ in range(rng.randrange(1, 5)):
        place = 512 * rng.randrange(len(data) // 512)
        data[place + rng.choice([0, 100, 124, 135, 156, 257, rng.randrange(512)])] = rng.choice([0, 0x2D, 0x31, 0x78, 0x80, 0xFF, rng.randrange(256)])
        data[place + 148 : place + 156] = b" " * 8
        data[place + 148 : place + 156] = f"{sum(data[place : place + 512]):06o}\0 ".encode()
    scan(folder / "f.tar", bytes(data))


@given(st.randoms(use_true_random=False), st.sampled_from(["jpg", "png", "webp"]))
@settings(max_examples=200)
def test_any_changed_image_is_decoded_or_skipped(rng: random.Random, extension: str) -> None:
    data = bytearray(image_bytes(make_image(1), extension))
    for _ in range(rng.randrange(1, 8)):
        data[rng.randrange(min(len(data), rng.choice([32, 200, len(data)])))] = rng.randrange(256)
    try:
        image = decode_image(bytes(data[: rng.randrange(1, len(data))] if rng.random() < 0.2 else data))
    except UnreadableImageError:
        return
    assert image.mode == "RGB"


# --- checkpoints and weights -----------------------------------------------------------------------------------------


class Bait:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.path.join(os.environ["BAIT"], "ran"),)


STATE = {
    "recipe": {},
    "epoch": 1,
    "method": {"w": torch.zeros(3)},
    "optimizer": {},
    "scheduler": {},
    "generators": {"cpu": torch.zeros(3)},
    "history": [],
    "seconds": 1.0,
    "step": 2,
    "sums": {},
    "epoch_seconds": 1.0,
}


def test_a_checkpoint_runs_no_code_and_unpacks_to_no_more_than_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAIT", str(tmp_path))
    path = tmp_path / "checkpoint.pt"
    torch.save({"format": "kdcache-checkpoint", "version": 1, "fingerprint": "f", **STATE, "history": Bait()}, path)
    with pytest.raises(CorruptError, match="can't be read as one"):
        load_checkpoint(path, fingerprint="f")
    path.write_bytes(pickle.dumps(Bait(), protocol=2))
    with pytest.raises(CorruptError):
        load_checkpoint(path, fingerprint="f")
    with pytest.raises(TeacherError):
        load_weights(path, error=TeacherError, role="teacher")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(200 << 20))
    with pytest.raises(CorruptError, match="is compressed"):
        load_checkpoint(path, fingerprint="f")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CorruptError, match="found no file"):
        load_checkpoint(path, fingerprint="f")
    assert not (tmp_path / "ran").exists()


@given(st.randoms(use_true_random=False))
@settings(max_examples=150)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch says so and goes on
def test_any_changed_checkpoint_is_refused_and_any_changed_weights_are_weights_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rng: random.Random
) -> None:
    """With the crc32 of its members made right again: what torch itself must bear."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.pt"
    save_checkpoint(path, STATE, fingerprint="f", root="r")
    with zipfile.ZipFile(path) as archive:
        members = {name: bytearray(archive.read(name)) for name in archive.namelist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    for _ in range(rng.randrange(1, 6)):
        members[pickled][rng.randrange(len(members[pickled]))] = rng.choice([0, 0x80, 0xFF, *b"(.0]}csRQKJMGNVXtbuhqr", rng.randrange(256)])
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, bytes(data))
    for read in (lambda: load_checkpoint(path, fingerprint="f"), lambda: load_weights(path, error=TeacherError, role="teacher")):
        with only_errors_of_ours(str(path)):
            read()


@pytest.mark.parametrize("field", ["recipe", "epoch", "method", "optimizer", "scheduler", "generators", "history", "seconds", "step", "sums"])
def test_a_checkpoint_with_a_field_of_another_type_is_refused(tmp_path: Path, field: str) -> None:
    save_checkpoint(tmp_path / "c.pt", STATE | {field: "x"}, fingerprint="f", root="r")
    with pytest.raises(CorruptError, match=field):
        load_checkpoint(tmp_path / "c.pt", fingerprint="f")
