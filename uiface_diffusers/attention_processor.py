"""Attention processors that record what the adaptive boundary needs and inject the empty branch's attention.

They read the step's `RowPlan` from the UNet's `cross_attention_kwargs` and work on any UNet made of diffusers'
`Attention` modules.
"""

import math

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from .models.unet_uiface import UIFaceUNet2DModel
from .two_stage import (
    ATTENTION_MAP_SIZE,
    RowPlan,
    block_attention_map,
    cross_temperature,
    key_covariance,
    logit_std,
)


class AttentionMapRecorder:
    """Collects the attention map's share of every cross-attention in one UNet call.

    Args:
        height, width (`int`): spatial shape of the UNet's input.
        map_size (`int`, defaults to 32): height and width of the attention map.
    """

    def __init__(self, height: int, width: int, map_size: int = ATTENTION_MAP_SIZE):
        self.height, self.width, self.map_size = height, width, map_size
        self.block_maps: list[torch.Tensor] = []

    @property
    def map_shape(self) -> tuple[int, int]:
        return (self.map_size, self.map_size)

    def record(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        """Takes `(rows, heads, positions, dim)` queries and `(rows, heads, tokens, dim)` keys; float32 under any
        dtype, autocast included."""
        positions = query.shape[2]
        # every halving of the UNet rounds up
        height, width = self.height, self.width
        while height * width > positions:
            height, width = math.ceil(height / 2), math.ceil(width / 2)
        if height * width != positions:
            raise ValueError(
                f"{positions} positions of a cross-attention are no halving of {self.height}x{self.width} latents: the"
                " adaptive boundary does not know their spatial shape."
            )
        with torch.autocast(query.device.type, enabled=False):
            logits = scale * (query.float() @ key.float().transpose(-2, -1))
            self.block_maps.append(block_attention_map(logits, height, width, self.map_size))


class UIFaceAttnProcessor(AttnProcessor2_0):
    """Shared course of the two processors: norms, projections, fused scaled-dot-product attention, output.

    Works for self-attention and cross-attention as `AttnProcessor2_0` does; what the plan changes is in
    `_query_key_value`.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        row_plan: RowPlan | None = None,
        injection_strength: float = 0.5,
        recorder: AttentionMapRecorder | None = None,
    ) -> torch.Tensor:
        if row_plan is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        residual = hidden_states
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = self._query_key_value(attn, hidden_states, context, row_plan, injection_strength, recorder)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, key.shape[2], len(hidden_states))
            attention_mask = attention_mask.view(len(hidden_states), attn.heads, -1, attention_mask.shape[-1])
        hidden_states = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=attn.scale)
        hidden_states = hidden_states.transpose(1, 2).flatten(2)
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if residual.ndim == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(residual.shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


def _heads(attn: Attention, projected: torch.Tensor) -> torch.Tensor:
    return projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _query(attn: Attention, hidden_states: torch.Tensor) -> torch.Tensor:
    """`(rows, positions, channels)` -> `(rows, heads, positions, dim)`."""
    query = _heads(attn, attn.to_q(hidden_states))
    return query if attn.norm_q is None else attn.norm_q(query)


def _key(attn: Attention, context: torch.Tensor) -> torch.Tensor:
    """`(rows, tokens, channels)` -> `(rows, heads, tokens, dim)`."""
    key = _heads(attn, attn.to_k(context))
    return key if attn.norm_k is None else attn.norm_k(key)


class SelfInjectionAttnProcessor(UIFaceAttnProcessor):
    """Self-attention in which the identity rows attend as their empty rows do: softmax(Q_e K_e^T) V (sec. 3.4).

    Their own queries and keys are not computed, no attention map is materialised.
    """

    def __init__(self):
        super().__init__()
        self.kept = None

    def _query_key_value(self, attn, hidden_states, context, row_plan, injection_strength, recorder):
        value = _heads(attn, attn.to_v(context))
        if not row_plan.self_injection:
            return _query(attn, hidden_states), _key(attn, context), value
        num_empty = len(row_plan.empty)
        if row_plan.reuses_empty:
            query, key = self.kept
        else:
            query, key = _query(attn, hidden_states[:num_empty]), _key(attn, context[:num_empty])
            self.kept = (query, key) if row_plan.keeps_empty else None
        return query[row_plan.source], key[row_plan.source], value


class CrossInjectionAttnProcessor(UIFaceAttnProcessor):
    """Cross-attention that records the rows which seek their boundary, and renormalises the identity rows' logits
    towards those of their empty rows, as the temperature that this is (`two_stage.cross_temperature`).

    Args:
        contexts (`tuple`, *optional*): keys and values of all contexts of a call, and the keys' covariances where they
            are needed, by `encode_contexts`. The rows then take theirs by `RowPlan.contexts`, and the states that the
            UNet is given are ignored. By default, the UNet is given the context of every row.
    """

    def __init__(self, contexts: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None):
        super().__init__()
        self.contexts = contexts
        self.kept = None

    @staticmethod
    def encode_contexts(
        attn: Attention, contexts: torch.Tensor, with_covariance: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values `(contexts, heads, tokens, dim)`, key covariances `(contexts, heads, dim, dim)` or None."""
        if attn.norm_cross:
            contexts = attn.norm_encoder_hidden_states(contexts)
        key, value = _key(attn, contexts), _heads(attn, attn.to_v(contexts))
        with torch.autocast(key.device.type, enabled=False):
            return key, value, key_covariance(key) if with_covariance else None

    def _query_key_value(self, attn, hidden_states, context, row_plan, injection_strength, recorder):
        query, injects = _query(attn, hidden_states), row_plan.cross_injection
        if self.contexts is None:
            key, value, covariance = self.encode_contexts(attn, context, injects)
        else:
            key, value = (each[row_plan.contexts] for each in self.contexts[:2])
            covariance = self.contexts[2][row_plan.contexts] if injects else None
        if recorder is not None and row_plan.recorded is not None:
            recorder.record(query[row_plan.recorded], key[row_plan.recorded], attn.scale)
        if injects:
            with torch.autocast(query.device.type, enabled=False):
                std = logit_std(query, covariance)
                empty_std = self.kept if row_plan.reuses_empty else std[: len(row_plan.empty)]
                # 1 in the empty rows, which are their own source
                temperature = cross_temperature(std, empty_std[row_plan.source], injection_strength)
            self.kept = empty_std if row_plan.keeps_empty else None
            query = query * temperature.to(query.dtype)
        return query, key, value


def attends_to_contexts_only(unet: torch.nn.Module) -> bool:
    """Whether the UNet uses its contexts in cross-attention alone, and as they are given: then their keys and values
    can be computed beforehand. UNets of other people's classes may do anything with them."""
    unet = getattr(unet, "_orig_mod", unet)
    others = ("encoder_hid_dim_type", "addition_embed_type", "dual_cross_attention")
    is_known = isinstance(unet, UIFaceUNet2DModel | UNet2DConditionModel)
    return is_known and not any(unet.config.get(name) for name in others)


def cross_attention_names(unet: torch.nn.Module) -> list[str]:
    """Names of the UNet's cross-attention modules; empty for a UNet without any."""
    return [
        name for name, module in unet.named_modules() if isinstance(module, Attention) and module.is_cross_attention
    ]


def two_stage_processors(
    unet: AttentionMixin, contexts: torch.Tensor | None = None, cross_injection: bool = True
) -> dict[str, UIFaceAttnProcessor]:
    """The processors of a UNet for two-stage sampling, to be given to `unet.set_attn_processor`.

    Args:
        unet: the UNet.
        contexts (`torch.Tensor` of shape `(1 + B, tokens, dim)`, *optional*): the empty context, then every sample's
            own, of a UNet that `attends_to_contexts_only`. Their keys and values are then computed here, once for all
            steps.
        cross_injection (`bool`, defaults to `True`): whether the keys' covariances will be needed.

    Raises:
        ValueError: an attention module has projections of its own for the context (`added_kv_proj_dim`) or a spatial
            norm, which the method does not define.
    """
    processors = {}
    # names inside a compiled module, as `set_attn_processor` sees them
    unet = getattr(unet, "_orig_mod", unet)
    for name, module in unet.named_modules():
        if not isinstance(module, Attention):
            continue
        if module.added_kv_proj_dim is not None or module.spatial_norm is not None:
            raise ValueError(f"attention `{name}` has added key/value projections or a spatial norm: not supported.")
        if not module.is_cross_attention:
            processor = SelfInjectionAttnProcessor()
        elif contexts is None:
            processor = CrossInjectionAttnProcessor()
        else:
            block = unet.get_submodule(name.rpartition(".")[0])
            tokens = block.context_tokens(contexts) if hasattr(block, "context_tokens") else contexts
            encoded = CrossInjectionAttnProcessor.encode_contexts(module, tokens, cross_injection)
            processor = CrossInjectionAttnProcessor(encoded)
        processors[f"{name}.processor"] = processor
    return processors
