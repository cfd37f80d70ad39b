"""Photographs -> aligned faces -> identity embeddings, with insightface's model packs."""

import hashlib
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F
from insightface.app import FaceAnalysis
from insightface.utils import face_align
from torch import nn

from .identities import IdentityBank

ALIGNED_SIZE = 112
SELECTIONS = ("largest", "central")


class UnusableFaceError(ValueError):
    """A photograph that can be read but gives no aligned face."""


class NoFaceError(UnusableFaceError):
    """A photograph in which the detector finds no face."""


class NoEmbeddingError(UnusableFaceError):
    """An aligned face whose features have no direction: not finite, or all zero.

    Args:
        position (`int`): of the first such face.
        encoder (`str`): the model pack.
    """

    def __init__(self, position: int, encoder: str):
        super().__init__(f"`{encoder}` gives no embedding of face {position}: zero or not finite")
        self.position = position


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


def load_photograph(path: str | os.PathLike) -> np.ndarray:
    """Reads a picture as `(height, width, 3)` RGB bytes, turned as its EXIF tag says; what is transparent is white, 16
    bits are scaled to 8.

    Raises:
        OSError: the file is missing, truncated or not a picture.
    """
    try:
        with PIL.Image.open(path) as image:
            return np.asarray(_to_rgb(PIL.ImageOps.exif_transpose(image)))
    except OSError:
        raise
    except Exception as error:  # damaged files raise nearly anything in Pillow's plug-ins
        raise OSError(f"{path} cannot be read: {error}") from error


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I"):  # Pillow would clip instead of scaling
        return PIL.Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def align_face(photograph: np.ndarray, landmarks: np.ndarray, size: int = ALIGNED_SIZE) -> np.ndarray:
    """Warps a face to the five-point template of ArcFace (Deng et al. 2019) by a similarity transform.

    Args:
        photograph (`np.ndarray` of shape `(height, width, 3)`): bytes.
        landmarks (`np.ndarray` of shape `(5, 2)`): in pixels.
        size (`int`, defaults to 112): height and width of the result. The field of view is that of the 112x112
            template at any size, as if that were resized.

    Returns:
        `np.ndarray` of shape `(size, size, 3)`: bytes; black outside the photograph.
    """
    with warnings.catch_warnings():
        # insightface calls an interface that scikit-image has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        matrix = face_align.estimate_norm(landmarks, ALIGNED_SIZE)
    scale = size / ALIGNED_SIZE
    # resizing keeps the corners of the pixels in place, not their centres
    resize = np.array([[scale, 0, (scale - 1) / 2], [0, scale, (scale - 1) / 2]])
    matrix = resize @ np.vstack([matrix, [0, 0, 1]])
    return cv2.warpAffine(photograph, matrix, (size, size), flags=cv2.INTER_LINEAR, borderValue=0)


def resize_aligned(face: np.ndarray, size: int = ALIGNED_SIZE) -> np.ndarray:
    """An aligned face at another size, bilinear.

    Args:
        face (`np.ndarray` of shape `(height, width, 3)`): RGB bytes.
        size (`int`, defaults to 112): height and width of the result.

    Raises:
        UnusableFaceError: it is not square, so not aligned.
    """
    height, width = face.shape[:2]
    if height != width:
        raise UnusableFaceError(f"not aligned: {width}x{height} is not square")
    if height == size:
        return face
    return np.asarray(PIL.Image.fromarray(face).resize((size, size), PIL.Image.Resampling.BILINEAR))


def has_direction(features: np.ndarray) -> np.ndarray:
    """Which rows of features `(N, D)` can be brought to unit length, `(N,)`: finite and not zero."""
    lengths = np.linalg.norm(features, axis=1)
    return np.isfinite(lengths) & (lengths > 0)


