"""Attention processors that record what the adaptive boundary needs and inject the empty branch's attention.

They hold nothing of a call. The step's `RowPlan` and the call's `AttentionState`s come through the UNet's
`cross_attention_kwargs`, so that calls which share a UNet do not meet. They work on any UNet made of diffusers'
`Attention` modules.
"""

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from .fingerprint import unwrapped
from .two_stage import (
    ATTENTION_MAP_SIZE,
    RowPlan,
    block_attention_map,
    cross_temperature,
    key_covariance,
    logit_std,
)


@dataclass
class AttentionState:
    """What one call keeps for one attention module.

    Args:
        contexts (`tuple`, *optional*): of a cross-attention: keys and values of all contexts of the call, and the
            keys' covariances where they are needed, by `encode_contexts`. The rows take theirs by `RowPlan.contexts`,
            and the UNet is given no context. By default, it is given the context of every row.
        kept (*optional*): what the empty rows gave to the identity rows, for steps that reuse it.
    """

    contexts: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None
    kept: Any = None


class AttentionMapRecorder:
    """Collects the attention map's share of every cross-attention in one UNet call.

    Args:
        height, width (`int`): spatial shape of the UNet's input.
        map_size (`int`, defaults to 32): height and width of the attention map.
        share (`tuple[int, int]`, defaults to all): of a context's tokens, how many of how many are of the map, the
            first ones. Those of a condition come after them: the map is of what the empty context lays out.
    """

    def __init__(self, height: int, width: int, map_size: int = ATTENTION_MAP_SIZE, share: tuple[int, int] = (1, 1)):
        self.height, self.width, self.map_size, self.share = height, width, map_size, share
        self.block_maps: list[torch.Tensor] = []

    @property
    def map_shape(self) -> tuple[int, int]:
        return (self.map_size, self.map_size)

    def record(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        """Takes `(rows, heads, positions, dim)` queries and `(rows, heads, tokens, dim)` keys; float32 under any
        dtype, autocast included."""
        positions, (own, all_tokens) = query.shape[2], self.share
        key = key[:, :, : key.shape[2] * own // all_tokens]
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


class UIFaceAttnProcessor:
    """Shared course of the two processors: norms, projections, fused scaled-dot-product attention, output.

    Works for self-attention and cross-attention as `AttnProcessor2_0` does; what the plan changes is in
    `_query_key_value`. Without a plan, it is the processor that it replaces.

    Args:
        name (`str`): of the attention module within the UNet.
        replaced (*optional*): the module's own processor, `AttnProcessor2_0` by default.
    """

    def __init__(self, name: str = "", replaced: AttnProcessor | AttnProcessor2_0 | None = None):
        self.name, self.replaced = name, replaced or AttnProcessor2_0()

    def _query_key_value(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        context: torch.Tensor,
        row_plan: RowPlan,
        injection_strength: float,
        recorder: AttentionMapRecorder | None,
        state: AttentionState,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What each row attends with and to, `(rows, heads, positions or tokens, dim)`: from hidden states
        `(rows, positions, channels)` and a context `(rows, tokens, channels)`."""
        raise NotImplementedError

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
        states: Mapping[str, AttentionState] | None = None,
    ) -> torch.Tensor:
        if row_plan is None:
            return self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        state = AttentionState() if states is None else states[self.name]
        residual = hidden_states
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = self._query_key_value(
            attn, hidden_states, context, row_plan, injection_strength, recorder, state
        )
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

    Their own queries and keys are not computed, and no attention map is materialized.
    """

    def _query_key_value(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        context: torch.Tensor,
        row_plan: RowPlan,
        injection_strength: float,
        recorder: AttentionMapRecorder | None,
        state: AttentionState,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        value = _heads(attn, attn.to_v(context))
        if not row_plan.self_injection:
            return _query(attn, hidden_states), _key(attn, context), value
        num_empty = len(row_plan.empty)
        if row_plan.reuses_empty:
            query, key = state.kept
        else:
            query, key = _query(attn, hidden_states[:num_empty]), _key(attn, context[:num_empty])
            state.kept = (query, key) if row_plan.keeps_empty else None
        return query[row_plan.source], key[row_plan.source], value


class CrossInjectionAttnProcessor(UIFaceAttnProcessor):
    """Cross-attention that records the rows which seek their boundary, and renormalizes the identity rows' logits
    toward those of their empty rows, as the temperature that this is (`two_stage.cross_temperature`)."""

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

    def _query_key_value(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        context: torch.Tensor,
        row_plan: RowPlan,
        injection_strength: float,
        recorder: AttentionMapRecorder | None,
        state: AttentionState,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, injects = _query(attn, hidden_states), row_plan.cross_injection
        if state.contexts is None:
            key, value, covariance = self.encode_contexts(attn, context, injects)
        else:
            keys, values, covariances = state.contexts
            key, value = keys[row_plan.contexts], values[row_plan.contexts]
            covariance = covariances[row_plan.contexts] if injects and covariances is not None else None
        if recorder is not None and row_plan.recorded is not None:
            recorder.record(query[row_plan.recorded], key[row_plan.recorded], attn.scale)
        if injects:
            assert covariance is not None, "the contexts were encoded without covariances"
            with torch.autocast(query.device.type, enabled=False):
                std = logit_std(query, covariance)
                empty_std = state.kept if row_plan.reuses_empty else std[: len(row_plan.empty)]
                # 1 in the empty rows, which are their own source
                temperature = cross_temperature(std, empty_std[row_plan.source], injection_strength)
            state.kept = empty_std if row_plan.keeps_empty else None
            query = query * temperature.to(query.dtype)
        return query, key, value


def cross_attention_names(unet: torch.nn.Module) -> list[str]:
    """Names of the UNet's cross-attention modules; empty for a UNet without any."""
    return [
        name
        for name, module in unet.named_modules()
        if isinstance(module, Attention) and getattr(module, "is_cross_attention", False)  # HiDream's has none
    ]


def two_stage_processors(unet: AttentionMixin) -> dict[str, UIFaceAttnProcessor]:
    """The processors of a UNet for two-stage sampling, to be given to `unet.set_attn_processor`.

    Raises:
        ValueError: an attention module has a processor other than diffusers' `AttnProcessor` or `AttnProcessor2_0`,
            which may compute something else; or it has projections of its own for the context (`added_kv_proj_dim`) or
            a spatial norm, which the method does not define.
    """
    processors: dict[str, UIFaceAttnProcessor] = {}
    # names inside a compiled module, as `set_attn_processor` sees them
    for name, module in unwrapped(unet).named_modules():
        if not hasattr(module, "get_processor"):
            continue
        present = module.get_processor()
        # of another call that is under way
        present = present.replaced if isinstance(present, UIFaceAttnProcessor) else present
        if not isinstance(module, Attention) or type(present) not in (AttnProcessor, AttnProcessor2_0):
            raise ValueError(
                f"attention `{name}` of {type(unwrapped(unet)).__name__} is computed by {type(present).__name__}."
                " Two-stage sampling replaces diffusers' AttnProcessor and AttnProcessor2_0 only: another one may not"
                " be softmax attention. If it is, set one of those by `unet.set_attn_processor`."
            )
        if module.added_kv_proj_dim is not None or module.spatial_norm is not None:
            raise ValueError(f"attention `{name}` has added key/value projections or a spatial norm: not supported.")
        kind = CrossInjectionAttnProcessor if module.is_cross_attention else SelfInjectionAttnProcessor
        processors[f"{name}.processor"] = kind(name, present)
    return processors


def attention_states(
    unet: AttentionMixin, tokens: Mapping[str, torch.Tensor] | None = None, cross_injection: bool = True
) -> dict[str, AttentionState]:
    """The states of a call, one for each attention module by its name.

    Args:
        unet: the UNet.
        tokens (*optional*): for every cross-attention module by its name, the contexts as it sees them
            `(contexts, tokens, dim)`, in the order of `RowPlan.contexts`. Their keys and values are then computed
            here, once for all steps.
        cross_injection (`bool`, defaults to `True`): whether the keys' covariances will be needed.
    """
    states = {}
    for name, module in unwrapped(unet).named_modules():
        if not isinstance(module, Attention):
            continue
        states[name] = AttentionState()
        if module.is_cross_attention and tokens is not None:
            contexts = CrossInjectionAttnProcessor.encode_contexts(module, tokens[name], cross_injection)
            states[name].contexts = contexts
    return states


_lock = threading.Lock()
# of every UNet that is being sampled from: the number of calls under way, and the processors installed for them
_installed: WeakKeyDictionary[torch.nn.Module, tuple[int, dict[str, UIFaceAttnProcessor]]] = WeakKeyDictionary()


@contextmanager
def installed_processors(unet: AttentionMixin) -> Iterator[None]:
    """The UNet has `two_stage_processors` within. The first of several calls at a time installs them, and the last one
    restores what was there; calls of the UNet without a plan get what was there at any time.

    Raises:
        ValueError: see `two_stage_processors`.
    """
    model = unwrapped(unet)
    with _lock:
        calls, installed = _installed.get(model, (0, {}))
        for name, processor in two_stage_processors(model).items():
            module = model.get_submodule(name.removesuffix(".processor"))
            if not isinstance(module.get_processor(), UIFaceAttnProcessor):
                module.set_processor(processor)
                installed[name] = processor
        _installed[model] = (calls + 1, installed)
    try:
        yield
    finally:
        with _lock:
            calls, installed = _installed.pop(model)
            if calls > 1:
                _installed[model] = (calls - 1, installed)
            else:
                for name, processor in installed.items():
                    module = model.get_submodule(name.removesuffix(".processor"))
                    if module.get_processor() is processor:
                        module.set_processor(processor.replaced)
