from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.models.upsampling import Upsample2D
from torch import nn


class UIFaceAttentionBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward behind one shared group norm (the reference's `attn`).

    Every context token becomes `num_context_tokens` keys by a linear layer of the block's own.
    """

    def __init__(
        self, channels: int, head_dim: int, cross_attention_dim: int, num_context_tokens: int, norm_num_groups: int
    ):
        super().__init__()
        heads = channels // head_dim
        self.num_context_tokens = num_context_tokens
        self.proj_in = nn.Conv2d(channels, channels, kernel_size=1)
        self.context_proj = nn.Linear(cross_attention_dim, cross_attention_dim * num_context_tokens)
        self.norm = nn.GroupNorm(norm_num_groups, channels)
        self.attn1 = Attention(channels, heads=heads, dim_head=head_dim, bias=True)
        self.attn2 = Attention(
            channels,
            cross_attention_dim=cross_attention_dim,
            heads=heads,
            dim_head=head_dim,
            bias=True,
            cross_attention_norm="group_norm",
            cross_attention_norm_num_groups=norm_num_groups,
        )
        self.ff = FeedForward(channels, activation_fn="gelu")
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def _norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden_states.transpose(1, 2)).transpose(1, 2)

    def context_tokens(self, context: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, dim)` -> `(batch, tokens * num_context_tokens, dim)`; the reference lays channels out
        first."""
        tokens = self.context_proj(context).unflatten(-1, (-1, self.num_context_tokens))
        return tokens.transpose(2, 3).flatten(1, 2)

    def forward(
        self, hidden_states: torch.Tensor, context: torch.Tensor | None, cross_attention_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        residual = hidden_states
        # a processor may be given the keys and values of its contexts instead
        if context is not None:
            context = self.context_tokens(context)

        hidden_states = self.proj_in(hidden_states)
        shape = hidden_states.shape
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
        hidden_states = hidden_states + self.attn1(self._norm(hidden_states), **cross_attention_kwargs)
        hidden_states = hidden_states + self.attn2(
            self._norm(hidden_states), encoder_hidden_states=context, **cross_attention_kwargs
        )
        hidden_states = hidden_states + self.ff(self._norm(hidden_states))
        hidden_states = hidden_states.transpose(1, 2).reshape(shape)
        return self.proj_out(hidden_states) + residual


class UIFaceBlock(nn.Module):
    """A residual block and, where the level has attention, an attention block after it."""

    # set by `enable_gradient_checkpointing`
    _gradient_checkpointing_func: Callable[..., torch.Tensor]

    def __init__(self, in_channels: int, out_channels: int, resnet_kwargs: dict, attention_kwargs: dict | None):
        super().__init__()
        self.resnet = ResnetBlock2D(in_channels=in_channels, out_channels=out_channels, **resnet_kwargs)
        self.attention = UIFaceAttentionBlock(out_channels, **attention_kwargs) if attention_kwargs else None
        self.gradient_checkpointing = False

    def _forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        context: torch.Tensor | None,
        cross_attention_kwargs: dict[str, Any],
    ) -> torch.Tensor:
        hidden_states = self.resnet(hidden_states, temb)
        if self.attention is not None:
            hidden_states = self.attention(hidden_states, context, cross_attention_kwargs)
        return hidden_states

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        context: torch.Tensor | None,
        cross_attention_kwargs: dict[str, Any],
    ) -> torch.Tensor:
        arguments = (hidden_states, temb, context, cross_attention_kwargs)
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(self._forward, *arguments)
        return self._forward(*arguments)


class UIFaceDownBlock(nn.Module):
    """One level on the way down; returns the states that the way up will concatenate."""

    def __init__(
        self, channels: Sequence[int], add_downsample: bool, resnet_kwargs: dict, attention_kwargs: dict | None
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            UIFaceBlock(channels[i], channels[i + 1], resnet_kwargs, attention_kwargs)
            for i in range(len(channels) - 1)
        )
        self.downsampler = Downsample2D(channels[-1], use_conv=True, padding=1, name="op") if add_downsample else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        context: torch.Tensor | None,
        cross_attention_kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        skips = []
        for block in self.blocks:
            hidden_states = block(hidden_states, temb, context, cross_attention_kwargs)
            skips.append(hidden_states)
        if self.downsampler is not None:
            hidden_states = self.downsampler(hidden_states)
            skips.append(hidden_states)
        return hidden_states, skips


