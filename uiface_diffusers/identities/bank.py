"""Identity banks: embeddings with the name of the encoder that they come from."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from safetensors.torch import save_file

from ..encoders import EncoderMark
from ..files import complete_file, local_path, open_safetensors

# of a bank's file beside a pipeline or in a data set
IDENTITIES = "identities.safetensors"


@dataclass
class IdentityBank:
    """Identity embeddings of one encoder.

    Args:
        embeddings (`torch.Tensor` of shape `(N, identity_dim)`): float32. Or of shape `(N, M, identity_dim)`: an
            embedding for each of M images of an identity, which others have perturbed.
        identity_encoder (`str`, *optional*): the face recognition model that made them.
        names (`list[str]`): N names of the identities; numbers if not given.
        identity_encoder_fingerprint (`str`, *optional*): of that model's weights, see `FaceEncoder.fingerprint`; banks
            of earlier versions and published ones have none.

    Raises:
        ValueError: another shape, another number of names, or an embedding without a direction: zero or not finite.
    """

    embeddings: torch.Tensor
    identity_encoder: str | None = None
    names: list[str] = field(default_factory=list)
    identity_encoder_fingerprint: str | None = None

    def __post_init__(self) -> None:
        self.embeddings = torch.as_tensor(self.embeddings, dtype=torch.float32)
        if self.embeddings.ndim not in (2, 3) or 0 in self.embeddings.shape[1:]:
            raise ValueError(
                f"an identity bank holds (N, identity_dim) embeddings, or (N, images, identity_dim), not"
                f" {tuple(self.embeddings.shape)}."
            )
        self.names = list(self.names) or [f"{i:06d}" for i in range(len(self.embeddings))]
        if len(self.names) != len(self.embeddings):
            raise ValueError(f"{len(self.names)} names for {len(self.embeddings)} embeddings.")
        # a cosine to one would be NaN, and every search for the nearest would miss what is near
        lengths = self.embeddings.norm(dim=-1)
        wrong = without_direction(lengths.flatten())
        if wrong:
            row, image = divmod(wrong[0], self.images or 1)
            place = f"row {row}" if self.images is None else f"row {row}, image {image}"
            raise ValueError(
                f"{len(wrong)} of {lengths.numel()} embeddings are zero or not finite, as that of `{self.names[row]}`"
                f" in {place}: leave them out."
            )

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def images(self) -> int | None:
        """How many images of an identity have an embedding of their own; `None` if there is one per identity."""
        return self.embeddings.shape[1] if self.embeddings.ndim == 3 else None

    def one_per_row(self) -> "IdentityBank":
        """Itself; of a bank with an embedding per image, all of them as rows, each under its identity's name."""
        if self.images is None:
            return self
        names = [name for name in self.names for _ in range(self.images)]
        return replace(self, embeddings=self.embeddings.flatten(0, 1), names=names)

    def check_one_each(self, what: str) -> None:
        """
        Raises:
            ValueError: the bank has an embedding per image, which `what` does not take.
        """
        if self.images is not None:
            raise ValueError(
                f"the bank has {self.images} embeddings of each identity, one per image: {what} takes banks with one"
                " per identity."
            )

    def take(self, positions: Sequence[int]) -> "IdentityBank":
        """The bank of some of its identities."""
        positions = list(positions)
        return replace(self, embeddings=self.embeddings[positions], names=[self.names[i] for i in positions])

    @property
    def encoder_mark(self) -> EncoderMark:
        """By which its embeddings are told from another encoder's."""
        return EncoderMark(self.identity_encoder, self.identity_encoder_fingerprint)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file; it is complete or not there at all."""
        metadata = {"names": json.dumps(self.names)}
        for name in ("identity_encoder", "identity_encoder_fingerprint"):
            if getattr(self, name) is not None:
                metadata[name] = getattr(self, name)
        with complete_file(local_path(path)) as file:
            save_file({"embeddings": self.embeddings.contiguous()}, file, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "IdentityBank":
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is missing, damaged or no identity bank; the message names it and says why.
        """
        path = local_path(path)
        with open_safetensors(path) as file:
            if "embeddings" not in file.keys():
                raise ValueError(f"{path} has no tensor `embeddings`: not an identity bank.")
            metadata = file.metadata() or {}
            try:
                names = json.loads(metadata.get("names", "[]"))
            except ValueError as error:
                raise ValueError(f"{path} is damaged: its names are no JSON. ({error})") from error
            embeddings, marks = file.get_tensor("embeddings"), ("identity_encoder", "identity_encoder_fingerprint")
        try:
            return cls(embeddings, names=names, **{mark: metadata.get(mark) for mark in marks})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def without_direction(lengths: torch.Tensor) -> list[int]:
    """The positions of embeddings that are zero or not finite, by their lengths `(N,)`."""
    return (~(lengths.isfinite() & (lengths > 0))).nonzero().flatten().tolist()


def bank_hash(bank: IdentityBank) -> str:
    """By which `generation.json` tells banks from each other: of names and embeddings, in their order."""
    digest = hashlib.sha256(json.dumps(bank.names).encode())
    digest.update(bank.embeddings.contiguous().numpy().data)
    return digest.hexdigest()[:16]
