"""Which rows one denoiser call computes for a batch, and how they become each sample's prediction."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class RowPlan:
    """The rows of one step's UNet call: first the empty context's, then the identities'.

    Args:
        num_samples (`int`): B, the samples of the batch.
        empty (`torch.LongTensor` of shape `(E,)`): the sample of every empty row, ascending.
        identity (`torch.LongTensor` of shape `(I,)`): the sample of every identity row, ascending.
        contexts (`torch.LongTensor` of shape `(E + I,)`): the context of every row. The empty ones come first: one
            for all samples, or one per sample; then those of the identities.
        source (`torch.LongTensor` of shape `(E + I,)`, *optional*): for every row the row among the empty ones that
            belongs to the same sample. `None` when neither guidance nor injection needs it.
        recorded (`torch.LongTensor` of shape `(R,)`, *optional*): the empty rows whose cross-attention the boundary
            needs, or `None` for none.
        self_injection, cross_injection (`bool`): what the identity rows take from their source rows.
        keeps_empty (`bool`): the processors keep what the identity rows take, for steps that reuse it.
        reuses_empty (`bool`): there are no empty rows; the sources are those of the last step that kept them.
    """

    num_samples: int
    empty: torch.Tensor
    identity: torch.Tensor
    contexts: torch.Tensor
    source: torch.Tensor | None = None
    recorded: torch.Tensor | None = None
    self_injection: bool = False
    cross_injection: bool = False
    keeps_empty: bool = False
    reuses_empty: bool = False

    @property
    def sources(self) -> torch.Tensor:
        """`source`, of a plan in which guidance or injection needs it."""
        assert self.source is not None, "nothing is taken from the empty rows"
        return self.source

    @property
    def samples(self) -> torch.Tensor:
        """The sample of every row, shape `(E + I,)`."""
        return torch.cat([self.empty, self.identity])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "RowPlan":
        indices = {name: getattr(self, name) for name in ("empty", "identity", "contexts", "source", "recorded")}
        return replace(
            self,
            **{
                name: index.to(device, non_blocking=non_blocking)
                for name, index in indices.items()
                if index is not None
            },
        )


def plan_rows(
    stage_two: torch.Tensor,
    guided: bool,
    self_injection: bool = False,
    cross_injection: bool = False,
    record: bool = False,
    keep_empty: bool = False,
    reuse_empty: bool = False,
    own_empty: bool = False,
) -> RowPlan:
    """Which rows per step needs: one for a sample in stage one, two for a sample in stage two (one if nothing is taken
    from its empty branch, or what is taken is reused).

    Args:
        stage_two (`torch.BoolTensor` of shape `(B,)`, on the CPU): the samples that follow their identity in this
            step.
        guided (`bool`): whether those are guided away from the empty context's prediction.
        self_injection, cross_injection (`bool`): what is injected into the identity branch.
        record (`bool`): whether the samples still in stage one seek their boundary.
        keep_empty (`bool`): whether what is taken is kept for later steps.
        reuse_empty (`bool`): whether it is what an earlier step kept. All samples are in stage two, then and now.
        own_empty (`bool`): whether each sample has an empty context of its own, as with a pose of its own.
    """
    taken = guided or self_injection or cross_injection
    reuse_empty = reuse_empty and taken
    needs_empty = ~stage_two | (taken and not reuse_empty)
    empty = needs_empty.nonzero().flatten()
    identity = stage_two.nonzero().flatten()
    # every sample's position among the empty rows, here or in the step that kept them
    position = torch.arange(len(stage_two)) if reuse_empty else needs_empty.cumsum(0) - 1
    recorded = (~stage_two[empty]).nonzero().flatten()
    return RowPlan(
        num_samples=len(stage_two),
        empty=empty,
        identity=identity,
        contexts=torch.cat([empty, identity + len(stage_two)] if own_empty else [empty * 0, identity + 1]),
        source=position[torch.cat([empty, identity])] if taken and len(identity) else None,
        recorded=recorded if record and len(recorded) else None,
        self_injection=self_injection and len(identity) > 0,
        cross_injection=cross_injection and len(identity) > 0,
        keeps_empty=keep_empty,
        reuses_empty=reuse_empty,
    )


def guidance_difference(rows: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """What guidance amplifies, e_identity - e_empty of every sample in stage two: `(E + I, ...)` -> `(I, ...)`."""
    num_empty = len(plan.empty)
    return rows[num_empty:] - rows[plan.sources[num_empty:]]


def combine_rows(
    rows: torch.Tensor, plan: RowPlan, guidance_scale: float | None, kept_difference: torch.Tensor | None = None
) -> torch.Tensor:
    """The prediction of every sample from the UNet's rows.

    Args:
        rows (`torch.Tensor` of shape `(E + I, C, H, W)`): the UNet's predictions in the order of the plan.
        plan (`RowPlan`): the step's plan.
        guidance_scale (`float`, *optional*): the paper's w plus 1: e_empty + guidance_scale (e_identity - e_empty).
            `None`: the identity's prediction as it is.
        kept_difference (`torch.Tensor` of shape `(I, C, H, W)`, *optional*): e_identity - e_empty of an earlier step,
            where the plan reuses the empty branch: e_identity + (guidance_scale - 1) times that.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`: the empty prediction in stage one, the (guided) identity's in stage
        two.
    """
    num_empty = len(plan.empty)
    empty_rows, identity_rows = rows[:num_empty], rows[num_empty:]
    if guidance_scale is not None and plan.reuses_empty:
        assert kept_difference is not None, "no difference was kept"
        identity_rows = identity_rows + (guidance_scale - 1) * kept_difference
    elif guidance_scale is not None and len(identity_rows):
        identity_rows = rows[plan.sources[num_empty:]] + guidance_scale * guidance_difference(rows, plan)
    prediction = rows.new_empty((plan.num_samples, *rows.shape[1:]))
    prediction[plan.empty] = empty_rows
    prediction[plan.identity] = identity_rows
    return prediction