class UIFaceMidBlock(nn.Module):
    def __init__(self, channels: int, resnet_kwargs: dict, attention_kwargs: dict):
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                UIFaceBlock(channels, channels, resnet_kwargs, attention_kwargs),
                UIFaceBlock(channels, channels, resnet_kwargs, None),
            ]
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        context: torch.Tensor | None,
        cross_attention_kwargs: dict[str, Any],
    ) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, temb, context, cross_attention_kwargs)
        return hidden_states


class UIFaceUpBlock(nn.Module):
    """One level on the way up: every block first concatenates a skip; the last one narrows to the next width."""

    def __init__(
        self,
        channels: Sequence[int],
        skip_channels: Sequence[int],
        add_upsample: bool,
        resnet_kwargs: dict,
        attention_kwargs: dict | None,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            UIFaceBlock(channels[i] + skip_channels[i], channels[i + 1], resnet_kwargs, attention_kwargs)
            for i in range(len(skip_channels))
        )
        self.upsampler = (
            Upsample2D(channels[-1], use_conv_transpose=True, kernel_size=4, padding=1) if add_upsample else None
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        skips: list[torch.Tensor],
        temb: torch.Tensor,
        context: torch.Tensor | None,
        cross_attention_kwargs: dict[str, Any],
    ) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = torch.cat([hidden_states, skips.pop()], dim=1)
            hidden_states = block(hidden_states, temb, context, cross_attention_kwargs)
        if self.upsampler is not None:
            hidden_states = self.upsampler(hidden_states)
        return hidden_states


