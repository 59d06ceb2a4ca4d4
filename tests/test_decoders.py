"""Decoders and resizers that a plan may name: Pillow's verdict on every image, arithmetic as FORMAT.md writes it, replay to the pixel, clear refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import TINY_VIT, image_bytes, make_image, make_teacher_dir, random_policies, reseal, run_python, write_tar
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import kdcache.teacher
import kdcache.views
import pipelines.verify
from cli.main import main
from kdcache.augment import Pixels
from kdcache.dataset import CachedDataset
from kdcache.draws import draw
from kdcache.errors import KDCacheError, MismatchError, UsageError
from kdcache.images import MAX_PIXELS, UnreadableImageError, decode_image, is_plain_jpeg, size_of
from kdcache.join import CachedViews
from kdcache.opening import open_cache
from kdcache.plan import POLICIES, MixedViews, Policy, ViewPlan
from kdcache.view_params import ViewParams
from kdcache.views import render, resize_torch
from pipelines.extract import ExtractConfig, extract
from pipelines.train import TrainConfig, train
from pipelines.verify import Recompute, verify

# --- decoding: what Pillow decides, whoever decodes ---


def jpeg_that_declares(width: int, height: int, *, bits: int = 8, frame: int = 0xC0) -> bytes:
    """A sound JPEG whose frame header was changed."""
    data = bytearray(image_bytes(make_image(0)))
    place = data.index(b"\xff\xc0")
    data[place + 1] = frame
    struct.pack_into(">BHH", data, place + 4, bits, height, width)
    return bytes(data)


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


PLAIN = {
    **{f"4:{s}": image_bytes(make_image(s), quality=90, subsampling=s) for s in (0, 1, 2)},
    "progressive": image_bytes(make_image(0), progressive=True),
    "grey": image_bytes(make_image(0, mode="L")),
    "kept RGB": image_bytes(make_image(0), keep_rgb=True),
    "EXIF": image_bytes(make_image(0), exif=rotated()),
    "damaged EXIF": image_bytes(make_image(0), exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xff" * 40),
    "restarts and a comment": image_bytes(make_image(0), restart_marker_blocks=1, comment=b"\xff\xd9" * 9),
    "more behind it": image_bytes(make_image(0)) + b"\xff\xd8 more",
    "one pixel": image_bytes(make_image(0, (1, 1))),
    "a line": image_bytes(make_image(0, (900, 3))),
}
OTHER = {
    "CMYK": image_bytes(make_image(0, mode="CMYK")),
    "PNG": image_bytes(make_image(0), "png"),
    "WebP": image_bytes(make_image(0), "webp"),
    "palette": image_bytes(make_image(0).quantize(16), "png", transparency=3),
    "16 bits": image_bytes(Image.fromarray(np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)), "png"),
    "bomb": jpeg_that_declares(20_000, 20_000),
    "12 bits": jpeg_that_declares(40, 30, bits=12),
    "arithmetic codes": jpeg_that_declares(40, 30, frame=0xC9),
    "no pixels": jpeg_that_declares(0, 30),
    "no frame": image_bytes(make_image(0))[:60],
    "filled": image_bytes(make_image(0))[:2] + b"\xff" + image_bytes(make_image(0))[2:],
    "nothing": b"",
    "two bytes": b"\xff\xd8",
    "text": b"<html>404 Not Found</html>",
}


def outcome(data: bytes, decoder: Any) -> tuple[str, bytes]:
    """Size and pixels, or the reason of the skip."""
    try:
        image = decode_image(data, decoder)
    except UnreadableImageError as error:
        return error.reason, b""
    return str(size_of(image)), np.asarray(image).tobytes()


@pytest.mark.parametrize("kind", [*PLAIN, *OTHER])
def test_a_decoder_gives_pillows_pixels_or_leaves_the_image_to_pillow(kind: str) -> None:
    data = {**PLAIN, **OTHER}[kind]
    assert outcome(data, "simplejpeg") == outcome(data, "pillow")
    assert is_plain_jpeg(data) == (kind in PLAIN)
    if kind in PLAIN:
        assert isinstance(decode_image(data, "simplejpeg"), np.ndarray), "not decoded by simplejpeg"


def test_the_limit_of_a_bomb_is_pillows() -> None:
    at_the_limit, above = (MAX_PIXELS // 9_000, 9_000), (MAX_PIXELS // 9_000 + 1, 9_000)
    assert is_plain_jpeg(jpeg_that_declares(*at_the_limit))
    assert not is_plain_jpeg(jpeg_that_declares(*above))
    assert outcome(jpeg_that_declares(*above), "simplejpeg")[0] == "decompression bomb"


@given(
    st.sampled_from([PLAIN["4:2"], PLAIN["progressive"], PLAIN["grey"], PLAIN["restarts and a comment"], OTHER["CMYK"]]),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), max_size=3),
    st.integers(0, 10_000),
)
def test_damaged_and_truncated_images_have_the_same_fate_with_every_decoder(data: bytes, flips: list[tuple[int, int]], cut: int) -> None:
    damaged = bytearray(data)
    for place, value in flips:
        damaged[place % len(damaged)] ^= value
    damaged = damaged[: len(damaged) - (cut % len(damaged) if cut % 3 else 0)]
    assert outcome(bytes(damaged), "simplejpeg") == outcome(bytes(damaged), "pillow")


@pytest.mark.parametrize("missing", [1, 2, 3, 40])
def test_a_truncated_jpeg_is_skipped_though_all_but_its_end_is_there(missing: int) -> None:
    for kind in ("4:2", "progressive", "grey"):
        assert outcome(PLAIN[kind][:-missing], "simplejpeg") == ("damaged image", b"")


# --- resizing: FORMAT.md §3, in NumPy ---


def weights(source: int, size: int, *, cubic: bool) -> tuple[int, list[tuple[int, np.ndarray[Any, np.dtype[np.int64]]]]]:
    """Fractional bits, and of each pixel of a line its first source pixel and whole-numbered weights."""

    def kernel(x: float) -> float:
        x = abs(x)
        if not cubic:
            return max(0.0, 1 - x)
        return (1.5 * x - 2.5) * x * x + 1 if x < 1 else (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0

    scale = source / size
    stretch = max(scale, 1.0)
    reach = (2 if cubic else 1) * stretch
    lines = []
    for i in range(size):
        centre = scale * (i + 0.5)
        first, end = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), source)
        values = [kernel((j - centre + 0.5) / stretch) for j in range(first, end)]
        lines.append((first, [value / sum(values) for value in values]))
    largest = max(max(values) for _, values in lines)
    bits = next(bits for bits in range(23) if bits == 22 or int(0.5 + largest * 2 ** (bits + 1)) >= 2**15)
    return bits, [(first, np.array([int(value * 2**bits + (0.5 if value >= 0 else -0.5)) for value in values])) for first, values in lines]


def resize_lines(image_HW3: Pixels, size: int, *, cubic: bool) -> Pixels:
    if image_HW3.shape[1] == size:
        return image_HW3
    bits, lines = weights(image_HW3.shape[1], size, cubic=cubic)
    sums = [(image_HW3[:, first : first + len(line)].astype(np.int64) * line[:, None]).sum(1) for first, line in lines]
    return (np.stack(sums, axis=1) + (1 << bits - 1) >> bits).clip(0, 255).astype(np.uint8)


sides = st.sampled_from([1, 2, 3, 31, 32, 33]) | st.integers(1, 200)


@given(sides, sides, st.sampled_from([1, 7, 32]), st.booleans(), st.integers(0, 2**32))
def test_torchs_resize_is_the_arithmetic_that_the_format_writes_down(height: int, width: int, size: int, cubic: bool, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height + 3, width + 2, 3), dtype=np.uint8)[2:-1, 1:-1]  # a crop: not contiguous
    across = resize_lines(image, size, cubic=cubic)
    expected = resize_lines(across.transpose(1, 0, 2), size, cubic=cubic).transpose(1, 0, 2)
    assert np.array_equal(resize_torch(image, size, Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR), expected)


def plan_of(policy: Policy, **fields: Any) -> ViewPlan:
    return ViewPlan(dataset="d", policy=policy, size=32, **fields)


VIEWS = """
import hashlib, sys
from pathlib import Path

