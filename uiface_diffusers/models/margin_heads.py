"""Classification heads that train a face recognizer: the cosine to the face's own identity is made worse by a margin,
so that faces of one identity have to come closer than is needed to tell them apart.

A head is needed for training only. It computes in float32, also within autocast: near a cosine of one, half precision
cannot tell angles of less than a degree or two apart.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# The arccosine's slope is infinite at +-1. Beyond this cosine, 0.08 degrees from there, no gradient flows; within, the
# slope is below 710.
LARGEST_COSINE = 1 - 1e-6


def angle(cosine: torch.Tensor) -> torch.Tensor:
    """Angles in (0, pi) of float32 cosines, with finite gradients everywhere."""
    return cosine.clamp(-LARGEST_COSINE, LARGEST_COSINE).arccos()


class MarginHead(nn.Module):
    """Cosines of embeddings to one learned center an identity, times a scale, with a margin at the own identity.

    Args:
        embedding_dim (`int`): width of the embeddings.
        num_classes (`int`): identities.
        margin (`float`): how much is asked beyond being right.
        scale (`float`): of the cosines, before the softmax.
    """

    def __init__(self, embedding_dim: int, num_classes: int, margin: float, scale: float):
        super().__init__()
        self.margin, self.scale = margin, scale
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_dim))
        nn.init.normal_(self.weight, std=0.01)

    def forward(
        self, embeddings: torch.Tensor, labels: torch.Tensor, classes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            embeddings (`torch.Tensor` of shape `(batch_size, embedding_dim)`): not normalized.
            labels (`torch.Tensor` of shape `(batch_size,)`): identities as integers in [0, num_classes); positions
                in `classes` if these are given.
            classes (`torch.Tensor` of shape `(number,)`, *optional*): the identities to compare with, as Partial FC
                (An et al., CVPR 2022) samples them; all by default. The others get no gradient.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_classes)`, or `(batch_size, number)`: float32 logits for the
            cross-entropy.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings, labels = embeddings.float(), labels[:, None]
            # batch norm makes lengths of about sqrt(embedding_dim): one of zero keeps a gradient that float16 can hold
            weight = self.weight if classes is None else self.weight.index_select(0, classes)
            directions, centers = F.normalize(embeddings, eps=1e-2), F.normalize(weight.float())
            cosine = F.linear(directions, centers)
            lengths = embeddings.detach().norm(dim=1, keepdim=True)
            own = self.apply_margin(cosine.gather(1, labels), lengths)
            return self.scale * cosine.scatter(1, labels, own)

    def apply_margin(self, cosine: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Cosines to the own identity `(batch_size, 1)`, with the margin; `lengths` are the embeddings'."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        classes, width = self.weight.shape
        return f"{width}, {classes}, margin={self.margin}, scale={self.scale}"


class ArcFaceHead(MarginHead):
    """An additive angular margin (Deng et al., CVPR 2019): cos(theta + margin).

    Beyond theta = pi - margin, where that would rise again, cos(theta) - margin * sin(margin) takes its place, as in
    the authors' first implementation: the logit falls with the angle all the way.
    """

    def __init__(self, embedding_dim: int, num_classes: int, margin: float = 0.5, scale: float = 64.0):
        super().__init__(embedding_dim, num_classes, margin, scale)

    def apply_margin(self, cosine: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        theta = angle(cosine)
        beyond = cosine - self.margin * math.sin(self.margin)
        return torch.where(theta <= math.pi - self.margin, (theta + self.margin).cos(), beyond)


class CosFaceHead(MarginHead):
    """An additive cosine margin (Wang et al., CVPR 2018): cos(theta) - margin."""

    def __init__(self, embedding_dim: int, num_classes: int, margin: float = 0.35, scale: float = 64.0):
        super().__init__(embedding_dim, num_classes, margin, scale)

    def apply_margin(self, cosine: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return cosine - self.margin


class AdaFaceHead(MarginHead):
    """A margin that depends on the picture's quality, of which the length of its embedding is a sign (Kim et al., CVPR
    2022, sec. 3.2): with z = h * (length - mean) / deviation, clipped to [-1, 1],
    cos(theta - margin * z) - (margin * z + margin). The better a picture, the more its hard cases count.

    Args:
        h (`float`, defaults to 0.333): how much of the lengths' spread is used.
        t_alpha (`float`, defaults to 0.01): weight of the batch in the running mean and deviation of the lengths.
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    SHORTEST, LONGEST = 1e-3, 100.0
    # of the deviation, and of the angle to 0 and pi (the published code's)
    EPSILON = 1e-3

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        margin: float = 0.4,
        scale: float = 64.0,
        h: float = 0.333,
        t_alpha: float = 0.01,
    ):
        super().__init__(embedding_dim, num_classes, margin, scale)
        self.h, self.t_alpha = h, t_alpha
        # where the published code begins
        self.register_buffer("mean", torch.tensor(20.0))
        self.register_buffer("deviation", torch.tensor(100.0))

    @torch.no_grad()
    def quality(self, lengths: torch.Tensor) -> torch.Tensor:
        """z in [-1, 1]; while training, the batch first goes into the running mean and deviation."""
        lengths = lengths.clamp(self.SHORTEST, self.LONGEST)
        if self.training and len(lengths) > 1:
            self.mean.lerp_(lengths.mean(), self.t_alpha)
            self.deviation.lerp_(lengths.std(), self.t_alpha)
        return (self.h * (lengths - self.mean) / (self.deviation + self.EPSILON)).clamp(-1, 1)

    def apply_margin(self, cosine: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        margin = self.margin * self.quality(lengths)
        theta = (angle(cosine) - margin).clamp(self.EPSILON, math.pi - self.EPSILON)
        return theta.cos() - (self.margin + margin)


MARGIN_HEADS = {"arcface": ArcFaceHead, "cosface": CosFaceHead, "adaface": AdaFaceHead}
