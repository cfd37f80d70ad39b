"""Verification benchmarks: InsightFace's `.bin` files, and how they are made of lists of pairs.

A `.bin` file is a pickle of two lists: the files of 2 N aligned faces in bytes, of which 2 i and 2 i + 1 are pair i;
and N booleans, whether a pair is of one person. They are written by Python 2 or 3. Where OpenCV has encoded the faces,
as in InsightFace's own tools, numpy arrays stand for the bytes.
"""

import io
import os
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from tqdm import tqdm

from ..faces import FaceEncoder, UnusableFaceError, align_face, load_photograph, resize_aligned
from ..files import complete_file, local_path, same_name, why_unreadable
from .image_folder import encode_image
from .pairs import check_pairs, read_pairs
from .sources import has_image_suffix, is_system_entry

# that InsightFace's readers and Python 3.4 know
PICKLE_PROTOCOL = 4
# of arrays in a benchmark: booleans, bytes, labels as integers
NUMPY_TYPES = ("b1", "u1", "i4", "i8")


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


class _NumpyType:
    """Stands in for `numpy.dtype`; the state, which says the byte order, is not needed for labels of 0 and 1."""

    def __init__(self, code: bytes | str, *_):
        self.code = code.decode("latin1") if isinstance(code, bytes) else code
        if self.code not in NUMPY_TYPES:
            raise ValueError(f"it holds numpy data of type {self.code!r}, not of {', '.join(NUMPY_TYPES)}")

    def __setstate__(self, state: Any) -> None:
        pass


class _NumpyArray:
    """Stands in for numpy's empty array that a pickle then fills: `values`, flat."""

    values: np.ndarray | None = None

    def __init__(self, *_):
        pass

    def __setstate__(self, state: tuple) -> None:
        _, _, dtype, _, data = state
        self.values = np.frombuffer(data, dtype.code)


def _array_from_buffer(data: bytes, dtype: _NumpyType, *_) -> _NumpyArray:
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


def read_benchmark(path: str | os.PathLike) -> Benchmark:
    """Reads InsightFace's `.bin`. Nothing that the file refers to is executed.

    Raises:
        ValueError: the file is damaged, refers to more than data, or has not two images a label.
    """
    path = local_path(path)
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


class _Photographs:
    """Finds photographs by their paths in a list: with their suffix or without, in any Unicode normal form."""

    def __init__(self, root: Path):
        self.root = root
        self._listings: dict[Path, dict[str, list[Path]]] = {}

    def _entries(self, folder: Path) -> dict[str, list[Path]]:
        """Names as in lists, and those of pictures without suffix, too -> the paths."""
        if folder not in self._listings:
            names: dict[str, list[Path]] = {}
            for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
                if not is_system_entry(entry.name):
                    names.setdefault(same_name(entry.name), []).append(entry)
                    if has_image_suffix(entry.name):
                        names.setdefault(same_name(entry.stem), []).append(entry)
            self._listings[folder] = names
        return self._listings[folder]

    def find(self, photograph: str) -> Path | None:
        """
        Raises:
            ValueError: it could be one of several files.
        """
        *folders, name = Path(photograph).parts
        folder = self.root
        for part in folders:
            if part == os.sep:  # an absolute path
                folder = Path(part)
            elif part == os.pardir:
                folder = folder / part
            else:
                candidates = [path for path in self._entries(folder).get(same_name(part), []) if path.is_dir()]
                if not candidates:
                    return None
                folder = next((path for path in candidates if path.name == part), candidates[0])
        files = [path for path in self._entries(folder).get(same_name(name), []) if not path.is_dir()]
        exact = [path for path in files if path.name == name] or files
        if len(exact) > 1:
            names = " and ".join(path.name for path in exact)
            raise ValueError(f"{photograph} of the list could be {names} in {folder}: leave one of them there.")
        return exact[0] if exact else None


def _find_photographs(root: Path, wanted: list[str]) -> dict[str, Path]:
    photographs = _Photographs(root)
    files = {photograph: photographs.find(photograph) for photograph in wanted}
    missing = [photograph for photograph, file in files.items() if file is None]
    if missing:
        example = missing[0] if has_image_suffix(missing[0]) else f"{missing[0]}.jpg"
        raise ValueError(
            f"{len(missing)} of {len(wanted)} photographs are not in {root}, such as {example}: the list's paths have"
            " to begin there."
        )
    return files


def _center_square(photograph: np.ndarray) -> np.ndarray:
    height, width = photograph.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize_aligned(photograph[top : top + side, left : left + side])


def make_benchmark(
    pairs: str | os.PathLike, images: str | os.PathLike, output: str | os.PathLike, encoder: FaceEncoder | None
) -> dict:
    """Makes a `.bin` of a list of pairs: faces are detected, aligned to 112x112 and stored as PNG.

    In a photograph of several people the face nearest to the center is meant: LFW's photographs were cut about it. Of
    one in which no face is found, the square about its center is stored, as by InsightFace's own tool: to leave pairs
    out would leave out hard ones, and move the folds.

    Args:
        pairs: the list, see `read_pairs`.
        images: folder in which the list's paths begin, of `NAME/NAME_0001.jpg` for those of LFW's form.
        output: the file; its folder is made.
        encoder: detects faces; `None` for photographs that are aligned to the 112x112 template already.

    Returns:
        `pairs` and `photographs` (how many), `several_faces` (photographs with more than one), `without_face` (names
        of those with none).

    Raises:
        ValueError: a photograph is missing or cannot be read, or is not square though aligned; the list is damaged.
    """
    listed = read_pairs(pairs)
    try:
        check_pairs(pairs, [pair.same for pair in listed])
    except ValueError as error:
        warnings.warn(f"the benchmark cannot be measured by `uiface verify`: {error}", stacklevel=2)
    files = _find_photographs(local_path(images), list(dict.fromkeys(photo for pair in listed for photo in pair[:2])))
    output = local_path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    encoded, several, without = {}, 0, []
    for name, file in tqdm(files.items(), desc="benchmark", unit="photo"):
        try:
            photograph = load_photograph(file)
            if encoder is None:
                face = resize_aligned(photograph)
            else:
                face, found = _central_face(photograph, encoder)
                several += found > 1
                without += [name] if not found else []
        except OSError as error:
            raise ValueError(f"{file.name} cannot be used: {why_unreadable(file, error)}.") from error
        except UnusableFaceError as error:
            raise ValueError(f"{file} cannot be used: {error}") from error
        encoded[name] = encode_image(PIL.Image.fromarray(face), "png")
    contents = [encoded[photo] for pair in listed for photo in pair[:2]], [pair.same for pair in listed]
    with complete_file(output) as beside, open(beside, "wb") as stream:
        pickle.dump(contents, stream, PICKLE_PROTOCOL)
    return {"pairs": len(listed), "photographs": len(files), "several_faces": several, "without_face": without}


def _central_face(photograph: np.ndarray, encoder: FaceEncoder) -> tuple[np.ndarray, int]:
    """The aligned face, and how many were found; the center's square without any."""
    try:
        faces = encoder.detect(photograph)
        face = encoder.select(faces, photograph.shape, "central")
    except UnusableFaceError:
        return _center_square(photograph), 0
    return align_face(photograph, face.landmarks), len(faces)