class FaceEncoder:
    """Detects, aligns and embeds faces with an insightface model pack.

    Args:
        name (`str`, defaults to `"buffalo_l"`): the model pack. It is also the name by which embeddings are marked
            (`IdentityBank.identity_encoder`).
        root (`str`, defaults to `"~/.insightface"`): the folder with `models/NAME`.
        providers (`list[str]`, *optional*): onnxruntime's execution providers; insightface's choice if not given.
        det_size (`int`, *optional*): side of the detector's input; insightface's choice if not given.
        det_thresh (`float`, defaults to 0.5): the detector's least confidence.

    Raises:
        ValueError: the pack has no detector with landmarks or no recognition model for 112x112 faces.
    """

    def __init__(
        self,
        name: str = "buffalo_l",
        root: str = "~/.insightface",
        providers: list[str] | None = None,
        det_size: int | None = None,
        det_thresh: float = 0.5,
    ):
        self.name, self.det_size, self.det_thresh = name, det_size, det_thresh
        try:
            analysis = FaceAnalysis(
                name=name, root=root, allowed_modules=["detection", "recognition"], providers=providers
            )
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"model pack `{name}` is not in {root}/models and cannot be downloaded: {error}"
            ) from error
        except AssertionError as error:
            raise ValueError(f"model pack `{name}` in {root} has no detection model.") from error
        if not getattr(analysis.det_model, "use_kps", True):
            raise ValueError(f"model pack `{name}` in {root} detects no landmarks: faces cannot be aligned.")
        if "recognition" not in analysis.models:
            raise ValueError(f"model pack `{name}` in {root} has no recognition model.")
        analysis.prepare(ctx_id=0, det_thresh=det_thresh, det_size=None if det_size is None else (det_size, det_size))
        self.detector, self.recognizer = analysis.det_model, analysis.models["recognition"]
        if tuple(self.recognizer.input_size) != (ALIGNED_SIZE, ALIGNED_SIZE):
            raise ValueError(f"model pack `{name}` embeds faces of {self.recognizer.input_size}, expected is 112x112.")

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of the recognition model's file: packs of one name can differ."""
        return hashlib.sha256(Path(self.recognizer.model_file).read_bytes()).hexdigest()[:12]

    def detect(self, photograph: np.ndarray) -> list[DetectedFace]:
        """All faces of a `(height, width, 3)` RGB photograph in bytes, most confident first."""
        try:
            boxes, landmarks = self.detector.detect(np.ascontiguousarray(photograph[:, :, ::-1]))
        except cv2.error as error:
            shape = f"{photograph.shape[1]}x{photograph.shape[0]}"
            raise UnusableFaceError(f"a picture of {shape} cannot be searched for faces") from error
        faces = [DetectedFace(box[:4], points, float(box[4])) for box, points in zip(boxes, landmarks, strict=True)]
        return sorted(faces, key=lambda face: -face.score)

    def select(
        self, faces: Sequence[DetectedFace], shape: tuple[int, ...], selection: str = "largest"
    ) -> DetectedFace:
        """The face that a photograph of one person is about: the largest, or the one nearest to the centre.

        Args:
            faces: of one photograph.
            shape: the photograph's, height and width first.
            selection: `"largest"` or `"central"`.

        Raises:
            NoFaceError: there is none.
        """
        if selection not in SELECTIONS:
            raise ValueError(f"`selection` has to be one of {SELECTIONS} but is {selection!r}.")
        if not faces:
            raise NoFaceError("no face")
        if selection == "largest":
            return max(faces, key=lambda face: float(np.prod(face.box[2:] - face.box[:2])))
        centre = np.array([shape[1], shape[0]]) / 2
        return min(faces, key=lambda face: float(np.linalg.norm((face.box[:2] + face.box[2:]) / 2 - centre)))

    def features(self, faces: Sequence[np.ndarray]) -> np.ndarray:
        """What the recognition model makes of aligned faces, before it is brought to unit length: verification adds
        the features of a face and of its mirror image.

        Args:
            faces: `(112, 112, 3)` RGB bytes each.

        Returns:
            `np.ndarray` of shape `(N, identity_dim)`, float32.

        Raises:
            ValueError: a face has another shape.
        """
        for face in faces:
            if face.shape != (ALIGNED_SIZE, ALIGNED_SIZE, 3):
                raise ValueError(f"aligned faces are 112x112x3, this one is {'x'.join(map(str, face.shape))}.")
        bgr = [np.ascontiguousarray(face[:, :, ::-1]) for face in faces]
        # some models are exported for a batch of one
        size = self.recognizer.input_shape[0]
        size = size if isinstance(size, int) and size > 0 else len(bgr)
        features = [self.recognizer.get_feat(bgr[start : start + size]) for start in range(0, len(bgr), size)]
        return np.concatenate(features)

    def embed_aligned(self, faces: Sequence[np.ndarray]) -> np.ndarray:
        """Embeds aligned faces: their `features`, of unit length.

        Raises:
            NoEmbeddingError: the model makes nothing of a face.
        """
        features = self.features(faces)
        usable = has_direction(features)
        if not usable.all():
            raise NoEmbeddingError(int(usable.argmin()), self.name)
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    def embed_pictures(self, pictures: Sequence[PIL.Image.Image], batch_size: int = 64) -> torch.Tensor:
        """Embeds pictures that are aligned faces already, as `UIFacePipeline` makes them: resized to 112x112
        (bilinear), not detected again.

        Returns:
            `torch.Tensor` of shape `(N, identity_dim)`, unit length.

        Raises:
            NoEmbeddingError: the model makes nothing of a picture.
        """
        size = (ALIGNED_SIZE, ALIGNED_SIZE)
        faces = [
            np.asarray(picture.convert("RGB").resize(size, PIL.Image.Resampling.BILINEAR)) for picture in pictures
        ]
        batches = []
        for start in range(0, len(faces), batch_size):
            try:
                batches.append(self.embed_aligned(faces[start : start + batch_size]))
            except NoEmbeddingError as error:
                raise NoEmbeddingError(start + error.position, self.name) from error
        return torch.from_numpy(np.concatenate(batches))

    def to_torch(self) -> "TorchRecognizer":
        """The recognition model as a differentiable torch module, for losses and gradients."""
        return TorchRecognizer(self.recognizer.model_file, self.recognizer.input_mean, self.recognizer.input_std)

    def embed(self, photographs: Sequence[np.ndarray | PIL.Image.Image], selection: str = "largest") -> IdentityBank:
        """Embeds the people in photographs, for `UIFacePipeline.__call__`.

        Args:
            photographs: RGB, `(height, width, 3)` bytes or `PIL.Image.Image`.
            selection: which face of a photograph, see `select`.

        Raises:
            NoFaceError: a photograph without a face; the message has its position.
            ValueError: no photographs.
        """
        if not len(photographs):
            raise ValueError("`photographs` is empty.")
        aligned = []
        for position, photograph in enumerate(photographs):
            photograph = np.asarray(
                photograph.convert("RGB") if isinstance(photograph, PIL.Image.Image) else photograph
            )
            try:
                face = self.select(self.detect(photograph), photograph.shape, selection)
            except NoFaceError as error:
                raise NoFaceError(f"no face found in photograph {position}") from error
            aligned.append(align_face(photograph, face.landmarks))
        return IdentityBank(torch.from_numpy(self.embed_aligned(aligned)), self.name)


