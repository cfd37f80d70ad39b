from typing import Any

import torch

from ..mathematics import attention_map, map_distance, update_flags
from .rule import BoundaryRule, Observation


class AttentionAtRest(BoundaryRule):
    """`"adaptive"`: each sample's own boundary, where its attention maps of two steps differ by less than `threshold`
    (sec. 3.3), or the timestep falls below `latest_boundary`.

    Args:
        threshold (`float`): of the mean absolute difference of maps in [0, 1]. The paper's is 0.006 for 50 steps.
    """

    word = label = "adaptive"
    records_attention = True

    def __init__(
        self, num_samples: int, latest_boundary: float, guide_from_boundary: bool = False, threshold: float = 0.006
    ):
        super().__init__(num_samples, latest_boundary, guide_from_boundary)
        self.threshold = threshold
        self._flags = torch.zeros(num_samples, dtype=torch.bool)
        self._distance: torch.Tensor | None = None

    @classmethod
    def of(
        cls, boundary: Any, num_samples: int, latest_boundary: float, guide_from_boundary: bool, threshold: float
    ) -> "AttentionAtRest":
        return cls(num_samples, latest_boundary, guide_from_boundary, threshold)

    def found(self) -> torch.Tensor:
        if self._distance is not None:
            # the one wait for the device, with the last step's work queued behind it
            self._flags = update_flags(self._flags, self._distance.cpu(), self.threshold)
            self._distance = None
        return self._flags

    def observe(self, seen: Observation) -> None:
        maps = attention_map(seen.block_maps)
        # a sample's first map has no predecessor
        current = maps.new_full((self.num_samples, *maps.shape[1:]), torch.nan)
        current[seen.samples] = maps
        if self.attention_maps is not None:
            self._distance = map_distance(current, self.attention_maps)
        self.attention_maps = current
