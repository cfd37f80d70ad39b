"""Toy sets of faces, and what is read from a report on one."""

from pathlib import Path

import numpy as np
import PIL.Image
from conftest import draw_person

# the names of folders come into the page
PEOPLE = ("<img src=x onerror=alert(1)>", "b&b", "carla", "dora")
IMAGES = 5


def face(person: int, index: int, seed: int = 0) -> PIL.Image.Image:
    """A disc with the person's color, at a place and with noise of its own."""
    generator = np.random.default_rng([seed, person, index])
    color = tuple(int(value) for value in np.random.default_rng(person).integers(0, 255, 3))
    x, y = (int(value) for value in generator.integers(46, 66, 2))
    picture = np.asarray(draw_person(color, ((x, y, 40),), size=(112, 112))).astype(int)
    return PIL.Image.fromarray((picture + generator.integers(-30, 30, picture.shape)).clip(0, 255).astype(np.uint8))


def write_set(root: Path, people=PEOPLE, images: int = IMAGES, seed: int = 0) -> Path:
    for person, name in enumerate(people):
        (root / name).mkdir(parents=True)
        for index in range(images):
            face(person, index, seed).save(root / name / f"{index:04d}.png")
    return root


def figures(report: dict, recognizer: str | None = None) -> dict[str, float]:
    return {
        each["name"]: each["value"]
        for each in report["figures"]
        if each["conditions"].get("recognizer") in (None, recognizer)
    }
