"""`kdcache verify`: a verdict on a cache, and its repair."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from .main import run_command
from .options import device_option, json_option, number_or_all, print_json, workers_option

if TYPE_CHECKING:
    from pipelines.repair import RepairConfig
    from pipelines.verification.verdict import Verdict


@click.command(no_args_is_help=True)
@click.argument("cache")
@click.option(
    "--views",
    callback=number_or_all("views a shard", least=1),
    metavar="N|all",
    help="Also compare the pixels of N views a shard (or all): rendered again, or as stored.",
)
@click.option("--recompute", type=click.IntRange(1), metavar="N", help="Also show N views a shard to the teacher again, and compare its targets.")
@click.option("--repair", is_flag=True, help="Show what is to be deleted and made again to mend what was found.")
@click.option("--yes", is_flag=True, help="With --repair: do it, then verify again. Without it nothing is changed.")
@click.option("--data", metavar="SHARDS", help="Where the tars lie now. Default: where they lay when the cache was made.")
@click.option("--teacher", metavar="N", help="Which teacher --recompute runs, or --model and --checkpoint are of. Default: all; the only one.")
@click.option("--model", metavar="NAME", help="Where the teacher lies now, as extract's --teacher. Default: as it was named then.")
@click.option("--checkpoint", metavar="FILE", help="Its weights now. Default: the file that was named then.")
@click.option(
    "--batch-size", "-b", type=click.IntRange(1), metavar="B", help="Views a teacher pass. Default: 64; in a repair as each segment was made."
)
@device_option
@workers_option
@json_option
def command(
    cache: str,
    *,
    views: int | str | None,
    recompute: int | None,
    repair: bool,
    yes: bool,
    data: str | None,
    teacher: str | None,
    model: str | None,
    checkpoint: str | None,
    batch_size: int | None,
    device: str | None,
    workers: int | None,
    as_json: bool,
) -> None:
    """Prove that CACHE is what it claims to be, and mend it.

    Every byte against its record, every record against the plan, the teacher and the index, up to the root digest: the last
    line names the cache, and what students' checkpoints and exports name is the same root. --views compares the pixels that
    the teacher saw, and tells a changed tar from a changed decoder; it needs no teacher and no GPU. --recompute loads the
    teacher and tells whether it still gives what is cached.

    --repair makes bad or missing segments again, and nothing else: the tars are needed for views, the teacher for targets, neither for
    the index. With the device, batch size and versions of then the bytes come out as they were. It shows first what would be
    deleted, and changes something with --yes only.

    \b
    Examples:
      kdcache verify cache
      kdcache verify cache --views all --data /new/place/shards
      kdcache verify cache --recompute 4 --checkpoint /new/place/teacher.safetensors
      kdcache verify cache --repair
      kdcache verify cache --repair --yes

    Exit code 0: sound (after a repair: sound now). 1: problems were found. A cache that is unfinished may be sound.
    """
    if yes and not repair:
        raise click.UsageError("--yes belongs to --repair")
    if not repair and recompute is None and (teacher or model or checkpoint):
        raise click.UsageError("--teacher, --model and --checkpoint are for --recompute or --repair: nothing else loads a teacher")
    if repair and recompute is not None:
        raise click.UsageError("--repair mends bytes; run --recompute by itself, before or after")

    def action() -> int:
        from pipelines.repair import RepairConfig
        from pipelines.verify import Recompute, verify

        how = None
        if recompute is not None:
            how = Recompute(rows=recompute, teacher=teacher, model=model, checkpoint=checkpoint, device=device, batch_size=batch_size or 64)
        verdict = verify(cache, views=views, recompute=how, data=data, workers=workers, progress=True)  # type: ignore[arg-type]  # parsed above
        _tell(verdict, cache, "planned" if repair else None)
        failed = False
        if repair:
            config = RepairConfig(
                data=data, model=model, checkpoint=checkpoint, teacher=teacher, batch_size=batch_size, device=device, workers=workers
            )
            verdict, failed = _repair(cache, verdict, config, views=views, yes=yes)
        if as_json:
            print_json(verdict.to_json())
        return 0 if verdict.ok and not failed else 1

    raise SystemExit(run_command(action))


def _tell(verdict: Verdict, cache: str, repair: Literal["planned", "done"] | None) -> None:
    from kdcache.console import say
    from pipelines.verification.verdict import as_lines

    for line in as_lines(verdict, cache, repair=repair):
        say(line)


def _repair(cache: str, verdict: Verdict, config: RepairConfig, *, views: int | str | None, yes: bool) -> tuple[Verdict, bool]:
    """The verdict afterwards, and whether something could not be done."""
    from kdcache.console import say
    from pipelines.repair import carry_out
    from pipelines.verification.repair_plan import plan_repair
    from pipelines.verify import verify

    plan = plan_repair(cache, verdict)
    for line in plan.lines():
        say(line)
    if plan.impossible:
        say(f"{cache}: nothing was changed: see above what has to be done first")
        return verdict, True
    if not plan:
        say(f"{cache}: nothing to repair{'' if verdict.ok else ': what was found is not in the cache itself'}")
        return verdict, False
    if not yes:
        say(f"{cache}: nothing was changed: pass --repair --yes to do all of this")
        return verdict, False
    failures = carry_out(cache, plan, config)
    for failure in failures:
        say(f"{'failed':>13}  {'':>8}  {failure}")
    verdict = verify(cache, views=views, data=config.data, workers=config.workers, progress=True)  # type: ignore[arg-type]  # parsed above
    _tell(verdict, cache, "done")
    return verdict, bool(failures)
