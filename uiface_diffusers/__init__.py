"""UIFace in diffusers: synthetic face recognition data by two-stage, identity-conditioned latent diffusion.

Everything that a saved pipeline may name is imported here: diffusers resolves the components of a `model_index.json`
only in modules that are already imported. The face recognizer registers with transformers' `AutoModel` on import.
"""

from .checkpoints import default_checkpoint
from .convert_original import convert_original_state_dict
from .generation import generate_dataset, make_identities
from .identities import IdentityBank, sample_identities
from .models import (
    EmptyContext,
    IdentityFlow,
    IdentityProjector,
    IResNetConfig,
    IResNetImageProcessor,
    IResNetModel,
    PoseProjector,
    UIFaceUNet2DModel,
)
from .pipeline_uiface import UIFacePipeline, UIFacePipelineOutput

__version__ = "0.2.0"

__all__ = [
    "EmptyContext",
    "IResNetConfig",
    "IResNetImageProcessor",
    "IResNetModel",
    "IdentityBank",
    "IdentityFlow",
    "IdentityProjector",
    "PoseProjector",
    "UIFacePipeline",
    "UIFacePipelineOutput",
    "UIFaceUNet2DModel",
    "convert_original_state_dict",
    "default_checkpoint",
    "generate_dataset",
    "make_identities",
    "sample_identities",
]
