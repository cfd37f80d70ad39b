# diffusers loads a component of a package by the base classes that the package shows
from diffusers import ModelMixin

from .empty_context import EmptyContext, EmptyContextOutput
from .face_recognition import IResNetConfig, IResNetImageProcessor, IResNetModel, IResNetModelOutput
from .identity_flow import IdentityFlow, IdentityFlowOutput
from .identity_projector import IdentityProjector, IdentityProjectorOutput
from .unet_uiface import UIFaceUNet2DModel

__all__ = [
    "EmptyContext",
    "EmptyContextOutput",
    "IResNetConfig",
    "IResNetImageProcessor",
    "IResNetModel",
    "IResNetModelOutput",
    "IdentityFlow",
    "IdentityFlowOutput",
    "IdentityProjector",
    "IdentityProjectorOutput",
    "ModelMixin",
    "UIFaceUNet2DModel",
]
