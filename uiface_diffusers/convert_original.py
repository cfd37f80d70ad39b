"""The published UIFace checkpoint's names and options -> this package's components."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, VQModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from .files import read_safetensors, read_torch
from .models import EmptyContext, IdentityProjector, UIFaceUNet2DModel
from .pipeline_uiface import UIFacePipeline

ORIGINAL_PREFIXES = ("module.", "eps_model.")
# the released weights: latents of 3x32x32, a linear schedule, DDIM steps t = 980, 960, .., 0
PUBLISHED_SAMPLE_SIZE = 32
PUBLISHED_MODEL_CONFIG = {
    "input_channels": 3,
    "initial_channels": 96,
    "channel_multipliers": [1, 2, 2, 2],
    "is_attention": [False, True, True, True],
    "attention_heads": -1,
    "attention_head_channels": 32,
    "n_blocks_per_resolution": 2,
    "condition_type": "CA",
    "context_input_channels": 512,
    "context_channels": 256,
    "is_context_conditional": True,
    "n_context_classes": 0,
    "learn_empty_context": True,
    "context_dropout_probability": 0.25,
    "unconditioned_probability": 0.2,
}
# nothing is read of them
OPTIONAL = {"unconditioned_probability"}
NOISE_SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SAMPLER = {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True, "clip_sample": False}


def original_unet_config(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """`UIFaceUNet2DModel`'s configuration from the reference's own options (`sample_size` is not among them).

    Args:
        model_config: by the reference's option names, such as `initial_channels`, `channel_multipliers` or
            `is_attention`.

    Raises:
        ValueError: an option has a value that the reference's identity-conditioned UNet does not have.
    """
    required = {"condition_type": "CA", "is_context_conditional": True, "learn_empty_context": True}
    required |= {"n_context_classes": 0, "attention_heads": -1}
    for name, value in required.items():
        if model_config.get(name, value) != value:
            raise ValueError(f"option `{name}` is {model_config[name]!r}, only {value!r} can be converted.")
    missing = sorted(PUBLISHED_MODEL_CONFIG.keys() - required.keys() - model_config.keys() - OPTIONAL)
    if missing:
        raise ValueError(f"the model's options lack {', '.join(f'`{name}`' for name in missing)}.")
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

    modules = dict(unet.named_modules())

    def add_block(theirs: str, ours: str, resnet: str = "res") -> None:
        add_resnet(f"{theirs}.{resnet}", f"{ours}.resnet", f"{ours}.resnet.conv_shortcut" in modules)
        if f"{ours}.attention" in modules:
            add_attention(f"{theirs}.attn", f"{ours}.attention")

    for side, sampler in (("down", "downsampler"), ("up", "upsampler")):
        position = 0
        for level, level_block in enumerate(getattr(unet, f"{side}_blocks")):
            for index in range(len(level_block.blocks)):
                add_block(f"{side}.{position}", f"{side}_blocks.{level}.blocks.{index}")
                position += 1
            if getattr(level_block, sampler) is not None:
                names[f"{side}.{position}.conv"] = f"{side}_blocks.{level}.{sampler}.conv"
                position += 1
    for index in range(len(unet.mid_block.blocks)):
        add_block("middle", f"mid_block.blocks.{index}", resnet=f"res{index + 1}")
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
        The UNet, the identity projector and the empty context, in eval mode. Tensors that are float32 already are
        shared with `state_dict`, not copied.

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

    with torch.device("meta"):
        unet = UIFaceUNet2DModel(**original_unet_config(model_config))
        projector = IdentityProjector(
            identity_dim=model_config["context_input_channels"],
            context_dim=model_config["context_channels"],
            dropout=model_config["context_dropout_probability"],
        )
        empty_context = EmptyContext(context_dim=model_config["context_channels"])

    # their name -> (the module and parameter of ours that it becomes, its shape there)
    targets: dict[str, tuple[torch.nn.Module, str, torch.Size]] = {}
    folded: dict[str, torch.nn.Linear] = {}
    for theirs, ours in _module_names(unet).items():
        module = unet.get_submodule(ours)
        for kind in ("weight", "bias"):
            shape = getattr(module, kind).shape
            if kind == "weight" and theirs.rsplit(".", 1)[-1] in ("to_q", "to_k", "to_v", "proj_out"):
                shape = (*shape, 1)  # 1x1 convolutions over a sequence there, linear layers here
            targets[f"{theirs}.{kind}"] = (module, kind, torch.Size(shape))
        if theirs.endswith(".conv1"):
            resnet = theirs.removesuffix(".conv1")
            folded[resnet] = unet.get_submodule(ours.removesuffix(".conv1")).time_emb_proj
    for kind in ("weight", "bias"):
        targets[f"context_emb.{kind}"] = (projector.proj, kind, getattr(projector.proj, kind).shape)
    targets["empty_context_embedding"] = (empty_context, "embedding", empty_context.embedding.shape[1:])

    shapes = {name: shape for name, (_, _, shape) in targets.items()}
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

    for name, (module, kind, _) in targets.items():
        tensor = state[name].detach().float().reshape(getattr(module, kind).shape)
        setattr(module, kind, torch.nn.Parameter(tensor))
    for resnet, linear in folded.items():
        weight, bias = _fold_time_projection(state, resnet)
        linear.weight, linear.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    return unet.eval(), projector.eval(), empty_context.eval()


def convert_first_stage(state_dict: Mapping[str, torch.Tensor]) -> VQModel:
    """Converts CompVis' VQ first stage (latent-diffusion, `VQModelInterface`), such as VQ-f4.

    Args:
        state_dict: of the whole model; names start with `encoder.`, `decoder.`, `quantize.`, `quant_conv.` or
            `post_quant_conv.`. The widths are read from the shapes.

    Returns:
        The model in eval mode, with a scaling factor of 1: UIFace's latents are not scaled.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape.
    """
    state = {name.removeprefix("first_stage_model."): tensor for name, tensor in state_dict.items()}
    levels = 1 + max(
        (int(m[1]) for m in (re.match(r"encoder\.down\.(\d+)\.", name) for name in state) if m), default=-1
    )
    needed = ["quantize.embedding.weight", "encoder.conv_out.weight"]
    needed += [f"encoder.down.{level}.block.0.conv2.weight" for level in range(levels)]
    missing = [name for name in needed if name not in state]
    if missing or not levels:
        raise ValueError(f"no first stage of CompVis' form: {missing or 'encoder.down.0'} is missing.")
    blocks = {m[1] for m in (re.match(r"encoder\.down\.0\.block\.(\d+)\.", name) for name in state) if m}
    widths = [state[f"encoder.down.{level}.block.0.conv2.weight"].shape[0] for level in range(levels)]
    codes, code_dim = state["quantize.embedding.weight"].shape
    config = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": widths,
        "layers_per_block": len(blocks),
        "latent_channels": state["encoder.conv_out.weight"].shape[0],
        "num_vq_embeddings": codes,
        "vq_embed_dim": code_dim,
        "scaling_factor": 1.0,
    }
    model = VQModel(**config)
    converted = convert_ldm_vae_checkpoint(state, config)
    converted["quantize.embedding.weight"] = state["quantize.embedding.weight"]
    unknown = sorted(name for name in state if not name.startswith(("encoder.", "decoder.", "quant", "post_quant")))
    try:
        model.load_state_dict(converted)
    except RuntimeError as error:
        raise ValueError(f"the first stage does not fit diffusers' VQModel: {error}") from error
    if unknown or len(state) != len(converted):
        raise ValueError(
            f"the first stage has tensors that a VQModel has not: {unknown or len(state) - len(converted)}."
        )
    return model.eval()


def load_original(file: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The state dict of a published file, memory-mapped: a safetensors file, or a PyTorch file of nothing but tensors,
    which may lie under `state_dict`.

    Raises:
        ValueError: the file holds other objects, which would have to be executed, or is damaged.
    """
    if Path(file).suffix == ".safetensors":
        return read_safetensors(file)
    content = read_torch(file)
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{file} holds no state dict: names with a tensor each.")
    return content


