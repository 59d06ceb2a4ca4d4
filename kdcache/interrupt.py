"""Ctrl-C and SIGTERM: the first ends a command cleanly and soon, the second at once. Installed by every command.

The signal becomes an exception in the main thread, so that `finally` blocks do the cleaning, as on any error. A cooperative flag
would be asked too late: one teacher pass over a batch may take minutes on a CPU. What must not be left half done, an update of
weights or a save, is a block of `finishing_first`: there the exception waits for its end.

Several processes that do every step together would wait for ever for one that has left: they train in a block of `stopping_together`, ask each
other after every step whether a signal waits, and all raise `stop` at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from .console import say

GRACE_S = 10.0
"""A clean end that takes longer is given up. torchrun, SLURM and Kubernetes kill 30 s after their SIGTERM."""
REPEAT_S = 1.0
"""A signal this soon after the first is the same one: `timeout` and terminals send it to a process and again to its group."""


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end. Its text is the signal's name."""

    is_agreed = False
    """Whether all processes of this run raise it at the same place."""


class _Ending:
    """How this process ends, once a signal has asked for it."""

    def __init__(self) -> None:
        self.unfinished = 0
        """Blocks of `finishing_first` that the main thread is within."""
        self.waiting: Stopped | None = None
        """The exception that waits for their end."""
        self.raised: Stopped | None = None
        """The exception, once it was raised."""
        self.is_quiet = False
        """Whether another process says that it waits."""
        self._is_begun = False
        self._grace: threading.Timer | None = None

    def give_grace(self) -> None:
        """From now on `GRACE_S` are left, or from the end of the block that must be finished first."""
        self._is_begun = True
        self.stop_clock()
        if self.unfinished == 0:
            self._grace = threading.Timer(GRACE_S, _give_up)
            self._grace.daemon = True
            self._grace.start()

    def stop_clock(self) -> None:
        if self._grace is not None:
            self._grace.cancel()

    def enter(self) -> None:
        self.unfinished += 1
        self.stop_clock()

    def leave(self) -> None:
        self.unfinished -= 1
        if self._is_begun:
            self.give_grace()


_ending = _Ending()


@contextmanager
def finishing_first() -> Iterator[None]:
    """Within, the first signal waits for the block's end, where it raises Stopped; only then does its grace begin. A second one kills as ever.

    Blocks nest. A block that is entered after the signal stops the clock too: a save takes what it takes. One that raises leaves a
    signal that waits to the next.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _ending.enter()
    try:
        yield
    finally:
        _ending.leave()
    if _ending.waiting is not None and _ending.unfinished == 0:
        stopped, _ending.waiting = _ending.waiting, None
        _ending.give_grace()
        raise stopped


@contextmanager
def stopping_together(*, is_first: bool) -> Iterator[None]:
    """`finishing_first` for one of several processes, which ask `is_asked_to_stop` and raise `stop` together. is_first: the one that speaks."""
    _ending.is_quiet = not is_first
    try:
        with finishing_first():
            yield
    finally:
        _ending.is_quiet = False


def is_asked_to_stop() -> bool:
    """Whether a signal waits for the end of a block of `finishing_first`."""
    return _ending.waiting is not None


def raise_if_dropped() -> None:
    """Raise a signal's exception again, for whoever still goes on after it: Python drops what is raised in a destructor, or in a hook of fork as workers begin."""
    if _ending.raised is not None and threading.current_thread() is threading.main_thread():
        raise _ending.raised


def stop() -> Stopped:
    """What all processes raise where they agreed to: of the signal that waits here, or has reached another of them. Its grace begins."""
    stopped, _ending.waiting = _ending.waiting, None
    if stopped is None:
        stopped = Stopped("a signal to another of its processes")
    else:
        _ending.give_grace()
    stopped.is_agreed = True
    return stopped


def outlast_a_signal(_worker: int) -> None:
    """Begin a loading process that gives batches for `REPEAT_S` after a SIGTERM to all, and ends at a later one. For a DataLoader, of several processes.

    torchrun and SLURM signal a process and its workers, where the next step, which the others may have begun, still needs a batch. A parent
    that ends tells its workers so by other means first.
    """
    begun: list[float] = []

    def handle(_number: int, _frame: FrameType | None) -> None:
        if begun and time.monotonic() - begun[0] > REPEAT_S:
            os._exit(0)
        begun.append(time.monotonic())

    signal.signal(signal.SIGTERM, handle)


@contextmanager
def stopping_cleanly() -> Iterator[None]:
    """Within, SIGINT and SIGTERM raise Stopped in the main thread, a second one kills, and after `GRACE_S` the process ends with 1.

    What is within `finishing_first` comes to its end before.

    Processes forked within leave SIGINT to their parent and end quietly on SIGTERM, which is often sent to the whole group. A signal
    that is ignored, as under nohup or in the background, stays so. Outside the main thread nothing is installed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    global _ending
    _ending = ending = _Ending()
    owner = os.getpid()
    begun: list[float] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != owner:
            if number == signal.SIGTERM:
                os._exit(0)
            return
        if not begun:
            begun.append(time.monotonic())
            signal.signal(signal.SIGCHLD, _pass)  # torch would raise for each worker that the same signal has reached
            stopped = Stopped(signal.Signals(number).name)
            if ending.unfinished:
                ending.waiting = stopped
                if ending.is_quiet:
                    return
                with suppress(OSError):  # written past print, which may be at work
                    os.write(2, f"\n{stopped}: ends as soon as what is at work is done, a second one ends it at once\n".encode())
                return
            ending.give_grace()
            ending.raised = stopped
            raise stopped
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
        ending.stop_clock()
        _ending = _Ending()
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
