"""Short hashes that tell models from each other."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline


def unwrapped(component: Any) -> Any:
    """The model inside `torch.compile`'s and PyTorch's data-parallel wrappers; anything else as it is."""
    parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    while isinstance(component, torch.nn.Module):
        inner = component.module if isinstance(component, parallel) else getattr(component, "_orig_mod", None)
        if inner is None:
            break
        component = inner
    return component


def public_config(component: Any) -> dict[str, Any]:
    """A component's configuration without what is not about the model, such as the folder it was loaded from."""
    # of the embeddings that it takes; models of earlier versions lack it and stay what they are
    other = ("identity_encoder_fingerprint",)
    return {name: value for name, value in component.config.items() if not name.startswith("_") and name not in other}


def _state_dict(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """
    Raises:
        ValueError: the weights are elsewhere.
    """
    weights = module.state_dict()
    # a subclass may hold values all the same, such as the tests' tensors of a pretended device
    if any(type(tensor) is torch.Tensor and tensor.is_meta for tensor in weights.values()):
        raise ValueError(
            f"the weights of {type(module).__name__} are not at hand but on the meta device, as after"
            " `enable_sequential_cpu_offload()`: put the model on one device."
        )
    return weights


def model_fingerprint(component: Any) -> str:
    """Twelve hexadecimal digits of a component's class, configuration and weights, compiled or not.

    Raises:
        ValueError: the weights are on the meta device.
    """
    component = unwrapped(component)
    content = json.dumps([type(component).__name__, public_config(component)], sort_keys=True, default=str)
    digest = hashlib.sha256(content.encode())
    weights = _state_dict(component) if isinstance(component, torch.nn.Module) else {}
    # a part that was compiled alone
    weights = {name.replace("_orig_mod.", ""): tensor for name, tensor in weights.items()}
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:12]


def files_fingerprint(*files: str | os.PathLike) -> str:
    """Twelve hexadecimal digits of the contents of files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:12]


def weights_fingerprint(module: torch.nn.Module) -> str:
    """Twelve hexadecimal digits of the weights of a module that has no configuration."""
    digest = hashlib.sha256()
    for tensor in _state_dict(unwrapped(module)).values():
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:12]


def pipeline_fingerprint(pipeline: DiffusionPipeline) -> str:
    """Twelve hexadecimal digits of all components, the scheduler included. One that is `None` is as if it did not
    exist."""
    components = {name: each for name, each in pipeline.components.items() if each is not None}
    parts = {name: model_fingerprint(component) for name, component in components.items()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
