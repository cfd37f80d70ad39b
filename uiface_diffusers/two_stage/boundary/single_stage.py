from collections.abc import Sequence
from typing import Any

import torch

from .rule import BoundaryRule


class SingleStage(BoundaryRule):
    """`None`: what the paper compares with, the identity with guidance from the first step on."""

    label = "none: single stage"
    injects = False

    @classmethod
    def accepts(cls, boundary: Any) -> bool:
        return boundary is None

    @classmethod
    def written(cls) -> str:
        return "None"

    def stage_two(self, t: float) -> torch.Tensor:
        return torch.ones(self.num_samples, dtype=torch.bool)

    def is_over(self, t: float) -> bool:
        return True

    def guides(self, t: float) -> bool:
        return True

    def layout_timestep(self) -> float:
        raise ValueError("`layout` is noised to the boundary, and boundary=None has none: give a timestep.")

    def seeks(self, t: float, later: Sequence[float]) -> bool:
        return False
