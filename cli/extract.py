"""`kdcache extract`: stage one."""

from __future__ import annotations

import click

from .main import run_command
from .options import device_option, json_option, parse_settings, print_json, workers_option


@click.command(no_args_is_help=True)
@click.argument("shards")
@click.argument("cache")
@click.option("--teacher", required=True, metavar="NAME", help="timm name, 'hf-hub:org/name', or 'local-dir:FOLDER' as timm's save_for_hf writes.")
@click.option("--checkpoint", metavar="FILE", help="Weights (safetensors or PyTorch) to load in place of the pretrained ones.")
@click.option(
    "--model-kwargs", "model_kwargs", multiple=True, metavar="K=V", help="Constructor argument of the teacher, e.g. img_size=224. Repeatable."
)
@click.option("--name", metavar="N", help="The teacher's name in the cache. Default: from its model name.")
@click.option("--dataset", metavar="ID", help="Dataset id, part of the view plan. Default: the shards' common name.")
@click.option("--for", "methods", multiple=True, metavar="METHOD", help="Record what this method needs, e.g. nkd+vitkd. Repeatable.")
@click.option("--target", "targets", multiple=True, metavar="SPEC", help="target[@node][:encoding][,views=N]. Repeatable. Default: logits.")
@click.option("--views", type=click.IntRange(1), metavar="V", help="Views a sample. Default: 8; 1 without randomness. More can be added later.")
@click.option("--augment", metavar="POLICY", help="none (centre crop) or weak (random resized crop and flip). Default: weak.")
@click.option("--size", type=click.IntRange(1), metavar="S", help="Side of a view, pixels. Default: the teacher's input size.")
@click.option("--seed", type=click.IntRange(0), metavar="S", help="Seed of the view plan. Default: 0.")
@click.option("--batch-size", "-b", type=click.IntRange(1), default=64, show_default=True, metavar="B", help="Views a teacher pass.")
@workers_option
@device_option
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="fp32, or autocast to this type. Default: fp32.")
@click.option("--limit-shards", type=click.IntRange(1), metavar="N", help="Only the first N shards.")
@click.option(
    "--min-teacher-top1",
    type=click.FloatRange(0, 100),
    default=0.0,
    metavar="P",
    help="Stop before the work if the teacher's top-1 on the first labelled views is below P percent.",
)
@json_option
def command(
    shards: str,
    cache: str,
    *,
    teacher: str,
    model_kwargs: tuple[str, ...],
    methods: tuple[str, ...],
    targets: tuple[str, ...],
    as_json: bool,
    **options: object,
) -> None:
    """Run a teacher over seeded views of SHARDS and commit its targets to CACHE.

    SHARDS is a tar, a folder of tars or a brace expression. A second run finishes what is missing and touches nothing else;
    with another target, more views or another teacher it adds to the cache.

    \b
    Targets: logits                     uint8 with an affine pair a row, ~0.9 kB for 1000 classes
             features@blocks.22:int8    raw output of a block; ~7 bits a value
             features@norm:fp16,views=4 output of forward_features(), 4 views only
    \b
    Examples:
      kdcache extract 'train-{0000..1023}.tar' cache --teacher vit_large_patch16_224 --precision bf16
      kdcache extract shards/ cache --teacher local-dir:teacher --target logits --target features@norm

    Exit code 1 if a shard was cut short or could not be done; the others are done all the same.
    """

    def action() -> int:
        from pipelines.extract import ExtractConfig, extract

        config = ExtractConfig(
            shards=shards, cache=cache, teacher=teacher, model_args=parse_settings(model_kwargs, option="--model-kwargs"),
            methods=methods, targets=targets, **options,  # type: ignore[arg-type]  # names and types are click's above
        )  # fmt: skip
        summary = extract(config, progress=True)
        if as_json:
            print_json(summary.to_json())
        return 1 if summary.problems else 0

    raise SystemExit(run_command(action))
