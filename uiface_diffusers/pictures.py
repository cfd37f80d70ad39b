"""From any picture to RGB bytes, and from bytes to [-1, 1] and back: the one place for both."""

import os
from collections.abc import Sequence
from typing import BinaryIO, cast

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

Picture = PIL.Image.Image | np.ndarray | str | os.PathLike


def scale_to_unit_range(values: torch.Tensor) -> torch.Tensor:
    """[0, 255] to [-1, 1], in the floating point type of the values; of bytes in float32."""
    return values / 127.5 - 1


def to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """Bytes to [-1, 1] in float32; what is floating point already is in [-1, 1] and stays as it is."""
    return scale_to_unit_range(pixels.float()) if pixels.dtype == torch.uint8 else pixels


def from_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to [0, 255], in floating point: not rounded, not clamped."""
    return (pixels + 1) * 127.5


def to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to bytes, rounded; what lies outside is clamped."""
    return from_unit_range(pixels).round().clamp(0, 255).byte()


def load_photograph(path: str | os.PathLike | BinaryIO) -> np.ndarray:
    """Reads a picture's file, or an open one, as `rgb_bytes` does: `(height, width, 3)` RGB bytes.

    Raises:
        OSError: the file is missing, truncated or not a picture.
    """
    try:
        with PIL.Image.open(path) as image:
            return rgb_bytes(image)
    except OSError:
        raise
    except Exception as error:  # damaged files raise nearly anything in Pillow's plug-ins
        raise OSError(f"{path} cannot be read: {error}") from error


def rgb_bytes(picture: Picture) -> np.ndarray:
    """A picture as people see it: turned as its EXIF tag says, transparent parts on white, 16 bits scaled to 8, gray,
    palette and CMYK converted.

    Args:
        picture: a file's path; a `PIL.Image.Image` of any mode, of which mode `I` counts as 8 bits if no value is
            over 255, otherwise as 16; or an array of `(height, width)` or `(height, width,
            1)` gray, `(height, width, 3)` RGB or `(height, width, 4)` RGBA, of uint8 in 0..255 or uint16 in 0..65535.

    Returns:
        `np.ndarray` of shape `(height, width, 3)`: RGB, uint8.

    Raises:
        OSError: the file is missing, truncated or not a picture.
        ValueError: an array of another shape or type, or a picture whose values have no defined range: floating
            point, or integers beyond 16 bits.
    """
    if isinstance(picture, str | os.PathLike):
        return load_photograph(picture)
    if isinstance(picture, PIL.Image.Image):
        return np.array(_to_rgb(PIL.ImageOps.exif_transpose(picture)))
    array = np.asarray(picture)
    channels = array.shape[2:] or (1,)
    if array.ndim not in (2, 3) or channels[0] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(
            f"a picture has to be (height, width), or (height, width, channels) with 1, 3 or 4 channels, but this is"
            f" of shape {array.shape}."
        )
    if array.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"a picture has to be of uint8 in 0..255 or uint16 in 0..65535 but this is {array.dtype}.")
    array = _to_8_bits(array) if array.dtype == np.uint16 else array
    if channels == (3,):
        return array
    return np.array(_to_rgb(PIL.Image.fromarray(array[..., 0] if array.ndim == 3 and channels == (1,) else array)))


def as_pictures(pictures: Picture | Sequence[Picture]) -> list[Picture]:
    """One picture that `rgb_bytes` takes, or several, as a list."""
    if isinstance(pictures, PIL.Image.Image | str | os.PathLike) or getattr(pictures, "ndim", None) in (2, 3):
        return [cast(Picture, pictures)]
    return list(cast(Sequence[Picture], pictures))


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    return (values / 257).round().astype(np.uint8)


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode == "F":
        raise ValueError("its floating point values have no defined range")
    if image.mode.startswith("I"):  # Pillow would clip instead of scaling
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its values from {values.min()} to {values.max()} are beyond 16 bits")
        # mode `I` has 32 bits for values of any range: an array of int32 may hold bytes
        in_bytes = image.mode == "I" and values.max() <= 255
        gray = values.astype(np.uint8) if in_bytes else _to_8_bits(values)
        if "transparency" in image.info:  # one value of gray
            gray[values == image.info["transparency"]] = 255
        return PIL.Image.fromarray(gray).convert("RGB")
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
