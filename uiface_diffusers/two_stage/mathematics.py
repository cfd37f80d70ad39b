"""The mathematics of UIFace's two-stage sampling (Lin et al., ICLR 2025, arXiv 2502.19803) as pure functions.

A sample starts under the empty context. Once its cross-attention map has come to rest (`attention_map`,
`map_distance`, `update_flags`) it follows its identity, with attention injected from the empty branch
(`cross_temperature` here, the self-attention in `attention_processor`).
"""

from collections.abc import Sequence

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


def key_covariance(key: torch.Tensor) -> torch.Tensor:
    """Covariance of the keys over the tokens: `(..., tokens, dim)` -> `(..., dim, dim)`, float32."""
    key = key.float()
    key = key - key.mean(dim=-2, keepdim=True)
    return key.transpose(-2, -1) @ key / key.shape[-2]


def logit_std(query: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Standard deviation over the tokens of every query's logits, up to a factor that all queries share:
    sqrt(q^T Cov(K) q).

    Args:
        query (`torch.Tensor` of shape `(..., positions, dim)`): of one branch.
        covariance (`torch.Tensor` of shape `(..., dim, dim)`): `key_covariance` of the keys.

    Returns:
        `torch.Tensor` of shape `(..., positions, 1)`, float32.
    """
    query = query.float()
    variance = ((query @ covariance) * query).sum(dim=-1, keepdim=True)
    return variance.clamp_min(0).sqrt()


def cross_temperature(identity_std: torch.Tensor, empty_std: torch.Tensor, strength: float) -> torch.Tensor:
    """The cross-attention injection as a temperature of each query.

    The reference renormalizes a query's logits l over the tokens toward the empty branch's l_e:
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
