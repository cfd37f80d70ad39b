"""Photographs -> aligned faces -> identity embeddings, with insightface's model packs."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
import PIL.Image
import torch

from ..encoders import EncoderMark
from ..identities import IdentityBank
from ..pictures import Picture, as_pictures, rgb_bytes
from .geometry import ALIGNED_SIZE, UnusableFaceError, align_face, resize_aligned
from .packs import PROVIDER, execution_providers, file_fingerprint, load_pack, pack_folder
from .recognizer import unit_embeddings
from .torch_recognizer import TorchRecognizer

BILINEAR = PIL.Image.Resampling.BILINEAR
SELECTIONS = ("largest", "central")
# the detector halves its input five times
DETECTOR_STRIDE = 32


class NoFaceError(UnusableFaceError):
    """A photograph in which the detector finds no face."""


@dataclass
class DetectedFace:
    """
    Args:
        box (`np.ndarray` of shape `(4,)`): left, top, right, bottom in pixels.
        landmarks (`np.ndarray` of shape `(5, 2)`): eyes, nose, corners of the mouth, in pixels.
        score (`float`): the detector's confidence in [0, 1].
    """

    box: np.ndarray
    landmarks: np.ndarray
    score: float


class PhotographEncoder:
    """What embeds the faces of photographs: a `Recognizer` of aligned 112x112 faces, and `detect`, which finds them.
    `FaceEncoder` and `CarriedEncoder` are two."""

    name: str
    # of the detector; `None` where it is not known or there is none
    det_size: int | None = None
    det_thresh: float | None = None

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of the recognition model's weights."""
        raise NotImplementedError

    @property
    def detector_fingerprint(self) -> str:
        """Twelve hexadecimal digits of the detector's weights."""
        raise NotImplementedError

    @property
    def runs_on_cpu(self) -> bool:
        raise NotImplementedError

    @property
    def image_size(self) -> int:
        return ALIGNED_SIZE

    @property
    def encoder_mark(self) -> EncoderMark:
        """By which embeddings of this encoder are told from others'."""
        return EncoderMark(self.name, self.fingerprint)

    def detect(self, photograph: np.ndarray) -> list[DetectedFace]:
        """All faces of a `(height, width, 3)` RGB photograph in bytes, most confident first."""
        raise NotImplementedError

    def __call__(self, faces: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        """The features of a `Recognizer`: `(N, identity_dim)` float32 of `(112, 112, 3)` RGB bytes each."""
        raise NotImplementedError

    def select(
        self, faces: Sequence[DetectedFace], shape: tuple[int, ...], selection: str = "largest"
    ) -> DetectedFace:
        """The face that a photograph of one person is about: the largest, or the one nearest to the center.

        Args:
            faces: of one photograph.
            shape: the photograph's, height and width first.
            selection: `"largest"` or `"central"`.

        Raises:
            NoFaceError: there is none.
            ValueError: there is no such selection.
        """
        if selection not in SELECTIONS:
            raise ValueError(f"`selection` has to be one of {SELECTIONS} but is {selection!r}.")
        if not faces:
            raise NoFaceError("no face")
        if selection == "largest":
            return max(faces, key=lambda face: float(np.prod(face.box[2:] - face.box[:2])))
        center = np.array([shape[1], shape[0]]) / 2
        return min(faces, key=lambda face: float(np.linalg.norm((face.box[:2] + face.box[2:]) / 2 - center)))

    def embed_aligned(self, faces: Sequence[np.ndarray], batch_size: int = 64) -> np.ndarray:
        """The `unit_embeddings` of aligned faces."""
        return unit_embeddings(self, faces, batch_size)

    def embed_pictures(self, pictures: Sequence[PIL.Image.Image], batch_size: int = 64) -> torch.Tensor:
        """Embeds pictures that are aligned faces already, as `UIFacePipeline` makes them: resized to 112x112
        (bilinear), not detected again.

        Args:
            pictures: of any mode, see `rgb_bytes`.

        Returns:
            `torch.Tensor` of shape `(N, identity_dim)`, unit length.

        Raises:
            NoEmbeddingError: the model makes nothing of a picture.
        """
        size = (ALIGNED_SIZE, ALIGNED_SIZE)
        resized = [PIL.Image.fromarray(rgb_bytes(each)).resize(size, BILINEAR) for each in pictures]
        return torch.from_numpy(self.embed_aligned([np.asarray(each) for each in resized], batch_size))

    def embed(
        self, photographs: Picture | Sequence[Picture], selection: str = "largest", aligned: bool = False
    ) -> IdentityBank:
        """Embeds the people in photographs, for `UIFacePipeline.__call__`.

        Args:
            photographs: one or several of what `rgb_bytes` takes: files, `PIL.Image.Image` of any mode, or arrays.
            selection: which face of a photograph, see `select`.
            aligned (`bool`, defaults to `False`): they are aligned faces already, square ones.

        Raises:
            NoEmbeddingError: the model makes nothing of a face.
            NoFaceError: a photograph without a face; the message has its position.
            OSError: a file cannot be read.
            ValueError: no photographs, or an array that is no picture, or no square one where they are aligned.
        """
        given = as_pictures(photographs)
        if not given:
            raise ValueError("`photographs` is empty.")
        faces = []
        for position, photograph in enumerate(given):
            try:
                pixels = rgb_bytes(photograph)
            except ValueError as error:
                raise ValueError(f"photograph {position}: {error}") from error
            try:
                faces.append(resize_aligned(pixels) if aligned else self._align(pixels, selection))
            except NoFaceError as error:
                raise NoFaceError(f"no face found in photograph {position}") from error
            except UnusableFaceError as error:
                raise UnusableFaceError(f"photograph {position}: {error}") from error
        embeddings = torch.from_numpy(self.embed_aligned(faces))
        return IdentityBank(embeddings, self.name, identity_encoder_fingerprint=self.fingerprint)

    def _align(self, photograph: np.ndarray, selection: str) -> np.ndarray:
        face = self.select(self.detect(photograph), photograph.shape, selection)
        return align_face(photograph, face.landmarks)


def check_aligned(faces: np.ndarray | Sequence[np.ndarray]) -> None:
    """
    Raises:
        ValueError: a face is not of `(112, 112, 3)` bytes.
    """
    for face in faces:
        if face.dtype != np.uint8:
            raise ValueError(f"aligned faces are of uint8 in 0..255, this one is {face.dtype}.")
        if face.shape != (ALIGNED_SIZE, ALIGNED_SIZE, 3):
            raise ValueError(f"aligned faces are 112x112x3, this one is {'x'.join(map(str, face.shape))}.")


class FaceEncoder(PhotographEncoder):
    """Detects, aligns and embeds faces with an insightface model pack.

    Args:
        name (`str`, defaults to `"buffalo_l"`): the model pack. It is also the name by which embeddings are marked
            (`IdentityBank.identity_encoder`).
        root (`str`, defaults to `"~/.insightface"`): the folder with `models/NAME`.
        providers (`list[str]`, *optional*): onnxruntime's execution providers, see `execution_providers`;
            insightface's choice if not given.
        det_size (`int`, *optional*): side of the detector's input, a multiple of 32; insightface's choice if not
            given.
        det_thresh (`float`, defaults to 0.5): the detector's least confidence.
        threads (`int`, *optional*): of one call of a model; onnxruntime's choice if not given. An encoder can be
            called in several threads: with one thread per call they do not wait for each other.
        device (`torch.device` or `str`, *optional*): torch's device, by which onnxruntime's is chosen, see
            `execution_providers`; by default, each process of a launcher takes a GPU of its own.

    Raises:
        ValueError: the pack has no detector with landmarks or no recognition model for 112x112 faces, a file of these
            is damaged, or a provider is not available.
    """

    def __init__(
        self,
        name: str = "buffalo_l",
        root: str | os.PathLike = "~/.insightface",
        providers: list[str] | None = None,
        det_size: int | None = None,
        det_thresh: float = 0.5,
        threads: int | None = None,
        device: torch.device | str | None = None,
    ):
        self.name, self.det_size, self.det_thresh = name, det_size, det_thresh
        if det_size is not None and (det_size <= 0 or det_size % DETECTOR_STRIDE):
            raise ValueError(
                f"`det_size` has to be a multiple of {DETECTOR_STRIDE}, such as 320 or 640, but is {det_size}."
            )
        chosen = execution_providers(providers, local_rank=int(os.environ.get("LOCAL_RANK", 0)), device=device)
        models = load_pack(pack_folder(name, root), chosen, threads)
        self.detector, self.recognizer = models["detection"], models["recognition"]
        if not getattr(self.detector, "use_kps", True):
            raise ValueError(f"model pack `{name}` in {root} detects no landmarks: faces cannot be aligned.")
        if tuple(self.recognizer.input_size) != (ALIGNED_SIZE, ALIGNED_SIZE):
            raise ValueError(f"model pack `{name}` embeds faces of {self.recognizer.input_size}, expected is 112x112.")
        if chosen and providers is not None:  # a library that is missing makes onnxruntime go on with the CPU
            first = chosen[0] if isinstance(chosen[0], str) else chosen[0][0]
            used = self.recognizer.session.get_providers()
            if first not in used:
                raise ValueError(f"{first} (--providers) cannot be used: onnxruntime took {', '.join(used)} instead.")
        size = {} if det_size is None else {"input_size": (det_size, det_size)}
        self.detector.prepare(0, det_thresh=det_thresh, **size)
        self.recognizer.prepare(0)

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of the recognition model's weights: packs of one name can differ."""
        return file_fingerprint(self.recognizer.model_file)

    @cached_property
    def detector_fingerprint(self) -> str:
        """Twelve hexadecimal digits of the detector's weights."""
        return file_fingerprint(self.detector.model_file)

    @property
    def runs_on_cpu(self) -> bool:
        return self.recognizer.session.get_providers()[0] == f"CPU{PROVIDER}"

    def detect(self, photograph: np.ndarray) -> list[DetectedFace]:
        """All faces of a `(height, width, 3)` RGB photograph in bytes, most confident first."""
        photograph = rgb_bytes(photograph)
        try:
            boxes, landmarks = self.detector.detect(np.ascontiguousarray(photograph[:, :, ::-1]))
        except cv2.error as error:
            shape = f"{photograph.shape[1]}x{photograph.shape[0]}"
            raise UnusableFaceError(f"a picture of {shape} cannot be searched for faces") from error
        faces = [DetectedFace(box[:4], points, float(box[4])) for box, points in zip(boxes, landmarks, strict=True)]
        return sorted(faces, key=lambda face: -face.score)

    def __call__(self, faces: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        """The features of a `Recognizer`: what the recognition model makes of aligned faces.

        Args:
            faces: `(112, 112, 3)` RGB bytes each.

        Returns:
            `np.ndarray` of shape `(N, identity_dim)`: float32, of any length.

        Raises:
            ValueError: a face has another shape, or is not of bytes.
        """
        check_aligned(faces)
        bgr = [np.ascontiguousarray(face[:, :, ::-1]) for face in faces]
        # some models are exported for a batch of one
        size = self.recognizer.input_shape[0]
        size = size if isinstance(size, int) and size > 0 else len(bgr)
        features = [self.recognizer.get_feat(bgr[start : start + size]) for start in range(0, len(bgr), size)]
        return np.concatenate(features)

    def to_torch(self) -> TorchRecognizer:
        """The recognition model as a differentiable torch module, for losses and gradients."""
        return TorchRecognizer(self.recognizer.model_file, self.recognizer.input_mean, self.recognizer.input_std)
