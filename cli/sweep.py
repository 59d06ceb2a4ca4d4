"""What `kdcache train --sweep` does: the words and the exit code of a sweep. Called by `train`."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stdout
from io import TextIOBase
from typing import TYPE_CHECKING, Any

import click

from .options import print_json

if TYPE_CHECKING:
    from pipelines.engines import Engine

_NOT_FOR_SWEEPS = {"allow_other_cache": "a sweep's runs belong to one cache; continue a single run with --student"}


def explicit_options(ctx: click.Context) -> dict[str, Any]:
    """Options that were typed, by parameter name: those that only have their default are left to the sweep's file."""
    typed = click.core.ParameterSource.DEFAULT, click.core.ParameterSource.DEFAULT_MAP
    return {name: value for name, value in ctx.params.items() if ctx.get_parameter_source(name) not in typed}


def train_sweep(
    file: str, cache: str, given: Mapping[str, Any], students: Sequence[str], *, engines: Mapping[str, Any], gang: int, dry_run: bool,
    time_steps: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Train a sweep, or say what it would do. given: options that were typed, by TrainConfig's names. engines: those that say where it runs.

    Raises UsageError for a file that can't be right, KDCacheError that names the runs that failed, after all others ended.
    """
    from kdcache.console import counted, say, visible
    from kdcache.errors import KDCacheError, UsageError
    from kdcache.launch import read_launch
    from pipelines.sweep import describe_plan, leaderboard_as_text, plan_as_text, plan_sweep, predict, read_sweep, run_sweep, settle

    launch = read_launch()
    if launch.world_size > 1:
        if launch.rank:
            raise SystemExit(2)  # the first process says it
        raise UsageError(
            f"--sweep as one of {launch.world_size} processes of a launcher: a sweep starts its own, one a GPU; run the command once, without torchrun"
            f" or srun (several machines: --engine ray; one student on all GPUs: --student, without --sweep)"
        )
    for name, why in _NOT_FOR_SWEEPS.items():
        if name in given:
            raise UsageError(f"--{name.replace('_', '-')} with --sweep: {why}")
    if time_steps is not None and not dry_run:
        raise UsageError("--time-steps: it is for predictions; expected --dry-run beside it")
    fields = {name: value for name, value in given.items() if name not in ("resume", *_NOT_FOR_SWEEPS)}
    plan = plan_sweep(read_sweep(file, cache=cache, given=fields, students=students))
    engine = _choose_engine(engines, {planned.run.config.device for planned in plan.runs})
    if dry_run:
        predictions = predict(plan.runs, time_steps=5 if time_steps is None else time_steps, cores=engine.cores, progress=True)
        facts = describe_plan(plan, predictions, slots=engine.slots, gang=gang)
        click.echo(visible(plan_as_text(plan, facts)), err=True)
        if as_json:
            print_json(facts)
        return
    for note in plan.notes:
        say(f"note: {note}")
    entries: list[dict[str, Any]] = []  # reported whatever ends the command
    try:
        with redirect_stdout(_FirstLines() if engines["engine"] == "ray" else sys.stderr):  # stdout is for --json
            entries.extend(run_sweep(plan, engine=engine, gang=gang, progress=True))
    finally:
        entries = settle(plan, entries)
        errors = {entry["id"]: entry["error"] for entry in entries if entry["status"] == "failed"}
        click.echo(visible(f"\n{leaderboard_as_text(plan, errors)}\n\n{plan.out / 'leaderboard.csv'}\n{plan.out / 'report.html'}"), err=True)
        if as_json:
            print_json({"runs": entries, "leaderboard": str(plan.out / "leaderboard.csv"), "report": str(plan.out / "report.html")})
    if errors:
        told = "".join(f"\n  {run_id}: {error}" for run_id, error in errors.items())
        raise KDCacheError(f"{len(errors)} of {counted(len(plan.runs), 'run')} failed; run the same command again to go on with them:{told}")


class _FirstLines(TextIOBase):
    """Stands for stdout, where Ray's client prints what befalls nodes and workers, with dumps of their state: the first line of each, on stderr."""

    def write(self, text: str, /) -> int:
        from kdcache.console import say

        if line := text.strip().partition("\n")[0]:
            say(click.unstyle(line)[:500])
        return len(text)


def _choose_engine(engines: Mapping[str, Any], devices: Collection[str | None]) -> Engine:
    """The one that was asked for. Raises UsageError for an option of the other one, and as that engine does."""
    from kdcache.errors import UsageError
    from pipelines.engines.job_process import RETRIES

    chosen, retries = engines["engine"], engines["retries"]
    other = "ray" if chosen == "local" else "local"
    for name in ("ray_address", "gpus_per_job", "cpus_per_job") if chosen == "local" else ("processes",):
        if engines[name] is not None:
            raise UsageError(f"--{name.replace('_', '-')} {engines[name]} with --engine {chosen}: it is an option of --engine {other}")
    device = next(iter(devices)) if len(devices) == 1 else None
    if chosen == "local":
        from pipelines.engines.local import local_engine

        return local_engine(processes=engines["processes"], device=device, retries=retries)
    from pipelines.engines.ray import OnRay

    engine = OnRay(
        address=engines["ray_address"], gpus_per_job=engines["gpus_per_job"], cpus_per_job=engines["cpus_per_job"], device=device,
        retries=RETRIES if retries is None else retries,
    )  # fmt: skip
    engine.connect()  # before OUT is touched
    return engine
