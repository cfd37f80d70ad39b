"""Do generated faces look like real ones? KID (Binkowski et al., ICLR 2018) and the classifier two-sample test
(Lopez-Paz & Oquab, ICLR 2017), on the features of a network.

Both depend on the real faces, also on how sharp they are, on the numbers of faces and on the number of people: compare
figures only where these are equal. The same measures of two halves of the real faces, with nobody in both, say what
noise is.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..faces import FaceEncoder
from .face_set import FaceSet
from .features import LpipsGridFeatures
from .figures import Description, Question
from .measure import Measure, conditions_of

# of each side: more faces change the classifier test, which learns from them
MOST_FACES = 1000
FOLDS = 5
SUBSETS = 100
# of the logistic regression: 13,312 features stand against 2,000 faces
INVERSE_REGULARIZATION = 0.01


class TooFewFacesError(ValueError):
    """Not enough faces or people to measure."""


@dataclass
class Realism:
    """How far generated faces are from real ones.

    Args:
        kid (`float`): unbiased, so it can be negative; 0 for faces of one distribution.
        kid_std (`float`): its standard deviation over subsets; not a number for fewer than four faces.
        c2st (`float`): AUC of the classifier; 0.5: cannot be told apart, 1: always told apart.
    """

    kid: float
    kid_std: float
    c2st: float


def kernel_features(features: torch.Tensor) -> torch.Tensor:
    """Features `(N, D)`, each brought to the length sqrt(D): then `x @ y / D`, which the kernel takes, is a cosine.
    Without it the kernel of unit vectors would be linear, nearly."""
    return F.normalize(features.double(), dim=1) * features.shape[1] ** 0.5


def _check(real: torch.Tensor, generated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(f"features have to be (N, D) and (M, D) but are {(*real.shape,)} and {(*generated.shape,)}.")
    for name, features in (("real", real), ("generated", generated)):
        if len(features) < 2:
            raise TooFewFacesError(f"{len(features)} {name} faces: KID needs two at least.")
        wrong = (~features.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(f"the features of {len(wrong)} {name} faces are not finite, such as of face {wrong[0]}.")
    return real.double(), generated.double()


def _kernel(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return (rows @ columns.T / rows.shape[1] + 1) ** 3


def _unbiased(real: torch.Tensor, generated: torch.Tensor, between: torch.Tensor) -> float:
    """MMD^2 of kernel matrices, without the diagonals (equation 4 of Binkowski et al.)."""
    within = [(each.sum() - each.trace()) / (len(each) * (len(each) - 1)) for each in (real, generated)]
    return (within[0] + within[1] - 2 * between.mean()).item()


def kernel_distance(
    real: torch.Tensor, generated: torch.Tensor, num_subsets: int = SUBSETS, seed: int = 0
) -> tuple[float, float]:
    """KID: the unbiased estimate of MMD^2 with the kernel (x @ y / D + 1)^3. Not multiplied by 1,000, as it is often
    shown.

    The estimate is of all faces. Its spread is that over subsets of half the faces of each side, drawn without
    replacement: about the standard error of the value, where faces are independent (those of one person are less so).
    torchmetrics' `KernelInceptionDistance` returns mean and deviation of such estimates over subsets, 1,000 faces by
    default, of features that are not normalized.

    Args:
        real (`torch.Tensor` of shape `(N, D)`): features; see `kernel_features` for their length.
        generated (`torch.Tensor` of shape `(M, D)`): by the same network.
        num_subsets (`int`, defaults to 100): how many are drawn.
        seed (`int`, defaults to 0): of the subsets.

    Returns:
        The value and its spread, which is not a number where a side has fewer than four faces.

    Raises:
        ValueError: a side has fewer than two faces, dimensions differ, or a feature is not finite.
    """
    real, generated = _check(real, generated)
    of_real, of_generated, between = _kernel(real, real), _kernel(generated, generated), _kernel(real, generated)
    value = _unbiased(of_real, of_generated, between)
    if min(len(real), len(generated)) < 4:
        return value, float("nan")
    generator, estimates = torch.Generator().manual_seed(seed), []
    for _ in range(num_subsets):
        rows, columns = (
            torch.randperm(len(each), generator=generator)[: len(each) // 2] for each in (real, generated)
        )
        parts = (of_real[rows][:, rows], of_generated[columns][:, columns], between[rows][:, columns])
        estimates.append(_unbiased(*parts))
    return value, float(np.std(estimates, ddof=1))


def _folds(people: Sequence, side: str) -> np.ndarray:
    """The fold of each face: whole people, of about as many faces in each."""
    from sklearn.model_selection import GroupKFold  # of the extra `train`

    if len(set(people)) < FOLDS:
        raise TooFewFacesError(
            f"{len(people)} {side} faces of {len(set(people))} people: the classifier test needs {FOLDS} people at"
            " least on each side."
        )
    folds = np.empty(len(people), int)
    for number, (_, tested) in enumerate(GroupKFold(FOLDS).split(folds, groups=list(people))):
        folds[tested] = number
    return folds


def classifier_test(
    real: torch.Tensor,
    generated: torch.Tensor,
    real_people: Sequence | None = None,
    generated_people: Sequence | None = None,
) -> float:
    """The classifier two-sample test: a logistic regression (L2, C = 0.01, on standardized features) learns on four
    fifths of the people to tell generated from real faces; the AUC on the others, averaged over the five folds.

    Args:
        real (`torch.Tensor` of shape `(N, D)`): features.
        generated (`torch.Tensor` of shape `(M, D)`): by the same network; as many, or the noise of the two differs.
        real_people, generated_people (*optional*): who is on each face. Nobody is learned from and tested on. Each
            face is of a person of its own if not given.

    Returns:
        In [0, 1]; 0.5: cannot be told apart.

    Raises:
        ValueError: a side has fewer than five people, dimensions differ, or a feature is not finite.
    """
    from sklearn.linear_model import LogisticRegression  # of the extra `train`
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    real, generated = _check(real, generated)
    folds = np.concatenate(
        [
            _folds(range(len(features)) if people is None else people, side)
            for features, people, side in ((real, real_people, "real"), (generated, generated_people, "generated"))
        ]
    )
    features = torch.cat([real, generated]).numpy()
    labels = np.repeat([0, 1], [len(real), len(generated)])
    areas = []
    for fold in range(FOLDS):
        classifier = make_pipeline(
            StandardScaler(),
            LogisticRegression(C=INVERSE_REGULARIZATION, class_weight="balanced", max_iter=500),
        )
        classifier.fit(features[folds != fold], labels[folds != fold])
        scores = classifier.decision_function(features[folds == fold])
        areas.append(roc_auc_score(labels[folds == fold], scores))
    return float(np.mean(areas))


def measure_realism(
    real: torch.Tensor,
    generated: torch.Tensor,
    real_people: Sequence | None = None,
    generated_people: Sequence | None = None,
    seed: int = 0,
) -> Realism:
    """Both measures; arguments and errors are those of `kernel_distance` and `classifier_test`."""
    return Realism(
        *kernel_distance(real, generated, seed=seed), classifier_test(real, generated, real_people, generated_people)
    )


def choose_spread(names: Sequence[str], number: int, seed: int = 0) -> list[int]:
    """Positions of `number` faces of as many people as there are: one face of each first, then a second of each, and
    so on. People and their faces are drawn.

    Args:
        names: who is on each face.
        number (`int`): of faces; all if there are no more.
        seed (`int`, defaults to 0): of the draw.

    Returns:
        In ascending order.
    """
    drawn = np.random.default_rng(seed).permutation(len(names)).tolist()
    taken: Counter[str] = Counter()
    rounds = []
    for position in drawn:
        rounds.append(taken[names[position]])
        taken[names[position]] += 1
    first = np.argsort(rounds, kind="stable")[:number]
    return sorted(drawn[place] for place in first)


def real_halves(sets: Sequence[FaceSet], number: int, seed: int = 0) -> tuple[FaceSet, FaceSet]:
    """Two halves of real faces with nobody in both: one to compare with, the other to see what real faces give.

    Args:
        sets: real faces, each of other people; equal parts are taken of them, by `choose_spread`.
        number (`int`): of faces in each half, at most; fewer if a set has fewer.
        seed (`int`, defaults to 0): of the draw.

    Raises:
        TooFewFacesError: fewer than five people in a half.
        ValueError: two of the sets have the same faces.
    """
    if len({faces.key for faces in sets}) < len(sets):
        raise ValueError("two of the sets of real faces are the same: give each once.")
    sides: tuple[list, list] = ([], [])
    for faces in sets:
        people = list(faces.identities)
        drawn = np.random.default_rng(seed).permutation(len(people))
        for side, members in zip(sides, (drawn[::2], drawn[1::2]), strict=True):
            side.append([position for member in members for position in faces.identities[people[member]]])
    share = min(number // len(sets), *(len(positions) for side in sides for positions in side))
    halves = []
    for side in sides:
        parts = []
        for faces, positions in zip(sets, side, strict=True):
            chosen = choose_spread([faces.names[position] for position in positions], share, seed)
            parts.append(faces.take(sorted(positions[place] for place in chosen)))
        halves.append(FaceSet.join(parts))
    fewest = min(len(half.identities) for half in halves)
    if fewest < FOLDS:
        counts = ", ".join(f"{len(faces)} faces of {len(faces.identities)} people" for faces in sets)
        raise TooFewFacesError(
            f"{counts} give two halves of {share * len(sets)} faces of {fewest} people: KID and the classifier test"
            f" need {FOLDS} people at least in each."
        )
    return halves[0], halves[1]


class RealismMeasure(Measure):
    """KID and the classifier test against real faces, and of as many other real faces: the noise. By the LPIPS
    backbone and by the last recognizer."""

    needs = ("perceptual", "recognizers", "references")
    figures = {
        "kid": Description(
            "KID",
            "x 1000",
            "Kernel distance between generated and real faces. Lower is better. It is unbiased: faces that look the"
            " same give about 0, sometimes less. Depends on the real faces and on the numbers of faces and people.",
            Question.REAL,
            real="kid_real",
            headline=True,
        ),
        "kid_std": Description(
            "Deviation of KID",
            "x 1000",
            "Standard deviation over subsets of half the faces, about the standard error of KID.",
            Question.REAL,
        ),
        "kid_real": Description(
            "KID of real faces",
            "x 1000",
            "KID of as many other real faces, of other people: the noise level.",
            Question.REAL,
        ),
        "c2st": Description(
            "Classifier two-sample test",
            "",
            "AUC of a classifier that separates generated from real faces, on people that it was not trained on."
            " Lower is better: 0.5 means that they cannot be told apart, 1 that they always can.",
            Question.REAL,
            real="c2st_real",
            headline=True,
        ),
        "c2st_real": Description(
            "Classifier test of real faces",
            "",
            "The same for as many other real faces, of other people: the noise level.",
            Question.REAL,
        ),
    }

    def check(self) -> None:
        """Too few faces or people are a note, no error: the other measures can be made."""
        try:
            self.sides = self._choose()
        except TooFewFacesError as error:
            self.notes.append(f"Not measured: {error}")

    def _choose(self) -> tuple[FaceSet, FaceSet, FaceSet]:
        """Generated faces, as many real ones, and as many other real ones."""
        faces, settings = self.inputs.faces, self.settings
        number = min(len(faces), settings.max_images, MOST_FACES)
        half, others = real_halves(self.inputs.references, number, settings.seed)
        chosen = faces.take(choose_spread(faces.names, len(half), settings.seed))
        if len(chosen.identities) < FOLDS:
            raise TooFewFacesError(
                f"{len(chosen)} faces of {len(chosen.identities)} identities: KID and the classifier test need {FOLDS}"
                " identities at least."
            )
        return chosen, half, others

    def measure(self) -> None:
        if not self.notes:
            grid, judge = LpipsGridFeatures(self.inputs.perceptual), self.inputs.recognizers[-1]
            self._by(grid, grid.network)
            self._by(judge, judge.name)

    def _by(self, network: FaceEncoder | nn.Module, name: str) -> None:
        faces, references, others = self.sides
        features = [self.inputs.features_of(each, network) for each in self.sides]
        if isinstance(network, FaceEncoder):
            features = [kernel_features(each) for each in features]
        ours, theirs, other = features
        seed = self.settings.seed
        found = measure_realism(theirs, ours, references.names, faces.names, seed)
        noise = measure_realism(theirs, other, references.names, others.names, seed)
        conditions = conditions_of(network, "features")
        conditions |= {"images": len(faces), "identities": len(faces.identities)}
        conditions |= {"real": f"{self.inputs.real_name} {references.key}"}
        conditions |= {"real identities": len(references.identities)}
        values = {"kid": found.kid, "kid_std": found.kid_std, "kid_real": noise.kid}
        values |= {"c2st": found.c2st, "c2st_real": noise.c2st}
        detail = (
            f"{len(faces)} faces of {len(faces.identities)} identities against {len(references)} of"
            f" {len(references.identities)}; the other half is {len(others)} of {len(others.identities)}."
        )
        self.add(values, conditions, detail, network=name)
