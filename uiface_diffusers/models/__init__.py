from .empty_context import EmptyContext, EmptyContextOutput
from .identity_projector import IdentityProjector, IdentityProjectorOutput
from .unet_uiface import UIFaceUNet2DModel

__all__ = ["EmptyContext", "EmptyContextOutput", "IdentityProjector", "IdentityProjectorOutput", "UIFaceUNet2DModel"]
