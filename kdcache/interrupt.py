"""Ctrl-C and SIGTERM: the first ends a command cleanly and soon, the second at once. Installed by every command.

The signal becomes an exception in the main thread, so that `finally` blocks do the cleaning, as on any error. A cooperative flag
would be asked too late: one teacher pass over a batch may take minutes on a CPU.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .console import say

GRACE_S = 10.0
"""A clean end that takes longer is given up. torchrun, SLURM and Kubernetes kill 30 s after their SIGTERM."""
REPEAT_S = 1.0
"""A signal this soon after the first is the same one: `timeout` and terminals send it to a process and again to its group."""


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end. Its text is the signal's name."""


@contextmanager
def stopping_cleanly() -> Iterator[None]:
    """Within, SIGINT and SIGTERM raise Stopped in the main thread, a second one kills, and after `GRACE_S` the process ends with 1.

    Processes forked within leave SIGINT to their parent and end quietly on SIGTERM, which is often sent to the whole group. A signal
    that is ignored, as under nohup or in the background, stays so. Outside the main thread nothing is installed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()
    begun: list[float] = []
    timer = threading.Timer(GRACE_S, _give_up)
    timer.daemon = True

    def handle(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != owner:
            if number == signal.SIGTERM:
                os._exit(0)
            return
        if not begun:
            begun.append(time.monotonic())
            timer.start()
            signal.signal(signal.SIGCHLD, _pass)  # torch would raise for each worker that the same signal has reached
            raise Stopped(signal.Signals(number).name)
        if time.monotonic() - begun[0] > REPEAT_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(owner, number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    on_child = signal.getsignal(signal.SIGCHLD)
    handled = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in handled:
        signal.signal(number, handle)
    try:
        yield
    finally:
        timer.cancel()
        for number in handled:
            signal.signal(number, before[number])
        if begun and on_child is not None:
            signal.signal(signal.SIGCHLD, on_child)


def _pass(_number: int, _frame: FrameType | None) -> None:
    return


def _give_up() -> None:
    say(f"still busy {GRACE_S:.0f} s after the signal: ended at once; the next run removes what was left behind")
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(1)
