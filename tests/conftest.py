"""Set before anything imports torch or the hub: no network, one thread, so that tests are alike on every machine.

A skipped test is a promise that nobody checked: any that lacks the `gpu` mark fails the session.
"""

from __future__ import annotations

import os
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "JOB_COMPLETION_INDEX", "KDCACHE_RANK", "KDCACHE_WORLD_SIZE"):
    os.environ.pop(name, None)  # of what launched the tests
settings.register_profile("kdcache", deadline=None, derandomize=True, max_examples=30, print_blob=False)
settings.load_profile("kdcache")


class NoSkips:
    """Collects skipped tests and modules (expected failures count as skipped) and turns the session's exit status into 1."""

    def __init__(self) -> None:
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and "gpu" not in report.keywords:
            self.skipped.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.skipped.append(report.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.skipped and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for nodeid in self.skipped:
            terminalreporter.write_line(f"SKIPPED WITHOUT THE gpu MARK, which fails the session: {nodeid}", red=True)


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
        if os.environ.get("KDCACHE_BROWSER") == "1":
            raise pytest.UsageError("KDCACHE_BROWSER=1, and there is no chromium on the PATH; install it, on Debian with: apt-get install chromium")
        self.left_out = len(wanting)
        config.hook.pytest_deselected(items=wanting)
        items[:] = [item for item in items if item not in wanting]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.left_out:
            terminalreporter.write_line(
                f"NO CHROMIUM: {self.left_out} browser tests were left out; to run them, on Debian: apt-get install chromium", yellow=True
            )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(NoSkips(), "no-skips")
    config.pluginmanager.register(Browsers(), "browsers")
