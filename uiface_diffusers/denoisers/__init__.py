"""How a denoiser is called, and what its attention makes of the contexts.

Another kind of denoiser is another file here with a subclass of `Denoiser`, and an entry in `KINDS`.
"""

from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from torch import nn

from ..attention_processor import cross_attention_names, two_stage_processors
from ..fingerprint import unwrapped
from ..models.unet_uiface import UIFaceUNet2DModel
from .denoiser import Denoiser
from .refused import REFUSED
from .transformer import PixArtDenoiser
from .unet import UNetDenoiser

__all__ = [
    "KINDS",
    "REFUSED",
    "SUPPORTED",
    "TRAINABLE",
    "Denoiser",
    "DenoiserModel",
    "PixArtDenoiser",
    "UNetDenoiser",
    "denoiser_kind",
]

# the models of all kinds: `from_pipe` hands on what a pipeline's signature names
DenoiserModel = UIFaceUNet2DModel | UNet2DConditionModel | PixArtTransformer2DModel
KINDS: tuple[type[Denoiser], ...] = (UNetDenoiser, PixArtDenoiser)
# those that can be trained from scratch, by their name in the recipe
TRAINABLE: dict[str, type[Denoiser]] = {kind.trained_as: kind for kind in KINDS if kind.trained_as is not None}
# by name; each is compared with materialized attention maps by the tests
SUPPORTED = tuple(model.__name__ for kind in KINDS for model in kind.models)


def denoiser_kind(model: nn.Module) -> type[Denoiser]:
    """The class of `KINDS` that calls a model.

    Raises:
        ValueError: it has no cross-attention, an attention that the method does not define, is called in another way,
            or is configured for something else.
    """
    inner = unwrapped(model)
    name = type(inner).__name__
    can = f"These can be sampled from: {', '.join(SUPPORTED)}."
    reason = f" {name} {REFUSED[name]}. {can}" if name in REFUSED else ""
    if not cross_attention_names(inner):
        raise ValueError(f"`unet` ({name}) has no cross-attention: it cannot follow a context.{reason}")
    two_stage_processors(inner)
    for kind in KINDS:
        if kind.accepts(inner):
            kind.check(inner)
            return kind
    raise ValueError(f"`unet` is {name}, which is called in another way.{reason or ' ' + can}")
