"""Photographs -> aligned faces -> identity embeddings, with insightface's model packs."""

import hashlib
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock

import cv2
import numpy as np
import onnx
import onnxruntime
import PIL.Image
import torch
import torch.nn.functional as F
from insightface.app import FaceAnalysis
from insightface.model_zoo import get_model
from insightface.utils import ensure_available, face_align
from torch import nn

from .encoders import EncoderMark
from .files import local_path, warn_once, why_unreadable
from .identities import IdentityBank
from .pictures import is_picture, rgb_bytes
from .static_shapes import with_static_shapes

ALIGNED_SIZE = 112
SELECTIONS = ("largest", "central")
# the detector halves its input five times
DETECTOR_STRIDE = 32
# |yaw| of a face that looks sideways
SIDE_VIEW = 0.25
# where the nose of a frontal face is, from the eyes (0) to the mouth (1): the mean of 514 faces with |yaw| < 0.1 of
# CelebA, All-Age-Faces, SCUT-FBP5500, FFHQ and LFW, by SCRFD; the template has 0.495
FRONTAL_NOSE = 0.58
PROVIDER = "ExecutionProvider"
# execution providers that take a `device_id`
GPU_PROVIDERS = tuple(f"{name}{PROVIDER}" for name in ("CUDA", "Tensorrt", "ROCM", "MIGraphX"))


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
    """Reads a picture's file as `rgb_bytes` does: `(height, width, 3)` RGB bytes.

    Raises:
        OSError: the file is missing, truncated or not a picture.
    """
    try:
        with PIL.Image.open(path) as image:
            return rgb_bytes(image)
    except OSError:
        raise
    except Exception as error:  # damaged files raise nearly anything in Pillow's plug-ins
        raise OSError(f"{path} cannot be read: {error}") from error


# filters of warnings belong to the process: one thread at a time changes them
_warning_filters = Lock()


def alignment_matrix(landmarks: np.ndarray) -> np.ndarray:
    """The similarity transform of a photograph's pixels to the five-point 112x112 template of ArcFace (Deng et al.
    2019), `(2, 3)`.

    Args:
        landmarks (`np.ndarray` of shape `(5, 2)`): in the photograph's pixels.
    """
    with _warning_filters, warnings.catch_warnings():
        # insightface calls an interface that scikit-image has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        return face_align.estimate_norm(landmarks, ALIGNED_SIZE)


def align_face(photograph: np.ndarray, landmarks: np.ndarray, size: int = ALIGNED_SIZE) -> np.ndarray:
    """Warps a face to the template by its `alignment_matrix`.

    Args:
        photograph (`np.ndarray` of shape `(height, width, 3)`): bytes.
        landmarks (`np.ndarray` of shape `(5, 2)`): in pixels.
        size (`int`, defaults to 112): height and width of the result. The field of view is that of the 112x112
            template at any size, as if that were resized.

    Returns:
        `np.ndarray` of shape `(size, size, 3)`: bytes; black outside the photograph.
    """
    matrix = alignment_matrix(landmarks)
    scale = size / ALIGNED_SIZE
    # resizing keeps the corners of the pixels in place, not their centers
    resize = np.array([[scale, 0, (scale - 1) / 2], [0, scale, (scale - 1) / 2]])
    matrix = resize @ np.vstack([matrix, [0, 0, 1]])
    return cv2.warpAffine(photograph, matrix, (size, size), flags=cv2.INTER_LINEAR, borderValue=0)


def template_landmarks(landmarks: np.ndarray) -> np.ndarray:
    """The landmarks of a photograph's face in its aligned 112x112 picture, `(5, 2)`."""
    matrix = alignment_matrix(landmarks)
    return landmarks @ matrix[:, :2].T + matrix[:, 2]


