"""Sweeps: what a file asks for, skip and resume, failures that stay alone, a leaderboard that is the metrics', a report that stands alone."""

from __future__ import annotations

import csv
import itertools
import json
import re
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from browser import CONTRAST, OUTSIDE, Browser, Parsed, browser
from click.testing import CliRunner, Result
from helpers import TINY_VIT, Forked, die_at, kdcache_command, make_cache, make_shard, save_local_dir, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cli.main import main
from kdcache.console import visible
from kdcache.errors import UsageError
from kdcache.join import CachedViews
from kdcache.methods.kd import KD
from kdcache.model_cost import cost_of
from pipelines.engines import Job, config_from_json, config_to_json, open_runs
from pipelines.engines.ray_address import check_address, show_token_here
from pipelines.sweep import plan_sweep, read_sweep, settle
from pipelines.sweep.report import build_report, front_of
from pipelines.sweep.results import read_results
from pipelines.sweep.speed import time_run
from pipelines.train import TrainConfig, train
from pipelines.training.data import NOT_OF_DATA, open_data

CNN = "resnet18"
CNN_ARGS: dict[str, Any] = {"channels": [4, 4, 8, 8], "stem_width": 4}
DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cache/ of 2 shards × 6 images × 2 views, and val/."""
    folder = tmp_path_factory.mktemp("sweep")
    make_cache(folder, num_shards=2, num_samples=6, views=2, targets=["logits"])
    make_shard(folder / "val" / "val-00.tar", num_samples=10, seed=7)
    return folder


def base_of(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "student": CNN, "model_kwargs": CNN_ARGS, "val": str(folder / "val"), "epochs": 2, "batch_size": 4, "workers": 0, "device": "cpu", "lr": 0.01,
        "num_classes": 10, **more,
    }  # fmt: skip


def write(path: Path, body: Mapping[str, Any] | str) -> str:
    """A sweep file: JSON is YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(body if isinstance(body, str) else json.dumps(body), encoding="utf-8")
    return str(path)


def sweep(folder: Path, file: str, out: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["train", str(folder / "cache"), "--sweep", file, "--out", str(out), *options])


