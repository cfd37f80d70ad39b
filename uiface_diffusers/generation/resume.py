"""Who works in a data set's folder, and with what it was begun."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from ..data.image_folder import GENERATION, ImageKey, ImageRow, read_rows
from ..files import read_settings
from ..seeds import NOISE_VERSION
from .plan import Part
from .settings import GenerationSettings
from .writers import ImageFolder


@contextmanager
def lock(output: Path, name: str, timeout: float = 0) -> Iterator[None]:
    path = output / f".{name}.lock"
    with FileLock(path, timeout=timeout):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # a finished folder has no locks


@contextmanager
def locked(output: Path, part: Part) -> Iterator[None]:
    """No two processes at one part, and no two divisions into parts at one time.

    Raises:
        RuntimeError: another process is at work.
    """
    output.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(output, f"{part.position}-of-{part.total}"))
            for other in output.glob(".*-of-*.lock"):
                if other.stem.split("-of-")[1] != str(part.total):
                    with lock(output, other.stem.removeprefix(".")):
                        pass
        except Timeout as error:
            raise RuntimeError(
                f"another process is generating into {output} ({Path(error.lock_file).stem}): wait for it, or give"
                " this one a part of its own with `shard`."
            ) from error
        yield


def made_images(writer: ImageFolder, units: list[list[ImageKey]]) -> tuple[dict[ImageKey, ImageRow], set[ImageKey]]:
    """The rows of all finished images, and which images of `units` need not be made."""
    rows = read_rows(writer.output)
    return rows, {key for unit in units for key in unit if writer.is_made(key, rows.get(key))}


def with_noise_of(settings: GenerationSettings, writer: ImageFolder, part: Part) -> GenerationSettings:
    """The settings for a folder that may have been begun with another version of the noise. Where nothing of the part
    is missing, nothing is drawn, and the folder keeps its version.

    Raises:
        ValueError: it was, and images are missing.
    """
    file = writer.output / GENERATION
    noise = read_settings(file).get("noise") if file.exists() else NOISE_VERSION
    if noise == NOISE_VERSION:
        return settings
    units = writer.units(part)
    if len(made_images(writer, units)[1]) < sum(map(len, units)):
        raise ValueError(
            f"{writer.output} was begun with noise of version {noise or 1}, this uiface-diffusers draws version"
            f" {NOISE_VERSION}: the same seed gives other images (version 1 used 32 bits of a seed, so that images"
            " shared their noise). Choose another folder, or complete this one with the version that began it."
        )
    return replace(settings, noise=noise)
