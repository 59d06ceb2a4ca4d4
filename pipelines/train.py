"""Stage two: cache → replayed views + decoded targets → student + method → checkpoints → a timm model. Read top to bottom:
open, resolve, build, loop, export, report. No teacher is built here, or could be: the targets come from the cache.

A run's folder is named by a digest of all that decides its result, so that a repeated command finds its own work:

    OUT/<student>-<method>-<8 hex>/
        args.yaml            the resolved recipe and where the run was started
        summary.csv          one row an epoch, timm's columns
        metrics.jsonl        one line every --log-interval steps and one an epoch
        last/checkpoint.pt   resumable, after every epoch and every ten minutes; the one before is in previous/
        best/checkpoint.pt   of the epoch with the best eval_top1, with --val
        tensorboard/ wandb/  if asked for
        export/              timm.create_model("local-dir:…/export", pretrained=True); made last: a run that has it is finished

Legend: B batch.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from tqdm import tqdm

from kdcache.console import say
from kdcache.device import autocast, fitting_threads, resolve_device
from kdcache.errors import KDCacheError, StudentError, UsageError
from kdcache.evaluate import Evaluation, EvaluationSet, Evaluator
from kdcache.join import Batch, BatchLoader, CachedViews, EpochBatches, target_keys, to_device
from kdcache.losses import soft_labels
from kdcache.methods import TeacherChoice, build, method_class, uses_labels
from kdcache.methods.base import Method
from kdcache.plan import blake2b_128, canonical_json
from kdcache.students import Student, build_student, export_student
from kdcache.workers import naming_killed_workers

from .recipes import differences, how_to_continue, read_args
from .run_checkpoints import RunCheckpoints, can_resume, describe, describe_plan_differences
from .training_data import TrainingData, check_labels, open_data
from .watching import Watch, check_watchers, replace_file, write_summary

SCHEDULES = ("cosine", "tanh", "constant", "none")
"""timm's schedules that need no options beyond ours."""

