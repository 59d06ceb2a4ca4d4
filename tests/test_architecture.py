"""The shape of the project: who may import whom, what start-up may load, and that every command is documented."""

from __future__ import annotations

import ast
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from helpers import run_python

from cli.main import COMMANDS, main

ROOT = Path(__file__).parent.parent


def test_imports_run_downwards_and_stage_two_never_reaches_the_teacher() -> None:
    result = subprocess.run([Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("module", ["kdcache", "cli.main", "kdcache.errors", "kdcache.plan", "kdcache.shards"])
def test_start_up_loads_no_torch(module: str) -> None:
    code = f"import {module}, json, sys; print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    loaded = set(json.loads(run_python(code).stdout))
    assert not loaded & {"torch", "timm", "torchvision", "zarr", "webdataset", "sklearn"}


def test_help_loads_no_command() -> None:
    code = "import sys; from cli.main import main; main(['--help'], standalone_mode=False); print([n for n in sys.modules if n.startswith('cli.')])"
    assert run_python(code).stdout.splitlines()[-1] == "['cli.main']"


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda script: script.stem)
def test_every_name_of_ours_that_a_benchmark_uses_is_there(script: Path) -> None:
    """They are run by hand: what was moved since would be noticed too late."""
    used: set[str] = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            used |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            used.add(ast.unparse(node))
    for name in sorted(name for name in used if re.fullmatch(r"(kdcache|pipelines|cli)(\.\w+)+", name)):
        pkgutil.resolve_name(name)  # raises AttributeError or ModuleNotFoundError


def test_every_exported_name_is_there() -> None:
    import kdcache

    for name in kdcache.__all__:
        assert getattr(kdcache, name) is not None


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_every_option_explained(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0, result.output
    context = click.Context(main)
    command = main.get_command(context, name)
    assert command is not None
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts}"
    assert all(len(line) <= 110 for line in result.output.splitlines())


def test_the_group_names_every_command() -> None:
    output = CliRunner().invoke(main, ["--help"]).output
    assert all(f"  {name} " in output for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_readme(name: str) -> None:
    assert f"kdcache {name}" in (ROOT / "README.md").read_text()


def test_an_unknown_command_is_a_usage_error() -> None:
    assert CliRunner().invoke(main, ["extrct"]).exit_code == 2
    assert CliRunner().invoke(main, ["--version"]).output.startswith("kdcache ")


LEAVING = """
import atexit, gc, os, sys, threading, time
atexit._clear()  # what this machine's Python registers by itself
os.environ.pop("LD_PRELOAD", None)
from cli.main import run

class Freed:
    def __del__(self):
        print("freed", flush=True)

Freed.held = Freed()
if sys.argv[2:]:
    atexit.register(print, "before it")
main = sys.modules["cli.main"].main

def command():
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    atexit.register(print, "within it")
    main()

sys.modules["cli.main"].main = command
sys.argv[2:] = []
run()
"""
"""A command with a thread and things to do at exit, in a process that holds what Python would free."""


@pytest.mark.parametrize(("argument", "status"), [("--version", 0), ("extrct", 2)])
def test_a_command_frees_nothing_at_its_end_but_waits_for_threads_and_does_what_is_left_to_exit(argument: str, status: int) -> None:
    result = subprocess.run([sys.executable, "-c", LEAVING, argument], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == status, result.stderr
    assert [line for line in result.stdout.splitlines() if not line.startswith("kdcache ")] == ["thread", "within it"]
    assert 'kdcache = "cli.main:run"' in (ROOT / "pyproject.toml").read_text()


def test_what_was_to_be_done_at_exit_before_a_command_began_is_done() -> None:
    result = subprocess.run([sys.executable, "-c", LEAVING, "--version", "and before"], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.splitlines()[1:] == ["thread", "within it", "before it", "freed"], result.stderr
