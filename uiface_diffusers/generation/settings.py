"""What the images of a data set depend on, in one frozen object that `generation.json` holds as it is."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..data.image_folder import GENERATION, IMAGE_FORMATS
from ..faces import FaceEncoder
from ..files import check_settings, plain_numbers
from ..fingerprint import model_fingerprint, pipeline_fingerprint
from ..identities import IdentityBank, bank_hash, check_cosine_range
from ..models import IdentityFlow
from ..pipeline_uiface import UIFacePipeline
from ..seeds import NOISE_VERSION
from .distributions import Distribution
from .layouts import Layouts
from .writers import OUTPUT_FORMATS


@dataclass(frozen=True)
class GenerationSettings:
    """The names and their order are those of `generation.json`.

    Args:
        model (`str`): the pipeline's fingerprint.
        scheduler (`str`): the class of its scheduler.
        dtype (`str`): of its denoiser.
        noise (`int`, *optional*): how random numbers come from seeds, see `NOISE_VERSION`; the first version has none.
        identities (`str`): the bank's hash.
        number_of_identities (`int`): in the bank.
        identity_encoder, identity_encoder_fingerprint (`str`, *optional*): of the bank.
        images_per_identity, seed, size, image_format, output_format, identity_perturbation, min_similarity: see
            `generate_dataset`.
        identity_flow (`str`, *optional*): fingerprint of the flow that gives the directions of the perturbation. Left
            out of the file where there is none, as in folders of earlier versions.
        encoder, encoder_fingerprint (`str`, *optional*): what measures the similarity.
        max_attempts (`int`): at an image; 1 without `min_similarity`.
        sampling (`Mapping[str, Any]`): arguments of the pipeline's call, none left to its defaults.
        layouts (`str`, *optional*): the fingerprint of the pictures that images take their layouts from.
        conditions (`Mapping[str, str]`, *optional*): the fingerprints of the distributions that conditions are
            drawn from.

    Raises:
        ValueError: a value is out of range.
    """

    model: str
    scheduler: str
    dtype: str
    noise: int | None
    identities: str
    number_of_identities: int
    identity_encoder: str | None
    identity_encoder_fingerprint: str | None
    images_per_identity: int
    seed: int
    size: int
    image_format: str
    output_format: str
    identity_perturbation: tuple[float, float] | Literal["auto"] | None
    identity_flow: str | None
    min_similarity: float | None
    encoder: str | None
    encoder_fingerprint: str | None
    max_attempts: int
    sampling: Mapping[str, Any]
    layouts: str | None = None
    conditions: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        for name in ("images_per_identity", "size", "max_attempts"):
            check_positive(name, getattr(self, name))
        if not _is_integer(self.seed):
            raise ValueError(f"`seed` has to be an integer but is {self.seed!r}.")
        for name, values in (("image_format", tuple(IMAGE_FORMATS)), ("output_format", tuple(OUTPUT_FORMATS))):
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` has to be one of {values} but is {getattr(self, name)!r}.")
        cosine = self.min_similarity
        if cosine is not None and not (isinstance(cosine, int | float) and -1 <= cosine <= 1):
            raise ValueError(f"`min_similarity` has to be a cosine, from -1 to 1, but is {cosine!r}.")
        if cosine is not None and self.encoder is None:
            raise ValueError("`min_similarity` needs an `encoder` to measure by.")

    @classmethod
    def of(
        cls,
        pipeline: UIFacePipeline,
        bank: IdentityBank,
        encoder: FaceEncoder | None,
        sampling: Mapping[str, Any],
        identity_perturbation: Sequence[float] | Literal["auto"] | None,
        identity_flow: IdentityFlow | None,
        min_similarity: float | None,
        max_attempts: int,
        layouts: Layouts | None,
        distributions: Mapping[str, Distribution],
        **given: Any,
    ) -> "GenerationSettings":
        """Of a call of `generate_dataset`, whose numbers may be NumPy's.

        Args:
            given: `images_per_identity`, `seed`, `size`, `image_format`, `output_format`.
        """
        given = {name: plain_numbers(value) for name, value in given.items()}
        attempts, similarity = plain_numbers(max_attempts), plain_numbers(min_similarity)
        check_positive("max_attempts", attempts)
        perturbation = identity_perturbation
        if perturbation is not None and perturbation != "auto":
            perturbation = check_cosine_range(perturbation)
        return cls(
            model=pipeline_fingerprint(pipeline),
            scheduler=type(pipeline.scheduler).__name__,
            dtype=str(pipeline.unet.dtype),
            noise=NOISE_VERSION,
            identities=bank_hash(bank),
            number_of_identities=len(bank),
            identity_encoder=bank.identity_encoder,
            identity_encoder_fingerprint=bank.identity_encoder_fingerprint,
            identity_perturbation=perturbation,
            identity_flow=None if identity_flow is None else model_fingerprint(identity_flow),
            min_similarity=float(similarity) if isinstance(similarity, int) else similarity,
            encoder=None if encoder is None else encoder.name,
            encoder_fingerprint=None if encoder is None else encoder.fingerprint,
            max_attempts=1 if similarity is None else attempts,
            sampling=_sampling(pipeline, sampling),
            layouts=None if layouts is None else layouts.fingerprint,
            conditions={name: each.fingerprint for name, each in distributions.items()} or None,
            **given,
        )

    def begin(self, output: Path, **notes: Any) -> None:
        """Writes `generation.json`, or refuses to go on in a folder that was begun with other settings."""
        prints = ("identity_encoder_fingerprint", "encoder_fingerprint")
        settings = asdict(self)
        for name in ("identity_flow", "layouts", "conditions"):
            if settings[name] is None:
                del settings[name]
        check_settings(output / GENERATION, settings, if_known=prints, **notes)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_positive(name: str, value: Any) -> None:
    """
    Raises:
        ValueError: not an integer from 1.
    """
    if not _is_integer(value) or value < 1:
        raise ValueError(f"`{name}` has to be positive, an integer, but is {value!r}.")


def _sampling(pipeline: UIFacePipeline, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the pipeline's call will take, with the values of its configuration."""
    sampling = pipeline.sampling_defaults() | dict(given)
    defaults = pipeline.default_sampling(sampling["num_inference_steps"])
    return sampling | {name: value for name, value in defaults.items() if sampling[name] is None}
