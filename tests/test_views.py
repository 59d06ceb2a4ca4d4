"""Views: the same pixels for one (plan, shard, key, view) in any process, order, worker and year."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import make_image, run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop as TorchvisionCrop

from kdcache.augment import OPS
from kdcache.draws import draw, random_words
from kdcache.errors import CorruptError, UsageError
from kdcache.plan import (
    MAX_OPS,
    POLICIES,
    CenterCrop,
    ColorJitter,
    MixedViews,
    Policy,
    RandAugment,
    RandomErasing,
    RandomResizedCrop,
    ThreeAugment,
    ViewPlan,
)
from kdcache.view_params import PARAM_FIELDS, Box, Erase, Mix, ViewParams
from kdcache.views import pixel_digest, render


def plan_of(policy: str = "weak", *, size: int = 24, seed: int = 0) -> ViewPlan:
    return ViewPlan(dataset="d", policy=POLICIES[policy], size=size, seed=seed)


GOLDEN_WORDS = [5923536775726525782, 9543939538248835295, 12534683964618396168]
GOLDEN_FINGERPRINTS = ["ff7a9218e846c7ecb8614538ee7691c4", "fe082230442df3b0f0ea5146376de9bc"]
GOLDEN_DRAWS: list[tuple[str, int, str, str, int, tuple[int, int], tuple[int, int, int, int], bool]] = [
    ("none", 0, "train-0000", "n01_7", 0, (500, 375), (86, 23, 328, 328), False),
    ("none", 9, "x", "y", 3, (33, 1), (16, 0, 1, 1), False),
    ("weak", 0, "train-0000", "n01_7", 0, (500, 375), (159, 23, 267, 264), True),
    ("weak", 0, "train-0000", "n01_7", 1, (500, 375), (68, 193, 135, 152), True),
    ("weak", 1, "train-0000", "n01_7", 0, (500, 375), (93, 4, 385, 369), False),
    ("weak", 0, "é/b", "日本", 5, (333, 500), (188, 329, 138, 109), True),
    ("weak", 9223372036854775807, "s", "k", 999999, (4096, 4096), (49, 1131, 1690, 1532), False),
    ("weak", 0, "s", "k", 0, (1, 1), (0, 0, 1, 1), True),
    ("weak", 0, "s", "k", 0, (900, 3), (448, 0, 3, 3), True),
    ("weak", 0, "s", "k", 0, (3, 900), (0, 448, 3, 4), True),
]
"""policy, seed, shard, key, view, (width, height) → crop (left, top, width, height), flip."""


def test_random_words_never_change() -> None:
    assert random_words(0, "train-0000", "n01_7", 0)[:3] == list(GOLDEN_WORDS)


@pytest.mark.parametrize(("policy", "seed", "shard", "key", "view", "size_wh", "crop", "flip"), GOLDEN_DRAWS)
def test_drawn_params_never_change(
    policy: str, seed: int, shard: str, key: str, view: int, size_wh: tuple[int, int], crop: tuple[int, int, int, int], flip: bool
) -> None:
    params = draw(plan_of(policy, seed=seed), shard, key, view, size_wh)
    assert (params.crop, params.flip) == (Box(*crop), flip)


def test_plan_fingerprints_never_change() -> None:
    assert [plan_of(name, size=224).fingerprint for name in ("none", "weak")] == GOLDEN_FINGERPRINTS


ALL = Policy(
    crop=RandomResizedCrop(),
    hflip=0.5,
    three_augment=ThreeAugment(),
    rand_augment=RandAugment(num_ops=4),
    color_jitter=ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3),
    erase=RandomErasing(),
    mix=MixedViews(mixup_alpha=0.8, cutmix_alpha=1.0),
)
ALL_PLAN = ViewPlan(dataset="d", policy=ALL, size=24)


def edges(size: int) -> st.SearchStrategy[tuple[int, int]]:
    """(first, length) within a view of this side."""
    return st.integers(0, size - 1).flatmap(lambda first: st.tuples(st.just(first), st.integers(1, size - first)))


boxes = st.tuples(edges(24), edges(24)).map(lambda pair: Box(pair[0][0], pair[1][0], pair[0][1], pair[1][1]))
crops = st.builds(Box, st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1), st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1))
ops = st.sampled_from(sorted(OPS)).flatmap(
    lambda op: (
        st.tuples(st.just(op), st.integers(int(OPS[op].lowest * 65536), int(OPS[op].highest * 65536)).filter(OPS[op].allows))
        if not OPS[op].is_whole
        else st.tuples(st.just(op), st.integers(0, int(OPS[op].highest)).map(lambda whole: whole * 65536))
    )
)
erasures = st.builds(Erase, st.just(1), boxes, st.integers(0, 2**24 - 1)) | st.builds(Erase, st.just(2), boxes, st.integers(0, 2**64 - 1))
partners = st.integers(0, 2**31 - 1)
mixes = st.builds(Mix, st.just(2), partners, st.just(Box(0, 0, 0, 0)), st.integers(0, 65535)) | st.builds(
    lambda partner, box: Mix(1, partner, box, 65536 - round(box.width * box.height * 65536 / 576)), partners, boxes
)
all_params = st.builds(
    ViewParams,
    crops,
    st.booleans(),
    st.just(24),
    st.just("bicubic"),
    st.lists(ops, max_size=MAX_OPS).map(tuple),
    st.none() | erasures,
    st.none() | mixes,
)


@given(all_params)
def test_params_survive_their_stored_row(params: ViewParams) -> None:
    row = params.to_row()
    assert (row.dtype, row.shape) == (np.int32, (len(PARAM_FIELDS),))
    assert ViewParams.from_row(row, ALL_PLAN) == params


@settings(max_examples=300)
@given(
    all_params.filter(lambda params: max(params.crop.left + params.crop.width, params.crop.top + params.crop.height) < 2**31),
    st.dictionaries(st.integers(0, len(PARAM_FIELDS) - 1), st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 30), max_size=3),
)
def test_a_hostile_row_is_refused_or_can_be_rendered(params: ViewParams, damage: dict[int, int]) -> None:
    row = params.to_row()
    for column, value in damage.items():
        row[column] = value
    try:
        read = ViewParams.from_row(row, ALL_PLAN)
    except CorruptError:
        assert damage
        return
    assert read.to_row().tolist() == row.tolist()
    fitting = replace(read, crop=Box(1, 2, 30, 20))
    partner = np.zeros((24, 24, 3), np.uint8) if read.mix is not None else None
    assert render(make_image(1), fitting, partner).shape == (24, 24, 3)


@pytest.mark.parametrize("damage", [(4, 2), (4, -1), (0, -1), (1, -5), (2, 0), (3, -2)])
def test_params_that_no_draw_gives_are_refused(damage: tuple[int, int]) -> None:
    row = draw(plan_of(), "s", "k", 0, (40, 30)).to_row()
    row[damage[0]] = damage[1]
    with pytest.raises(CorruptError, match="view params"):
        ViewParams.from_row(row, plan_of())


ratios = st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)).map(lambda pair: (min(pair), max(pair)))
scales = st.tuples(st.floats(1e-6, 1), st.floats(1e-6, 1)).map(lambda pair: (min(pair), max(pair)))
policies = st.builds(CenterCrop, crop_pct=st.floats(1e-6, 1)) | st.builds(RandomResizedCrop, scale=scales, ratio=ratios)


@given(policies, st.integers(1, 70_000), st.integers(1, 70_000), st.integers(0, 50))
def test_crop_lies_inside_the_image(crop: CenterCrop | RandomResizedCrop, width: int, height: int, view: int) -> None:
    plan = ViewPlan(dataset="d", policy=Policy(crop=crop, hflip=0.5), size=24)
    box = draw(plan, "s", "k", view, (width, height)).crop
    assert min(box.left, box.top) >= 0
    assert min(box.width, box.height) >= 1
    assert box.left + box.width <= width
    assert box.top + box.height <= height


def test_crops_are_distributed_as_torchvisions() -> None:
    count, size_wh, crop = 1500, (500, 375), RandomResizedCrop()
    boxes = [draw(plan_of(), "s", f"k{i}", 0, size_wh) for i in range(count)]
    ours = np.array([(b.crop.left, b.crop.top, b.crop.width, b.crop.height) for b in boxes], float)
    torch.manual_seed(0)
    image = torch.empty(3, size_wh[1], size_wh[0])
    theirs = np.array([TorchvisionCrop.get_params(image, list(crop.scale), list(crop.ratio)) for _ in range(count)], float)[:, [1, 0, 3, 2]]
    standard_error = np.sqrt((ours.var(0) + theirs.var(0)) / count)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4 * standard_error).all()
    assert np.allclose(ours.std(0), theirs.std(0), rtol=0.08)
    assert abs(np.mean([b.flip for b in boxes]) - 0.5) < 0.05


def test_every_part_of_the_identity_changes_the_draw() -> None:
    base = random_words(0, "s", "k", 0)
    others = [random_words(1, "s", "k", 0), random_words(0, "t", "k", 0), random_words(0, "s", "l", 0), random_words(0, "s", "k", 1)]
    assert len({tuple(words) for words in [base, *others]}) == 5


class Views(Dataset[int]):
    """Pixel digest of view i % 3 of sample i // 3."""

    def __len__(self) -> int:
        return 18

    def __getitem__(self, i: int) -> int:
        image = make_image(i // 3)
        return pixel_digest(render(image, draw(plan_of(), "s", f"k{i // 3}", i % 3, image.size))) >> 1


def digests_with(num_workers: int, *, shuffle: bool = False) -> list[int]:
    sampler = torch.randperm(18, generator=torch.Generator().manual_seed(1)).tolist() if shuffle else range(18)
    digests = [int(item) for item in DataLoader(Views(), batch_size=None, sampler=sampler, num_workers=num_workers)]
    return [digest for _, digest in sorted(zip(sampler, digests, strict=True))]


def test_views_do_not_depend_on_workers_or_order() -> None:
    alone = digests_with(0)
    assert len(set(alone)) == 18
    assert digests_with(0, shuffle=True) == alone
    assert digests_with(2, shuffle=True) == alone


def test_views_do_not_depend_on_the_process() -> None:
    code = (
        "import json, sys, random, numpy as np; random.seed(7); np.random.seed(7)\n"
        "from kdcache.plan import POLICIES, ViewPlan\nfrom kdcache.draws import draw\n"
        "plan = ViewPlan(dataset='d', policy=POLICIES['weak'], size=24)\n"
        "print(json.dumps([draw(plan, 's', f'k{i}é', i, (640, 480)).to_row().tolist() for i in range(20)]))"
    )
    here = [draw(plan_of(), "s", f"k{i}é", i, (640, 480)).to_row().tolist() for i in range(20)]
    assert json.loads(run_python(code).stdout) == here


def global_random_state() -> tuple[object, ...]:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, keys.tobytes(), *rest, torch.get_rng_state().numpy().tobytes()  # type: ignore[union-attr]


@pytest.mark.parametrize("policy", POLICIES)
def test_draw_and_render_use_no_global_generator(policy: str) -> None:
    image = make_image(3, (90, 70))
    random.seed(1)
    before = global_random_state()
    params = [draw(plan_of(policy), "s", "k", view, image.size) for view in range(4)]
    first = [render(image, one) for one in params]
    assert global_random_state() == before
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    second = [render(image, ViewParams.from_row(one.to_row(), plan_of(policy))) for one in params]
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(view.shape == (24, 24, 3) and view.dtype == np.uint8 for view in first)


def test_a_flip_mirrors_the_view_and_nothing_else() -> None:
    image = make_image(5)
    plain = ViewParams(Box(3, 2, 20, 20), False, 24, "bicubic")
    mirrored = ViewParams(Box(3, 2, 20, 20), True, 24, "bicubic")
    assert np.array_equal(render(image, plain)[:, ::-1], render(image, mirrored))


def test_a_crop_of_the_view_size_is_the_pixels_themselves() -> None:
    image = make_image(5)
    view = render(image, ViewParams(Box(7, 4, 24, 24), False, 24, "bicubic"))
    assert np.array_equal(view, np.asarray(image)[4:28, 7:31])


def test_the_rendered_view_may_be_written_to() -> None:
    assert render(make_image(5), ViewParams(Box(0, 0, 24, 24), False, 24, "bicubic")).flags.writeable


@pytest.mark.parametrize(("column", "value"), [(5, 18), (6, 1), (7, 1), (21, 3), (28, 3), (34, 1)])
def test_params_of_a_later_version_are_refused(column: int, value: int) -> None:
    row = ViewParams(Box(0, 0, 20, 20), False, 24, "bicubic").to_row()
    row[column] = value
    with pytest.raises(CorruptError, match="later version"):
        ViewParams.from_row(row, ALL_PLAN)


def test_params_that_the_plan_does_not_draw_are_refused() -> None:
    row = ViewParams(Box(0, 0, 20, 20), False, 24, "bicubic", ((1, 0),)).to_row()
    assert ViewParams.from_row(row, ALL_PLAN).ops == ((1, 0),)
    with pytest.raises(CorruptError, match="nothing that the plan's policy does not do"):
        ViewParams.from_row(row, plan_of("weak"))


@pytest.mark.parametrize(("mix", "partner"), [(Mix(2, 1, Box(0, 0, 0, 0), 4), None), (None, np.zeros((24, 24, 3), np.uint8))])
def test_a_mixed_view_takes_a_partner_and_no_other_does(mix: Mix | None, partner: np.ndarray | None) -> None:
    with pytest.raises(UsageError, match="partner"):
        render(make_image(1), ViewParams(Box(0, 0, 20, 20), False, 24, "bicubic", mix=mix), partner)


def test_a_crop_outside_the_image_is_refused() -> None:
    with pytest.raises(CorruptError, match="outside the image of 40x30"):
        render(make_image(1), ViewParams(Box(21, 0, 20, 20), False, 24, "bicubic"))


@pytest.mark.parametrize("crop", [{"scale": (0.5, 0.1)}, {"scale": (0, 1)}, {"scale": (0.1, 1.5)}, {"ratio": (2, 1)}, {"ratio": (0, 1)}])
def test_a_crop_range_that_cannot_be_is_refused(crop: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must satisfy"):
        RandomResizedCrop(**crop)  # type: ignore[arg-type]
