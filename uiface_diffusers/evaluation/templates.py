"""Verification of templates, sets of faces of one person: the protocol of IJB-B (Whitelam et al. 2017) and IJB-C (Maze
et al. 2018), in the form and with the pooling of `eval_ijbc.py` of insightface's arcface_torch."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data.benchmarks import central_face
from ..faces import FaceEncoder, Recognizer, UnusableFaceError, align_face, load_photograph, resize_aligned
from ..files import iterate_lines, local_path, why_unreadable
from .embedding import embed_faces
from .identification import exact_unit_vectors
from .intervals import accept_interval
from .verification import TrueAcceptRate, true_accept_rate

FALSE_ACCEPT_RATES = (1e-3, 1e-4, 1e-5, 1e-6)
# pairs that are read and compared at a time, and images that are pooled
PAIR_ROWS, IMAGE_ROWS = 16384, 8192

# of lines; blanks in a file's name belong to it
MEDIUM = re.compile(r"(.*\S)\s+(-?\d{1,18})\s+(-?\d{1,18})")
PAIR = re.compile(r"-?\d{1,18}\s+-?\d{1,18}\s+[01]")
LANDMARKS = re.compile(r"(.*\S)((?:\s+-?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?){11})")


class MediaList(NamedTuple):
    """Which image is of which template and medium: N files, and numbers `(N,)` each. A medium is a photograph or a
    video, of which the images are frames."""

    files: list[str]
    templates: np.ndarray
    media: np.ndarray


class DetectedLandmarks(NamedTuple):
    """Of one image: `(5, 2)` in its pixels, and the detector's score."""

    landmarks: np.ndarray
    score: float


def _rows(path: Path, form: str, pattern: re.Pattern[str]) -> Iterator[tuple[str, ...]]:
    """What a pattern finds in each line.

    Raises:
        ValueError: a line is of another form than `form` says.
    """
    for number, line in enumerate(iterate_lines(path), start=1):
        if line.strip():
            found = pattern.fullmatch(line.strip())
            if found is None:
                raise ValueError(f"{path}, line {number}, is {line!r}, not {form}.")
            yield found.groups()


def read_media_list(path: str | os.PathLike) -> MediaList:
    """Reads `ijbc_face_tid_mid.txt`: one `FILE TEMPLATE MEDIUM` per line, the latter two whole numbers.

    Raises:
        ValueError: a line is of another form, or there are none.
    """
    path = local_path(path)
    rows = list(_rows(path, "FILE TEMPLATE MEDIUM with whole numbers", MEDIUM))
    if not rows:
        raise ValueError(f"{path} lists no images.")
    numbers = np.array([[int(word) for word in row[1:]] for row in rows])
    return MediaList([row[0] for row in rows], numbers[:, 0], numbers[:, 1])


def read_template_pairs(path: str | os.PathLike, rows: int = PAIR_ROWS) -> Iterator[np.ndarray]:
    """Reads `ijbc_template_pair_label.txt`: one `TEMPLATE TEMPLATE 0/1` per line; 1 is a genuine pair. Gives
    `(rows, 3)` whole numbers at a time.

    Raises:
        ValueError: a line is of another form.
    """
    path = local_path(path)
    lines = ((number, line) for number, line in enumerate(iterate_lines(path), start=1) if line.strip())
    while part := list(islice(lines, rows)):
        try:
            pairs = np.loadtxt([line for _, line in part], np.int64, comments=None, ndmin=2)
            is_fine = pairs.shape[1] == 3 and bool(np.isin(pairs[:, 2], (0, 1)).all())
        except ValueError:
            is_fine = False
        if not is_fine:
            number, line = next(each for each in part if PAIR.fullmatch(each[1].strip()) is None)
            raise ValueError(f"{path}, line {number}, is {line!r}, not TEMPLATE TEMPLATE 0/1.")
        yield pairs


def read_landmarks(path: str | os.PathLike) -> dict[str, DetectedLandmarks]:
    """Reads `ijbc_name_5pts_score.txt`: one `FILE X1 Y1 ... X5 Y5 SCORE` per line.

    Raises:
        ValueError: a line is of another form.
    """
    path = local_path(path)
    found = {}
    for file, words in _rows(path, "FILE X1 Y1 ... X5 Y5 SCORE", LANDMARKS):
        numbers = np.array([float(word) for word in words.split()], np.float32)
        found[file] = DetectedLandmarks(numbers[:10].reshape(5, 2), float(numbers[10]))
    return found


