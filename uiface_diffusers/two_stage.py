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
        source (`torch.LongTensor` of shape `(I,)`, *optional*): for every identity row the row among the empty ones
            that belongs to the same sample. `None` when neither guidance nor injection needs it.
        recorded (`torch.LongTensor` of shape `(R,)`, *optional*): the empty rows whose cross-attention the boundary
            needs, or `None` for none.
        self_injection, cross_injection (`bool`): what the identity rows take from their source rows.
    """

    num_samples: int
    empty: torch.Tensor
    identity: torch.Tensor
    source: torch.Tensor | None = None
    recorded: torch.Tensor | None = None
    self_injection: bool = False
    cross_injection: bool = False

    @property
    def samples(self) -> torch.Tensor:
        """The sample of every row, shape `(E + I,)`."""
        return torch.cat([self.empty, self.identity])

    def to(self, device: torch.device | str) -> "RowPlan":
        indices = {name: getattr(self, name) for name in ("empty", "identity", "source", "recorded")}
        return replace(self, **{name: index.to(device) for name, index in indices.items() if index is not None})


def plan_rows(
    stage_two: torch.Tensor,
    guided: bool,
    self_injection: bool = False,
    cross_injection: bool = False,
    record: bool = False,
) -> RowPlan:
    """Which rows a step needs: one for a sample in stage one, two for a sample in stage two (one if nothing is taken
    from its empty branch).

    Args:
        stage_two (`torch.BoolTensor` of shape `(B,)`, on the CPU): the samples that follow their identity in this
            step.
        guided (`bool`): whether those are guided away from the empty context's prediction.
        self_injection, cross_injection (`bool`): what is injected into the identity branch.
        record (`bool`): whether the samples still in stage one seek their boundary.
    """
    taken = guided or self_injection or cross_injection
    needs_empty = ~stage_two | taken
    empty = needs_empty.nonzero().flatten()
    identity = stage_two.nonzero().flatten()
    # a sample's position among the empty rows
    source = (needs_empty.cumsum(0) - 1)[identity] if taken and len(identity) else None
    recorded = (~stage_two[empty]).nonzero().flatten()
    return RowPlan(
        num_samples=len(stage_two),
        empty=empty,
        identity=identity,
        source=source,
        recorded=recorded if record and len(recorded) else None,
        self_injection=self_injection and len(identity) > 0,
        cross_injection=cross_injection and len(identity) > 0,
    )


def combine_rows(rows: torch.Tensor, plan: RowPlan, guidance_scale: float | None) -> torch.Tensor:
    """The prediction of every sample from the UNet's rows.

    Args:
        rows (`torch.Tensor` of shape `(E + I, C, H, W)`): the UNet's predictions in the order of the plan.
        plan (`RowPlan`): the step's plan.
        guidance_scale (`float`, *optional*): the paper's w plus 1: e_empty + guidance_scale (e_identity - e_empty).
            `None`: the identity's prediction as it is.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`: the empty prediction in stage one, the (guided) identity's in stage
        two.
    """
    num_empty = len(plan.empty)
    empty_rows, identity_rows = rows[:num_empty], rows[num_empty:]
    if guidance_scale is not None and len(identity_rows):
        source_rows = empty_rows[plan.source]
        identity_rows = source_rows + guidance_scale * (identity_rows - source_rows)
    prediction = rows.new_empty((plan.num_samples, *rows.shape[1:]))
    prediction[plan.empty] = empty_rows
    prediction[plan.identity] = identity_rows
    return prediction


def _logit_std(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Standard deviation over the tokens of every query's logits, up to a factor that all queries share:
    sqrt(q^T Cov(K) q). `(..., positions, dim)`, `(..., tokens, dim)` -> `(..., positions, 1)`, float32."""
    query, key = query.float(), key.float()
    key = key - key.mean(dim=-2, keepdim=True)
    covariance = key.transpose(-2, -1) @ key / key.shape[-2]
    variance = ((query @ covariance) * query).sum(dim=-1, keepdim=True)
    return variance.clamp_min(0).sqrt()


def cross_temperature(
    query: torch.Tensor,
    key: torch.Tensor,
    empty_query: torch.Tensor,
    empty_key: torch.Tensor,
    strength: float,
) -> torch.Tensor:
    """The cross-attention injection as a temperature of each query.

    The reference renormalises a query's logits l over the tokens towards the empty branch's l_e:
    l' = (l - mean(l)) / std(l) s + m with s = a std(l_e) + (1 - a) std(l). The softmax ignores m and every shift, so
    l' is as good as tau l with tau = a std(l_e) / std(l) + 1 - a.

    Args:
        query, empty_query (`torch.Tensor` of shape `(rows, heads, positions, dim)`): of the two branches.
        key, empty_key (`torch.Tensor` of shape `(rows, heads, tokens, dim)`): of the two branches.
        strength (`float`): a, in [0, 1].

    Returns:
        `torch.Tensor` of shape `(rows, heads, positions, 1)`, float32. 1 where the logits of the identity branch do
        not vary, as with a single token: there no temperature changes the softmax.
    """
    identity_std = _logit_std(query, key)
    ratio = _logit_std(empty_query, empty_key) / identity_std
    return torch.where(identity_std > 0, strength * ratio + (1 - strength), 1.0)
