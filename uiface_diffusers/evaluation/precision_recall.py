"""Improved Precision and Recall (Kynkaanniemi et al., NeurIPS 2019): how much of the synthetic images lies among the
real ones, and how much of the real ones among the synthetic.

A set's manifold is the union of balls about its images' features, each as wide as the distance to the k-th nearest
other image of the set. Distances are squared Euclidean, in float64 and in blocks: the full matrix is never held.

Precision does not see broken faces: smeared ones had 0.93. The measures of `realism.py` see them.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from .face_set import FaceSet
from .figures import Description, Question
from .measure import Measure, conditions_of

# rows and columns of one matrix product: 1024 x 4096 distances are 32 MiB
ROWS, COLUMNS = 1024, 4096
# squared distances below this share of the squared norms are rounding: equal features
EQUAL = 1e-13


@dataclass
class ClassPrecisionRecall:
    """
    Args:
        precision (`float`): mean over the identities of an identity's precision.
        recall (`float`): of its recall; with Inception features and real pictures of the same people this is DCFace's
            intra-class diversity (Kim et al. 2023, equation 15).
        identities (`int`): how many had more than k images in both sets.
    """

    precision: float
    recall: float
    identities: int


def _squared_distances(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    rows, columns = rows.double(), columns.double()
    norms = rows.square().sum(dim=1)[:, None] + columns.square().sum(dim=1)
    distances = norms - 2 * rows @ columns.T
    return distances.masked_fill(distances < EQUAL * norms, 0)


def neighbor_radii(features: torch.Tensor, k: int = 3, progress: bool = False) -> torch.Tensor:
    """Squared distance of each image to its k-th nearest other one.

    Args:
        features (`torch.Tensor` of shape `(N, D)`).
        k (`int`, defaults to 3): as in the paper.

    Returns:
        `torch.Tensor` of shape `(N,)`, float64.

    Raises:
        ValueError: fewer than k other images.
    """
    if not 1 <= k < len(features):
        raise ValueError(f"{len(features)} images have no {k}-th nearest other one.")
    radii = []
    for start in tqdm(range(0, len(features), ROWS), desc="radii", unit="block", disable=not progress):
        rows = features[start : start + ROWS]
        nearest = torch.empty(len(rows), 0, dtype=torch.float64)
        for first in range(0, len(features), COLUMNS):
            distances = _squared_distances(rows, features[first : first + COLUMNS])
            own = torch.arange(start, start + len(rows))[:, None] == torch.arange(first, first + distances.shape[1])
            nearest = torch.cat([nearest, distances.masked_fill(own, float("inf"))], dim=1)
            nearest = nearest.topk(min(k, nearest.shape[1]), largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def share_within(features: torch.Tensor, centers: torch.Tensor, radii: torch.Tensor, progress: bool = False) -> float:
    """Share of images that lie in a ball (or on its surface) about any center.

    Args:
        features (`torch.Tensor` of shape `(N, D)`).
        centers (`torch.Tensor` of shape `(M, D)`).
        radii (`torch.Tensor` of shape `(M,)`): squared.
    """
    within = 0
    for start in tqdm(range(0, len(features), ROWS), desc="within", unit="block", disable=not progress):
        rows = features[start : start + ROWS]
        found = torch.zeros(len(rows), dtype=torch.bool)
        for first in range(0, len(centers), COLUMNS):
            columns = slice(first, first + COLUMNS)
            found |= (_squared_distances(rows, centers[columns]) <= radii[columns]).any(dim=1)
        within += int(found.sum())
    return within / len(features)


def improved_precision_recall(
    real: torch.Tensor, synthetic: torch.Tensor, k: int = 3, progress: bool = False
) -> tuple[float, float]:
    """Precision (share of synthetic images within the real manifold) and recall (share of real images within the
    synthetic manifold). Both depend on the number of images: compare equal numbers.

    Args:
        real (`torch.Tensor` of shape `(N, D)`): features of real images.
        synthetic (`torch.Tensor` of shape `(M, D)`): of synthetic ones, by the same network.
        k (`int`, defaults to 3): neighbor that gives a ball its radius.

    Raises:
        ValueError: a set has k images or fewer.
    """
    precision = share_within(synthetic, real, neighbor_radii(real, k, progress), progress)
    recall = share_within(real, synthetic, neighbor_radii(synthetic, k, progress), progress)
    return precision, recall


def class_precision_recall(
    real: torch.Tensor,
    real_names: Sequence[str],
    synthetic: torch.Tensor,
    synthetic_names: Sequence[str],
    k: int = 3,
) -> ClassPrecisionRecall:
    """Precision and recall of each identity's synthetic images against the real images of the *same person*, averaged
    over the identities. It needs images that were conditioned on real people: a name has to mean the same person in
    both sets. Identities without more than k images in both are left out.

    Args:
        real, synthetic, k: as of `improved_precision_recall`.
        real_names, synthetic_names: the identity of each image.

    Raises:
        ValueError: no identity is in both sets with more than k images.
    """
    positions: list[dict[str, list[int]]] = [defaultdict(list), defaultdict(list)]
    for names, by_name in zip((real_names, synthetic_names), positions, strict=True):
        for position, name in enumerate(names):
            by_name[name].append(position)
    of_real, of_synthetic = positions
    shared = [name for name in of_synthetic if min(len(of_synthetic[name]), len(of_real.get(name, ()))) > k]
    if not shared:
        raise ValueError(f"no identity has more than {k} images in both sets, under the same name.")
    figures = [improved_precision_recall(real[of_real[name]], synthetic[of_synthetic[name]], k) for name in shared]
    precision, recall = torch.tensor(figures, dtype=torch.float64).mean(dim=0).tolist()
    return ClassPrecisionRecall(precision, recall, len(shared))


class PrecisionRecallMeasure(Measure):
    """How much of the set lies among real faces, and how much of these among the set."""

    needs = ("features", "references")
    figures = {
        "precision": Description(
            "Improved precision",
            "%",
            "Share of the set's images that lie among the real ones. Broken faces can pass; KID and the classifier"
            " test see them.",
            Question.REAL,
        ),
        "recall": Description(
            "Improved recall",
            "%",
            "Share of real images that lie among those of the set.",
            Question.DIVERSE,
            headline=True,
        ),
    }

    def check(self) -> None:
        number = self._share() * len(self.inputs.references)
        if number <= self.settings.neighbors:
            raise ValueError(f"sets of {number} images are too small for {self.settings.neighbors} neighbors.")

    def _share(self) -> int:
        """How many images are taken of each real set: equal parts, as many in all as of the set."""
        faces, references = self.inputs.faces, self.inputs.references
        return min(min(len(faces), self.settings.max_images) // len(references), *map(len, references))

    def measure(self) -> None:
        inputs, seed, k, share = self.inputs, self.settings.seed, self.settings.neighbors, self._share()
        faces = inputs.faces.sample(share * len(inputs.references), seed)
        references = FaceSet.join([each.sample(share, seed) for each in inputs.references])
        ours, theirs = (inputs.features_of(each, inputs.features) for each in (faces, references))
        conditions = conditions_of(inputs.features, "features") | {"k": k, "images": len(faces)}
        conditions |= {"real": f"{inputs.real_name} {references.key}"}
        precision, recall = improved_precision_recall(theirs, ours, k, progress=True)
        self.add({"precision": precision, "recall": recall}, conditions)
        if not inputs.same_people:
            self.notes.append(
                "Precision and recall are of the whole sets. Within identities they exist only of faces conditioned on"
                " real people (--same-people)."
            )


class ClassPrecisionRecallMeasure(Measure):
    """How much of a person's images lies among the real ones of that person."""

    needs = ("features", "references", "same_people")
    figures = {
        "class_precision": Description(
            "Improved precision within identities",
            "%",
            "Share of a person's images that lie among the real images of that person, averaged over people.",
            Question.REAL,
        ),
        "class_recall": Description(
            "Improved recall within identities",
            "%",
            "Share of a person's real images that lie among the set's images of that person, averaged over people."
            " With Inception features, this is DCFace's D_intra.",
            Question.DIVERSE,
        ),
    }

    def check(self) -> None:
        self.references = FaceSet.join(self.inputs.references)
        k, ours, theirs = self.settings.neighbors, Counter(self.inputs.faces.names), Counter(self.references.names)
        self.people = {name for name, count in ours.items() if min(count, theirs[name]) > k}
        if not self.people:
            raise ValueError(f"no identity has more than {k} images under the same name in both sets.")

    def measure(self) -> None:
        inputs, k = self.inputs, self.settings.neighbors
        people = inputs.faces.of_identities(self.people)
        faces = people.sample_identities(self.settings.max_images, self.settings.seed)
        references = self.references.of_identities(faces.identities)
        ours, theirs = (inputs.features_of(each, inputs.features) for each in (faces, references))
        conditions = conditions_of(inputs.features, "features") | {"k": k, "images of each": faces.images_of_each}
        conditions |= {"real": f"{inputs.real_name} {references.key}"}
        conditions |= {"real images of each": references.images_of_each}
        within = class_precision_recall(theirs, references.names, ours, faces.names, k)
        values = {"class_precision": within.precision, "class_recall": within.recall}
        self.add(values, conditions, f"Over {within.identities} people with more than {k} images in both sets.")
