"""`kdcache methods`: what a student can learn by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from .main import run_command
from .options import json_option, print_json, show


@click.command()
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the distillation methods, or explain the one called NAME: what it needs, its constants, its paper.

    NAME is a method, a sum such as nkd+vitkd, or package.module:Class for one of your own.

    \b
    Examples:
      kdcache methods
      kdcache methods vitkd
      kdcache methods nkd+vitkd --json
    """

    def action() -> None:
        from kdcache.methods import METHODS, describe

        facts = [describe(one) for one in ([name] if name is not None else METHODS)]
        if as_json:
            print_json({"methods": {one["name"]: one for one in facts}})
        elif name is not None:
            show(_in_full(facts[0]))
        else:
            show("\n".join(_in_short(one) for one in facts))
            show(
                "\nEvery method but ce adds the labels' cross-entropy (distill_loss_weight, task_loss_weight, smoothing); nkd+vitkd is the sum of two.\n"
                "'kdcache extract --for NAME' records what a method needs, 'kdcache methods NAME' explains its constants."
            )

    run_command(action)


def _in_short(facts: Mapping[str, Any]) -> str:
    """One method of many, for the person at the terminal."""
    own = {field: fact["default"] for field, fact in facts["constants"].items() if field not in ("distill_loss_weight", "task_loss_weight")}
    lines = [f"{facts['name']}: {facts['summary']}", f"  needs      {_needs(facts)}"]
    lines.append(f"  constants  {', '.join(f'{field}={_shown(value)}' for field, value in own.items() if field != 'smoothing') or 'none of its own'}")
    return "\n".join([*lines, *([f"  paper      {facts['paper']}"] if facts["paper"] else [])])


def _in_full(facts: Mapping[str, Any]) -> str:
    lines = [f"{facts['name']}: {facts['summary']}", f"  needs  {_needs(facts)}"]
    lines += [f"  paper  {facts['paper']}"] if facts["paper"] else []
    shown = {f"{field}={_shown(fact['default'])}": fact["help"] for field, fact in facts["constants"].items()}
    rows = [f"  --set {text:<{max(map(len, shown))}}  {explained}" for text, explained in shown.items()]
    return "\n".join([*lines, *rows])


def _needs(facts: Mapping[str, Any]) -> str:
    return (
        (", ".join(facts["needs"]) or "no teacher")
        + ("; the teacher's last blocks" if facts["needs_tail"] else "")
        + ("; labels" if facts["needs_labels"] else "")
    )


def _shown(value: Any) -> str:
    """A default, as --set takes it; … where it depends."""
    if value is None:
        return "…"
    return f"[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)
