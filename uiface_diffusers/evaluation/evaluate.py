"""All measures of a data set of faces, written to one folder."""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.sources import open_source
from ..encoders import check_same_encoder
from ..faces import FaceEncoder
from ..files import local_path
from ..identities import IdentityBank
from . import registry
from .answers import arrange
from .face_set import FaceSet, open_faces
from .features import LpipsFeatures
from .measure import Inputs, Measure, Settings
from .perceptual import load_lpips
from .plots import identity_grid
from .report import REPORT, load_report, write_report

PACKAGES = ("uiface-diffusers", "torch", "lpips", "onnxruntime", "matplotlib", "scikit-learn")


def evaluate_dataset(
    dataset: str | os.PathLike,
    output: str | os.PathLike,
    encoder: FaceEncoder,
    judge: FaceEncoder | None = None,
    identities: IdentityBank | None = None,
    against: IdentityBank | None = None,
    real: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    same_people: bool = False,
    features: nn.Module | str = "lpips",
    perceptual: nn.Module | None = None,
    lpips_pairs: int | None = 20,
    neighbors: int = 3,
    threshold: float = 0.3,
    max_pairs: int = 1_000_000,
    max_images: int = 50_000,
    seed: int = 0,
    device: torch.device | str = "cpu",
    skip_unusable: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures a data set of aligned faces and writes `report.json` and `report.html`.

    Embeddings, features and distances are kept in `output/cache`. The same call goes on where an earlier one was
    stopped; a call with other settings computes only what is new. The measures are listed in `registry.py`.

    Args:
        dataset: of any form that `open_source` opens.
        output: folder of the report.
        encoder: the recognizer that the generator was conditioned on, or any other.
        judge (*optional*): another recognizer, which the generator has not seen.
        identities (*optional*): the embeddings that the faces were conditioned on, by name.
        against (*optional*): embeddings of real people, such as those of the training, to look for leakage.
        real (*optional*): real faces for KID, the classifier test, precision and recall. One set or several, in the
            same forms as `dataset`, or folders of pictures that show one person each. Several sets contribute equally.
            KID and the classifier test compare at most 1,000 faces of the set, of as many people as possible, with
            as many real ones, by the backbone of `perceptual` and by the judge (by the encoder if there is no judge).
            They compare the same real faces with other real faces of other people, too, to show the noise level.
        same_people (`bool`, defaults to `False`): a name means the same person in `dataset` and in `real`, as the
            faces were conditioned on real people. Precision and recall are then measured within identities as well.
        features: network of precision and recall: `"lpips"` (the backbone of `perceptual`), `"encoder"` (embeddings),
            or a module with a `name`, such as `TorchvisionFeatures`.
        perceptual (*optional*): what `load_lpips` returns; by default, AlexNet with torchvision's backbone.
        lpips_pairs (`int`, defaults to 20): pairs of images drawn per identity; None for all.
        neighbors (`int`, defaults to 3): k of precision and recall.
        threshold (`float`, defaults to 0.3): cosine above which uniqueness and consistency take two for one person.
        max_pairs (`int`, defaults to 1,000,000): most genuine and most impostor pairs.
        max_images (`int`, defaults to 50,000): most images of each side for KID, the classifier test, precision and
            recall. Precision and recall depend on the number of images, so the larger side is drawn down to the
            smaller one. Within identities, whole identities are drawn.
        seed (`int`, defaults to 0): of all draws.
        device: for LPIPS and features.
        skip_unusable (`bool`, defaults to `False`): leave out pictures that cannot be read or are not square.
        log: is called with each line of a summary.

    Returns:
        The content of `report.json`.

    Raises:
        ValueError: the set has a single identity, or a single image of each; pictures are unusable; a bank is of
            another encoder or lacks identities; a setting is out of range; `output` has the report of another set.
        OSError: the LPIPS backbone is not given and cannot be downloaded.
    """
    dataset, output = local_path(dataset), local_path(output)
    settings = Settings(lpips_pairs, neighbors, threshold, max_pairs, max_images, seed)
    if isinstance(features, str) and features not in ("lpips", "encoder"):
        raise ValueError(f"`features` has to be `lpips`, `encoder` or a module but is {features!r}.")
    reals = [] if real is None else [real] if isinstance(real, str | os.PathLike) else list(real)
    if same_people and not reals:
        raise ValueError("`same_people` is about real faces: name them by `real`.")
    versions = {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    _refuse_another(output, dataset)
    recognizers = (encoder,) if judge is None else (encoder, judge)
    _check_encoders(recognizers, identities, against)
    perceptual = (perceptual or load_lpips()).to(device)
    networks: dict[str, nn.Module | FaceEncoder] = {"lpips": LpipsFeatures(perceptual), "encoder": encoder}
    inputs = Inputs(
        path=dataset,
        faces=FaceSet(open_source(dataset)),
        recognizers=recognizers,
        perceptual=perceptual,
        features=networks[features] if isinstance(features, str) else features,
        settings=settings,
        cache=output / "cache",
        identities=identities,
        against=against,
        references=tuple(FaceSet(open_faces(path)) for path in reals),
        real_name=" + ".join(Path(path).resolve().name for path in reals),
        same_people=same_people,
        device=device,
    )
    _measures_of(inputs)
    # then every picture is read, before any is computed with
    given = zip([dataset, *reals], [inputs.faces, *inputs.references], strict=True)
    sets = [(path, each.usable(path, inputs.cache, skip_unusable)) for path, each in given]
    faces, *references = (each for _, each in sets)
    inputs = replace(inputs, faces=faces, references=tuple(references))
    measures = _measures_of(inputs)
    _check_dimensions(inputs)

    for measure in measures:
        measure.measure()
    shown, grid = identity_grid(faces, seed)
    notes, left_out = _left_out(sets)
    notes += [note for measure in measures for note in measure.notes]
    figures = [figure for measure in measures for figure in measure.found]
    report: dict[str, Any] = {
        "dataset": _describe(dataset, faces),
        "figures": [figure.as_json() for figure in figures],
        "notes": notes,
        "left_out": left_out,
        "settings": asdict(settings)
        | {"encoder": encoder.name, "judge": None if judge is None else judge.name}
        | {"real": ", ".join(map(str, reals)) or None, "same_people": same_people},
        "versions": versions,
    }
    pictures = [picture for measure in measures for picture in measure.pictures]
    write_report(output, report, [(f"{len(shown)} identities, drawn at random: {', '.join(shown)}", grid), *pictures])
    for line in (report["dataset"]["summary"], *(answer.line for answer in arrange([figures])), *notes):
        log(line)
    return report


def _left_out(sets: Sequence[tuple[str | os.PathLike, FaceSet]]) -> tuple[list[str], dict[str, str]]:
    """What is not measured of the data set, which comes first, and of the real ones: a note about what each source
    left out, and file -> reason."""
    notes = [f"Left out of {path}: {each.left_out_of_source}." for path, each in sets if each.source.left_out]
    left_out = {
        f"{path}: {file}" if position else file: reason
        for position, (path, each) in enumerate(sets)
        for file, reason in each.left_out.items()
    }
    return notes, left_out


def _refuse_another(output: Path, dataset: Path) -> None:
    if (output / REPORT).exists():
        before = load_report(output)["dataset"]["path"]
        if before != str(dataset.resolve()):
            raise ValueError(f"{output} has the report of {before}: choose another folder.")


def _check_encoders(recognizers: Sequence[FaceEncoder], *banks: IdentityBank | None) -> None:
    names = [recognizer.name for recognizer in recognizers]
    if len(set(names)) < len(names):
        raise ValueError(f"the judge has to be another recognizer than the encoder, but both are `{names[0]}`.")
    for bank in banks:
        if bank is not None:
            # the recognizer of its name; of none, the first one for the error
            same = [recognizer for recognizer in recognizers if recognizer.name == bank.identity_encoder]
            wanted, measured = (same or recognizers)[0], f"this evaluation (by `{'`, `'.join(names)}`)"
            check_same_encoder("a bank", bank.encoder_mark, measured, wanted.encoder_mark)


def _measures_of(inputs: Inputs) -> list[Measure]:
    """The measures that have what they need.

    Raises:
        ValueError: a measure, or every one, cannot measure the inputs.
    """
    counts = [len(positions) for positions in inputs.faces.identities.values()]
    if len(counts) < 2:
        raise ValueError(f"{inputs.path} has {len(counts)} identity: there are no two people to tell apart.")
    if max(counts) < 2:
        raise ValueError(
            f"{inputs.path} has a single image of each identity: nothing can be said of what varies within one."
        )
    measures = [measure(inputs) for measure in registry.MEASURES if all(map(inputs.has, measure.needs))]
    for measure in measures:
        measure.check()
    return measures


def _check_dimensions(inputs: Inputs) -> None:
    """Banks that do not say their encoder have to be of its dimension, at least."""
    for bank in (inputs.identities, inputs.against):
        if bank is not None and bank.identity_encoder is None:
            encoder = inputs.recognizers[0]
            given, expected = bank.embeddings.shape[-1], encoder.embed_pictures([inputs.faces.read(0)]).shape[1]
            if given != expected:
                raise ValueError(f"a bank of {given} dimensions is not of `{encoder.name}`, which gives {expected}.")


def _describe(dataset: Path, faces: FaceSet) -> dict[str, Any]:
    left_out = f"; {len(faces.left_out)} pictures were left out" if faces.left_out else ""
    size = f"{len(faces)} images of {len(faces.identities)} identities"
    return {
        "name": dataset.resolve().name,
        "path": str(dataset.resolve()),
        "key": faces.key,
        "images": len(faces),
        "identities": len(faces.identities),
        "summary": f"{size}, {faces.images_of_each} of each{left_out}",
    }
