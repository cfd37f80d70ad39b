"""Images and identities that do not belong in a set: copies of an image, other people's faces under a name, one person
under two names. What is found is listed with the number that decided; the set itself is never changed.

The thresholds come from the set, by the encoder, with one share for all of them, `MISSED`:

- a stranger's mean cosine to the images of an identity is below the `stranger_cosine` in all but this share of the
  pairs of an image and another identity;
- the images of one identity have a mean cosine of at least `twin_cosine` to each other in all but this share of the
  identities, and so would the images of its two halves;
- a copy that was cropped, mirrored, made smaller and encoded again is as near to its picture as `duplicate_cosine` and
  `duplicate_distance` in all but this share of faces of the set, of which such copies are made.
"""

import csv
import io
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..data.convert import FORMATS, check_output, convert_dataset
from ..data.sources import open_source
from ..faces import ALIGNED_SIZE, FaceEncoder, Recognizer, unit_embeddings
from ..files import check_no_folder, complete_file, local_path
from .face_set import FaceSet, computed_once

MISSED = 0.01
# side of the pictures by which copies are told, and steps of their alignment
SIDE, STEPS = 24, 4
# how far a copy may be moved or stretched, in halves of a picture
MOST_MOVED = 0.15
# faces of which copies are made, and how: share cut off at each side, at most; share of the side; JPEG's quality
COPIES, CUT, SMALLER, QUALITY = 200, 0.05, 0.7, 60
# rows and columns of one matrix product; pairs of pictures that are compared at once
ROWS, PAIRS = 1024, 512
BINS = 20_000

DUPLICATE, STRANGER, TWIN, UNUSABLE = "duplicate", "stranger", "twin", "unusable"


@dataclass(frozen=True)
class Thresholds:
    """
    Args:
        duplicate_distance (`float`, *optional*): see `picture_distances`; two pictures of at most this distance,
        duplicate_cosine (`float`, *optional*): and at least this cosine, are one.
        stranger_cosine (`float`, *optional*): an image whose mean cosine to the other images of its identity is below
            it is another person's.
        twin_cosine (`float`, *optional*): identities are one person's if the cosines of their images to each other
            have at least this mean. `None` if there is a single identity.
    """

    duplicate_distance: float | None = None
    duplicate_cosine: float | None = None
    stranger_cosine: float | None = None
    twin_cosine: float | None = None


@dataclass(frozen=True)
class Finding:
    """One image that does not belong in a set, a row of the list.

    Args:
        file, identity (`str`): of the image.
        reason (`str`): `"duplicate"`, `"duplicate, byte for byte"`, `"stranger"`, `"twin"`, or `"unusable"` with what
            is wrong with the picture.
        number (`float`, *optional*): what decided: a duplicate's distance to `other`; a stranger's mean cosine to its
            identity; a twin's mean cosine to `other`.
        threshold (`float`, *optional*): what the number was compared with.
        other (`str`): the file that a duplicate is one of; the identity of which a stranger or a twin is, empty if a
            stranger is of none.
    """

    file: str
    identity: str
    reason: str
    number: float | None = None
    threshold: float | None = None
    other: str = ""


@dataclass(frozen=True)
class CleaningReport:
    """
    Args:
        findings (`list[Finding]`): in the order of the set.
        thresholds (`Thresholds`): those that were used.
        images, identities (`int`): of the set.
        kept_images, kept_identities (`int`): without the findings.
    """

    findings: list[Finding]
    thresholds: Thresholds
    images: int
    identities: int
    kept_images: int
    kept_identities: int


