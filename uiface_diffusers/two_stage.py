"""The mathematics of UIFace's two-stage sampling (Lin et al., ICLR 2025, arXiv 2502.19803) as pure functions.

A sample starts under the empty context. Once its cross-attention map has come to rest (`attention_map`,
`map_distance`, `update_flags`) it follows its identity, with attention injected from the empty branch
(`cross_temperature` here, the self-attention in `attention_processor`). `plan_rows` says which rows of the one UNet
call of a step that takes, `combine_rows` makes the prediction from them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

ATTENTION_MAP_SIZE = 32


def block_attention_map(
    logits: torch.Tensor, height: int, width: int, map_size: int = ATTENTION_MAP_SIZE
) -> torch.Tensor:
    """One attention block's share of the attention map (sec. 3.3, "adaptive partitioning"; the published code).

    Args:
        logits (`torch.Tensor` of shape `(rows, heads, height * width, tokens)`): scaled, before the softmax.
        height, width (`int`): spatial shape of the block's positions.
        map_size (`int`, defaults to 32): height and width of the attention map.

    Returns:
        `torch.Tensor` of shape `(rows, map_size, map_size)`, float32, in [0, 1]: softmax over the positions, mean
        over tokens and heads, divided by its maximum, resized.
    """
    # tokens have the same number in every head, so one mean over both is the mean of means
    saliency = logits.float().softmax(dim=2).mean(dim=(1, 3))
    saliency = saliency / saliency.amax(dim=1, keepdim=True)
    saliency = saliency.unflatten(1, (1, height, width))
    resized = F.interpolate(saliency, size=(map_size, map_size), mode="bilinear", align_corners=False)
    return resized.squeeze(1).clamp(0, 1)


def attention_map(block_maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over the blocks, stretched to [0, 1] in every sample.

    Args:
        block_maps: what `block_attention_map` gives for every cross-attention of the UNet, each `(rows, 32, 32)`.

    Returns:
        `torch.Tensor` of shape `(rows, 32, 32)`, float32.
    """
    mean = torch.stack(tuple(block_maps)).mean(dim=0)
    low, high = mean.amin(dim=(1, 2), keepdim=True), mean.amax(dim=(1, 2), keepdim=True)
    # a map without any contrast stays flat instead of becoming 0 / 0
    return (mean - low) / (high - low).clamp_min(torch.finfo(mean.dtype).tiny)


def map_distance(current: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of two steps' attention maps, `(rows, 32, 32)` each -> `(rows,)`."""
    return (current - previous).abs().mean(dim=(1, 2))


def update_flags(flags: torch.Tensor, distance: torch.Tensor, threshold: float) -> torch.Tensor:
    """Flags "stage two reached" for the next step: set below the threshold, never taken back. All of shape `(B,)`."""
    return flags | (distance < threshold)


@dataclass(frozen=True)
class RowPlan:
    """The rows of one step's UNet call: first the empty context's, then the identities'.

    Args:
        num_samples (`int`): B, the samples of the batch.
        empty (`torch.LongTensor` of shape `(E,)`): the sample of every empty row, ascending.
        identity (`torch.LongTensor` of shape `(I,)`): the sample of every identity row, ascending.
        contexts (`torch.LongTensor` of shape `(E + I,)`): the context of every row: 0 is the empty one, 1 + b that of
            sample b.
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
) -> RowPlan:
    """Which rows a step needs: one for a sample in stage one, two for a sample in stage two (one if nothing is taken
    from its empty branch, or what is taken is reused).

    Args:
        stage_two (`torch.BoolTensor` of shape `(B,)`, on the CPU): the samples that follow their identity in this
            step.
        guided (`bool`): whether those are guided away from the empty context's prediction.
        self_injection, cross_injection (`bool`): what is injected into the identity branch.
        record (`bool`): whether the samples still in stage one seek their boundary.
        keep_empty (`bool`): whether what is taken is kept for later steps.
        reuse_empty (`bool`): whether it is what an earlier step kept. All samples are in stage two, then and now.
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
        contexts=torch.cat([torch.zeros_like(empty), identity + 1]),
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
    return rows[num_empty:] - rows[plan.source[num_empty:]]


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
        identity_rows = identity_rows + (guidance_scale - 1) * kept_difference
    elif guidance_scale is not None and len(identity_rows):
        identity_rows = rows[plan.source[num_empty:]] + guidance_scale * guidance_difference(rows, plan)
    prediction = rows.new_empty((plan.num_samples, *rows.shape[1:]))
    prediction[plan.empty] = empty_rows
    prediction[plan.identity] = identity_rows
    return prediction


def key_covariance(key: torch.Tensor) -> torch.Tensor:
    """Covariance of the keys over the tokens: `(..., tokens, dim)` -> `(..., dim, dim)`, float32."""
    key = key.float()
    key = key - key.mean(dim=-2, keepdim=True)
    return key.transpose(-2, -1) @ key / key.shape[-2]


def logit_std(query: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Standard deviation over the tokens of every query's logits, up to a factor that all queries share:
    sqrt(q^T Cov(K) q).

    Args:
        query (`torch.Tensor` of shape `(..., positions, dim)`).
        covariance (`torch.Tensor` of shape `(..., dim, dim)`): `key_covariance` of the keys.

    Returns:
        `torch.Tensor` of shape `(..., positions, 1)`, float32.
    """
    query = query.float()
    variance = ((query @ covariance) * query).sum(dim=-1, keepdim=True)
    return variance.clamp_min(0).sqrt()


def cross_temperature(identity_std: torch.Tensor, empty_std: torch.Tensor, strength: float) -> torch.Tensor:
    """The cross-attention injection as a temperature of each query.

    The reference renormalises a query's logits l over the tokens towards the empty branch's l_e:
    l' = (l - mean(l)) / std(l) s + m with s = a std(l_e) + (1 - a) std(l). The softmax ignores m and every shift, so
    l' is as good as tau l with tau = a std(l_e) / std(l) + 1 - a.

    Args:
        identity_std, empty_std (`torch.Tensor` of shape `(rows, heads, positions, 1)`): `logit_std` of the two
            branches.
        strength (`float`): a, in [0, 1].

    Returns:
        `torch.Tensor` of shape `(rows, heads, positions, 1)`, float32. 1 where the logits of the identity branch do
        not vary, as with a single token: there no temperature changes the softmax.
    """
    return torch.where(identity_std > 0, strength * (empty_std / identity_std) + (1 - strength), 1.0)
