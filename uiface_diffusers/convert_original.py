"""The published UIFace checkpoint's names and options -> this package's components."""

from collections.abc import Mapping
from typing import Any

import torch

from .models import EmptyContext, IdentityProjector, UIFaceUNet2DModel

ORIGINAL_PREFIXES = ("module.", "eps_model.")


def original_unet_config(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """`UIFaceUNet2DModel`'s configuration from the reference's own options (`sample_size` is not among them).

    Args:
        model_config: the reference's option names, as `initial_channels`, `channel_multipliers`, `is_attention`.

    Raises:
        ValueError: an option has a value that the reference's identity-conditioned UNet does not have.
    """
    required = {"condition_type": "CA", "is_context_conditional": True, "learn_empty_context": True}
    required |= {"n_context_classes": 0, "attention_heads": -1}
    for name, value in required.items():
        if model_config.get(name, value) != value:
            raise ValueError(f"option `{name}` is {model_config[name]!r}, only {value!r} can be converted.")
    multipliers = model_config["channel_multipliers"]
    if multipliers[0] != 1:
        raise ValueError(f"option `channel_multipliers` starts with {multipliers[0]}, only 1 can be converted.")
    widths = [model_config["initial_channels"]]
    for multiplier in multipliers[1:]:
        widths.append(widths[-1] * multiplier)
    return {
        "in_channels": model_config["input_channels"],
        "out_channels": model_config["input_channels"],
        "block_out_channels": tuple(widths),
        "attention_levels": tuple(model_config["is_attention"]),
        "layers_per_block": model_config["n_blocks_per_resolution"],
        "attention_head_dim": model_config["attention_head_channels"],
        "cross_attention_dim": model_config["context_channels"],
        "num_context_tokens": model_config["attention_head_channels"],
    }


def _module_names(unet: UIFaceUNet2DModel) -> dict[str, str]:
    """Our module's name for each of the reference's modules; the residual block's time projection is made of three."""
    names = {
        "time_emb.lin1": "time_embedding.linear_1",
        "time_emb.lin2": "time_embedding.linear_2",
        "image_proj": "conv_in",
        "norm": "conv_norm_out",
        "final": "conv_out",
    }

    def add_resnet(theirs: str, ours: str, has_shortcut: bool) -> None:
        pairs = {"norm1": "norm1", "conv1": "conv1", "norm2.norm": "norm2", "conv2": "conv2"}
        if has_shortcut:
            pairs["shortcut"] = "conv_shortcut"
        names.update({f"{theirs}.{old}": f"{ours}.{new}" for old, new in pairs.items()})

    def add_attention(theirs: str, ours: str) -> None:
        pairs = {
            "x_proj_in": "proj_in",
            "x_proj_out": "proj_out",
            "x_norm": "norm",
            "c_proj_in": "context_proj",
            "c_norm": "attn2.norm_cross",
            "ff.0": "ff.net.0.proj",
            "ff.2": "ff.net.2",
        }
        for old, new in {"self_attention": "attn1", "cross_attention": "attn2"}.items():
            pairs |= {f"{old}.{projection}": f"{new}.{projection}" for projection in ("to_q", "to_k", "to_v")}
            pairs[f"{old}.proj_out"] = f"{new}.to_out.0"
        names.update({f"{theirs}.{old}": f"{ours}.{new}" for old, new in pairs.items()})

    def add_block(block, theirs: str, ours: str, resnet: str = "res") -> None:
        add_resnet(f"{theirs}.{resnet}", f"{ours}.resnet", block.resnet.conv_shortcut is not None)
        if block.attention is not None:
            add_attention(f"{theirs}.attn", f"{ours}.attention")

    for side, sampler in (("down", "downsampler"), ("up", "upsampler")):
        position = 0
        for level, level_block in enumerate(getattr(unet, f"{side}_blocks")):
            for index, block in enumerate(level_block.blocks):
                add_block(block, f"{side}.{position}", f"{side}_blocks.{level}.blocks.{index}")
                position += 1
            if getattr(level_block, sampler) is not None:
                names[f"{side}.{position}.conv"] = f"{side}_blocks.{level}.{sampler}.conv"
                position += 1
    for index, block in enumerate(unet.mid_block.blocks):
        add_block(block, "middle", f"mid_block.blocks.{index}", resnet=f"res{index + 1}")
    return names


def _fold_time_projection(state: dict[str, torch.Tensor], resnet: str) -> tuple[torch.Tensor, torch.Tensor]:
    """scale(W e + b) and shift(W e + b) as one linear layer; computed in float64, so that folding costs no
    accuracy."""
    inner_weight, inner_bias = (state[f"{resnet}.time_emb.1.{name}"].double() for name in ("weight", "bias"))
    weights, biases = [], []
    for part in ("scale_emb", "shift_emb"):
        weight, bias = (state[f"{resnet}.{part}.{name}"].double() for name in ("weight", "bias"))
        weights.append(weight @ inner_weight)
        biases.append(weight @ inner_bias + bias)
    return torch.cat(weights).float(), torch.cat(biases).float()


def convert_original_state_dict(
    state_dict: Mapping[str, torch.Tensor], model_config: Mapping[str, Any]
) -> tuple[UIFaceUNet2DModel, IdentityProjector, EmptyContext]:
    """Converts the reference's denoiser.

    Args:
        state_dict: the reference's names; prefixes `module.` and `eps_model.` are taken off. Any floating dtype, the
            components are float32.
        model_config: the reference's options, see `original_unet_config`.

    Returns:
        The UNet, the identity projector and the empty context, in eval mode.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; the message names all of them.
    """
    state = {}
    for name, tensor in state_dict.items():
        stripped = name
        while stripped.startswith(ORIGINAL_PREFIXES):
            stripped = stripped.split(".", 1)[1]
        if stripped in state:
            raise ValueError(f"two tensors are named `{stripped}` once the prefixes {ORIGINAL_PREFIXES} are off.")
        state[stripped] = tensor

    unet = UIFaceUNet2DModel(**original_unet_config(model_config))
    projector = IdentityProjector(
        identity_dim=model_config["context_input_channels"],
        context_dim=model_config["context_channels"],
        dropout=model_config["context_dropout_probability"],
    )
    empty_context = EmptyContext(context_dim=model_config["context_channels"])

    # their name -> (the tensor of ours that it fills, its shape there)
    targets: dict[str, tuple[torch.Tensor, torch.Size]] = {}
    folded: dict[str, torch.nn.Linear] = {}
    for theirs, ours in _module_names(unet).items():
        module = unet.get_submodule(ours)
        for kind in ("weight", "bias"):
            parameter = getattr(module, kind)
            shape = parameter.shape
            if kind == "weight" and theirs.rsplit(".", 1)[-1] in ("to_q", "to_k", "to_v", "proj_out"):
                shape = (*shape, 1)  # 1x1 convolutions over a sequence there, linear layers here
            targets[f"{theirs}.{kind}"] = (parameter, torch.Size(shape))
        if theirs.endswith(".conv1"):
            resnet = theirs.removesuffix(".conv1")
            folded[resnet] = unet.get_submodule(ours.removesuffix(".conv1")).time_emb_proj
    targets["context_emb.weight"] = (projector.proj.weight, projector.proj.weight.shape)
    targets["context_emb.bias"] = (projector.proj.bias, projector.proj.bias.shape)
    targets["empty_context_embedding"] = (empty_context.embedding, empty_context.embedding.shape[1:])

    shapes = {name: shape for name, (_, shape) in targets.items()}
    for resnet, linear in folded.items():
        width, time_embed_dim = linear.out_features // 2, linear.in_features
        shapes[f"{resnet}.time_emb.1.weight"] = torch.Size((width, time_embed_dim))
        shapes[f"{resnet}.time_emb.1.bias"] = torch.Size((width,))
        for part in ("scale_emb", "shift_emb"):
            shapes[f"{resnet}.{part}.weight"] = torch.Size((width, width))
            shapes[f"{resnet}.{part}.bias"] = torch.Size((width,))
    problems = [f"missing: {name}" for name in sorted(shapes.keys() - state.keys())]
    problems += [f"unknown: {name}" for name in sorted(state.keys() - shapes.keys())]
    problems += [
        f"shape of {name}: {tuple(state[name].shape)} instead of {tuple(shapes[name])}"
        for name in sorted(shapes.keys() & state.keys())
        if state[name].shape != shapes[name]
    ]
    if problems:
        raise ValueError("the state dict does not fit the model's configuration:\n  " + "\n  ".join(problems))

    with torch.no_grad():
        for name, (parameter, _) in targets.items():
            parameter.copy_(state[name].reshape(parameter.shape))
        for resnet, linear in folded.items():
            weight, bias = _fold_time_projection(state, resnet)
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
    return unet.eval(), projector.eval(), empty_context.eval()
