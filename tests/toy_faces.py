"""Aligned faces of people who can be told apart by a tiny recognizer."""

import io
import pickle
from pathlib import Path

import numpy as np
import PIL.Image

IDENTITIES, IMAGES, SIZE = 8, 12, 32


def toy_face(identity: int, index: int, size: int = SIZE) -> PIL.Image.Image:
    """A coarse pattern of the identity's colors, shifted, dimmed, with noise."""
    pattern = np.random.default_rng(identity).integers(40, 216, (5, 5, 3), dtype=np.uint8)
    generator = np.random.default_rng((identity, index))
    face = PIL.Image.fromarray(pattern).resize((size + 8, size + 8), PIL.Image.Resampling.BICUBIC)
    x, y = (int(value) for value in generator.integers(0, 8, 2))
    face = np.asarray(face.crop((x, y, x + size, y + size)), np.float32) * generator.uniform(0.6, 1.1)
    return PIL.Image.fromarray((face + generator.normal(0, 10, face.shape)).clip(0, 255).astype(np.uint8))


def write_faces(root: Path, identities: int = IDENTITIES, images: int = IMAGES, size: int = SIZE) -> Path:
    for identity in range(identities):
        folder = root / f"person_{identity}"
        folder.mkdir(parents=True)
        for index in range(images):
            toy_face(identity, index, size).save(folder / f"{index:04d}.png")
    return root


def write_benchmark(path: Path, pairs: int = 20) -> None:
    """Pairs of one person and of two in turn, as InsightFace's `.bin`."""
    images = []
    for i in range(pairs):
        for identity, index in ((i % 5, i), ((i % 5 + i % 2), i + 100)):
            buffer = io.BytesIO()
            toy_face(identity, index, 112).save(buffer, "png")
            images.append(buffer.getvalue())
    path.write_bytes(pickle.dumps((images, [i % 2 == 0 for i in range(pairs)])))