def out_of_frame(landmarks: np.ndarray, shape: tuple[int, ...]) -> float:
    """The share of the 112x112 template's pixels, in [0, 1], that lies outside a photograph and is black in the
    aligned face.

    Args:
        landmarks (`np.ndarray` of shape `(5, 2)`): in the photograph's pixels.
        shape: the photograph's, height and width first.
    """
    inverse = cv2.invertAffineTransform(alignment_matrix(landmarks))
    rows, columns = np.indices((ALIGNED_SIZE, ALIGNED_SIZE)).reshape(2, -1)
    places = inverse @ np.stack([columns, rows, np.ones_like(rows)])
    # pixel centers are whole numbers: a photograph reaches half a pixel further
    end = np.array([[shape[1]], [shape[0]]]) - 0.5
    return 1 - float(((places >= -0.5) & (places <= end)).all(axis=0).mean())


def head_pose(landmarks: np.ndarray) -> tuple[float, float]:
    """Yaw and pitch of a head, from its landmarks in the photograph or in the template.

    `yaw` is how far the nose is from the middle of eyes and mouth along the line of the eyes, in distances of the
    eyes. `pitch` is how far it is from its place in a frontal face along the line from the eyes to the mouth, in the
    length of that line. With the midpoints `eyes` and `mouth`, and `middle` half way between the two:

        yaw = (nose - middle) . (right - left) / |right - left|^2
        pitch = (nose - eyes) . (mouth - eyes) / |mouth - eyes|^2 - FRONTAL_NOSE

    where `left` and `right` are the eyes as they are in the picture. Both are 0 for a mean frontal face. Positive yaw
    looks to the right of the picture, positive pitch looks down; a mirrored face has the negative yaw. Roll,
    position and size of the face change neither, as both are measured on the face's own lines.

    They are tangents. The tip of the nose stands out of the plane of eyes and mouth by a length d. A head that turns
    by an angle a moves it by d sin(a) in the picture (in parallel projection), while the distances along the turn
    shrink by cos(a): yaw = d / |right - left| tan(a), with the distance of the unturned face; likewise pitch. Above
    `SIDE_VIEW` a face looks sideways. Near a profile the eyes come together, and yaw grows without bound, with the
    errors of the landmarks: its arctangent is bounded.

    Args:
        landmarks (`np.ndarray` of shape `(5, 2)`): eyes, nose, corners of the mouth; left in the picture first.

    Returns:
        NaN where the eyes, or eyes and mouth, are at one point.
    """
    left, right, nose, *corners = np.asarray(landmarks, np.float64)
    eyes, mouth = (left + right) / 2, (corners[0] + corners[1]) / 2
    across, down = right - left, mouth - eyes
    if not across.any() or not down.any():
        return float("nan"), float("nan")
    yaw = (nose - (eyes + mouth) / 2) @ across / (across @ across)
    pitch = (nose - eyes) @ down / (down @ down) - FRONTAL_NOSE
    return float(yaw), float(pitch)


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


def execution_providers(
    providers: Sequence[str] | None,
    available: Sequence[str] | None = None,
    local_rank: int = 0,
    device: torch.device | str | None = None,
) -> list | None:
    """onnxruntime's execution providers by their names.

    Args:
        providers: onnxruntime's names (`"CUDAExecutionProvider"`) or short ones (`"cuda"`, `"cpu"`, `"tensorrt"`,
            `"coreml"`), in any case.
        available: what onnxruntime can run here; asked of it if not given.
        local_rank (`int`, defaults to 0): this process of a machine. Each process takes a GPU of its own.
        device (`torch.device` or `str`, *optional*): torch's device. The number of a GPU (`cuda:1`) goes before the
            rank; on `cpu`, no GPU is taken unless `providers` name one.

    Returns:
        Names, those of a GPU with its number; `None` for insightface's choice.

    Raises:
        ValueError: a provider is not available.
    """
    available = onnxruntime.get_available_providers() if available is None else available
    devices, device = torch.cuda.device_count(), None if device is None else torch.device(device)
    # a launcher may show every process all GPUs, or its own only
    number = local_rank % devices if devices else local_rank
    if device is not None and device.type == "cuda" and device.index is not None:
        number = device.index
    is_first = not local_rank and not number
    if providers is None:
        cuda, cpu = f"CUDA{PROVIDER}", f"CPU{PROVIDER}"
        if device is not None and device.type == "cpu":
            return [cpu]
        if is_first or cuda not in available:
            return None
        providers = [cuda, cpu]
    by_short_name = {name.lower().removesuffix(PROVIDER.lower()): name for name in available}
    chosen = []
    for provider in providers:
        name = by_short_name.get(provider.lower().removesuffix(PROVIDER.lower()))
        if name is None:
            raise ValueError(
                f"the execution provider `{provider}` (--providers) is not available: onnxruntime has"
                f" {', '.join(by_short_name)} here. CUDA and TensorRT come with the package onnxruntime-gpu."
            )
        chosen.append((name, {"device_id": str(number)}) if name in GPU_PROVIDERS and not is_first else name)
    return chosen


