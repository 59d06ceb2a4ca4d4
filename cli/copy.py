"""`kdcache copy`: a part of a cache, elsewhere."""

from __future__ import annotations

import click

from .main import run_command
from .options import json_option, print_json


@click.command(no_args_is_help=True)
@click.argument("cache")
@click.argument("dest")
@click.option("--teacher", "teachers", multiple=True, metavar="N", help="Only this teacher. Repeatable. Default: all.")
@click.option("--target", "targets", multiple=True, metavar="T", help="Only this target, e.g. logits or features@norm. Repeatable. Default: all.")
@click.option("--views", type=click.IntRange(1), metavar="V", help="Only the first V views. Default: all.")
@click.option("--limit-shards", type=click.IntRange(1), metavar="N", help="Only the first N shards of the cache.")
@json_option
def command(
    cache: str, dest: str, teachers: tuple[str, ...], targets: tuple[str, ...], views: int | None, limit_shards: int | None, as_json: bool
) -> None:
    """Take CACHE, or a part of it, to the folder DEST.

    DEST is a cache like any other: train from it, verify it, extract more into it. It remembers where the tars lie. Every byte
    read is compared with its record; what is taken whole is the same to the byte. A copy that was cut off is finished by the
    same command.

    \b
    Examples:
      kdcache copy cache /backup/cache
      kdcache copy cache small --teacher vit_large_patch16_224 --target logits --views 4
      kdcache copy cache sample --limit-shards 8
    """

    def action() -> None:
        from pipelines.copy import CopyConfig, copy

        config = CopyConfig(cache=cache, dest=dest, teachers=teachers, targets=targets, views=views, limit_shards=limit_shards)
        summary = copy(config, progress=True)
        if as_json:
            print_json(summary.to_json())

    run_command(action)
