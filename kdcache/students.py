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
from safetensors import SafetensorError
from torch import Tensor, nn

from .console import counted
from .errors import StoreError, StudentError, UsageError
from .pixels import Normalize
from .store.local import sync_folder
from .timm_models import build_model, built_size_of, input_size_of, mean_std_of, model_args_of

_OF_OTHER_WEIGHTS = ("tag", "license", "origin_url", "paper_ids", "paper_name", "notes")
"""Fields of a timm config that say something of its pretrained weights."""
_OF_OTHER_CLASSES = ("label_names", "label_descriptions")


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
    foreign = (*_OF_OTHER_CLASSES, *(() if pretrained else _OF_OTHER_WEIGHTS))  # or the export would carry them on
    model.pretrained_cfg = {name: value for name, value in (getattr(model, "pretrained_cfg", None) or {}).items() if name not in foreign}  # type: ignore[assignment]
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


def check_student(student: Student, *, batch_size: int) -> None:
    """Raise StudentError for a student that can't be trained on batches of so many images of its size, by a pass over black ones in training mode.

    Changes its statistics, and torch's global generator.
    """
    size = student.input_size
    images_BCHW = torch.zeros(min(batch_size, 2), 3, size, size)
    try:
        with torch.no_grad():
            output = student.model.train()(images_BCHW)
    except (RuntimeError, ValueError, AssertionError, LookupError, TypeError) as error:  # what models raise for a size that they do not take
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        larger = ", or a larger --batch-size" if batch_size == 1 else ""
        raise StudentError(
            f"student {student.name!r}: can't be trained on images of {size} x {size} pixels, {batch_size} a batch: {reason}; choose a student that"
            f" takes this size, a cache of views of another --size{larger}"
        ) from error
    if not isinstance(output, Tensor) or output.shape != (len(images_BCHW), student.num_classes):
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise StudentError(
            f"student {student.name!r}: expected logits ({len(images_BCHW)}, {student.num_classes}) of {len(images_BCHW)} images, found {found}; choose"
            f" a classifier"
        )


def export_student(student: Student, folder: Path, *, record: Mapping[str, Any], figures: Mapping[str, float]) -> None:
    """Write `folder` so that `timm.create_model("local-dir:FOLDER", pretrained=True)` gives this student: config.json,
    model.safetensors and a README.md card. It appears whole or not at all. Raises StoreError if it can't be written.

    record: what the student was trained from and how, JSON types, stored under "kdcache" in config.json (fingerprint, root, teacher,
    method, recipe). figures: name → measured value, for the card.
    """
    attempt = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        for old in folder.parent.glob(f"{folder.name}.*.tmp"):
            shutil.rmtree(old)
        _write_export(student, attempt, record, figures)
        for path in attempt.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(attempt)
        os.rename(attempt, folder)
        sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(attempt, ignore_errors=True)
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise StoreError(f"{folder}: can't be written: {reason}; the checkpoints are whole, run again with --resume") from error


def _write_export(student: Student, folder: Path, record: Mapping[str, Any], figures: Mapping[str, float]) -> None:
    from timm.models import save_for_hf

    save_for_hf(
        student.model,
        str(folder),
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
    (folder / "README.md").write_text(_card(student, record, figures), encoding="utf-8")


def _card(student: Student, record: Mapping[str, Any], figures: Mapping[str, float]) -> str:
    teachers = record.get("teachers") or [teacher for teacher in (record.get("teacher"),) if teacher]
    named = " and a cached ".join(f"`{teacher['model']}` (weights {teacher['weights']})" for teacher in teachers)
    taught = f"distilled from a cached {named}" if teachers else "trained on labels, with no teacher"
    recipe = "\n".join(f"| {name} | `{value}` |" for name, value in record.get("recipe", {}).items())
    measured = "\n".join(f"| {name} | {value:.6g} |" for name, value in figures.items())
    before = "".join(f" Its first {counted(other['epoch'], 'epoch')}: cache `{other['fingerprint']}`." for other in record.get("other_caches", []))
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
Input: {student.input_size} × {student.input_size} pixels, mean {student.mean}, std {student.std}; {counted(student.num_classes, "class")}.
The teacher's licence and the images' apply to this model as they do to any made from them.

| figure | value |
|---|---|
{measured}

| setting | value |
|---|---|
{recipe}
"""
