"""When a sample changes from the empty context to its identity: one class per rule, one object per call.

Another rule is another class here, with an entry in `boundary_rule`.
"""

from collections.abc import Sequence

import torch

from .mathematics import attention_map, map_distance, update_flags


class BoundaryRule:
    """What all rules share. A rule answers for the whole batch, in the order of the timesteps.

    Args:
        num_samples (`int`): B, the samples of the batch.
        latest_boundary (`float`): the timestep below which stage two is guided and has cross-attention injected.
        guide_from_boundary (`bool`, defaults to `False`): both from each sample's boundary on instead.
    """

    # the single stage has no empty branch to inject from
    injects = True
    # the maps observed last, `(B, 32, 32)` in [0, 1]; NaN for samples that are in stage two
    attention_maps: torch.Tensor | None = None

    def __init__(self, num_samples: int, latest_boundary: float, guide_from_boundary: bool = False):
        self.num_samples = num_samples
        self.latest_boundary, self.guide_from_boundary = latest_boundary, guide_from_boundary

    def stage_two(self, t: float) -> torch.Tensor:
        """The samples that follow their identity at timestep `t`, `(B,)` booleans on the CPU."""
        raise NotImplementedError

    def is_over(self, t: float) -> bool:
        """Whether stage two is certain at timestep `t`, for every sample and whatever its attention maps."""
        raise NotImplementedError

    def guides(self, t: float) -> bool:
        """Whether stage two is guided and has cross-attention injected at timestep `t`."""
        return self.guide_from_boundary or t < self.latest_boundary

    def seeks(self, t: float, later: Sequence[float]) -> bool:
        """Whether the rule needs the attention maps of timestep `t`, with the timesteps `later` to come."""
        return False

    def observe(self, block_maps: Sequence[torch.Tensor], samples: torch.Tensor) -> None:
        """Takes the attention maps of one step, where the rule `seeks`.

        Args:
            block_maps: of every cross-attention, `(R, 32, 32)` each, by `block_attention_map`.
            samples (`torch.LongTensor` of shape `(R,)`): the samples that they belong to.
        """


class AttentionAtRest(BoundaryRule):
    """Each sample's own boundary: its attention maps of two steps differ by less than `threshold` (sec. 3.3), or the
    timestep falls below `latest_boundary`.

    Args:
        threshold (`float`): of the mean absolute difference of maps in [0, 1]. The paper's is 0.006 for 50 steps.
    """

    def __init__(
        self, num_samples: int, latest_boundary: float, guide_from_boundary: bool = False, threshold: float = 0.006
    ):
        super().__init__(num_samples, latest_boundary, guide_from_boundary)
        self.threshold = threshold
        self._flags = torch.zeros(num_samples, dtype=torch.bool)
        self._distance: torch.Tensor | None = None

    def stage_two(self, t: float) -> torch.Tensor:
        if self._distance is not None:
            # the one wait for the device, with the last step's work queued behind it
            self._flags = update_flags(self._flags, self._distance.cpu(), self.threshold)
            self._distance = None
        return self._flags | (t < self.latest_boundary)

    def is_over(self, t: float) -> bool:
        return t < self.latest_boundary

    def seeks(self, t: float, later: Sequence[float]) -> bool:
        # a flag takes effect in the next step, if that is not below the latest boundary
        return any(self.latest_boundary <= each < t for each in later)

    def observe(self, block_maps: Sequence[torch.Tensor], samples: torch.Tensor) -> None:
        maps = attention_map(block_maps)
        # a sample's first map has no predecessor
        current = maps.new_full((self.num_samples, *maps.shape[1:]), torch.nan)
        current[samples] = maps
        if self.attention_maps is not None:
            self._distance = map_distance(current, self.attention_maps)
        self.attention_maps = current


class FixedTimestep(BoundaryRule):
    """The same boundary for all samples: `timestep` is the first one that is predicted from the identity."""

    def __init__(
        self, num_samples: int, latest_boundary: float, guide_from_boundary: bool = False, timestep: float = 500
    ):
        super().__init__(num_samples, latest_boundary, guide_from_boundary)
        self.timestep = timestep

    def stage_two(self, t: float) -> torch.Tensor:
        return torch.full((self.num_samples,), self.is_over(t))

    def is_over(self, t: float) -> bool:
        return t <= self.timestep


class SingleStage(BoundaryRule):
    """What the paper compares with: the identity with guidance from the first step on."""

    injects = False

    def stage_two(self, t: float) -> torch.Tensor:
        return torch.ones(self.num_samples, dtype=torch.bool)

    def is_over(self, t: float) -> bool:
        return True

    def guides(self, t: float) -> bool:
        return True


def boundary_rule(
    boundary: str | float | None,
    num_samples: int,
    latest_boundary: float,
    guide_from_boundary: bool,
    threshold: float,
) -> BoundaryRule:
    """The rule that the pipeline's argument `boundary` names: `"adaptive"`, a timestep, or `None`."""
    shared = (num_samples, latest_boundary, guide_from_boundary)
    if boundary == "adaptive":
        return AttentionAtRest(*shared, threshold=threshold)
    if isinstance(boundary, str):
        raise ValueError(f'`boundary` has to be "adaptive", a timestep or None but is {boundary!r}.')
    return SingleStage(*shared) if boundary is None else FixedTimestep(*shared, timestep=boundary)
