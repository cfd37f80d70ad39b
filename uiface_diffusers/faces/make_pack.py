"""A model pack of two ONNX files, for recognizers that come without one."""

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from ..files import local_path, why_unreadable
from .encoder import FaceEncoder
from .geometry import ALIGNED_SIZE
from .packs import weights_beside
from .recognizer import NoEmbeddingError


@dataclass
class PackReport:
    """
    Args:
        name (`str`): of the pack.
        root (`Path`): what `FaceEncoder` and `--encoder-root` take.
        dimension (`int`): of the embeddings.
        fingerprint (`str`): by which embeddings of this recognizer are told from others'.
        mean, std (`float`): pixels 0..255 are normalized as (pixel - mean) / std; 0 and 1 if the model does it itself.
        batch (`int`, *optional*): faces per call of the recognizer; `None` for any number.
        sha256 (`dict[str, str]`): of the files.
    """

    name: str
    root: Path
    dimension: int
    fingerprint: str
    mean: float
    std: float
    batch: int | None
    sha256: dict[str, str]


def make_pack(recognizer: str | os.PathLike, detector: str | os.PathLike, output: str | os.PathLike) -> PackReport:
    """Makes a model pack for `FaceEncoder` of a recognizer and a detector, and checks that both work. The pack appears
    when it is complete.

    Args:
        recognizer: ONNX, `(N, 3, 112, 112)` RGB -> `(N, identity_dim)`.
        detector: ONNX of the SCRFD or RetinaFace kind, with five landmarks.
        output: the pack's folder, `ROOT/models/NAME`; new or empty.

    Raises:
        ValueError: the folder is not of this form or in use, or a file is not such a model.
    """
    output = local_path(output).absolute()
    if output.parent.name != "models":
        raise ValueError(f"model packs are found in ROOT/models/NAME: {output} is not in a folder `models`.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already: choose another name, or delete it.")
    given = {"recognizer": local_path(recognizer), "detector": local_path(detector)}
    for task, file in given.items():
        _check_model(task, file)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pack-", dir=output.parent) as beside:
        folder = Path(beside) / "models" / output.name
        folder.mkdir(parents=True)
        for task, file in given.items():
            shutil.copyfile(file, folder / f"{task}.onnx")
            for weights in weights_beside(file):  # a model names them: they keep their names
                (folder / weights.relative_to(file.parent)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(weights, folder / weights.relative_to(file.parent))
        report = _check_pack(FaceEncoder(output.name, beside), output)
        folder.replace(output)
    return report


def _check_model(task: str, file: Path) -> None:
    """Refuses what is no ONNX model, with the option that names it."""
    try:
        onnx.load(file, load_external_data=False)
        missing = [weights for weights in weights_beside(file) if not weights.is_file()]
    except Exception as error:  # protobuf's own
        raise ValueError(f"the {task} is no ONNX model: {why_unreadable(file, error)}.") from error
    if missing:
        raise ValueError(f"the {task} {file} keeps its weights in {missing[0]}, which is missing.")


def _check_pack(encoder: FaceEncoder, output: Path) -> PackReport:
    """Embeds two noise faces, and looks for faces in a picture without any."""
    noise = np.random.default_rng(0).integers(0, 256, (2, ALIGNED_SIZE, ALIGNED_SIZE, 3), np.uint8)
    encoder.detect(noise[0].repeat(4, axis=0).repeat(4, axis=1))
    try:
        embeddings = encoder.embed_aligned(list(noise))
    except NoEmbeddingError as error:
        raise ValueError(f"the recognizer does not work: {error}.") from error
    if np.allclose(embeddings[0], embeddings[1], atol=1e-4):
        raise ValueError("the recognizer does not look at the faces: two pictures have the same embedding.")
    size = encoder.recognizer.input_shape[0]
    files = {task: Path(getattr(encoder, task).model_file) for task in ("recognizer", "detector")}
    return PackReport(
        name=encoder.name,
        root=output.parent.parent,
        dimension=embeddings.shape[1],
        fingerprint=encoder.fingerprint,
        mean=float(encoder.recognizer.input_mean),
        std=float(encoder.recognizer.input_std),
        batch=size if isinstance(size, int) and size > 0 else None,
        sha256={file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files.values()},
    )
