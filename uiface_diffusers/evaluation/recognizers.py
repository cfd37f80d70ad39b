"""Recognizers to measure: an insightface model pack, or a model of this package."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel
from transformers.image_processing_utils import BatchFeature

from ..faces import ALIGNED_SIZE, FaceEncoder, Recognizer
from ..files import brief, why_unreadable
from ..fingerprint import weights_fingerprint


class ModelRecognizer:
    """A model of transformers' form as a `Recognizer`: `model(**processor(images, return_tensors="pt")).embeddings`.

    Args:
        model: a module with `device`. It computes in eval mode and is left in the mode that it had.
        processor: takes a list of `(112, 112, 3)` RGB bytes, and resizes them if need be.
        name (`str`): of the results.

    Raises:
        ValueError: at a call: the model gives no `embeddings`.
    """

    image_size = ALIGNED_SIZE

    def __init__(self, model: PreTrainedModel, processor: Callable[..., BatchFeature], name: str):
        self.model, self.processor, self.name = model, processor, name

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of the weights as they are now."""
        return weights_fingerprint(self.model)

    @torch.no_grad()
    def __call__(self, faces: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        inputs = self.processor(list(faces), return_tensors="pt").to(self.model.device)
        training = self.model.training
        self.model.eval()
        try:
            embeddings = getattr(self.model(**inputs), "embeddings", None)
        finally:
            self.model.train(training)
        if embeddings is None:
            raise ValueError(f"`{self.name}` is a {type(self.model).__name__}, which gives no `embeddings` of faces.")
        return embeddings.float().cpu().numpy()


def load_recognizer(
    model: str | os.PathLike,
    root: str | os.PathLike = "~/.insightface",
    providers: list[str] | None = None,
    device: str | None = None,
) -> Recognizer:
    """Loads a recognizer by its name.

    Args:
        model: the name of an insightface pack; or a folder, or a Hub repository `ORGANISATION/NAME`, of a recognizer
            that this package or transformers knows: weights as safetensors, no code of the repository's.
        root (defaults to `"~/.insightface"`): the folder with `models/PACK`.
        providers (`list[str]`, *optional*): onnxruntime's execution providers, for a pack.
        device (`str`, *optional*): for a pack, see `FaceEncoder`; for another model, a GPU if there is one.

    Raises:
        OSError: there is no such folder or repository, or a file of it is missing.
        ValueError: there is no such pack, or it has no recognizer.
    """
    model = os.fspath(model)
    if not Path(model).is_dir() and "/" not in model:
        return FaceEncoder(model, root, providers, device=device)
    # classes of this package are known to transformers since it was imported
    try:
        loaded = AutoModel.from_pretrained(model, use_safetensors=True, trust_remote_code=False)
        processor = AutoImageProcessor.from_pretrained(model, trust_remote_code=False)
    except SafetensorError as error:
        file = Path(model) / "model.safetensors"
        raise ValueError(f"no safetensors file: {why_unreadable(file, error)}.") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {brief(error)}"
        raise ValueError(
            f"{model} is no recognizer that transformers knows, or a file of it is damaged ({reason})."
        ) from error
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return ModelRecognizer(loaded.to(device), processor, Path(model).name)
