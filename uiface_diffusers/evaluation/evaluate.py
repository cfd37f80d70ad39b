"""All measures of a data set of faces, written to one folder."""

import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data.sources import describe_left_out, open_source, summarize_left_out
from ..encoders import check_same_encoder
from ..faces import ALIGNED_SIZE, FaceEncoder
from ..files import local_path, read_settings
from ..fingerprint import weights_fingerprint
from ..identities import IdentityBank, bank_hash, largest_cosines
from .class_structure import class_centers, class_uniqueness, intra_class_consistency
from .diversity import identity_pairs, mean_lpips
from .face_set import FaceSet, computed_once, open_faces
from .features import LpipsFeatures, LpipsGridFeatures
from .leakage import measure_leakage
from .perceptual import load_lpips
from .plots import identity_grid, plot_histograms
from .precision_recall import class_precision_recall, improved_precision_recall
from .realism import (
    FOLDS,
    MOST_FACES,
    TooFewFacesError,
    choose_spread,
    kernel_features,
    measure_realism,
    real_halves,
)
from .report import REPORT, Measure, load_report, png_bytes, write_report
from .separability import genuine_pairs, impostor_pairs, measure_separability, pair_cosines

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

    Embeddings, features and distances are kept in `output/cache`: the same call goes on where an earlier one was
    stopped, another one computes only what is new.

    Args:
        dataset: folder of `generate_dataset` or `prepare_faces`, identity folders, RecordIO or webdataset shards.
        output: folder of the report.
        encoder: the recognizer that the generator was conditioned on, or any.
        judge (*optional*): another recognizer, to measure identity by a model that the generator has not seen.
        identities (*optional*): the embeddings that the faces were conditioned on, by name.
        against (*optional*): embeddings of real people, as those of the training, to look for leakage.
        real (*optional*): real faces for KID and the classifier test, precision and recall: one set or several, in the
            same forms or as a folder of pictures, each of another person then. Equal parts are taken of several.
            KID and the classifier test compare at most 1,000 faces of the set, of as many people as there are, with
            as many real ones, by the backbone of `perceptual` and by the judge's embeddings (the encoder's without
            one); and those with as many other real faces of other people, to see the noise.
        same_people (`bool`, defaults to `False`): a name means the same person in `dataset` and `real` (the faces are
            conditioned on real people): precision and recall are measured within identities as well. Identities that
            are nobody's have no real images, and so no such figure.
        features: of precision and recall: `"lpips"` (the backbone of `perceptual`), `"encoder"` (embeddings), or a
            module with a `name`, as `TorchvisionFeatures`.
        perceptual (*optional*): as `load_lpips` gives it; AlexNet with torchvision's backbone if not given.
        lpips_pairs (`int`, defaults to 20): pairs of images drawn of each identity; None for all.
        neighbors (`int`, defaults to 3): k of precision and recall.
        threshold (`float`, defaults to 0.3): cosine from which two are of one person, of uniqueness and consistency.
        max_pairs (`int`, defaults to 1,000,000): genuine and impostor pairs at most; all if there are no more.
        max_images (`int`, defaults to 50,000): images at most of each side for these. For precision and recall both
            are drawn down to the smaller set, too, as the figures depend on the numbers. Within identities, so many of
            the set's images at most, of whole identities.
        seed (`int`, defaults to 0): of all draws.
        device: of LPIPS and features.
        skip_unusable (`bool`, defaults to `False`): leave out pictures that cannot be read or are not square.
        log: takes the lines of a summary.

    Returns:
        The content of `report.json`.

    Raises:
        ValueError: the set has a single identity, or a single image of each; pictures are unusable; a bank is of
            another encoder or lacks identities; a setting is out of range; `output` has the report of another set.
    """
    dataset, output = local_path(dataset), local_path(output)
    settings = {"lpips_pairs": lpips_pairs, "neighbors": neighbors, "threshold": threshold, "max_pairs": max_pairs}
    settings |= {"max_images": max_images, "seed": seed}
    for name in ("lpips_pairs", "neighbors", "max_pairs", "max_images"):
        if settings[name] is not None and settings[name] < 1:
            raise ValueError(f"`{name}` has to be positive but is {settings[name]}.")
    if isinstance(features, str) and features not in ("lpips", "encoder"):
        raise ValueError(f"`features` has to be `lpips`, `encoder` or a module but is {features!r}.")
    versions = {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    _refuse_another(output, dataset)
    recognizers = [encoder] if judge is None else [encoder, judge]
    _check_banks(recognizers, (identities, against))
    if against is not None and len(set(against.names)) < 2:
        raise ValueError("`against` has a single identity: leakage is measured against impostors among real people.")
    reals = [] if real is None else [real] if isinstance(real, str | os.PathLike) else list(real)
    real_name = " + ".join(Path(path).resolve().name for path in reals)
    faces, references = FaceSet(open_source(dataset)), [FaceSet(open_faces(path)) for path in reals]
    _check_faces(faces, dataset, identities)
    _check_origin(faces, dataset, identities)
    faces = _usable(faces, dataset, output / "cache", skip_unusable)
    _check_faces(faces, dataset, identities)
    _check_unnamed((identities, against), faces, encoder)
    compared, real_sides, left_out, too_few = None, None, dict(faces.left_out), []
    if references:
        for number, path in enumerate(reals):
            references[number] = _usable(references[number], path, output / "cache", skip_unusable)
            left_out |= {f"{path}: {file}": reason for file, reason in references[number].left_out.items()}
        # equal parts of the real sets
        share = min(min(len(faces), max_images) // len(references), *map(len, references))
        parts = [each.sample(share, seed) for each in references]
        compared = (faces.sample(share * len(parts), seed), FaceSet.join(parts))
        try:
            real_sides = _realism_sides(faces, references, max_images, seed)
        except TooFewFacesError as error:
            too_few = [f"Not measured: {error}"]
    _check_compared(compared, faces, references, same_people, neighbors)

    run = _Evaluation(faces, output / "cache", settings, device, recognizers)
    for path, each in zip([dataset, *reals], [faces, *references], strict=True):
        if each.source.left_out:
            lines = describe_left_out(summarize_left_out(each.source.left_out))
            run.notes.append(f"Left out of {path}: {'; '.join(lines)}.")
    run.notes += too_few
    perceptual = (perceptual or load_lpips()).to(device)
    embeddings = {recognizer.name: faces.embed(recognizer, run.cache) for recognizer in recognizers}
    for name, of_name in embeddings.items():
        run.recognizer(name, of_name)
    if identities is not None:
        name = identities.identity_encoder or encoder.name
        run.contexts(name, embeddings[name], identities)
    if against is not None:
        name = against.identity_encoder or encoder.name
        run.leakage(name, embeddings[name], against)
    run.diversity(perceptual)
    if real_sides is not None:
        grid = LpipsGridFeatures(perceptual)
        run.realism(*real_sides, real_name, grid, grid.network)
        run.realism(*real_sides, real_name, recognizers[-1], recognizers[-1].name)
    if compared is not None:
        network = LpipsFeatures(perceptual) if features == "lpips" else encoder if features == "encoder" else features
        run.precision_recall(*compared, real_name, network)
        if same_people:
            run.class_precision_recall(FaceSet.join(references), real_name, network)
        else:
            run.notes.append(
                "Precision and recall are of the whole sets. Within identities they exist only of faces conditioned on"
                " real people (--same-people)."
            )
    shown, grid = identity_grid(faces, seed)
    run.pictures.insert(0, (f"{len(shown)} identities, drawn at random: {', '.join(shown)}", png_bytes(grid)))

    settings |= {"encoder": encoder.name, "judge": None if judge is None else judge.name}
    settings |= {"real": ", ".join(map(str, reals)) or None, "same_people": same_people}
    report = {
        "dataset": _describe(dataset, faces),
        "figures": [measure.as_json() for measure in run.measures],
        "notes": run.notes,
        "left_out": left_out,
        "settings": settings,
        "versions": versions,
    }
    write_report(output, report, run.measures, run.pictures)
    for line in (report["dataset"]["summary"], *(f"{each.title}: {each.text}" for each in run.measures), *run.notes):
        log(line)
    return report


def _refuse_another(output: Path, dataset: Path) -> None:
    if (output / REPORT).exists():
        before = load_report(output)["dataset"]["path"]
        if before != str(dataset.resolve()):
            raise ValueError(f"{output} has the report of {before}: choose another folder.")


def _check_banks(recognizers: Sequence[FaceEncoder], banks: Sequence[IdentityBank | None]) -> None:
    names = [recognizer.name for recognizer in recognizers]
    if len(set(names)) < len(names):
        raise ValueError(f"the judge has to be another recognizer than the encoder, but both are `{names[0]}`.")
    for bank in banks:
        if bank is not None:
            # the recognizer of its name; of none, the first one for the error
            same = [recognizer for recognizer in recognizers if recognizer.name == bank.identity_encoder]
            wanted, measured = (same or recognizers)[0], f"this evaluation (by `{'`, `'.join(names)}`)"
            check_same_encoder("a bank", bank.encoder_mark, measured, wanted.encoder_mark)
    contexts = banks[0]
    if contexts is not None and len(set(contexts.names)) < len(contexts):
        name = Counter(contexts.names).most_common(1)[0][0]
        raise ValueError(f"the bank of identities has several embeddings of `{name}`: give the one that was followed.")


def _check_unnamed(banks: Sequence[IdentityBank | None], faces: FaceSet, encoder: FaceEncoder) -> None:
    """Banks that do not say their encoder have to be of its dimension, at least."""
    for bank in banks:
        if bank is not None and bank.identity_encoder is None:
            given, expected = bank.embeddings.shape[1], encoder.embed_pictures([faces.read(0)]).shape[1]
            if given != expected:
                raise ValueError(f"a bank of {given} dimensions is not of `{encoder.name}`, which gives {expected}.")


def _usable(faces: FaceSet, path: str | os.PathLike, cache: Path, skip_unusable: bool) -> FaceSet:
    """Reads every picture before any is computed with."""
    unusable = faces.check(cache)
    if unusable and not skip_unusable:
        file, reason = next(iter(unusable.items()))
        raise ValueError(
            f"{len(unusable)} of {len(faces)} pictures in {path} cannot be evaluated, as {file}: {reason}. Photographs"
            " that are not aligned are made usable by `uiface prepare`; --skip-unusable leaves such pictures out."
        )
    return faces.without(unusable)


def _check_faces(faces: FaceSet, dataset: Path, identities: IdentityBank | None) -> None:
    counts = [len(positions) for positions in faces.identities.values()]
    if len(counts) < 2:
        raise ValueError(f"{dataset} has {len(counts)} identity: there are no two people to tell apart.")
    if max(counts) < 2:
        raise ValueError(
            f"{dataset} has a single image of each identity: nothing can be said of what varies within one."
        )
    missing = [] if identities is None else sorted(faces.identities.keys() - set(identities.names))
    if missing:
        raise ValueError(f"the bank of identities lacks {len(missing)} of the data set's, as `{missing[0]}`.")


def _check_origin(faces: FaceSet, dataset: Path, identities: IdentityBank | None) -> None:
    """A set of `generate_dataset` says which bank it follows. Names would not tell: those of all banks begin at 0."""
    file = dataset / "generation.json"
    if identities is None or not file.exists():
        return
    settings = read_settings(file)
    followed = identities.take([i for i, name in enumerate(identities.names) if name in faces.identities])
    if bank_hash(followed) != settings.get("identities"):
        raise ValueError(f"{file} says that the faces follow another bank of identities than the one given.")


def _realism_sides(
    faces: FaceSet, references: Sequence[FaceSet], max_images: int, seed: int
) -> tuple[FaceSet, FaceSet, FaceSet]:
    """Generated faces, as many real ones, and as many others, to be measured by KID and the classifier test.

    Raises:
        TooFewFacesError: the generated or a half of the real ones are of fewer than five people.
    """
    halves = real_halves(references, min(len(faces), max_images, MOST_FACES), seed)
    chosen = faces.take(choose_spread(faces.names, len(halves[0]), seed))
    if len(chosen.identities) < FOLDS:
        raise TooFewFacesError(
            f"{len(chosen)} faces of {len(chosen.identities)} identities: KID and the classifier test need {FOLDS}"
            " identities at least."
        )
    return chosen, *halves


def _check_compared(
    compared: tuple[FaceSet, FaceSet] | None,
    faces: FaceSet,
    references: Sequence[FaceSet],
    same_people: bool,
    neighbors: int,
) -> None:
    if compared is None:
        if same_people:
            raise ValueError("`same_people` is about real faces: name them by `real`.")
        return
    if len(compared[0]) <= neighbors:
        raise ValueError(f"sets of {len(compared[0])} images are too small for {neighbors} neighbors.")
    if same_people and not _people_of_both(faces, FaceSet.join(references), neighbors):
        raise ValueError(f"no identity has more than {neighbors} images under the same name in both sets.")


def _people_of_both(faces: FaceSet, references: FaceSet, neighbors: int) -> set[str]:
    """Names with more images than neighbors in both sets."""
    ours, theirs = Counter(faces.names), Counter(references.names)
    return {name for name, count in ours.items() if min(count, theirs[name]) > neighbors}


def _describe(dataset: Path, faces: FaceSet) -> dict[str, Any]:
    left_out = f"; {len(faces.left_out)} pictures were left out" if faces.left_out else ""
    return {
        "name": dataset.resolve().name,
        "path": str(dataset.resolve()),
        "key": faces.key,
        "images": len(faces),
        "identities": len(faces.identities),
        "summary": f"{len(faces)} images of {len(faces.identities)} identities, {_of_each(faces)} of each{left_out}",
    }


def _of_each(faces: FaceSet) -> str:
    """How many images the identities have, for people."""
    counts = sorted(len(positions) for positions in faces.identities.values())
    return f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"


def _digest(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


class _Evaluation:
    """Measures, notes and pictures of a data set in the making."""

    def __init__(
        self,
        faces: FaceSet,
        cache: Path,
        settings: dict[str, Any],
        device: torch.device | str,
        recognizers: Sequence[FaceEncoder],
    ):
        self.faces, self.cache, self.settings, self.device = faces, cache, settings, device
        self.weights = {recognizer.name: recognizer.fingerprint for recognizer in recognizers}
        self.measures: list[Measure] = []
        self.notes: list[str] = []
        self.pictures: list[tuple[str, bytes]] = []

    def add(self, values: dict[str, float], conditions: dict[str, Any], detail: str = "") -> None:
        self.measures += [Measure(name, value, conditions, detail) for name, value in values.items()]

    def conditions(self, recognizer: str) -> dict[str, Any]:
        return {"recognizer": recognizer, "weights": self.weights[recognizer]}

    def recognizer(self, name: str, embeddings: torch.Tensor) -> None:
        """How well a recognizer tells the identities apart."""
        labels, max_pairs, seed = self.faces.labels, self.settings["max_pairs"], self.settings["seed"]
        genuine = pair_cosines(embeddings, genuine_pairs(labels.numpy(), max_pairs, seed))
        impostor = pair_cosines(embeddings, impostor_pairs(labels.numpy(), max_pairs, seed))
        pairs = f"Of {len(genuine):,} genuine and {len(impostor):,} impostor pairs."
        self.add(asdict(measure_separability(genuine, impostor)), self.conditions(name), pairs)
        threshold = self.settings["threshold"]
        consistency_others, to_others = intra_class_consistency(embeddings, labels, threshold, leave_one_out=True)
        conditions = self.conditions(name) | {"threshold": threshold}
        # these two depend on the set's size
        uniqueness = class_uniqueness(class_centers(embeddings, labels), threshold)
        self.add({"uniqueness": uniqueness}, conditions | {"identities": len(self.faces.identities)})
        consistency = intra_class_consistency(embeddings, labels, threshold)[0]
        self.add({"consistency": consistency}, conditions | {"images of each": _of_each(self.faces)})
        values = {"consistency_others": consistency_others, "impostors_above": float((impostor > threshold).mean())}
        self.add(values, conditions)
        histograms = {
            "genuine pairs": genuine,
            "impostor pairs": impostor,
            "image to the mean of the others": to_others,
        }
        plot = plot_histograms(histograms, "cosine", {"threshold": threshold})
        self.pictures.append((f"Similarities by {name}", png_bytes(plot)))

    def contexts(self, name: str, embeddings: torch.Tensor, identities: IdentityBank) -> None:
        """How near the images are to the embeddings that they were conditioned on."""
        known = F.normalize(identities.embeddings)
        numbers = {identity: number for number, identity in enumerate(identities.names)}
        own = torch.tensor([numbers[identity] for identity in self.faces.names])
        nearest, cosines = largest_cosines(embeddings, known)[1], (embeddings * known[own]).sum(dim=1)
        values = {"context_cosine": cosines.mean().item(), "context_nearest": (nearest == own).float().mean().item()}
        self.add(values, self.conditions(name), f"The bank has {len(identities)} contexts.")
        plot = plot_histograms({"image to its context": cosines}, "cosine")
        self.pictures.append((f"Similarity to the context by {name}", png_bytes(plot)))

    def leakage(self, name: str, embeddings: torch.Tensor, against: IdentityBank) -> None:
        """Whether real people are shown."""
        found = measure_leakage(IdentityBank(embeddings, name, self.faces.names, self.weights[name]), against)
        digest = hashlib.sha256(against.embeddings.contiguous().numpy()).hexdigest()[:12]
        conditions = self.conditions(name) | {"real": f"{len(against)} embeddings {digest}"}
        for rate, threshold in found.thresholds.items():
            values = {
                "leakage_images": found.image_shares[rate],
                "leakage_identities": found.identity_shares[rate],
                "leakage_strangers": found.real_shares[rate],
            }
            detail = f"{threshold:.3f} is exceeded by {rate:.2%} of {found.impostor_pairs:,} real impostor pairs."
            self.add(values, {**conditions, "FAR": f"{rate:g}"}, detail)
        self.add({"leakage_largest": found.image_cosines.max().item()}, conditions)
        marks = {f"FAR {rate:g} of real impostors": threshold for rate, threshold in found.thresholds.items()}
        plot = plot_histograms({"image to the nearest real face": found.image_cosines}, "cosine", marks)
        self.pictures.append((f"Nearest real face by {name}", png_bytes(plot)))

    def diversity(self, perceptual: nn.Module) -> None:
        """LPIPS between images of one identity."""
        faces, number, seed = self.faces, self.settings["lpips_pairs"], self.settings["seed"]
        members = {name: positions for name, positions in faces.identities.items() if len(positions) > 1}
        pairs = [identity_pairs(name, len(members[name]), number, seed) for name in members]
        positions = list(members.values())

        def compute(rows: range) -> torch.Tensor:
            (row,) = rows
            needed, places = np.unique(pairs[row], return_inverse=True)
            images = faces.pixels([positions[row][i] for i in needed]).to(self.device)
            return torch.tensor([mean_lpips(images, places.reshape(-1, 2), perceptual)], dtype=torch.float64)

        network = f"{perceptual.pnet_type} {weights_fingerprint(perceptual)}"
        folder = self.cache / f"lpips-{_digest(network, number, seed, faces.key)}"
        distances = computed_once(folder, len(members), compute, "LPIPS", "identity", batch_size=1, batches_a_file=50)
        detail = f"Of {sum(map(len, pairs)):,} pairs of {len(members):,} identities."
        conditions = {"network": network, "size": ALIGNED_SIZE}
        self.add({"intra_class_lpips": distances.mean().item()}, conditions, detail)
        plot = plot_histograms({"mean of an identity": distances}, "LPIPS")
        self.pictures.append(("Perceptual distance within identities", png_bytes(plot)))

    def realism(
        self,
        faces: FaceSet,
        references: FaceSet,
        others: FaceSet,
        real: str,
        network: FaceEncoder | nn.Module,
        name: str,
    ) -> None:
        """How far generated faces are from real ones, and how far other real faces are."""
        sides = [self.features(each, network) for each in (faces, references, others)]
        if isinstance(network, FaceEncoder):
            sides = [kernel_features(each) for each in sides]
        ours, theirs, other = sides
        seed = self.settings["seed"]
        found = measure_realism(theirs, ours, references.names, faces.names, seed)
        noise = measure_realism(theirs, other, references.names, others.names, seed)
        conditions = self.of_network(network) | {"images": len(faces), "identities": len(faces.identities)}
        conditions |= {"real": f"{real} {references.key}", "real identities": len(references.identities)}
        values = {"kid": found.kid, "kid_std": found.kid_std, "kid_real": noise.kid}
        values |= {"c2st": found.c2st, "c2st_real": noise.c2st}
        detail = (
            f"{len(faces)} faces of {len(faces.identities)} identities against {len(references)} of"
            f" {len(references.identities)}; the other half is {len(others)} of {len(others.identities)}."
        )
        self.add({f"{measure}/{name}": value for measure, value in values.items()}, conditions, detail)

    def features(self, faces: FaceSet, network: FaceEncoder | nn.Module) -> torch.Tensor:
        """`(N, D)`."""
        if isinstance(network, FaceEncoder):
            return faces.embed(network, self.cache)
        network = network.to(self.device)

        def compute(rows: range) -> torch.Tensor:
            found = network(faces.pixels(rows).to(self.device)).float().cpu()
            wrong = (~found.isfinite().all(dim=1)).nonzero().flatten().tolist()
            if wrong:
                file = faces.photographs[rows[wrong[0]]].file
                raise ValueError(f"the features of {file} by {network.name} are not finite: is the backbone whole?")
            return found

        return computed_once(
            self.cache / f"features-{_digest(network.name, faces.key)}", len(faces), compute, "features"
        )

    def of_network(self, network: FaceEncoder | nn.Module) -> dict[str, Any]:
        """A feature network as a condition; other networks have their weights in their name."""
        weights = {"weights": network.fingerprint} if isinstance(network, FaceEncoder) else {}
        return {"features": network.name} | weights

    def precision_recall(
        self, faces: FaceSet, references: FaceSet, real: str, network: FaceEncoder | nn.Module
    ) -> None:
        """How much of one set lies among the other."""
        k = self.settings["neighbors"]
        ours, theirs = self.features(faces, network), self.features(references, network)
        conditions = self.of_network(network) | {"k": k, "images": len(faces), "real": f"{real} {references.key}"}
        precision, recall = improved_precision_recall(theirs, ours, k, progress=True)
        self.add({"precision": precision, "recall": recall}, conditions)

    def class_precision_recall(self, references: FaceSet, real: str, network: FaceEncoder | nn.Module) -> None:
        """How much of a person's images lies among the real ones of that person."""
        k = self.settings["neighbors"]
        people = self.faces.of_identities(_people_of_both(self.faces, references, k))
        faces = people.sample_identities(self.settings["max_images"], self.settings["seed"])
        references = references.of_identities(faces.identities)
        ours, theirs = self.features(faces, network), self.features(references, network)
        conditions = self.of_network(network) | {"k": k, "images of each": _of_each(faces)}
        conditions |= {"real": f"{real} {references.key}", "real images of each": _of_each(references)}
        within = class_precision_recall(theirs, references.names, ours, faces.names, k)
        values = {"class_precision": within.precision, "class_recall": within.recall}
        self.add(values, conditions, f"Over {within.identities} people with more than {k} images in both sets.")
