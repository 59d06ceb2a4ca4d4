"""The `kdcache` group. Commands are imported when they are called, so that `--help` answers at once."""

from __future__ import annotations

import atexit
import difflib
import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from typing import Any

import click

COMMANDS: dict[str, str] = {
    "quickstart": "Real data end to end in a few minutes: pack, teacher, extract, students, verify.",
    "pack": "Turn a folder of images into WebDataset shards.",
    "extract": "Stage one: run a teacher over seeded views and commit its targets to a cache.",
    "train": "Stage two: train students against a cache, with no teacher in memory.",
    "methods": "List the distillation methods: what they need, their constants, their papers.",
    "inspect": "Show what is in a cache.",
    "verify": "Prove that a cache is what it claims to be.",
    "diff": "Show what differs between two caches, and how far their targets are apart.",
    "copy": "Take a cache, or a teacher, targets or views of it, to another folder.",
    "gc": "Show and remove what no record owns; drop a target, a teacher or views.",
}
"""Command → its line in `kdcache --help`, in the order of a user's day; each lives in the module of its name."""


class LazyGroup(click.Group):
    """A group that imports a command's module only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f"cli.{name}").command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        if args[0] not in COMMANDS and near and not args[0].startswith("-") and not ctx.resilient_parsing:  # the last: a shell completes
            raise click.UsageError(f"No such command {args[0]!r}. (Did you mean {near[0]!r}?)", ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _print_version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"kdcache {version('kdcache')}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version and exit.")
def main() -> None:
    """Run a vision teacher once, distil it into any number of students.

    \b
      kdcache extract 'imagenet/train-{0000..1023}.tar' cache --teacher vit_large_patch16_224
      kdcache train cache --student resnet50 --method kd

    Exit codes: 0 done and sound, 1 ran and found or hit a problem, 2 usage.
    """


def _make_streams_usable() -> None:
    """Lead streams that were closed to nowhere, or files of a cache would get their numbers; escape on stdout, as on stderr, what its encoding lacks."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, mode))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def run_command(action: Callable[[], Any], *, resume: str = "nothing that was there before is lost") -> Any:
    """Run a pipeline and turn its errors into exit codes: UsageError 2, every other KDCacheError 1, a signal 1. A ToldError has been told elsewhere.

    resume: what is kept, and how to go on, for the person who stops the command with Ctrl-C or SIGTERM.
    """
    from kdcache.console import harmless
    from kdcache.errors import KDCacheError, ToldError, UsageError
    from kdcache.interrupt import Stopped, stopping_cleanly

    try:
        with stopping_cleanly():
            return action()
    except Stopped as signal:
        raise click.ClickException(f"stopped by {signal}; {resume}") from signal
    except ToldError as error:
        raise SystemExit(1) from error
    except UsageError as error:
        raise click.UsageError(harmless(str(error))) from error
    except KDCacheError as error:
        raise click.ClickException(harmless(str(error))) from error


_LOADED_FIRST = {"LD_PRELOAD", "CUDA_INJECTION64_PATH"}
"""Variables of libraries that may have something to do at exit: profilers, such as Nsight Systems."""


def run() -> None:
    """`main` as all that this process does: it is gone when the command is.

    Left to itself Python would first free the modules of torch and timm, 400 000 objects in four collections: 2 s of a core, which the processes of
    a run that torchrun has told to end, within 30 s, may have to share. Threads are waited for, and what was registered with `atexit` within is done.
    What was registered before, by a measurement of coverage say, or outside Python, by a profiler that was loaded first, would not be: then all is left to Python.
    """
    _make_streams_usable()
    ends: list[SystemExit] = []
    if atexit._ncallbacks() == 0 and not _LOADED_FIRST & os.environ.keys():  # the first to be registered is the last to be called
        atexit.register(_leave, ends)
    try:
        main()
    except SystemExit as end:
        ends.append(end)
        raise


def _leave(ends: list[SystemExit]) -> None:
    """What is no plain end is left to Python."""
    if ends and isinstance(ends[0].code, int):
        with suppress(OSError, ValueError):  # Python tells what can't be written, and ends with 120
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ends[0].code)


if __name__ == "__main__":
    run()
