"""The test session itself: what is skipped without a reason that the project knows fails it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers import Forked

GPU = "import pytest\n@pytest.mark.gpu\ndef test_on_gpu():\n    pytest.skip('no device')\n"


@pytest.mark.parametrize(
    ("code", "exit_status", "named"),
    [
        ("def test_runs():\n    pass\n", 0, None),
        (GPU + "def test_runs():\n    pass\n", 0, None),
        (GPU + "def test_skips():\n    pytest.skip('tired')\n", 1, "test_it.py::test_skips"),
        ("import pytest\n@pytest.mark.skip\ndef test_marked():\n    pass\ndef test_runs():\n    pass\n", 1, "test_it.py::test_marked"),
        ("import pytest\n@pytest.mark.xfail\ndef test_fails():\n    assert False\n", 1, "test_it.py::test_fails"),
        ("import pytest\npytest.importorskip('no_such_module')\n", 2, "test_it.py"),
    ],
)
def test_a_skip_without_the_gpu_mark_fails_the_session(tmp_path: Path, code: str, exit_status: int, named: str | None) -> None:
    (tmp_path / "test_it.py").write_text(code)
    assert session_of(tmp_path) == (exit_status, [named] if named else [])


@pytest.mark.parametrize(
    ("code", "named"),
    [
        (GPU + "def test_skips():\n    pytest.skip('tired')\n", "test_it.py::test_skips"),
        ("import pytest\npytest.importorskip('none')\n", "test_it.py"),
    ],
)
def test_so_it_does_where_another_process_runs_the_tests(tmp_path: Path, code: str, named: str) -> None:
    (tmp_path / "test_it.py").write_text(code)
    assert session_of(tmp_path, "-n", "1") == (1, [named])


def session_of(folder: Path, *options: str) -> tuple[int, list[str]]:
    """The exit status of a session of the tests in a folder, with this project's conftest, and which of them it names as skipped."""
    shutil.copy(Path(__file__).with_name("conftest.py"), folder / "conftest.py")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a device\n")
    # -rN: no summary at the end, which repeats the messages on a wide terminal, and on any where CI is set
    child = Forked(lambda: pytest.main(["-q", "-rN", "-p", "no:cacheprovider", *options, str(folder)]), folder / "log")
    status = child.wait()
    said = [line for line in child.output().splitlines() if "SKIPPED WITHOUT THE gpu MARK" in line]
    return status, [line.rpartition(": ")[2] for line in said]
