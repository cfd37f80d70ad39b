"""How a denoiser is called, and what its attention makes of the contexts.

Another kind of denoiser is another class here, with an entry in `KINDS`.
"""

import inspect
from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from torch import nn

from .attention_processor import (
    AttentionMapRecorder,
    attention_states,
    cross_attention_names,
    two_stage_processors,
)
from .fingerprint import unwrapped
from .models.unet_uiface import UIFaceUNet2DModel
from .two_stage import RowPlan


class UNetDenoiser:
    """A denoiser that is called as diffusers' UNets are, for one call of the pipeline.

    Args:
        model: `UIFaceUNet2DModel`, `UNet2DConditionModel` or another people's class with the same signature.
        contexts (`torch.Tensor` of shape `(1 + B, tokens, dim)`): the empty context, then every sample's own.
        device (`torch.device`): where it computes.
        cross_injection (`bool`): whether cross-attention is injected into.
        injection_strength (`float`): of that, in [0, 1].
    """

    def __init__(
        self,
        model: nn.Module,
        contexts: torch.Tensor,
        device: torch.device,
        cross_injection: bool,
        injection_strength: float,
    ):
        self.model, self.contexts, self.injection_strength = model, contexts, injection_strength
        # what is offloaded encodes the contexts in every step, where its weights are at hand
        is_offloaded = model.device != device or _is_group_offload_enabled(model)
        self.encodes_once = not is_offloaded and self.attends_to_contexts_only(model)
        once = self._tokens_of_modules() if self.encodes_once else None
        self.states = attention_states(model, once, cross_injection)

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
    def attends_to_contexts_only(model: nn.Module) -> bool:
        """Whether it uses its contexts in cross-attention alone, and as they are given: then their keys and values can
        be computed beforehand. Other people's classes may do anything with them."""
        model = unwrapped(model)
        others = ("encoder_hid_dim_type", "addition_embed_type", "dual_cross_attention")
        is_known = type(model) in (UIFaceUNet2DModel, UNet2DConditionModel)
        return is_known and not any(model.config.get(name) for name in others)

    def _tokens_of_modules(self) -> dict[str, torch.Tensor]:
        """The contexts as each cross-attention module sees them: UIFace's blocks make tokens of them first."""
        model, tokens = unwrapped(self.model), {}
        for name in cross_attention_names(model):
            block = model.get_submodule(name.rpartition(".")[0])
            tokens[name] = block.context_tokens(self.contexts) if hasattr(block, "context_tokens") else self.contexts
        return tokens

    def __call__(
        self, latents: torch.Tensor, timestep: torch.Tensor, plan: RowPlan
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Computes the rows of a plan.

        Args:
            latents (`torch.Tensor` of shape `(B, channels, height, width)`): scaled as the denoiser wants them.
            timestep (`torch.Tensor`): of all rows, where the denoiser is.
            plan (`RowPlan`): which rows.

        Returns:
            The predictions `(E + I, channels, height, width)` in the denoiser's dtype, and the attention maps of the
            plan's recorded rows, `(R, 32, 32)` for every cross-attention.
        """
        recorder = AttentionMapRecorder(*latents.shape[-2:]) if plan.recorded is not None else None
        rows = self.model(
            latents[plan.samples].to(self.model.dtype),
            timestep,
            encoder_hidden_states=None if self.encodes_once else self.contexts[plan.contexts],
            cross_attention_kwargs={
                "row_plan": plan,
                "injection_strength": self.injection_strength,
                "recorder": recorder,
                "states": self.states,
            },
            return_dict=False,
        )[0]
        return rows, [] if recorder is None else recorder.block_maps


KINDS = (UNetDenoiser,)


def denoiser_kind(model: nn.Module) -> type[UNetDenoiser]:
    """The class of `KINDS` that calls a model.

    Raises:
        ValueError: it has no cross-attention, an attention that the method does not define, or is called in another
            way.
    """
    model = unwrapped(model)
    name = type(model).__name__
    if not cross_attention_names(model):
        raise ValueError(f"`unet` ({name}) has no cross-attention: it cannot follow a context.")
    two_stage_processors(model)
    for kind in KINDS:
        if kind.accepts(model):
            return kind
    raise ValueError(
        f"`unet` is {name}, which is called in another way: UIFaceUNet2DModel and UNet2DConditionModel can be sampled"
        " from."
    )
