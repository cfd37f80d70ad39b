"""Embeddings turned by a random angle."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def check_cosine_range(cosine_range: Sequence[float]) -> tuple[float, float]:
    """
    Raises:
        ValueError: not two cosines in their order.
    """
    if len(cosine_range) == 2:
        low, high = map(float, cosine_range)
        if -1 <= low <= high <= 1:
            return low, high
    raise ValueError(
        f"a range of cosines goes from a to b with -1 <= a <= b <= 1, not from {' to '.join(map(str, cosine_range))}."
    )


def perturb_embeddings(
    embeddings: torch.Tensor, cosine_range: Sequence[float], generators: Sequence[torch.Generator]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns embeddings away from themselves by a random angle in a random direction (IDperturb, CVPR 2026).

    Args:
        embeddings (`torch.Tensor` of shape `(N, D)`): of unit length.
        cosine_range: a, b of the cosine s ~ U[a, b] between an embedding and its perturbation, within [-1, 1].
        generators: one per embedding.

    Returns:
        The perturbed embeddings, `(N, D)`, of unit length, and their cosines to the given ones, `(N,)`.

    Raises:
        ValueError: not a range of cosines, or no embeddings.
    """
    if not len(embeddings):
        raise ValueError("the bank is empty: there is nothing to perturb.")
    low, high = check_cosine_range(cosine_range)
    cosines = torch.stack([low + (high - low) * torch.rand((), generator=each) for each in generators])
    directions = torch.stack([torch.randn(embeddings.shape[1], generator=each) for each in generators])
    # uniform among the directions at a right angle
    directions = F.normalize(directions - (directions * embeddings).sum(dim=1, keepdim=True) * embeddings)
    sines = (1 - cosines.square()).clamp(min=0).sqrt()
    return F.normalize(cosines[:, None] * embeddings + sines[:, None] * directions), cosines
