"""Policies: their draws as timm and torchvision mean them, their ops as timm does them, their files, and what may never change."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm.data.auto_augment as timm_ops
import torch
from helpers import make_image, random_policies
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data.mixup import cutmix_bbox_and_lam
from timm.data.random_erasing import RandomErasing as TimmErasing

from kdcache import augment, draws, view_params
from kdcache.augment import FILL, OPS, apply_op, noise
from kdcache.draws import draw, draw_mix
from kdcache.errors import CorruptError, UsageError
from kdcache.plan import (
    POLICIES,
    CenterCrop,
    ColorJitter,
    MixedViews,
    Policy,
    RandAugment,
    RandomErasing,
    RandomResizedCrop,
    ViewPlan,
)
from kdcache.policy_file import load_policy, parse_policy
from kdcache.view_params import Box, ViewParams
from kdcache.views import pixel_digest, render

WHOLE = RandomResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0))
MIX = MixedViews(mixup_alpha=0.8, cutmix_alpha=1.0)


def plan_of(policy: Policy, *, size: int = 32, seed: int = 0) -> ViewPlan:
    return ViewPlan(dataset="d", policy=policy, size=size, seed=seed)


def params_of(policy: Policy, count: int, *, size: int = 32) -> list[ViewParams]:
    plan = plan_of(policy, size=size)
    return [draw(plan, "s", f"k{i}", 0, (40, 30)) for i in range(count)]


# --- ops, against timm's own ---

UNITS = [0.0, 0.1, 0.37, 0.5, 0.9, 1.0]
"""Magnitudes tried, as fractions of an op's range."""
TIMM_NAMES = {augment.POSTERIZE: "PosterizeIncreasing", augment.SOLARIZE: "SolarizeIncreasing"} | {
    op: f"{name}Increasing" for op, name in enumerate(["Color", "Contrast", "Brightness", "Sharpness"], start=augment.COLOR)
}