def pool_templates(
    features: np.ndarray,
    templates: np.ndarray,
    media: np.ndarray,
    detection_scores: np.ndarray | None = None,
    feature_norms: bool = True,
    image_rows: int = IMAGE_ROWS,
) -> tuple[np.ndarray, np.ndarray]:
    """One vector per template: images are averaged within a medium, media are added, and the sum is brought to unit
    length. This is `image2template_feature` of `eval_ijbc.py`.

    Args:
        features (`np.ndarray` of shape `(N, D)`): of the images.
        templates (`np.ndarray` of shape `(N,)`): their templates' numbers.
        media (`np.ndarray` of shape `(N,)`): their media's numbers. A medium counts anew in each template.
        detection_scores (`np.ndarray` of shape `(N,)`, *optional*): weights of the images (`use_detector_score`).
        feature_norms (`bool`, defaults to `True`): features are weighted by their own length, by which a recognizer
            tells a bad image (`use_norm_score`); otherwise all have unit length before.
        image_rows (`int`, defaults to 8192): images in memory as float64 at a time; a template is never divided.

    Returns:
        Numbers of the templates `(T,)`, ascending, and their vectors `(T, D)`, see `exact_unit_vectors`.

    Raises:
        ValueError: a template's sum is zero or not finite.
    """
    order = np.lexsort((media, templates))
    by_medium = np.stack([templates, media], axis=1)[order]
    medium_starts = np.flatnonzero(np.append(True, (by_medium[1:] != by_medium[:-1]).any(axis=1)))
    numbers, starts = np.unique(by_medium[:, 0], return_index=True)
    ends, pooled = np.append(starts, len(order)), np.empty((len(numbers), features.shape[1]))
    first = 0
    while first < len(numbers):
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + image_rows, side="right")) - 1)
        rows = order[ends[first] : ends[last]]
        images = features[rows].astype(np.float64)
        if not feature_norms:
            images /= np.linalg.norm(images, axis=1, keepdims=True)
        if detection_scores is not None:
            images *= np.asarray(detection_scores, np.float64)[rows, None]
        of_media = slice(*np.searchsorted(medium_starts, (ends[first], ends[last])))
        inner = medium_starts[of_media]
        means = np.add.reduceat(images, inner - ends[first]) / np.diff(np.append(inner, ends[last]))[:, None]
        pooled[first:last] = np.add.reduceat(means, np.searchsorted(inner, ends[first:last]))
        first = last
    lengths = np.linalg.norm(pooled, axis=1)
    wrong = numbers[~(np.isfinite(lengths) & (lengths > 0))]
    if len(wrong):
        raise ValueError(f"{len(wrong)} templates have no direction, such as {wrong[0]}: features zero or not finite.")
    return numbers, exact_unit_vectors(pooled)


@dataclass
class TemplateResult:
    """
    Args:
        genuine (`np.ndarray` of shape `(N,)`): cosines of the pairs of one person.
        impostor (`np.ndarray` of shape `(M,)`): of the others.
        templates (`int`): how many there are.
        tar_at_far (`dict[float, TrueAcceptRate]`): false accept rate -> true accept rate. Rates that would be less
            than one impostor pair are left out.
    """

    genuine: np.ndarray
    impostor: np.ndarray
    templates: int
    tar_at_far: dict[float, TrueAcceptRate]

    def to_dict(self) -> dict:
        """What JSON can hold; counts in place of the cosines."""
        return {
            "templates": self.templates,
            "genuine_pairs": len(self.genuine),
            "impostor_pairs": len(self.impostor),
            "tar_at_far": {f"{far:g}": rate._asdict() for far, rate in self.tar_at_far.items()},
        }

    def lines(self) -> list[str]:
        """A text of a few lines, in percent."""
        counts = f"{len(self.genuine)} genuine and {len(self.impostor)} impostor pairs of {self.templates} templates"
        rates = [
            f"TAR at FAR {far:g}: {100 * rate.rate:.2f} [{100 * rate.low:.2f}, {100 * rate.high:.2f}]"
            for far, rate in self.tar_at_far.items()
        ]
        return [counts, *(rates or ["TAR: - (too few impostor pairs)"])]


def compare_templates(
    numbers: np.ndarray,
    vectors: np.ndarray,
    pairs: Iterable[np.ndarray],
    far: tuple[float, ...] = FALSE_ACCEPT_RATES,
) -> TemplateResult:
    """Cosines of pairs of templates, block after block, and the true accept rates. One float64 per pair is kept.

    Args:
        numbers (`np.ndarray` of shape `(T,)`): of the templates, ascending.
        vectors (`np.ndarray` of shape `(T, D)`): as `pool_templates` gives them.
        pairs: blocks of `(rows, 3)`, as `read_template_pairs` gives them.
        far: false accept rates at which the true accept rate is measured.

    Raises:
        ValueError: a template of the pairs is not there, or there are no pairs of a kind.
    """
    scores: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for block in pairs:
        places = np.minimum(np.searchsorted(numbers, block[:, :2]), len(numbers) - 1)
        unknown = block[:, :2][numbers[places] != block[:, :2]]
        if len(unknown):
            raise ValueError(f"template {unknown[0]} of the pairs has no image in the list of media.")
        cosines = np.einsum("ij,ij->i", vectors[places[:, 0]], vectors[places[:, 1]])
        same = block[:, 2] == 1
        scores[0].append(cosines[same])
        scores[1].append(cosines[~same])
    genuine, impostor = (np.concatenate([np.empty(0), *kind]) for kind in scores)
    if not len(genuine) or not len(impostor):
        raise ValueError(f"{len(genuine)} genuine and {len(impostor)} impostor pairs of templates: both are needed.")
    rates = {}
    for rate in far:
        if rate * len(impostor) >= 1:
            tar, threshold = true_accept_rate(genuine, impostor, rate)
            rates[rate] = TrueAcceptRate(tar, *accept_interval(genuine, impostor, rate), threshold)
    return TemplateResult(genuine, impostor, len(numbers), rates)


