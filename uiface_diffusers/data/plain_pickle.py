"""Reads pickles of plain data: lists, tuples, numbers, text, bytes and numpy arrays.

Nothing that a pickle refers to is imported or called.
"""

import pickle
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

# of arrays that are read: booleans, bytes, labels as integers
NUMPY_TYPES = ("b1", "u1", "i4", "i8")


class _NumpyType:
    """Stands in for `numpy.dtype`; of the state, only the byte order is taken."""

    def __init__(self, code: bytes | str, *_: object):
        self.code = code.decode("latin1") if isinstance(code, bytes) else code
        if self.code not in NUMPY_TYPES:
            raise ValueError(f"it holds numpy data of type {self.code!r}, not of {', '.join(NUMPY_TYPES)}")

    def __setstate__(self, state: Any) -> None:
        if state[1] in (">", b">"):
            self.code = f">{self.code}"


class NumpyArray:
    """Stands in for numpy's empty array that a pickle then fills: `values`, flat."""

    values: np.ndarray | None = None

    def __init__(self, *_: object):
        pass

    def __setstate__(self, state: tuple) -> None:
        _, _, dtype, _, data = state
        self.values = np.frombuffer(data, dtype.code)


def _array_from_buffer(data: bytes, dtype: _NumpyType, *_: object) -> NumpyArray:
    array = NumpyArray()
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
    ("numpy", "ndarray"): NumpyArray,
}
for _core in ("numpy.core", "numpy._core"):  # before numpy 2, and since
    STAND_INS[f"{_core}.multiarray", "_reconstruct"] = NumpyArray
    STAND_INS[f"{_core}.multiarray", "scalar"] = lambda dtype, data: np.frombuffer(data, dtype.code)[0].item()
    STAND_INS[f"{_core}.numeric", "_frombuffer"] = _array_from_buffer


class RefusedPickleError(ValueError):
    """The pickle refers to more than data."""


class PlainUnpickler(pickle.Unpickler):
    """
    Args:
        file: to read from.
        form: in which a trusted pickle is to be saved anew, for the error.

    Raises:
        RefusedPickleError: by `load`; the pickle refers to more than data.
    """

    def __init__(self, file: BinaryIO, form: str):
        # `str` of Python 2 is bytes
        super().__init__(file, encoding="bytes")
        self.form = form

    def find_class(self, module: str, name: str) -> Callable:
        stand_in = STAND_INS.get((module, name))
        if stand_in is None:
            raise RefusedPickleError(
                f"it refers to `{module}.{name}`, which is more than data, and was not executed. If you trust its"
                f" origin, load it with Python's pickle and save it anew as {self.form}"
            )
        # a new function each time: a pickle can set attributes of what it refers to
        return lambda *arguments: stand_in(*arguments)


def picture_bytes(image: Any) -> bytes:
    """A picture's file in a pickle: bytes, or numpy's array of them.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(image, NumpyArray) and image.values is not None and image.values.dtype == np.uint8:
        return image.values.tobytes()
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    raise ValueError(f"an image is {type(image).__name__}, not bytes")
