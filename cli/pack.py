"""`kdcache pack`: an ImageFolder becomes shards."""

from __future__ import annotations

import click

from .main import run_command
from .options import json_option, print_json


@click.command(no_args_is_help=True)
@click.argument("images")
@click.argument("out")
@click.option("--name", metavar="N", help="Shards are called N-0000.tar and so on. Default: the name of IMAGES.")
@click.option(
    "--samples-per-shard", type=click.IntRange(1), default=1251, show_default=True, metavar="N", help="ImageNet's 1,024 shards have this many."
)
@click.option("--shuffle-seed", type=int, default=0, show_default=True, metavar="S", help="Order of samples over shards.")
@click.option("--no-shuffle", is_flag=True, help="Keep class after class; shards then hold few classes each.")
@json_option
def command(images: str, out: str, name: str | None, samples_per_shard: int, shuffle_seed: int, no_shuffle: bool, as_json: bool) -> None:
    """Turn IMAGES/<class>/<file> into WebDataset shards in OUT, byte for byte the same each time.

    Layout as timm's ImageNet: a jpg (or jpeg, png, webp), cls and json member a sample. Classes are numbered from 0 in the
    order of their folders' names, as torchvision's ImageFolder does; the json member has the name. Pack training and
    validation images apart, each with a --name of its own. Image bytes are kept as they are. Hidden folders are passed over,
    a class folder without images is an error, and other files are counted and left out.

    \b
    Examples:
      kdcache pack imagenet/train shards/train --name imagenet1k-train
      kdcache pack imagenet/val shards/val --name imagenet1k-validation
    """

    def action() -> None:
        from kdcache.console import counted, human_bytes, say
        from pipelines.pack import PackConfig, pack

        seed = None if no_shuffle else shuffle_seed
        summary = pack(PackConfig(images=images, out=out, name=name, samples_per_shard=samples_per_shard, shuffle_seed=seed), progress=True)
        say(
            f"{out}: {counted(summary.samples, 'image')} of {counted(summary.classes, 'class')} in {counted(summary.shards, 'shard')}, {human_bytes(summary.bytes)}"
        )
        if as_json:
            print_json(summary.to_json())

    run_command(action)
