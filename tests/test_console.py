"""What the person at the terminal is told, whatever has become of forked processes and of the terminal."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import Forked, make_cache
from tqdm import tqdm

from kdcache.console import ProgressBar, say


class Deadly(io.StringIO):
    """A terminal at which a process is killed while it writes."""

    def write(self, text: str) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return len(text)


def speak() -> None:
    with ProgressBar(total=1) as bar:
        say("heard")
        bar.update()


def test_a_process_that_is_killed_while_it_speaks_leaves_the_others_their_speech(tmp_path: Path) -> None:
    def killed() -> None:
        sys.stderr = Deadly()
        say("never heard")

    speak()
    assert Forked(killed, tmp_path / "killed.log").wait() == -signal.SIGKILL
    other = Forked(speak, tmp_path / "other.log")
    assert other.wait(timeout_s=60) == 0
    assert "heard" in other.output()


def test_a_process_forked_while_a_thread_speaks_can_speak(tmp_path: Path) -> None:
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with ProgressBar.external_write_mode(io.StringIO()):
            inside.set()
            done.wait()

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert inside.wait(60)
    try:
        other = Forked(speak, tmp_path / "other.log")
        assert other.wait(timeout_s=60) == 0
    finally:
        done.set()
        thread.join()
    assert "heard" in other.output()


def test_bars_of_other_libraries_are_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their threads change the set of them under a lock of their own."""
    with tqdm(total=1, file=sys.stderr) as theirs:
        monkeypatch.setattr(theirs, "clear", lambda **_options: pytest.fail("cleared"))
        speak()
        monkeypatch.undo()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("console"), num_shards=1, views=1)


def kdcache_in_shell(redirection: str, *arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    """The command as a shell starts it."""
    command = ["bash", "-c", f'"$0" -m cli.main "$@" {redirection}', sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=240, env={**os.environ, **environ})


def test_a_closed_stderr_changes_neither_verdict_nor_json(cache: Path) -> None:
    result = kdcache_in_shell("2>&- <&-", "verify", cache, "--json")
    assert result.returncode == 0
    assert json.loads(result.stdout)["ok"] is True


def test_a_disk_that_is_full_of_what_was_asked_for_is_an_error_without_a_trace() -> None:
    result = kdcache_in_shell(">/dev/full", "methods", "kd")
    assert result.returncode == 1
    assert result.stderr == "Error: stdout can't be written: No space left on device; what it was to show is lost, nothing else\n"


def test_a_reader_that_goes_away_hears_no_trace() -> None:
    result = kdcache_in_shell("| true", "methods", "kd")
    assert result.stderr == ""


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_text_reaches_a_terminal_of_any_encoding(encoding: str) -> None:
    result = kdcache_in_shell("", "methods", "kd", PYTHONIOENCODING=encoding)
    assert result.returncode == 0, result.stderr
    assert "softened class probabilities" in result.stdout
