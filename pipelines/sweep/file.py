"""A sweep's YAML file → the runs it asks for. First step of a sweep: nothing is opened or built here.

    base:                              # what all runs have, by the names of train's options
      val: shards/val
      epochs: 100
    grid:                              # lists: every run is trained with every combination
      student: [resnet18, vit_tiny_patch16_224]
      lr, weight-decay: [[1e-3, 0.05], [2e-3, 0.02]]      # these two change together
    runs:                              # kinds of runs; each may have a grid of its own. Without it there is one kind, the base
      - method: ce
      - method: kd
        grid: {settings.temperature: [1, 4]}

gives (1 + 2) · 2 · 2 runs: kind by kind, and in each as nested loops in the order of the file, the first list outermost.

What a run is given is kept as leaves: "lr", or "settings.temperature", "model_kwargs.drop_path_rate" of the two options that hold fields.
A leaf that is given in `base` is overridden by the command line, by `grid` and by a run; one that two of the last three give is an error.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from kdcache.errors import UsageError, did_you_mean
from kdcache.methods import method_class, parse_settings
from kdcache.yaml_file import CoreLoader, read_yaml

from ..training.config import TrainConfig
from ..training.data import method_settings

MAX_RUNS = 10_000
_HOLDING = ("settings", "model_kwargs")
"""Options that hold fields."""
_ALIASES = {"set": "settings"}
"""Names on the command line that TrainConfig calls otherwise."""
_SECTIONS = ("base", "grid", "runs", "teacher_seconds")
_OF_THE_COMMAND = {
    "cache": "the command names the cache",
    **{
        name: f"it says how the sweep is run, not what its runs are: give --{name.replace('_', '-')} to the command"
        for name in ("gang", "engine", "processes", "retries", "ray_address", "gpus_per_job", "cpus_per_job")
    },
    "resume": "a sweep always goes on with what is unfinished",
    "allow_other_cache": "a sweep's runs belong to one cache; continue a single run with --student",
}
"""Options of train that a file does not set, and why."""


@dataclass(frozen=True)
class Leaf:
    """A value of one field, and where it was given."""

    value: Any
    path: str
    """As in `grid.lr[1]`, `runs[0].settings.temperature`, or `--lr`."""


Leaves = Mapping[str, Leaf]
"""Field → its leaf: "student", "lr", "settings.temperature"."""


@dataclass(frozen=True)
class SweepRun:
    """One run that a file asks for."""

    config: TrainConfig
    """Of one student."""
    leaves: Leaves
    """All that it was given."""
    chosen: tuple[str, ...]
    """The fields that `grid` and `runs` gave, in their order."""

    @property
    def place(self) -> str:
        """Which it is, for messages: 'the run of student=…, lr=…'."""
        return f"the run of {', '.join(f'{name}={self.leaves[name].value}' for name in self.chosen)}" if self.chosen else "the run"


@dataclass(frozen=True)
class Sweep:
    """What a file asks for."""

    path: str
    runs: tuple[SweepRun, ...]
    teacher_seconds: float | None = None
    """What extraction spent in the teacher, as `kdcache extract --json` said: for the report's break-even."""


def read_sweep(path: str, *, cache: str, given: Mapping[str, Any] | None = None, students: Sequence[str] = ()) -> Sweep:
    """The runs of the file at `path`, in its order, each a TrainConfig that has been checked, its method's settings too.

    given: options of the command line, by TrainConfig's names, which go before `base`. students: likewise; several are a grid's first list.
    Raises UsageError naming the file and the path of the key, what was expected, and what was found.
    """
    return _File(path).read(cache, given or {}, students)