class TorchRecognizer(nn.Module):
    """An ONNX recognition model in torch, differentiable in its pictures; its weights are constants.

    Args:
        model_file: the ONNX file.
        mean (`float`): subtracted from RGB bytes, as insightface reads it from the file.
        std (`float`): divides them.

    Raises:
        ValueError: the translation does not compute what onnxruntime computes.
    """

    def __init__(self, model_file: str | os.PathLike, mean: float = 127.5, std: float = 127.5):
        super().__init__()
        import onnx2torch  # of the extra `train`

        self.mean, self.std = mean, std
        model = onnx.load(model_file)
        # For a batch of one all shapes are known: onnxruntime folds what is computed of them, and models that were
        # exported for one face translate as well. `vmap` brings the batch back.
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 1
        with tempfile.TemporaryDirectory() as folder:
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
            options.optimized_model_filepath = str(Path(folder) / "folded.onnx")
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            folded = onnx.load(options.optimized_model_filepath)
        for node in folded.graph.node:
            while node.input and not node.input[-1]:  # optional inputs that are not given
                del node.input[-1]
        self.network = onnx2torch.convert(folded).eval().requires_grad_(False)
        for module in self.network.modules():
            if isinstance(module, nn.LayerNorm):  # onnx2torch reads the shape from a value info that may be missing
                module.normalized_shape = tuple(module.weight.shape)
            # shapes and axes are read in every call: on a GPU each would have to be waited for
            for name, constant in list(module.named_buffers(recurse=False)):
                if not constant.is_floating_point():
                    delattr(module, name)
                    setattr(module, name, constant)

        probe = torch.rand(1, 3, ALIGNED_SIZE, ALIGNED_SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
        expected = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: probe.numpy()})[0])
        deviation = (self.network(probe) - expected).abs().max().item()
        if not deviation < 1e-3 * max(1.0, expected.abs().max().item()):
            raise ValueError(f"{model_file} cannot be translated to torch: it deviates by {deviation} from ONNX.")

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        """Embeddings of aligned faces.

        Args:
            faces (`torch.Tensor` of shape `(N, 3, size, size)`): RGB in [-1, 1]; resized to 112x112 as training faces
                are (bilinear, with antialiasing).

        Returns:
            `torch.Tensor` of shape `(N, identity_dim)`: unit length.
        """
        size = (ALIGNED_SIZE, ALIGNED_SIZE)
        faces = F.interpolate(faces, size, mode="bilinear", antialias=True) if faces.shape[-2:] != size else faces
        pixels = ((faces + 1) * 127.5 - self.mean) / self.std
        return F.normalize(torch.vmap(self.network)(pixels[:, None])[:, 0])
