"""`frequency` on a cache of dct bands: what extract records for it, and that only the chosen bands are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY_VIT, TINY_VIT_ARGS, make_cache, tiny_model

from kdcache import methods
from kdcache.join import CachedViews
from kdcache.opening import open_cache
from pipelines.extract import ExtractConfig, extract
from pipelines.train import TrainConfig, train


def test_frequency_reads_the_chosen_bands_alone_and_loses_nothing_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_cache(tmp_path, num_shards=1, num_samples=4, views=1, targets=["logits"])
    teacher = f"local-dir:{tmp_path / 'teacher'}"
    extract(ExtractConfig(shards=str(tmp_path / "shards"), cache=str(plain), teacher=teacher, methods=["frequency"], workers=0))
    cache = open_cache(plain)
    target = "features@norm"
    assert cache.layer(None).targets[target].identity.encoding == "dct"
    settings = {"bands": ["low", "high"]}
    method = methods.build("frequency", student=tiny_model(**TINY_VIT_ARGS), cache=cache, settings=settings)
    assert method.target_parts() == {target: ["low", "high"]}
    losses = []
    for parts in ({}, method.target_parts()):
        dataset = CachedViews(cache, targets=[target], parts=parts)
        batch = dataset.__getitems__([(row, 0) for row in range(4)])
        components = batch["targets"][target]
        value = cache.encoding(cache.layer(None).name, target).decode(components)
        outputs = {"features@norm": torch.randn(4, 32, 4, 4, generator=torch.Generator().manual_seed(0))}
        losses.append(method.losses(outputs, batch["labels"], {target: value})["frequency"])
    assert {name.partition("_")[0] for name in components} == {"low", "high"}
    torch.testing.assert_close(losses[1], losses[0])
    read: set[str] = set()
    reader = type(cache).read_components

    def note(self: Any, *args: Any, **more: Any) -> Any:
        found = reader(self, *args, **more)
        read.update(found)
        return found

    monkeypatch.setattr(type(cache), "read_components", note)
    options: dict[str, Any] = {"epochs": 1, "batch_size": 4, "workers": 0, "device": "cpu", "num_classes": 10, "out": str(tmp_path / "runs")}
    train(
        TrainConfig(
            cache=str(plain),
            students=(TINY_VIT,),
            model_kwargs={"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2},
            method="frequency",
            settings=settings,
            **options,
        )
    )
    assert read == {"low", "low_scale", "high", "high_scale"}
    read.clear()
    train(
        TrainConfig(
            cache=str(plain),
            students=(TINY_VIT,),
            model_kwargs={"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2},
            method="kd+frequency+mimic",
            settings={"frequency.bands": ["low"]},
            **options,
        )
    )
    assert {"dc", "low", "mid", "high"} <= read  # mimic wants all