class UIFaceUNet2DModel(ModelMixin, AttentionMixin, ConfigMixin):
    """The conditional UNet of UIFace (arXiv 2502.19803, appendix), made of diffusers' blocks.

    It predicts the noise (or v) of a latent from the latent, the timestep and a context of one or more tokens. The
    default configuration is the published one: 210.3M parameters, to which the reference's form adds 5.9M by leaving
    two linear layers in a row in every time projection.

    Args:
        sample_size (`int`, defaults to 32): height and width of the latents that the pipeline samples.
        in_channels (`int`, defaults to 3): latent channels.
        out_channels (`int`, defaults to 3): channels of the prediction.
        block_out_channels (`tuple[int]`, defaults to `(96, 192, 384, 768)`): width of each level.
        attention_levels (`tuple[bool]`, defaults to `(False, True, True, True)`): which levels have attention. The
            middle always has.
        layers_per_block (`int`, defaults to 2): residual blocks per level on the way down; one more on the way up.
        attention_head_dim (`int`, defaults to 32): width of an attention head; divides every width with attention.
        cross_attention_dim (`int`, defaults to 256): width of the context.
        num_context_tokens (`int`, defaults to 32): keys that every attention block makes of one context token.
        norm_num_groups (`int`, defaults to 32): groups of every group norm; divides every width and the context's.

    Raises:
        ValueError: options that do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["UIFaceBlock"]  # type: ignore[assignment]  # `None` there
    _skip_layerwise_casting_patterns = ["norm"]  # type: ignore[assignment]  # `None` there
    _repeated_blocks = ["UIFaceAttentionBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (96, 192, 384, 768),
        attention_levels: tuple[bool, ...] = (False, True, True, True),
        layers_per_block: int = 2,
        attention_head_dim: int = 32,
        cross_attention_dim: int = 256,
        num_context_tokens: int = 32,
        norm_num_groups: int = 32,
    ):
        super().__init__()
        widths = tuple(block_out_channels)
        if len(attention_levels) != len(widths):
            raise ValueError(
                f"`attention_levels` has {len(attention_levels)} entries, `block_out_channels` has {len(widths)}: give"
                " one entry per level to both."
            )
        with_attention = [width for width, has in zip(widths, attention_levels, strict=True) if has] + [widths[-1]]
        # the last block of a level on the way up attends at the next level's width
        with_attention += [widths[max(i - 1, 0)] for i, has in enumerate(attention_levels) if has]
        for name, divisor, divided in (
            ("attention_head_dim", attention_head_dim, with_attention),
            ("norm_num_groups", norm_num_groups, [*widths, cross_attention_dim]),
        ):
            indivisible = sorted({width for width in divided if width % divisor})
            if indivisible:
                raise ValueError(f"`{name}` is {divisor}, which does not divide the width(s) {indivisible}.")
        base = widths[0]
        time_embed_dim = 4 * base
        resnet_kwargs = {
            "temb_channels": time_embed_dim,
            "groups": norm_num_groups,
            "eps": 1e-5,
            "time_embedding_norm": "scale_shift",
        }
        attention_kwargs = {
            "head_dim": attention_head_dim,
            "cross_attention_dim": cross_attention_dim,
            "num_context_tokens": num_context_tokens,
            "norm_num_groups": norm_num_groups,
        }

        self.time_proj = Timesteps(base, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(base, time_embed_dim)
        self.conv_in = nn.Conv2d(in_channels, base, kernel_size=3, padding=1)

        skip_channels = [base]
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            is_last = level == len(widths) - 1
            channels = [skip_channels[-1]] + [width] * layers_per_block
            level_attention = attention_kwargs if attention_levels[level] else None
            self.down_blocks.append(UIFaceDownBlock(channels, not is_last, resnet_kwargs, level_attention))
            skip_channels += channels[1:] + ([] if is_last else [width])

        self.mid_block = UIFaceMidBlock(widths[-1], resnet_kwargs, attention_kwargs)

        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            channels = [widths[level]] * (layers_per_block + 1) + [widths[max(level - 1, 0)]]
            skips = [skip_channels.pop() for _ in range(layers_per_block + 1)]
            level_attention = attention_kwargs if attention_levels[level] else None
            self.up_blocks.append(UIFaceUpBlock(channels, skips, level > 0, resnet_kwargs, level_attention))

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, base)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(base, out_channels, kernel_size=3, padding=1)

    @torch.no_grad()
    def zero_init_residual_branches(self) -> None:
        """Zeroes the last layer of every residual branch and of the UNet: the usual start of a training from scratch
        (Ho et al. 2020)."""
        last: list[nn.Module] = [self.conv_out]
        for module in self.modules():
            if isinstance(module, ResnetBlock2D):
                last.append(module.conv2)
            elif isinstance(module, UIFaceAttentionBlock):
                last.append(module.proj_out)
        for layer in last:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor | None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """
        Args:
            sample (`torch.Tensor` of shape `(batch, in_channels, height, width)`): noisy latents; height and width
                are multiples of `2 ** (levels - 1)`.
            timestep (`torch.Tensor`, `float` or `int`): one timestep for all rows, or one per row of shape `(batch,)`.
            encoder_hidden_states (`torch.Tensor` of shape `(batch, tokens, cross_attention_dim)`): the context. `None`
                only with attention processors that have the contexts' keys and values from `cross_attention_kwargs`.
            cross_attention_kwargs (`dict`, *optional*): passed to every attention processor.
            return_dict (`bool`, defaults to `True`): a plain tuple when `False`.

        Returns:
            `UNet2DConditionOutput` with `sample` of the shape of the input, `out_channels` channels.

        Raises:
            ValueError: height or width cannot be halved as often as there are levels.
        """
        factor = 2 ** (len(self.down_blocks) - 1)
        if sample.shape[-1] % factor or sample.shape[-2] % factor:
            raise ValueError(
                f"latents of {sample.shape[-2]}x{sample.shape[-1]} cannot be halved {len(self.down_blocks) - 1} times:"
                f" height and width must be multiples of {factor}."
            )
        cross_attention_kwargs = cross_attention_kwargs or {}

        # one timestep for all rows is embedded once, and its scale and shift broadcast
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1)
        temb = self.time_embedding(self.time_proj(timestep).to(sample.dtype))

        hidden_states = self.conv_in(sample)
        skips = [hidden_states]
        for block in self.down_blocks:
            hidden_states, block_skips = block(hidden_states, temb, encoder_hidden_states, cross_attention_kwargs)
            skips += block_skips
        hidden_states = self.mid_block(hidden_states, temb, encoder_hidden_states, cross_attention_kwargs)
        for block in self.up_blocks:
            hidden_states = block(hidden_states, skips, temb, encoder_hidden_states, cross_attention_kwargs)

        hidden_states = self.conv_out(self.conv_act(self.conv_norm_out(hidden_states)))
        return UNet2DConditionOutput(sample=hidden_states) if return_dict else (hidden_states,)
