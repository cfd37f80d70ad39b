# diffusers loads a component of a package by the base classes that the package shows
from diffusers import ModelMixin

from .condition_projector import ConditionProjector, ConditionProjectorOutput
from .empty_context import EmptyContext, EmptyContextOutput
from .face_recognition import IResNetConfig, IResNetImageProcessor, IResNetModel, IResNetModelOutput
from .identity_flow import IdentityFlow, IdentityFlowOutput
from .identity_projector import IdentityProjector, IdentityProjectorOutput
from .pose_projector import PoseProjector
from .unet_uiface import UIFaceUNet2DModel

# what a pipeline can be conditioned on beside the identity, by the names of its optional components
CONDITIONS: dict[str, type[ConditionProjector]] = {
    f"{projector.condition}_projector": projector for projector in (PoseProjector,)
}

__all__ = [
    "CONDITIONS",
    "ConditionProjector",
    "ConditionProjectorOutput",
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
    "PoseProjector",
    "UIFaceUNet2DModel",
]
