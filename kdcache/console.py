"""Human text: always stderr, above any progress bar. Machine JSON goes to stdout, in `cli` only."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from threading import RLock
from typing import Any, ClassVar
from weakref import WeakSet

from tqdm import tqdm


class ProgressBar(tqdm):  # type: ignore[type-arg]  # no generic when it runs
    """tqdm's bar with a lock of this process alone: its own is shared with forked ones, and one that is killed while it writes keeps it for ever."""

    _lock = RLock()
    _instances: ClassVar[WeakSet[Any]] = WeakSet()  # which the lock guards


os.register_at_fork(after_in_child=lambda: ProgressBar.set_lock(RLock()))  # a thread that held it is not there


def say(text: str) -> None:
    """One line (or a few) for the person at the terminal."""
    ProgressBar.write(harmless(text), file=sys.stderr)


_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"} | {
    code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


def harmless(text: str) -> str:
    """`text` without what a terminal obeys: escape sequences and marks of writing direction are shown as escapes. Names in a cache may hold anything."""
    return text.translate(_CONTROLS).encode("utf-8", "backslashreplace").decode()


def visible(text: str) -> str:
    """Text for a terminal that holds names from tars and files: control characters but line ends as escapes, so that no name moves a cursor."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def one_line(value: Any) -> Any:
    """A JSON value whose strings hold no line ends and nothing else that a terminal obeys: no name in a cache can pass for a line of ours."""
    if isinstance(value, str):
        return visible(value).replace("\n", "\\n")
    if isinstance(value, Mapping):
        return {one_line(name): one_line(part) for name, part in value.items()}
    return [one_line(part) for part in value] if isinstance(value, (list, tuple)) else value


def counted(number: int, noun: str) -> str:
    """1 view, 1,200 views, 2 passes."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def aligned(rows: Sequence[Sequence[str]], *, left: int | None = None) -> str:
    """Lines of a table with a head, the columns as wide as they must be; those that are empty below it left out.

    left: of so many columns the cells stand to the left, of the others to the right. Default: of all.
    """
    kept = [(number, column) for number, column in enumerate(zip(*rows, strict=True)) if any(column[1:])]
    padded = [
        [cell.ljust(width) if left is None or number < left else cell.rjust(width) for cell in column]
        for number, column in kept
        for width in [max(map(len, column))]
    ]
    return "\n".join("  ".join(row).rstrip() for row in zip(*padded, strict=True))


def view_range(start: int, stop: int) -> str:
    """view 4, views 0 to 7: start <= v < stop."""
    return f"view {start}" if stop == start + 1 else f"views {start} to {stop - 1}"


def human_bytes(size: float) -> str:
    """Decimal units: 1 kB = 1000 B."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def human_seconds(seconds: float) -> str:
    """1.2 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
