"""Students: any timm model, built for the cache's views and exported so that timm loads it back. Stage two only.

A student has its own normalisation (its data config's mean and std). Views are given to it as they are where its architecture
takes their size; a model of a fixed size gets them resized on the device (`kdcache.pixels.Normalize`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import StudentError, UsageError
from .pixels import Normalize
from .timm_models import build_model, built_size_of, input_size_of, mean_std_of, model_args_of


@dataclass(frozen=True, kw_only=True)
class Student:
    """A model to be trained, and what its inputs look like."""

    name: str
    """As the user wrote it: a timm name, `hf-hub:…` or `local-dir:…`."""
    model: nn.Module
    model_args: Mapping[str, Any]
    """Constructor arguments beside the architecture's own, JSON types."""
    num_classes: int
    input_size: int
    """Side of the square input, pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    """Of the evaluation transform, from the model's data config."""
    crop_pct: float
    """Of the evaluation transform, from the model's data config."""
    crop_mode: str
    """Likewise: center, squash or border."""

    def normalize(self) -> Normalize:
        """From uint8 views to this student's input."""
        return Normalize(self.mean, self.std, self.input_size)


def build_student(
    name: str, *, num_classes: int, view_size: int, pretrained: bool = False, model_args: Mapping[str, Any] | None = None, seed: int = 0
) -> Student:
    """Build a student on the CPU, with weights that are a function of `seed` (or pretrained ones).

    model_args: constructor arguments; where they have no img_size and the constructor takes one, it gets `view_size`, pixels.
    Seeds torch's global generator. Raises StudentError, UsageError for num_classes among the arguments.
    """
    from timm.data import resolve_model_data_config

    given = dict(model_args or {})
    if "num_classes" in given:
        raise UsageError("--model-kwargs num_classes: pass --num-classes instead")
    if num_classes < 1:
        raise StudentError(f"student {name!r}: expected at least 1 class, found {num_classes}")
    given["num_classes"] = num_classes
    model, takes_size = _build(name, given, view_size=view_size, pretrained=pretrained, seed=seed)
    if takes_size:
        given.setdefault("img_size", view_size)
        if built_size_of(model) is None and isinstance(given["img_size"], int):  # CoAtNet, MaxViT: their data config keeps the size of the weights
            model.pretrained_cfg = {**(getattr(model, "pretrained_cfg", None) or {}), "input_size": (3, given["img_size"], given["img_size"])}  # type: ignore[assignment]
    config = resolve_model_data_config(model)
    fixed = takes_size or bool((getattr(model, "pretrained_cfg", None) or {}).get("fixed_input_size"))
    mean, std = mean_std_of(model)
    return Student(
        name=name,
        model=model,
        model_args=model_args_of(model, given),
        num_classes=num_classes,
        input_size=input_size_of(model) if fixed else view_size,
        mean=mean,
        std=std,
        interpolation=str(config["interpolation"]),
        crop_pct=float(config["crop_pct"]),
        crop_mode=str(config["crop_mode"]),
    )


def input_size_for(model: nn.Module, view_size: int) -> int:
    """Side of the images that a model is given for views of `view_size` pixels: its own where it is built for one size."""
    return (
        input_size_of(model)
        if built_size_of(model) is not None or (getattr(model, "pretrained_cfg", None) or {}).get("fixed_input_size")
        else view_size
    )


def _build(name: str, args: Mapping[str, Any], *, view_size: int, pretrained: bool, seed: int) -> tuple[nn.Module, bool]:
    """The model, and whether its constructor took an img_size."""

    def attempt(model_args: Mapping[str, Any]) -> nn.Module:
        torch.manual_seed(seed)
        return build_model(name, pretrained=pretrained, checkpoint=None, model_args=model_args, error=StudentError, role="student")

    if "img_size" in args:
        return attempt(args), True
    try:
        return attempt({**args, "img_size": view_size}), True
    except StudentError as error:
        if not isinstance(error.__cause__, TypeError) or "img_size" not in str(error.__cause__):
            raise
    return attempt(args), False


def export_student(student: Student, folder: Path, *, record: Mapping[str, Any], figures: Mapping[str, float]) -> None:
    """Write `folder` so that `timm.create_model("local-dir:FOLDER", pretrained=True)` gives this student: config.json,
    model.safetensors and a README.md card. It appears whole or not at all.

    record: what the student was trained from and how, JSON types, stored under "kdcache" in config.json (fingerprint, root, teacher,
    method, recipe). figures: name → measured value, for the card.
    """
    from timm.models import save_for_hf

    attempt = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    for old in folder.parent.glob(f"{folder.name}.*.tmp"):
        shutil.rmtree(old)
    save_for_hf(
        student.model,
        str(attempt),
        model_args=dict(student.model_args),
        model_config={"kdcache": dict(record)},
        data_config={
            "input_size": (3, student.input_size, student.input_size),
            "mean": student.mean,
            "std": student.std,
            "interpolation": student.interpolation,
            "crop_pct": student.crop_pct,
            "crop_mode": student.crop_mode,
        },
        safe_serialization=True,
    )
    (attempt / "README.md").write_text(_card(student, record, figures), encoding="utf-8")
    os.rename(attempt, folder)


def _card(student: Student, record: Mapping[str, Any], figures: Mapping[str, float]) -> str:
    teachers = record.get("teachers") or [teacher for teacher in (record.get("teacher"),) if teacher]
    named = " and a cached ".join(f"`{teacher['model']}` (weights {teacher['weights']})" for teacher in teachers)
    taught = f"distilled from a cached {named}" if teachers else "trained on labels, with no teacher"
    recipe = "\n".join(f"| {name} | `{value}` |" for name, value in record.get("recipe", {}).items())
    measured = "\n".join(f"| {name} | {value:.6g} |" for name, value in figures.items())
    before = "".join(f" Its first {other['epoch']} epochs: cache `{other['fingerprint']}`." for other in record.get("other_caches", []))
    averaged = " The weights are a moving average." if "model_ema_decay" in record.get("recipe", {}) else ""
    return f"""---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
- knowledge-distillation
- kdcache
---
# {student.name}, {taught}

```python
model = timm.create_model("local-dir:PATH/TO/THIS/FOLDER", pretrained=True)
```

Trained with kdcache, method `{record.get("method")}`, on the views of cache `{record.get("fingerprint")}` (root `{record.get("root")}`).{before}{averaged}
Input: {student.input_size} × {student.input_size} pixels, mean {student.mean}, std {student.std}; {student.num_classes} classes.
The teacher's licence and the images' apply to this model as they do to any made from them.

| figure | value |
|---|---|
{measured}

| setting | value |
|---|---|
{recipe}
"""
