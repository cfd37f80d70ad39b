from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn


@dataclass
class EmptyContextOutput(BaseOutput):
    """
    Args:
        context (`torch.Tensor` of shape `(batch_size, num_tokens, context_dim)`): the empty context, once per sample.
    """

    context: torch.Tensor


class EmptyContext(ModelMixin, ConfigMixin):
    """The learnable context without an identity, which lays out pose, light and expression (UIFace, arXiv 2502.19803,
    sec. 3.2).

    Args:
        context_dim (`int`, defaults to 256): width of the context, the UNet's `cross_attention_dim`.
        num_tokens (`int`, defaults to 1): context tokens per sample, as many as the identity projector gives.
    """

    @register_to_config
    def __init__(self, context_dim: int = 256, num_tokens: int = 1):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(num_tokens, context_dim))

    def forward(self, batch_size: int = 1, return_dict: bool = True) -> EmptyContextOutput | tuple[torch.Tensor]:
        """
        Args:
            batch_size (`int`, defaults to 1): number of samples.
            return_dict (`bool`, defaults to `True`): a plain tuple when `False`.

        Returns:
            `EmptyContextOutput` with `context` of shape `(batch_size, num_tokens, context_dim)`.
        """
        context = self.embedding.repeat(batch_size, 1, 1)
        return EmptyContextOutput(context=context) if return_dict else (context,)
