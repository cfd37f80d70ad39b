"""Photographs -> aligned faces -> identity embeddings."""

from ..pictures import load_photograph
from .encoder import SELECTIONS, DetectedFace, FaceEncoder, NoFaceError
from .geometry import (
    ALIGNED_SIZE,
    FRONTAL_NOSE,
    SIDE_VIEW,
    UnusableFaceError,
    align_face,
    alignment_matrix,
    head_pose,
    out_of_frame,
    resize_aligned,
    template_landmarks,
)
from .make_pack import PackReport, make_pack
from .packs import execution_providers
from .recognizer import NoEmbeddingError, Recognizer, has_direction, unit_embeddings
from .torch_recognizer import TorchRecognizer

__all__ = [
    "ALIGNED_SIZE",
    "FRONTAL_NOSE",
    "SELECTIONS",
    "SIDE_VIEW",
    "DetectedFace",
    "FaceEncoder",
    "NoEmbeddingError",
    "NoFaceError",
    "PackReport",
    "Recognizer",
    "TorchRecognizer",
    "UnusableFaceError",
    "align_face",
    "alignment_matrix",
    "execution_providers",
    "has_direction",
    "head_pose",
    "load_photograph",
    "make_pack",
    "out_of_frame",
    "resize_aligned",
    "template_landmarks",
    "unit_embeddings",
]
