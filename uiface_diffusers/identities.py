"""Identity banks: embeddings with the name of the encoder that they come from."""

import json
import os
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .files import complete_file

# how often `sample_identities` draws as many candidates as are asked for
MAX_ROUNDS = 100


@dataclass
class IdentityBank:
    """Identity embeddings of one encoder.

    Args:
        embeddings (`torch.Tensor` of shape `(N, identity_dim)`): float32.
        identity_encoder (`str`, *optional*): the face recognition model that made them.
        names (`list[str]`): N names of the identities; numbers if not given.
    """

    embeddings: torch.Tensor
    identity_encoder: str | None = None
    names: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.embeddings = torch.as_tensor(self.embeddings, dtype=torch.float32)
        if self.embeddings.ndim != 2:
            raise ValueError(
                f"an identity bank holds (N, identity_dim) embeddings, not {tuple(self.embeddings.shape)}."
            )
        self.names = list(self.names) or [f"{i:06d}" for i in range(len(self.embeddings))]
        if len(self.names) != len(self.embeddings):
            raise ValueError(f"{len(self.names)} names for {len(self.embeddings)} embeddings.")

    def __len__(self) -> int:
        return len(self.embeddings)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file; it is complete or not there at all."""
        metadata = {"names": json.dumps(self.names)}
        if self.identity_encoder is not None:
            metadata["identity_encoder"] = self.identity_encoder
        with complete_file(path) as file:
            save_file({"embeddings": self.embeddings.contiguous()}, file, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "IdentityBank":
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file, or a part of one: {error}") from error
        with file:
            if "embeddings" not in file.keys():
                raise ValueError(f"{path} has no tensor `embeddings`: not an identity bank.")
            metadata = file.metadata() or {}
            names = json.loads(metadata.get("names", "[]"))
            return cls(file.get_tensor("embeddings"), metadata.get("identity_encoder"), names)


def sample_identities(bank: IdentityBank, number: int, max_similarity: float = 0.3, seed: int = 0) -> IdentityBank:
    """New identities: unit directions drawn from the Gaussian distribution of a bank's embeddings.

    Each is kept when its cosine to every embedding of the bank and to every one kept before is below `max_similarity`.
    Weaker than identities embedded from generated faces (UIFace's authors): a direction need not be a face's.

    Args:
        bank: the training embeddings, at least two, of unit length.
        number (`int`): how many.
        max_similarity (`float`, defaults to 0.3): as of DCFace (Kim et al. 2023).
        seed (`int`, defaults to 0): of the draws.

    Raises:
        ValueError: so many do not fit, or the bank is too small.
    """
    if len(bank) < 2:
        raise ValueError(f"a distribution needs two embeddings or more; the bank has {len(bank)}.")
    known = F.normalize(bank.embeddings)
    mean, centred = known.mean(dim=0), known - known.mean(dim=0)
    generator = torch.Generator().manual_seed(seed)
    kept = known.new_empty(0, known.shape[1])
    for _ in range(MAX_ROUNDS):
        # rows of a Gaussian matrix times the centred embeddings have the embeddings' covariance
        weights = torch.randn(number, len(known), generator=generator) / (len(known) - 1) ** 0.5
        drawn = F.normalize(mean + weights @ centred)
        for candidate in drawn[(drawn @ known.T).amax(dim=1) < max_similarity]:
            if not len(kept) or (kept @ candidate).max() < max_similarity:
                kept = torch.cat([kept, candidate[None]])
            if len(kept) == number:
                return IdentityBank(kept, bank.identity_encoder)
    raise ValueError(
        f"only {len(kept)} of {number} identities with a cosine below {max_similarity} to each other and to the bank"
        f" were found in {MAX_ROUNDS * number} draws: allow a larger one."
    )