def test_the_op_sets_are_timms() -> None:
    plain = [timm_ops._RAND_TRANSFORMS[op - 1] for op in draws._RAND_AUGMENT_OPS]
    increasing = [TIMM_NAMES.get(op, name) for op, name in zip(draws._RAND_AUGMENT_OPS, plain, strict=True)]
    assert plain == timm_ops._RAND_TRANSFORMS
    assert increasing == timm_ops._RAND_INCREASING_TRANSFORMS


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("op", draws._RAND_AUGMENT_OPS)
def test_ops_are_timms_byte_for_byte(op: int, resample: Image.Resampling) -> None:
    timm_op = timm_ops.NAME_TO_OP[timm_ops._RAND_TRANSFORMS[op - 1]]
    known = OPS[op]
    magnitudes = {round((known.lowest + unit * (known.highest - known.lowest)) * 65536) for unit in UNITS}
    if known.is_whole:
        magnitudes = {whole * 65536 for whole in range(int(known.highest) + 1)}
    assert op <= augment.INVERT or len(magnitudes) > 4
    for magnitude, seed in itertools.product(sorted(magnitudes), (1, 2)):
        image = make_image(seed, (33, 27))
        argument = magnitude // 65536 if known.is_whole else magnitude / 65536
        arguments = [] if op <= augment.INVERT else [argument]
        if (op, argument) == (augment.POSTERIZE, 0):
            expected = Image.new("RGB", image.size)  # timm's magnitude 10, which newer versions of Pillow refuse
        else:
            expected = timm_op(image, *arguments, fillcolor=FILL, resample=resample)
        assert apply_op(image, op, magnitude, resample).tobytes() == expected.tobytes(), (op, argument)


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("op", range(augment.ROTATE, augment.TRANSLATE_Y + 1))
def test_magnitudes_are_timms(op: int, increasing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    names = timm_ops._RAND_INCREASING_TRANSFORMS if increasing else timm_ops._RAND_TRANSFORMS
    policy = RandAugment(increasing=increasing)
    for level_q16, negate in itertools.product(range(0, 10 * 65536 + 1, 4681), (False, True)):
        monkeypatch.setattr(random, "random", lambda negate=negate: 0.9 if negate else 0.1)
        (expected,) = timm_ops.LEVEL_TO_ARG[names[op - 1]](level_q16 / 65536, {})
        found = draws._magnitude_q16(policy, op, level_q16, negate=negate)
        assert OPS[op].allows(found)
        assert abs(found / 65536 - expected) <= 1.01 / 65536, (op, level_q16)


@pytest.mark.parametrize("op", [augment.GREYSCALE, augment.SOLARIZE, augment.GAUSSIAN_BLUR])
def test_the_ops_of_three_augment_are_deits(op: int) -> None:
    from PIL import ImageFilter, ImageOps
    from torchvision.transforms import Grayscale

    image = make_image(4)
    expected, magnitude = {
        augment.GREYSCALE: (Grayscale(3)(image), 0),
        augment.SOLARIZE: (ImageOps.solarize(image), 128 * 65536),
        augment.GAUSSIAN_BLUR: (image.filter(ImageFilter.GaussianBlur(1.25)), 5 * 65536 // 4),
    }[op]
    assert apply_op(image, op, magnitude, Image.Resampling.BICUBIC).tobytes() == expected.tobytes()


@pytest.mark.parametrize(("op", "magnitude"), [(0, 0), (18, 0), (4, 31 * 65536), (5, 65537), (6, 257 * 65536), (1, 1), (17, 0)])
def test_an_op_that_no_draw_gives_is_refused(op: int, magnitude: int) -> None:
    with pytest.raises(CorruptError, match=f"image op {op} "):
        apply_op(make_image(1), op, magnitude, Image.Resampling.BICUBIC)


# --- draws, against the distributions that are meant ---


def test_rand_augment_is_distributed_as_timms() -> None:
    count = 4000
    drawn = params_of(Policy(crop=CenterCrop(), rand_augment=RandAugment(num_ops=2, magnitude=9, magnitude_std=0.5)), count)
    numbers = Counter(len(params.ops) for params in drawn)
    assert numbers[1] / count == pytest.approx(0.5, abs=0.03)
    assert numbers[0] / count == pytest.approx(0.25, abs=0.03)
    ops = [op for params in drawn for op in params.ops]
    by_op = Counter(op for op, _ in ops)
    assert sorted(by_op) == list(range(1, 16))
    assert all(number == pytest.approx(len(ops) / 15, rel=0.25) for number in by_op.values())
    degrees = np.array([magnitude / 65536 for op, magnitude in ops if op == augment.ROTATE])
    assert np.mean(degrees > 0) == pytest.approx(0.5, abs=0.12)
    levels = np.clip(np.random.default_rng(0).normal(9, 0.5, 100_000), 0, 10)
    assert np.abs(degrees).mean() == pytest.approx(3 * levels.mean(), abs=0.25)
    assert np.abs(degrees).std() == pytest.approx(3 * levels.std(), rel=0.2)


def test_bell_draws_have_mean_zero_and_deviation_one() -> None:
    words = np.random.Philox(key=3).random_raw(20_000).tolist()
    values = np.array([draws._bell_q16(word) for word in words]) / 65536
    assert (abs(values.mean()), values.std()) == (pytest.approx(0, abs=0.03), pytest.approx(1, abs=0.02))
    assert np.mean(np.abs(values) < 1) == pytest.approx(0.6827, abs=0.02)


def test_three_augment_and_colour_jitter_are_distributed_as_meant() -> None:
    count = 3000
    drawn = params_of(POLICIES["3aug"], count)
    first = Counter(params.ops[0][0] for params in drawn)
    assert all(first[op] == pytest.approx(count / 3, rel=0.1) for op in (augment.GREYSCALE, augment.SOLARIZE, augment.GAUSSIAN_BLUR))
    sigmas = [params.ops[0][1] / 65536 for params in drawn if params.ops[0][0] == augment.GAUSSIAN_BLUR]
    assert (min(sigmas) >= 0.0999, max(sigmas) <= 2.0) == (True, True)
    assert np.mean(sigmas) == pytest.approx(1.05, abs=0.06)
    orders = Counter(tuple(op for op, _ in params.ops[1:]) for params in drawn)
    assert len(orders) == 6
    assert all(number == pytest.approx(count / 6, rel=0.2) for number in orders.values())
    for op in (augment.COLOR, augment.CONTRAST, augment.BRIGHTNESS):
        factors = np.array([dict(params.ops[1:])[op] / 65536 for params in drawn])
        assert (0.69 < factors.min() < 0.71, 1.29 < factors.max() < 1.31) == (True, True)
        assert factors.mean() == pytest.approx(1.0, abs=0.02)


def test_erased_boxes_are_distributed_as_timms() -> None:
    count, size = 2000, 64
    drawn = [params.erase for params in params_of(Policy(crop=CenterCrop(), erase=RandomErasing(prob=0.25)), count, size=size)]
    boxes = np.array([(e.box.left, e.box.top, e.box.width, e.box.height) for e in drawn if e is not None], float)
    assert len(boxes) / count == pytest.approx(0.25, abs=0.03)
    random.seed(0)
    erasing = TimmErasing(probability=1.0, device="cpu")
    theirs = []
    for _ in range(1500):
        mask = erasing(torch.ones(1, size, size))[0].numpy() == 0
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        theirs.append((columns[0], rows[0], len(columns), len(rows)))
    expected = np.array(theirs, float)
    error = np.sqrt(boxes.var(0) / len(boxes) + expected.var(0) / len(expected))
    assert (np.abs(boxes.mean(0) - expected.mean(0)) < 4 * error).all()
    assert np.allclose(boxes.std(0), expected.std(0), rtol=0.12)


def test_noise_is_about_imagenets_mean_and_deviation() -> None:
    values = noise(12345, 128, 128).reshape(-1, 3) / 255
    assert np.allclose(values.mean(0), (0.485, 0.456, 0.406), atol=0.01)
    assert np.allclose(values.std(0), (0.229, 0.224, 0.225), atol=0.015)  # clipping takes a little off
    assert np.abs(np.corrcoef(values.T) - np.eye(3)).max() < 0.03
    assert not np.array_equal(noise(1, 8, 8), noise(2, 8, 8))
    assert np.array_equal(noise(7, 6, 8).ravel()[:60], noise(7, 5, 4).ravel()), "row by row"


def test_a_constant_erases_to_its_colour_and_nothing_else() -> None:
    image = make_image(2)
    for color, shown in ((None, (0, 0, 0)), ((1, 20, 255), (1, 20, 255))):
        policy = Policy(crop=CenterCrop(crop_pct=1.0), erase=RandomErasing(prob=1.0, mode="constant", color=color))
        params = draw(plan_of(policy), "s", "k", 0, image.size)
        assert params.erase is not None
        box = params.erase.box
        view, plain = render(image, params), render(image, ViewParams(params.crop, params.flip, 32, "bicubic"))
        assert (view[box.top : box.top + box.height, box.left : box.left + box.width] == shown).all()
        view[box.top : box.top + box.height, box.left : box.left + box.width] = plain[box.top : box.top + box.height, box.left : box.left + box.width]
        assert np.array_equal(view, plain)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0, 4.0, 32.0])
