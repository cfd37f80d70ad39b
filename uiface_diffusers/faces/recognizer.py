"""What a face recognition model is to those who evaluate and verify with it."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from .geometry import UnusableFaceError


class Recognizer(Protocol):
    """A face recognition model: aligned faces -> features. `FaceEncoder` is one, and whatever `load_recognizer` gives.

    Features are of any length, since verification adds those of a face and of its mirror image; `unit_embeddings`
    brings them to unit length. A model to take gradients of is another thing: `TorchRecognizer`.

    Attributes:
        name (`str`): by which results and embeddings are marked.
        fingerprint (`str`): twelve hexadecimal digits of the weights.
        image_size (`int`): height and width of the faces.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def image_size(self) -> int: ...

    def __call__(self, faces: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        """
        Args:
            faces: `(N, image_size, image_size, 3)` RGB bytes, or a list of N such faces.

        Returns:
            `np.ndarray` of shape `(N, identity_dim)`: float32, of any length.

        Raises:
            ValueError: the faces are not of bytes, or of another size.
        """
        ...


class NoEmbeddingError(UnusableFaceError):
    """An aligned face whose features have no direction: not finite, or all zero.

    Args:
        position (`int`): of the first such face.
        encoder (`str`): the model pack.
    """

    def __init__(self, position: int, encoder: str):
        super().__init__(f"`{encoder}` gives no embedding of face {position}: zero or not finite")
        self.position = position


def has_direction(features: np.ndarray) -> np.ndarray:
    """Which rows of features `(N, D)` can be brought to unit length, `(N,)`: finite and not zero."""
    lengths = np.linalg.norm(features, axis=1)
    return np.isfinite(lengths) & (lengths > 0)


def unit_embeddings(recognizer: Recognizer, faces: Sequence[np.ndarray], batch_size: int = 64) -> np.ndarray:
    """Embeds aligned faces: their features, of unit length.

    Args:
        recognizer: embeds them.
        faces: one or more, `(image_size, image_size, 3)` RGB bytes each.
        batch_size (`int`, defaults to 64): faces at once.

    Returns:
        `np.ndarray` of shape `(N, identity_dim)`: float32.

    Raises:
        NoEmbeddingError: the model makes nothing of a face.
    """
    starts = range(0, len(faces), batch_size)
    features = np.concatenate([recognizer(faces[start : start + batch_size]) for start in starts])
    usable = has_direction(features)
    if not usable.all():
        raise NoEmbeddingError(int(usable.argmin()), recognizer.name)
    return features / np.linalg.norm(features, axis=1, keepdims=True)
