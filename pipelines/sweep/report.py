from __future__ import annotations

from collections.abc import Sequence

from .plan import SweepPlan
from .results import Result


def write_report(plan: SweepPlan, results: Sequence[Result]) -> None:
    pass
