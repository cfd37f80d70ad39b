import math

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from .condition_projector import ConditionProjector, ConditionProjectorOutput

# how far the tip of the nose stands out of the plane of eyes and mouth: in distances of the eyes, and in the length of
# the line from the eyes to the mouth, which is 1.16 of those in the 112x112 template. Roughly: a person's own may
# differ by a fifth, and so do the tangents of their angles
NOSE_DEPTH = (0.5, 0.43)


class PoseProjector(ConditionProjector):
    """Projects a head pose, yaw and pitch in degrees, to extra context tokens: Fourier features of the angles, then a
    small MLP. A pose that is not given has learned tokens. Both begin at zero, where they change nothing.

    Positive yaw looks to the right of the picture, positive pitch looks down, and (0, 0) is the mean frontal face, as
    of `uiface_diffusers.faces.head_pose`. That gives tangents; here they are angles of a head whose nose stands out by
    `NOSE_DEPTH`.

    Args:
        context_dim (`int`, defaults to 256): width of the context, the UNet's `cross_attention_dim`.
        num_tokens (`int`, defaults to 1): context tokens per sample, a multiple of the identity's.
        hidden_dim (`int`, defaults to 256): width of the MLP.
        num_frequencies (`int`, defaults to 4): sine and cosine of each angle times 1, 2, 4, ...
    """

    condition = "pose"
    fields = ("yaw", "pitch")
    columns = ("yaw", "pitch")
    limits = (-90.0, 90.0)
    remedy = "run `uiface prepare` of this version on the photographs, without --aligned, into a new folder"

    @register_to_config
    def __init__(self, context_dim: int = 256, num_tokens: int = 1, hidden_dim: int = 256, num_frequencies: int = 4):
        super().__init__()
        features = 2 * num_frequencies * len(self.fields)
        last = nn.Linear(hidden_dim, num_tokens * context_dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(
            nn.Linear(features, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.SiLU(),
            # without it the hidden values hardly differ from pose to pose, and what follows hardly learns
            nn.LayerNorm(hidden_dim),
            last,
        )
        self.without = nn.Parameter(torch.zeros(num_tokens, context_dim))

    def forward(
        self, values: torch.Tensor, return_dict: bool = True
    ) -> ConditionProjectorOutput | tuple[torch.Tensor]:
        """
        Args:
            values (`torch.Tensor` of shape `(batch_size, 2)`): yaw and pitch in degrees; NaN where they are not given.
            return_dict (`bool`, defaults to `True`): a plain tuple when `False`.

        Returns:
            `ConditionProjectorOutput` with `tokens` of shape `(batch_size, num_tokens, context_dim)`.
        """
        values = values.to(self.without.device, torch.float32)
        is_given = values.isfinite().all(dim=1)[:, None, None]
        # in float32: sines of large angles in half precision would be rough
        octaves = 2.0 ** torch.arange(self.config.num_frequencies, device=values.device)
        angles = (values.nan_to_num() * (math.pi / 180))[..., None] * octaves
        features = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1).to(self.without.dtype)
        tokens = self.mlp(features).unflatten(-1, (self.config.num_tokens, self.config.context_dim))
        tokens = torch.where(is_given, tokens, self.without)
        return ConditionProjectorOutput(tokens=tokens) if return_dict else (tokens,)

    @staticmethod
    def mirrored(values: torch.Tensor) -> torch.Tensor:
        return values * values.new_tensor([-1.0, 1.0])

    @staticmethod
    def from_columns(columns: np.ndarray) -> np.ndarray:
        """Yaw and pitch as `head_pose` gives them, `(N, 2)` -> in degrees, float32, between -90 and 90."""
        return np.degrees(np.arctan(np.asarray(columns, np.float32) / np.array(NOSE_DEPTH, np.float32)))
