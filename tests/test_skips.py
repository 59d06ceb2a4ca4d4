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
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path / "conftest.py")
    (tmp_path / "test_it.py").write_text(code)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a device\n")
    child = Forked(lambda: pytest.main(["-q", "-p", "no:cacheprovider", str(tmp_path)]), tmp_path / "log")
    assert child.wait() == exit_status, child.output()
    said = [line for line in child.output().splitlines() if "SKIPPED WITHOUT THE gpu MARK" in line]
    assert [line.rpartition(": ")[2] for line in said] == ([named] if named else [])
