# diffusers loads a component of a package by the base classes that the package shows
from diffusers import ModelMixin

from .empty_context import EmptyContext, EmptyContextOutput
from .identity_projector import IdentityProjector, IdentityProjectorOutput
from .unet_uiface import UIFaceUNet2DModel

__all__ = [
    "EmptyContext",
    "EmptyContextOutput",
    "IdentityProjector",
    "IdentityProjectorOutput",
    "ModelMixin",
    "UIFaceUNet2DModel",
]
