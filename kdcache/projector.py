"""The cross-attention projector of ScaleKD: a student's map as tokens of the teacher, asked for by queries. Used by `methods.scalekd`.

Legend: B batch, Cs channels of the student, Ct of the teacher, h w the student's grid, Q queries, T = h · w tokens, D channels of one head.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UsageError
from .feature_maps import Grid, map_to_tokens

ProjectorNorm = Literal["batch", "layer"]
"""Behind the 3×3 convolution: BatchNorm2d, or LayerNorm over the channels of each position."""

MLP_RATIO = 4
POSITION_STD = 0.02
"""Of the position embedding's initial truncated normal."""


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position of a (B, C, h, w) map (the originals' LayerNorm2d, eps 1e-5)."""

    def forward(self, map_BCHW: Tensor) -> Tensor:
        return super().forward(map_BCHW.movedim(1, -1)).movedim(-1, 1)


class CrossAttentionProjector(nn.Module):
    """(B, Cs, h, w) → (B, Q, Ct) (ScaleKD `fmd.py`, AttentionProjector; `attention.py`).

        kv = tokens(ReLU(norm(Conv3×3(x))) + position)        q = ReLU(Linear(query))
        a  = Linear(softmax(q kᵀ · D^-½ · softmax_scale) v)   k, v = Linear(kv), Linear(kv); q = Linear(q)
        y  = LayerNorm(a), eps 1e-5                           there is no residual around the attention
        out = y + Linear(ReLU(Linear(y)))

    The position embedding is on keys and values, none on queries. Queries are learned, or handed in; those that are handed in win.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        grid: Grid,
        num_queries: int | None,
        num_heads: int,
        softmax_scale: float = 1.0,
        norm: ProjectorNorm = "batch",
    ) -> None:
        """grid: of the student's map. num_queries: learned ones, None for a projector that is handed its queries. Raises UsageError."""
        super().__init__()
        if num_heads < 1 or teacher_channels % num_heads:
            raise UsageError(
                f"{num_heads} attention heads do not divide the teacher's {teacher_channels} channels; expected a divisor of {teacher_channels}"
            )
        self.num_heads = num_heads
        self.scale = (teacher_channels // num_heads) ** -0.5 * softmax_scale
        self.convolution = nn.Conv2d(student_channels, student_channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(student_channels) if norm == "batch" else ChannelNorm(student_channels)
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, student_channels, *grid), std=POSITION_STD))
        self.queries = nn.Parameter(torch.randn(num_queries, teacher_channels)) if num_queries is not None else None  # as nn.Embedding begins
        self.query_in = nn.Linear(teacher_channels, teacher_channels)  # the originals' 1×1 convolution, on tokens
        self.query = nn.Linear(teacher_channels, teacher_channels)
        self.key = nn.Linear(student_channels, teacher_channels)
        self.value = nn.Linear(student_channels, teacher_channels)
        self.out = nn.Linear(teacher_channels, teacher_channels)
        self.out_norm = nn.LayerNorm(teacher_channels)
        self.mlp = nn.Sequential(
            nn.Linear(teacher_channels, MLP_RATIO * teacher_channels), nn.ReLU(), nn.Linear(MLP_RATIO * teacher_channels, teacher_channels)
        )

    def forward(self, map_BCHW: Tensor, queries_BQC: Tensor | None = None) -> Tensor:
        """map_BCHW: (B, Cs, h, w). queries_BQC: (B, Q, Ct), or None for the learned ones. Raises ValueError without any."""
        if queries_BQC is None:
            if self.queries is None:
                raise ValueError("expected queries: this projector has none of its own")
            queries_BQC = self.queries.unsqueeze(0)  # the same for all images: worked on once
        positioned_BTC = map_to_tokens(F.relu(self.norm(self.convolution(map_BCHW))) + self.position)
        query = self._heads(self.query(F.relu(self.query_in(queries_BQC)))).expand(len(map_BCHW), -1, -1, -1)
        attended = F.scaled_dot_product_attention(
            query, self._heads(self.key(positioned_BTC)), self._heads(self.value(positioned_BTC)), scale=self.scale
        )
        tokens_BQC: Tensor = self.out_norm(self.out(attended.transpose(1, 2).flatten(2)))
        projected: Tensor = tokens_BQC + self.mlp(tokens_BQC)
        return projected

    def _heads(self, tokens_BTC: Tensor) -> Tensor:
        """(B, heads, T, D)."""
        return tokens_BTC.view(*tokens_BTC.shape[:2], self.num_heads, -1).transpose(1, 2)
