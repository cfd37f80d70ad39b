"""Uniqueness of the identities of a labeled set and consistency within them, after DCFace (Kim et al., CVPR 2023,
section 4). Its third measure, the intra-class diversity, is `class_precision_recall` of `precision_recall.py`.

The paper writes d for a cosine distance and r for the threshold; its supplement (E) gives 0.3 as a threshold of the
cosine *similarity*, near the one of its recognizer at a false match rate of 0.01 %. So it is here: two are of one
person when their cosine exceeds it. Figures of different recognizers cannot be compared: a cosine means another rate.
"""

import torch
import torch.nn.functional as F

from ..identities import DistinctIdentities


def class_centers(embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean embedding of each identity, of unit length.

    Args:
        embeddings (`torch.Tensor` of shape `(N, D)`): of unit length.
        labels (`torch.Tensor` of shape `(N,)`): numbers from 0 to C - 1.

    Returns:
        `torch.Tensor` of shape `(C, D)`.
    """
    sums = torch.zeros(int(labels.max()) + 1, embeddings.shape[1], dtype=embeddings.dtype)
    return F.normalize(sums.index_add_(0, labels, embeddings))


def class_uniqueness(centers: torch.Tensor, threshold: float = 0.3) -> float:
    """Share of the identities that remain when one after the other is kept whose center has a cosine below `threshold`
    to every center kept before (U_class, equation 12, in the greedy reading that the paper gives of equation 11).
    Falls as a set has more identities.

    Args:
        centers (`torch.Tensor` of shape `(C, D)`): of unit length, in the order of the identities.
        threshold (`float`, defaults to 0.3): cosine.
    """
    distinct = DistinctIdentities(centers[:0], threshold)
    return distinct.add(centers).float().mean().item()


def intra_class_consistency(
    embeddings: torch.Tensor, labels: torch.Tensor, threshold: float = 0.3, leave_one_out: bool = False
) -> tuple[float, torch.Tensor]:
    """Share of an identity's images whose cosine to its center exceeds `threshold`, averaged over the identities
    (C_intra, equation 13).

    An image is part of its center: of n images of strangers, each has a cosine of about 1 / sqrt(n) to their center,
    more than 0.3 up to eleven images. `leave_one_out`, which is not the paper's, takes the center of the others.

    Args:
        embeddings (`torch.Tensor` of shape `(N, D)`): of unit length.
        labels (`torch.Tensor` of shape `(N,)`): numbers from 0 to C - 1, each at least once.
        threshold (`float`, defaults to 0.3): cosine.
        leave_one_out (`bool`, defaults to `False`): to the center of the identity's other images; identities of a
            single image are left out.

    Returns:
        The share, and the cosines `(N,)`, without those left out.
    """
    counts = torch.bincount(labels)
    sums = torch.zeros(len(counts), embeddings.shape[1], dtype=embeddings.dtype).index_add_(0, labels, embeddings)
    centers = sums[labels] - embeddings if leave_one_out else sums[labels]
    cosines = (embeddings * F.normalize(centers)).sum(dim=1)
    shares = torch.bincount(labels, weights=(cosines > threshold).double()) / counts
    taken = counts > 1 if leave_one_out else counts > 0
    return shares[taken].mean().item(), cosines[taken[labels]]
