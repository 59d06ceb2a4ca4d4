"""ScaleKD's dual-view feature mimicking: where each position's channels point, in the map and in the map without its spatial mean.

The originals' frequency view is a DCT with coefficient [0, 0] set to zero and its exact inverse: the map minus each channel's spatial
mean, whatever the DCT's scale. From a target in `dct` bands it is the sum of all bands but `dc`.

Legend: B batch, T grid tokens, C channels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .losses import at_least_float32

NORM_EPS = 1e-12

View = Literal["spatial", "frequency"]


def spatial_loss(student_BTC: Tensor, teacher_BTC: Tensor) -> Tensor:
    """1/B · Σ ‖n(s) - n(t)‖² over positions, n the L2 norm over channels at each position (eps 1e-12); a scalar (ScaleKD `fmd.py`)."""
    return mimicking_loss(student_BTC, directions(teacher_BTC))


def frequency_loss(student_BTC: Tensor, teacher_BTC: Tensor) -> Tensor:
    """`spatial_loss` of both maps without the spatial mean of each channel. Where a map's mean is gone already, nothing more is taken."""
    return spatial_loss(without_mean(student_BTC), without_mean(teacher_BTC))


def mimicking_loss(student_BTC: Tensor, directions_BTC: Tensor) -> Tensor:
    """`spatial_loss` against a teacher whose directions are known: several losses may share them."""
    with torch.autocast(directions_BTC.device.type, enabled=False):
        return (directions(student_BTC) - directions_BTC).square().sum() / len(directions_BTC)


def in_view(tokens_BTC: Tensor, view: View) -> Tensor:
    """What a view sees of a map."""
    return without_mean(tokens_BTC) if view == "frequency" else tokens_BTC


def directions(tokens_BTC: Tensor) -> Tensor:
    """Each token over its L2 norm (at least 1e-12); at least float32, also under autocast."""
    with torch.autocast(tokens_BTC.device.type, enabled=False):
        return F.normalize(at_least_float32(tokens_BTC), dim=2, eps=NORM_EPS)


def without_mean(tokens_BTC: Tensor) -> Tensor:
    """The tokens minus each channel's mean over them."""
    tokens = at_least_float32(tokens_BTC)
    return tokens - tokens.mean(dim=1, keepdim=True)