class TemplateFolder:
    """The lists and images of a template benchmark, in the folders of arcface_torch's IJB-B and IJB-C:
    `meta/*_face_tid_mid.txt`, `meta/*_template_pair_label.txt`, `meta/*_name_5pts_score.txt` (not needed for aligned
    faces or with a detector) and `loose_crop/`.

    Args:
        folder: which holds these.

    Raises:
        ValueError: a list is missing, there several times or damaged, or images are missing.
    """

    def __init__(self, folder: str | os.PathLike):
        self.root = local_path(folder)
        self.name = self.root.resolve().name
        media, self.pairs_file = self._list("face_tid_mid"), self._list("template_pair_label")
        landmarks = next(iter(self._lists("name_5pts_score")), None)
        self.media = read_media_list(media)
        self.landmarks = None if landmarks is None else read_landmarks(landmarks)
        self.files = list(dict.fromkeys(self.media.files))
        missing = [file for file in self.files if not (self.root / "loose_crop" / file).is_file()]
        if missing:
            example = self.root / "loose_crop" / missing[0]
            raise ValueError(f"{len(missing)} of {len(self.files)} images of {media} are missing, such as {example}.")
        unknown = [file for file in self.files if self.landmarks is not None and file not in self.landmarks]
        if unknown:
            raise ValueError(f"{len(unknown)} images of {media} are not in {landmarks}, such as {unknown[0]}.")

    def _lists(self, name: str) -> list[Path]:
        found = sorted((self.root / "meta").glob(f"*_{name}.txt"))
        if len(found) > 1:
            raise ValueError(f"{self.root / 'meta'} has {len(found)} lists *_{name}.txt: leave one of them there.")
        return found

    def _list(self, name: str) -> Path:
        found = self._lists(name)
        if not found:
            raise ValueError(f"{self.root / 'meta'} has no *_{name}.txt, as arcface_torch's IJB folders have.")
        return found[0]

    def face(self, file: str, encoder: FaceEncoder | None) -> np.ndarray:
        """An image's aligned face, `(112, 112, 3)` RGB bytes: by the listed landmarks; without a list, by `encoder`,
        or as it is.

        Raises:
            ValueError: it cannot be read, or is not square though aligned.
        """
        path = self.root / "loose_crop" / file
        try:
            photograph = load_photograph(path)
            if self.landmarks is not None:
                return align_face(photograph, self.landmarks[file].landmarks)
            return resize_aligned(photograph) if encoder is None else central_face(photograph, encoder)[0]
        except OSError as error:
            raise ValueError(f"{file} cannot be used: {why_unreadable(path, error)}.") from error
        except UnusableFaceError as error:
            raise ValueError(f"{path} cannot be used: {error}.") from error


def verify_templates(
    recognizer: Recognizer,
    folder: TemplateFolder,
    encoder: FaceEncoder | None = None,
    detection_scores: bool = True,
    feature_norms: bool = True,
    far: tuple[float, ...] = FALSE_ACCEPT_RATES,
) -> TemplateResult:
    """Measures a recognizer on templates, by default in the mode that `eval_ijbc.py` calls N1 D1 F2: features of a
    face and of its mirror image are added, and weighted by their length and by the detector's score.

    Args:
        recognizer: as `load_recognizer` gives it.
        folder: the benchmark.
        encoder: detects faces if the folder has no list of landmarks; `None` for faces that are aligned already.
        detection_scores (`bool`, defaults to `True`): weigh by the scores in the list of landmarks, if there is one.
        feature_norms (`bool`, defaults to `True`): weigh by the features' length.
        far: false accept rates at which the true accept rate is measured.

    Raises:
        ValueError: as of the parts.
    """
    first_pairs = next(iter(read_template_pairs(folder.pairs_file)), None)  # before the work
    if first_pairs is None:
        raise ValueError(f"{folder.pairs_file} has no pairs.")
    faces = (folder.face(file, encoder) for file in folder.files)
    features = embed_faces(recognizer, faces, len(folder.files), folder.name)
    scores = None
    if detection_scores and folder.landmarks is not None:
        scores = np.array([folder.landmarks[file].score for file in folder.media.files])
    if len(folder.files) < len(folder.media.files):
        place = {file: number for number, file in enumerate(folder.files)}
        features = features[[place[file] for file in folder.media.files]]
    templates = pool_templates(features, folder.media.templates, folder.media.media, scores, feature_norms)
    return compare_templates(*templates, read_template_pairs(folder.pairs_file), far)
