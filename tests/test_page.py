"""`inspect --html`: the page stands alone, shows hostile names as text, stays small, is the same each time, and says what it can't show."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CONTRAST, OUTSIDE, Browser, Parsed, browser
from click.testing import CliRunner
from helpers import image_bytes, make_cache, make_teacher_dir, write_tar
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cli.main import main
from kdcache.class_names import ClassNames
from kdcache.console import visible
from kdcache.errors import CorruptError, StoreError
from kdcache.opening import open_cache
from kdcache.plan import MixedViews, Policy, RandAugment, RandomErasing, RandomResizedCrop
from pipelines.extract import ExtractConfig, extract
from pipelines.facts import decode_rows
from pipelines.page import PageConfig, build_page, write_page
from pipelines.page.charts import cell_map, curve
from pipelines.page.features import TokenStatistics, energy_by_frequency, summarise_spectrum
from pipelines.page.logits import describe_logits
from pipelines.page.opening import open_for_page, series

HOSTILE = "a/\"><script>alert(1)</script><img src=x onerror=alert(2)>'&amp;\u202egnp"
HOSTILE_SHARD = "tr<b>ain\"'&\u2067-0000"
HOSTILE_CLASS = "</td><script>alert(3)</script>\u202e</script>"
HOSTILE_DATASET = "<svg onload=alert(4)>\u2066"
POLICY = Policy(
    crop=RandomResizedCrop(),
    hflip=0.5,
    rand_augment=RandAugment(),
    erase=RandomErasing(prob=0.5),
    mix=MixedViews(prob=0.5, mixup_alpha=0.8, cutmix_alpha=1.0),
)


def _noise_image(seed: int, size_wh: tuple[int, int]) -> Image.Image:
    """What no encoder makes small."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size_wh[1], size_wh[0], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a 224-px cache under `cache`: hostile names, mixing, stored views, two teachers, features and logits, incompressible images."""
    folder = tmp_path_factory.mktemp("page")
    names = [HOSTILE, *(f"s{i:02d}" for i in range(1, 14))]
    members = [
        member
        for i, name in enumerate(names)
        for member in ((f"{name}.jpg", image_bytes(_noise_image(i, (300, 240)), quality=90)), (f"{name}.cls", str(i % 10).encode()))
    ]
    tar = write_tar(folder / "shards" / f"{HOSTILE_SHARD}.tar", members)
    plan: dict[str, Any] = {
        "shards": str(tar),
        "cache": str(folder / "cache"),
        "augment": POLICY,
        "size": 224,
        "workers": 0,
        "dataset": HOSTILE_DATASET,
    }
    first = make_teacher_dir(folder / "teacher", img_size=224, patch_size=32)
    extract(
        ExtractConfig(**plan, teacher=first, name="one", targets=("logits", "features@norm", "features@blocks.0:dct"), views=4, store_views="jpeg95")
    )
    second = make_teacher_dir(folder / "second", img_size=224, patch_size=32, num_classes=1000, seed=1)
    extract(ExtractConfig(**plan, teacher=second, name="two", targets=("logits:topk=5",), views=2, store_views="jpeg95"))
    return folder


NAMES = ClassNames((HOSTILE_CLASS, *(f"class {i}" for i in range(1, 10))), "the test")


@pytest.fixture(scope="module")
def page(photos: Path) -> Path:
    write_page(str(photos / "cache"), str(photos / "page.html"), PageConfig(class_names=NAMES))
    return photos / "page.html"


def test_page_of_a_224_px_cache_is_below_two_megabytes_and_the_same_wherever_and_whenever_it_is_made(
    photos: Path, page: Path, tmp_path: Path
) -> None:
    assert 500_000 < page.stat().st_size < 2_000_000
    copy = shutil.copytree(photos / "cache", tmp_path / "elsewhere" / "cache")
    again, summary = build_page(str(copy), PageConfig(class_names=NAMES))
    assert summary.samples == 12 and summary.problems == ()
    assert again == page.read_bytes() and str(photos).encode() not in again
    few = [build_page(str(copy), PageConfig(samples=2, seed=seed))[0] for seed in (0, 1)]
    assert few[0] != few[1]


