"""Weights in the form of the published code."""

import torch

LEVELS, BLOCKS, WIDTH, CODES = (1, 2, 4), 2, 32, 40


def original_first_stage() -> dict[str, torch.Tensor]:
    """State dict of a small VQ-f4 of CompVis' form, random."""
    generator, state = torch.Generator().manual_seed(0), {}

    def layer(name: str, out: int, inner: int | None = None, size: int = 3) -> None:
        shape = (out,) if inner is None else (out, inner, size, size)
        scale = 1 if inner is None else (inner * size * size) ** -0.5
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) * scale + (inner is None)
        state[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.1

    def block(name: str, inner: int, out: int) -> None:
        layer(f"{name}.norm1", inner)
        layer(f"{name}.conv1", out, inner)
        layer(f"{name}.norm2", out)
        layer(f"{name}.conv2", out, out)
        if inner != out:
            layer(f"{name}.nin_shortcut", out, inner, 1)

    def middle(side: str, width: int) -> None:
        for number in (1, 2):
            block(f"{side}.mid.block_{number}", width, width)
        layer(f"{side}.mid.attn_1.norm", width)
        for name in ("q", "k", "v", "proj_out"):
            layer(f"{side}.mid.attn_1.{name}", width, width, 1)

    widths = [WIDTH * factor for factor in LEVELS]
    layer("encoder.conv_in", WIDTH, 3)
    inner = WIDTH
    for level, width in enumerate(widths):
        for number in range(BLOCKS):
            block(f"encoder.down.{level}.block.{number}", inner, width)
            inner = width
        if level < len(widths) - 1:
            layer(f"encoder.down.{level}.downsample.conv", width, width)
    middle("encoder", inner)
    layer("encoder.norm_out", inner)
    layer("encoder.conv_out", 3, inner)
    layer("quant_conv", 3, 3, 1)
    state["quantize.embedding.weight"] = torch.randn(CODES, 3, generator=generator)
    layer("post_quant_conv", 3, 3, 1)
    layer("decoder.conv_in", inner, 3)
    middle("decoder", inner)
    for level in reversed(range(len(widths))):
        for number in range(BLOCKS + 1):
            block(f"decoder.up.{level}.block.{number}", inner, widths[level])
            inner = widths[level]
        if level:
            layer(f"decoder.up.{level}.upsample.conv", inner, inner)
    layer("decoder.norm_out", inner)
    layer("decoder.conv_out", 3, inner)
    return state
