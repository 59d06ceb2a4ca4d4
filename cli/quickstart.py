"""`kdcache quickstart`: the main job on real data."""

from __future__ import annotations

import click

from .main import run_command
from .options import json_option, print_json


@click.command()
@click.argument("directory", default="quickstart", metavar="[DIR]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the teacher, the views and the students.")
@json_option
def command(directory: str, seed: int, as_json: bool) -> None:
    """Real data end to end, in a few minutes on two cores and without a network.

    Packs scikit-learn's handwritten digits into shards, trains a small ViT teacher, extracts 8 views of each image, trains
    five students on labels alone and on the cache alone, verifies the cache and prints a table. DIR (default: quickstart)
    stays for you to look at.
    """

    def action() -> None:
        from pipelines.quickstart import QuickstartConfig, quickstart

        facts = quickstart(QuickstartConfig(out=directory, seed=seed))
        if as_json:
            print_json(facts)

    run_command(action)
