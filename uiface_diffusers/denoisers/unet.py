"""UNets: UIFace's own, Stable Diffusion's, and other people's classes with the same signature."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ..models.unet_uiface import UIFaceUNet2DModel
from .denoiser import Denoiser


class UNetDenoiser(Denoiser):
    """A denoiser that is called as diffusers' UNets are."""

    models = (UIFaceUNet2DModel, UNet2DConditionModel)
    trained_as = "uiface"

    @staticmethod
    def accepts(model: nn.Module) -> bool:
        """Whether `model` can be called so. No other model of diffusers' is, whatever its signature."""
        if isinstance(model, UIFaceUNet2DModel | UNet2DConditionModel):
            return True
        if type(model).__module__.startswith("diffusers."):
            return False
        try:
            inspect.signature(type(model).forward).bind(
                model, "sample", "timestep", encoder_hidden_states=None, cross_attention_kwargs=None, return_dict=False
            )
        except TypeError:
            return False
        return True

    @staticmethod
    def build(channels: int, height: int, width: int, options: Mapping[str, Any]) -> UIFaceUNet2DModel:
        shape = {"sample_size": height, "in_channels": channels, "out_channels": channels}
        model = UIFaceUNet2DModel(**shape | dict(options))
        model.zero_init_residual_branches()
        return model

    @staticmethod
    def middle(model: Any, height: int, width: int) -> tuple[nn.Module, int, tuple[int, int]]:
        if not isinstance(model, UIFaceUNet2DModel):
            return Denoiser.middle(model, height, width)
        # A recognizer's map is 7x7, so the level with 8x8: 4x4 would blur the map, 16x16 has nothing to follow. The
        # middle of a U-Net aligns best (Tian et al. 2025, U-REPA, arXiv 2503.18414): where 8x8 is not the lowest
        # level, its first block after the middle, so that the middle has the gradient as well.
        widths = model.config.block_out_channels
        level = min(range(len(widths)), key=lambda number: abs(math.log2((height * width) ** 0.5 / 2**number / 7)))
        last = level == len(widths) - 1
        module = model.mid_block if last else model.up_blocks[len(widths) - 1 - level].blocks[0]
        return module, widths[level], (height // 2**level, width // 2**level)

    @staticmethod
    def attends_to_contexts_only(model: Any) -> bool:
        others = ("encoder_hid_dim_type", "addition_embed_type", "dual_cross_attention")
        is_known = type(model) in (UIFaceUNet2DModel, UNet2DConditionModel)
        return is_known and not any(model.config.get(name) for name in others)

    def predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        contexts: torch.Tensor | None,
        attention_kwargs: Mapping[str, Any],
    ) -> torch.Tensor:
        return self.model(
            latents,
            timestep,
            encoder_hidden_states=contexts,
            cross_attention_kwargs=attention_kwargs,
            return_dict=False,
        )[0]
