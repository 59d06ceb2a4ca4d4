"""`frequency`: mimic the teacher's map in chosen bands of its 2-D DCT, in coefficient space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from ..errors import UsageError
from ..feature_maps import band_mask, band_mask_on, dct2, map_to_tokens, resize_map, squared_error, tokens_to_map
from ..teacher_card import TeacherCard
from .base import DecodedTargets, DistillationSettings, Method, MethodSettings


class FrequencySettings(DistillationSettings):
    """Constants of `frequency`."""

    bands: tuple[Literal["dc", "low", "mid", "high"], ...] = Field(default=("low", "mid", "high"), min_length=1)
    """Bands that count. Default: all but dc, each channel's spatial mean, as ScaleKD's frequency view has it."""
    node: str = "norm"
    """The teacher's node."""
    student_node: str = "norm"
    """The student's node."""

    @field_validator("bands", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """low,mid as a list, so that --set needs no brackets."""
        return [band.strip() for band in value.split(",")] if isinstance(value, str) else value


class Frequency(Method[FrequencySettings]):
    """Squared error of the chosen coefficients, over all tokens and channels: the bands' losses add up to that of `mimic`."""

    name: ClassVar[str] = "frequency"
    summary: ClassVar[str] = "bands of the map's 2-D DCT: a linear (1×1) adapter and the squared error of coefficients"
    paper: ClassVar[str] = "after the frequency view of Fan et al.: ScaleKD (NeurIPS 2024), arXiv:2411.06786"
    Settings: ClassVar[type[MethodSettings]] = FrequencySettings

    def __init__(self, **arguments: object) -> None:
        super().__init__(**arguments)  # type: ignore[arg-type]  # the base's own
        (self.target,) = self.target_names
        shape = self.teacher_shapes[self.target]
        self.grid = shape.grid
        if not band_mask(self.grid, self.settings.bands).any():
            raise UsageError(
                f"method 'frequency': bands {', '.join(self.settings.bands)} have no coefficient on a grid of {self.grid[0]}x{self.grid[1]}"
            )
        self.is_dct = self.teacher_encodings[self.target] == "dct"
        self.adapter = nn.Linear(self.student_channels[self.settings.student_node], shape.channels)

    @classmethod
    def requires(cls, settings: FrequencySettings, teacher: TeacherCard) -> Sequence[str]:
        return [f"features@{settings.node}:dct"]

    def student_nodes(self) -> Sequence[str]:
        return [self.settings.student_node]

    def target_parts(self) -> Mapping[str, Sequence[str]]:
        """The chosen bands, of those that the grid has, where they are stored apart."""
        found = [band for band in self.settings.bands if band_mask(self.grid, (band,)).any()]
        return {self.target: found} if self.is_dct else {}

    def losses(self, outputs: Mapping[str, Tensor], labels: Tensor, targets: DecodedTargets) -> dict[str, Tensor]:
        teacher_BTC = targets[self.target]["grid"]
        student_BTC = self.adapter(map_to_tokens(resize_map(outputs[f"features@{self.settings.student_node}"], self.grid)))
        with torch.autocast(teacher_BTC.device.type, enabled=False):
            student_BCHW, teacher_BCHW = (dct2(tokens_to_map(tokens.to(teacher_BTC.dtype), self.grid)) for tokens in (student_BTC, teacher_BTC))
        mask_HW = band_mask_on(teacher_BTC.device, self.grid, self.settings.bands)
        return {"frequency": squared_error(student_BCHW, teacher_BCHW, where=mask_HW) / teacher_BTC.numel()}
