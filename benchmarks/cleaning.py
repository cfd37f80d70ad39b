#!/usr/bin/env python
"""Plants flaws in real faces, runs `uiface clean` on them, prints what was found and what was wrongly listed.

    python benchmarks/cleaning.py --faces ../shared/assets/celeba_112 --encoder edgeface \
        --encoder-root ../shared/assets/insightface --work runs/cleaning

In 2,000 images there are 80 copies (byte for byte, encoded again, resized, mirrored, cropped, the last three also
together), 80 strangers (half of them people of the set) and 40 twins (one person's images under two names). A copy
counts as found if it, or what it is a copy of, is listed as a duplicate of the other; a twin if all images of one half
are listed with the other. False alarms are all other images that are listed.

The faces of `--faces` have copies of their own. Those that a difference hash tells, a measure that `uiface clean` does
not use, are not taken; the others count as false alarms. `alarms.png` in `--work` shows each beside the picture that
it was compared with.
"""

import argparse
import csv
import io
import json
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
from diffusers.utils import make_image_grid

from uiface_diffusers.data.sources import FolderSource
from uiface_diffusers.evaluation.cleaning import clean_dataset
from uiface_diffusers.faces import FaceEncoder

TWIN_IMAGES = 8  # of each half, at least
ALIKE = 10  # of the 64 bits of two hashes may differ in copies