import torch

from kdcache.images import decode_image, size_of
from kdcache.plan import POLICIES, ViewPlan
from kdcache.draws import draw
from kdcache.views import render

def digest_of_views(folder):
    digest = hashlib.blake2b(digest_size=8)
    for interpolation in ("bilinear", "bicubic"):
        policy = POLICIES["weak"].model_copy(update={"interpolation": interpolation})
        plan = ViewPlan(dataset="d", policy=policy, size=64, decoder="simplejpeg", resizer="torch")
        for path in sorted(Path(folder).iterdir()):
            image = decode_image(path.read_bytes(), plan.decoder)
            for view in range(4):
                digest.update(render(image, draw(plan, "s", path.name, view, size_of(image))))
    return digest.hexdigest()
"""
ELSEWHERE = """
torch.set_num_threads(4)
print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), digest_of_views(sys.argv[1]))
"""


def test_views_are_the_same_with_any_vector_instructions_and_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, data in enumerate([*PLAIN.values(), *photographs(3, side=300)]):
        (tmp_path / f"{i:02d}").write_bytes(data)
    here: dict[str, Any] = {}
    exec(VIEWS, here)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")  # torch's kernels without AVX
    monkeypatch.setenv("JSIMD_FORCENONE", "1")  # libjpeg-turbo's without vector instructions
    assert run_python(VIEWS + ELSEWHERE, tmp_path).stdout.split() == ["DEFAULT", "4", here["digest_of_views"](tmp_path)]


# --- views: drawn, rendered, replayed ---


def photographs(count: int, *, side: int = 120) -> list[bytes]:
    """JPEGs of parts of scikit-learn's two photographs, of all kinds of subsampling, some progressive."""
    from sklearn.datasets import load_sample_images

    files = []
    for i in range(count):
        photo = Image.fromarray(load_sample_images().images[i % 2])
        left, top = 97 * i % (photo.width - 300), 61 * i % (photo.height - 240)
        part = photo.crop((left, top, left + 300, top + 240)).resize((side, side * 3 // 4 + i))
        files.append(image_bytes(part, quality=80 + i, subsampling=i % 3, progressive=i % 4 == 3))
    return files


@given(
    random_policies, st.sampled_from(["pillow", "simplejpeg"]), st.sampled_from(["pillow", "torch"]), st.integers(0, 2**63 - 1), st.integers(0, 99)
)
def test_a_stored_row_renders_the_view_of_its_draw(policy: Policy, decoder: Any, resizer: Any, seed: int, view: int) -> None:
    plan = plan_of(policy, seed=seed, decoder=decoder, resizer=resizer)
    data = image_bytes(make_image(seed % 89))
    drawn = draw(plan, "s", "k", view, size_of(decode_image(data, decoder)))
    read = ViewParams.from_row(drawn.to_row(), plan)
    assert read == drawn
    pixels = render(decode_image(data, decoder), drawn)
    assert np.array_equal(render(decode_image(data, decoder), read), pixels)
    assert pixels.flags.c_contiguous and pixels.flags.writeable
    by_pillow = render(decode_image(data), dataclasses.replace(drawn, resizer="pillow"))
    if resizer == "pillow":
        assert np.array_equal(pixels, by_pillow), "the decoders agree"
    elif not drawn.ops:
        assert np.abs(pixels.astype(int) - by_pillow).max() <= 3, "16-bit weights"


def test_plans_without_a_word_of_it_are_pillows_and_keep_their_fingerprints() -> None:
    plan = plan_of(POLICIES["weak"])
    assert (plan.decoder, plan.resizer) == ("pillow", "pillow")
    assert plan.fingerprint == "66316da8a67a841b1a3152a61dc1de76"
    others = {plan_of(POLICIES["weak"], decoder=d, resizer=r).fingerprint for d in ("pillow", "simplejpeg") for r in ("pillow", "torch")}
    assert len(others) == 4


MIXING = POLICIES["strong"].model_copy(update={"mix": MixedViews(prob=0.5, mixup_alpha=0.8, cutmix_alpha=1.0)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/ of photographs with a CMYK, a PNG and a truncated one among them, teacher/, and cache/ by simplejpeg and torch."""
    folder = tmp_path_factory.mktemp("decoders")
    files = photographs(12)
    files[2], files[4] = files[2][:-60], image_bytes(make_image(4, (100, 80), mode="CMYK"))
    for shard in range(2):
        members = [(f"k{i}.jpg", data) for i, data in enumerate(files) if i % 2 == shard]
        members += [("png.png", image_bytes(make_image(9, (70, 90)), "png"))]
        write_tar(folder / "shards" / f"train-{shard:04d}.tar", [m for name, data in members for m in ((name, data), (f"{name[:-4]}.cls", b"3"))])
    make_teacher_dir(folder / "teacher")
    run(folder / "cache", folder, decoder="simplejpeg", resizer="torch")
    return folder


def run(cache: Path, folder: Path, **options: Any) -> Any:
    defaults: dict[str, Any] = {"shards": str(folder / "shards"), "views": 3, "augment": MIXING, "workers": 0}
    return extract(ExtractConfig(cache=str(cache), teacher=f"local-dir:{folder / 'teacher'}", **{**defaults, **options}))


def train_on(cache: Path, out: Path) -> list[dict[str, Any]]:
    model: dict[str, Any] = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return train(
        TrainConfig(
            cache=str(cache), students=(TINY_VIT,), model_kwargs=model, method="kd", out=str(out), epochs=3, batch_size=4, workers=0,
            device="cpu", check_views=1.0,
        )
    )  # fmt: skip


def test_training_sees_to_the_pixel_what_the_teacher_saw_and_verify_finds_it_sound(folder: Path, tmp_path: Path) -> None:
    cache = open_cache(folder / "cache")
    assert {skip.key: skip.reason for views in cache.views.values() for skip in views[0].identity.skipped} == {"k2": "damaged image"}
    verdict = verify(str(folder / "cache"), views="all", recompute=Recompute(rows=2), workers=0)
    assert verdict.ok, verdict.problems
    assert train_on(folder / "cache", tmp_path)[0]["status"] == "done"
    dataset = CachedDataset(cache, "logits", check_views=1.0)
    assert np.array_equal(dataset[(1, 2)][0], cache.view("train-0000", cache.keys("train-0000")[1], 2))


@pytest.mark.parametrize(("decoder", "resizer"), [("simplejpeg", "pillow"), ("pillow", "torch")])
def test_decoder_and_resizer_are_chosen_apart(folder: Path, tmp_path: Path, decoder: str, resizer: str) -> None:
    run(tmp_path / "cache", folder, decoder=decoder, resizer=resizer)
    assert verify(str(tmp_path / "cache"), views="all", workers=0).ok
    cache, other = open_cache(tmp_path / "cache"), open_cache(folder / "cache")
    assert (cache.plan.decoder, cache.plan.resizer) == (decoder, resizer)
    shard = cache.shards[0]
    mine, theirs = (one.views_record(shard, 0).pixels_by_view for one in (cache, other))
    assert (mine == theirs) == (resizer == "torch"), "today's decoders agree on these, the resizers do not"


def test_workers_and_a_second_run_give_the_same_cache(folder: Path, tmp_path: Path) -> None:
    run(tmp_path / "cache", folder, decoder="simplejpeg", resizer="torch", views=2, workers=2)
    run(tmp_path / "cache", folder, workers=1)  # the third view; decoder and resizer are as the cache has them
    grown, whole = open_cache(tmp_path / "cache"), open_cache(folder / "cache")
    for shard in whole.shards:
        keys = whole.keys(shard)
        for view in range(3):
            assert (grown.read_pixel_digests(shard, view, range(len(keys))) == whole.read_pixel_digests(shard, view, range(len(keys)))).all()


# --- what is said ---


def test_inspect_and_records_name_decoder_and_resizer(folder: Path) -> None:
    text = CliRunner().invoke(main, ["inspect", str(folder / "cache"), "--rows", "0"]).output
    assert "decoder simplejpeg, resizer torch" in text
    record = open_cache(folder / "cache").views["train-0000"][0]
    assert {"pillow", "simplejpeg", "torch"} <= record.provenance["packages"].keys()


def test_another_decoder_or_resizer_than_the_caches_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(MismatchError, match="field 'resizer' differs: the cache has 'torch', this run has 'pillow'"):
        run(folder / "cache", folder, resizer="pillow")
    with pytest.raises(MismatchError, match="field 'decoder' differs: the cache has 'simplejpeg', this run has 'pillow'"):
        run(folder / "cache", folder, decoder="pillow")


@pytest.mark.parametrize("field", ["decoder", "resizer"])
def test_a_plan_with_a_later_decoder_is_refused_by_name(folder: Path, tmp_path: Path, field: str) -> None:
    shutil.copytree(folder / "cache", tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / "index")
    body = json.loads((tmp_path / "cache" / "cache.json").read_text())
    body["identity"]["plan"][field] = "later"
    (tmp_path / "cache" / "cache.json").write_bytes(reseal(body, identity=True))
    with pytest.raises(KDCacheError, match=f"plan.{field}.*'later'"):
        open_cache(tmp_path / "cache")


def test_drift_of_the_resizer_is_found_and_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kdcache.views, "resize_torch", kdcache.views.resize)
    problems = verify(str(folder / "cache"), views="all", workers=0).problems
    assert problems
    assert all(
        problem.detail.startswith("decoder drift") and "simplejpeg 1" in problem.detail and "torch 2" in problem.detail for problem in problems
    )
    assert "torch on uint8 renders what the teacher saw: pixels then and now differ by at most" in problems[0].detail


def test_a_decoder_that_is_not_installed_is_named_with_its_cure_before_anything_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "stored", folder, decoder="simplejpeg", resizer="torch", store_views="png")
    run(tmp_path / "unmixed", folder, decoder="simplejpeg", augment="weak", store_views="png", views=1)
    cure = r"decoder simplejpeg can't be loaded \(.*\); .*pip install 'kdcache\[fast\]'"
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(UsageError, match=cure):
        run(tmp_path / "new", folder, decoder="simplejpeg", resizer="torch")
    assert not (tmp_path / "new" / "cache.json").exists()
    with pytest.raises(UsageError, match=cure):
        run(folder / "cache", folder, views=4)
    with monkeypatch.context() as patch:
        patch.setattr(kdcache.teacher, "load_teacher", lambda *_, **__: pytest.fail("the teacher was loaded first"))
        with pytest.raises(UsageError, match=cure):
            run(tmp_path / "unmixed", folder, augment="weak", views=2)
    run(tmp_path / "unmixed", folder, augment="weak", targets=("logits", "features@norm"), views=1)  # of stored views
    with pytest.raises(UsageError, match=cure):
        CachedViews(open_cache(folder / "cache"))
    with pytest.raises(UsageError, match=cure):
        train_on(folder / "cache", tmp_path / "runs")
    for cache in (folder / "cache", tmp_path / "stored"):
        with pytest.raises(UsageError, match=cure):
            verify(str(cache), views=1, workers=0)
        assert verify(str(cache)).ok
    page = tmp_path / "page.html"
    result = CliRunner().invoke(main, ["inspect", str(folder / "cache"), "--html", str(page)])
    assert result.exit_code == 0, result.output
    assert "decoder simplejpeg is not installed" in page.read_text()
    arguments = ["train", str(folder / "cache"), "--student", TINY_VIT, "--method", "kd", "--out", str(tmp_path / "none")]
    assert CliRunner().invoke(main, arguments).exit_code == 2
    assert not (tmp_path / "none").exists()
    assert train_on(tmp_path / "stored", tmp_path / "runs")[0]["status"] == "done", "stored views need no decoder"


def test_of_stored_views_the_decoder_is_asked_for_only_where_images_will_be_decoded_and_before_anything_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "shards", tmp_path / "shards")
    more: dict[str, Any] = {"shards": str(tmp_path / "shards"), "targets": ("logits", "features@norm")}
    run(tmp_path / "cache", folder, decoder="simplejpeg", store_views="png", shards=more["shards"])
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    cure = "decoder simplejpeg can't be loaded"
    shutil.rmtree(tmp_path / "cache" / "index")
    assert run(tmp_path / "cache", folder, shards=more["shards"]).resumed_shards == 2, "nothing is lacking but the index"
    with monkeypatch.context() as patch:
        patch.setattr(kdcache.teacher, "load_teacher", lambda *_, **__: pytest.fail("the teacher was loaded first"))
        patch.setattr(pipelines.verify, "_check_files", lambda *_, **__: pytest.fail("files were read first"))
        with pytest.raises(UsageError, match=cure):
            run(tmp_path / "cache", folder, **more)  # the teacher's first views are unmixed, and rendered where there are tars
        with pytest.raises(UsageError, match=cure):
            run(tmp_path / "cache", folder, **{**more, "targets": ("logits,views=4",)})
        with pytest.raises(UsageError, match=cure):
            verify(str(tmp_path / "cache"), views=1, workers=0)
    assert verify(str(tmp_path / "cache"), recompute=Recompute(rows=1)).ok
    shutil.rmtree(tmp_path / "shards")
    assert verify(str(tmp_path / "cache"), views=1, workers=0).ok
    assert run(tmp_path / "cache", folder, **more).shards == 2
    assert train_on(tmp_path / "cache", tmp_path / "runs")[0]["status"] == "done"