def clean_dataset(
    dataset: str | os.PathLike,
    encoder: FaceEncoder,
    list_file: str | os.PathLike = "cleaning.csv",
    output: str | os.PathLike | None = None,
    output_format: str = "imagefolder",
    duplicate_distance: float | None = None,
    duplicate_cosine: float | None = None,
    stranger_cosine: float | None = None,
    twin_cosine: float | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> CleaningReport:
    """Lists the images that do not belong in a set of aligned faces, and writes the set without them. The set itself
    is not changed. Embeddings are kept in a folder beside the list until it is written, so that the same call goes on
    where an earlier one was stopped.

    An image is listed once, for the first of these reasons: the picture cannot be used; it is of another person than
    its identity; its identity is the smaller one of two that are one person; it is a copy of an earlier image.

    Args:
        dataset: aligned faces in any form that `open_source` opens.
        encoder: embeds them.
        list_file: CSV, or parquet by its suffix: a row for each `Finding`.
        output (*optional*): folder of the set without them, see `convert_dataset`; none is written if not given.
        output_format (`str`, defaults to `"imagefolder"`): its form.
        duplicate_distance, duplicate_cosine, stranger_cosine, twin_cosine (*optional*): see `Thresholds`; measured on
            the set if not given.
        log: is called with each line of a summary.

    Raises:
        ValueError: the set has too few identities or images to measure a threshold on, `output` is not empty, or
            nothing would be left.
    """
    list_file = local_path(list_file)
    check_no_folder(list_file)
    if output_format not in FORMATS:
        raise ValueError(f"`output_format` has to be one of {FORMATS} but is {output_format!r}.")
    if output is not None:
        check_output(dataset, output)
    opened = FaceSet(open_source(dataset))
    given = Thresholds(duplicate_distance, duplicate_cosine, stranger_cosine, twin_cosine)
    _check_measurable(opened, given)
    cache = Path(f"{list_file}.cache")
    faces = opened.usable(dataset, cache, skip_unusable=True)
    if opened.source.left_out:
        log(f"left out: {opened.left_out_of_source}")
    findings, thresholds = find_flaws(faces, encoder, cache, given)
    places = {photograph.file: place for place, photograph in enumerate(opened.photographs)}
    for file, reason in faces.left_out.items():
        findings.append(Finding(file, opened.photographs[places[file]].identity, f"{UNUSABLE}: {reason}"))
    findings.sort(key=lambda finding: places[finding.file])
    without = {finding.file: finding.reason for finding in findings}
    kept = Counter(photograph.identity for photograph in opened.photographs if photograph.file not in without)
    if not kept:
        raise ValueError(f"nothing would be left of {dataset}: is the encoder right for these faces?")
    report = CleaningReport(findings, thresholds, len(opened), len(opened.identities), kept.total(), len(kept))
    write_findings(findings, list_file)
    for line in _in_words(report):
        log(line)
    log(f"listed in {list_file}")
    if output is not None:
        step = {
            "by": f"uiface clean --format {output_format}",
            "encoder": encoder.name,
            "encoder_fingerprint": encoder.fingerprint,
            "thresholds": {name: value for name, value in asdict(thresholds).items() if value is not None},
            "taken_out": dict(Counter(finding.reason.partition(":")[0] for finding in findings)),
        }
        convert_dataset(dataset, output, output_format, without=without, step=step)
        log(f"{report.kept_images} images of {report.kept_identities} identities are in {output}")
    shutil.rmtree(cache)
    return report


def _check_measurable(faces: FaceSet, given: Thresholds) -> None:
    """
    Raises:
        ValueError: a threshold is neither given nor can be measured.
    """
    if len(faces.identities) < 2 and given.stranger_cosine is None:
        raise ValueError(
            "the set has a single identity, so no strangers to measure a threshold on: give `stranger_cosine`"
            " (--stranger-cosine)."
        )
    if given.twin_cosine is None and 1 < len(faces.identities) == len(faces):
        raise ValueError(
            "no identity has two images, so no threshold of one person can be measured: give `twin_cosine`"
            " (--twin-cosine)."
        )


def find_flaws(
    faces: FaceSet, recognizer: Recognizer, cache: Path, given: Thresholds
) -> tuple[list[Finding], Thresholds]:
    """Strangers, then twins, then duplicates; and the thresholds.

    Args:
        faces: all of them usable.
        recognizer: embeds them.
        cache: folder that keeps what takes long.
        given: thresholds that are not to be measured.
    """
    embeddings, labels, names = faces.embed(recognizer, cache), faces.labels, list(faces.identities)
    pictures = small_pictures(faces, cache)

    stranger_cosine = given.stranger_cosine
    if stranger_cosine is None:
        stranger_cosine = other_identity_cosine(embeddings, labels)
    strangers = find_strangers(embeddings, labels, stranger_cosine)
    kept = torch.ones(len(faces), dtype=torch.bool)
    kept[list(strangers)] = False

    means, counts = identity_means(embeddings[kept], labels[kept], len(names))
    twin_cosine = given.twin_cosine
    if twin_cosine is None and len(names) > 1:
        twin_cosine = same_identity_cosine(means, counts, at_least=stranger_cosine)
    twins = {} if twin_cosine is None else find_twins(means, counts, twin_cosine)
    kept &= ~torch.isin(labels, torch.tensor(list(twins), dtype=torch.long))

    distance, cosine = given.duplicate_distance, given.duplicate_cosine
    if distance is None or cosine is None:
        cosines, distances = copies_of_faces(faces, recognizer, cache).unbind(dim=1)
        distance = float(distances.quantile(1 - MISSED)) if distance is None else distance
        cosine = float(cosines.quantile(MISSED)) if cosine is None else cosine
    duplicates = find_duplicates(embeddings, pictures, kept, cosine, distance)

    def finding(position: int, reason: str, number: float, threshold: float | None, other: str) -> Finding:
        return Finding(faces.photographs[position].file, faces.names[position], reason, number, threshold, other)

    found = []
    for position, score in strangers.items():
        scores = means @ embeddings[position]
        nearest = int(scores.argmax())
        known = twin_cosine is not None and scores[nearest] >= twin_cosine
        found.append(finding(position, STRANGER, score, stranger_cosine, names[nearest] if known else ""))
    for position, label in enumerate(labels.tolist()):
        if label in twins and position not in strangers:
            score, other = twins[label]
            found.append(finding(position, TWIN, score, twin_cosine, names[other]))
    for position, (apart, first) in duplicates.items():
        photographs = faces.photographs[position], faces.photographs[first]
        # equal pictures are 0 apart, up to rounding
        same = apart < 1e-4 and len({faces.source.content(photograph) for photograph in photographs}) == 1
        reason = f"{DUPLICATE}, byte for byte" if same else DUPLICATE
        found.append(finding(position, reason, apart, distance, photographs[1].file))
    return found, Thresholds(distance, cosine, stranger_cosine, twin_cosine)


def identity_means(
    embeddings: torch.Tensor, labels: torch.Tensor, identities: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean embedding `(I, D)` of each identity, not of unit length, and the number of its images `(I,)`. The product
    with an embedding is the mean cosine to the identity's images."""
    counts = torch.bincount(labels, minlength=identities)
    sums = torch.zeros(identities, embeddings.shape[1]).index_add_(0, labels, embeddings)
    return sums / counts.clamp(min=1)[:, None], counts


def other_identity_cosine(embeddings: torch.Tensor, labels: torch.Tensor, share: float = MISSED) -> float:
    """The mean cosine to the images of an identity that at most a share of the images of others exceeds, to 1e-4.
    Identities that may be one person are not compared: those with half of what the images of one identity have in the
    median. In a small set, a single such pair would be more than the share.

    Args:
        embeddings (`torch.Tensor` of shape `(N, D)`): of unit length.
        labels (`torch.Tensor` of shape `(N,)`): numbers of the identities, two at least.
    """
    means, numbers = identity_means(embeddings, labels, int(labels.max()) + 1)
    within = _within_identities(means, numbers)
    one_person = float(within.median()) / 2 if len(within) else float("inf")
    counts = torch.zeros(BINS, dtype=torch.long)
    for start in range(0, len(embeddings), ROWS):
        rows = slice(start, start + ROWS)
        scores = embeddings[rows] @ means.T
        others = (labels[rows, None] != torch.arange(len(means))) & (means[labels[rows]] @ means.T < one_person)
        bins = ((scores[others] + 1) / 2 * BINS).long().clamp(0, BINS - 1)
        counts += torch.bincount(bins, minlength=BINS)
    above = counts.flip(0).cumsum(0).flip(0)  # in this bin or a higher one
    edge = int((above > share * counts.sum()).sum())
    return 2 * edge / BINS - 1


def _within_identities(means: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean cosine of two images of an identity, of each that has several; in float64."""
    several = counts > 1
    number = counts[several].double()
    return (means[several].double().square().sum(dim=1) * number.square() - number) / (number * (number - 1))


def same_identity_cosine(means: torch.Tensor, counts: torch.Tensor, at_least: float, share: float = MISSED) -> float:
    """The mean cosine of two images of an identity that all but a share of the identities reach, those of one image
    left out.

    Args:
        means, counts: see `identity_means`.
        at_least (`float`): identities of one person are nearer than strangers.
    """
    within = _within_identities(means, counts)
    return max(float(within.quantile(share)), at_least) if len(within) else at_least


def find_strangers(embeddings: torch.Tensor, labels: torch.Tensor, threshold: float) -> dict[int, float]:
    """Images that are far from their identity -> mean cosine to its other images. The farthest is taken out first, and
    those left are compared with each other: a few strangers do not make a stranger of the others. Of two images that
    are not of one person, the first stays.

    Args:
        embeddings (`torch.Tensor` of shape `(N, D)`): of unit length.
        labels (`torch.Tensor` of shape `(N,)`): numbers of the identities.
        threshold (`float`): the least mean cosine.
    """
    order = labels.argsort(stable=True)
    found: dict[int, float] = {}
    for members in order.split(torch.bincount(labels).tolist()):
        own = embeddings[members]
        cosines = (own @ own.T).double().fill_diagonal_(0)
        sums, left = cosines.sum(dim=1), list(range(len(members)))
        while len(left) > 1:
            worst = min(reversed(left), key=lambda each: float(sums[each]))
            score = float(sums[worst]) / (len(left) - 1)
            if score >= threshold:
                break
            found[int(members[worst])] = score
            left.remove(worst)
            sums -= cosines[:, worst]
    return found


def pairs_above(
    rows: torch.Tensor, threshold: float, progress: str = ""
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of rows `(N, D)` whose product is at least a threshold: `(P, 2)`, the smaller number first, and the
    products `(P,)`, in blocks."""
    starts = [(start, first) for start in range(0, len(rows), ROWS) for first in range(start, len(rows), ROWS)]
    for start, first in tqdm(starts, desc=progress, unit="block", disable=not progress):
        products = rows[start : start + ROWS] @ rows[first : first + ROWS].T
        if start == first:
            products = products.triu(1).masked_fill(torch.ones_like(products).tril().bool(), -float("inf"))
        found = (products >= threshold).nonzero()
        if not len(found):
            continue
        yield found + torch.tensor([start, first]), products[found[:, 0], found[:, 1]]


def find_twins(means: torch.Tensor, counts: torch.Tensor, threshold: float) -> dict[int, tuple[float, int]]:
    """Identities that are one person -> mean cosine to the images of a larger one (of two of equal size, the first),
    and its number.

    Args:
        means, counts: see `identity_means`.
        threshold (`float`): the least mean cosine.
    """
    order = counts.argsort(descending=True, stable=True)
    order = order[counts[order] > 0]
    near: dict[int, list[tuple[float, int]]] = {}
    for pairs, scores in pairs_above(means[order], threshold):
        for (larger, smaller), score in zip(pairs.tolist(), scores.tolist(), strict=True):
            near.setdefault(smaller, []).append((score, larger))
    found: dict[int, tuple[float, int]] = {}
    for smaller in sorted(near):
        kept = [(score, larger) for score, larger in near[smaller] if int(order[larger]) not in found]
        if kept:
            score, larger = max(kept)
            found[int(order[smaller])] = score, int(order[larger])
    return found


def small_picture(face: PIL.Image.Image) -> torch.Tensor:
    """`(SIDE, SIDE)` gray bytes of a face, by which copies are told."""
    small = face.convert("L").resize((SIDE, SIDE), PIL.Image.Resampling.BOX)
    return torch.from_numpy(np.array(small))


def small_pictures(faces: FaceSet, cache: Path) -> torch.Tensor:
    """`small_picture` of all faces, `(N, SIDE, SIDE)`; `cache` keeps them."""

    def compute(rows: range) -> torch.Tensor:
        return torch.stack([small_picture(faces.read(row)) for row in rows])

    return computed_once(cache / f"pictures-{faces.key}", len(faces), compute, "shrink")


def picture_distances(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """How much of a picture another one does not explain: the share of its variance that is left when the other was
    mirrored or not, moved, stretched and turned a little, and made brighter or darker. 0 of copies; 1 of pictures that
    have nothing in common.

    Args:
        first, second (`torch.Tensor` of shape `(P, SIDE, SIDE)`): gray.

    Returns:
        `torch.Tensor` of shape `(P,)`.
    """
    mirrored = second.flip(2)
    closer = _left_over(first, mirrored) < _left_over(first, second)
    second = torch.where(closer[:, None, None], mirrored, second)
    # of a picture and a cut of it, only the picture can be moved onto the other
    return torch.minimum(_aligned_distance(first, second), _aligned_distance(second, first))


def _left_over(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Share of the second pictures' variance that a multiple of the first ones, plus a constant, does not explain."""
    a, b = (each.flatten(1) - each.flatten(1).mean(dim=1, keepdim=True) for each in (first, second))
    squares = a.square().sum(dim=1), b.square().sum(dim=1)
    shared = (a * b).sum(dim=1).square() / (squares[0] * squares[1]).clamp(min=1e-6)
    # two pictures of one color each are equal
    uniform = (squares[0] < 1) & (squares[1] < 1)
    return torch.where(uniform, torch.zeros_like(shared), (1 - shared).clamp(min=0))


def _aligned_distance(moved: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The least `_left_over` while `moved` is brought onto `target`: an affine map and a gain, by least squares on the
    picture and its derivatives (Lucas & Kanade 1981), a few times."""
    side = moved.shape[1]
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij")
    same = torch.eye(2, 3).expand(len(moved), 2, 3)
    affine, best = same, torch.full((len(moved),), float("inf"))
    wanted = (target.flatten(1) - target.flatten(1).mean(dim=1, keepdim=True))[..., None]
    for step in range(STEPS):
        grid = F.affine_grid(affine, [len(moved), 1, side, side], align_corners=True)
        now = F.grid_sample(moved[:, None], grid, align_corners=True, padding_mode="border")[:, 0]
        best = torch.minimum(best, _left_over(now, target))
        if step == STEPS - 1:
            break
        down, right = torch.gradient(now, spacing=2 / (side - 1), dim=(1, 2))
        columns = torch.stack([now, right * x, right * y, right, down * x, down * y, down], dim=-1).flatten(1, 2)
        columns = columns - columns.mean(dim=1, keepdim=True)
        products = columns.mT @ columns
        # a little of the diagonal: pictures without structure give no equations
        products = products + torch.diag_embed(1e-4 * products.diagonal(dim1=1, dim2=2) + 1e-3)
        solved = torch.linalg.solve(products, columns.mT @ wanted)[..., 0]
        moves = solved[:, 1:] / solved[:, :1].clamp(min=0.2)
        affine = (affine + moves.clamp(-0.1, 0.1).view(-1, 2, 3)).clamp(same - MOST_MOVED, same + MOST_MOVED)
    return best


def find_duplicates(
    embeddings: torch.Tensor, pictures: torch.Tensor, kept: torch.Tensor, cosine: float, distance: float
) -> dict[int, tuple[float, int]]:
    """Images that are copies -> distance to the nearest earlier one that is none, and its position.

    Args:
        embeddings (`torch.Tensor` of shape `(N, D)`): of unit length.
        pictures (`torch.Tensor` of shape `(N, SIDE, SIDE)`): see `small_picture`.
        kept (`torch.Tensor` of shape `(N,)`): which ones are looked at.
        cosine, distance (`float`): see `Thresholds`.
    """
    positions = kept.nonzero().flatten()
    near: dict[int, list[tuple[float, int]]] = {}
    for pairs, _ in pairs_above(embeddings[positions], cosine, progress="duplicates"):
        for part in positions[pairs].split(PAIRS):
            apart = picture_distances(*(pictures[part[:, side]].float() for side in (0, 1)))
            close = apart <= distance
            for (first, second), number in zip(part[close].tolist(), apart[close].tolist(), strict=True):
                near.setdefault(second, []).append((number, first))
    found: dict[int, tuple[float, int]] = {}
    for second in sorted(near):
        originals = [(number, first) for number, first in near[second] if first not in found]
        if originals:
            found[second] = min(originals)
    return found


def copy_of_face(face: PIL.Image.Image, generator: np.random.Generator) -> PIL.Image.Image:
    """A face cut at each side, mirrored or not, made smaller, encoded as JPEG, and at 112x112 again."""
    left, top, right, bottom = generator.uniform(0, CUT, 4) * ALIGNED_SIZE
    size = (round(SMALLER * ALIGNED_SIZE),) * 2
    box = (left, top, ALIGNED_SIZE - right, ALIGNED_SIZE - bottom)
    copy = face.resize(size, PIL.Image.Resampling.BILINEAR, box=box)
    if generator.random() < 0.5:
        copy = PIL.ImageOps.mirror(copy)
    buffer = io.BytesIO()
    copy.save(buffer, "jpeg", quality=QUALITY)
    with PIL.Image.open(buffer) as encoded:
        return encoded.convert("RGB").resize((ALIGNED_SIZE,) * 2, PIL.Image.Resampling.BILINEAR)


def copies_of_faces(faces: FaceSet, recognizer: Recognizer, cache: Path) -> torch.Tensor:
    """Cosine and distance `(P, 2)` of faces, drawn from the set, to a copy of each; `cache` keeps them."""
    drawn = faces.sample(COPIES)

    def compute(rows: range) -> torch.Tensor:
        originals = [drawn.read(row) for row in rows]
        copies = [copy_of_face(face, np.random.default_rng(row)) for row, face in zip(rows, originals, strict=True)]
        first, second = (
            torch.from_numpy(unit_embeddings(recognizer, [np.asarray(face) for face in each]))
            for each in (originals, copies)
        )
        small = (torch.stack([small_picture(face) for face in each]).float() for each in (originals, copies))
        return torch.stack([(first * second).sum(dim=1), picture_distances(*small)], dim=1).float()

    return computed_once(cache / f"copies-{recognizer.fingerprint}-{drawn.key}", len(drawn), compute, "copies")


def write_findings(findings: Sequence[Finding], path: Path) -> None:
    """A row for each, as CSV, or as parquet where the file is called so."""
    names = [field.name for field in fields(Finding)]
    rows = [asdict(finding) for finding in findings]
    with complete_file(path) as beside:
        if path.suffix.lower() == ".parquet":
            kinds = [pa.float64() if name in ("number", "threshold") else pa.string() for name in names]
            pq.write_table(pa.Table.from_pylist(rows, pa.schema(zip(names, kinds, strict=True))), beside)
            return
        with open(beside, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)


def _in_words(report: CleaningReport) -> list[str]:
    thresholds = report.thresholds
    counts = Counter(finding.reason.partition(":")[0] for finding in report.findings)
    lines = [
        f"{report.images} images of {report.identities} identities; {len(report.findings)} images do not belong there:"
    ]
    meaning: Mapping[str, str] = {
        UNUSABLE: "cannot be used",
        STRANGER: f"a mean cosine below {thresholds.stranger_cosine:.3f} to their identity",
        TWIN: "of identities that are one person with a larger one"
        + ("" if thresholds.twin_cosine is None else f", mean cosine {thresholds.twin_cosine:.3f} or more"),
        DUPLICATE: f"a distance of at most {thresholds.duplicate_distance:.3f} and a cosine of at least"
        f" {thresholds.duplicate_cosine:.3f} to an earlier image",
        f"{DUPLICATE}, byte for byte": "the same file as an earlier image",
    }
    return lines + [f"  {counts[reason]} {reason}: {text}" for reason, text in meaning.items()]
