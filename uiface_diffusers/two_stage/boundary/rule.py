"""What all boundary rules share, and what they are shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch


@dataclass(frozen=True)
class Observation:
    """What one evaluation of the denoiser shows to a rule that `seeks`.

    Args:
        timestep (`float`): of the evaluation, in the paper's noise schedule.
        latents (`torch.Tensor` of shape `(B, channels, height, width)`): of all samples, scaled as the denoiser takes
            them.
        prediction (`torch.Tensor` of the same shape): under the empty context in stage one, (guided) from the identity
            in stage two.
        prediction_type (`str`): what that is: `"epsilon"`, `"v_prediction"` or `"flow_prediction"`.
        samples (`torch.LongTensor` of shape `(R,)`): those in stage one, whose attention was recorded; none for a rule
            without `records_attention`.
        block_maps: attention maps of these samples for every cross-attention, `(R, 32, 32)` each, by
            `block_attention_map`.
    """

    timestep: float
    latents: torch.Tensor
    prediction: torch.Tensor
    prediction_type: str
    samples: torch.Tensor
    block_maps: Sequence[torch.Tensor]


class BoundaryRule:
    """When the samples of one call change stage. A rule answers for the whole batch, in the order of the timesteps.

    As it is here, each sample has a boundary of its own: where the rule has `found` it, at `latest_boundary` at the
    latest. A subclass says how it is named, what it looks at (`observe`) and what it has `found`.

    Args:
        num_samples (`int`): B, the samples of the batch.
        latest_boundary (`float`): the timestep below which every sample is in stage two, unless the rule itself fixes
            the boundary, and stage two is guided and has cross-attention injected.
        guide_from_boundary (`bool`, defaults to `False`): both from each sample's boundary on instead.
    """

    # the word that the pipeline's argument `boundary` names it by, if it does so by a word
    word: ClassVar[str | None] = None
    # in the demo
    label: ClassVar[str]
    # whether `boundary` is a timestep
    takes_timestep: ClassVar[bool] = False
    # whether it is shown attention maps, which have to be recorded for it
    records_attention: ClassVar[bool] = False
    # the single stage has no empty branch to inject from
    injects: ClassVar[bool] = True
    # the maps observed last, `(B, 32, 32)` in [0, 1]; NaN for samples that are in stage two
    attention_maps: torch.Tensor | None = None

    def __init__(self, num_samples: int, latest_boundary: float, guide_from_boundary: bool = False):
        self.num_samples = num_samples
        self.latest_boundary, self.guide_from_boundary = latest_boundary, guide_from_boundary

    @classmethod
    def accepts(cls, boundary: Any) -> bool:
        """Whether the pipeline's argument `boundary` means this rule."""
        return isinstance(boundary, str) and boundary == cls.word

    @classmethod
    def written(cls) -> str:
        """What `boundary` is for this rule, in messages."""
        return f'"{cls.word}"'

    @classmethod
    def of(
        cls, boundary: Any, num_samples: int, latest_boundary: float, guide_from_boundary: bool, threshold: float
    ) -> "BoundaryRule":
        """The rule of one call of the pipeline, by the call's arguments.

        Args:
            boundary: what the rule `accepts`.
            threshold (`float`): `boundary_threshold`, of attention maps.

        Raises:
            ValueError: a value within `boundary` is out of range.
        """
        return cls(num_samples, latest_boundary, guide_from_boundary)

    def found(self) -> torch.Tensor:
        """The samples whose boundary has been found, `(B,)` booleans on the CPU; never taken back."""
        raise NotImplementedError

    def stage_two(self, t: float) -> torch.Tensor:
        """The samples that follow their identity at timestep `t`, `(B,)` booleans on the CPU."""
        return self.found() | (t < self.latest_boundary)

    def is_over(self, t: float) -> bool:
        """Whether stage two is certain at timestep `t`, for every sample and whatever was observed."""
        return t < self.latest_boundary

    def guides(self, t: float) -> bool:
        """Whether stage two is guided and has cross-attention injected at timestep `t`."""
        return self.guide_from_boundary or t < self.latest_boundary

    def layout_timestep(self) -> float:
        """The timestep that a layout is noised to: with it, there is no stage one in which to find a boundary.

        Raises:
            ValueError: a single stage has no boundary.
        """
        return self.latest_boundary

    def seeks(self, t: float, later: Sequence[float]) -> bool:
        """Whether the rule has to observe timestep `t`, with the timesteps `later` to come."""
        # what is found takes effect in the next step, if that is not below the latest boundary
        return any(self.latest_boundary <= each < t for each in later)

    def observe(self, seen: Observation) -> None:
        """Takes what the denoiser shows at one step, where the rule `seeks` and a sample is in stage one."""
