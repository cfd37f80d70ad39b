from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn


@dataclass
class IdentityProjectorOutput(BaseOutput):
    """
    Args:
        context (`torch.Tensor` of shape `(batch_size, num_tokens, context_dim)`): the identity context.
    """

    context: torch.Tensor


class IdentityProjector(ModelMixin, ConfigMixin):
    """Projects a face recognition embedding to the context that the UNet attends to: a linear layer, then dropout of
    single components while training (UIFace, arXiv 2502.19803, sec. 3.2).

    Args:
        identity_dim (`int`, defaults to 512): width of the identity embedding.
        context_dim (`int`, defaults to 256): width of the context, the UNet's `cross_attention_dim`.
        num_tokens (`int`, defaults to 1): context tokens per sample.
        dropout (`float`, defaults to 0.25): probability of dropping a component of the context in training mode.
        identity_encoder (`str`, *optional*): name of the face recognition model whose embeddings this projector was
            trained on. Embeddings marked as another encoder's are refused by the pipeline.
        identity_encoder_fingerprint (`str`, *optional*): of that model's weights, see `FaceEncoder.fingerprint`.
    """

    @register_to_config
    def __init__(
        self,
        identity_dim: int = 512,
        context_dim: int = 256,
        num_tokens: int = 1,
        dropout: float = 0.25,
        identity_encoder: str | None = None,
        identity_encoder_fingerprint: str | None = None,
    ):
        super().__init__()
        self.proj = nn.Linear(identity_dim, num_tokens * context_dim)
        # unit variance for embeddings of unit length, on a par with the empty context
        nn.init.normal_(self.proj.weight)
        self.context_dropout = nn.Dropout(dropout)

    def forward(
        self, identity_embeds: torch.Tensor, return_dict: bool = True
    ) -> IdentityProjectorOutput | tuple[torch.Tensor]:
        """
        Args:
            identity_embeds (`torch.Tensor` of shape `(batch_size, identity_dim)`): embeddings of unit length.
            return_dict (`bool`, defaults to `True`): a plain tuple when `False`.

        Returns:
            `IdentityProjectorOutput` with `context` of shape `(batch_size, num_tokens, context_dim)`.
        """
        context = self.context_dropout(self.proj(identity_embeds))
        context = context.unflatten(-1, (self.config.num_tokens, self.config.context_dim))
        return IdentityProjectorOutput(context=context) if return_dict else (context,)
