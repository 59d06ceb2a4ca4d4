"""Options that several commands share, and how they print."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click
import yaml

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout; all else goes to stderr.")
device_option = click.option("--device", default=None, metavar="D", help="Torch device. Default: cuda if there is one, else mps, else cpu.")
workers_option = click.option(
    "-j",
    "--workers",
    type=click.IntRange(0),
    default=None,
    metavar="W",
    help="Decoding processes; 0 decodes in this one. Default: one a core, at most 8.",
)


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(_ctx: click.Context, _parameter: click.Parameter, text: str) -> int:
    """A callback of options SIZE: 500MB, 1.5GiB, 2000000; at least 1."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([a-z]*)", text.strip().lower())
    unit = _UNITS.get(match[2]) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise click.BadParameter(f"expected a number of bytes such as 500MB, 1GiB or 2000000, found {text!r}")
    return int(float(match[1]) * unit)


def number_or_all(noun: str, *, least: int = 0) -> Callable[[click.Context, click.Parameter, str | None], int | str | None]:
    """A callback of options `N|all`, which gives None where nothing was given. noun: what N is a number of, for the error."""

    def parse(_ctx: click.Context, _parameter: click.Parameter, text: str | None) -> int | str | None:
        if text is None or text == "all":
            return text
        if not (text.isascii() and text.isdigit()) or int(text) < least:
            raise click.BadParameter(f"expected a number of {noun} or 'all', found {text!r}")
        return int(text)

    return parse


def as_rows(given: int | str | None, default: int) -> int | None:
    """What `number_or_all` gave as a number of rows, None for all."""
    return None if given == "all" else int(given) if given is not None else default


def show(text: str) -> None:
    """Text on stdout: what was asked for. A disk that is full is an error like any other; who no longer reads is click's affair."""
    try:
        click.echo(text)
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left of it in Python's buffer would fail again at exit
        raise click.ClickException(f"stdout can't be written: {error.strerror}; what it was to show is lost, nothing else") from error


def print_json(body: Mapping[str, Any]) -> None:
    """The one JSON object on stdout."""
    show(json.dumps(body, indent=1))


def parse_settings(settings: Sequence[str], *, option: str) -> dict[str, Any]:
    """['a=1', 'b=[2, 3]'] as a dict, each value read as YAML (and 1e-3 as the number it is)."""
    result: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise click.UsageError(f"{option} {setting!r}: expected NAME=VALUE")
        try:
            result[name] = float(text)
            if "." not in text and "e" not in text.lower() and "n" not in text.lower():
                result[name] = int(text)
        except ValueError:
            try:
                result[name] = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise click.UsageError(f"{option} {setting!r}: the value is not YAML: {error}") from error
    return result
