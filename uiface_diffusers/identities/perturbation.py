"""Embeddings turned by a random angle."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ..models.identity_flow import IdentityFlow
from ..sphere import tangent, turn
from .bank import IdentityBank
from .selection import nearest_others


def check_cosine_range(cosine_range: Sequence[float]) -> tuple[float, float]:
    """
    Raises:
        ValueError: not two cosines in their order.
    """
    if len(cosine_range) == 2 and not isinstance(cosine_range, str):
        low, high = map(float, cosine_range)
        if -1 <= low <= high <= 1:
            return low, high
    shown = cosine_range if isinstance(cosine_range, str) else " to ".join(map(str, cosine_range))
    raise ValueError(f"a range of cosines goes from a to b with -1 <= a <= b <= 1, not from {shown}.")


def safe_cosines(bank: IdentityBank) -> torch.Tensor:
    """The cosine of each identity of a bank to which it can be turned and stay nearer to itself than to any other
    one, `(N,)`: short of half the angle to the nearest other identity (IDperturb's bound).

    Raises:
        ValueError: the bank has a single identity, or an embedding per image.
    """
    bank.check_one_each("the neighbor-safe perturbation")
    if len(bank) < 2:
        raise ValueError("a neighbor-safe perturbation needs two identities or more: the bank has one.")
    nearest = nearest_others(F.normalize(bank.embeddings), torch.arange(len(bank)))[0].double().clamp(-1, 1)
    # a little less than half the way
    return (nearest.acos() / 2).cos().add(1e-6).clamp(max=1).float()


def perturb_embeddings(
    embeddings: torch.Tensor,
    cosine_range: Sequence[float] | torch.Tensor | None,
    generators: Sequence[torch.Generator],
    flow: IdentityFlow | None = None,
    identity_generators: Sequence[torch.Generator] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns embeddings away from themselves by a random angle: in a random direction (IDperturb, CVPR 2026), or in one
    in which a person's embeddings vary, as a flow has learned.

    Args:
        embeddings (`torch.Tensor` of shape `(N, D)`): of unit length.
        cosine_range: a, b of the cosine s ~ U[a, b] between an embedding and its perturbation, within [-1, 1]; or `(N,
            2)`, a range for each embedding. `None`: the cosines that the flow has learned from real pairs.
        generators: one per embedding.
        flow (*optional*): of the embeddings' encoder.
        identity_generators (*optional*): for a flow, one per embedding, in the same state for embeddings of one
            identity: of what these have in common, see `IdentityFlow`. Without, they have nothing.

    Returns:
        The perturbed embeddings, `(N, D)`, of unit length, and their cosines to the given ones, `(N,)`.

    Raises:
        ValueError: not a range of cosines, or no embeddings.
    """
    if not len(embeddings):
        raise ValueError("the bank is empty: there is nothing to perturb.")
    draws = torch.stack([torch.rand((), generator=each) for each in generators])
    if isinstance(cosine_range, torch.Tensor):
        cosines = cosine_range[:, 0] + (cosine_range[:, 1] - cosine_range[:, 0]) * draws
    elif cosine_range is not None:
        low, high = check_cosine_range(cosine_range)
        cosines = low + (high - low) * draws
    elif flow is not None:
        quantiles = np.array(flow.config.cosine_quantiles)
        cosines = torch.from_numpy(np.interp(draws, np.linspace(0, 1, len(quantiles)), quantiles)).float()
    else:
        raise ValueError("a range of cosines is needed where no flow has learned them.")
    noise = torch.stack([torch.randn(embeddings.shape[1], generator=each) for each in generators])
    if flow is not None:
        if identity_generators:
            common = torch.stack([torch.randn(embeddings.shape[1], generator=each) for each in identity_generators])
            noise = flow.mix_noise(noise, common)
        directions = flow.directions(noise, embeddings, cosines)
    else:
        # uniform among the directions at a right angle
        directions = F.normalize(tangent(noise, embeddings))
    return turn(embeddings, directions, cosines), cosines
