"""Methods: the registry, their settings, the weights that timm's rule gives, and the loss parts they return."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY_VIT_ARGS, make_cache, tiny_model

from kdcache import methods
from kdcache.cache import Cache, open_cache
from kdcache.errors import MissingError, UsageError
from kdcache.losses import kd
from kdcache.methods.base import Method
from kdcache.methods.kd import loss_weights
from kdcache.targets import parse_target


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return open_cache(make_cache(tmp_path_factory.mktemp("methods"), num_shards=1, num_samples=2, views=1))


def batch(num_classes: int = 10) -> tuple[torch.Tensor, torch.Tensor, dict[str, dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 32, 32, generator=generator)
    return images, torch.tensor([0, 1, 2, 9]), {"logits": {"logits": torch.randn(4, num_classes, generator=generator)}}


@pytest.mark.parametrize("name", list(methods.METHODS))
def test_every_method_describes_itself_and_gives_finite_parts_with_a_gradient(name: str, cache: Cache) -> None:
    method_class = methods.METHODS[name]
    assert method_class.name == name
    assert method_class.summary
    assert [parse_target(spec).name for spec in methods.requirements(name)] == [spec.partition(":")[0] for spec in methods.requirements(name)]
    student = tiny_model()
    method = methods.build(name, student=student, cache=cache)
    parts = method(*batch())
    assert all(part.ndim == 0 and part.isfinite() for part in parts.values())
    torch.stack(list(parts.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_kd_is_the_weighted_sum_of_both_losses(cache: Cache) -> None:
    student = tiny_model()
    images, labels, targets = batch()
    settings = {"temperature": 2.0, "distill_loss_weight": 0.3, "task_loss_weight": 0.6, "smoothing": 0.0}
    parts = methods.build("kd", student=student, cache=cache, settings=settings)(images, labels, targets)
    logits = student(images)
    torch.testing.assert_close(parts["distill"], 0.3 * kd(logits, targets["logits"]["logits"], temperature=2.0))
    torch.testing.assert_close(parts["task"], 0.6 * F.cross_entropy(logits, labels))


def test_kd_without_a_task_loss_never_looks_at_labels(cache: Cache) -> None:
    settings = {"task_loss_weight": 0.0}
    assert not methods.method_class("kd").uses_labels(methods.parse_settings("kd", settings))
    method = methods.build("kd", student=tiny_model(), cache=cache, settings=settings)
    images, labels, targets = batch()
    assert method(images, torch.full_like(labels, -1), targets).keys() == {"distill"}


def test_weights_follow_timms_rule() -> None:
    assert loss_weights(distill=None, task=None) == (1.0, 1.0)
    assert loss_weights(distill=2.0, task=0.5) == (2.0, 0.5)
    assert loss_weights(distill=2.0, task=None) == (2.0, 1.0)
    assert loss_weights(distill=None, task=0.25) == (0.75, 0.25)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"temprature": 2}, "no field 'temprature'; did you mean 'temperature'.*its fields: temperature, distill_loss_weight"),
        ({"temperature": 0}, "temperature: .*greater than 0"),
        ({"temperature": float("nan")}, "temperature: .*finite"),
        ({"temperature": "warm"}, "temperature: .*'warm'"),
        ({"task_loss_weight": 1.5}, "task loss weight 1.5 alone"),
    ],
)
def test_a_wrong_setting_is_a_usage_error_that_names_the_field(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        methods.parse_settings("kd", settings)


def test_an_unknown_method_names_the_near_and_known_ones(cache: Cache) -> None:
    with pytest.raises(UsageError, match=r"'kdd' is not known; did you mean 'kd'.*one of: ce, kd"):
        methods.build("kdd", student=tiny_model(), cache=cache)


def test_a_target_that_the_cache_lacks_names_the_command_that_adds_it(tmp_path: Path) -> None:
    cache = open_cache(make_cache(tmp_path, num_shards=1, num_samples=2, views=1, targets=["features@norm"]))
    with pytest.raises(MissingError, match=r"no target 'logits', it has: features@norm; run 'kdcache extract .*--target logits'"):
        methods.build("kd", student=tiny_model(), cache=cache)
    with pytest.raises(UsageError, match="no teacher 'other'"):
        methods.build("kd", student=tiny_model(), cache=cache, teacher="other")
    assert isinstance(methods.build("ce", student=tiny_model(), cache=cache), Method)


def test_parameters_that_the_student_keeps_from_decay_are_kept_from_it(cache: Cache) -> None:
    from timm.optim import create_optimizer_v2

    method = methods.build("kd", student=tiny_model(**TINY_VIT_ARGS), cache=cache)
    assert "student.pos_embed" in method.no_weight_decay()
    optimizer = create_optimizer_v2(method, opt="adamw", lr=1e-3, weight_decay=0.1)
    without = next(group for group in optimizer.param_groups if group["weight_decay"] == 0)["params"]
    assert any(parameter is method.student.pos_embed for parameter in without)
