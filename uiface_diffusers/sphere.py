"""Directions on the unit sphere: an embedding turned by an angle is cos(angle) anchor + sin(angle) direction."""

import torch
import torch.nn.functional as F


def tangent(vectors: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """What of vectors `(N, D)` is at a right angle to anchors `(N, D)` of unit length."""
    return vectors - (vectors * anchors).sum(dim=1, keepdim=True) * anchors


def turn(anchors: torch.Tensor, directions: torch.Tensor, cosines: torch.Tensor) -> torch.Tensor:
    """Anchors turned toward directions at a right angle, both `(N, D)` of unit length, to cosines `(N,)`."""
    sines = (1 - cosines.square()).clamp(min=0).sqrt()
    return F.normalize(cosines[:, None] * anchors + sines[:, None] * directions)


def cosines_and_directions(anchors: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `turn`: cosines `(N,)` and directions `(N, D)` from anchors to others, both of unit length. The
    direction to an anchor itself, or to its opposite, is zero."""
    cosines = (anchors * others).sum(dim=1).clamp(-1, 1)
    return cosines, F.normalize(tangent(others, anchors))
