"""Does a synthetic data set show real people, such as those of the training?"""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.utils import make_image_grid

from ..data.face_cache import FaceCache
from ..data.image_folder import GENERATION
from ..data.sources import open_source
from ..encoders import check_same_encoder
from ..faces import ALIGNED_SIZE, FaceEncoder
from ..files import complete_file, local_path
from ..hub.lineage import CARD, note_audit
from ..identities import CANDIDATE_ROWS, KNOWN_ROWS, IdentityBank, bank_hash, largest_cosines
from .face_set import FaceSet
from .figures import Description, Question
from .measure import Measure, conditions_of
from .plots import plot_histograms

# of the thresholds
FALSE_ACCEPT_RATES = (1e-3, 1e-4)
HISTOGRAM_BINS = 200_000


@dataclass
class LeakageReport:
    """
    Args:
        thresholds (`dict[float, float]`): false accept rate -> the cosine that this share of the real impostor pairs
            exceeds.
        impostor_pairs (`int`): the number of these pairs.
        image_cosines (`torch.Tensor` of shape `(N,)`): of each image to the nearest real embedding.
        image_nearest (`torch.Tensor` of shape `(N,)`): its position.
        identity_cosines (`dict[str, float]`): synthetic identity -> cosine of its mean embedding to the nearest real
            one.
        image_shares (`dict[float, float]`): false accept rate -> share of the images above its threshold.
        identity_shares (`dict[float, float]`): the same, of the identities.
        real_shares (`dict[float, float]`): the same, of the real images and the nearest one of another person: what to
            expect of strangers among so many.
    """

    thresholds: dict[float, float]
    impostor_pairs: int
    image_cosines: torch.Tensor
    image_nearest: torch.Tensor
    identity_cosines: dict[str, float]
    image_shares: dict[float, float]
    identity_shares: dict[float, float]
    real_shares: dict[float, float]


def _labels(names: list[str]) -> torch.Tensor:
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names])


