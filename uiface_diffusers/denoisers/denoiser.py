"""What all denoisers have in common. One object serves one call of the pipeline."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from torch import nn

from ..attention_processor import AttentionMapRecorder, attention_states, cross_attention_names
from ..fingerprint import unwrapped
from ..two_stage import RowPlan


class Denoiser:
    """A model and what one call of the pipeline keeps for its attention. A subclass says how the model is called.

    Args:
        model (`ModelMixin`): the denoiser, of a class that `accepts` takes.
        contexts (`torch.Tensor` of shape `(contexts, tokens, dim)`): the empty ones, then those of the identities, in
            the order of `RowPlan.contexts`.
        device (`torch.device`): where it computes.
        cross_injection (`bool`): whether cross-attention is injected into.
        injection_strength (`float`): of that, in [0, 1].
        own_tokens (`int`, *optional*): the first tokens of each context, by which the boundary is found; the others
            are of conditions. All by default.
    """

    def __init__(
        self,
        model: ModelMixin,
        contexts: torch.Tensor,
        device: torch.device,
        cross_injection: bool,
        injection_strength: float,
        own_tokens: int | None = None,
    ):
        self.model, self.contexts, self.injection_strength = model, contexts, injection_strength
        self.map_share = (own_tokens or contexts.shape[1], contexts.shape[1])
        # what is offloaded encodes the contexts in every step, where its weights are at hand
        is_offloaded = model.device != device or _is_group_offload_enabled(model)
        self.encodes_once = not is_offloaded and self.attends_to_contexts_only(unwrapped(model))
        once = self._tokens_of_modules() if self.encodes_once else None
        self.states = attention_states(unwrapped(model), once, cross_injection)

    # classes that it is tested with, for messages
    models: ClassVar[tuple[type, ...]] = ()
    # name by which training chooses `build`, if it does
    trained_as: ClassVar[str | None] = None
    # context tokens that a fresh identity projector makes for it
    num_tokens: ClassVar[int] = 1

    @staticmethod
    def accepts(model: nn.Module) -> bool:
        """Whether `model` is called in this way."""
        raise NotImplementedError

    @staticmethod
    def check(model: Any) -> None:
        """Refuses a configuration of an accepted model that cannot be sampled.

        Raises:
            ValueError: it predicts other channels than its latents have, or needs another condition than a context.
        """
        out_channels = model.config.out_channels
        if out_channels not in (None, model.config.in_channels):
            raise ValueError(
                f"`unet` ({type(model).__name__}) predicts {out_channels} channels for {model.config.in_channels}"
                " latent channels; learned variances are not supported."
            )

    @staticmethod
    def build(channels: int, height: int, width: int, options: Mapping[str, Any]) -> Any:
        """A fresh model for latents `(channels, height, width)`, initialized for training.

        Args:
            options: of its class.

        Raises:
            TypeError, ValueError, NotImplementedError, ZeroDivisionError: the options make no model.
        """
        raise NotImplementedError

    @staticmethod
    def context_dim(model: Any) -> int:
        """Width of the contexts that `model` takes."""
        return model.config.cross_attention_dim

    @staticmethod
    def middle(model: Any, height: int, width: int) -> tuple[nn.Module, int, tuple[int, int]]:
        """Where features in the middle of `model` are taken, to align them in training: the module that gives them,
        `(batch, channels, h, w)` or `(batch, h * w, channels)`; channels; and `(h, w)`.

        Args:
            height, width: of the latents.

        Raises:
            ValueError: of this class nobody has said where.
        """
        raise ValueError(f"{type(model).__name__} has no known middle whose features could be aligned.")

    @staticmethod
    def attends_to_contexts_only(model: Any) -> bool:
        """Whether it uses its contexts in cross-attention alone, and as they are given: then their keys and values can
        be computed beforehand. Other people's classes may do anything with them."""
        raise NotImplementedError

    def _tokens_of_modules(self) -> dict[str, torch.Tensor]:
        """The contexts as each cross-attention module sees them: UIFace's blocks make tokens of them first."""
        model, tokens = unwrapped(self.model), {}
        for name in cross_attention_names(model):
            block = model.get_submodule(name.rpartition(".")[0])
            tokens[name] = block.context_tokens(self.contexts) if hasattr(block, "context_tokens") else self.contexts
        return tokens

    def map_shape(self, height: int, width: int) -> tuple[int, int]:
        """Spatial shape of the largest attention maps, for latents of `height` and `width`."""
        return height, width

    def predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        contexts: torch.Tensor | None,
        attention_kwargs: Mapping[str, Any],
    ) -> torch.Tensor:
        """One call of the model.

        Args:
            latents (`torch.Tensor` of shape `(rows, channels, height, width)`): in the model's dtype.
            timestep (`torch.Tensor`): a scalar, of all rows.
            contexts (`torch.Tensor` of shape `(rows, tokens, dim)`, *optional*): `None` if the attention processors
                have their keys and values.
            attention_kwargs: what the attention processors take.

        Returns:
            The predictions `(rows, channels, height, width)`.
        """
        raise NotImplementedError

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
        shape = self.map_shape(*latents.shape[-2:])
        recorder = AttentionMapRecorder(*shape, share=self.map_share) if plan.recorded is not None else None
        rows = self.predict(
            latents[plan.samples].to(self.model.dtype),
            timestep,
            None if self.encodes_once else self.contexts[plan.contexts],
            {
                "row_plan": plan,
                "injection_strength": self.injection_strength,
                "recorder": recorder,
                "states": self.states,
            },
        )
        return rows, [] if recorder is None else recorder.block_maps