def rows_of(out: Path) -> list[dict[str, str]]:
    with open(out / "leaderboard.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- what a file asks for ---


def lists(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(values, min_size=1, max_size=3, unique=True)


AXES: dict[str, st.SearchStrategy[list[Any]]] = {
    "lr": lists(st.floats(1e-5, 1)), "batch-size": lists(st.integers(1, 9)), "student": lists(st.sampled_from("abcd")),
    "model_kwargs.drop_rate": lists(st.floats(0, 1)), "settings.temperature": lists(st.floats(1, 9)),
}  # fmt: skip
ZIPPED = lists(st.tuples(st.integers(0, 9), st.sampled_from(["sgd", "lamb"]))).map(lambda pairs: {"seed, opt": [list(pair) for pair in pairs]})
GRIDS = st.permutations(list(AXES)).flatmap(lambda names: st.fixed_dictionaries({name: AXES[name] for name in names[:3]}))
KINDS = st.lists(st.fixed_dictionaries({"epochs": st.integers(1, 9)}, optional={"grid": st.fixed_dictionaries({"momentum": AXES["lr"]})}), max_size=3)


@given(GRIDS, st.just({}) | ZIPPED, KINDS)
def test_runs_are_nested_loops_in_the_order_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, grid: dict[str, Any], zipped: dict[str, Any], kinds: list[dict[str, Any]]
) -> None:
    body = {"base": {"student": "e"}, "grid": {**grid, **zipped}, **({"runs": kinds} if kinds else {})}
    if "student" in grid:
        del body["base"]
    file = write(tmp_path_factory.mktemp("file") / "s.yaml", body)
    expected = []
    for kind in kinds or [{}]:
        axes = {**grid, **zipped, **kind.get("grid", {})}
        for values in itertools.product(*axes.values()):
            given = {name: value for name, value in kind.items() if name != "grid"}
            for name, value in zip(axes, values, strict=True):
                given |= dict(zip(name.split(", "), value, strict=True)) if ", " in name else {name: value}
            expected.append(given)
    runs = read_sweep(file, cache="c").runs
    assert len(runs) == len(expected)
    for run, given in zip(runs, expected, strict=True):
        config = run.config
        found: dict[str, Any] = {
            "student": config.students[0], "model_kwargs.drop_rate": config.model_kwargs.get("drop_rate"),
            "settings.temperature": config.settings.get("temperature"),
        }  # fmt: skip
        for name, value in given.items():
            assert found.get(name, getattr(config, name.replace("-", "_"), None)) == value, name
        assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config
    assert read_sweep(file, cache="c") == read_sweep(file, cache="c"), "a pure function of the file"


def test_numbers_and_names_are_what_they_look_like(tmp_path: Path) -> None:
    file = write(
        tmp_path / "s.yaml",
        "base: {student: no, seed: 010, opt_betas: [.9, 9.8e-1], wandb_project: 2024-01-01, pretrained: false}\n"
        "grid: {lr: [1e-3, 1E-3, 1e0, 5], clip-grad: [null, 1]}\nteacher_seconds: 1e2",
    )
    found = read_sweep(file, cache="c")
    assert [run.config.lr for run in found.runs[::2]] == [0.001, 0.001, 1.0, 5.0]
    assert [run.config.clip_grad for run in found.runs[:2]] == [None, 1.0]
    config = found.runs[0].config
    assert (config.students, config.seed, config.opt_betas, config.wandb_project, config.pretrained) == (
        ("no",),
        10,
        (0.9, 0.98),
        "2024-01-01",
        False,
    )
    assert found.teacher_seconds == 100.0


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("base: {lrr: 1}\ngrid: {student: [a]}", r"base\.lrr: there is no such key; did you mean 'lr'\?"),
        ("base: {batch-sise: 1}\ngrid: {student: [a]}", r"base\.batch-sise: .*did you mean 'batch-size'\?"),
        ("base: {students: [a]}\ngrid: {lr: [1]}", r"base\.students: .*did you mean 'student'\?"),
        ("grid: {student: [a], optt: [sgd]}", r"grid\.optt: .*did you mean 'opt'\?"),
        ("grid: {student: [a], 'lr, optt': [[1, sgd]]}", r"grid\.lr, optt: .*did you mean 'opt'\?"),
        ("base: {student: a}\nruns: [{method: kd}, {}, {}, {lrr: 1}]", r"runs\[3\]\.lrr: .*did you mean 'lr'\?"),
        ("base: {student: a}\nruns: [{grid: {lrr: [1]}}]", r"runs\[0\]\.grid\.lrr: .*did you mean 'lr'\?"),
        ("grids: {lr: [1]}", r"grids: there is no such key; did you mean 'grid'\?; the keys here are: base, grid, runs, teacher_seconds"),
        ("base: {settings: {temprature: 1}}\ngrid: {student: [a]}", r"base\.settings\.temprature: method 'kd' has no field .* did you mean 'temperature'"),
        ("grid: {student: [a], settings.temprature: [1]}", r"grid\.settings\.temprature\[0\]: method 'kd' has no field"),
        ("grid: {student: [a], method: [kd, ce], set.temperature: [1]}", r"grid\.set\.temperature\[0\]: method 'ce' has no field .* in runs:"),
        ("grid: {student: [a], method: [nkd+vitkd], settings: [{vitkd: {alfa: 1}}]}", r"grid\.settings\[0\]\.vitkd\.alfa: method .*'alpha'"),
        ("grid: {student: [a], settings.temperature: [2, hot]}", r"grid\.settings\.temperature\[1\]: .*temperature.*'hot'"),
        ("grid: {student: [a], method: [kdd]}", r"grid\.method\[0\]: method 'kdd' is not known; did you mean 'kd'"),
        ("grid: {student: [a], lr: [fast]}", r'grid\.lr\[0\]: expected a number, found "fast"'),
        ("grid: {student: [a], lr: [1e-3, -1]}", r"grid\.lr\[1\]: --lr -1.0: expected a number above 0"),
        ("grid: {student: [a], epochs: [1.5]}", r"grid\.epochs\[0\]: expected a whole number, found 1\.5"),
        ("base: {pretrained: yes}\ngrid: {student: [a]}", r'base\.pretrained: expected true or false, found "yes"'),
        ("base: {opt-betas: [1]}\ngrid: {student: [a]}", r"base\.opt-betas: expected a list of two numbers, or null, found \[1\]"),
        ("base: {teacher: 1}\ngrid: {student: [a]}", r"base\.teacher: expected a teacher's name, a list of names, or weights by name, found 1"),
        ("base: {model-kwargs: 1}\ngrid: {student: [a]}", r"base\.model-kwargs: expected fields with values, found 1"),
        ("grid: {student: [1e-3]}", r"grid\.student\[0\]: expected text, found 0\.001"),
        ("grid: {student: a}", r'grid\.student: expected a list of values, found "a"; one value for all runs belongs into base'),
        ("grid: {student: [a], lr: []}", r"grid\.lr: expected a list of values, found \[\]"),
        ("grid: {student: [a], 'lr, opt': [[1, sgd], [2]]}", r"grid\.lr, opt\[1\]: expected a list of 2 values, one for each of lr, opt, found \[2\]"),
        ("grid: {student: [a], lr.x: [1]}", r"grid\.lr\.x: there is no such key; lr holds no fields"),
        ("grid: {student: [a], settings.: [1]}", r"grid\.settings\.: expected a field's name behind 'settings\.'"),
        ("grid: {student: [a], lr: [1]}\nruns: [{lr: 2}]", r"grid\.lr: lr is given by runs\[0\]\.lr too; leave one of them out"),
        ("grid: {student: [a], lr: [1], 'lr, opt': [[1, sgd]]}", r"grid\.lr, opt: lr is given by grid\.lr too"),
        ("base: {lr: 1, lr: 2}", r"the key 'lr' is given twice"),
        ("base: {batch-size: 1, batch_size: 2}\ngrid: {student: [a]}", r"base\.batch_size: batch_size is given by base\.batch-size too"),
        ("base: {kd-temperature: 2}\ngrid: {student: [a], settings.temperature: [1]}", r"the run of student=a.*are the same field"),
        ("grid: {student: [a], out: [b]}", r"grid\.out: all runs of a sweep go into one folder"),
        ("base: {student: a, cache: b}\ngrid: {lr: [1]}", r"base\.cache: cache is not for a file: the command names the cache"),
        ("base: {student: a, resume: true}\ngrid: {lr: [1]}", r"base\.resume: resume is not for a file"),
        ("grid: {lr: [1]}", r"a run has no student; expected one in base, grid or runs, or --student"),
        ("base: {student: a}", r"it has neither grid: nor runs:"),
        ("runs: {a: 1}", r"runs: expected a list of runs, such as '- method: kd'"),
        ("runs: [a]", r"runs\[0\]: expected fields such as 'method: kd', found \"a\""),
        ("[1]", r"expected base: and grid: or runs:, found \[1\]"),
        ("grid: {1: [1]}", r"grid: expected names as keys, found 1"),
        ("teacher_seconds: -1\ngrid: {student: [a]}", r"teacher_seconds: expected a number above 0"),
        (f"base: {{student: a}}\ngrid: {{seed: {list(range(200))}, lr: {list(range(1, 200))}}}", r"grid: its lists make 39,800 runs or more; expected at most"),
        ("base: &a [*a]", r"the alias \*a is not taken"),
        ("base: {", r"not YAML: .*, line 1, column 8"),
        ({"base": {"gang": 4}, "grid": {"lr": [1]}}, r"base\.gang: gang is not for a file: .*give --gang to the command"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused_with_its_path(tmp_path: Path, body: str, text: str) -> None:
    file = write(tmp_path / "s.yaml", body)
    with pytest.raises(UsageError, match=rf"^sweep file {re.escape(file)}: .*{text}"):
        read_sweep(file, cache="c")
    result = CliRunner().invoke(main, ["train", "nowhere", "--sweep", file])
    assert result.exit_code == 2 and "sweep file" in result.stderr


def test_options_of_the_command_go_before_base_and_clash_with_lists(tmp_path: Path) -> None:
    file = write(tmp_path / "s.yaml", {"base": {"epochs": 9, "settings": {"temperature": 3}}, "grid": {"lr": [1, 2]}, "runs": [{"momentum": 0.5}]})
    given = {"epochs": 2, "settings": {"smoothing": 0.2}, "out": "there"}
    runs = read_sweep(file, cache="c", given=given, students=["a", "b"]).runs
    assert [(run.config.students[0], run.config.lr) for run in runs] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert {(run.config.epochs, run.config.out) for run in runs} == {(2, "there")}
    assert runs[0].config.settings == {"temperature": 3, "smoothing": 0.2}
    for option, where in (("lr", r"grid\.lr"), ("momentum", r"runs\[0\]\.momentum")):
        with pytest.raises(UsageError, match=rf"{where}: {option} is given by --{option} too"):
            read_sweep(file, cache="c", given={option: 1.0}, students=["a"])
    typed = CliRunner().invoke(main, ["train", "nowhere", "--sweep", file, "--student", "a", "--lr", "1e-3"])  # the default's value, but typed
    assert typed.exit_code == 2 and "--lr too" in typed.stderr
    for options, text in (
        (["--dry-run"], "--sweep FILE.yaml"), ([], "--student MODEL, or --sweep"), (["--sweep", file, "--time-steps", "1"], "--dry-run beside it"),
        (["--sweep", file, "--resume", "--allow-other-cache"], "one cache"), (["--sweep", str(tmp_path / "no.yaml")], "can't be read"),
    ):  # fmt: skip
        refused = CliRunner().invoke(main, ["train", "nowhere", *options])
        assert refused.exit_code == 2 and text in refused.stderr


def test_data_is_shared_by_runs_that_differ_in_what_it_does_not_depend_on(folder: Path, tmp_path: Path) -> None:
    config = TrainConfig(cache=str(folder / "cache"), students=("a", "b"), out=str(tmp_path))
    runs = open_runs([config, replace(config, lr=1.0), replace(config, views=1)])
    assert [run.data is runs[0].data for run in runs] == [True, True, True, True, False, False]
    assert {id(run.data.cache) for run in runs} == {id(runs[0].data.cache)}
    assert len({run.id for run in runs}) == 6


def test_every_field_of_a_config_decides_the_data_or_is_known_not_to(folder: Path) -> None:
    read: set[str] = set()

    class Noting(TrainConfig):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    of_data = {
        "cache", "data", "val", "label_key", "method", "settings", "kd_temperature", "distill_loss_weight", "task_loss_weight", "smoothing", "teacher",
        "limit_shards", "views", "num_classes", "shuffle", "batch_size", "seed",
    }  # fmt: skip
    every = [field.name for field in fields(TrainConfig)]
    assert sorted([*of_data, *NOT_OF_DATA]) == sorted(every), "a new field belongs to one of the two"
    config = Noting(cache=str(folder / "cache"), students=("a",), shuffle="block", val=str(folder / "shards"))
    read.clear()
    open_data(config)
    assert read & set(every) == of_data


def test_a_job_goes_through_json_whole() -> None:
    config = TrainConfig(
        cache="c", students=("a",), settings={"t": 1e-3, "x": [1, 2]}, opt_betas=(0.9, 0.98), teacher={"a": 0.7, "b": 0.3}, clip_grad=None, seed=2**62
    )
    job = Job((config, config_from_json(config_to_json(config))), ("x-1", "x-2"))
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job
    assert [entry["id"] for entry in job.failures("killed", but=["x-1"])] == ["x-2"]


# --- what it will do ---


def test_a_dry_run_trains_nothing_and_says_what_its_times_rest_on(folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "s.yaml", {"base": base_of(folder, epochs=3), "grid": {"method": ["ce", "kd"], "lr": [1e-2, 1e-3], "workers": [0, 1]}})
    unknown = sweep(folder, file, tmp_path / "runs", "--dry-run", "--time-steps", "0", "--json")
    assert unknown.exit_code == 0, unknown.output
    facts = json.loads(unknown.stdout)
    assert len(facts["runs"]) == 4 and facts["left"] is None and "nothing was measured" in unknown.stderr
    assert "are the same" in unknown.stderr and not (tmp_path / "runs").exists()
    timed = json.loads(sweep(folder, file, tmp_path / "runs", "--dry-run", "--time-steps", "2", "--json").stdout)
    assert all(run["left"] > 0 and run["basis"].startswith("2 steps on cpu now") for run in timed["runs"])
    assert not (tmp_path / "runs").exists()
    assert abs(timed["left"] - sum(run["left"] for run in timed["runs"])) < 0.1
    (done,) = train(config_of(facts["runs"][0], file, folder, tmp_path / "runs"))
    after = json.loads(sweep(folder, file, tmp_path / "runs", "--dry-run", "--time-steps", "0", "--json").stdout)
    assert [(run["status"], run["left"] == 0) for run in after["runs"]] == [("done", True), *[("new", False)] * 3]
    other, another = (next(run["basis"] for run in after["runs"][1:] if run["method"] == method) for method in ("ce", "kd"))
    assert other == f"measured: {done['id']}" and another == f"measured: {done['id']}, another method"
    cost = cost_of(tiny_model(CNN, num_classes=10, **CNN_ARGS), 32)
    assert {(run["params"], run["macs"], run["steps"]) for run in after["runs"]} == {(cost.params, cost.macs, 9)}


class Paced(KD):
    """A step takes 20 ms, the first 600 ms."""

    name: ClassVar[str] = "paced"
    steps = 0

    def losses(self, outputs: Any, labels: Any, targets: Any) -> Any:
        self.steps += 1
        time.sleep(0.6 if self.steps == 1 else 0.02)
        return super().losses(outputs, labels, targets)


def test_timed_steps_wait_for_their_batches_as_those_of_the_run_do(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = CachedViews.__getitems__

    def slow(self: CachedViews, items: Any) -> Any:
        time.sleep(0.2)  # longer than four steps: of two workers a batch comes every 100 ms
        return made(self, items)

    monkeypatch.setattr(CachedViews, "__getitems__", slow)
    student_args = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    options = base_of(folder, model_kwargs=student_args, batch_size=1, views=1, method="test_sweep:Paced", workers=None, out=str(tmp_path))
    del options["student"]
    (run,) = open_runs([TrainConfig(cache=str(folder / "cache"), students=(TINY_VIT,), **options)])
    pace = time_run(run, 3, cores=2)
    assert pace.seconds > 0.08, "a batch of two workers, none of which was ahead after the first step"
    assert pace.seconds > pace.own_seconds > 0.02


@pytest.mark.parametrize(("rank", "told"), [("0", "without torchrun"), ("1", "")])
def test_a_sweep_is_not_run_by_a_launcher(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, told: str) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    result = sweep(folder, write(tmp_path / "s.yaml", {"base": base_of(folder), "grid": {"lr": [1e-3]}}), tmp_path / "runs")
    assert result.exit_code == 2 and told in result.stderr and bool(told) == bool(result.stderr)
    assert not (tmp_path / "runs").exists()


def config_of(run: Mapping[str, Any], file: str, folder: Path, out: Path) -> TrainConfig:
    """The config of a planned run."""
    plan = plan_sweep(read_sweep(file, cache=str(folder / "cache"), given={"out": str(out)}))
    return next(planned.run.config for planned in plan.runs if planned.run.id == run["id"])


def test_multiply_accumulates_are_counted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16 * 16, 10)).train()
    state = torch.get_rng_state()
    cost = cost_of(model, 16)
    assert cost.macs == 16 * 16 * 8 * 27 + 8 * 16 * 16 * 10
    assert cost.params == 8 * 28 + 16 + 8 * 16 * 16 * 10 + 10
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert cost_of(Shy(model), 16) == cost


class Shy(nn.Module):
    """Looks at values, which tensors without values can't bear."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert float(images.sum()) == 0
        output: torch.Tensor = self.model(images)
        return output


def test_runs_that_cannot_be_trained_are_all_named_before_any_is(folder: Path, tmp_path: Path) -> None:
    body = {"base": base_of(folder), "runs": [{"method": "ce"}, {"student": "resnet81"}, {"method": "vitkd"}, {"opt": "nope"}]}
    result = sweep(folder, write(tmp_path / "s.yaml", body), tmp_path / "runs")
    assert result.exit_code == 1
    for text in ("3 of its 4 runs can't be trained", "student=resnet81: ", "method=vitkd: ", "features@blocks.0", "opt=nope: "):
        assert text in result.stderr
    assert not (tmp_path / "runs").exists()


# --- trained ---


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path, str]:
    """A sweep of hostile names, of whose four runs, in gangs of two, one fails: (result, OUT, file)."""
    place = tmp_path_factory.mktemp("trained")
    student = save_local_dir(tiny_model(CNN, num_classes=10, **CNN_ARGS), place / HOSTILE, {**CNN_ARGS, "num_classes": 10})
    base = base_of(folder, model_ema=True, model_ema_decay=0.5, warmup_epochs=0)
    runs = [{"method": "ce"}, {"method": "kd", "grid": {"lr": [0.01, 1e30]}}, {"method": "kd", "student": student, "model_kwargs": {}}]
    del base["lr"], base["model_kwargs"], base["student"]
    for run in runs[:2]:
        run |= {"student": CNN, "model_kwargs": CNN_ARGS}
    file = write(place / f"{HOSTILE}.yaml", {"base": base, "runs": runs, "teacher_seconds": 60})
    return sweep(folder, file, place / "runs", "--gang", "2", "--json"), place / "runs", file


HOSTILE = "<script>alert(1)<" + "\u2215script>\u202e\"'&amp;"


def test_a_failed_run_stays_alone_and_is_named_at_the_end(trained: tuple[Result, Path, str], folder: Path) -> None:
    result, out, file = trained
    assert result.exit_code == 1
    entries = json.loads(result.stdout)["runs"]
    assert [(entry["method"], entry["status"]) for entry in entries].count(("kd", "failed")) == 1
    assert sorted(entry["status"] for entry in entries) == ["done", "done", "done", "failed"]
    (failed,) = (entry for entry in entries if entry["status"] == "failed")
    assert "not finite" in failed["error"]
    assert f"1 of 4 runs failed; run the same command again to go on with them:\n  {failed['id']}: " in result.stderr
    again = sweep(folder, file, out, "--gang", "2", "--json")
    assert again.exit_code == 1
    assert sorted(entry["status"] for entry in json.loads(again.stdout)["runs"]) == ["already done", "already done", "already done", "failed"]
    plan = plan_sweep(read_sweep(file, cache=str(folder / "cache"), given={"out": str(out)}))
    of_others = [{**entry, "status": "failed", "error": "is being trained by another process"} for entry in entries]
    assert sorted(entry["status"] for entry in settle(plan, of_others)) == ["already done", "already done", "already done", "failed"]
    assert [one.status for one in read_results(plan, {entry["id"]: entry["error"] for entry in of_others})] == ["done", "done", "done", "failed"]
    assert result.stderr.count("alert(1)") > 0 and "\u202e" not in result.stderr + again.stderr


def test_the_leaderboard_is_what_the_runs_measured(trained: tuple[Result, Path, str]) -> None:
    result, out, _ = trained
    rows = rows_of(out)
    entries = {entry["id"]: entry for entry in json.loads(result.stdout)["runs"]}
    assert {row["id"] for row in rows} == set(entries)
    done = [row for row in rows if row["status"] == "done"]
    assert rows[: len(done)] == done == sorted(done, key=lambda row: -float(row["top1"]))
    for row in done:
        lines = [json.loads(line) for line in Path(row["path"], "metrics.jsonl").read_text().splitlines()]
        epochs = [line for line in lines if "step" not in line]
        best = max(epochs, key=lambda line: (line["eval_top1"], -line["epoch"]))
        assert (float(row["top1"]), float(row["top5"]), float(row["raw_top1"])) == tuple(
            best[name] for name in ("eval_top1", "eval_top5", "eval_raw_top1")
        )
        assert float(row["top1"]) == entries[row["id"]]["top1"] and row["weights"] == "ema"
        assert float(row["seconds"]) == pytest.approx(sum(line["seconds"] for line in epochs), abs=2e-3)
        assert int(row["epochs"]) == 2 == len(epochs)
    (failed,) = (row for row in rows if row["status"] == "failed")
    assert "not finite" in failed["error"] and float(failed["lr"]) == 1e30


def test_a_killed_sweep_goes_on_to_the_results_of_an_undisturbed_one(folder: Path, tmp_path: Path) -> None:
    body = {"base": base_of(folder, recovery_interval=1), "grid": {"method": ["ce", "kd"], "lr": [1e-2, 1e-3]}}
    file = write(tmp_path / "s.yaml", body)
    assert sweep(folder, file, tmp_path / "whole").exit_code == 0
    out = tmp_path / "killed"
    command = kdcache_command("train", folder / "cache", "--sweep", file, "--out", out)

    second = plan_sweep(read_sweep(file, cache=str(folder / "cache"), given={"out": str(out)})).runs[1].run.id

    def run_and_die() -> int:
        die_at(out, f"{second}/last/", 8)  # after its first checkpoints
        return command()

    process = Forked(run_and_die, tmp_path / "log")
    assert process.wait() == -9, process.output()
    finished = {path.parent.name: stamps(path.parent) for path in out.glob("*/export")}
    assert len(finished) == 1 and len([path for path in out.iterdir() if path.is_dir()]) == 2, process.output()
    resumed = json.loads(sweep(folder, file, out, "--dry-run", "--time-steps", "0", "--json").stdout)
    assert sorted(run["status"] for run in resumed["runs"]) == ["done", "new", "new", "resume"]
    result = sweep(folder, file, out, "--json")
    assert result.exit_code == 0, result.output
    assert sorted(entry["status"] for entry in json.loads(result.stdout)["runs"]) == ["already done", "done", "done", "done"]
    for name, before in finished.items():
        assert stamps(out / name) == before
    times = {"seconds", "own_seconds", "images_per_second", "path"}
    assert [{k: v for k, v in row.items() if k not in times} for row in rows_of(out)] == [
        {k: v for k, v in row.items() if k not in times} for row in rows_of(tmp_path / "whole")
    ]
    for row in rows_of(out):
        for part in ("export/model.safetensors", "export/config.json", "summary.csv"):
            assert (out / row["id"] / part).read_bytes() == (tmp_path / "whole" / row["id"] / part).read_bytes()


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder → (inode, time of change)."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_the_example_of_the_docs_runs(folder: Path, tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "sweeps.md").read_text(encoding="utf-8"), re.DOTALL)
    file = write(tmp_path / "s.yaml", example.replace("quickstart/shards/val", str(folder / "val")))
    result = sweep(
        folder, file, tmp_path / "runs", "--epochs", "1", "-b", "12", "-j", "0", "--device", "cpu", "--num-classes", "10", "--gang", "12", "--json"
    )
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["runs"]) == 12
    assert {(row["student"], row["method"], row["lr"], row["settings.temperature"]) for row in rows_of(tmp_path / "runs")} == {
        (student, method, lr, t)
        for student in ("test_vit", "test_resnet")
        for lr in ("0.003", "0.001")
        for method, t in (("ce", ""), ("kd", "2"), ("kd", "4"))
    }


# --- the report ---


def test_the_report_stands_alone_and_shows_hostile_names_as_text(trained: tuple[Result, Path, str]) -> None:
    _, out, _ = trained
    data = (out / "report.html").read_bytes()
    page = Parsed(data)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == tags.count("style") == 1
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src", "srcset")], (tag, attributes)
        assert (attributes.get("href") or "#").startswith(("data:", "#")), (tag, attributes)
    assert not re.search(r"https?://|url\((?!#)|@import", data.decode())
    assert visible(HOSTILE) in page.text() and "\u202e" not in data.decode()
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    assert {(attributes.get("href") or "#")[1:] for tag, attributes in page.elements if tag == "a"} <= set(ids)
    for row in rows_of(out):
        assert row["error"].split(";")[0] in page.text()
        if row["top1"]:
            assert f"{float(row['top1']):.2f}" in page.text()


def test_the_cache_is_paid_for_when_as_many_views_were_replayed(trained: tuple[Result, Path, str], folder: Path) -> None:
    _, _, file = trained
    plan = plan_sweep(read_sweep(file, cache=str(folder / "cache"), given={"out": str(trained[1])}))
    results = read_results(plan, {})
    assert [result.status for result in results] == ["done", "done", "done", "failed"] and "not finite" in results[3].error, "kept in its folder"
    text = Parsed(build_report(plan, results)).text()
    passes = 12 * 2
    assert f"spent by extraction{passes} passes, 1 min 00 s" in text
    replayed = sum(12 * len(result.history) for result in results if result.method == "kd")
    assert f"saved so far{replayed} passes" in text
    assert "in epoch 2 of" in text, "2 views are paid for by 2 epochs"


costs = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=12)


@given(costs)
def test_the_front_is_what_none_beats(points: list[tuple[int, int]]) -> None:
    front = {points[number] for number in front_of(points)}
    beaten = {(x, y) for x, y in points if any((a <= x and b >= y) and (a, b) != (x, y) for a, b in points)}
    assert front == set(points) - beaten


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True), (360, False), (1280, True)])
def test_the_report_in_a_browser_is_quiet_legible_and_reached_by_keys(
    chromium: Browser, trained: tuple[Result, Path, str], width: int, dark: bool
) -> None:
    page = trained[1] / "report.html"
    chromium.requests.clear()
    chromium.complaints.clear()
    chromium.open(page, width=width, dark=dark)
    assert chromium.run("document.documentElement.scrollWidth") == width
    assert chromium.run(OUTSIDE) == []
    assert chromium.run(CONTRAST) == []
    chromium.run("document.querySelector('#accuracy a.run').focus()")
    told = chromium.run("document.querySelector('#accuracy .says').textContent")
    assert "top-1" in told and "M parameters" in told
    assert chromium.run("document.querySelectorAll('#accuracy a.run.same').length") == 3, "one in each chart"
    chromium.press("m")
    assert chromium.run("document.querySelector('#methods input:checked').value") == "ce"
    assert chromium.run("[...document.querySelectorAll('a.run.dim')].every((mark) => mark.dataset.group === 'kd')")
    assert chromium.run("document.querySelectorAll('a.run.dim').length") > 0
    assert chromium.complaints == []
    assert {url.partition("#")[0] for url in chromium.requests if not url.startswith("data:")} == {page.as_uri()}


@pytest.mark.browser
def test_the_table_of_runs_fits_on_paper(chromium: Browser, trained: tuple[Result, Path, str]) -> None:
    chromium.open(trained[1] / "report.html", width=718)  # A4 without its margins
    chromium.call("Emulation.setEmulatedMedia", media="print")
    assert chromium.run("document.querySelector('table.runs').getBoundingClientRect().right") <= 718
    assert chromium.run("Math.min(...[...document.querySelectorAll('.runs .value')].map((cell) => cell.clientWidth))") >= 36


@pytest.mark.parametrize("address", ["ray..cluster:6379", "x" * 64 + ":6379", "localhost:²", "localhost:99999", "localhost", "ray://localhost:10001"])
def test_an_address_that_no_cluster_can_have_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "token")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    show_token_here(address)
    with pytest.raises(UsageError, match=f"--engine ray: .*{re.escape(address)}"):
        check_address(address)
