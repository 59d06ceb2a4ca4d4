"""Set before anything imports torch or the hub: no network, one thread, so that tests are alike on every machine.

A skipped test is a promise that nobody checked: any that lacks the `gpu` mark fails.
The whole suite runs in a process a core (pytest-xdist); what names files or keywords, in this one.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "JOB_COMPLETION_INDEX", "KDCACHE_RANK", "KDCACHE_WORLD_SIZE")
for name in list(os.environ):  # of what launched the tests
    if name in OF_LAUNCHERS or name.startswith(("MASTER_", "RAY_", "SLURM_", "TORCHELASTIC_")):
        del os.environ[name]
os.fsync = lambda _descriptor: None  # half of the suite's time; a killed process loses nothing that the kernel has
settings.register_profile("kdcache", deadline=None, derandomize=True, max_examples=30, print_blob=False)
settings.load_profile("kdcache")

MAX_PROCESSES = 8


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """0, which is this process alone, for a run of chosen files or tests: starting others takes seconds."""
    if config.option.keyword or config.option.markexpr or any(".py" in argument for argument in config.args):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_PROCESSES) if cores > 1 else 0


class NoSkips:
    """A skip without the `gpu` mark is a failure."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.skipped and "gpu" not in report.keywords:
            _fail(report)
            vars(report).pop("wasxfail", None)  # or the session passes
        return report

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_make_collect_report(self) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        report = yield
        if report.skipped:
            _fail(report)
        return report


def _fail(report: pytest.TestReport | pytest.CollectReport) -> None:
    report.outcome = "failed"
    report.longrepr = f"SKIPPED WITHOUT THE gpu MARK, which fails the session: {report.nodeid}"


class Browsers:
    """Leaves out the tests marked `browser` where there is no Chromium, and says so; with KDCACHE_BROWSER=1 that is an error instead, as CI wants it."""

    def __init__(self) -> None:
        self.left_out = 0

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        wanting = [item for item in items if item.get_closest_marker("browser")]
        if not wanting:
            return
        from browser import CHROMIUM

        if CHROMIUM is not None:
            return
        self.left_out = len(wanting)
        config.hook.pytest_deselected(items=wanting)
        items[:] = [item for item in items if item not in wanting]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["left_out"] = self.left_out

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """In the process that started the others: each has collected the same tests."""
        self.left_out = max(self.left_out, getattr(node, "workeroutput", {}).get("left_out", 0))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.left_out:
            terminalreporter.write_line(
                f"NO CHROMIUM: {self.left_out} browser tests were left out; to run them, on Debian: apt-get install chromium", yellow=True
            )


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("KDCACHE_BROWSER") == "1" and not hasattr(config, "workerinput"):
        from browser import CHROMIUM

        if CHROMIUM is None:
            raise pytest.UsageError("KDCACHE_BROWSER=1, and there is no chromium on the PATH; install it, on Debian with: apt-get install chromium")
    config.pluginmanager.register(NoSkips(), "no-skips")
    config.pluginmanager.register(Browsers(), "browsers")


@pytest.fixture
def setup(tmp_path: Path) -> Path:
    """Two shards of six samples and a teacher."""
    from helpers import make_shards, make_teacher_dir

    make_shards(tmp_path / "shards", num_shards=2, num_samples=6)
    make_teacher_dir(tmp_path / "teacher")
    return tmp_path
