"""Making a benchmark of a list of pairs and its photographs."""

import os
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
from tqdm import tqdm

from ...faces import FaceEncoder, UnusableFaceError, align_face, resize_aligned
from ...files import local_path, same_name, why_unreadable
from ...pictures import load_photograph
from ..image_folder import encode_image
from ..pairs import check_pairs, read_pairs
from ..photographs import has_image_suffix, is_system_entry
from .insightface_bin import write_bin


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
    found = {photograph: photographs.find(photograph) for photograph in wanted}
    files = {photograph: file for photograph, file in found.items() if file is not None}
    missing = [photograph for photograph in found if photograph not in files]
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
                face, found = central_face(photograph, encoder)
                several += found > 1
                without += [name] if not found else []
        except OSError as error:
            raise ValueError(f"{file.name} cannot be used: {why_unreadable(file, error)}.") from error
        except UnusableFaceError as error:
            raise ValueError(f"{file} cannot be used: {error}") from error
        encoded[name] = encode_image(PIL.Image.fromarray(face), "png")
    write_bin(output, [encoded[photo] for pair in listed for photo in pair[:2]], [pair.same for pair in listed])
    return {"pairs": len(listed), "photographs": len(files), "several_faces": several, "without_face": without}


def central_face(photograph: np.ndarray, encoder: FaceEncoder) -> tuple[np.ndarray, int]:
    """The aligned face, and how many were found; the center's square without any."""
    try:
        faces = encoder.detect(photograph)
        face = encoder.select(faces, photograph.shape, "central")
    except UnusableFaceError:
        return _center_square(photograph), 0
    return align_face(photograph, face.landmarks), len(faces)
