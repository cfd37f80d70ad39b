"""Which face recognition model embeddings come from, and the one check that two are of the same."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any, NamedTuple

from .files import warn_once

# the packs that insightface publishes, and what the README of its Python package says of them all; told by name, as
# the files of other packs and of other recognizers say nothing of a license
INSIGHTFACE_PACKS = ("antelopev2", "buffalo_l", "buffalo_m", "buffalo_s", "buffalo_sc")
INSIGHTFACE_LICENSE = "non-commercial research only"
# in a pipeline's folder, where it carries an encoder of its own, see `uiface_diffusers.faces.CarriedEncoder`
IDENTITY_ENCODER = "identity_encoder"
CARRIED_FILES = ("README.md", "config.json", "model.safetensors", "preprocessor_config.json")


class EncoderMark(NamedTuple):
    """
    Args:
        name (`str`, *optional*): of the model; `None` where it is not known.
        fingerprint (`str`, *optional*): twelve hexadecimal digits of its weights; files of earlier versions have none.
    """

    name: str | None = None
    fingerprint: str | None = None

    def __str__(self) -> str:
        weights = "" if self.fingerprint is None else f" (weights {self.fingerprint})"
        return ("an unnamed encoder" if self.name is None else f"encoder `{self.name}`") + weights

    @property
    def license(self) -> str | None:
        """That of insightface's own packs; `None` of other encoders."""
        return INSIGHTFACE_LICENSE if self.name in INSIGHTFACE_PACKS else None


def check_same_encoder(what: str, mark: EncoderMark, other: str, wanted: EncoderMark) -> None:
    """Refuses embeddings of two encoders. If both fingerprints are known, they alone decide. Otherwise the names do:
    an unknown one matches every other, and if only one of two equal names has a fingerprint, a warning says once that
    the weights cannot be compared.

    Args:
        what: has the embeddings of `mark`, such as "the bank".
        other: has those of `wanted`.

    Raises:
        ValueError: the encoders differ; the message has both.
    """
    names, prints = (mark.name, wanted.name), (mark.fingerprint, wanted.fingerprint)
    compared = names if None in prints else prints
    if None in compared:
        return
    if compared[0] != compared[1]:
        raise ValueError(f"{what} comes from {mark}, {other} from {wanted}: use one model pack for both.")
    if prints.count(None) == 1:
        silent = what if mark.fingerprint is None else other
        warn_once(
            f"{silent} comes from encoder `{mark.name}` but does not name its weights: whether they are"
            f" {next(filter(None, prints))} cannot be checked."
        )


def common_encoder(marks: Mapping[str, EncoderMark]) -> EncoderMark:
    """The encoder of several caches or banks, by what each is called. Every two are compared. Returns the mark that
    says most: a fingerprint counts more than a name.

    Raises:
        ValueError: two of them are of different encoders.
    """
    for (other, wanted), (what, mark) in combinations(marks.items(), 2):
        check_same_encoder(what, mark, other, wanted)
    return max(marks.values(), key=lambda mark: (mark.fingerprint is not None, mark.name is not None))


def projector_mark(identity_projector: Any) -> EncoderMark:
    """Of an identity projector's configuration: the encoder that it was trained on."""
    config = identity_projector.config
    return EncoderMark(config.get("identity_encoder"), config.get("identity_encoder_fingerprint"))
