"""`kdcache diff`: what differs between two caches."""

from __future__ import annotations

import click

from .main import run_command
from .options import as_rows, json_option, number_or_all, print_json, show


@click.command(no_args_is_help=True)
@click.argument("a")
@click.argument("b")
@click.option(
    "--rows",
    callback=number_or_all("rows"),
    metavar="N|all",
    help="Shared rows whose values are compared; 0: none, all: in every view. Default: 256.",
)
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    metavar="N[=M]",
    help="Compare teacher N of A with teacher M of B. Repeatable. Default: all of equal names, or the only ones.",
)
@json_option
def command(a: str, b: str, rows: int | str | None, teachers: tuple[str, ...], as_json: bool) -> None:
    """Show what differs between the caches A and B: plan, shards, rows, labels, skipped samples, pixels, teachers and their targets.

    Values of shared targets are decoded, so that encodings may differ, and compared on a sample of the rows that both have,
    spread over shards and views: relative L2 (of B - A, relative to A), cosine, largest difference, and for logits the KL divergence
    both ways and how often the likeliest class is the same. 'stored' is what storing cost each of them. A may be B: --teacher
    compares two teachers of one cache. Keys of --json: docs/inspect.md.

    \b
    Examples:
      kdcache diff cache copy
      kdcache diff cache cache-bf16 --rows all
      kdcache diff cache cache --teacher vit_large_patch16_224=vit_base_patch16_224

    Exit code 0: identical, their roots are equal. 1: they differ.
    """

    def action() -> int:
        from kdcache.console import visible
        from pipelines.diff import DIFF_ROWS, diff
        from pipelines.inspection.diff_text import diff_as_text

        facts = diff(a, b, rows=as_rows(rows, DIFF_ROWS), teachers=teachers, progress=True)
        if as_json:
            print_json(facts)
        else:
            show(visible(diff_as_text(facts)))
        return 0 if facts["identical"] else 1

    raise SystemExit(run_command(action))
