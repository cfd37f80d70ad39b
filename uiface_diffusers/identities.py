"""Identity banks: embeddings with the name of the encoder that they come from."""

import json
import os
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .files import complete_file


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