def convert_original(
    unet: str | os.PathLike,
    output: str | os.PathLike,
    vq_encoder: str | os.PathLike | None = None,
    vq_decoder: str | os.PathLike | None = None,
    vq_model: str | os.PathLike | None = None,
    model_config: Mapping[str, Any] | None = None,
    sample_size: int = PUBLISHED_SAMPLE_SIZE,
    identity_encoder: str | None = None,
) -> UIFacePipeline:
    """The published files -> a pipeline folder.

    Args:
        unet: the denoiser's file.
        output: the folder to write to.
        vq_encoder, vq_decoder: CompVis' first stage in two files (encoder and `quant_conv`; decoder, `quantize` and
            `post_quant_conv`), or the same file with all of it, twice.
        vq_model: instead of the two, folder or Hub repository of a diffusers `VQModel`. Without a first stage, the
            folder loads by `UIFacePipeline.from_pretrained(output, vae=...)`.
        model_config: the reference's options; by default, those of the published weights.
        sample_size (`int`, defaults to 32): height and width of the latents.
        identity_encoder: name of the recognizer whose embeddings the weights belong to.

    Raises:
        ValueError: a file does not fit.
    """
    if (vq_encoder is None) != (vq_decoder is None) or (vq_encoder and vq_model):
        raise ValueError("give encoder and decoder of the first stage, or a VQModel, or none of them.")
    if vq_model is not None:
        name = VQModel.load_config(vq_model).get("_class_name")
        if name != "VQModel":
            raise ValueError(f"{vq_model} (--vq-model) is of the class {name}, not a VQModel.")
    state = load_original(unet)
    components = convert_original_state_dict(state, PUBLISHED_MODEL_CONFIG if model_config is None else model_config)
    del state  # its memory goes to the first stage
    unet_model, identity_projector, empty_context = components
    unet_model.register_to_config(sample_size=sample_size)
    identity_projector.register_to_config(identity_encoder=identity_encoder)
    vae: VQModel | None = None
    if vq_model is not None:
        vae = VQModel.from_pretrained(vq_model)
        vae.register_to_config(scaling_factor=1.0)
    elif vq_encoder is not None and vq_decoder is not None:
        vae = convert_first_stage({**load_original(vq_encoder), **load_original(vq_decoder)})
    scheduler = DDIMScheduler(**NOISE_SCHEDULE, **SAMPLER)
    pipeline = UIFacePipeline(vae, unet_model, scheduler, identity_projector, empty_context)
    pipeline.save_pretrained(output)
    return pipeline
