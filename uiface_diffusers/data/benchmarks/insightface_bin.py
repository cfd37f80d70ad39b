"""InsightFace's `.bin` files.

A file is a pickle of two lists: the files of 2 N aligned faces in bytes, of which 2 i and 2 i + 1 are pair i; and N
booleans, whether a pair is of one person. They are written by Python 2 or 3. Where OpenCV has encoded the faces, as in
InsightFace's own tools, numpy arrays stand for the bytes.
"""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...files import complete_file, why_unreadable
from ..plain_pickle import STAND_INS, NumpyArray, PlainUnpickler, picture_bytes
from .benchmark import Benchmark

__all__ = ["STAND_INS", "read_bin", "write_bin"]

# that InsightFace's readers and Python 3.4 know
PICKLE_PROTOCOL = 4


def _booleans(labels: Any) -> np.ndarray:
    labels = labels.values if isinstance(labels, NumpyArray) else labels
    if not isinstance(labels, list | tuple | np.ndarray):
        raise ValueError(f"its labels are {type(labels).__name__}, not a list")
    for label in labels:
        if not isinstance(label, int | np.bool_ | np.integer) or label not in (0, 1):
            raise ValueError(f"a label is {label!r}, neither true nor false")
    return np.array(labels, bool)


def read_bin(path: Path) -> Benchmark:
    """Reads InsightFace's `.bin`. Nothing that the file refers to is executed.

    Raises:
        ValueError: the file is damaged, refers to more than data, or has not two images a label.
    """
    if not path.is_file():
        raise ValueError(f"no benchmark: {why_unreadable(path, 'no file')}.")
    with open(path, "rb") as file:
        try:
            content = PlainUnpickler(file, "([bytes, ...], [bool, ...])").load()
            if not isinstance(content, list | tuple) or len(content) != 2:
                raise ValueError("it is not a list of images and a list of labels")
            if not isinstance(content[0], list | tuple):
                raise ValueError(f"its images are {type(content[0]).__name__}, not a list")
            images, same = [picture_bytes(image) for image in content[0]], _booleans(content[1])
        except Exception as error:  # damaged pickles raise nearly anything
            # the reasons of this file's own are more than a damage
            reason = error if isinstance(error, ValueError) else why_unreadable(path, error)
            raise ValueError(f"{path} cannot be read as a benchmark: {reason}.") from error
    if len(images) != 2 * len(same) or not images:
        raise ValueError(f"{path} has {len(images)} images and {len(same)} labels: a label is of two images.")
    return Benchmark(path.stem, images, same)


def write_bin(path: Path, images: Sequence[bytes], same: Sequence[bool]) -> None:
    """Writes what `read_bin` and InsightFace's readers read: two images for each label."""
    with complete_file(path) as beside, open(beside, "wb") as stream:
        pickle.dump((list(images), list(same)), stream, PICKLE_PROTOCOL)
