"""What every kind of verification benchmark is read to."""

import io
from dataclasses import dataclass

import numpy as np

from ...faces import resize_aligned
from ...pictures import load_photograph


@dataclass
class Benchmark:
    """
    Args:
        name (`str`): the file's, without suffix.
        images (`list[bytes]`): 2 N files of aligned faces; 2 i and 2 i + 1 are pair i.
        same (`np.ndarray` of shape `(N,)`): booleans, whether a pair is of one person.
    """

    name: str
    images: list[bytes]
    same: np.ndarray

    def __len__(self) -> int:
        return len(self.same)

    def face(self, position: int) -> np.ndarray:
        """An image as `(112, 112, 3)` RGB bytes; one of another size is resized.

        Raises:
            ValueError: it cannot be read, or is not square.
        """
        try:
            return resize_aligned(load_photograph(io.BytesIO(self.images[position])))
        except (OSError, ValueError) as error:
            raise ValueError(f"image {position} of benchmark `{self.name}` is no aligned face: {error}") from error
