"""From uint8 views to a model's input, on the model's device. The only place that normalises; teacher and student each have one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Normalize(nn.Module):
    """uint8 (B, H, W, 3) → float32 (B, 3, S, S): to [0, 1], resized to `input_size` if needed (bicubic, antialiased), then mean and std."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], input_size: int) -> None:
        super().__init__()
        self.input_size = input_size
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, views_BHWC: Tensor) -> Tensor:
        # In place: fresh memory for each step cost 13 ms for 16 views of 224 pixels on one core, against 3.6, for the same bits.
        x_BCHW = views_BHWC.permute(0, 3, 1, 2).float().div_(255)
        if x_BCHW.shape[-2:] != (self.input_size, self.input_size):
            x_BCHW = F.interpolate(x_BCHW, size=(self.input_size, self.input_size), mode="bicubic", antialias=True, align_corners=False).clamp_(0, 1)
        return x_BCHW.sub_(self.get_buffer("mean")).div_(self.get_buffer("std"))
