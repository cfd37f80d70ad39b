"""The encoder that a pipeline's folder can carry: a small copy of the one that the pipeline was trained with."""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ..encoders import IDENTITY_ENCODER, EncoderMark
from ..files import brief, local_path, read_json, read_safetensors
from ..fingerprint import files_fingerprint
from ..models.face_recognition import IResNetConfig, IResNetImageProcessor, IResNetModel
from .encoder import DetectedFace, FaceEncoder, PhotographEncoder, check_aligned

WEIGHTS = "model.safetensors"
NEEDS_DETECTOR = (
    "the encoder that a model carries only embeds aligned faces, it does not find them in photographs. Say that the"
    ' pictures are aligned faces (`aligned=True`, --aligned), or name a detector: `detector=FaceEncoder("buffalo_l")`,'
    " --detector buffalo_l. Any model pack has one; this one of insightface is downloaded when first used, for"
    " non-commercial research only."
)


class CarriedEncoder(PhotographEncoder):
    """A small network that was trained to give the embeddings of another encoder, its teacher
    (`training/distill_encoder.py`). Its embeddings are near the teacher's, not the same. So they are marked with a
    name and weights of its own, and no model takes them for the teacher's but the pipeline whose folder carries it.

    Args:
        folder: `identity_encoder` in a pipeline's folder: an `IResNetModel` whose configuration has `approximates`.
        detector (`FaceEncoder`, *optional*): finds the faces in photographs; its recognizer is not used. Without one,
            faces have to be aligned.
        device (`torch.device` or `str`, defaults to the CPU): of the network.

    Raises:
        ValueError: the folder holds no such encoder, or a file of it is damaged.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        detector: FaceEncoder | None = None,
        device: torch.device | str | None = None,
    ):
        self.folder, self.detector = local_path(folder), detector
        self.approximates, self.name = teacher_mark(self.folder), carried_name(self.folder)
        if detector is not None:
            self.det_size, self.det_thresh = detector.det_size, detector.det_thresh
        weights = read_safetensors(self.folder / WEIGHTS)
        try:
            model = IResNetModel(IResNetConfig.from_pretrained(self.folder))
            model.load_state_dict(weights)  # into float32
        except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.folder} is damaged: its weights do not fit its config ({brief(error)})."
            ) from error
        self.model = model.eval().requires_grad_(False).to(device or "cpu")
        self.processor = IResNetImageProcessor(dict.fromkeys(("height", "width"), model.config.image_size))

    @cached_property
    def fingerprint(self) -> str:
        return files_fingerprint(self.folder / WEIGHTS)

    @property
    def detector_fingerprint(self) -> str:
        return self.check_detector().detector_fingerprint

    @property
    def runs_on_cpu(self) -> bool:
        return self.model.device.type == "cpu"

    def check_detector(self) -> FaceEncoder:
        """The detector.

        Raises:
            ValueError: there is none; the message says which to take.
        """
        if self.detector is None:
            raise ValueError(NEEDS_DETECTOR)
        return self.detector

    def detect(self, photograph: np.ndarray) -> list[DetectedFace]:
        return self.check_detector().detect(photograph)

    @torch.no_grad()
    def __call__(self, faces: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        check_aligned(faces)
        pixels = self.processor(list(faces), return_tensors="pt")["pixel_values"].to(self.model.device)
        return self.model(pixels).embeddings.float().cpu().numpy()


def carried_encoder(model: str | os.PathLike | None) -> Path | None:
    """The folder of the encoder that a pipeline's folder carries; `None` if it carries none."""
    folder = None if model is None else local_path(model) / IDENTITY_ENCODER
    return folder if folder is not None and (folder / "config.json").is_file() else None


def teacher_mark(folder: Path) -> EncoderMark:
    """Which encoder a carried one was trained to reproduce.

    Raises:
        ValueError: the folder holds no carried encoder.
    """
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    teacher = config.get("approximates") if isinstance(config, dict) else None
    if not isinstance(teacher, dict) or not isinstance(teacher.get("name"), str):
        raise ValueError(
            f"{folder} holds no encoder that a model can carry: its config.json has no `approximates` with the `name`"
            " of the encoder that it reproduces. training/distill_encoder.py makes one."
        )
    return EncoderMark(teacher["name"], teacher.get("fingerprint"))


def carried_name(folder: Path) -> str:
    """By which the embeddings of a carried encoder are marked."""
    return f"{teacher_mark(folder).name}-distilled"


def is_by_carried(mark: EncoderMark, folder: Path) -> bool:
    """Whether embeddings of this mark are by the encoder of a folder: of its name and its very weights."""
    return mark.name == carried_name(folder) and mark.fingerprint == files_fingerprint(folder / WEIGHTS)
