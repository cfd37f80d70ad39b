import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.utils import BaseOutput
from torch import nn

from ..encoders import EncoderMark
from ..sphere import tangent

# of the sines and cosines that tell time and cosine
FEATURES = 64


@dataclass
class IdentityFlowOutput(BaseOutput):
    """
    Args:
        velocity (`torch.Tensor` of shape `(batch_size, identity_dim)`): at a right angle to the anchors.
    """

    velocity: torch.Tensor


class _Block(nn.Module):
    """A residual MLP whose normalization is scaled, shifted and gated by the condition (adaLN-Zero, Peebles & Xie
    2023): at first it changes nothing."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, hidden: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        scale, shift, gate = self.modulation(condition).chunk(3, dim=1)
        return hidden + gate * self.mlp(self.norm(hidden) * (1 + scale) + shift)


class IdentityFlow(ModelMixin, ConfigMixin):
    """In which direction the embeddings of one person differ: a flow from noise to unit directions at a right angle
    to an anchor, given the anchor and the cosine to it.

    Noise and data are joined by quarter circles, x(t) = cos(t pi/2) noise + sin(t pi/2) data, both in the anchor's
    tangent space (Lipman et al. 2023 with the trigonometric path of Albergo & Vanden-Eijnden 2023). The model predicts
    the velocity dx/dt. An untrained one predicts zero: its directions are those of the noise, uniform as IDperturb's.

    Args:
        identity_dim (`int`, defaults to 512): width of the embeddings.
        width (`int`, defaults to 256): of the hidden layers.
        num_blocks (`int`, defaults to 5): residual blocks.
        dropout (`float`, defaults to 0.1): within the blocks, in training mode.
        shared_noise (`float`, defaults to 0.0): share of the noise's variance that the images of an identity have in
            common, from 0 to 1. One anchor does not tell how the person looks on average; with it, the images agree
            on that as real ones do, and each of them is distributed as before.
        cosine_quantiles (`Sequence[float]`, defaults to `(0.5, 1.0)`): evenly spaced quantiles of the cosines to draw
            from where no range is given, ascending; two are a uniform distribution.
        identity_encoder (`str`, *optional*): name of the face recognition model whose embeddings it was trained on.
            Banks of another encoder are refused.
        identity_encoder_fingerprint (`str`, *optional*): of that model's weights, see `FaceEncoder.fingerprint`.

    Raises:
        ValueError: `cosine_quantiles` are not ascending cosines, or `shared_noise` is no share.
    """

    @register_to_config
    def __init__(
        self,
        identity_dim: int = 512,
        width: int = 256,
        num_blocks: int = 5,
        dropout: float = 0.1,
        shared_noise: float = 0.0,
        cosine_quantiles: Sequence[float] = (0.5, 1.0),
        identity_encoder: str | None = None,
        identity_encoder_fingerprint: str | None = None,
    ):
        super().__init__()
        steps = [-1.0, *cosine_quantiles, 1.0]
        if len(cosine_quantiles) < 2 or any(not low <= high for low, high in zip(steps, steps[1:], strict=False)):
            raise ValueError(f"`cosine_quantiles` have to be ascending cosines but are {list(cosine_quantiles)}.")
        if not 0 <= shared_noise <= 1:
            raise ValueError(f"`shared_noise` has to be from 0 to 1 but is {shared_noise}.")
        self.direction_in = nn.Linear(identity_dim, width)
        self.anchor_in = nn.Linear(identity_dim, width)
        self.condition_in = nn.Sequential(nn.Linear(2 * FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList([_Block(width, dropout) for _ in range(num_blocks)])
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False)
        self.velocity_out = nn.Linear(width, identity_dim)
        nn.init.zeros_(self.velocity_out.weight)
        nn.init.zeros_(self.velocity_out.bias)

    @property
    def encoder_mark(self) -> EncoderMark:
        """By which the embeddings that it takes are told from another encoder's."""
        return EncoderMark(self.config.identity_encoder, self.config.identity_encoder_fingerprint)

    def forward(
        self,
        sample: torch.Tensor,
        time: torch.Tensor,
        anchors: torch.Tensor,
        cosines: torch.Tensor,
        return_dict: bool = True,
    ) -> IdentityFlowOutput | tuple[torch.Tensor]:
        """
        Args:
            sample (`torch.Tensor` of shape `(batch_size, identity_dim)`): in the anchors' tangent spaces, components
                of unit variance.
            time (`torch.Tensor` of shape `(batch_size,)`): 0 at the noise, 1 at the data.
            anchors (`torch.Tensor` of shape `(batch_size, identity_dim)`): embeddings of unit length.
            cosines (`torch.Tensor` of shape `(batch_size,)`): to the anchors.
            return_dict (`bool`, defaults to `True`): a plain tuple when `False`.

        Returns:
            `IdentityFlowOutput` with `velocity` of shape `(batch_size, identity_dim)`.
        """
        # as far as a thousand steps of diffusion are apart
        features = [get_timestep_embedding(1000 * each, FEATURES) for each in (time, cosines)]
        # an anchor's components have a variance of one over their number
        anchor = self.anchor_in(anchors * math.sqrt(self.config.identity_dim))
        condition = F.silu(anchor + self.condition_in(torch.cat(features, dim=1)))
        hidden = self.direction_in(sample) + anchor
        for block in self.blocks:
            hidden = block(hidden, condition)
        velocity = tangent(self.velocity_out(self.norm_out(hidden)), anchors)
        return IdentityFlowOutput(velocity=velocity) if return_dict else (velocity,)

    def mix_noise(self, noise: torch.Tensor, common: torch.Tensor) -> torch.Tensor:
        """The noise of images `(N, identity_dim)` that have `shared_noise` of it in common with those whose row of
        `common`, of the same shape, is the same."""
        share = self.config.shared_noise
        return share**0.5 * common + (1 - share) ** 0.5 * noise

    @torch.no_grad()
    def directions(
        self, noise: torch.Tensor, anchors: torch.Tensor, cosines: torch.Tensor, num_steps: int = 16
    ) -> torch.Tensor:
        """Follows the flow from noise to directions, on the model's device.

        Args:
            noise (`torch.Tensor` of shape `(N, identity_dim)`): of a standard normal distribution.
            anchors (`torch.Tensor` of shape `(N, identity_dim)`): of unit length.
            cosines (`torch.Tensor` of shape `(N,)`): to the anchors.
            num_steps (`int`, defaults to 16): of the midpoint rule, each with two evaluations of the model.

        Returns:
            Unit vectors at a right angle to the anchors, `(N, identity_dim)`, on the anchors' device.
        """
        place, training = anchors.device, self.training
        noise, anchors, cosines = (each.to(self.device, torch.float32) for each in (noise, anchors, cosines))
        sample, step = tangent(noise, anchors), 1 / num_steps
        self.eval()
        for number in range(num_steps):
            time = torch.full_like(cosines, number * step)
            middle = sample + step / 2 * self(sample, time, anchors, cosines).velocity
            sample = sample + step * self(middle, time + step / 2, anchors, cosines).velocity
        self.train(training)
        return F.normalize(tangent(sample, anchors)).to(place)


def path(time: torch.Tensor, noise: torch.Tensor, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the quarter circle from noise to data, both `(N, D)`, is at `time` `(N,)`, and its velocity there."""
    angle = (math.pi / 2) * time[:, None]
    velocity = (math.pi / 2) * (angle.cos() * data - angle.sin() * noise)
    return angle.cos() * noise + angle.sin() * data, velocity
