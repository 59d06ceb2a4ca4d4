"""torch.compile for the student's pass, and for nothing else: names of weights, exports, averages and evaluation stay those of the plain module. Used by train."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .errors import StudentError, UsageError
from .methods.base import Method

RECOMPILATIONS = 64
"""Of one function before torch gives up on it: every student and mode is another."""


def check_backend(backend: str) -> None:
    """Raise UsageError for a backend that torch does not have."""
    import torch._dynamo  # seconds, for those who ask for it

    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        near = difflib.get_close_matches(backend, known, n=3) or ["inductor", "aot_eager", "eager"]
        raise UsageError(f"--torchcompile {backend!r}: torch has no such backend; near ones: {', '.join(near)}")


def compile_student(method: Method[Any], backend: str) -> None:
    """Let `method.run_student` be compiled when it is first run. The method's first pass raises StudentError if it does without it."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILATIONS)
    compiled = torch.compile(method.run_student, backend=backend)
    is_run = False

    def run_student(images_BCHW: Tensor) -> dict[str, Tensor]:
        nonlocal is_run
        is_run = True
        method.run_student = compiled  # type: ignore[method-assign]
        outputs: dict[str, Tensor] = compiled(images_BCHW)
        return outputs

    def check(*_: Any) -> None:
        hook.remove()
        if not is_run:
            raise StudentError(
                f"--torchcompile {backend}: method {method.name!r} has a `forward` that does not call `run_student`, which is what is compiled; expected"
                f" that it does: call it there in place of the student, or leave the option out"
            )

    method.run_student = run_student  # type: ignore[method-assign]  # of this instance
    hook = method.register_forward_hook(check)


@contextmanager
def naming_failed_compilation(student_name: str, backend: str | None) -> Iterator[None]:
    """Within, what torch raises for a student that it can't compile is a StudentError. backend: None if none is compiled."""
    if backend is None:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
        raise StudentError(
            f"student {student_name}: --torchcompile {backend} can't compile it ({type(error).__name__}: {reason}); leave the option out, or try another"
            f" backend, such as aot_eager"
        ) from error
