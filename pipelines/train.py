"""Stage two: cache → replayed views + decoded targets → student + method → checkpoints → a timm model. Read top to bottom:
open, resolve, build, loop, export, report. No teacher is built here, or could be: the targets come from the cache.

A run's folder is named by a digest of all that decides its result, so that a repeated command finds its own work:

    OUT/<student>-<method>-<8 hex>/
        args.yaml            the resolved recipe and where the run was started
        summary.csv          one row an epoch, timm's columns
        metrics.jsonl        one line every --log-interval steps and one an epoch
        last/checkpoint.pt   resumable, after every epoch
        best/checkpoint.pt   of the epoch with the best eval_top1, with --val
        export/              timm.create_model("local-dir:…/export", pretrained=True); made last: a run that has it is finished

Legend: B batch.
"""

from __future__ import annotations

import csv
import difflib
import glob
import io
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

from kdcache.checkpoint import load_checkpoint, save_checkpoint
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
from .training_data import TrainingData, check_labels, open_data

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
    resume: bool = False
    """Continue unfinished runs."""

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
            ("--sched", self.sched, self.sched in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("--amp-dtype", self.amp_dtype, self.amp_dtype in AMP_DTYPES, f"one of {', '.join(AMP_DTYPES)}"),
            ("--seed", self.seed, 0 <= self.seed < 2**63, "a whole number from 0, below 2^63"),
        ]
        for option, value, holds, expected in checks:
            if not holds:
                raise UsageError(f"{option} {value!r}: expected {expected}")

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
        self.last = self.folder / "last" / "checkpoint.pt"
        self.best = self.folder / "best" / "checkpoint.pt"
        self.export = self.folder / "export"
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
            "data": data.describe(),
        }

    @property
    def is_finished(self) -> bool:
        return self.export.is_dir()

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
            self._refuse_another()

    def _refuse_another(self) -> None:
        ours = json.loads(canonical_json(self.recipe))
        differing: list[tuple[int, str, tuple[str, Any, Any]]] = []
        for path in sorted(self.folder.parent.glob(f"{glob.escape(self.id.rpartition('-')[0])}-*/args.yaml")):
            theirs = read_args(path)
            same = all(theirs.get(name) == ours[name] for name in ("student", "method"))
            unfinished = (path.parent / "last" / "checkpoint.pt").is_file() and not (path.parent / "export").is_dir()
            if same and unfinished and (differing_fields := list(differences(theirs, ours))):
                differing.append((len(differing_fields), str(path.parent), differing_fields[0]))
        if differing:
            count, folder, (field_name, theirs_value, ours_value) = min(differing)
            more = f" (and {count - 1} more)" if count > 1 else ""
            raise StudentError(
                f"--resume: no run {self.folder}, but {folder} of the same student and method is unfinished: field {field_name!r}{more} differs: that run"
                f" has {theirs_value!r}, this command {ours_value!r}; {how_to_continue(field_name, theirs_value)}, or drop --resume to begin a new run"
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
            state = load_checkpoint(self.last, fingerprint=self.data.cache.fingerprint)
            return self._report(state["history"], state["seconds"], "already done")
        device = resolve_device(self.config.device)
        workers = min(8, os.cpu_count() or 1) if self.config.workers is None else self.config.workers
        student, method = self._build()
        evaluator = self._evaluator(student, workers)
        self._loop = loop = _Loop(self, student, method, device)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.last.is_file():
            loop.load(load_checkpoint(self.last, fingerprint=self.data.cache.fingerprint))
        self._write_args(device, workers)
        with fitting_threads(method, device), naming_killed_workers():
            loop.train(evaluator, workers, progress=progress)
        self._export(student, method, loop.history)
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
        body = {"id": self.id, **self.recipe, **resolved, "places": places, "session": session}
        text = yaml.safe_dump(body, sort_keys=False, allow_unicode=True)
        _replace_file(self.folder / "args.yaml", text)

    def _export(self, student: Student, method: Method[Any], history: Sequence[Mapping[str, Any]]) -> None:
        """The best epoch's weights with --val, else the last one's."""
        cache = self.data.cache
        final = history[_best_epoch(history)] if self.data.val else history[-1]
        if self.data.val:
            method.load_state_dict(load_checkpoint(self.best, fingerprint=cache.fingerprint)["method"])
        identities = {name: cache.layer(name).document.identity for name in self.data.teachers}
        teachers = [{"name": name, "model": one.model, "weights": one.weights} for name, one in identities.items()]
        record = {
            "fingerprint": cache.fingerprint,
            "root": cache.root,
            **({"teachers": teachers} if len(teachers) > 1 else {"teacher": next(iter(teachers), None)}),
            "method": self.config.method,
            "recipe": {key: value for key, value in self.recipe.items() if key != "data"} | {"settings": method.settings.to_json()},
        }
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
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0

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
        run, total = self.run, self.config.epochs
        self._rewrite_logs()
        if self.epoch >= total:
            return
        parts = self.method.target_parts()
        teacher = next(iter(self.data.teachers), None)  # of several each target says whose it is
        dataset = CachedViews(self.data.cache, teacher=teacher, targets=tuple(self.encodings), parts=parts, check_views=self.config.check_views)
        loader = BatchLoader(dataset, self.batches, num_workers=workers, pin_memory=self.device.type == "cuda")
        images = len(self.batches) * self.batches.batch_size
        bar = tqdm(total=total * images, initial=self.epoch * images, unit="img", unit_scale=True, desc=run.id, disable=not progress)
        try:
            while self.epoch < total:
                begin = time.perf_counter()
                row = {"epoch": self.epoch, **self._train_epoch(loader, bar)}
                measured = evaluator is not None and ((self.epoch + 1) % self.config.val_interval == 0 or self.epoch + 1 == total)
                if evaluator is not None and measured:
                    evaluation = evaluator(self.method.student, self.device, self.config.precision)
                    row |= {"eval_loss": evaluation.loss, "eval_top1": evaluation.top1, "eval_top5": evaluation.top5}
                    self._say_skipped(evaluation)
                row["lr"] = sum(group["lr"] for group in self.optimizer.param_groups) / len(self.optimizer.param_groups)
                self.history.append(row)
                self.epoch += 1
                self.seconds += time.perf_counter() - begin
                if measured and _best_epoch(self.history) == len(self.history) - 1:
                    self._save(run.best)  # before last/: a kill between the two repeats this epoch
                self._save(run.last)
                self._log({**row, "images": images, "seconds": round(time.perf_counter() - begin, 3)})
                self._write_summary()
        finally:
            bar.close()
            loader.close()

    def _train_epoch(self, loader: BatchLoader, bar: tqdm[Any]) -> dict[str, float]:
        """{"train_loss", "train_<part>"…}: means over the epoch's images."""
        steps, epoch, total = len(loader), self.epoch, self.config.epochs
        sums: dict[str, float] = {}
        self.method.train()
        for step, batch in enumerate(loader.epoch(epoch)):
            losses = self._step(batch, step)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value
            if self.scheduler is not None:
                self.scheduler.step_update(num_updates=epoch * steps + step + 1)
            bar.update(len(batch["labels"]))
            shown = {name: f"{value:.3f}" for name, value in losses.items()}
            bar.set_postfix({"epoch": f"{epoch + 1}/{total}", **shown, **self._last_top1()}, refresh=False)
            if (step + 1) % self.config.log_interval == 0:
                self._log({"epoch": epoch, "step": step + 1, **losses, "lr": self.optimizer.param_groups[0]["lr"]})
        return {f"train_{name}": value / steps for name, value in sums.items()}

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
                f" expected a number; try a smaller --lr, or --clip-grad 1; run {self.run.folder} keeps its checkpoint of the epoch before"
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

    def _say_skipped(self, evaluation: Evaluation) -> None:
        if evaluation.skipped and not any("eval_top1" in row for row in self.history):
            say(f"--val: {len(evaluation.skipped)} images can't be read and are left out; first: {evaluation.skipped[0]}")

    # --- state ---

    def _save(self, path: Path) -> None:
        generators = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "recipe": self.run.recipe,
            "epoch": self.epoch,
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else {},
            "scaler": self.scaler.state_dict(),
            "generators": generators,
            "history": self.history,
            "seconds": self.seconds,
        }
        save_checkpoint(path, state, fingerprint=self.data.cache.fingerprint, root=self.data.cache.root)

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint as if nothing had happened. Raises StudentError for one of another recipe."""
        if state["recipe"] != self.run.recipe:
            changed = sorted(key for key in self.run.recipe if state["recipe"].get(key) != self.run.recipe[key])
            raise StudentError(
                f"run {self.run.folder}: its checkpoint was made with other settings ({', '.join(changed)}), expected this run's;"
                f" delete the folder to begin again"
            )
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.history, self.seconds = state["epoch"], list(state["history"]), state["seconds"]
        torch.set_rng_state(state["generators"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["generators"]:
            torch.cuda.set_rng_state(state["generators"]["cuda"], self.device)

    # --- logs ---

    def _log(self, line: Mapping[str, Any]) -> None:
        with open(self.run.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _rewrite_logs(self) -> None:
        """Drop what was logged after the checkpoint: those epochs are trained again."""
        path = self.run.folder / "metrics.jsonl"
        if path.is_file():
            _replace_file(path, "".join(line for line in _whole_lines(path) if json.loads(line)["epoch"] < self.epoch))
        if self.history:
            self._write_summary()

    def _write_summary(self) -> None:
        text = io.StringIO()
        columns = max(self.history, key=len)  # epochs that were not measured leave eval_* empty
        writer = csv.DictWriter(text, fieldnames=list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        _replace_file(self.run.folder / "summary.csv", text.getvalue())


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


def _replace_file(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _whole_lines(path: Path) -> Iterator[str]:
    """Lines that end in a newline: a kill may leave half of the last one."""
    with open(path, encoding="utf-8") as file:
        yield from (line for line in file if line.endswith("\n"))