def test_mixing_weights_are_beta_distributed(alpha: float) -> None:
    words = np.random.Philox(key=5).random_raw(4000).tolist()
    values = np.array([draws._beta_q16(alpha, word) / 65536 for word in words])
    expected = np.random.default_rng(1).beta(alpha, alpha, 100_000)
    for x in np.linspace(0.005, 0.995, 34):
        assert np.mean(values <= x) == pytest.approx(np.mean(expected <= x), abs=0.03)
    assert draws._beta_thresholds(alpha)[511] < 2**63 < draws._beta_thresholds(alpha)[512]


def test_cutmix_boxes_are_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, weight, x, y in itertools.product((7, 32, 224), range(0, 65537, 4096), (0.0, 0.31, 0.999), (0.5, 0.97)):
        centres = iter([int(y * size), int(x * size)])
        monkeypatch.setattr(np.random, "randint", lambda *_, size=None, centres=centres: next(centres))
        (top, bottom, left, right), weight_after = cutmix_bbox_and_lam((3, size, size), weight / 65536)
        box = draws._cutmix_box(weight, size, int(x * 2**64), int(y * 2**64))
        assert (box.left, box.top, box.width, box.height) == (left, top, right - left, bottom - top)
        assert view_params.weight_outside(box, size) / 65536 == pytest.approx(weight_after, abs=1 / 65536)


