"""Which device, and how it autocasts: cpu, cuda and mps alike. Nothing else in kdcache names a device."""

from __future__ import annotations

import torch

from .errors import UsageError


def resolve_device(name: str | None) -> torch.device:
    """The device called `name`, or the best there is. Raises UsageError for one that this machine lacks."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {name!r}: this machine can't use it ({str(error).splitlines()[0]})") from error
    return device


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a precision name on any device; fp32 is a context that does nothing."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype if precision != "fp32" else None, enabled=precision != "fp32")
