"""Photographs -> aligned faces -> identity embeddings."""

from ..pictures import load_photograph
from .carried import CarriedEncoder, carried_encoder, is_by_carried, teacher_mark
from .encoder import SELECTIONS, DetectedFace, FaceEncoder, NoFaceError, PhotographEncoder
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
    "CarriedEncoder",
    "DetectedFace",
    "FaceEncoder",
    "NoEmbeddingError",
    "NoFaceError",
    "PackReport",
    "PhotographEncoder",
    "Recognizer",
    "TorchRecognizer",
    "UnusableFaceError",
    "align_face",
    "alignment_matrix",
    "carried_encoder",
    "execution_providers",
    "has_direction",
    "head_pose",
    "is_by_carried",
    "load_photograph",
    "make_pack",
    "out_of_frame",
    "resize_aligned",
    "teacher_mark",
    "template_landmarks",
    "unit_embeddings",
]