def test_partners_are_others_of_the_tar_and_modes_as_likely_as_asked() -> None:
    plan, count = plan_of(Policy(crop=WHOLE, mix=MixedViews(prob=0.8, switch_prob=0.25, mixup_alpha=1.0, cutmix_alpha=1.0))), 3000
    drawn = [draw_mix(plan, "s", f"k{i}", 0, position=i % 7, num_samples=7) for i in range(count)]
    mixed = [(i % 7, mix) for i, mix in enumerate(drawn) if mix is not None]
    assert len(mixed) / count == pytest.approx(0.8, abs=0.03)
    assert all(mix.partner != own and 0 <= mix.partner < 7 for own, mix in mixed)
    pairs = Counter((own, mix.partner) for own, mix in mixed)
    assert len(pairs) == 42
    assert max(pairs.values()) < 2 * min(pairs.values())
    assert np.mean([mix.mode == view_params.CUTMIX for _, mix in mixed]) == pytest.approx(0.25, abs=0.03)
    assert draw_mix(plan, "s", "k", 0, position=0, num_samples=1) is None


@given(st.integers(0, 65536), st.integers(0, 2**32 - 1))
def test_mixup_is_the_rounded_mean(weight: int, seed: int) -> None:
    own, partner = np.random.default_rng(seed).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    exact = (own.astype(object) * weight + partner.astype(object) * (65536 - weight)) / 65536
    assert np.abs((augment.blend(own, partner, weight) - exact).astype(float)).max() <= 0.5


# --- random policies ---


@given(random_policies, st.integers(1, 64), st.integers(0, 2**63 - 1), st.text(max_size=5), st.integers(0, 1000))
def test_a_draw_is_pure_and_its_stored_row_renders_the_same(policy: Policy, size: int, seed: int, key: str, view: int) -> None:
    plan = plan_of(policy, size=size, seed=seed)
    image, partner = make_image(seed % 97), render(make_image(1), ViewParams(Box(0, 0, 20, 20), False, size, "bicubic"))
    rows = []
    for _ in range(2):
        mix = draw_mix(plan, "s", key, view, position=3, num_samples=9)
        params = ViewParams(**{**vars(draw(plan, "s", key, view, image.size)), "mix": mix})
        rows.append(params.to_row())
    assert rows[0].tolist() == rows[1].tolist()
    read = ViewParams.from_row(rows[0], plan)
    assert read == params
    given_partner = partner if mix is not None else None
    assert np.array_equal(render(image, read, given_partner), render(image, params, given_partner))
    assert ViewPlan.model_validate_json(plan.model_dump_json()) == plan


@given(random_policies)
def test_a_policy_without_randomness_draws_one_view(policy: Policy) -> None:
    drawn = {
        (draw(plan_of(policy), "s", "k", view, (40, 30)), draw_mix(plan_of(policy), "s", "k", view, position=0, num_samples=9)) for view in range(40)
    }
    assert policy.is_random or len(drawn) == 1


def test_one_feature_does_not_shift_another() -> None:
    alone = params_of(Policy(crop=WHOLE, hflip=0.5, erase=RandomErasing(prob=0.5)), 20)
    strong = params_of(
        Policy(crop=WHOLE, hflip=0.5, rand_augment=RandAugment(), color_jitter=ColorJitter(contrast=0.5), erase=RandomErasing(prob=0.5)), 20
    )
    assert [(p.crop, p.flip, p.erase) for p in alone] == [(p.crop, p.flip, p.erase) for p in strong]


# --- files ---


