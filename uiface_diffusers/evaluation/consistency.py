"""Do generated faces look like the identity that they were conditioned on?"""

import torch


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
