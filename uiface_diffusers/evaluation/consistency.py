"""Do generated faces look like the identity that they were conditioned on?"""

from collections import Counter

import torch
import torch.nn.functional as F

from ..files import read_settings
from ..identities import bank_hash, largest_cosines
from .figures import Description, Question
from .measure import Measure, conditions_of
from .plots import plot_histograms


def identity_consistency(
    generated: torch.Tensor, references: torch.Tensor, num_resamples: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Cosine of generated faces to the own identity and to the others, with a bootstrap interval of the difference.

    Args:
        generated (`torch.Tensor` of shape `(N, M, D)`): embeddings of M faces of each of N identities, unit length.
        references (`torch.Tensor` of shape `(N, D)`): embeddings of the conditioning faces by the same encoder.
        num_resamples (`int`, defaults to 2000): bootstrap resamples. Identities are drawn, not faces: the faces of
            one identity are not independent.
        seed (`int`, defaults to 0): of the resampling.

    Returns:
        `own`, `other` (mean cosines), `difference`, and its 95 % interval `difference_low`, `difference_high`.
    """
    if generated.ndim != 3 or references.shape != (generated.shape[0], generated.shape[2]) or len(generated) < 2:
        raise ValueError(
            f"`generated` has to be (N, M, D) and `references` (N, D) with N >= 2, but are {tuple(generated.shape)}"
            f" and {tuple(references.shape)}."
        )
    similarity = torch.einsum("nmd,kd->nk", generated, references) / generated.shape[1]
    own = similarity.diagonal()
    other = (similarity.sum(dim=1) - own) / (len(similarity) - 1)
    difference = own - other
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(difference), (num_resamples, len(difference)), generator=generator)
    low, high = difference[drawn].mean(dim=1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return {
        "own": own.mean().item(),
        "other": other.mean().item(),
        "difference": difference.mean().item(),
        "difference_low": low,
        "difference_high": high,
    }


class ContextMeasure(Measure):
    """How near the images are to the embeddings that they were conditioned on."""

    needs = ("recognizers", "identities")
    figures = {
        "context_cosine": Description(
            "Mean cosine to the context",
            "",
            "Cosine of an image to its identity's embedding in the bank. With `--identity-perturbation`, images"
            " follow embeddings that were turned away from those of the bank.",
            Question.ONE_PERSON,
            headline=True,
        ),
        "context_nearest": Description(
            "Nearest to its own context",
            "%",
            "Share of images that are nearer to their own context than to any other in the bank.",
            Question.ONE_PERSON,
        ),
    }

    def check(self) -> None:
        bank, faces = self.inputs.identities, self.inputs.faces
        assert bank is not None
        bank.check_one_each("the cosine to the context")
        if len(set(bank.names)) < len(bank):
            name = Counter(bank.names).most_common(1)[0][0]
            raise ValueError(
                f"the bank of identities has several embeddings of `{name}`: give the one that was followed."
            )
        missing = sorted(faces.identities.keys() - set(bank.names))
        if missing:
            raise ValueError(f"the bank of identities lacks {len(missing)} of the data set's, such as `{missing[0]}`.")
        # a set of `generate_dataset` says which bank it follows; names would not tell: those of all banks begin at 0
        file = self.inputs.path / "generation.json"
        if file.exists():
            followed = bank.take([i for i, name in enumerate(bank.names) if name in faces.identities])
            if bank_hash(followed) != read_settings(file).get("identities"):
                raise ValueError(f"{file} says that the faces follow another bank of identities than the one given.")

    def measure(self) -> None:
        bank = self.inputs.identities
        assert bank is not None
        recognizer = self.inputs.recognizer_of(bank)
        embeddings, contexts = self.inputs.embeddings[recognizer.name], F.normalize(bank.embeddings)
        numbers = {identity: number for number, identity in enumerate(bank.names)}
        own = torch.tensor([numbers[identity] for identity in self.inputs.faces.names])
        nearest, cosines = largest_cosines(embeddings, contexts)[1], (embeddings * contexts[own]).sum(dim=1)
        values = {"context_cosine": cosines.mean().item(), "context_nearest": (nearest == own).float().mean().item()}
        self.add(values, conditions_of(recognizer), f"The bank has {len(bank)} contexts.")
        plot = plot_histograms({"image to its context": cosines}, "cosine")
        self.pictures.append((f"Similarity to the context by {recognizer.name}", plot))
