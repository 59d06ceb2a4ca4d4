"""ScaleKD's dual-view feature mimicking: where each position's channels point, in the map and in the map without its spatial mean.

The originals' frequency view is a DCT with coefficient [0, 0] set to zero and its exact inverse: the map minus each channel's spatial
mean, whatever the DCT's scale. From a target in `dct` bands it is the sum of all bands but `dc`.

Legend: B batch, T grid tokens, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-12


def spatial_loss(student_BTC: Tensor, teacher_BTC: Tensor) -> Tensor:
    """1/B · Σ ‖n(s) - n(t)‖² over positions, n the L2 norm over channels at each position (eps 1e-12); a scalar (ScaleKD `fmd.py`)."""
    with torch.autocast(teacher_BTC.device.type, enabled=False):
        student, teacher = (F.normalize(_at_least_float32(tokens), dim=2, eps=NORM_EPS) for tokens in (student_BTC, teacher_BTC))
        return (student - teacher).square().sum() / len(teacher)


def frequency_loss(student_BTC: Tensor, teacher_BTC: Tensor) -> Tensor:
    """`spatial_loss` of both maps without the spatial mean of each channel. Where a map's mean is gone already, nothing more is taken."""
    return spatial_loss(without_mean(student_BTC), without_mean(teacher_BTC))


def without_mean(tokens_BTC: Tensor) -> Tensor:
    """The tokens minus each channel's mean over them."""
    tokens = _at_least_float32(tokens_BTC)
    return tokens - tokens.mean(dim=1, keepdim=True)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
