"""`kdcache train`: stage two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from .main import run_command
from .options import device_option, json_option, parse_bytes, parse_settings, print_json, workers_option
from .sweep import explicit_options, train_sweep

_FRACTION = click.FloatRange(0, 1)
_POSITIVE = click.FloatRange(0, min_open=True)


@click.command(no_args_is_help=True)
@click.argument("cache")
# what to train
@click.option(
    "--student", "students", multiple=True, metavar="MODEL",
    help="timm name, 'hf-hub:org/name' or 'local-dir:FOLDER'. Repeatable: trained one after another, or at once with --gang.",
)  # fmt: skip
@click.option(
    "--sweep", metavar="FILE.yaml",
    help="Train all runs that a file describes by base:, grid: and runs:; see docs/sweeps.md. Options given here go before its base.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="With --sweep: show the runs, their sizes, what is done, and how long the rest will take.")
@click.option(
    "--time-steps", type=click.IntRange(0), metavar="N",
    help="With --dry-run: steps to time of each student and method that no run has measured; 0 times none. Default: 5.",
)  # fmt: skip
@click.option("--pretrained", is_flag=True, help="Start from the student's pretrained weights.")
@click.option(
    "--model-kwargs", multiple=True, metavar="K=V",
    help="Constructor argument of the student, e.g. drop_path_rate=0.1. Repeatable. img_size, where the model takes one, is the view's size.",
)  # fmt: skip
@click.option(
    "--num-classes", type=click.IntRange(1), metavar="K", help="Default: the teacher's if its logits are matched, else the largest label + 1."
)
# by what method
@click.option(
    "--method",
    default="kd",
    show_default=True,
    metavar="M",
    help="kd, nkd, vitkd, …, as 'kdcache methods' lists them; a sum, nkd+vitkd; your own, package.module:Class; or ce (labels only: the baseline).",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="FIELD=VALUE",
    help="A field of the method, e.g. temperature=2; of a sum's part, vitkd.alpha=3e-5; of one of several teachers, N/temperature=2. Repeatable.",
)
@click.option(
    "--teacher", multiple=True, metavar="N[=W]",
    help="The teacher's name in the cache. Default: the only one. Repeatable: several teach at once, with equal weights or with weight W each.",
)  # fmt: skip
@click.option("--kd-temperature", type=_POSITIVE, metavar="T", help="Softmax temperature of student and teacher. Default: the method's; 4 of kd.")
@click.option(
    "--distill-loss-weight", type=click.FloatRange(0), metavar="W",
    help="Weight of the distillation loss. Default, as in timm: 1; 1 - W if only the task's weight W is given (scalekd: 1).",
)  # fmt: skip
@click.option(
    "--task-loss-weight", type=click.FloatRange(0), metavar="W",
    help="Weight of the labels' cross-entropy; 0 needs no labels. Default: 1; of scalekd 1 - kd_alpha.",
)  # fmt: skip
@click.option("--smoothing", type=click.FloatRange(0, 1, max_open=True), metavar="S", help="Label smoothing of the cross-entropy. Default: 0.1.")
# on what data
@click.option("--data", metavar="SHARDS", help="Where the tars lie now. Default: where they lay when the cache was made.")
@click.option("--limit-shards", type=click.IntRange(1), metavar="N", help="Train on the first N shards of the cache only.")
@click.option("--views", type=click.IntRange(1), metavar="V", help="Train on the first V views. Default: all that every shard has.")
@click.option("--val", metavar="SHARDS", help="Labelled tars to measure top-1 and top-5 on. Default: none.")
@click.option("--label-key", metavar="KEY", help="Key of the labels in the .json members of --val. Default: as the cache's labels were read.")
@click.option("--val-interval", type=click.IntRange(1), default=1, show_default=True, metavar="E", help="Measure every E epochs, and after the last.")
@click.option(
    "--val-crop-pct", type=click.FloatRange(0, 1, min_open=True), metavar="P",
    help="Share of the side that the evaluation crop keeps, e.g. 0.95. Default: the student's own.",
)  # fmt: skip
@click.option(
    "--check-views", type=_FRACTION, default=0.05, show_default=True, metavar="F",
    help="Fraction of views whose pixels are compared with what the teacher saw; 1 checks all.",
)  # fmt: skip
# how
@click.option("--epochs", type=click.IntRange(1), default=100, show_default=True, metavar="E", help="Epoch e trains on view e mod V of every image.")
@click.option("--batch-size", "-b", type=click.IntRange(1), default=128, show_default=True, metavar="B", help="Views a step, of each process.")
@click.option(
    "--grad-accum-steps",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="A",
    help="Batches of a step; one update sees A times as many views.",
)
@click.option("--opt", default="adamw", show_default=True, metavar="NAME", help="Any optimizer of timm, e.g. sgd, lamb, adamw.")
@click.option("--lr", type=_POSITIVE, default=1e-3, show_default=True, metavar="LR", help="Peak learning rate.")
@click.option("--weight-decay", type=click.FloatRange(0), default=0.05, show_default=True, metavar="W", help="Biases and norms have none.")
@click.option("--momentum", type=click.FloatRange(0), default=0.9, show_default=True, metavar="M", help="Of optimizers that have one.")
@click.option("--opt-betas", type=(float, float), metavar="B1 B2", help="Of optimizers that have them, e.g. 0.9 0.98. Default: the optimizer's.")
@click.option("--clip-grad", type=_POSITIVE, metavar="NORM", help="Largest norm of the gradient, e.g. 1. Default: no clipping.")
@click.option(
    "--sched", type=click.Choice(["cosine", "tanh", "constant", "none"]), default="cosine", show_default=True,
    help="timm's schedule, stepped after every update.",
)  # fmt: skip
@click.option(
    "--warmup-epochs", type=click.FloatRange(0), metavar="E",
    help="Linear warm-up, within --epochs. Default: 5, or a tenth of the epochs if that is less.",
)  # fmt: skip
@click.option("--min-lr", type=click.FloatRange(0), default=0.0, show_default=True, metavar="LR", help="Where the schedule ends.")
@click.option("--amp", is_flag=True, help="Mixed precision: autocast in training and evaluation. Losses and weights stay float32.")
@click.option(
    "--amp-dtype", type=click.Choice(["float16", "bfloat16"]), default="float16", show_default=True,
    help="Of --amp; float16 scales the loss. CPUs want bfloat16.",
)  # fmt: skip
@click.option("--sync-bn", is_flag=True, help="BatchNorms take the statistics of all processes' batches.")
@click.option(
    "--torchcompile", is_flag=False, flag_value="inductor", default=None, metavar="[BACKEND]",
    help="Compile the student with torch.compile. Default backend: inductor. Last on the line, or before another option.",
)  # fmt: skip
@click.option("--model-ema", is_flag=True, help="Keep a moving average of the weights, measure it beside them and export it.")
@click.option(
    "--model-ema-decay", type=click.FloatRange(0, 1, max_open=True), default=0.9998, show_default=True, metavar="D",
    help="Share that the average keeps at each update.",
)  # fmt: skip
@click.option("--model-ema-warmup", is_flag=True, help="Begin with a smaller share; for runs of few updates.")
@click.option("--seed", type=click.IntRange(0), default=42, show_default=True, metavar="S", help="Of the weights, dropout and the order of the rows.")
@click.option(
    "--shuffle", type=click.Choice(["auto", "full", "block"]), default="auto", show_default=True,
    help="Order of the rows. full: any row next; best mixed. block: blocks of neighbours, mixed in a window of 512 MiB of images in the page cache: storage"
    " is read in long runs. auto: block on a network file system unless shards are sorted by label, else full.",
)  # fmt: skip
# where, and what to show
@click.option("--out", default="runs", show_default=True, metavar="RUNS", help="Folder of run folders.")
@click.option(
    "--gang", type=click.IntRange(1), default=1, show_default=True, metavar="N",
    help="Train up to N students at once on one loader: views are read and rendered once for all, all N are in the device's memory. One that fails"
    " (NaN, out of memory, any error) ends alone; results are those of runs one by one.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Continue unfinished runs from their last checkpoint. Finished ones are left alone in any case.")
@click.option(
    "--allow-other-cache", is_flag=True, help="With --resume: continue a run that was begun with another cache, or other rows of it, with this one."
)
@click.option(
    "--recovery-interval", type=click.IntRange(0), metavar="N",
    help="Steps between checkpoints within an epoch; 0 saves at its end only. Default: one every 10 minutes. Ctrl-C and SIGTERM save too.",
)  # fmt: skip
@click.option(
    "--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
    help="Of --sweep: processes of this machine, or tasks of a Ray cluster, which needs kdcache[ray].",
)  # fmt: skip
@click.option(
    "--processes", type=click.IntRange(1), metavar="N",
    help="Of --engine local: jobs at a time, each in its own process. Default: one a GPU, CUDA_VISIBLE_DEVICES chooses which; 1 without.",
)  # fmt: skip
@click.option("--ray-address", metavar="HOST:PORT", help="Of --engine ray. Default: RAY_ADDRESS, else the cluster of this machine, else a new one.")
@click.option(
    "--gpus-per-job", type=click.FloatRange(0, 1), metavar="F",
    help="Of --engine ray; 0.5 lets two jobs share a GPU. Default: 1, or 0 if the cluster has none.",
)  # fmt: skip
@click.option(
    "--cpus-per-job",
    type=click.IntRange(1),
    metavar="N",
    help="Of --engine ray. Default: the smallest share that a GPU has of its node's cores, at most 9; 1 without.",
)
@click.option(
    "--retries", type=click.IntRange(0), metavar="N",
    help="Of --sweep: how often a job whose process is killed goes on. Default: 2. A single job at a time runs in the command's own process, which can't"
    " go on after its death, unless this is given.",
)  # fmt: skip
@workers_option
@click.option(
    "--prefetch-bytes", callback=parse_bytes, default="1GiB", show_default=True, metavar="SIZE",
    help="Most memory of the batches that are loaded ahead, e.g. 500MB; fewer workers if it holds no batch for each. Those of the step at work,"
    " --grad-accum-steps of them, come on top.",
)  # fmt: skip
@device_option
@click.option("--channels-last", is_flag=True, help="Memory format of images and convolutions; on a GPU faster with --amp for most CNNs.")
@click.option("--log-interval", type=click.IntRange(1), default=50, show_default=True, metavar="N", help="Steps between lines in metrics.jsonl.")
@click.option("--log-tensorboard", is_flag=True, help="Write TensorBoard's event files too. Needs kdcache[tensorboard].")
@click.option("--log-wandb", is_flag=True, help="Log to Weights & Biases too; WANDB_MODE=offline needs no account. Needs kdcache[wandb].")
@click.option("--wandb-project", default="kdcache", show_default=True, metavar="NAME", help="Project of --log-wandb.")
@json_option
def command(
    cache: str, *, students: tuple[str, ...], model_kwargs: tuple[str, ...], settings: tuple[str, ...], sweep: str | None,
    dry_run: bool, time_steps: int | None, gang: int, engine: str, processes: int | None, ray_address: str | None, gpus_per_job: float | None,
    cpus_per_job: int | None, retries: int | None, as_json: bool, **options: object,
) -> None:  # fmt: skip
    """Train students against CACHE, with no teacher in memory.

    Replays the views that the teacher saw and reads its targets from the cache. Each run has a folder RUNS/<student>-<method>-<id>
    with args.yaml, summary.csv, metrics.jsonl, last/, best/ and export/, which timm.create_model("local-dir:.../export",
    pretrained=True) loads. The id is a digest of all that decides the result: a repeated command finds its finished runs.

    \b
    Examples:
      kdcache train cache --student resnet50 --val 'val-{00..63}.tar' --epochs 300 --lr 2e-3
      kdcache train cache --student vit_tiny_patch16_224 --student resnet18 --kd-temperature 2 --resume
      kdcache train cache --student resnet18 --student vit_tiny_patch16_224 --student mixer_b16_224 --gang 3
      kdcache train cache --student resnet18 --task-loss-weight 0      (no labels needed)
      kdcache train cache --student resnet18 --method ce               (the baseline)
      kdcache train cache --student resnet50 --teacher swin=0.7 --teacher vit=0.3 --set vit/temperature=2
      kdcache train cache --sweep sweep.yaml --out runs --dry-run
      kdcache train cache --sweep sweep.yaml --gang 4       (on all GPUs of this machine)
      kdcache train cache --sweep sweep.yaml --engine ray   (on those of a Ray cluster)

    \b
    Processes of a launcher train each student together; an update sees the batches of all:
      torchrun --nproc-per-node 8 --no-python kdcache train cache --student vit_large_patch16_224 --amp
      srun --ntasks 16 --gpus-per-task 1 kdcache train cache --student vit_large_patch16_224 --amp
    """
    engines = {
        "engine": engine, "processes": processes, "ray_address": ray_address, "gpus_per_job": gpus_per_job, "cpus_per_job": cpus_per_job,
        "retries": retries,
    }  # fmt: skip
    own = {"model_kwargs": parse_settings(model_kwargs, option="--model-kwargs"), "settings": parse_settings(settings, option="--set")}
    if sweep is not None:
        given = {
            name: own.get(name, value) for name, value in explicit_options(click.get_current_context()).items() if name in options or name in own
        }
        run_command(
            lambda: train_sweep(sweep, cache, given, students, engines=engines, gang=gang, dry_run=dry_run, time_steps=time_steps, as_json=as_json),
            resume="what is done is kept: run the same command again to go on with the rest",
        )
        return
    if dry_run or time_steps is not None:
        raise click.UsageError("--dry-run and --time-steps are for sweeps; expected --sweep FILE.yaml beside them")
    if typed := sorted(set(engines) & set(explicit_options(click.get_current_context()))):
        raise click.UsageError(f"--{typed[0].replace('_', '-')} is for sweeps; expected --sweep FILE.yaml beside it")
    if not students:
        raise click.UsageError("expected --student MODEL, or --sweep FILE.yaml")

    def action() -> None:
        from kdcache.console import visible
        from kdcache.errors import UsageError
        from kdcache.launch import read_launch
        from pipelines.train import TrainConfig, train_each

        is_first = read_launch().rank == 0
        try:
            config = TrainConfig(cache=cache, students=students, **own, **options)  # type: ignore[arg-type]  # names and types are click's above
        except (UsageError, click.UsageError) as error:
            if is_first:
                raise
            raise SystemExit(2) from error  # the first process says it
        runs: list[dict[str, Any]] = []  # reported whatever ends the command
        try:
            for run in train_each(config, gang=gang, progress=is_first):
                runs.append(run)
        finally:
            if runs and is_first:
                click.echo(visible(_table(runs)), err=True)
                if as_json:
                    print_json({"runs": runs})

    run_command(action, resume="the last checkpoint is kept: run the same command again with --resume to go on")


def _table(runs: Sequence[Mapping[str, Any]]) -> str:
    """For the person at the terminal: one line a run."""
    from kdcache.console import aligned

    rows = [("student", "method", "epochs", "top1 %", "seconds", "status", "path")]
    for run in runs:
        top1 = "-" if run["top1"] is None else f"{run['top1']:.2f}"
        rows.append((run["student"], run["method"], str(run["epochs"]), top1, f"{run['seconds']:.1f}", run["status"], run["path"]))
    return aligned(rows)