def test_page_loads_nothing_and_runs_only_its_own_script(page: Path) -> None:
    parsed = Parsed(page.read_bytes())
    tags = [tag for tag, _ in parsed.elements]
    assert tags.count("script") == tags.count("style") == 1 and not {"iframe", "object", "embed", "base"} & {*tags}
    (policy,) = (attrs["content"] for tag, attrs in parsed.elements if attrs.get("http-equiv") == "Content-Security-Policy")
    hashes = {kind: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for kind, text in parsed.texts if kind in ("style", "script")}
    assert policy is not None and policy.split("; ") == [
        "default-src 'none'",
        "img-src data:",
        f"style-src 'sha256-{hashes['style']}'",
        f"script-src 'sha256-{hashes['script']}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert [attrs.get("http-equiv") is not None for tag, attrs in parsed.elements if tag in ("meta", "style", "script", "img")].index(True) == 1
    for tag, attrs in parsed.elements:
        assert not [name for name in attrs if name.startswith("on") or name in ("style", "srcset", "action", "formaction", "srcdoc", "ping")], (
            tag,
            attrs,
        )
        for name in ("src", "href", "xlink:href"):
            assert (attrs.get(name) or "#").startswith(("data:", "#")), (tag, attrs)
    assert not re.search(r"https?://|url\((?!#)|@import", page.read_text())


def test_hostile_names_are_shown_as_text(photos: Path) -> None:
    page, _ = build_page(str(photos / "cache"), PageConfig(class_names=NAMES, shard=HOSTILE_SHARD, key=HOSTILE))
    parsed = Parsed(page)
    for name in (HOSTILE, HOSTILE_SHARD, HOSTILE_CLASS, HOSTILE_DATASET):
        assert visible(name) in parsed.text() and "\\u20" in visible(name)
    assert not set("\u202e\u2066\u2067") & set(page.decode("utf-8"))
    (names,) = (attrs["data-names"] for _, attrs in parsed.elements if "data-names" in attrs)
    assert names is not None and json.loads(names) == series([HOSTILE_SHARD])


def test_views_opinions_and_partners_are_those_of_the_cache(photos: Path) -> None:
    parsed = Parsed(build_page(str(photos / "cache"), PageConfig(class_names=NAMES, shard=HOSTILE_SHARD, key="s03"))[0])
    cache = open_cache(photos / "cache")
    (digests,) = zip(*(cache.read_pixel_digests(HOSTILE_SHARD, view, [3]) for view in range(4)), strict=True)
    text = parsed.text()
    for view, digest in enumerate(digests):
        read = cache.read(HOSTILE_SHARD, "s03", view, "one")
        p = np.exp(read["logits"] - read["logits"].max())
        p /= p.sum()
        assert f"{int(digest):016x}" in text
        assert f"{-(p * np.log(p)).sum():.2f} nats" in text
        if read["params"].mix is not None:
            partner = cache.keys(HOSTILE_SHARD)[read["params"].mix.partner]
            assert f"mixed with {visible(partner)}" in text


def test_colours_follow_the_leading_components_whatever_the_scale_of_a_channel() -> None:
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(400, 3)) * (3, 2, 1)
    tokens = factors @ np.linalg.qr(rng.normal(size=(12, 3)))[0].T + 0.01 * rng.normal(size=(400, 12))
    outlying = tokens * np.where(np.arange(12) == 5, 1000, 1) + np.where(np.arange(12) == 5, 1e5, 0)
    bases = []
    for values in (tokens, outlying):
        statistics = TokenStatistics()
        for part in np.split(values, 4):
            statistics.add(part, None)
        np.testing.assert_allclose(statistics.mean, values.mean(axis=0), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(statistics.std, values.std(axis=0), rtol=1e-6)
        basis, explained = statistics.basis()
        bases.append(basis)
        correlation = np.corrcoef(values.T)
        np.testing.assert_allclose(explained, np.linalg.eigvalsh(correlation)[::-1][:3] / 12, rtol=1e-6)
        assert (basis[np.abs(basis).argmax(axis=0), range(3)] > 0).all()
    np.testing.assert_allclose(bases[0], bases[1], atol=1e-6)
    named, _ = statistics.outliers()
    assert named[0].number == 5 and named[0].times_median > 100 and named[0].largest > 9e4


def test_energy_lies_at_the_frequency_of_a_cosine_and_bands_share_all_of_it() -> None:
    row = np.cos(np.pi * (np.arange(8) + 0.5) * 3 / 8)
    energy = energy_by_frequency(np.tile(row, 8).reshape(64, 1), (8, 8))
    assert np.unravel_index(energy.argmax(), energy.shape) == (0, 3) and energy[0, 3] / energy.sum() > 0.999
    spectrum = summarise_spectrum(energy, (8, 8))
    assert spectrum is not None and [band.name for band in spectrum.bands] == ["dc", "low", "mid", "high"]
    assert spectrum.bands[2].share > 0.999 and sum(band.share for band in spectrum.bands) == pytest.approx(1)
    assert summarise_spectrum(np.ones((1, 1)), (1, 1)) is None


def test_accuracy_on_the_page_is_the_one_that_extraction_measured(tmp_path: Path) -> None:
    make_cache(tmp_path, views=1, targets=("logits",), num_shards=3, num_samples=7)
    opened = open_for_page(str(tmp_path / "cache"), None)
    facts = describe_logits(opened, next(iter(opened.cache.teachers)))
    (layer,) = opened.cache.teachers.values()
    scores = [record.measured["accuracy"] for records in layer.records.values() for record in records]
    assert facts is not None and facts.rows == facts.labelled == 21
    assert facts.correct == pytest.approx(sum(score["correct"] for score in scores) / 21)


@given(st.lists(st.sampled_from(["done", "missing", "damaged"]), min_size=1, max_size=3000))
def test_cells_of_the_map_are_as_many_as_shards(kinds: list[str]) -> None:
    drawn = cell_map(kinds)
    counts = {kind: sum(round(float(length)) for length in re.findall(r"h([0-9.]+)", path)) for kind, path in drawn.paths}
    assert counts == {kind: kinds.count(kind) for kind in set(kinds)}
    assert drawn.columns * drawn.rows >= len(kinds)


@given(st.lists(st.from_regex(r"[a-c\n]{0,2}[0-9]{0,3}", fullmatch=True) | st.text(max_size=5), unique=True))
def test_names_of_the_map_come_back(names: list[str]) -> None:
    back = [
        run[0] if len(run) == 1 else f"{run[0]}{str(run[1] + i).zfill(run[3])}" for run in series(names) for i in range(run[2] if len(run) > 1 else 1)
    ]
    assert back == names


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=2000))
def test_curve_stays_in_its_box_and_falls_as_its_values_do(counts: list[int]) -> None:
    for log_y in (False, True):
        drawn = curve(list(enumerate(sorted(counts, reverse=True), start=1)), x_title="x", y_title="y", log_y=log_y, from_zero=not log_y)
        points = [tuple(float(number) for number in point.split(",")) for point in drawn.line.removeprefix("M").split("L")]
        assert all(46 <= x <= 348 and 10 <= y <= 158 for x, y in points)
        assert points == sorted(points) and [y for _, y in points] == sorted(y for _, y in points)
        assert len(points) <= 160 and len(drawn.y_ticks) >= 2


