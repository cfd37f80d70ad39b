from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch

from .rule import BoundaryRule


class FixedTimestep(BoundaryRule):
    """A timestep: the same boundary for all samples, the first timestep that is predicted from the identity."""

    label = "one timestep for all"
    takes_timestep = True

    def __init__(
        self, num_samples: int, latest_boundary: float, guide_from_boundary: bool = False, timestep: float = 500
    ):
        super().__init__(num_samples, latest_boundary, guide_from_boundary)
        self.timestep = timestep

    @classmethod
    def accepts(cls, boundary: Any) -> bool:
        return isinstance(boundary, Integral) and not isinstance(boundary, bool) and int(boundary) >= 0

    @classmethod
    def written(cls) -> str:
        return "a timestep (an integer from 0)"

    @classmethod
    def of(
        cls, boundary: Any, num_samples: int, latest_boundary: float, guide_from_boundary: bool, threshold: float
    ) -> "FixedTimestep":
        return cls(num_samples, latest_boundary, guide_from_boundary, int(boundary))

    def stage_two(self, t: float) -> torch.Tensor:
        return torch.full((self.num_samples,), self.is_over(t))

    def is_over(self, t: float) -> bool:
        return t <= self.timestep

    def layout_timestep(self) -> float:
        return self.timestep

    def seeks(self, t: float, later: Sequence[float]) -> bool:
        return False