AMP_DTYPES = {"float16": "fp16", "bfloat16": "bf16"}
"""timm's names of them → ours."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, how. Names and defaults follow timm's train.py; None means: the default named."""

    cache: str
    """Folder of the cache."""
    students: Sequence[str]
    """timm names, `hf-hub:…` or `local-dir:…`; trained one after another."""
    method: str = "kd"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the method."""
    teacher: TeacherChoice = None
    """Its name in the cache. Default: the only one. Several teach at once: their names, or name → weight in the loss."""
    data: str | None = None
    """SHARDS, where the tars lie now. Default: where they lay when the cache was made."""
    val: str | None = None
    """SHARDS to measure accuracy on. Default: none."""
    label_key: str | None = None
    """Key of the labels in the .json members of `val`. Default: as the cache's labels were read."""
    val_interval: int = 1
    """Epochs between two measurements; the last epoch is always measured."""
    val_crop_pct: float | None = None
    """Share of the side that the evaluation crop keeps. Default: the student's own."""
    out: str = "runs"
    limit_shards: int | None = None
    """Train on the first N shards of the cache only."""
    views: int | None = None
    """V: train on the first V views. Default: all that every shard has of what the method needs."""
    pretrained: bool = False
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Constructor arguments of the students."""
    num_classes: int | None = None
    """Default: the teacher's if the method uses logits, else the largest label + 1."""

    epochs: int = 100
    batch_size: int = 128
    seed: int = 42
    """Of the student's weights, its dropout and the order of the rows."""
    opt: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    """Of optimizers that have one, such as sgd."""
    opt_betas: tuple[float, float] | None = None
    """Default: the optimizer's own."""
    clip_grad: float | None = None
    """Largest gradient norm. Default: no clipping."""
    sched: str = "cosine"
    """One of SCHEDULES; stepped after every update."""
    warmup_epochs: float | None = None
    """Default: 5, or a tenth of the epochs if that is less."""
    min_lr: float = 0.0
    amp: bool = False
    """Autocast, in training and evaluation: products in half precision, sums, norms of losses and weights in float32."""
    amp_dtype: str = "float16"
    """One of AMP_DTYPES; float16 scales the loss, so that small gradients are not lost."""

    model_ema: bool = False
    """Keep a moving average of the student's weights: timm's ModelEmaV3. It is evaluated too, and is what is exported."""
    model_ema_decay: float = 0.9998
    model_ema_warmup: bool = False
    """Begin with a smaller decay, for runs of few updates."""

    kd_temperature: float | None = None
    """The method's field `temperature`; likewise the three below."""
    distill_loss_weight: float | None = None
    task_loss_weight: float | None = None
    smoothing: float | None = None

    check_views: float = 0.05
    """Fraction of views whose pixels are compared with the digest of what the teacher saw."""
    workers: int | None = None
    """Loading processes; 0: load in this one. Default: one a core, at most 8."""
    device: str | None = None
    """Default: cuda, else mps, else cpu."""
    channels_last: bool = False
    """Maps and convolutions with channels innermost: another speed, the same values but for rounding."""
    log_interval: int = 50
    """Steps between lines in metrics.jsonl."""
    recovery_interval: int | None = None
    """Steps between checkpoints within an epoch; 0: at its end only. Default: one every ten minutes."""
    log_tensorboard: bool = False
    """Event files in the run's tensorboard/."""
    log_wandb: bool = False
    wandb_project: str = "kdcache"
    resume: bool = False
    """Continue unfinished runs."""
    allow_other_cache: bool = False
    """With `resume`: continue a run that was begun with another cache or other rows."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that can't be right."""
        checks: list[tuple[str, Any, bool, str]] = [
            ("--student", list(self.students), len(self.students) > 0, "at least one"),
            ("--epochs", self.epochs, self.epochs >= 1, "at least 1"),
            ("--batch-size", self.batch_size, self.batch_size >= 1, "at least 1"),
            ("--lr", self.lr, math.isfinite(self.lr) and self.lr > 0, "a number above 0"),
            ("--min-lr", self.min_lr, math.isfinite(self.min_lr) and self.min_lr >= 0, "a number from 0"),
            ("--weight-decay", self.weight_decay, math.isfinite(self.weight_decay) and self.weight_decay >= 0, "a number from 0"),
            ("--clip-grad", self.clip_grad, self.clip_grad is None or self.clip_grad > 0, "a number above 0"),
            ("--warmup-epochs", self.warmup_epochs, self.warmup_epochs is None or self.warmup_epochs >= 0, "a number from 0"),
            ("--check-views", self.check_views, 0 <= self.check_views <= 1, "a fraction from 0 to 1"),
            ("--val-crop-pct", self.val_crop_pct, self.val_crop_pct is None or 0 < self.val_crop_pct <= 1, "a fraction above 0, at most 1"),
            ("--limit-shards", self.limit_shards, self.limit_shards is None or self.limit_shards >= 1, "at least 1"),
            ("--views", self.views, self.views is None or self.views >= 1, "at least 1"),
            ("--val-interval", self.val_interval, self.val_interval >= 1, "at least 1"),
            ("--num-classes", self.num_classes, self.num_classes is None or self.num_classes >= 1, "at least 1"),
            ("--log-interval", self.log_interval, self.log_interval >= 1, "at least 1"),
            ("--recovery-interval", self.recovery_interval, self.recovery_interval is None or self.recovery_interval >= 0, "at least 0"),
            ("--model-ema-decay", self.model_ema_decay, 0 <= self.model_ema_decay < 1, "a number from 0, below 1"),
            ("--sched", self.sched, self.sched in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("--amp-dtype", self.amp_dtype, self.amp_dtype in AMP_DTYPES, f"one of {', '.join(AMP_DTYPES)}"),
            ("--seed", self.seed, 0 <= self.seed < 2**63, "a whole number from 0, below 2^63"),
        ]
        for option, value, holds, expected in checks:
            if not holds:
                raise UsageError(f"{option} {value!r}: expected {expected}")
        if self.allow_other_cache and not self.resume:
            raise UsageError("--allow-other-cache: a run begun now has no other cache; expected it with --resume")

    @property
    def precision(self) -> str:
        """As `kdcache.device.autocast` calls it."""
        return AMP_DTYPES[self.amp_dtype] if self.amp else "fp32"


def train(config: TrainConfig, *, progress: bool = False) -> list[dict[str, Any]]:
    """Run stage two: every student in turn. Returns [{"id", "student", "method", "epochs", "top1", "seconds", "path", "status"}].

    top1 is in percent, of the exported weights, None without --val; status is "done" or "already done". Raises KDCacheError; runs
    that ended before the error stay, and are skipped when the command is repeated with --resume.
    """
    return list(train_each(config, progress=progress))


def train_each(config: TrainConfig, *, progress: bool = False) -> Iterator[dict[str, Any]]:
    """`train`, each run's entry as soon as the run ends, for callers that report what is done when a later run fails.

    All students are built once before the first is trained. Of a run that fails the entry has status "failed", and the epochs that are kept;
    then its error is raised.
    """
    check_watchers(tensorboard=config.log_tensorboard, wandb=config.log_wandb)
    data = open_data(config)
    runs = [_Run(config, data, name) for name in config.students]
    for run in runs:
        run.check_folder()
    for run in runs:
        run.check_build()
    for run in runs:
        try:
            entry = run.train(progress=progress)
        except KDCacheError:
            yield run.failed()
            raise
        yield entry


# --- one student -----------------------------------------------------------------------------------------------------


class _Run:
    """One student's training, from its folder to its export."""

    def __init__(self, config: TrainConfig, data: TrainingData, student_name: str) -> None:
        self.config, self.data, self.student_name = config, data, student_name
        self.recipe = self._resolve()
        self.id = f"{_folder_name(student_name)}-{_folder_name(method_class(config.method).name)}-{blake2b_128(canonical_json(self.recipe))[:8]}"
        self.folder = Path(config.out).expanduser().absolute() / self.id
        self._loop: _Loop | None = None

    def _resolve(self) -> dict[str, Any]:
        """Everything that decides the result, JSON types. Workers, device, memory format, places and intervals are not here."""
        config, data = self.config, self.data
        return {
            "student": self.student_name,
            "pretrained": config.pretrained,
            "model_kwargs": dict(config.model_kwargs),
            "num_classes": data.num_classes,
            "method": config.method.replace(" ", ""),
            **({"teachers": data.teachers} if len(data.teachers) > 1 else {}),
            "settings": data.settings.to_json(),
            "epochs": config.epochs,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "opt": config.opt,
            "lr": config.lr,
            "weight_decay": config.weight_decay,
            "momentum": config.momentum,
            "opt_betas": list(config.opt_betas) if config.opt_betas is not None else None,
            "clip_grad": config.clip_grad,
            "sched": config.sched,
            "warmup_epochs": min(5.0, config.epochs / 10) if config.warmup_epochs is None else float(config.warmup_epochs),
            "min_lr": config.min_lr,
            **({"amp": True, "amp_dtype": config.amp_dtype} if config.amp else {}),
            "val_crop_pct": config.val_crop_pct,
            "val_interval": config.val_interval,
            **({"model_ema_decay": config.model_ema_decay, "model_ema_warmup": config.model_ema_warmup} if config.model_ema else {}),
            "data": data.describe(),
        }

    @property
    def export(self) -> Path:
        return self.folder / "export"

    @property
    def is_finished(self) -> bool:
        return self.export.is_dir()

    def checkpoints(self) -> RunCheckpoints:
        """Those of its folder."""
        config = self.config
        return RunCheckpoints(self.folder, self.data.cache, interval=config.recovery_interval, allow_other_cache=config.allow_other_cache)

    def check_folder(self) -> None:
        """Raise StudentError for an unfinished run that was not asked to be resumed: nothing is overwritten.

        Likewise for a run that was to be resumed and is not there while another of the same student and method is unfinished: most
        likely that one was meant.
        """
        if not self.config.resume and not self.is_finished and self.folder.exists():
            raise StudentError(
                f"run {self.folder} is there already and unfinished; pass --resume to continue it, or delete the folder to begin again"
            )
        if self.config.resume and not self.folder.exists():
            self._find_another()

    def _find_another(self) -> None:
        """Take the folder of a run that went on with another cache, or may; raise StudentError if the one that was meant can't be told."""
        ours = json.loads(canonical_json(self.recipe))
        differing: list[tuple[int, str, list[tuple[str, Any, Any]]]] = []
        for path in sorted(self.folder.parent.glob(f"{glob.escape(self.id.rpartition('-')[0])}-*/args.yaml")):
            theirs = read_args(path)
            found = list(differences(theirs, ours)) if all(theirs.get(name) == ours[name] for name in ("student", "method")) else None
            if found == []:
                self.folder, self.id = path.parent, path.parent.name
                return
            if found and can_resume(path.parent) and not (path.parent / "export").is_dir():
                differing.append((len(found), str(path.parent), found))
        if not differing:
            return
        of_others = [folder for _, folder, found in differing if all(name.startswith("data.") for name, _, _ in found)]
        if self.config.allow_other_cache and of_others:
            if len(of_others) > 1:
                raise StudentError(
                    f"--allow-other-cache: {len(of_others)} unfinished runs differ from this command in their data only: {', '.join(of_others)};"
                    f" delete or finish all but one"
                )
            self.folder = Path(of_others[0])
            self.id = self.folder.name
            return
        count, folder, found = min(differing)
        field_name, theirs_value, ours_value = found[0]
        more = f" (and {count - 1} more)" if count > 1 else ""
        is_other = folder in of_others and field_name == "data.fingerprint"
        views = describe_plan_differences(read_args(Path(folder, "args.yaml")).get("plan"), self.data.cache) if is_other else ""
        allow = ", pass --allow-other-cache to continue it with this cache" if is_other else ""
        raise StudentError(
            f"--resume: no run {self.folder}, but {folder} of the same student and method is unfinished: field {field_name!r}{more} differs: that run"
            f" has {theirs_value!r}, this command {ours_value!r}; {views}{how_to_continue(field_name, theirs_value)}{allow}, or drop --resume to begin"
            f" a new run"
        )

    def check_build(self) -> None:
        """Raise whatever building this student, its method, its optimizer and its evaluation raises, before any other student is trained."""
        if self.is_finished:
            return
        if uses_labels(self.config.method, self.data.settings):
            check_labels(self.data, self.config)
        resolve_device(self.config.device)
        student, method = self._build()
        _optimizer(method, self.config)
        self._evaluator(student, workers=0)

    def train(self, *, progress: bool) -> dict[str, Any]:
        """Do what is left to do of this run; its entry in the report."""
        if self.is_finished:
            final = self.checkpoints().load_final(best=False)
            return self._report(final["history"], final["seconds"], "already done")
        device = resolve_device(self.config.device)
        workers = min(8, os.cpu_count() or 1) if self.config.workers is None else self.config.workers
        student, method = self._build()
        evaluator = self._evaluator(student, workers)
        self._loop = loop = _Loop(self, student, method, device)
        self.folder.mkdir(parents=True, exist_ok=True)
        loop.checkpoints.remove_debris()
        if (state := loop.checkpoints.load()) is not None:
            loop.load(state)
        self._write_args(device, workers)
        with fitting_threads(method, device), naming_killed_workers():
            loop.train(evaluator, workers, progress=progress)
        self._export(loop)
        return self._report(loop.history, loop.seconds, "done")

    def failed(self) -> dict[str, Any]:
        """The report's entry of a run whose `train` raised."""
        loop = self._loop
        return self._report(loop.history, loop.seconds, "failed") if loop is not None else self._report([], 0.0, "failed")

    def _build(self) -> tuple[Student, Method[Any]]:
        """The student and the method around it, on the CPU; both a function of the seed, or of pretrained weights."""
        config, data = self.config, self.data
        student = build_student(
            self.student_name,
            num_classes=data.num_classes,
            view_size=data.cache.plan.size,
            pretrained=config.pretrained,
            model_args=config.model_kwargs,
            seed=config.seed,
        )
        method = build(config.method, student=student.model, cache=data.cache, teacher=data.teachers, settings=data.settings.to_json())
        return student, method

    def _evaluator(self, student: Student, workers: int) -> Evaluator | None:
        if not self.data.val:
            return None
        dataset = EvaluationSet(self.data.val, student, crop_pct=self.config.val_crop_pct)
        return Evaluator(dataset, batch_size=self.config.batch_size, num_workers=workers)

    def _write_args(self, device: torch.device, workers: int) -> None:
        config = self.config
        places = {"cache": self.data.cache.store.url, "root": self.data.cache.root, "shards_from": config.data, "val_from": config.val}
        session = {
            "device": str(device),
            "channels_last": config.channels_last,
            "workers": workers,
            "check_views": config.check_views,
            "log_interval": config.log_interval,
        }
        settings = self._loop.method.settings.to_json() if self._loop is not None else {}
        resolved = {"resolved_settings": settings} if settings != self.recipe["settings"] else {}  # a preset that the pair chose, filled in
        body = {"id": self.id, **self.recipe, **resolved, "plan": self.data.cache.plan.to_json(), "places": places, "session": session}
        text = yaml.safe_dump(body, sort_keys=False, allow_unicode=True)
        replace_file(self.folder / "args.yaml", text)

    def _export(self, loop: _Loop) -> None:
        """The best epoch's weights with --val, else the last one's; with --model-ema their moving average."""
        cache, history = self.data.cache, loop.history
        final = history[_best_epoch(history)] if self.data.val else history[-1]
        if self.data.val:
            loop.load_weights(loop.checkpoints.load_final(best=True))
        identities = {name: cache.layer(name).document.identity for name in self.data.teachers}
        teachers = [{"name": name, "model": one.model, "weights": one.weights} for name, one in identities.items()]
        record = {
            "fingerprint": cache.fingerprint,
            "root": cache.root,
            **({"teachers": teachers} if len(teachers) > 1 else {"teacher": next(iter(teachers), None)}),
            "method": self.config.method,
            "recipe": {key: value for key, value in self.recipe.items() if key != "data"} | {"settings": loop.method.settings.to_json()},
            **({"other_caches": loop.other_caches} if loop.other_caches else {}),
        }
        crop_pct = loop.student.crop_pct if self.config.val_crop_pct is None else self.config.val_crop_pct  # of the figures
        student = dataclasses.replace(loop.student, model=loop.weights_to_export, crop_pct=crop_pct)
        student.model.cpu().to(memory_format=torch.contiguous_format)  # as safetensors wants it
        export_student(student, self.export, record=record, figures=final)

    def _report(self, history: Sequence[Mapping[str, Any]], seconds: float, status: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "student": self.student_name,
            "method": self.config.method,
            "epochs": len(history),
            "top1": history[_best_epoch(history)]["eval_top1"] if any("eval_top1" in row for row in history) else None,
            "seconds": round(seconds, 3),
            "path": str(self.folder),
            "status": status,
        }


def _folder_name(student_name: str) -> str:
    """The student's name without its source, as far as that can stand in a path."""
    base = (student_name.partition(":")[2] or student_name).rstrip("/").rpartition("/")[2]
    return "".join(c if c.isascii() and (c.isalnum() or c in "._+-") else "-" for c in base).lstrip("._-")[:80] or "student"


def _best_epoch(history: Sequence[Mapping[str, Any]]) -> int:
    """The first epoch with the highest eval_top1, of those that were measured."""
    measured = [epoch for epoch, row in enumerate(history) if "eval_top1" in row]
    return max(measured, key=lambda epoch: (history[epoch]["eval_top1"], -epoch))


# --- the loop --------------------------------------------------------------------------------------------------------


class _Loop:
    """Epochs, from the one that the checkpoint is before to the last; each ends in a checkpoint."""

    def __init__(self, run: _Run, student: Student, method: Method[Any], device: torch.device) -> None:
        self.run, self.student, self.device = run, student, device
        self.config, self.data = run.config, run.data
        self.method = method.to(device)
        self.memory_format = torch.channels_last if self.config.channels_last else torch.contiguous_format
        self.method.to(memory_format=self.memory_format)
        self.normalize = student.normalize().to(device)
        data = self.data
        self.batches = EpochBatches(data.row_numbers, batch_size=self.config.batch_size, num_views=data.num_views, seed=self.config.seed)
        self.encodings = {key: data.cache.encoding(*one) for key, one in target_keys(data.targets).items()}
        self.optimizer = _optimizer(self.method, self.config)
        self.scheduler = self._scheduler()
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.config.precision == "fp16")
        self.checkpoints = run.checkpoints()
        self.ema = _model_ema(student.model, self.config)
        self.epoch = 0
        self.step = 0
        """Steps of the epoch that are done."""
        self.sums: dict[str, float] = {}
        """Loss parts, summed over them."""
        self.history: list[dict[str, Any]] = []
        self.other_caches: list[dict[str, Any]] = []
        """Those that the run was trained on before, each for so many epochs from the first."""
        self.seconds = 0.0
        self.epoch_seconds = 0.0
        self._counted = time.perf_counter()

    def _scheduler(self) -> Any:
        """timm's, stepped after every update; None for --sched none."""
        from timm.scheduler import create_scheduler_v2

        scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched=self.config.sched,
            num_epochs=self.config.epochs,
            min_lr=self.config.min_lr,
            warmup_epochs=self.run.recipe["warmup_epochs"],
            warmup_lr=min(1e-5, self.config.lr),
            step_on_epochs=False,
            updates_per_epoch=len(self.batches),
        )
        return scheduler

    def train(self, evaluator: Evaluator | None, workers: int, *, progress: bool) -> None:
        """All epochs that are left. Raises StudentError for a loss that is not finite."""
        run, total, steps = self.run, self.config.epochs, len(self.batches)
        if self.history:
            write_summary(run.folder / "summary.csv", self.history)
        if self.epoch >= total:
            return
        parts = self.method.target_parts()
        teacher = next(iter(self.data.teachers), None)  # of several each target says whose it is
        dataset = CachedViews(self.data.cache, teacher=teacher, targets=tuple(self.encodings), parts=parts, check_views=self.config.check_views)
        loader = BatchLoader(dataset, self.batches, num_workers=workers, pin_memory=self.device.type == "cuda")
        images = steps * self.batches.batch_size
        done = self.epoch * images + self.step * self.batches.batch_size
        bar = tqdm(total=total * images, initial=done, unit="img", unit_scale=True, desc=run.id, disable=not progress)
        watch = self._watch()
        self._counted = time.perf_counter()
        try:
            while self.epoch < total:
                row = {"epoch": self.epoch, **self._train_epoch(loader, bar, watch)}
                measured = evaluator is not None and ((self.epoch + 1) % self.config.val_interval == 0 or self.epoch + 1 == total)
                if evaluator is not None and measured:
                    row |= self._evaluate(evaluator)
                row["lr"] = sum(group["lr"] for group in self.optimizer.param_groups) / len(self.optimizer.param_groups)
                self._count_seconds()
                self.history.append(row)
                watch.write({**row, "images": images, "seconds": round(self.epoch_seconds, 3)})
                self.epoch, self.step, self.sums, self.epoch_seconds = self.epoch + 1, 0, {}, 0.0
                watch.flush()
                if measured and _best_epoch(self.history) == len(self.history) - 1:
                    self.checkpoints.save_best(self._state())  # before last/: a kill between the two repeats what came after the last one
                self.checkpoints.save(self._state())
                write_summary(run.folder / "summary.csv", self.history)
        finally:
            bar.close()
            loader.close()
            watch.close(failed=self.epoch < total)

    def _train_epoch(self, loader: BatchLoader, bar: tqdm[Any], watch: Watch) -> dict[str, float]:
        """What is left of an epoch; {"train_loss", "train_<part>"…}: means over all its images."""
        steps, epoch, total = len(loader), self.epoch, self.config.epochs
        self.method.train()
        for batch in loader.epoch(epoch, start=self.step):
            losses = self._step(batch, self.step)
            self.step += 1
            for name, value in losses.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            updates = epoch * steps + self.step
            if self.scheduler is not None:
                self.scheduler.step_update(num_updates=updates)
            if self.ema is not None:
                self.ema.update(self.method.student, step=updates)
            bar.update(len(batch["labels"]))
            shown = {name: f"{value:.3f}" for name, value in losses.items()}
            bar.set_postfix({"epoch": f"{epoch + 1}/{total}", **shown, **self._last_top1()}, refresh=False)
            if self.step % self.config.log_interval == 0:
                watch.write({"epoch": epoch, "step": self.step, **losses, "lr": self.optimizer.param_groups[0]["lr"]})
            if self.step < steps and self.checkpoints.is_due(self.step):
                self._count_seconds()
                watch.flush()
                self.checkpoints.save(self._state())
        return {f"train_{name}": value / steps for name, value in self.sums.items()}

    def _step(self, batch: Batch, step: int) -> dict[str, float]:
        """One update; {"loss", part…} as numbers."""
        device = self.device
        images_BCHW = self.normalize(batch["views"].to(device, non_blocking=True)).contiguous(memory_format=self.memory_format)
        labels = batch["labels"].to(device, non_blocking=True)
        if "label_weights" in batch and self.method.needs_labels_with(self.method.settings):
            partners_B, weights_B = (batch[name].to(device, non_blocking=True) for name in ("partner_labels", "label_weights"))
            labels = soft_labels(labels, partners_B, weights_B, self.data.num_classes)
        targets = {target: encoding.decode(to_device(batch["targets"][target], device)) for target, encoding in self.encodings.items()}
        with autocast(device, self.config.precision):
            parts = self.method(images_BCHW, labels, targets)
        loss = torch.stack(list(parts.values())).sum()
        values = dict(zip(["loss", *parts], torch.stack([loss, *parts.values()]).tolist(), strict=True))  # one transfer a step
        if not all(math.isfinite(value) for value in values.values()):
            shown = ", ".join(f"{name} {value:g}" for name, value in values.items())
            raise StudentError(
                f"student {self.student.name}: the loss is not finite in epoch {self.epoch}, step {step + 1} of {len(self.batches)} ({shown});"
                f" expected a number; try a smaller --lr, or --clip-grad 1; run {self.run.folder} keeps its last checkpoint"
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if self.config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.method.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)  # without fp16 the scaler does nothing of its own
        self.scaler.update()
        return values

    def _last_top1(self) -> dict[str, str]:
        measured = [row["eval_top1"] for row in self.history if "eval_top1" in row]
        return {"top1": f"{measured[-1]:.2f}"} if measured else {}

    @property
    def weights_to_export(self) -> nn.Module:
        """The student with the weights that count: their moving average, if there is one."""
        model: nn.Module = self.ema.module if self.ema is not None else self.student.model
        return model

    def _evaluate(self, evaluator: Evaluator) -> dict[str, float]:
        """{"eval_loss", "eval_top1", "eval_top5"} of what is exported; of a moving average also "eval_raw_…", of the weights it is of."""
        models = {"eval": self.weights_to_export, **({"eval_raw": self.method.student} if self.ema is not None else {})}
        row: dict[str, float] = {}
        for name, model in models.items():
            evaluation = evaluator(model, self.device, self.config.precision)
            row |= {f"{name}_loss": evaluation.loss, f"{name}_top1": evaluation.top1, f"{name}_top5": evaluation.top5}
            if name == "eval":
                self._say_skipped(evaluation)
        return row

    def _say_skipped(self, evaluation: Evaluation) -> None:
        if evaluation.skipped and not any("eval_top1" in row for row in self.history):
            say(f"--val: {len(evaluation.skipped)} images can't be read and are left out; first: {evaluation.skipped[0]}")

    # --- state ---

    def _state(self) -> dict[str, Any]:
        """All that decides what comes next, and what was measured."""
        generators = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "recipe": self.run.recipe,
            "epoch": self.epoch,
            "step": self.step,
            "sums": self.sums,
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else {},
            "scaler": self.scaler.state_dict(),
            "generators": generators,
            "history": self.history,
            "seconds": self.seconds,
            "epoch_seconds": self.epoch_seconds,
            **({"ema": self.ema.module.state_dict()} if self.ema is not None else {}),
            **({"other_caches": self.other_caches} if self.other_caches else {}),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint as if nothing had happened. Raises StudentError for one of another recipe.

        With other data, if that is allowed, an epoch that was begun is begun again.
        """
        recipe, theirs = self.run.recipe, state["recipe"]
        changed = sorted(key for key in {*recipe, *theirs} if theirs.get(key) != recipe.get(key))
        if changed and not (changed == ["data"] and self.config.allow_other_cache):
            raise StudentError(
                f"run {self.run.folder}: its checkpoint was made with other settings ({', '.join(changed)}), expected this run's;"
                f" delete the folder to begin again"
            )
        try:
            self.load_weights(state)
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:  # what torch raises for another model's state
            raise StudentError(
                f"run {self.run.folder}: its checkpoint does not hold this run's weights and optimizer ({error}); it was not written by this run:"
                f" delete the folder to begin again"
            ) from error
        self.epoch, self.history, self.seconds = state["epoch"], list(state["history"]), state["seconds"]
        self.other_caches = list(state.get("other_caches", []))
        if changed:
            name, before, now = next(differences(theirs["data"], recipe["data"], "data."))
            say(f"run {self.run.id}: goes on with other data {describe(state)}: {name} was {before!r}, is {now!r}")
            self.other_caches.append({name: state[name] for name in ("fingerprint", "root", "epoch")})
        else:
            self.step, self.sums = state.get("step", 0), dict(state.get("sums", {}))
            self.epoch_seconds = state.get("epoch_seconds", 0.0)
        torch.set_rng_state(state["generators"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["generators"]:
            torch.cuda.set_rng_state(state["generators"]["cuda"], self.device)

    def load_weights(self, state: Mapping[str, Any]) -> None:
        """Those of the method, with its student, and their moving average."""
        self.method.load_state_dict(state["method"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])

    # --- what is shown ---

    def _watch(self) -> Watch:
        config, run = self.config, self.run
        return Watch(
            run.folder,
            run_id=run.id,
            recipe=run.recipe,
            steps=len(self.batches),
            epoch=self.epoch,
            step=self.step,
            tensorboard=config.log_tensorboard,
            wandb_project=config.wandb_project if config.log_wandb else None,
        )

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.seconds, self.epoch_seconds, self._counted = self.seconds + now - self._counted, self.epoch_seconds + now - self._counted, now


def _model_ema(model: nn.Module, config: TrainConfig) -> Any:
    """timm's moving average of the student, on its device; None without --model-ema."""
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=config.model_ema_decay, use_warmup=config.model_ema_warmup) if config.model_ema else None


def _optimizer(method: Method[Any], config: TrainConfig) -> torch.optim.Optimizer:
    """timm's optimizer over every parameter of the method that wants a gradient. Raises UsageError for one that timm lacks."""
    from timm.optim import create_optimizer_v2, list_optimizers

    known = [str(name) for name in list_optimizers()]
    if config.opt.removeprefix("lookahead_") not in known:
        near = difflib.get_close_matches(config.opt, known, n=3) or ["adamw", "sgd"]
        raise UsageError(f"--opt {config.opt!r}: timm has no such optimizer; near ones: {', '.join(near)}")
    betas: dict[str, Any] = {"betas": config.opt_betas} if config.opt_betas is not None else {}
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            method, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum, **betas
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"--opt {config.opt}: timm can't build it with {betas} and momentum {config.momentum}: {error}") from error
    if betas and "betas" not in optimizer.defaults:  # timm drops what an optimizer does not take
        raise UsageError(f"--opt-betas {config.opt_betas}: {config.opt} has no betas; leave the option out")
    return optimizer
