"""How a student is trained: its method, optimizer, schedule, average, generators and counters, fed with batches. Used by train.

What feeds it (`pipelines.training.gang`) chooses the batches; everything else that decides the result is here and in its checkpoint.
"""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdcache.compiled import compile_student, naming_failed_compilation
from kdcache.console import counted, say
from kdcache.device import autocast, generator_states, set_generator_states
from kdcache.distributed import ALONE, Processes
from kdcache.errors import StudentError, UsageError
from kdcache.evaluate import Evaluation, Evaluator
from kdcache.interrupt import finishing_first
from kdcache.join import EpochBatches, target_keys
from kdcache.methods.base import Method
from kdcache.replicas import (
    average_batch_norms,
    draw_apart,
    naming_uneven_gradients,
    own_state,
    replicate,
    state_of_rank,
    what_differs,
)
from kdcache.students import Student
from kdcache.sync_batch_norm import synchronise_batch_norms

from .checkpoints import RunCheckpoints, describe
from .config import TrainConfig
from .data import TrainingData
from .recipes import differences
from .shared_batch import Inputs
from .watching import Watch, write_summary


class StudentLoop:
    """Fed with batches: `begin`, then for every epoch `train_step` with each of its batches and `end_epoch`, then `close`.

    Of several processes each has such a loop, fed with its own batches. All take the same steps at one time, and hold the same weights and figures.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: TrainingData,
        student: Student,
        method: Method[Any],
        device: torch.device,
        *,
        run_id: str,
        folder: Path,
        recipe: Mapping[str, Any],
        checkpoints: RunCheckpoints,
        evaluator: Evaluator | None,
        processes: Processes = ALONE,
    ) -> None:
        """method: of `student`, both still on the CPU. evaluator: None measures nothing."""
        self.config, self.data, self.student, self.device = config, data, student, device
        self.run_id, self.folder, self.recipe = run_id, folder, recipe
        self.checkpoints, self.evaluator, self.processes = checkpoints, evaluator, processes
        self.method = method.to(device)
        if config.sync_bn:
            synchronise_batch_norms(self.method, device)
        draw_apart(self.method, config.seed, processes)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.method.to(memory_format=self.memory_format)
        self.normalize = student.normalize().to(device)
        self.batches = make_batches(config, data, processes)
        self.encodings = {key: data.cache.encoding(*one) for key, one in target_keys(data.targets).items()}
        self.optimizer = make_optimizer(self.method, config)
        self.scheduler = self._scheduler()
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.ema = _model_ema(student.model, config)
        self.epoch = 0
        self.step = 0
        """Steps of the epoch that are done: updates, of --grad-accum-steps batches each."""
        self._run: nn.Module | None = None
        """The method, wrapped for several processes. From the first batch on."""
        self._batches_of_step = 0
        self._values: Tensor | None = None
        """Of them, summed: the loss and its parts."""
        self._is_due = False
        """Whether a checkpoint follows the step."""
        self.is_stopping = False
        """Whether all processes stop after it, as a signal asks one of several to."""
        self._is_averaged = False
        """Whether the processes' running statistics have been averaged at the end of this epoch, which is not measured yet."""
        self.sums: dict[str, float] = {}
        """Loss parts, summed over them."""
        self.history: list[dict[str, Any]] = []
        self.other_caches: list[dict[str, Any]] = []
        """Those that the run was trained on before, each for so many epochs from the first."""
        self.seconds = 0.0
        self.epoch_seconds = 0.0
        self._counted = time.perf_counter()
        self.own = Stopwatch()
        """What feeds it runs this while it trains, measures or saves, and lets it rest while it waits for batches or for other students."""
        self.own_seconds = self.own_epoch_seconds = 0.0
        self._saved = (0, 0)
        """(epoch, step) of the checkpoint that was saved or loaded last."""
        self._watch: Watch | None = None

    def _scheduler(self) -> Any:
        """timm's, stepped after every update; None for --sched none."""
        from timm.scheduler import create_scheduler_v2

        scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched=self.config.sched,
            num_epochs=self.config.epochs,
            min_lr=self.config.min_lr,
            warmup_epochs=self.recipe["warmup_epochs"],
            warmup_lr=min(1e-5, self.config.lr),
            step_on_epochs=False,
            updates_per_epoch=len(self.batches),
        )
        return scheduler

    # --- its course ---

    @property
    def is_done(self) -> bool:
        """Whether no epoch is left."""
        return self.epoch >= self.config.epochs

    @property
    def _images(self) -> int:
        """Of an epoch."""
        return len(self.batches) * self.batches.step_size

    def begin(self) -> None:
        """Open what shows its figures, in the first process."""
        if self.processes.is_first:
            if self.history:
                write_summary(self.folder / "summary.csv", self.history)
            self._watch = self._open_watch()
        self.method.train()
        self._counted = time.perf_counter()

    def close(self) -> None:
        """After `begin`, whatever came between."""
        if self._watch is not None:
            self._watch.close(failed=not self.is_done)

    @finishing_first()
    def save_if_behind(self) -> None:
        """Save between two steps, unless nothing was done since the last time: for a signal that ends the run. Several processes all do."""
        is_behind = (self.epoch, self.step) != self._saved
        try:
            if is_behind:
                self._count_seconds()
                self._save()
        finally:
            self.processes.gather(None)  # a launcher may end the first one, which writes, as soon as another has ended
        if is_behind and self.processes.is_first:
            say(f"run {self.run_id}: saved {describe({'epoch': self.epoch, 'step': self.step})}, in {self.checkpoints.last}")

    def train_step(self, inputs: Inputs) -> dict[str, float] | None:
        """The next batch, and with the last one of an update the update: then {"loss", part…}. Raises StudentError for a loss that is not finite."""
        lr = self.optimizer.param_groups[0]["lr"]
        losses = self._step(inputs, self.step)
        if losses is None:
            return None
        self.step += 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        epoch, steps = self.epoch, len(self.batches)
        updates = epoch * steps + self.step
        if self.scheduler is not None:
            self.scheduler.step_update(num_updates=updates)
        if self.ema is not None:
            self.ema.update(self.method.student, step=updates)
        if self.step % self.config.log_interval == 0 and self._watch is not None:
            self._watch.write({"epoch": epoch, "step": self.step, **losses, "lr": lr})
        if self.step < steps and self._is_due:
            self._count_seconds()
            self._save()
        return losses

    def end_epoch(self) -> None:
        """After the last step of an epoch: measure, report, save. A signal while it is measured leaves that to be done again."""
        if not self._is_averaged:  # of three processes a mean of equals may differ in its last bit
            average_batch_norms(self.method, self.processes)
            if self.ema is not None:
                average_batch_norms(self.ema.module, self.processes)
        self._is_averaged = self.processes.world > 1
        self._check_weights()
        row: dict[str, Any] = {"epoch": self.epoch, **{f"train_{name}": value / len(self.batches) for name, value in self.sums.items()}}
        is_last = self.epoch + 1 == self.config.epochs
        measured = self.evaluator is not None and ((self.epoch + 1) % self.config.val_interval == 0 or is_last)
        if self.evaluator is not None and measured:
            row |= self._evaluate(self.evaluator)
            self.method.train()
        self._end_epoch(row, measured=measured)

    @finishing_first()
    def _end_epoch(self, row: dict[str, Any], *, measured: bool) -> None:
        row["lr"] = sum(group["lr"] for group in self.optimizer.param_groups) / len(self.optimizer.param_groups)
        self._count_seconds()
        self.history.append(row)
        if self._watch is not None:
            times = {"seconds": self.epoch_seconds, "own_seconds": self.own_epoch_seconds}
            self._watch.write({**row, "images": self._images, **times})
        self.epoch, self.step, self.sums, self.epoch_seconds, self.own_epoch_seconds = self.epoch + 1, 0, {}, 0.0, 0.0
        self._is_averaged = False
        self._save(is_best=measured and best_epoch(self.history) == len(self.history) - 1)
        if self.processes.is_first:
            write_summary(self.folder / "summary.csv", self.history)

    # --- a step ---

    def _step(self, inputs: Inputs, step: int) -> dict[str, float] | None:
        """One batch of a step; with its last one {"loss", part…}, means over all that were in it, and the update."""
        if self._run is None:
            self._run = self._prepare(inputs)
        self._batches_of_step += 1
        if self._batches_of_step == 1:
            self.optimizer.zero_grad(set_to_none=True)
        is_last = self._batches_of_step == self.config.grad_accum_steps
        with self._averaging(self._run, is_last=is_last):
            with autocast(self.device, self.config.precision):
                parts = self._run(*inputs)
            loss = torch.stack(list(parts.values())).sum()
            now = torch.stack([loss, *parts.values()]).detach()
            self._values = now if self._values is None else self._values + now
            values = self._finish_values(list(parts), step) if is_last else None
            share = loss if self.config.grad_accum_steps == 1 else loss / self.config.grad_accum_steps
            self.scaler.scale(share).backward()  # type: ignore[no-untyped-call]
        if values is None:
            return None
        if self.config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.method.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)  # without fp16 the scaler does nothing of its own
        self.scaler.update()
        return values

    def _prepare(self, inputs: Inputs) -> nn.Module:
        """The method, as the batches are given to it; these inputs are the first."""

        def run(module: nn.Module) -> Mapping[str, Tensor]:
            with autocast(self.device, self.config.precision):
                parts: Mapping[str, Tensor] = module(*inputs)
            return parts

        run_by = replicate(self.method, self.device, run) if self.processes.world > 1 else self.method
        if self.config.torchcompile is not None:
            compile_student(self.method, self.config.torchcompile)
        return run_by

    @contextmanager
    def _averaging(self, run: nn.Module, *, is_last: bool) -> Iterator[None]:
        """Within, a batch's pass and its gradients: averaged over the processes with the last batch of a step, which has the sum of them."""
        with naming_failed_compilation(self.student.name, self.config.torchcompile), naming_uneven_gradients(self.student.name):
            if is_last or not isinstance(run, DistributedDataParallel):
                yield
            else:
                with run.no_sync():
                    yield

    def _finish_values(self, names: Sequence[str], step: int) -> dict[str, float]:
        """The loss and its parts, means over a step's batches in all processes; raises the same StudentError in all if one is not finite."""
        assert self._values is not None
        is_due = self.checkpoints.is_due(step + 1)
        numbers, self._is_due, self.is_stopping = self.processes.mean(self._values, flag=is_due)  # one transfer a step
        values = {name: number / self._batches_of_step for name, number in zip(["loss", *names], numbers, strict=True)}
        self._batches_of_step, self._values = 0, None
        if not all(math.isfinite(value) for value in values.values()):
            shown = ", ".join(f"{name} {value:g}" for name, value in values.items())
            raise self.processes.common(
                StudentError(
                    f"student {self.student.name}: the loss is not finite in epoch {self.epoch}, step {step + 1} of {len(self.batches)} ({shown});"
                    f" expected a number; try a smaller --lr, or --clip-grad 1; run {self.folder} keeps its last checkpoint"
                )
            )
        return values

    def _check_weights(self) -> None:
        """A loss looks at the weights before its update: those after an epoch's last may be worth nothing, and would be kept."""
        floats = [tensor.isfinite().all() for tensor in self.weights_to_export.state_dict().values() if tensor.is_floating_point()]
        if floats and not bool(torch.stack(floats).all()):
            raise self.processes.common(
                StudentError(
                    f"student {self.student.name}: its weights are not finite after epoch {self.epoch}; expected numbers; try a smaller --lr, or"
                    f" --clip-grad 1; run {self.folder} keeps its last checkpoint"
                )
            )

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
        if self.processes.is_first and evaluation.skipped and not any("eval_top1" in row for row in self.history):
            say(
                f"--val: {counted(len(evaluation.skipped), 'image')} can't be read and {'is' if len(evaluation.skipped) == 1 else 'are'} left out; first: {evaluation.skipped[0]}"
            )

    # --- state ---

    @finishing_first()
    def _save(self, *, is_best: bool = False) -> None:
        """By the first process, with what the others have of their own."""
        state = self._state()
        if self._watch is not None:
            self._watch.flush()
            if is_best:
                self.checkpoints.save_best(state)  # before last/: a kill between the two repeats what came after the last one
            self.checkpoints.save(state)
        self._saved = self.epoch, self.step

    def _state(self) -> dict[str, Any]:
        """All that decides what comes next, and what was measured. In the first of several processes, with what is the others' own."""
        generators = generator_states(self.device)
        ranks: list[dict[str, Any]] = []
        if self.processes.world > 1:
            first, *others = self.processes.gather(own_state(self.method, self.ema.module if self.ema is not None else None, generators))
            ranks = [what_differs(own, first) for own in others]
        return {
            "recipe": self.recipe,
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
            "own_seconds": self.own_seconds,
            "own_epoch_seconds": self.own_epoch_seconds,
            **({"ema": self.ema.module.state_dict()} if self.ema is not None else {}),
            **({"other_caches": self.other_caches} if self.other_caches else {}),
            **({"is_averaged": True} if self._is_averaged else {}),
            **({"ranks": ranks} if ranks else {}),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint as if nothing had happened. Raises StudentError for one of another recipe.

        With other data, if that is allowed, an epoch that was begun is begun again.
        """
        recipe, theirs = self.recipe, state["recipe"]
        changed = sorted(key for key in {*recipe, *theirs} if theirs.get(key) != recipe.get(key))
        if changed and not (changed == ["data"] and self.config.allow_other_cache):
            raise StudentError(
                f"run {self.folder}: its checkpoint was made with other settings ({', '.join(changed)}), expected this run's;"
                f" delete the folder to begin again"
            )
        state = state_of_rank(state, self.processes)
        try:
            self.load_weights(state)
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:  # what torch raises for another model's state
            raise StudentError(
                f"run {self.folder}: its checkpoint does not hold this run's weights and optimizer ({error}); another run has written it, or"
                f" another version of kdcache: delete the folder to begin again, or go on with that version"
            ) from error
        self.epoch, self.history, self.seconds = state["epoch"], list(state["history"]), state["seconds"]
        self.own_seconds = state.get("own_seconds", 0.0)
        self.other_caches = list(state.get("other_caches", []))
        if changed:
            name, before, now = next(differences(theirs["data"], recipe["data"], "data."))
            if self.processes.is_first:
                say(f"run {self.run_id}: goes on with other data {describe(state)}: {name} was {before!r}, is {now!r}")
            self.other_caches.append({name: state[name] for name in ("fingerprint", "root", "epoch")})
        else:
            self.step, self.sums, self._is_averaged = state.get("step", 0), dict(state.get("sums", {})), state.get("is_averaged", False)
        self.epoch_seconds = state.get("epoch_seconds", 0.0)
        self.own_epoch_seconds = state.get("own_epoch_seconds", 0.0)
        self._saved = self.epoch, self.step
        set_generator_states(state["generators"], self.device)

    def load_weights(self, state: Mapping[str, Any]) -> None:
        """Those of the method, with its student, and their moving average."""
        self.method.load_state_dict(state["method"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])

    # --- what is shown ---

    def _open_watch(self) -> Watch:
        return Watch(
            self.folder,
            run_id=self.run_id,
            recipe=self.recipe,
            steps=len(self.batches),
            epoch=self.epoch,
            step=self.step,
            tensorboard=self.config.log_tensorboard,
            wandb_project=self.config.wandb_project if self.config.log_wandb else None,
        )

    def _count_seconds(self) -> None:
        now, own = time.perf_counter(), self.own.take()
        self.seconds, self.epoch_seconds, self._counted = self.seconds + now - self._counted, self.epoch_seconds + now - self._counted, now
        self.own_seconds, self.own_epoch_seconds = self.own_seconds + own, self.own_epoch_seconds + own


class Stopwatch:
    """Adds up the seconds of its `with` blocks."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | None = None

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds, self._since = self._seconds + self._running(), None

    def _running(self) -> float:
        return time.perf_counter() - self._since if self._since is not None else 0.0

    def take(self) -> float:
        """What it has added up so far, and begin at 0 again."""
        taken, self._seconds = self._seconds + self._running(), 0.0
        if self._since is not None:
            self._since = time.perf_counter()
        return taken


def make_batches(config: TrainConfig, data: TrainingData, processes: Processes) -> EpochBatches:
    """This process's batches of every epoch. Raises UsageError for fewer images than a step has batches."""
    return EpochBatches(
        data.row_numbers,
        batch_size=config.batch_size,
        num_views=data.num_views,
        seed=config.seed,
        blocks=data.blocks,
        accumulate=config.grad_accum_steps,
        rank=processes.rank,
        world=processes.world,
        beside=processes.beside,
    )


def _model_ema(model: nn.Module, config: TrainConfig) -> Any:
    """timm's moving average of the student, on its device; None without --model-ema."""
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=config.model_ema_decay, use_warmup=config.model_ema_warmup) if config.model_ema else None


def make_optimizer(method: Method[Any], config: TrainConfig) -> torch.optim.Optimizer:
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
    except (TypeError, ValueError, AssertionError, RuntimeError, ImportError) as error:  # timm's own assert that there is CUDA, or bitsandbytes
        raise UsageError(f"--opt {config.opt}: timm can't build it here with {betas} and momentum {config.momentum}: {error}") from error
    if getattr(getattr(optimizer, "_base_optimizer", optimizer), "is_second_order", False):
        raise UsageError(f"--opt {config.opt}: it needs second derivatives, which no step here computes; choose another, such as adamw")
    if betas and "betas" not in optimizer.defaults:  # timm drops what an optimizer does not take
        raise UsageError(f"--opt-betas {config.opt_betas}: {config.opt} has no betas; leave the option out")
    return optimizer


def best_epoch(history: Sequence[Mapping[str, Any]]) -> int:
    """The first epoch with the highest eval_top1, of those that were measured."""
    measured = [epoch for epoch, row in enumerate(history) if "eval_top1" in row]
    return max(measured, key=lambda epoch: (history[epoch]["eval_top1"], -epoch))
