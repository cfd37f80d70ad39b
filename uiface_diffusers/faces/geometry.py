"""Where a face is and how it is brought to the template: alignment, head pose, what lies out of the frame."""

import warnings
from threading import Lock

import cv2
import numpy as np
import PIL.Image
from insightface.utils import face_align

ALIGNED_SIZE = 112


# |yaw| of a face that looks sideways
SIDE_VIEW = 0.25
# where the nose of a frontal face is, from the eyes (0) to the mouth (1): the mean of 514 faces with |yaw| < 0.1 of
# CelebA, All-Age-Faces, SCUT-FBP5500, FFHQ and LFW, by SCRFD; the template has 0.495
FRONTAL_NOSE = 0.58


class UnusableFaceError(ValueError):
    """A photograph that can be read but gives no aligned face."""


# filters of warnings belong to the process: one thread at a time changes them
_warning_filters = Lock()


def alignment_matrix(landmarks: np.ndarray) -> np.ndarray:
    """The similarity transform of a photograph's pixels to the five-point 112x112 template of ArcFace (Deng et al.
    2019), `(2, 3)`.

    Args:
        landmarks (`np.ndarray` of shape `(5, 2)`): in the photograph's pixels.
    """
    with _warning_filters, warnings.catch_warnings():
        # insightface calls an interface that scikit-image has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        return face_align.estimate_norm(landmarks, ALIGNED_SIZE)


def align_face(photograph: np.ndarray, landmarks: np.ndarray, size: int = ALIGNED_SIZE) -> np.ndarray:
    """Warps a face to the template by its `alignment_matrix`.

    Args:
        photograph (`np.ndarray` of shape `(height, width, 3)`): bytes.
        landmarks (`np.ndarray` of shape `(5, 2)`): in pixels.
        size (`int`, defaults to 112): height and width of the result. The field of view is that of the 112x112
            template at any size, as if that were resized.

    Returns:
        `np.ndarray` of shape `(size, size, 3)`: bytes; black outside the photograph.
    """
    matrix = alignment_matrix(landmarks)
    scale = size / ALIGNED_SIZE
    # resizing keeps the corners of the pixels in place, not their centers
    resize = np.array([[scale, 0, (scale - 1) / 2], [0, scale, (scale - 1) / 2]])
    matrix = resize @ np.vstack([matrix, [0, 0, 1]])
    return cv2.warpAffine(photograph, matrix, (size, size), flags=cv2.INTER_LINEAR, borderValue=0)


def template_landmarks(landmarks: np.ndarray) -> np.ndarray:
    """The landmarks of a photograph's face in its aligned 112x112 picture, `(5, 2)`."""
    matrix = alignment_matrix(landmarks)
    return landmarks @ matrix[:, :2].T + matrix[:, 2]


def out_of_frame(landmarks: np.ndarray, shape: tuple[int, ...]) -> float:
    """The share of the 112x112 template's pixels, in [0, 1], that lies outside a photograph and is black in the
    aligned face.

    Args:
        landmarks (`np.ndarray` of shape `(5, 2)`): in the photograph's pixels.
        shape: the photograph's, height and width first.
    """
    inverse = cv2.invertAffineTransform(alignment_matrix(landmarks))
    rows, columns = np.indices((ALIGNED_SIZE, ALIGNED_SIZE)).reshape(2, -1)
    places = inverse @ np.stack([columns, rows, np.ones_like(rows)])
    # pixel centers are whole numbers: a photograph reaches half a pixel further
    end = np.array([[shape[1]], [shape[0]]]) - 0.5
    return 1 - float(((places >= -0.5) & (places <= end)).all(axis=0).mean())


def head_pose(landmarks: np.ndarray) -> tuple[float, float]:
    """Yaw and pitch of a head, from its landmarks in the photograph or in the template.

    `yaw` is how far the nose is from the middle of eyes and mouth along the line of the eyes, in distances of the
    eyes. `pitch` is how far it is from its place in a frontal face along the line from the eyes to the mouth, in the
    length of that line. With the midpoints `eyes` and `mouth`, and `middle` half way between the two:

        yaw = (nose - middle) . (right - left) / |right - left|^2
        pitch = (nose - eyes) . (mouth - eyes) / |mouth - eyes|^2 - FRONTAL_NOSE

    where `left` and `right` are the eyes as they are in the picture. Both are 0 for a mean frontal face. Positive yaw
    looks to the right of the picture, positive pitch looks down; a mirrored face has the negative yaw. Roll,
    position and size of the face change neither, as both are measured on the face's own lines.

    They are tangents. The tip of the nose stands out of the plane of eyes and mouth by a length d. A head that turns
    by an angle a moves it by d sin(a) in the picture (in parallel projection), while the distances along the turn
    shrink by cos(a): yaw = d / |right - left| tan(a), with the distance of the unturned face; likewise pitch. Above
    `SIDE_VIEW` a face looks sideways. Near a profile the eyes come together, and yaw grows without bound, with the
    errors of the landmarks: its arctangent is bounded.

    Args:
        landmarks (`np.ndarray` of shape `(5, 2)`): eyes, nose, corners of the mouth; left in the picture first.

    Returns:
        NaN where the eyes, or eyes and mouth, are at one point.
    """
    left, right, nose, *corners = np.asarray(landmarks, np.float64)
    eyes, mouth = (left + right) / 2, (corners[0] + corners[1]) / 2
    across, down = right - left, mouth - eyes
    if not across.any() or not down.any():
        return float("nan"), float("nan")
    yaw = (nose - (eyes + mouth) / 2) @ across / (across @ across)
    pitch = (nose - eyes) @ down / (down @ down) - FRONTAL_NOSE
    return float(yaw), float(pitch)


def resize_aligned(face: np.ndarray, size: int = ALIGNED_SIZE) -> np.ndarray:
    """An aligned face at another size, bilinear.

    Args:
        face (`np.ndarray` of shape `(height, width, 3)`): RGB bytes.
        size (`int`, defaults to 112): height and width of the result.

    Raises:
        UnusableFaceError: it is not square, so not aligned.
    """
    height, width = face.shape[:2]
    if height != width:
        raise UnusableFaceError(f"not aligned: {width}x{height} is not square")
    if height == size:
        return face
    return np.asarray(PIL.Image.fromarray(face).resize((size, size), PIL.Image.Resampling.BILINEAR))
