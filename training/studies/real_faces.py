"""The real faces of the study: people who look like nobody of its tests, and faces of others to compare with."""

import argparse
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from uiface_diffusers import IdentityBank
from uiface_diffusers.evaluation.people import People
from uiface_diffusers.faces import ALIGNED_SIZE, FaceEncoder

# KID and the classifier test take a half of the references, and 1,000 faces at most
ENOUGH_REFERENCES = 2000


def write_faces(people: People, positions: Sequence[int], output: Path) -> None:
    """Real faces as `IDENTITY/NNNNN.png`; the folder is whole or not there at all."""
    beside = output.with_name(f"{output.name}.part")
    for folder in (beside, output):
        shutil.rmtree(folder, ignore_errors=True)
    for position, picture in zip(positions, people.pictures(positions), strict=True):
        file = beside / people.bank.names[position].replace("/", "-") / f"{position:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.resize((ALIGNED_SIZE, ALIGNED_SIZE), PIL.Image.Resampling.BILINEAR).save(file)
    beside.rename(output)


def choose_people(counts: Counter[str], number: int, images: int) -> dict[str, int]:
    """People of the arm -> how many faces of each: `number` with `images` faces, spread evenly over all who have so
    many; or, if there are not enough of them, as many faces of more people, those with most faces first."""
    full = sorted(name for name, count in counts.items() if count >= images)
    if len(full) >= number:
        return {full[i * len(full) // number]: images for i in range(number)}
    missing, chosen = number * images, {}
    for name in sorted(counts, key=lambda name: (-counts[name], name)):
        chosen[name] = min(counts[name], images, missing)
        missing -= chosen[name]
        if not missing:
            return chosen
    raise ValueError(
        f"{number * images - missing} real faces, {images} of a person at most, are of people who are not in the"
        f" benchmarks, {number * images} are needed: lower --faces, or give more --real."
    )


def write_real_faces(args: argparse.Namespace, groups: Sequence[Path], references: Path) -> None:
    """Writes the arm `real` and the references, once.

    Args:
        args: of a study.
        groups: folders of the arm, each of other people.
        references: folder of the faces of yet other people: as many as in a group at least.

    Raises:
        ValueError: there are not enough faces.
    """
    if all(folder.exists() for folder in (*groups, references)):
        return
    number, images = args.num_identities, args.images_per_identity
    people, encoder = People(args.real), FaceEncoder(args.encoder, args.encoder_root, det_size=160)
    faces = [
        PIL.Image.fromarray(benchmark.face(position))
        for benchmark in args.tests
        for position in {image: position for position, image in enumerate(benchmark.images)}.values()
    ]
    tested = IdentityBank(encoder.embed_pictures(faces), encoder.name, [], encoder.fingerprint)
    left_out = set(people.near(tested, args.same_person))
    print(f"{len(left_out)} real people look like one of the benchmarks and are left out: {sorted(left_out)}")

    chosen = choose_people(Counter(name for name in people.bank.names if name not in left_out), number, images)
    if len(chosen) > number:
        print(f"not {number} real people have {images} faces: the arm `real` is of {len(chosen)} people with fewer.")
    positions: dict[str, list[int]] = {name: [] for name in chosen}
    others: list[int] = []
    for position, name in enumerate(people.bank.names):
        if name not in positions:
            others += [] if name in left_out else [position]
        elif len(positions[name]) < chosen[name]:
            positions[name].append(position)
    size = number * images // len(groups)
    if len(others) < size:
        raise ValueError(f"{len(others)} real faces of other people are left: {size} are needed to compare with.")
    for first, folder in enumerate(groups):
        write_faces(people, [p for name in [*chosen][first :: len(groups)] for p in positions[name]], folder)
    drawn = np.random.default_rng(0).permutation(len(others))[: max(size, min(2 * size, ENOUGH_REFERENCES))]
    write_faces(people, [others[i] for i in sorted(drawn)], references)