def test_names_of_a_thousand_shards_are_one_run() -> None:
    assert series([f"imagenet1k-train-{i:04d}" for i in range(1024)]) == [["imagenet1k-train-", 0, 1024, 4]]


# --- caches that are not whole ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards and a small cache of four of them, views not stored."""
    folder = tmp_path_factory.mktemp("plain")
    make_cache(folder, views=2, num_shards=4, num_samples=3, corrupt=(1,))
    return folder


@pytest.fixture
def cache(plain: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(plain / "cache", tmp_path / "cache")


def _states(cache: Path) -> dict[str, str]:
    return {shard.name: shard.state for shard in open_for_page(str(cache), None).states()}


def test_state_of_a_shard_is_told_from_records_and_sizes(cache: Path) -> None:
    assert _states(cache) == dict.fromkeys([f"train-000{i}" for i in range(4)], "skips")
    (teacher,) = (cache / "teachers").iterdir()
    next(teacher.glob("train-0000.*.json")).unlink()  # as an extraction that was cut off
    next(teacher.glob("train-0001.*.json")).unlink()
    next((cache / "views").glob("train-0001.*.json")).unlink()
    chunk = next(path for path in (cache / "views").glob("train-0002.*/params/c/**/*") if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-1])
    assert _states(cache) == {"train-0000": "unfinished", "train-0001": "missing", "train-0002": "damaged", "train-0003": "skips"}
    page, summary = build_page(str(cache), PageConfig())
    assert len(summary.problems) == 1 and "params/c" in summary.problems[0]
    assert "damaged" in Parsed(page).text()


def _flip_record(cache: Path) -> str:
    record = next((cache / "views").glob("train-0002.*.json"))
    data = bytearray(record.read_bytes())
    data[-20] ^= 1
    record.write_bytes(data)
    shutil.rmtree(cache / "index")
    return record.name


def _flip_logits(cache: Path) -> str:
    chunk = next(path for path in cache.glob("teachers/*/train-0002.*/logits/codes/c/**/*") if path.is_file())
    data = bytearray(chunk.read_bytes())
    data[30] ^= 1
    chunk.write_bytes(data)
    return "logits/codes/c"