def encoded(face: PIL.Image.Image, generator: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    face.save(buffer, "jpeg", quality=int(generator.integers(30, 91)))
    return buffer.getvalue()


def cropped(face: PIL.Image.Image, generator: np.random.Generator) -> PIL.Image.Image:
    """Up to 6 % cut off at each side."""
    width, height = face.size
    left, top, right, bottom = generator.uniform(0, 0.06, 4) * (width, height, width, height)
    box = (left, top, width - right, height - bottom)
    return face.resize(face.size, PIL.Image.Resampling.BICUBIC, box=box)


def resized(face: PIL.Image.Image, generator: np.random.Generator) -> PIL.Image.Image:
    side = int(generator.integers(56, 225))
    return face.resize((side, side), PIL.Image.Resampling.LANCZOS)


def make_copy(content: bytes, kind: str, generator: np.random.Generator) -> bytes:
    """The file of a copy."""
    face = PIL.Image.open(io.BytesIO(content)).convert("RGB")
    if kind == "byte for byte":
        return content
    if kind in ("mirrored", "all"):
        face = PIL.ImageOps.mirror(face)
    if kind in ("cropped", "all"):
        face = cropped(face, generator)
    if kind in ("resized", "all"):
        face = resized(face, generator)
    return encoded(face, generator)


KINDS = ("byte for byte", "encoded again", "resized", "mirrored", "cropped", "all")


def difference_hash(content: bytes) -> np.ndarray:
    """64 bits: where a picture of 9x8 pixels gets brighter from left to right."""
    gray = PIL.Image.open(io.BytesIO(content)).convert("L").resize((9, 8), PIL.Image.Resampling.BOX)
    return np.diff(np.asarray(gray, int), axis=1).ravel() > 0


class Planted:
    """A set with flaws, in `folder`, of the faces of a source."""

    def __init__(self, source: FolderSource, folder: Path, args: argparse.Namespace):
        self.folder, self.generator = folder, np.random.default_rng(args.seed)
        self.people: dict[str, list[bytes]] = {}
        hashes: dict[str, list[np.ndarray]] = {}
        for photograph in source.photographs:
            content, known = source.content(photograph), hashes.setdefault(photograph.identity, [])
            bits = difference_hash(content)
            if all((bits != other).sum() > ALIKE for other in known):
                known.append(bits)
                self.people.setdefault(photograph.identity, []).append(content)
        number = len(source.photographs)
        print(f"{number - sum(map(len, self.people.values()))} of {number} faces are copies by their hashes")
        self.written: Counter[str] = Counter()
        self.copies: dict[str, tuple[str, str]] = {}
        self.strangers: set[str] = set()
        self.twins: dict[str, str] = {}
        names = [str(name) for name in self.generator.permutation(sorted(self.people))]
        # every second stranger is an image of the set that is moved
        chosen = self._choose(names, args.images - args.copies - args.strangers // 2, args.twins)
        self._plant_twins(chosen, args.twins)
        others = [name for name in chosen if name not in self.twins.values()]
        self._plant_copies(others, args.copies)
        self._plant_strangers(others, [name for name in names if name not in chosen], args.strangers)

    def _write(self, identity: str, content: bytes) -> str:
        """The name of a new file."""
        (self.folder / identity).mkdir(parents=True, exist_ok=True)
        suffix = "png" if content.startswith(b"\x89PNG") else "jpg"
        name = f"{identity}/{self.written[identity]:04d}.{suffix}"
        self.written[identity] += 1
        (self.folder / name).write_bytes(content)
        return name

    def _choose(self, names: list[str], images: int, twins: int) -> list[str]:
        """Writes people, those with enough images for twins first, until there are so many images."""
        large = [name for name in names if len(self.people[name]) >= 2 * TWIN_IMAGES][:twins]
        chosen: list[str] = []
        for name in [*large, *(name for name in names if name not in large)]:
            taken = self.people[name][:images]
            # at least three images of each: strangers and copies need a majority
            taken = taken[:-2] if images - len(taken) in (1, 2) else taken
            if len(taken) >= 3:
                for content in taken:
                    self._write(name, content)
                chosen.append(name)
                images -= len(taken)
        return chosen

    def _plant_twins(self, chosen: list[str], number: int) -> None:
        for name in chosen[:number]:
            files = sorted((self.folder / name).iterdir())
            twin = f"{name}_twin"
            for file in self.generator.permutation(files)[: len(files) // 2]:
                self._write(twin, Path(file).read_bytes())
                Path(file).unlink()
            self.twins[twin] = name

    def _plant_copies(self, people: list[str], number: int) -> None:
        files = sorted(file for name in people for file in (self.folder / name).iterdir())
        for place, file in enumerate(self.generator.choice(files, number, replace=False)):
            kind = KINDS[place % len(KINDS)]
            copy = self._write(file.parent.name, make_copy(file.read_bytes(), kind, self.generator))
            self.copies[copy] = kind, f"{file.parent.name}/{file.name}"

    def _plant_strangers(self, people: list[str], elsewhere: list[str], number: int) -> None:
        """Half of them people of the set, by images that are moved."""
        for place in range(number):
            if place % 2:
                content = self.people[elsewhere[place // 2 % len(elsewhere)]][place // 2 // len(elsewhere)]
                into = str(self.generator.choice(people))
            else:
                home, into = (str(name) for name in self.generator.choice(people, 2, replace=False))
                known = {*self.copies, *self.strangers, *(original for _, original in self.copies.values())}
                names = sorted(file.name for file in (self.folder / home).iterdir())
                movable = [name for name in names if f"{home}/{name}" not in known]
                moved = self.folder / home / movable[0]
                content = moved.read_bytes()
                moved.unlink()
            self.strangers.add(self._write(into, content))

    def images(self) -> list[str]:
        return sorted(file.relative_to(self.folder).as_posix() for file in self.folder.glob("*/*"))


def count(planted: Planted, rows: list[dict[str, str]]) -> None:
    listed = {row["file"]: row for row in rows}
    duplicates = {frozenset((row["file"], row["other"])) for row in rows if row["reason"].startswith("duplicate")}
    by_kind = {kind: [0, 0] for kind in KINDS}
    for copy, (kind, original) in planted.copies.items():
        by_kind[kind][0] += frozenset((copy, original)) in duplicates
        by_kind[kind][1] += 1
    images = planted.images()
    expected = {*planted.copies, *(original for _, original in planted.copies.values()), *planted.strangers}
    strangers = sum(listed.get(file, {}).get("reason") == "stranger" for file in planted.strangers)
    twins = 0
    for twin, name in planted.twins.items():
        for one, other in ((twin, name), (name, twin)):
            files = [file for file in images if file.startswith(f"{one}/")]
            found = [listed.get(file, {}) for file in files]
            right = [row["file"] for row in found if (row.get("reason"), row.get("other")) == ("twin", other)]
            expected |= set(right)
            twins += len(right) == len(files)
    right_ones = sum(each for each, _ in by_kind.values()) + strangers + twins
    number = len(planted.copies) + len(planted.strangers) + len(planted.twins)
    for kind, (each, of) in by_kind.items():
        print(f"  copies, {kind:<14} {each} of {of}")
    print(f"  strangers             {strangers} of {len(planted.strangers)}")
    print(f"  twins                 {twins} of {len(planted.twins)}")
    print(f"found                   {right_ones} of {number}: {100 * right_ones / number:.1f} %")
    alarms = [row for row in rows if row["file"] not in expected]
    share = f"{len(alarms)} of {len(images)} images: {100 * len(alarms) / len(images):.2f} %"
    print(f"false alarms            {share} {dict(Counter(row['reason'] for row in alarms))}")
    show(planted.folder, alarms, planted.folder.parent / "alarms.png")


def show(folder: Path, alarms: list[dict[str, str]], path: Path) -> None:
    """Each alarm beside what it was compared with: a file, or the first image of an identity."""
    cells = []
    for row in alarms:
        other = folder / (row["other"] or row["identity"])
        print(f"  {row['file']}: {row['reason']}, {float(row['number']):.3f}, {row['other']}")
        other = other if other.is_file() else min(other.iterdir())
        cells += [PIL.Image.open(each).convert("RGB").resize((112, 112)) for each in (folder / row["file"], other)]
    if cells:
        columns = min(8, len(cells))
        cells += [PIL.Image.new("RGB", (112, 112))] * (-len(cells) % columns)
        make_image_grid(cells, rows=len(cells) // columns, cols=columns).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, required=True, help="aligned faces, one folder per person")
    parser.add_argument("--encoder", default="edgeface")
    parser.add_argument("--encoder-root", required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of the planted set and the list")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--copies", type=int, default=80)
    parser.add_argument("--strangers", type=int, default=80)
    parser.add_argument("--twins", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = args.work / "set"
    shutil.rmtree(folder, ignore_errors=True)
    planted = Planted(FolderSource(args.faces), folder, args)
    truth = {"copies": planted.copies, "strangers": sorted(planted.strangers), "twins": planted.twins}
    (args.work / "planted.json").write_text(json.dumps(truth, indent=1) + "\n")
    started = time.perf_counter()
    clean_dataset(folder, FaceEncoder(args.encoder, args.encoder_root), args.work / "list.csv", log=print)
    print(f"{time.perf_counter() - started:.0f} s")
    with open(args.work / "list.csv", newline="", encoding="utf-8") as file:
        count(planted, list(csv.DictReader(file)))


if __name__ == "__main__":
    main()
