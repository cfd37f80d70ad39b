"""PixArt's transformer (Chen et al. 2023, arXiv 2310.00426): cross-attention to the context in every block."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import nn

from ..attention_processor import cross_attention_names
from .denoiser import Denoiser


@torch.no_grad()
def initialize(model: PixArtTransformer2DModel) -> None:
    """The start of a training from scratch: that of PixArt's published code. The cross-attention and the prediction
    begin at zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    patches = model.pos_embed.proj.weight
    nn.init.xavier_uniform_(patches.view(len(patches), -1))
    for module in model.adaln_single.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    for name in cross_attention_names(model):
        nn.init.zeros_(model.get_parameter(f"{name}.to_out.0.weight"))
    nn.init.zeros_(model.proj_out.weight)


class PixArtDenoiser(Denoiser):
    """`PixArtTransformer2DModel` with the size conditions off. A `caption_projection`, if it has one, is applied to
    the contexts, whose width is then `caption_channels`."""

    models = (PixArtTransformer2DModel,)
    trained_as = "pixart"
    # with a single token, cross-attention would have nothing to choose from
    num_tokens = 8

    @staticmethod
    def accepts(model: nn.Module) -> bool:
        return isinstance(model, PixArtTransformer2DModel)

    @staticmethod
    def check(model: Any) -> None:
        Denoiser.check(model)
        if model.use_additional_conditions:
            raise ValueError(
                f"`unet` ({type(model).__name__}) is conditioned on the size of the picture: build it with"
                " use_additional_conditions=False. That has to be given if sample_size is 128."
            )

    @staticmethod
    def build(channels: int, height: int, width: int, options: Mapping[str, Any]) -> PixArtTransformer2DModel:
        if height != width:
            raise ValueError(f"latents of {height}x{width} are not square: a PixArt transformer takes square ones.")
        given = {"sample_size": height, "in_channels": channels, "out_channels": channels}
        given |= {"cross_attention_dim": 256, "use_additional_conditions": False}
        model = PixArtTransformer2DModel(**given | dict(options))
        initialize(model)
        return model

    @staticmethod
    def context_dim(model: Any) -> int:
        return model.config.caption_channels or model.config.cross_attention_dim

    @staticmethod
    def middle(model: Any, height: int, width: int) -> tuple[nn.Module, int, tuple[int, int]]:
        blocks, size = model.transformer_blocks, model.config.patch_size
        channels = model.config.num_attention_heads * model.config.attention_head_dim
        return blocks[(len(blocks) - 1) // 2], channels, (height // size, width // size)

    @staticmethod
    def attends_to_contexts_only(model: Any) -> bool:
        return type(model) is PixArtTransformer2DModel and model.caption_projection is None

    def map_shape(self, height: int, width: int) -> tuple[int, int]:
        """Patches down and across.

        Raises:
            ValueError: the latents cannot be cut into patches.
        """
        size = self.model.config.patch_size
        if height % size or width % size:
            raise ValueError(
                f"latents of {height}x{width} cannot be cut into patches: height and width must be multiples of"
                f" {size}."
            )
        return height // size, width // size

    def predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        contexts: torch.Tensor | None,
        attention_kwargs: Mapping[str, Any],
    ) -> torch.Tensor:
        return self.model(
            latents,
            encoder_hidden_states=contexts,
            timestep=timestep.expand(len(latents)),  # one per row
            cross_attention_kwargs=attention_kwargs,
            return_dict=False,
        )[0]
