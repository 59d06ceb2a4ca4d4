"""What the person at the terminal is told, whatever has become of the processes that were forked from this one."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from pathlib import Path

from helpers import Forked

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

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    try:
        other = Forked(speak, tmp_path / "other.log")
        assert other.wait(timeout_s=60) == 0
    finally:
        done.set()
        thread.join()
    assert "heard" in other.output()