class _File:
    def __init__(self, path: str) -> None:
        self.path = path
        self.where = f"sweep file {path}"

    def read(self, cache: str, given: Mapping[str, Any], students: Sequence[str]) -> Sweep:
        body = read_yaml(self.path, where=self.where, expected="a YAML file with base: and grid: or runs:", loader=CoreLoader)
        body = self._mapping(body, "", "base: and grid: or runs:")
        for name in body:
            if name not in _SECTIONS:
                raise self._error(f"{name}", f"there is no such key{did_you_mean(name, _SECTIONS)}; the keys here are: {', '.join(_SECTIONS)}")
        if not {"grid", "runs"} & set(body):
            raise self._error("", "it has neither grid: nor runs:; a single run needs no file, expected lists in grid: or a list of runs:")
        base = self._leaves(body.get("base"), "base")
        options = {**self._given(given), **({"student": Leaf(students[0], "--student")} if len(students) == 1 else {})}
        axes = self._axes(body.get("grid"), "grid")
        if len(students) > 1:
            axes = [[{"student": Leaf(name, "--student")} for name in students], *axes]
        kinds = self._kinds(body)
        found: list[SweepRun] = []
        for leaves, own in kinds:
            self._check_overlap(options, leaves, *map(_union, [*axes, *own]))
            number = len(found) + math.prod(len(axis) for axis in [*axes, *own])
            if number > MAX_RUNS:
                raise self._error("grid", f"its lists make {number:,} runs or more; expected at most {MAX_RUNS:,}")
            for combination in itertools.product(*axes, *own):
                chosen: dict[str, Leaf] = dict(leaves)
                for part in combination:
                    chosen |= part
                found.append(self._run(cache, {**base, **options, **chosen}, tuple(chosen)))
        return Sweep(self.path, tuple(found), self._teacher_seconds(body.get("teacher_seconds")))

    # --- sections ---

    def _kinds(self, body: Mapping[str, Any]) -> list[tuple[dict[str, Leaf], list[list[Leaves]]]]:
        """(what a kind of run is given, its own axes) of each."""
        if "runs" not in body:
            return [({}, [])]
        runs = body["runs"]
        if not isinstance(runs, list) or not runs:
            raise self._error("runs", f"expected a list of runs, such as '- method: kd', found {_shown(runs)}")
        kinds = []
        for number, run in enumerate(runs):
            path = f"runs[{number}]"
            run = self._mapping(run, path, "fields such as 'method: kd'")
            kinds.append(
                (self._leaves({name: value for name, value in run.items() if name != "grid"}, path), self._axes(run.get("grid"), f"{path}.grid"))
            )
        return kinds

    def _leaves(self, body: Any, path: str) -> dict[str, Leaf]:
        """Of a mapping of fields."""
        leaves: dict[str, Leaf] = {}
        for key, value in self._mapping({} if body is None else body, path, "fields such as 'epochs: 100'").items():
            self._add(leaves, self._assign(key, value, f"{path}.{key}", at_base=path == "base"))
        return leaves

    def _axes(self, grid: Any, path: str) -> list[list[Leaves]]:
        """Each list of a grid as what it assigns, one after another."""
        axes: list[list[Leaves]] = []
        for key, values in self._mapping({} if grid is None else grid, path, "lists such as 'lr: [1e-3, 2e-3]'").items():
            where = f"{path}.{key}"
            if not isinstance(values, list) or not values:
                raise self._error(where, f"expected a list of values, found {_shown(values)}; one value for all runs belongs into base")
            names = [name.strip() for name in key.split(",")]
            for name in names:
                self._named(name, where)
            axis: list[Leaves] = []
            for number, value in enumerate(values):
                at = f"{where}[{number}]"
                if len(names) == 1:
                    axis.append(self._assign(names[0], value, at))
                    continue
                if not isinstance(value, list) or len(value) != len(names):
                    raise self._error(at, f"expected a list of {len(names)} values, one for each of {', '.join(names)}, found {_shown(value)}")
                together: dict[str, Leaf] = {}
                for name, one in zip(names, value, strict=True):
                    self._add(together, self._assign(name, one, at))
                axis.append(together)
            axes.append(axis)
        self._check_overlap(*map(_union, axes))
        return axes

    def _given(self, given: Mapping[str, Any]) -> dict[str, Leaf]:
        leaves: dict[str, Leaf] = {}
        for name, value in given.items():
            option = f"--{'set' if name == 'settings' else name.replace('_', '-')}"
            leaves |= (
                {f"{name}.{key}": Leaf(one, f"{option} {key}") for key, one in value.items()} if name in _HOLDING else {name: Leaf(value, option)}
            )
        return leaves

    def _teacher_seconds(self, value: Any) -> float | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise self._error("teacher_seconds", f"expected a number above 0, the seconds that 'kdcache extract' said, found {_shown(value)}")
        return float(value)

    # --- one field ---

    def _named(self, key: str, path: str, *, at_base: bool = False) -> tuple[str, str]:
        """(TrainConfig's field, the field that it holds or ''), of a key as it was written."""
        head, dot, rest = key.partition(".")
        name = head.replace("-", "_")
        name = _ALIASES.get(name, name)
        types = _types()
        if name in _OF_THE_COMMAND:
            raise self._error(path, f"{head} is not for a file: {_OF_THE_COMMAND[name]}")
        if name == "out" and not at_base:
            raise self._error(path, "all runs of a sweep go into one folder: expected it in base, or --out on the command line")
        if name not in types or (dot and name not in _HOLDING):
            known = [one.replace("_", "-") if "-" in head else one for one in types]
            why = f"; {name} holds no fields" if name in types else f"{did_you_mean(head, known)}; expected an option of 'kdcache train'"
            raise self._error(path, f"there is no such key{why}")
        if dot and not rest:
            raise self._error(path, f"expected a field's name behind '{head}.'")
        return name, rest

    def _assign(self, key: str, value: Any, path: str, *, at_base: bool = False) -> dict[str, Leaf]:
        """The leaves that `key: value` gives, checked by type."""
        name, field = self._named(key, path, at_base=at_base)
        if field:
            self._check_plain(value, path)
            return {f"{name}.{field}": Leaf(value, path)}
        words, adapter = _types()[name]
        try:
            checked = adapter.validate_json(json.dumps(value), strict=True)  # lists are tuples in JSON only
        except (ValidationError, TypeError, ValueError, RecursionError) as error:
            raise self._error(path, f"expected {words}, found {_shown(value)}") from error
        if name in _HOLDING:
            self._check_plain(value, path)
        if name == "model_kwargs":
            return {f"{name}.{one}": Leaf(part, f"{path}.{one}") for one, part in value.items()}
        if name == "settings":
            return {f"{name}.{one}": Leaf(part, f"{path}.{one}") for one, part in _flat(value)}
        return {name: Leaf(checked, path)}

    def _check_plain(self, value: Any, path: str) -> None:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise self._error(path, f"expected numbers, names, and lists of them, found {_shown(value)}") from error

    def _add(self, leaves: dict[str, Leaf], more: Leaves) -> None:
        self._check_overlap(leaves, more)
        leaves |= more

    def _check_overlap(self, *parts: Leaves) -> None:
        """Raise for a field that two of them give."""
        seen: dict[str, Leaf] = {}
        for part in parts:
            for name, leaf in part.items():
                if name in seen:
                    first, second = (_without_number(one.path) for one in (seen[name], leaf))
                    raise self._error(second, f"{name} is given by {first} too; leave one of them out")
            seen |= part

    # --- one run ---

    def _run(self, cache: str, leaves: Leaves, chosen: tuple[str, ...]) -> SweepRun:
        values: dict[str, Any] = {name: {} for name in _HOLDING}
        for name, leaf in leaves.items():
            head, _, rest = name.partition(".")
            if rest:
                values[head][rest] = leaf.value
            else:
                values[head] = leaf.value
        if "student" not in values:
            raise self._error("", "a run has no student; expected one in base, grid or runs, or --student")
        values["students"] = (values.pop("student"),)
        try:
            config = TrainConfig(cache=cache, **values)
        except UsageError as error:
            option = str(error).partition(" ")[0].rstrip(":").removeprefix("--").replace("-", "_")
            raise self._error(leaves[option].path if option in leaves else "", str(error)) from error
        run = SweepRun(config, leaves, chosen)
        self._check_method(run)
        return run

    def _check_method(self, run: SweepRun) -> None:
        """Raise for a method that is not known, and for settings that it does not take, with the path of the one that is wrong."""
        config, leaves = run.config, run.leaves
        try:
            method_class(config.method)
        except UsageError as error:
            raise self._error(leaves["method"].path if "method" in leaves else "", str(error)) from error
        try:
            parse_settings(config.method, method_settings(config), config.teacher)
        except UsageError as error:
            for name, leaf in leaves.items():
                head, _, rest = name.partition(".")
                if head == "settings":
                    try:
                        parse_settings(config.method, {rest: leaf.value}, config.teacher)
                    except UsageError as own:
                        among = "; of several methods give it to the runs of those that have it, in runs:" if "method" in run.chosen else ""
                        raise self._error(leaf.path, f"{own}{among}") from own
            raise self._error("", f"{run.place}: {error}") from error

    # --- words ---

    def _mapping(self, value: Any, path: str, expected: str) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self._error(path, f"expected {expected}, found {_shown(value)}")
        for name in value:
            if not isinstance(name, str):
                raise self._error(path, f"expected names as keys, found {_shown(name)}")
        return value

    def _error(self, path: str, text: str) -> UsageError:
        return UsageError(f"{self.where}: {path}: {text}" if path else f"{self.where}: {text}")