def _pack_folder(name: str, root: str | os.PathLike) -> Path:
    """The folder of a model pack, downloaded if it is not there."""
    root = local_path(root)
    if Path(name).name != name:  # embeddings are marked with it
        raise ValueError(
            f"`{name}` is no name of a model pack but a path: give the folder that holds models/PACK as `root`"
            " (--encoder-root)."
        )
    folder = root / "models" / name
    if not folder.exists():
        try:
            ensure_available("models", name, root=str(root))
        except Exception as error:  # connections and archives fail in many ways
            raise ValueError(
                f"model pack `{name}` is not in {root / 'models'} and cannot be downloaded: {error}"
            ) from error
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, not the folder of a model pack: unzip it.")
    return folder


def _load_pack(folder: Path, providers: list | None, threads: int | None = None) -> dict:
    """The first detection model and the first recognition model of a folder, by their tasks. Other files need not be
    sound.

    Raises:
        ValueError: one of the two is not there, or cannot be read.
    """
    pack, wanted, models, unread = f"`{folder.name}` in {folder.parent}", ("detection", "recognition"), {}, []
    onnxruntime.set_default_logger_severity(3)
    options = {"providers": providers}
    if threads is not None:
        options["sess_options"] = onnxruntime.SessionOptions()
        options["sess_options"].intra_op_num_threads = threads
    if (folder / "manifest.json").is_file():  # insightface reads by it what the files are for
        try:
            models = FaceAnalysis(name=str(folder), allowed_modules=list(wanted), **options).models
        except Exception as error:
            raise ValueError(f"model pack {pack} cannot be loaded: {error}") from error
    else:
        files = sorted(file for file in folder.iterdir() if file.suffix == ".onnx" and file.name[0] != ".")
        deeper = sorted(folder.glob("*/*.onnx"))
        if not files and deeper:
            inner = deeper[0].parent
            raise ValueError(
                f"model pack {pack} was unzipped one folder too deep: its files are in {inner}. Move them up:"
                f" mv {inner}/* {folder}"
            )
        for file in files:
            if all(task in models for task in wanted):
                break
            try:
                model = get_model(str(file), **options)
            except Exception as error:  # onnxruntime's errors have no common class
                unread.append(why_unreadable(file, error))
            else:
                if model is not None and model.taskname in wanted:
                    models.setdefault(model.taskname, model)
    for task in wanted:
        if task not in models:
            raise ValueError("; ".join([f"model pack {pack} has no {task} model", *unread]) + ".")
    for reason in unread:
        warn_once(f"model pack {pack} is used without a file: {reason}.")
    return models


def _file_fingerprint(file: str | os.PathLike) -> str:
    """Twelve hexadecimal digits of an ONNX model: of its file and, if they are elsewhere, of its weights' files."""
    digest = hashlib.sha256(Path(file).read_bytes())
    model = onnx.load(file, load_external_data=False)
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
    for name in sorted({entry.value for entry in entries if entry.key == "location"}):
        digest.update((Path(file).parent / name).read_bytes())
    return digest.hexdigest()[:12]


