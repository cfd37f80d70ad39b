"""The state of one call of two-stage sampling, so that the pipeline's loop stays flat."""

import math
from collections.abc import Sequence

import torch

from .boundary import BoundaryRule, Observation
from .rows import RowPlan, combine_rows, guidance_difference, plan_rows


class TwoStageSampler:
    """Says which rows each denoiser call computes, and makes the prediction from them. For every evaluation of the
    denoiser: `begin_step`, then `combine`, then `observe`.

    Args:
        rule (`BoundaryRule`): when the samples change stage; of this call alone.
        has_identities (`bool`): whether there are any: without, every sample follows the empty context to the end.
        guidance_scale (`float`): diffusers' scale, the paper's w plus 1. May be changed between steps.
        injection (`str`, *optional*): `"self"`, `"cross"`, `"both"` or `None`.
        guidance_interval (`tuple[float, float]`, *optional*): the timesteps with guidance and injection.
        reuse_empty_branch (`int`, defaults to 1): the empty branch runs in every so many steps, where every sample of
            any batch is in stage two and guided.
        device (`torch.device`): where the plans' indices go.
        own_empty (`bool`, defaults to `False`): whether each sample has an empty context of its own.

    Attributes:
        stage_two (`torch.BoolTensor` of shape `(B,)`, on the CPU): the samples that follow their identity.
        switched (`torch.LongTensor`, on the CPU): those that began to in this evaluation, after an earlier one.
        boundary_timesteps (`torch.LongTensor` of shape `(B,)`): the first timestep predicted from the identity; -1
            for a sample that has not come to it.
    """

    def __init__(
        self,
        rule: BoundaryRule,
        has_identities: bool,
        guidance_scale: float,
        injection: str | None = None,
        guidance_interval: tuple[float, float] | None = None,
        reuse_empty_branch: int = 1,
        device: torch.device | str = "cpu",
        own_empty: bool = False,
    ):
        self.own_empty = own_empty
        self.rule, self.has_identities, self.guidance_scale = rule, has_identities, guidance_scale
        self.injects_self = rule.injects and injection in ("self", "both")
        self.injects_cross = rule.injects and injection in ("cross", "both")
        self.interval = (0.0, math.inf) if guidance_interval is None else tuple(map(float, guidance_interval))
        self.reuse_empty_branch, self.device = reuse_empty_branch, device
        self.stage_two = torch.zeros(rule.num_samples, dtype=torch.bool)
        self.switched = torch.empty(0, dtype=torch.long)
        self.boundary_timesteps = torch.full((rule.num_samples,), -1)
        self._plan: RowPlan | None = None
        self._planned: tuple[list[bool], dict[str, bool]] | None = None
        self._difference: torch.Tensor | None = None
        self._guides = self._in_interval = self._can_reuse = self._reuses = self._seeks = False
        self._timestep = math.nan
        self._steps_since_empty = 0

    def begin_step(self, t: float, later: Sequence[float], starts_step: bool = True) -> RowPlan:
        """The rows of the denoiser's next evaluation.

        Args:
            t (`float`): its timestep.
            later: the timesteps of the evaluations after it.
            starts_step (`bool`, defaults to `True`): `False` for an inner evaluation of a Runge-Kutta or second-order
                step, in which nothing is decided anew.
        """
        before = self.stage_two
        if starts_step:
            self._decide(t)
        self._timestep = t
        self._seeks = self.has_identities and starts_step and self.rule.seeks(t, later)
        began = self.stage_two & ~before
        self.boundary_timesteps[began] = int(t)
        # at the first evaluation nothing is remembered of another context
        self.switched = began.nonzero().flatten() if self._plan is not None else began.new_empty(0, dtype=torch.long)
        options = {
            "guided": self._guided,
            "self_injection": self.injects_self and self._in_interval,
            "cross_injection": self.injects_cross and self._guides and self._in_interval,
            "record": self._seeks and self.rule.records_attention,
            "keep_empty": self._can_reuse,
            "reuse_empty": self._reuses,
            "own_empty": self.own_empty,
        }
        # most evaluations take the rows of the one before, whose indices are on the device
        if self._plan is None or self._planned != (self.stage_two.tolist(), options):
            self._planned = (self.stage_two.tolist(), options)
            self._plan = plan_rows(self.stage_two, **options).to(self.device, non_blocking=True)
        return self._plan

    @property
    def _present_plan(self) -> RowPlan:
        assert self._plan is not None, "`begin_step` comes first"
        return self._plan

    @property
    def _guided(self) -> bool:
        return self._guides and self._in_interval and self.guidance_scale != 1

    def _decide(self, t: float) -> None:
        """What holds for the step at timestep `t` and its inner evaluations."""
        if self.has_identities:
            self.stage_two = self.rule.stage_two(t)
        self._guides, self._in_interval = self.rule.guides(t), self.interval[0] <= t <= self.interval[1]
        everywhere = self.has_identities and self.rule.is_over(t) and self._guides and self._in_interval
        self._can_reuse = self.reuse_empty_branch > 1 and everywhere
        self._reuses = self._can_reuse and 0 < self._steps_since_empty < self.reuse_empty_branch
        self._steps_since_empty = self._steps_since_empty + 1 if self._reuses else int(self._can_reuse)

    def combine(self, rows: torch.Tensor) -> torch.Tensor:
        """The prediction of every sample, `(B, C, H, W)`, from the rows of the plan `(E + I, C, H, W)`."""
        scale, plan = self.guidance_scale if self._guided else None, self._present_plan
        prediction = combine_rows(rows, plan, scale, self._difference)
        if self._can_reuse and not self._reuses and plan.source is not None:
            self._difference = guidance_difference(rows, plan)
        elif not self._reuses:
            self._steps_since_empty = 0  # nothing was kept
        return prediction

    def observe(
        self,
        latents: torch.Tensor,
        prediction: torch.Tensor,
        prediction_type: str,
        block_maps: Sequence[torch.Tensor] = (),
    ) -> None:
        """Shows the evaluation to the rule, if that looks at it.

        Args:
            latents (`torch.Tensor` of shape `(B, C, H, W)`): scaled as the denoiser takes them.
            prediction (`torch.Tensor` of shape `(B, C, H, W)`): by `combine`.
            prediction_type (`str`): what it is of.
            block_maps: attention maps of the plan's `recorded` rows, `(R, 32, 32)` for every cross-attention.
        """
        if not self._seeks or self.stage_two.all():
            return
        plan = self._present_plan
        samples = plan.empty[:0] if plan.recorded is None else plan.empty[plan.recorded]
        self.rule.observe(Observation(self._timestep, latents, prediction, prediction_type, samples, block_maps))
