"""`kdcache inspect`: what is in a cache."""

from __future__ import annotations

import sys

import click

from .main import run_command
from .options import as_rows, json_option, number_or_all, print_json, show


@click.command(no_args_is_help=True)
@click.argument("cache")
@click.option("--shard", metavar="S", help="Show one shard.")
@click.option("--key", metavar="K", help="Show one sample of the shard.")
@click.option("--view", type=click.IntRange(0), metavar="V", help="Which view of the sample. Default: what was drawn for all, targets of 0.")
@click.option(
    "--rows",
    callback=number_or_all("rows"),
    metavar="N|all",
    help="Rows whose logits are read for the entropy; 0: none. Default: 4096, 4 MB at most.",
)
@click.option(
    "--class-names", metavar="FILE", help="Names of the classes: a line each, class 0 first; or .json. Default: where they are known for sure."
)
@click.option("--html", metavar="FILE", help="Write a page with pictures, which loads nothing else; with --shard or --key, of these samples.")
@click.option("--samples", type=click.IntRange(0, 200), metavar="N", help="Samples on the page. Default: 12.")
@click.option("--seed", type=int, metavar="S", help="Chooses the page's samples. Default: 0.")
@click.option("--data", metavar="SHARDS", help="Where the tars lie now, for the page's originals. Default: where they lay.")
@json_option
def command(
    cache: str,
    shard: str | None,
    key: str | None,
    view: int | None,
    rows: int | str | None,
    class_names: str | None,
    html: str | None,
    samples: int | None,
    seed: int | None,
    data: str | None,
    as_json: bool,
) -> None:
    """Show what is in CACHE: identity, completeness, size and fidelity by target with the worst shard, labels, entropy.

    Opens fast whatever the size: of chunks it reads a sample of logits, and says of what. With --shard one shard; with --key one
    sample: label, what was drawn for its views, the teacher's top-5. Keys of --json: docs/inspect.md.

    \b
    Examples:
      kdcache inspect cache
      kdcache inspect cache --shard imagenet1k-train-0000
      kdcache inspect cache --shard imagenet1k-train-0000 --key n01440764/n01440764_10026 --view 3
      kdcache inspect cache --html cache.html
    """

    def action() -> None:
        from kdcache.class_names import read_class_names
        from kdcache.console import visible
        from kdcache.errors import UsageError
        from kdcache.opening import open_cache
        from pipelines import inspect
        from pipelines.facts import SAMPLE_ROWS
        from pipelines.inspection import inspect_text

        inspect.check_selection(shard, key, view, sampled=rows is not None)
        if html is None:
            for option, value in (("--data", data), ("--samples", samples), ("--seed", seed)):
                if value is not None:
                    raise UsageError(f"{option} needs --html: it is of the page")
        if html is not None and view is not None:
            raise UsageError("--view has no place beside --html: the page of a key shows all its views")
        names = read_class_names(class_names) if class_names is not None else None
        if html is not None:
            from pipelines.page import DEFAULT_SAMPLES, PageConfig, write_page

            chosen = PageConfig(
                samples=samples if samples is not None else DEFAULT_SAMPLES,
                seed=seed or 0,
                shard=shard,
                key=key,
                data=data,
                rows=as_rows(rows, SAMPLE_ROWS),
                class_names=names,
            )
            page = write_page(cache, html, chosen)
            if as_json:
                print_json(page.to_json())
            click.echo(page.as_text(), err=True)
            sys.exit(1 if page.problems else 0)
        opened = open_cache(cache)
        if shard is not None and key is not None:
            facts = inspect.inspect_row(opened, shard, key, view, names=names)
            text = inspect_text.row_as_text(facts)
        elif shard is not None:
            facts = inspect.inspect_shard(opened, shard)
            text = inspect_text.shard_as_text(facts)
        else:
            facts = inspect.inspect_cache(opened, rows=as_rows(rows, SAMPLE_ROWS), names=names)
            text = inspect_text.cache_as_text(facts, cache)
        if as_json:
            print_json(facts)
        else:
            show(visible(text))

    run_command(action)
