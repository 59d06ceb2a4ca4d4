"""`kdcache extract`: stage one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from .main import run_command
from .options import device_option, json_option, parse_settings, print_json, show, workers_option


@click.command(no_args_is_help=True)
@click.argument("shards", required=False, metavar="SHARDS")
@click.argument("cache", required=False, metavar="CACHE")
@click.option("--teacher", required=True, metavar="NAME", help="timm name, 'hf-hub:org/name', or 'local-dir:FOLDER' as timm's save_for_hf writes.")
@click.option("--checkpoint", metavar="FILE", help="Weights (safetensors or PyTorch) to load in place of the pretrained ones.")
@click.option(
    "--model-kwargs", "model_kwargs", multiple=True, metavar="K=V", help="Constructor argument of the teacher, e.g. img_size=224. Repeatable."
)
@click.option("--name", metavar="N", help="The teacher's name in the cache. Default: from its model name.")
@click.option(
    "--label-key", metavar="KEY", help="Key of the labels in .json members, e.g. fine or cls.id. Default: .cls members, else 'label' of .json."
)
@click.option("--dataset", metavar="ID", help="Dataset id, part of the view plan. Default: the shards' common name.")
@click.option("--for", "methods", multiple=True, metavar="METHOD", help="Record what this method needs, e.g. nkd+vitkd. Repeatable.")
@click.option(
    "--set", "settings", multiple=True, metavar="FIELD=VALUE",
    help="A field of these methods, as train's --set, where it decides what they need, e.g. logits=head of scalekd. Repeatable.",
)  # fmt: skip
@click.option("--target", "targets", multiple=True, metavar="SPEC", help="target[@node][:encoding[=arg]][,views=N]. Repeatable. Default: logits.")
@click.option("--views", type=click.IntRange(1), metavar="V", help="Views a sample. Default: 8; 1 without randomness. More can be added later.")
@click.option("--augment", metavar="POLICY", help="none, weak, strong, 3aug or a FILE.yaml, see below. Default: weak.")
@click.option("--size", type=click.IntRange(1), metavar="S", help="Side of a view, pixels. Default: the teacher's input size.")
@click.option("--seed", type=click.IntRange(0), metavar="S", help="Seed of the view plan. Default: 0.")
@click.option(
    "--decoder",
    type=click.Choice(["pillow", "simplejpeg"]),
    help="What decodes JPEGs, part of the view plan. simplejpeg: a fifth faster, needs pip install 'kdcache[fast]'. Default: pillow.",
)
@click.option(
    "--resizer",
    type=click.Choice(["pillow", "torch"]),
    help="What resizes a view's crop, part of the view plan. torch: the same filters in a sixth of the time, in fewer bits. Default: pillow.",
)
@click.option(
    "--store-views",
    type=click.Choice(["jpeg95", "png", "raw"]),
    help="Store the views: no tars needed afterwards. A view of 224 px: jpeg95 ~28 kB, png ~100 kB, raw 151 kB. Default: no.",
)
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
@click.option("--list-nodes", is_flag=True, help="Show the teacher's nodes with their shapes and sizes, and do nothing else. Needs no weights.")
@json_option
def command(
    shards: str | None,
    cache: str | None,
    *,
    teacher: str,
    list_nodes: bool,
    model_kwargs: tuple[str, ...],
    methods: tuple[str, ...],
    settings: tuple[str, ...],
    targets: tuple[str, ...],
    as_json: bool,
    **options: object,
) -> None:
    """Run a teacher over seeded views of SHARDS and commit its targets to CACHE.

    SHARDS is a tar, a folder of tars (FOLDER:SPLIT for a split of timm's _info.json), a brace expression, a glob, a text file
    that lists these, or several joined by '::'. A second run finishes what is missing and touches nothing else; with another
    target, more views or another teacher it adds to the cache.

    \b
    Targets: logits                     uint8 with an affine pair a row, ~0.9 kB for 1000 classes
             logits:topk=10             10 largest, the label's, log Z; ~30 B, useless for T > 1
             features@blocks.22:int8    raw output of a block; ~7 bits a value
             features@norm:klt=0.99     as coarse as a mean cosine of .99 allows; under 2 bits
             features@layers.3:dct      bands of spatial frequency that are read apart
             features@norm:fp16,views=4 output of forward_features(), 4 views only; also bf16

    A view of a JPEG of 500x375 pixels costs both stages half the time with --decoder simplejpeg --resizer torch. A cache keeps to what it
    was made with. torch's pixels differ from pillow's by .03 of 255 levels on average; those of the two decoders agree so far.

    With --store-views the teacher sees what the stored view decodes to; training and further targets read that and need no tars
    (more views do). An image then costs training a quarter of rendering it (jpeg95), a twentieth (raw), or as much (png).

    \b
    Policies: none    centre crop, one view
              weak    random resized crop and flip
              strong  weak, RandAugment (n2 m9 mstd0.5), random erasing .25
              3aug    weak, DeiT III's greyscale, solarize or blur, colour jitter .3
              FILE    a YAML file of fields, from a named one on with 'base: strong':
                      crop, hflip, interpolation, three_augment, rand_augment,
                      color_jitter, erase, mix (Mixup and CutMix); see FORMAT.md
    \b
    Examples:
      kdcache extract 'train-{0000..1023}.tar' cache --teacher vit_large_patch16_224 --precision bf16
      kdcache extract shards/ cache --teacher local-dir:teacher --target logits --target features@norm
      kdcache extract shards/ cache --teacher swin_large_patch4_window7_224 --for scalekd --set logits=head
      kdcache extract --list-nodes --teacher vit_large_patch16_224

    \b
    Several processes share the work when a launcher starts them, on one machine or many that see CACHE:
      torchrun --nproc-per-node 8 --no-python kdcache extract shards/ cache --teacher vit_large_patch16_224
      srun --ntasks 16 --gpus-per-task 1 kdcache extract shards/ cache --teacher vit_large_patch16_224

    A Kubernetes indexed job needs KDCACHE_WORLD_SIZE beside its JOB_COMPLETION_INDEX; any other launcher sets KDCACHE_RANK
    and KDCACHE_WORLD_SIZE. Rank 0 shows the progress and the JSON. What one rank leaves, the others do.

    Exit code 1 if a shard was cut short or could not be done (of several ranks, of the first); the others are done all the same.
    Ctrl-C and SIGTERM exit with 1 within 10 s; run the same command again to finish.
    """

    model_args = parse_settings(model_kwargs, option="--model-kwargs")
    method_settings = parse_settings(settings, option="--set")
    if list_nodes:
        run_command(lambda: _list_nodes(teacher, options["checkpoint"], model_args, as_json=as_json))
        return
    if shards is None or cache is None:
        raise click.UsageError(f"Missing argument '{'SHARDS' if shards is None else 'CACHE'}'.")

    def action() -> int:
        from kdcache.launch import read_launch
        from pipelines.extract import ExtractConfig, extract

        config = ExtractConfig(
            shards=shards, cache=cache, teacher=teacher, model_args=model_args,
            methods=methods, settings=method_settings, targets=targets, **options,  # type: ignore[arg-type]  # names and types are click's above
        )  # fmt: skip
        summary = extract(config, progress=True)
        rank = read_launch().rank
        if as_json and rank == 0:
            print_json(summary.to_json())
        # Every rank meets a shard that can't be done, and the first one's exit code tells it. With one of another, torchrun would stop
        # the first before it has spoken.
        return 1 if any(rank == 0 or problem["kind"] != "source" for problem in summary.problems) else 0

    raise SystemExit(run_command(action, resume="what was committed is kept: run the same command again to finish the rest"))


def _list_nodes(teacher: str, checkpoint: Any, model_args: Mapping[str, Any], *, as_json: bool) -> None:
    from pipelines.extraction.nodes import NodesConfig, describe_nodes, nodes_as_text

    facts = describe_nodes(NodesConfig(teacher=teacher, checkpoint=checkpoint, model_args=model_args))
    if as_json:
        print_json(facts)
    else:
        show(nodes_as_text(facts))
