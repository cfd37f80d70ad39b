"""How much do the images of one identity differ? LPIPS (Zhang et al. 2018) between them."""

import numpy as np
import torch
from torch import nn

from ..seeds import image_seed
from .separability import genuine_pairs

PAIRS_AT_ONCE = 32


def identity_pairs(name: str, images: int, max_pairs: int | None, seed: int = 0) -> np.ndarray:
    """Pairs of an identity's images, all or a number of them drawn without replacement. The draw depends on the
    identity's name, the number of its images and the seed, and not on the other identities.

    Args:
        name: the identity's.
        images (`int`): how many it has.
        max_pairs (*optional*): draw so many if there are more.

    Returns:
        `np.ndarray` of shape `(P, 2)`: positions within the identity.
    """
    return genuine_pairs(np.zeros(images, int), max_pairs, image_seed(seed, name, 0))


@torch.no_grad()
def mean_lpips(images: torch.Tensor, pairs: np.ndarray, perceptual: nn.Module) -> float:
    """Mean LPIPS of pairs of images.

    Args:
        images (`torch.Tensor` of shape `(N, 3, height, width)`): in [-1, 1], on the network's device.
        pairs (`np.ndarray` of shape `(P, 2)`): positions, at least one pair.
        perceptual: as `load_lpips` gives it.
    """
    parts = [pairs[start : start + PAIRS_AT_ONCE] for start in range(0, len(pairs), PAIRS_AT_ONCE)]
    distances = [perceptual(images[part[:, 0]], images[part[:, 1]]).flatten() for part in parts]
    return torch.cat(distances).double().mean().item()