def test_a_file_may_start_from_a_named_policy(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("base: strong\nrand_augment:\n  magnitude: 5\nerase: null\nmix: {mixup_alpha: 8e-1, prob: 1}\n")
    assert parse_policy(str(path)) == POLICIES["strong"].model_copy(
        update={"rand_augment": RandAugment(num_ops=2, magnitude=5, magnitude_std=0.5), "erase": None, "mix": MixedViews(mixup_alpha=0.8)}
    )
    path.write_text("base: weak\ncrop:\n  kind: center\n")
    assert load_policy(path) == Policy(crop=CenterCrop(), hflip=0.5)
    path.write_text("crop: {kind: random_resized, scale: [1e-3, 1]}\n")
    assert load_policy(path) == Policy(crop=RandomResizedCrop(scale=(0.001, 1.0)))


@pytest.mark.parametrize("name", POLICIES)
def test_a_file_that_says_a_named_policy_is_that_policy(name: str, tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "p.yml"
    path.write_text(yaml.safe_dump(POLICIES[name].to_json()))
    assert load_policy(path) == POLICIES[name] == parse_policy(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: strong\nrand_augment: {magnitde: 3}", r"p\.yaml: rand_augment\.magnitde: there is no such key; did you mean 'magnitude'\?; the keys"),
        ("base: strong\nmixx: {}", r"p\.yaml: mixx: there is no such key; did you mean 'mix'"),
        ("base: weak\ncrop: {scael: [1, 1]}", r"crop\.scael: .*did you mean 'scale'"),
        ("base: weak\ncrop: {kind: center, scale: [1, 1]}", r"crop\.scale: there is no such key; .*the keys here are: kind, crop_pct"),
        ("base: weak\nhflip: half", r"hflip: Input should be a valid number, found 'half'"),
        ('base: weak\nhflip: "0.5"', r"hflip: Input should be a valid number, found '0\.5'"),
        ("base: strong\nrand_augment: {increasing: 1}", r"rand_augment\.increasing: Input should be a valid boolean, found 1"),
        ("base: strong\nrand_augment: {num_ops: 2.5}", r"rand_augment\.num_ops: Input should be a valid integer.*2\.5"),
        ("base: strong\nerase: {area: [0.5, 0.1]}", r"erase: .*area must satisfy"),
        ("base: strong\nerase: {color: [1, 2, 3]}", r"erase: .*mode 'constant', found mode 'noise'"),
        ("base: strong\nmix: {prob: 1.0}", r"mix: .*mixup_alpha or cutmix_alpha must be at least 0\.01"),
        ("base: weak\nmix: yes", r"mix: Input should be.*True"),
        ("base: weak\ncrop: {scale: [0, .inf]}", r"crop\.scale\.1: Input should be a finite number"),
        ("base: strong\ncolor_jitter: {}\nrand_augment: {num_ops: 6}", r"come to 9 ops, expected at most 8"),
        ("base: storng", r"base: expected one of: none, weak, strong, 3aug, found 'storng'; did you mean 'strong'"),
        ("hflip: 0.5", r"crop: Field required"),
        ("crop: {scale: [0.1, 1.0]}", r"crop\.kind: expected one of: center, random_resized, found none"),
        ("base: weak\nhflip: 0.1\nhflip: 0.2", r"'hflip' is given twice"),
        ("base: [weak", r"not YAML"),
        ("strong", r"expected fields such as 'base: strong', found 'strong'"),
        ("", r"expected fields"),
        ("!!python/object/apply:os.system [echo]", r"not YAML"),
        ("base: weak\n3: 4", r"p\.yaml: 3: there is no such key"),
        ("base: weak\nhflip: &a [*a]", r"not YAML: the alias \*a is not taken"),
        ("base: weak\nhflip: 2001-99-99", r"a value can't be read: month must be in 1\.\.12"),
        ("base: weak\nhflip: !!bool x", r"a value can't be read"),
        ("base: weak\nhflip: {2001-01-01: 1}", r"a value that is no field of a policy: keys must be"),
        ("base: weak\nhflip: " + "[" * 5000, r"hundreds of lists in each other"),
    ],
)
def test_a_wrong_file_says_where_and_what(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        parse_policy(str(path))
    assert str(path) in str(caught.value)


def test_an_unknown_policy_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"'srtong' is not known; did you mean 'strong'\?; expected one of: none, weak, strong, 3aug, or a FILE\.yaml"
    ):
        parse_policy("srtong")
    with pytest.raises(UsageError, match=r"nowhere\.yaml: can't be read: No such file"):
        parse_policy(str(tmp_path / "nowhere.yaml"))


# --- what may never change ---


def describe(policy: Policy, i: int) -> tuple[list[int], str]:
    """(params row, pixel digest) of one view, its partner a fixed image."""
    plan = plan_of(policy)
    image = make_image(i, (61, 47))
    mix = draw_mix(plan, "train-0000", f"k{i}", i, position=i, num_samples=10)
    params = ViewParams(**{**vars(draw(plan, "train-0000", f"k{i}", i, image.size)), "mix": mix})
    partner = render(make_image(99), ViewParams(Box(0, 0, 40, 30), False, 32, "bicubic")) if mix is not None else None
    return params.to_row().tolist(), f"{pixel_digest(render(image, params, partner)):016x}"


GOLDEN_POLICIES = {
    **POLICIES,
    "mix": Policy(crop=WHOLE, mix=MIX),
    "constant": Policy(crop=CenterCrop(), erase=RandomErasing(prob=1, mode="constant")),
}
GOLDENS: dict[str, tuple[str, list[tuple[int, str, str]]]] = {
    "none": (
        "f7f2015cb5e3e00cfa3ee835676e6981",
        [
            (0, "10 3 41 41 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0", "d5a526dcc3ff6011"),
            (1, "10 3 41 41 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0", "e7b5a12e5c1a4f71"),
        ],
    ),
    "weak": (
        "66316da8a67a841b1a3152a61dc1de76",
        [
            (0, "15 1 21 25 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0", "bc37ec9978e7c0f9"),
            (1, "26 5 32 39 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0", "f28c3f3e82a90afa"),
        ],
    ),
    "strong": (
        "ab2d2ab243da91b451f1da3ecb515fc6",
        [
            (6, "21 6 32 40 1 6 1638400 7 6422528 0 0 0 0 0 0 0 0 0 0 0 0 2 0 1 16 21 7547029 -56377092 0 0 0 0 0 0 0", "cfb0b148bfbc889b"),
            (16, "0 0 58 46 0 4 -1629321 9 121146 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0", "3c5fdb2f41a9ae22"),
            (62, "0 24 19 19 1 2 0 4 -1779819 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0", "5aec84f04f92da15"),
            (66, "4 4 50 43 1 8 121611 14 -23995 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0", "7a0b8a9ff5b45525"),
            (2, "6 4 44 42 0 9 121132 0 0 0 0 0 0 0 0 0 0 0 0 0 0 2 4 4 18 14 972882164 -860275413 0 0 0 0 0 0 0", "2c859156d0b2a37f"),
        ],
    ),
    "3aug": (
        "fdd20f05a28d364e3149802c27f13ce9",
        [
            (2, "6 4 44 42 0 6 8388608 8 84256 10 81843 9 50389 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0", "29c00183f09720f4"),
            (8, "8 17 34 28 1 16 0 8 61171 9 71534 10 68513 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0", "591d724e75666428"),
            (0, "15 1 21 25 0 17 18282 9 51853 10 62553 8 71392 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0", "9424ffb27de5fcc1"),
        ],
    ),
    "mix": (
        "0109d998ced3501bfd715dd8416ec270",
        [
            (0, "7 0 47 47 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 1 1 19 13 13 54720", "2b9ee25a1fc083fd"),
            (3, "7 0 47 47 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 2 7 0 0 0 0 4288", "fac56eb3f9f40507"),
        ],
    ),
    "constant": (
        "755634af4ef65479f4f6828e41afd76a",
        [
            (0, "10 3 41 41 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 21 16 9 16 0 0 0 0 0 0 0 0 0", "efd8b1e831ced7e9"),
            (1, "10 3 41 41 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 2 7 6 17 0 0 0 0 0 0 0 0 0", "9d7b577724c1acbd"),
        ],
    ),
}


@pytest.mark.parametrize("name", GOLDEN_POLICIES)
def test_drawn_views_never_change(name: str) -> None:
    """A change here makes every cache with such a policy another plan: it needs a new DRAW_VERSION."""
    fingerprint, goldens = GOLDENS[name]
    assert plan_of(GOLDEN_POLICIES[name]).fingerprint == fingerprint
    for i, row, digest in goldens:
        found, pixels = describe(GOLDEN_POLICIES[name], i)
        assert " ".join(map(str, found)) == row
        assert pixels == digest