class FaceEncoder:
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
        models = _load_pack(_pack_folder(name, root), chosen, threads)
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
        return _file_fingerprint(self.recognizer.model_file)

    @cached_property
    def detector_fingerprint(self) -> str:
        """Twelve hexadecimal digits of the detector's weights."""
        return _file_fingerprint(self.detector.model_file)

    @property
    def runs_on_cpu(self) -> bool:
        return self.recognizer.session.get_providers()[0] == f"CPU{PROVIDER}"

    @property
    def encoder_mark(self) -> EncoderMark:
        """By which embeddings of this encoder are told from others'."""
        return EncoderMark(self.name, self.fingerprint)

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
        """
        if selection not in SELECTIONS:
            raise ValueError(f"`selection` has to be one of {SELECTIONS} but is {selection!r}.")
        if not faces:
            raise NoFaceError("no face")
        if selection == "largest":
            return max(faces, key=lambda face: float(np.prod(face.box[2:] - face.box[:2])))
        center = np.array([shape[1], shape[0]]) / 2
        return min(faces, key=lambda face: float(np.linalg.norm((face.box[:2] + face.box[2:]) / 2 - center)))

    def features(self, faces: Sequence[np.ndarray]) -> np.ndarray:
        """What the recognition model makes of aligned faces, before it is brought to unit length: verification adds
        the features of a face and of its mirror image.

        Args:
            faces: `(112, 112, 3)` RGB bytes each.

        Returns:
            `np.ndarray` of shape `(N, identity_dim)`, float32.

        Raises:
            ValueError: a face has another shape, or is not of bytes.
        """
        for face in faces:
            if face.dtype != np.uint8:
                raise ValueError(f"aligned faces are of uint8 in 0..255, this one is {face.dtype}.")
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

        Args:
            pictures: of any mode, see `rgb_bytes`.

        Returns:
            `torch.Tensor` of shape `(N, identity_dim)`, unit length.

        Raises:
            NoEmbeddingError: the model makes nothing of a picture.
        """
        size = (ALIGNED_SIZE, ALIGNED_SIZE)
        pictures = [PIL.Image.fromarray(rgb_bytes(picture)) for picture in pictures]
        faces = [np.asarray(picture.resize(size, PIL.Image.Resampling.BILINEAR)) for picture in pictures]
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

    def embed(
        self, photographs: Sequence[np.ndarray | PIL.Image.Image | str | os.PathLike], selection: str = "largest"
    ) -> IdentityBank:
        """Embeds the people in photographs, for `UIFacePipeline.__call__`.

        Args:
            photographs: one or several of what `rgb_bytes` takes: files, `PIL.Image.Image` of any mode, or arrays.
            selection: which face of a photograph, see `select`.

        Raises:
            NoFaceError: a photograph without a face; the message has its position.
            OSError: a file cannot be read.
            ValueError: no photographs, or an array that is no picture.
        """
        photographs = [photographs] if is_picture(photographs) else photographs
        if not len(photographs):
            raise ValueError("`photographs` is empty.")
        aligned = []
        for position, photograph in enumerate(photographs):
            is_file = isinstance(photograph, str | os.PathLike)
            try:
                photograph = load_photograph(photograph) if is_file else rgb_bytes(photograph)
            except ValueError as error:
                raise ValueError(f"photograph {position}: {error}") from error
            try:
                face = self.select(self.detect(photograph), photograph.shape, selection)
            except NoFaceError as error:
                raise NoFaceError(f"no face found in photograph {position}") from error
            aligned.append(align_face(photograph, face.landmarks))
        embeddings = torch.from_numpy(self.embed_aligned(aligned))
        return IdentityBank(embeddings, self.name, identity_encoder_fingerprint=self.fingerprint)


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
        try:
            model = onnx.load(model_file)
        except Exception as error:  # protobuf's own
            raise ValueError(f"no ONNX model: {why_unreadable(model_file, error)}.") from error
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
        probe = torch.rand(1, 3, ALIGNED_SIZE, ALIGNED_SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
        with_static_shapes(self.network, probe)
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
        return F.normalize(torch.vmap(self._features)(pixels[:, None])[:, 0])

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        # a function of its own: `torch.compile` cannot name a module that `vmap` is given
        return self.network(pixels)
