"""`kdcache gc`: what no record owns, and what is no longer wanted."""

from __future__ import annotations

import click

from .main import run_command
from .options import json_option, print_json


@click.command(no_args_is_help=True)
@click.argument("cache")
@click.option("--drop-target", "drop_targets", multiple=True, metavar="T", help="Also drop this target, e.g. logits or features@norm. Repeatable.")
@click.option("--teacher", metavar="N", help="Whose targets --drop-target drops. Default: the only teacher that has them.")
@click.option("--drop-teacher", "drop_teachers", multiple=True, metavar="N", help="Also drop this teacher and all its targets. Repeatable.")
@click.option("--keep-views", type=click.IntRange(1), metavar="V", help="Also drop the views from V on, and their targets.")
@click.option("--delete", is_flag=True, help="Remove what is shown. Without it nothing is changed.")
@json_option
def command(
    cache: str,
    drop_targets: tuple[str, ...],
    teacher: str | None,
    drop_teachers: tuple[str, ...],
    keep_views: int | None,
    delete: bool,
    as_json: bool,
) -> None:
    """Show what no record of CACHE owns, with sizes, and remove it with --delete.

    That is what killed runs leave behind: groups without a record, old index files, spools; and files that others put there.
    Targets, teachers and views go on request; segments that hold more than what goes are written anew without it, values
    as they were. Students that train from the cache meanwhile may have to be started again with --resume; while something is
    extracted into the cache nothing is removed.

    \b
    Examples:
      kdcache gc cache                                             (only shows)
      kdcache gc cache --delete
      kdcache gc cache --drop-target features@norm --keep-views 4
      kdcache gc cache --drop-teacher vit_large_patch16_224 --delete

    There is no way back: what is dropped must be extracted again.
    """

    def action() -> None:
        from pipelines.gc import GcConfig, gc

        config = GcConfig(
            cache=cache, drop_targets=drop_targets, teacher=teacher, drop_teachers=drop_teachers, keep_views=keep_views, delete=delete
        )  # fmt: skip
        report = gc(config, progress=True)
        if as_json:
            print_json(report.to_json())

    run_command(action)
