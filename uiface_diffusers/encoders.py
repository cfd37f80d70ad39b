"""Which face recognition model embeddings come from, and the one check that two are of the same."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .files import warn_once


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
        return f"`{self.name}`{weights}"


def check_same_encoder(what: str, mark: EncoderMark, other: str, wanted: EncoderMark) -> None:
    """Refuses embeddings of two encoders. A name that is not known matches every one. Where one of two equal names has
    no fingerprint, a warning says once that the weights cannot be compared.

    Args:
        what: has the embeddings of `mark`, such as "the bank".
        other: has those of `wanted`.

    Raises:
        ValueError: the names differ, or the weights; the message has both.
    """
    if None in (mark.name, wanted.name):
        return
    prints = (mark.fingerprint, wanted.fingerprint)
    if mark.name != wanted.name or (None not in prints and prints[0] != prints[1]):
        hint = "of one name, but with other weights" if mark.name == wanted.name else "of two encoders"
        raise ValueError(
            f"{what} is of the encoder {mark}, {other} of {wanted}: embeddings {hint} cannot be compared. Use the"
            " same model pack for both."
        )
    if prints.count(None) == 1:
        silent = what if mark.fingerprint is None else other
        warn_once(
            f"{silent} is of the encoder `{mark.name}` but does not say of which weights: whether they are"
            f" {next(filter(None, prints))} cannot be checked."
        )


def common_encoder(marks: Mapping[str, EncoderMark]) -> EncoderMark:
    """The encoder of several caches or banks, by what each is called; its weights are known where one of them says so.

    Raises:
        ValueError: two of them are of different encoders.
    """
    (first, mark), *others = marks.items()
    for what, other in others:
        check_same_encoder(what, other, first, mark)
        if None in mark:
            first, mark = what, other
    return mark


def projector_mark(identity_projector: Any) -> EncoderMark:
    """Of an identity projector's configuration: the encoder that it was trained on."""
    config = identity_projector.config
    return EncoderMark(config.get("identity_encoder"), config.get("identity_encoder_fingerprint"))
