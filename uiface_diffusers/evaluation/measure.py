"""What a measure of a data set is, and what it is given. The measures themselves are listed in `registry.py`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ..faces import FaceEncoder
from ..identities import IdentityBank
from .face_set import FaceSet
from .figures import Description, Figure
from .plots import Picture

if TYPE_CHECKING:
    import lpips


@dataclass(frozen=True)
class Settings:
    """Numbers that measures depend on; see `evaluate_dataset`.

    Raises:
        ValueError: a number is not positive.
    """

    lpips_pairs: int | None = 20
    neighbors: int = 3
    threshold: float = 0.3
    max_pairs: int = 1_000_000
    max_images: int = 50_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lpips_pairs", "neighbors", "max_pairs", "max_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` has to be positive but is {value}.")


@dataclass(frozen=True)
class Inputs:
    """A data set, and what it is measured with.

    Args:
        path: of the data set.
        faces: its pictures.
        recognizers: the encoder first, the judge last.
        perceptual: what `load_lpips` returns, on `device`.
        features: network of precision and recall.
        settings: numbers.
        cache: folder of what is computed once.
        identities (*optional*): what the faces were conditioned on.
        against (*optional*): embeddings of real people.
        references: sets of real faces; none by default.
        real_name (`str`): of these.
        same_people (`bool`): a name means the same person in `faces` and in `references`.
        device: of networks.
    """

    path: Path
    faces: FaceSet
    recognizers: tuple[FaceEncoder, ...]
    perceptual: "lpips.LPIPS"
    features: nn.Module | FaceEncoder
    settings: Settings
    cache: Path
    identities: IdentityBank | None = None
    against: IdentityBank | None = None
    references: tuple[FaceSet, ...] = ()
    real_name: str = ""
    same_people: bool = False
    device: torch.device | str = "cpu"

    def has(self, name: str) -> bool:
        """Whether an input is given."""
        value = getattr(self, name)
        return not (value is None or value is False or value == ())

    @cached_property
    def embeddings(self) -> dict[str, torch.Tensor]:
        """Recognizer's name -> embeddings `(N, D)` of the faces, of unit length."""
        return {recognizer.name: self.faces.embed(recognizer, self.cache) for recognizer in self.recognizers}

    def features_of(self, faces: FaceSet, network: nn.Module | FaceEncoder) -> torch.Tensor:
        """Features `(N, D)` of faces."""
        return faces.features(network, self.cache, self.device)

    def recognizer_of(self, bank: IdentityBank) -> FaceEncoder:
        """The recognizer that a bank comes from; the encoder if the bank does not say."""
        named = [recognizer for recognizer in self.recognizers if recognizer.name == bank.identity_encoder]
        return (named or self.recognizers)[0]


class Measure(ABC):
    """A measure of a data set: one class in one file.

    To add one, write a subclass and name it in `registry.py`. It sets `figures` and `needs`; `measure` fills `found`,
    by `add`, and may fill `pictures` and `notes`. These are its part of the report.

    Args:
        inputs: what is measured.
    """

    # name of each figure -> its label, unit, meaning, and the question that it answers
    figures: ClassVar[dict[str, Description]]
    # fields of `Inputs`: where one is not given, the measure is left out
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, inputs: Inputs):
        self.inputs, self.settings = inputs, inputs.settings
        self.found: list[Figure] = []
        self.pictures: list[tuple[str, Picture]] = []
        self.notes: list[str] = []

    def check(self) -> None:  # noqa: B027  most measures have nothing to check
        """Runs before long work, and before pictures that cannot be used are left out.

        Raises:
            ValueError: the inputs cannot be measured.
        """

    @abstractmethod
    def measure(self) -> None:
        """Computes the figures."""

    def add(
        self, values: Mapping[str, float], conditions: dict[str, Any], detail: str = "", network: str = ""
    ) -> None:
        """Adds figures that share conditions; those of several networks with the `network` in their names."""
        for kind, value in values.items():
            name = f"{kind}/{network}" if network else kind
            self.found.append(Figure(name, value, self.figures[kind], conditions, detail))


def conditions_of(network: nn.Module | FaceEncoder, role: str = "recognizer") -> dict[str, Any]:
    """A network as a condition of figures. Networks other than recognizers have their weights in their names."""
    weights = {"weights": network.fingerprint} if isinstance(network, FaceEncoder) else {}
    return {role: network.name} | weights
