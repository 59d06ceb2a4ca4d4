"""`kdcache verify`: a verdict on a cache."""

from __future__ import annotations

import click

from .main import run_command
from .options import json_option, print_json, workers_option


def _parse_views(_ctx: click.Context, _parameter: click.Parameter, text: str | None) -> int | str | None:
    if text is None or text == "all":
        return text
    if not text.isdigit() or int(text) == 0:
        raise click.BadParameter(f"expected a number of views a shard or 'all', found {text!r}")
    return int(text)


@click.command(no_args_is_help=True)
@click.argument("cache")
@click.option(
    "--views", callback=_parse_views, metavar="N|all", help="Also compare the pixels of N views a shard (or all): rendered again, or as stored."
)
@click.option("--data", metavar="SHARDS", help="Where the tars lie now. Default: where they lay when the cache was made.")
@workers_option
@json_option
def command(cache: str, views: int | str | None, data: str | None, workers: int | None, as_json: bool) -> None:
    """Prove that CACHE is what it claims to be.

    Every byte against its record, every record against the plan, the teacher and the index, up to the root digest, which
    names the content in one line. With --views also the pixels that the teacher saw. Needs no teacher and no GPU.

    \b
    Examples:
      kdcache verify cache
      kdcache verify cache --views all --data /new/place/shards

    Exit code 0: sound. 1: problems were found.
    """

    def action() -> int:
        from kdcache.console import human_bytes, say
        from pipelines.verify import verify

        verdict = verify(cache, views=views, data=data, workers=workers, progress=True)  # type: ignore[arg-type]  # parsed above
        for problem in verdict.problems:
            place = " ".join(part for part in (problem.shard, problem.key) if part)
            say(f"{problem.kind:>11}  {place}  {problem.detail}" if place else f"{problem.kind:>11}  {problem.detail}")
        for note in verdict.notes:
            say(f"       note  {note}")
        replayed = f", {verdict.views_replayed:,} views compared" if views is not None else ""
        say(f"{cache}: {verdict.files} files, {human_bytes(verdict.bytes)}, {verdict.shards} shards, {verdict.rows:,} rows{replayed}")
        say(f"root {verdict.root}: {'sound' if verdict.ok else f'NOT SOUND, {len(verdict.problems)} problems'}")
        if as_json:
            print_json(verdict.to_json())
        return 0 if verdict.ok else 1

    raise SystemExit(run_command(action))
