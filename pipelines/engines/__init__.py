"""Who trains many runs, and where: a Job is what one process trains at a time, an Engine runs jobs. Between train, which knows one process, and
the sweep, which knows none.

    runs = open_runs(configs)              every student of every config, opened and checked, nothing trained
    jobs = plan_jobs(runs, gang=4)         up to 4 of them in one process, on one loader
    for entry in InProcess().run(jobs):    each run's entry as soon as it ends, failed ones with their "error"

A job goes to another process as JSON. There `run_job` trains it; it raises nothing that one run's misfortune could cause.
"""

from __future__ import annotations

import dataclasses
import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from kdcache.errors import KDCacheError
from kdcache.plan import canonical_json

from ..training.config import TrainConfig
from ..training.data import NOT_OF_DATA, Opened, TrainingData, open_data
from ..training.gang import gangs_of
from ..training.run import Run, describe_error

Entry: TypeAlias = dict[str, Any]
"""What `train` reports of a run: {"id", "student", "method", "epochs", "top1", "seconds", "path", "status"}; status is "done", "already done" or
"failed", and a failed one has its "error", text."""


# --- what is to be trained -------------------------------------------------------------------------------------------


def config_to_json(config: TrainConfig) -> dict[str, Any]:
    """All fields, JSON types. Raises TypeError for a setting that has none."""
    body: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))
    return body


def config_from_json(body: Mapping[str, Any]) -> TrainConfig:
    """The config that `config_to_json` was given, lists for tuples. Raises UsageError for values that can't be right."""
    pairs = {"opt_betas": tuple(body["opt_betas"])} if body.get("opt_betas") is not None else {}
    return TrainConfig(**{**body, "students": tuple(body["students"]), **pairs})


class Opener:
    """Opens the data of configs; those that read the same share what is open."""

    def __init__(self) -> None:
        self._opened = Opened()
        self._data: dict[bytes, TrainingData] = {}

    def runs(self, config: TrainConfig) -> list[Run]:
        """Its students' runs, with ids and folders. Raises KDCacheError as `open_data`."""
        key = canonical_json({name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_OF_DATA})
        if key not in self._data:
            self._data[key] = open_data(config, self._opened)
        return [Run(dataclasses.replace(config, students=(name,)), self._data[key], name) for name in config.students]


def open_runs(configs: Sequence[TrainConfig]) -> list[Run]:
    """Every student of every config. Raises KDCacheError as `open_data`."""
    opener = Opener()
    return [run for config in configs for run in opener.runs(config)]


# --- jobs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Runs that train in one process at a time: alone, or as a gang on one loader."""

    configs: tuple[TrainConfig, ...]
    """Of one student each."""
    ids: tuple[str, ...]
    """Those of their runs: the names of their folders."""

    def to_json(self) -> dict[str, Any]:
        """For another process, JSON types."""
        return {"configs": [config_to_json(config) for config in self.configs], "ids": list(self.ids)}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Job:
        """What `to_json` gave."""
        return cls(tuple(config_from_json(config) for config in body["configs"]), tuple(body["ids"]))

    @property
    def folders(self) -> tuple[Path, ...]:
        """Those of its runs."""
        return tuple(Path(config.out).expanduser().absolute() / run_id for config, run_id in zip(self.configs, self.ids, strict=True))

    def failures(self, error: str, *, but: Sequence[str] = ()) -> Iterator[Entry]:
        """Entries of its runs as failed, for an engine whose process died with the job; without those of the ids `but`, which were reported."""
        for config, run_id, folder in zip(self.configs, self.ids, self.folders, strict=True):
            if run_id not in but:
                yield {
                    "id": run_id, "student": config.students[0], "method": config.method, "epochs": epochs_kept(folder), "top1": None, "seconds": 0.0,
                    "path": str(folder), "status": "failed", "error": error,
                }  # fmt: skip


def plan_jobs(runs: Sequence[Run], *, gang: int = 1, slots: int = 1) -> list[Job]:
    """Jobs of up to `gang` runs that train on the same stream of batches, in the order of the runs; of fewer where any of `slots` would be idle."""
    size = min(gang, max(1, -(-len(runs) // slots)))
    return [Job(tuple(run.config for run in members), tuple(run.id for run in members)) for members in gangs_of(runs, size)]


def run_job(job: Job, *, progress: bool = False) -> Iterator[Entry]:
    """Train a job in this process: an entry for each of its runs. A run that was begun before goes on from its checkpoint.

    What goes wrong is in the entries: an error of any kind ends its run, one of a gang's loader all runs of the gang.
    """
    from ..train import train_configs

    configs = [dataclasses.replace(config, resume=folder.exists()) for config, folder in zip(job.configs, job.folders, strict=True)]
    reported: list[str] = []
    message = "it ended without an error being told"
    try:
        for entry in train_configs(configs, gang=len(configs), progress=progress):
            reported.append(entry["id"])
            yield entry
    except KDCacheError as error:
        message = str(error)
    except Exception as error:  # noqa: BLE001 - whatever a method or a device raises: the sweep's other runs go on, and its report shows this
        traceback.print_exc()
        message = describe_error(error)
    yield from job.failures(message, but=reported)


def epochs_kept(folder: Path) -> int:
    """Epochs of a run that are trained and kept, by its summary.csv."""
    try:
        return max(0, len((folder / "summary.csv").read_text(encoding="utf-8").splitlines()) - 1)
    except (OSError, UnicodeDecodeError):
        return 0


# --- engines ---------------------------------------------------------------------------------------------------------


class Engine(Protocol):
    """Runs jobs, in whichever order and wherever."""

    @property
    def slots(self) -> int:
        """Jobs that run at a time, for predictions."""

    @property
    def cores(self) -> int | None:
        """A job's share of the cores, likewise; None: all that there are."""

    def run(self, jobs: Sequence[Job], *, progress: bool = False) -> Iterator[Entry]:
        """An entry for every run of every job, as soon as it ends, "failed" with its "error" for those whose process died."""


class InProcess:
    """Jobs one after another in this process."""

    slots, cores = 1, None

    def run(self, jobs: Sequence[Job], *, progress: bool = False) -> Iterator[Entry]:
        for job in jobs:
            yield from run_job(job, progress=progress)