def impostor_thresholds(
    real: IdentityBank, rates: tuple[float, ...] = FALSE_ACCEPT_RATES
) -> tuple[dict[float, float], int, torch.Tensor]:
    """Thresholds from the impostor pairs (of two identities) of a bank.

    Returns:
        False accept rate -> the cosine that at most this share of the pairs exceeds (to 1e-5); the number of pairs;
        and for each embedding the cosine to the nearest one of another identity, `(N,)`.

    Raises:
        ValueError: the bank has a single identity, so no impostors.
    """
    embeddings, labels = F.normalize(real.embeddings), _labels(real.names)
    pairs = int((len(labels) ** 2 - torch.bincount(labels).square().sum()) // 2)
    if not pairs:
        raise ValueError("all real embeddings are of one identity: there are no impostors to measure a threshold on.")
    counts, nearest = torch.zeros(HISTOGRAM_BINS, dtype=torch.long), torch.full((len(labels),), -1.0)
    for start in range(0, len(embeddings), CANDIDATE_ROWS):
        rows = slice(start, start + CANDIDATE_ROWS)
        for first in range(0, len(embeddings), KNOWN_ROWS):
            columns = slice(first, first + KNOWN_ROWS)
            similarity = embeddings[rows] @ embeddings[columns].T
            others = labels[rows, None] != labels[columns]
            # both directions of a pair are counted, and halved below
            bins = ((similarity[others] + 1) / 2 * HISTOGRAM_BINS).long().clamp(0, HISTOGRAM_BINS - 1)
            counts += torch.bincount(bins, minlength=HISTOGRAM_BINS)
            nearest[rows] = torch.maximum(nearest[rows], similarity.masked_fill(~others, -1).amax(dim=1))
    above = counts.flip(0).cumsum(0).flip(0) // 2  # pairs in this bin or a higher one
    edges = {rate: int((above > int(rate * pairs)).sum()) for rate in rates}
    return {rate: 2 * edge / HISTOGRAM_BINS - 1 for rate, edge in edges.items()}, pairs, nearest


def measure_leakage(synthetic: IdentityBank, real: IdentityBank) -> LeakageReport:
    """Cosine of every synthetic image, and of every synthetic identity, to the nearest real embedding, and how many
    are as near as two pictures of one person.

    Args:
        synthetic: one embedding per image; names are its identities.
        real: one embedding per image of real people, such as those of the training.

    Raises:
        ValueError: the banks are of two encoders, or `real` has a single identity.
    """
    synthetic, real = synthetic.one_per_row(), real.one_per_row()
    check_same_encoder("the synthetic bank", synthetic.encoder_mark, "the real one", real.encoder_mark)
    thresholds, pairs, of_real = impostor_thresholds(real)
    known, images = F.normalize(real.embeddings), F.normalize(synthetic.embeddings)
    cosines, nearest = largest_cosines(images, known)
    names = list(dict.fromkeys(synthetic.names))
    labels = _labels(synthetic.names)
    means = torch.zeros(len(names), images.shape[1]).index_add_(0, labels, images)
    of_identities = largest_cosines(F.normalize(means), known)[0]
    return LeakageReport(
        thresholds=thresholds,
        impostor_pairs=pairs,
        image_cosines=cosines,
        image_nearest=nearest,
        identity_cosines=dict(zip(names, of_identities.tolist(), strict=True)),
        image_shares={rate: (cosines > value).float().mean().item() for rate, value in thresholds.items()},
        identity_shares={rate: (of_identities > value).float().mean().item() for rate, value in thresholds.items()},
        real_shares={rate: (of_real > value).float().mean().item() for rate, value in thresholds.items()},
    )


class LeakageMeasure(Measure):
    """Whether real people are shown."""

    needs = ("recognizers", "against")
    figures = {
        "leakage_images": Description(
            "Images near a real face",
            "%",
            "Share of images whose nearest real embedding exceeds the threshold of real impostors.",
            Question.LEAK,
            real="leakage_strangers",
            headline=True,
        ),
        "leakage_identities": Description(
            "Identities near a real face",
            "%",
            "The same for the mean embedding of each identity.",
            Question.LEAK,
        ),
        "leakage_strangers": Description(
            "Real images near another person",
            "%",
            "The same for real images and the nearest other person: what to expect of strangers.",
            Question.LEAK,
        ),
        "leakage_largest": Description(
            "Largest cosine to a real face",
            "",
            "Largest cosine of any image to any real embedding.",
            Question.LEAK,
        ),
    }

    def check(self) -> None:
        assert self.inputs.against is not None
        if len(set(self.inputs.against.names)) < 2:
            raise ValueError(
                "`against` has a single identity: leakage is measured against impostors among real people."
            )

    def measure(self) -> None:
        assert self.inputs.against is not None
        against = self.inputs.against.one_per_row()
        recognizer = self.inputs.recognizer_of(against)
        found = measure_leakage(self.inputs.faces.bank(recognizer, self.inputs.cache), against)
        digest = hashlib.sha256(against.embeddings.contiguous().numpy().tobytes()).hexdigest()[:12]
        conditions = conditions_of(recognizer) | {"real": f"{len(against)} embeddings {digest}"}
        for rate, threshold in found.thresholds.items():
            values = {
                "leakage_images": found.image_shares[rate],
                "leakage_identities": found.identity_shares[rate],
                "leakage_strangers": found.real_shares[rate],
            }
            detail = f"{threshold:.3f} is exceeded by {rate:.2%} of {found.impostor_pairs:,} real impostor pairs."
            self.add(values, {**conditions, "FAR": f"{rate:g}"}, detail)
        self.add({"leakage_largest": found.image_cosines.max().item()}, conditions)
        marks = {f"FAR {rate:g} of real impostors": threshold for rate, threshold in found.thresholds.items()}
        plot = plot_histograms({"image to the nearest real face": found.image_cosines}, "cosine", marks)
        self.pictures.append((f"Nearest real face by {recognizer.name}", plot))


def audit_dataset(
    dataset: str | os.PathLike,
    encoder: FaceEncoder,
    real: IdentityBank,
    faces: FaceCache | None,
    plot: str | os.PathLike,
    worst: int = 8,
    log: Callable[[str], None] = lambda line: None,
) -> LeakageReport:
    """Embeds a data set, measures its leakage, and saves a picture of the worst images. Pictures that cannot be used
    are named and left out. Embeddings are kept in a folder beside the picture until it is written, so that the same
    call goes on where an earlier one was stopped. The result is noted in the card of a generated data set.

    Args:
        dataset: aligned faces in any form that `open_source` opens.
        encoder: of the real embeddings.
        real: embeddings of real people.
        faces: their pictures, in the same order: shown beside the worst images.
        plot: the picture's file.
        worst (`int`, defaults to 8): rows of the picture.
        log: is called with each line of a summary.

    Raises:
        ValueError: no picture can be used, the real embeddings are of another encoder, or `worst` is not positive.
    """
    if worst < 1:
        raise ValueError(f"`worst` has to be positive but is {worst}.")
    real = real.one_per_row()
    cache = Path(f"{plot}.cache")
    synthetic = FaceSet(open_source(dataset)).usable(dataset, cache, skip_unusable=True)
    for file, reason in synthetic.left_out.items():
        log(f"left out: {file}: {reason}")
    if synthetic.source.left_out:
        log(f"left out: {synthetic.left_out_of_source}")
    report = measure_leakage(synthetic.bank(encoder, cache), real)
    for line in _in_words(report, len(real)):
        log(line)
    order = report.image_cosines.argsort(descending=True)[:worst].tolist()
    nearest = report.image_nearest[order].tolist()
    for i, known in zip(order, nearest, strict=True):
        log(f"  {synthetic.photographs[i].file}: {report.image_cosines[i]:.3f} to {real.names[known]}")
    columns = [[synthetic.read(i) for i in order]]
    if faces is not None:
        size = (ALIGNED_SIZE, ALIGNED_SIZE)
        columns.append([PIL.Image.fromarray(picture).resize(size) for picture in faces.images(nearest)])
    cells = [picture for row in zip(*columns, strict=True) for picture in row]
    with complete_file(plot) as beside:
        make_image_grid(cells, rows=len(order), cols=len(columns)).save(beside, "png")
    shutil.rmtree(cache)
    _note_audit(local_path(dataset), report, real, faces, log)
    log(f"the worst are in {plot}" + (", each beside the nearest real face" if faces is not None else ""))
    return report


def _note_audit(
    dataset: Path, report: LeakageReport, real: IdentityBank, faces: FaceCache | None, log: Callable[[str], None]
) -> None:
    """Writes the result into the card of a generated data set."""
    if not ((dataset / GENERATION).is_file() and (dataset / CARD).is_file()):
        return
    shares = (report.image_shares, report.identity_shares, report.real_shares)
    audit = {
        "against": None if faces is None else faces.folder.resolve().name,
        "embeddings": len(real),
        "fingerprint": bank_hash(real),
        "encoder": real.identity_encoder,
        "encoder_fingerprint": real.identity_encoder_fingerprint,
        "images": len(report.image_cosines),
        "largest_cosine": round(float(report.image_cosines.max()), 4),
        "thresholds": [
            {"false_accept_rate": rate, "cosine": round(cosine, 4)}
            | dict(zip(("images", "identities", "strangers"), (share[rate] for share in shares), strict=True))
            for rate, cosine in report.thresholds.items()
        ],
    }
    try:
        note_audit(dataset / CARD, {name: value for name, value in audit.items() if value is not None})
        log(f"noted in {dataset / CARD}")
    except (OSError, ValueError) as error:
        log(f"not noted in {dataset / CARD}: {error}")


def _in_words(report: LeakageReport, number: int) -> list[str]:
    """The figures of a report against a number of real embeddings."""
    cosines, identities = report.image_cosines, np.array(list(report.identity_cosines.values()))
    lines = [
        f"{len(cosines)} images of {len(identities)} identities against {number} real embeddings",
        f"nearest real embedding: of images, mean {cosines.mean():.3f}, largest {cosines.max():.3f}",
        f"  of identities' mean embeddings, mean {identities.mean():.3f}, largest {identities.max():.3f}",
    ]
    for rate, threshold in report.thresholds.items():
        shares = (report.image_shares[rate], report.identity_shares[rate], report.real_shares[rate])
        images, means, strangers = (f"{100 * share:.2f} %" for share in shares)
        lines.append(
            f"above {threshold:.3f} (FAR {rate:g} of {report.impostor_pairs} real impostor pairs): {images} of the"
            f" images, {means} of the identities; of the real images, to another person's: {strangers}"
        )
    return lines