def _drop_teacher_card(cache: Path) -> str:
    next(cache.glob("teachers/*/teacher.json")).unlink()
    shutil.rmtree(cache / "index")
    return "teacher"


def _flip_labels(cache: Path) -> str:
    chunk = next(path for path in cache.glob("views/train-0002.*/labels/c/*") if path.is_file())
    data = bytearray(chunk.read_bytes())
    data[5] ^= 1
    chunk.write_bytes(data)
    shutil.rmtree(cache / "index")
    return "labels"


def _flip_keys(cache: Path) -> str:
    chunk = next(path for path in cache.glob("views/train-0002.*/keys/bytes/c/*") if path.is_file())
    data = bytearray(chunk.read_bytes())
    data[5] ^= 1
    chunk.write_bytes(data)
    return "keys/bytes"


@pytest.mark.parametrize("damage", [_flip_record, _flip_logits, _drop_teacher_card, _flip_keys, _flip_labels])
def test_a_damaged_cache_gives_a_page_that_says_so_and_exit_code_1(cache: Path, tmp_path: Path, damage: Callable[[Path], str]) -> None:
    said = damage(cache)
    (tmp_path / "names.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    result = CliRunner().invoke(
        main, ["inspect", str(cache), "--html", str(tmp_path / "page.html"), "--class-names", str(tmp_path / "names.txt"), "--json"]
    )
    assert result.exit_code == 1, result.output
    problems = json.loads(result.stdout)["problems"]
    assert any(said in problem for problem in problems)
    page = (tmp_path / "page.html").read_bytes()
    text = Parsed(page).text()
    assert problems[0] in text and str(tmp_path).encode() not in page


def test_damaged_cache_json_is_an_error(cache: Path, tmp_path: Path) -> None:
    (cache / "cache.json").write_bytes((cache / "cache.json").read_bytes()[:-3])
    with pytest.raises(CorruptError, match=r"cache\.json"):
        write_page(str(cache), str(tmp_path / "page.html"), PageConfig())
    assert not list(tmp_path.glob("*page.html*"))


def test_without_its_tars_the_page_shows_what_the_cache_holds(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain / "shards", tmp_path / "moved")
    shards = plain / "shards"
    with_tars, _ = build_page(str(plain / "cache"), PageConfig())
    away = shards.rename(tmp_path / "away")
    try:
        without, summary = build_page(str(plain / "cache"), PageConfig())
        relocated, _ = build_page(str(plain / "cache"), PageConfig(data=str(tmp_path / "moved")))
    finally:
        away.rename(shards)
    assert relocated == with_tars
    text = Parsed(without).text()
    assert summary.problems == () and "its tar is not where it was" in text and "Not stored in the cache" in text and "nats" in text
    pictures = [attrs for tag, attrs in Parsed(without).elements if tag == "img"]
    assert pictures and all("data-map" in attrs for attrs in pictures)  # features as colours are still there