@cache
def _types() -> dict[str, tuple[str, TypeAdapter[Any]]]:
    """Field of a file → (words for its type, what checks it)."""
    hints = get_type_hints(TrainConfig)
    types = {one.name: hints[one.name] for one in fields(TrainConfig) if one.name not in (*_OF_THE_COMMAND, "students")}
    return {name: (_words(name, kind), TypeAdapter(kind)) for name, kind in {"student": str, **types}.items()}


_WORDS = {
    "bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "float | None": "a number or null",
    "int | None": "a whole number or null", "str | None": "text or null", "tuple[float, float] | None": "a list of two numbers, or null",
}  # fmt: skip


def _words(name: str, kind: Any) -> str:
    if name == "teacher":
        return "a teacher's name, a list of names, or weights by name"
    shown = kind.__name__ if isinstance(kind, type) else str(kind)
    return "fields with values" if name in _HOLDING else _WORDS.get(shown, shown)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A sum's settings may be nested: {"vitkd": {"alpha": …}} is `vitkd.alpha`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _union(axis: Sequence[Leaves]) -> dict[str, Leaf]:
    """Every field that a list gives."""
    return {name: leaf for part in axis for name, leaf in part.items()}


def _without_number(path: str) -> str:
    """A list as a whole: 'grid.lr' of 'grid.lr[1]'."""
    head, bracket, rest = path.rpartition("[")
    return head if bracket and rest.rstrip("]").isdigit() and path.endswith("]") else path


def _shown(value: Any) -> str:
    """A value as YAML has it, in short."""
    if value is None:
        return "nothing"
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # keys of other types
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


__all__ = ["MAX_RUNS", "Leaf", "Sweep", "SweepRun", "read_sweep"]
