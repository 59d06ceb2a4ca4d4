"""What two runs' recipes differ in, and what to add to a command so that they do not: the hints of `train --resume`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

OPTIONAL = ("teachers", "world_size", "grad_accum_steps", "sync_bn", "shuffle", "amp", "amp_dtype", "model_ema_decay", "model_ema_warmup")
"""Fields that a recipe has only where they say something; the other fields that args.yaml has beside the recipe's are none of a recipe."""


def read_args(path: Path) -> dict[str, Any]:
    """What an args.yaml says, or nothing if it can't be read: it serves a hint only."""
    try:
        args = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return args if isinstance(args, dict) else {}


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted field, their value, our value) of every leaf of a recipe that differs, in the recipe's order; None where there is none."""
    extra = [name for name in theirs if name not in ours and (prefix or name in OPTIONAL)]
    for name in [*ours, *extra] if prefix else [*extra, *ours]:
        a, b = theirs.get(name), ours.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{name}.")
        elif a != b:
            yield f"{prefix}{name}", a, b


def how_to_continue(field_name: str, value: Any) -> str:
    """What to add to the command so that a field of its recipe is `value`."""
    if field_name.startswith("data.") and field_name != "data.views":
        what = {"val": "--val", "teacher": "--teacher"}.get(field_name.split(".")[1], "CACHE and --limit-shards")
        return f"give {what} as that run was given to continue it"
    group, _, name = field_name.partition(".")
    if group == "teachers":
        return "give --teacher as that run was given to continue it"
    if field_name == "shuffle":
        return f"pass --shuffle {value or 'full'} to continue it"
    if field_name == "world_size":
        count = value or 1
        return f"start it with torchrun in {count} processes to continue it" if count > 1 else "start it once, without torchrun, to continue it"
    if field_name.startswith("model_ema"):
        return "leave --model-ema out to continue it" if value is None else f"pass --model-ema{_of_ema(group, value)} to continue it"
    if not name:
        name = field_name
    if group in ("settings", "model_kwargs"):
        option, shown = "--set" if group == "settings" else "--model-kwargs", f" {name}={value}"
    else:
        option = f"--{name.replace('_', '-')}"
        shown = "" if isinstance(value, bool) else " " + (" ".join(map(str, value)) if isinstance(value, list) else str(value))
    return f"leave {option} out to continue it" if value is None or value is False else f"pass {option}{shown} to continue it"


def _of_ema(field_name: str, value: Any) -> str:
    return f" --model-ema-decay {value}" if field_name == "model_ema_decay" else " --model-ema-warmup" if value else ", without --model-ema-warmup,"