def test_views_that_render_otherwise_now_are_marked(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import kdcache.cache as reading
    from kdcache.views import render

    monkeypatch.setattr(reading, "render", lambda *given, **named: render(*given, **named) ^ 1)  # another decoder
    page, summary = build_page(str(plain / "cache"), PageConfig(samples=2))
    assert "not the pixels that the teacher saw" in Parsed(page).text()
    assert len(summary.problems) == 4


@pytest.mark.parametrize("targets", [(), ("logits",), ("features@norm:fp16",)])
def test_page_of_a_cache_that_holds_less(tmp_path: Path, plain: Path, targets: tuple[str, ...]) -> None:
    cache = tmp_path / "cache"
    if targets:
        extract(
            ExtractConfig(
                shards=str(plain / "shards"),
                cache=str(cache),
                teacher=f"local-dir:{plain / 'teacher'}",
                targets=targets,
                views=1,
                augment="none",
                workers=0,
            )
        )
    else:
        shutil.copytree(plain / "cache", cache)
        shutil.rmtree(cache / "teachers")
        shutil.rmtree(cache / "index")
    page, summary = build_page(str(cache), PageConfig(samples=3))
    ids = {attrs.get("id") for _, attrs in Parsed(page).elements}
    assert summary.problems == () and "sample-3" in ids
    assert "labels" in ids
    assert ("features" in ids, "logits" in ids) == (targets == ("features@norm:fp16",), targets == ("logits",))


def test_options_that_do_not_go_together_are_usage_errors(plain: Path, tmp_path: Path) -> None:
    page = str(tmp_path / "page.html")
    for options in (
        ["--data", "shards"],
        ["--samples", "3"],
        ["--seed", "1"],
        ["--html", page, "--shard", "train-0000", "--key", "s0000", "--view", "1"],
        ["--html", page, "--key", "s0000"],
    ):
        assert CliRunner().invoke(main, ["inspect", str(plain / "cache"), *options]).exit_code == 2, options
    assert not Path(page).exists()


def test_page_of_an_empty_cache(cache: Path) -> None:
    for name in ("views", "teachers", "index", "sources"):
        shutil.rmtree(cache / name)
    page, summary = build_page(str(cache), PageConfig())
    assert summary.samples == 0 and summary.problems == () and "No shard has been done" in Parsed(page).text()


def test_values_that_are_not_finite_are_a_problem_and_no_crash(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipelines.facts as facts
    import pipelines.page.features as features
    import pipelines.page.samples as samples

    def spoilt(*given: Any) -> dict[str, Any]:
        return {part: np.full_like(array, np.nan) for part, array in decode_rows(*given).items()}

    for module in (facts, features, samples):
        monkeypatch.setattr(module, "decode_rows", spoilt)
    page, summary = build_page(str(cache), PageConfig())
    assert len(summary.problems) == 4 and "not finite" in Parsed(page).text()


def test_samples_0_and_a_file_that_can_not_be_written(plain: Path, tmp_path: Path) -> None:
    Parsed(build_page(str(plain / "cache"), PageConfig(samples=0))[0])
    with pytest.raises(StoreError, match="can't be written"):
        write_page(str(plain / "cache"), str(tmp_path / "none" / "page.html"), PageConfig(samples=0))


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 360])
def test_page_in_a_browser_is_quiet_self_contained_legible_and_fits(chromium: Browser, page: Path, width: int, dark: bool) -> None:
    chromium.requests.clear()
    chromium.complaints.clear()
    chromium.open(page, width=width, dark=dark)
    assert chromium.run("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert chromium.run("document.documentElement.scrollWidth") == width
    assert chromium.run(OUTSIDE) == []
    assert chromium.run(CONTRAST) == []
    assert chromium.run("document.querySelectorAll('script').length") == 1
    assert chromium.complaints == []
    assert {url for url in chromium.requests if not url.startswith("data:")} == {page.as_uri()}


@pytest.mark.browser
def test_browser_refuses_what_the_policy_forbids(chromium: Browser, page: Path) -> None:
    chromium.open(page)
    chromium.complaints.clear()
    chromium.run("document.body.insertAdjacentHTML('beforeend', '<img src=https://example.org/x.png onerror=\"window.ran=1\" style=\"color:red\">')")
    assert chromium.run("new Promise((done) => setTimeout(() => done(window.ran), 50))") is None
    assert any("Content Security Policy" in text for text in chromium.complaints)
    chromium.complaints.clear()


@pytest.mark.browser
def test_keys_lead_through_the_page(chromium: Browser, page: Path) -> None:
    chromium.complaints.clear()
    chromium.open(page)
    focused = "document.activeElement.closest('[id]')?.id"
    for key, expected in (
        ("j", "sample-1"),
        ("j", "sample-2"),
        ("ArrowRight", "sample-3"),
        ("k", "sample-2"),
        ("ArrowLeft", "sample-1"),
        ("k", "sample-1"),
    ):
        chromium.press(key)
        assert chromium.run(focused) == expected, key
    chromium.press("m")
    laid = chromium.run("document.querySelectorAll('.laid').length")
    assert laid == chromium.run("document.querySelectorAll('.view .zoom').length") > 0
    chromium.press("m")
    chromium.press("m")
    assert chromium.run("document.querySelectorAll('.laid').length") == 0
    chromium.press("?")
    assert chromium.run("document.querySelector('#help').open")
    chromium.run("document.querySelector('#help').close()")
    chromium.press("t")
    assert chromium.run("document.documentElement.dataset.theme") == "light"
    chromium.run("localStorage.clear()")
    chromium.run("document.querySelector('.zoom').click()")
    assert chromium.run("document.querySelector('#large').open")
    first = chromium.run("document.querySelector('#large img').src")
    chromium.press("ArrowRight")
    assert chromium.run("document.querySelector('#large img').src") != first
    chromium.run("document.querySelector('#large').close()")
    chromium.run("document.querySelector('#map').focus()")
    chromium.press("ArrowRight")
    assert chromium.run("document.querySelector('#map-says').textContent") == f"{visible(HOSTILE_SHARD)}: done"
    assert chromium.complaints == []
