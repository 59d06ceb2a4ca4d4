"""One run of stage two, a student with its method: its identity, its folder, what is checked before it trains, its loop, its export. Used by train."""

from __future__ import annotations

import dataclasses
import glob
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from kdcache.compiled import check_backend
from kdcache.console import say
from kdcache.distributed import ALONE, Processes
from kdcache.errors import KDCacheError, StoreError, StudentError
from kdcache.evaluate import EvaluationSet, Evaluator
from kdcache.methods import build, method_class, uses_labels
from kdcache.methods.base import Method
from kdcache.plan import blake2b_128, canonical_json
from kdcache.replicas import check_same_weights, check_sync_bn
from kdcache.students import Student, build_student, check_student, export_student

from .checkpoints import RunCheckpoints, can_resume, describe_plan_differences
from .config import TrainConfig
from .data import TrainingData, check_labels
from .lock import RunLock
from .loop import StudentLoop, best_epoch, make_batches, make_optimizer
from .recipes import differences, how_to_continue, read_args
from .watching import read_lines, replace_file


class Run:
    """One student's training: `begin`, what its loop is fed with, `finish`. Of several processes the first one reads and writes its folder."""

    def __init__(self, config: TrainConfig, data: TrainingData, student_name: str, processes: Processes = ALONE) -> None:
        self.config, self.data, self.student_name, self.processes = config, data, student_name, processes
        self.recipe = self._resolve()
        self.id = f"{_folder_name(student_name)}-{_folder_name(method_class(config.method).name)}-{blake2b_128(canonical_json(self.recipe))[:8]}"
        self.folder = Path(config.out).expanduser().absolute() / self.id
        self.loop: StudentLoop | None = None
        """While it trains, and after."""
        self._lock: RunLock | None = None

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
            **({"world_size": self.processes.world} if self.processes.world > 1 else {}),
            **({"grad_accum_steps": config.grad_accum_steps} if config.grad_accum_steps > 1 else {}),
            **({"sync_bn": True} if config.sync_bn else {}),
            "seed": config.seed,
            **({"shuffle": "block"} if data.blocks is not None else {}),
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
        """To be asked by all processes."""
        return self.processes.decide(self.export.is_dir)

    def checkpoints(self) -> RunCheckpoints:
        """Those of its folder."""
        config = self.config
        return RunCheckpoints(self.folder, self.data.cache, interval=config.recovery_interval, allow_other_cache=config.allow_other_cache)

    def check_folder(self) -> None:
        """Raise StudentError for an unfinished run that was not asked to be resumed: nothing is overwritten.

        Likewise for a run that was to be resumed and is not there while another of the same student and method is unfinished: most
        likely that one was meant.
        """
        self.id, self.folder = self.processes.decide(self._find_folder)

    def _find_folder(self) -> tuple[str, Path]:
        if not self.config.resume and not self.export.is_dir() and self.folder.exists():
            raise StudentError(
                f"run {self.folder} is there already and unfinished; pass --resume to continue it, or delete the folder to begin again"
            )
        if self.config.resume and not self.folder.exists():
            self._find_another()
        return self.id, self.folder

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

    def claim(self) -> bool:
        """Whether it is left to be trained; if so no other process may train it until `release`. Makes its folder.

        Raises StudentError while another process trains it.
        """
        return self.processes.decide(self._claim)

    def _claim(self) -> bool:
        if self.export.is_dir():
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{self.folder}: can't be made: {error.strerror}; pass --out with a folder that can be written to") from error
        self._lock = RunLock(self.folder)
        if self.export.is_dir():  # finished by another process, while this one waited
            self.release()
            return False
        return True

    @property
    def is_claimed(self) -> bool:
        """Whether its folder is this process's to write to."""
        return self._lock is not None

    def release(self) -> None:
        """What was claimed, if it was."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def check_build(self) -> None:
        """Raise whatever building this student, its method, its optimizer and its evaluation raises, before any other student is trained."""
        if self.is_finished:
            return
        if uses_labels(self.config.method, self.data.settings):
            check_labels(self.data, self.config)
        self.processes.device(self.config.device)
        if self.config.sync_bn:
            check_sync_bn(self.processes)
        if self.config.torchcompile is not None:
            check_backend(self.config.torchcompile)
        make_batches(self.config, self.data, self.processes)
        student, method = self._build()
        make_optimizer(method, self.config)
        self._evaluator(student, workers=0)
        check_student(student, batch_size=min(self.config.batch_size, len(self.data.row_numbers)))

    def already_done(self) -> dict[str, Any]:
        """The report's entry of a run that was finished before."""
        history, seconds, exported = self.processes.decide(self._final_figures)
        return self._report(history, seconds, "already done", exported=exported)

    def _final_figures(self) -> tuple[list[dict[str, Any]], float, Mapping[str, Any] | None]:
        """The rows of its epochs, their seconds, and the row of the epoch that was exported."""
        history, seconds = self._read_metrics()
        if len(history) != self.config.epochs:
            final = self.checkpoints().load_last()
            history, seconds = final["history"], final["seconds"]
        return history, seconds, self._read_exported(history)

    def _read_metrics(self) -> tuple[list[dict[str, Any]], float]:
        """The rows of its epochs, and their seconds, as metrics.jsonl has them: a checkpoint of a large student takes long to read, and may be gone."""
        if not (self.folder / "metrics.jsonl").is_file():
            return [], 0.0
        lines = [dict(line) for line in read_lines(self.folder / "metrics.jsonl") if "step" not in line]
        seconds = sum(line.pop("seconds", 0.0) for line in lines)
        return [{name: value for name, value in line.items() if name not in ("images", "own_seconds")} for line in lines], seconds

    def _read_exported(self, history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """The row of the epoch whose weights were exported, None where the export does not say."""
        try:
            config = json.loads((self.export / "config.json").read_text(encoding="utf-8"))
            return history[int(config["kdcache"]["epoch"])]
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def begin(self) -> StudentLoop:
        """Its loop, where its last checkpoint left it. `claim` comes first."""
        device = self.processes.device(self.config.device)
        workers = self.config.num_workers
        student, method = self._build()
        check_same_weights(method, self.processes)
        evaluator = self._evaluator(student, workers)
        checkpoints = self.checkpoints()
        self.loop = StudentLoop(
            self.config, self.data, student, method, device,
            run_id=self.id, folder=self.folder, recipe=self.recipe, checkpoints=checkpoints, evaluator=evaluator,
            processes=self.processes,
        )  # fmt: skip
        if (state := self.processes.decide(lambda: self._last_state(checkpoints))) is not None:
            self.loop.load(state)
        self.processes.decide(lambda: self._write_args(device, workers))
        self._say_of_average(len(self.loop.batches) * self.config.epochs)
        return self.loop

    def _say_of_average(self, updates: int) -> None:
        """What is exported is the moving average: tell whoever lets too little of the training into it."""
        config = self.config
        kept = config.model_ema_decay**updates
        if config.model_ema and not config.model_ema_warmup and kept > 0.1 and self.processes.is_first:
            enough = max(0.0, 1 - 5 / updates)  # exp(-5): less than a hundredth
            say(
                f"run {self.id}: with --model-ema-decay {config.model_ema_decay} the average, which is exported, still has {100 * kept:.0f} % of the weights"
                f" it began with after all {updates:,} updates; pass --model-ema-warmup, or a smaller decay ({enough:.4g})"
            )

    @staticmethod
    def _last_state(checkpoints: RunCheckpoints) -> dict[str, Any] | None:
        checkpoints.remove_debris()
        return checkpoints.load()

    def finish(self) -> dict[str, Any]:
        """Export what its loop has trained; the report's entry."""
        loop = self.loop
        assert loop is not None
        exported = self.processes.decide(lambda: self._export(loop))
        return self._report(loop.history, loop.seconds, "done", exported=exported)

    def failed(self, error: Exception) -> dict[str, Any]:
        """The report's entry of a run that an error ended, with "error"."""
        loop = self.loop
        entry = self._report(loop.history, loop.seconds, "failed") if loop is not None else self._report([], 0.0, "failed")
        return {**entry, "error": describe_error(error)}

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
        pinned = self.processes.device(self.config.device).type == "cuda"
        return Evaluator(dataset, batch_size=self.config.batch_size, num_workers=workers, pin_memory=pinned, processes=self.processes)

    def _write_args(self, device: torch.device, workers: int) -> None:
        config = self.config
        places = {"cache": self.data.cache.store.url, "root": self.data.cache.root, "shards_from": config.data, "val_from": config.val}
        session = {
            "device": str(device),
            "channels_last": config.channels_last,
            **({"torchcompile": config.torchcompile} if config.torchcompile is not None else {}),
            "workers": workers,
            "prefetch_bytes": config.prefetch_bytes,
            "check_views": config.check_views,
            "log_interval": config.log_interval,
        }
        settings = self.loop.method.settings.to_json() if self.loop is not None else {}
        resolved = {"resolved_settings": settings} if settings != self.recipe["settings"] else {}  # a preset that the pair chose, filled in
        body = {"id": self.id, **self.recipe, **resolved, "plan": self.data.cache.plan.to_json(), "places": places, "session": session}
        text = yaml.safe_dump(body, sort_keys=False, allow_unicode=True)
        replace_file(self.folder / "args.yaml", text)

    def _export(self, loop: StudentLoop) -> Mapping[str, Any]:
        """The best epoch's weights with --val, else the last one's; with --model-ema their moving average. Its row of the history."""
        cache, final = self.data.cache, loop.history[-1]
        if self.data.val:
            best = loop.checkpoints.load_best()
            loop.load_weights(best)
            final = best["history"][-1]  # of these very weights, whatever the device has made of that epoch when it was repeated
        identities = {name: cache.layer(name).document.identity for name in self.data.teachers}
        teachers = [{"name": name, "model": one.model, "weights": one.weights} for name, one in identities.items()]
        record = {
            "fingerprint": cache.fingerprint,
            "root": cache.root,
            **({"teachers": teachers} if len(teachers) > 1 else {"teacher": next(iter(teachers), None)}),
            "method": self.config.method,
            "epoch": final["epoch"],
            "recipe": {key: value for key, value in self.recipe.items() if key != "data"} | {"settings": loop.method.settings.to_json()},
            **({"other_caches": loop.other_caches} if loop.other_caches else {}),
        }
        crop_pct = loop.student.crop_pct if self.config.val_crop_pct is None else self.config.val_crop_pct  # of the figures
        student = dataclasses.replace(loop.student, model=loop.weights_to_export, crop_pct=crop_pct)
        student.model.cpu().to(memory_format=torch.contiguous_format)  # as safetensors wants it
        export_student(student, self.export, record=record, figures=final)
        return final

    def _report(
        self, history: Sequence[Mapping[str, Any]], seconds: float, status: str, *, exported: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """exported: the row of the epoch whose weights are exported; None for the best one."""
        if exported is None and any("eval_top1" in row for row in history):
            exported = history[best_epoch(history)]
        return {
            "id": self.id,
            "student": self.student_name,
            "method": self.config.method,
            "epochs": len(history),
            "top1": exported.get("eval_top1") if exported is not None else None,
            "seconds": round(seconds, 3),
            "path": str(self.folder),
            "status": status,
        }


def describe_error(error: Exception) -> str:
    """What an error says; of one that is not ours, after its kind."""
    return str(error) if isinstance(error, KDCacheError) else f"{type(error).__name__}: {error}"


def _folder_name(student_name: str) -> str:
    """The student's name without its source, as far as that can stand in a path."""
    base = (student_name.partition(":")[2] or student_name).rstrip("/").rpartition("/")[2]
    return "".join(c if c.isascii() and (c.isalnum() or c in "._+-") else "-" for c in base).lstrip("._-")[:80] or "student"
