"""InsightFace's `.bin` files.

A file is a pickle of two lists: the files of 2 N aligned faces in bytes, of which 2 i and 2 i + 1 are pair i; and N
booleans, whether a pair is of one person. They are written by Python 2 or 3. Where OpenCV has encoded the faces, as in
InsightFace's own tools, numpy arrays stand for the bytes.
"""

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...files import complete_file, why_unreadable
from .benchmark import Benchmark

# that InsightFace's readers and Python 3.4 know
PICKLE_PROTOCOL = 4
# of arrays in a benchmark: booleans, bytes, labels as integers
NUMPY_TYPES = ("b1", "u1", "i4", "i8")


class _NumpyType:
    """Stands in for `numpy.dtype`; the state, which says the byte order, is not needed for labels of 0 and 1."""

    def __init__(self, code: bytes | str, *_: object):
        self.code = code.decode("latin1") if isinstance(code, bytes) else code
        if self.code not in NUMPY_TYPES:
            raise ValueError(f"it holds numpy data of type {self.code!r}, not of {', '.join(NUMPY_TYPES)}")

    def __setstate__(self, state: Any) -> None:
        pass


class _NumpyArray:
    """Stands in for numpy's empty array that a pickle then fills: `values`, flat."""

    values: np.ndarray | None = None

    def __init__(self, *_: object):
        pass

    def __setstate__(self, state: tuple) -> None:
        _, _, dtype, _, data = state
        self.values = np.frombuffer(data, dtype.code)


def _array_from_buffer(data: bytes, dtype: _NumpyType, *_: object) -> _NumpyArray:
    array = _NumpyArray()
    array.values = np.frombuffer(data, dtype.code)
    return array


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"it holds text in {encoding!r}")
    return str.encode(text, encoding)


# what a pickle of bytes, booleans and numpy arrays refers to, and what is called in its place: functions of this file
STAND_INS: dict[tuple[str, str], Callable] = {
    ("_codecs", "encode"): _encode,  # Python 3's bytes in protocols below 3
    ("numpy", "dtype"): _NumpyType,
    ("numpy", "ndarray"): _NumpyArray,
}
for _core in ("numpy.core", "numpy._core"):  # before numpy 2, and since
    STAND_INS[f"{_core}.multiarray", "_reconstruct"] = _NumpyArray
    STAND_INS[f"{_core}.multiarray", "scalar"] = lambda dtype, data: np.frombuffer(data, dtype.code)[0].item()
    STAND_INS[f"{_core}.numeric", "_frombuffer"] = _array_from_buffer


class _DataUnpickler(pickle.Unpickler):
    """Reads lists, tuples, numbers, bytes and numpy arrays. What a pickle refers to by name is neither imported nor
    called."""

    def find_class(self, module: str, name: str) -> Callable:
        stand_in = STAND_INS.get((module, name))
        if stand_in is None:
            raise ValueError(
                f"it refers to `{module}.{name}`, which is more than data, and was not executed. If you trust its"
                " origin, load it with Python's pickle and save it anew as ([bytes, ...], [bool, ...])"
            )
        # a new function each time: a pickle can set attributes of what it refers to
        return lambda *arguments: stand_in(*arguments)


def _image_bytes(image: Any) -> bytes:
    if isinstance(image, _NumpyArray) and image.values is not None and image.values.dtype == np.uint8:
        return image.values.tobytes()
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    raise ValueError(f"an image is {type(image).__name__}, not bytes")


def _booleans(labels: Any) -> np.ndarray:
    labels = labels.values if isinstance(labels, _NumpyArray) else labels
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
            # `str` of Python 2 is bytes
            content = _DataUnpickler(file, encoding="bytes").load()
            if not isinstance(content, list | tuple) or len(content) != 2:
                raise ValueError("it is not a list of images and a list of labels")
            if not isinstance(content[0], list | tuple):
                raise ValueError(f"its images are {type(content[0]).__name__}, not a list")
            images, same = [_image_bytes(image) for image in content[0]], _booleans(content[1])
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
