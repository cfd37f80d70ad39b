"""Identity banks: embeddings with the name of the encoder that they come from."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from .encoders import EncoderMark, check_same_encoder, projector_mark
from .files import (
    check_no_folder,
    check_settings,
    complete_file,
    local_path,
    open_safetensors,
    read_safetensors,
    read_torch,
    why_unreadable,
)
from .fingerprint import pipeline_fingerprint
from .seeds import CANDIDATE, NOISE_VERSION, image_generator

if TYPE_CHECKING:
    from .faces import FaceEncoder
    from .pipeline_uiface import UIFacePipeline

# how often `sample_identities` draws as many candidates as are asked for
MAX_ROUNDS = 100
# rows of one matrix product: 1024 x 16384 cosines are 64 MiB
CANDIDATE_ROWS, KNOWN_ROWS = 1024, 16384
# of cosines, for histograms
BIN_EDGES = np.linspace(-0.2, 1.0, 25)


@dataclass
class IdentityBank:
    """Identity embeddings of one encoder.

    Args:
        embeddings (`torch.Tensor` of shape `(N, identity_dim)`): float32.
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

    def __post_init__(self):
        self.embeddings = torch.as_tensor(self.embeddings, dtype=torch.float32)
        if self.embeddings.ndim != 2:
            raise ValueError(
                f"an identity bank holds (N, identity_dim) embeddings, not {tuple(self.embeddings.shape)}."
            )
        self.names = list(self.names) or [f"{i:06d}" for i in range(len(self.embeddings))]
        if len(self.names) != len(self.embeddings):
            raise ValueError(f"{len(self.names)} names for {len(self.embeddings)} embeddings.")
        # a cosine to one would be NaN, and every search for the nearest would miss what is near
        lengths = self.embeddings.norm(dim=1)
        wrong = (~(lengths.isfinite() & (lengths > 0))).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"{len(wrong)} of {len(self)} embeddings are zero or not finite, as that of `{self.names[wrong[0]]}`"
                f" in row {wrong[0]}: leave them out."
            )

    def __len__(self) -> int:
        return len(self.embeddings)

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


def _read_arrays(file: Path) -> Any:
    """What a file of embeddings holds: an array, or several by their names. Nothing in it is executed."""
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    if file.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        return read_torch(file)
    if file.suffix not in (".npy", ".npz"):
        raise ValueError(f"{file} is no file of embeddings: .npy, .npz, .pt (of tensors) or .safetensors.")
    try:
        content = np.load(file, allow_pickle=False)
        return content if isinstance(content, np.ndarray) else {name: content[name] for name in content.files}
    except Exception as error:  # damaged headers raise nearly anything
        if str(error).startswith("Object arrays"):
            raise ValueError(
                f"{file} holds pickled Python objects, which are not executed: save the array of numbers itself."
            ) from error
        raise ValueError(f"{why_unreadable(file, error)}.") from error


def import_identities(
    file: str | os.PathLike, identity_encoder: str, key: str | None = None
) -> tuple[IdentityBank, dict[str, Any]]:
    """A bank of embeddings that others published: one identity per row, in the file's order.

    Args:
        file: `.npy`, `.npz`, `.pt` (or `.pth`, of nothing but tensors) or `.safetensors`: `(N, identity_dim)` floating
            point numbers of any length; or a name and a vector for each identity.
        identity_encoder (`str`): the face recognition model that made them.
        key (`str`, *optional*): which of several arrays.

    Returns:
        The bank, of unit length, and a report: `identities`, `dimension`, `not of unit length` (how many were not) and
        `duplicates` (name -> the first one with the same direction, to four digits; they are kept).

    Raises:
        ValueError: the file is damaged, has several arrays and no `key`, or rows are zero or not finite; the message
            has their numbers, from 0.
    """
    file = local_path(file)
    content = _read_arrays(file)
    names: list[str] = []
    if isinstance(content, Mapping):
        shapes = {str(name): tuple(getattr(value, "shape", ())) for name, value in content.items()}
        if key is not None and key not in shapes:
            raise ValueError(f"{file} has no `{key}`; its arrays (--key) are {_shapes(shapes)}.")
        if key is not None or len(shapes) == 1:
            key = next(iter(shapes)) if key is None else key
            content = next(value for name, value in content.items() if str(name) == key)
        elif shapes and len(set(shapes.values())) == 1 and len(next(iter(shapes.values()))) == 1:
            names, content = list(shapes), list(content.values())
        else:
            raise ValueError(f"{file} has several arrays, choose one by --key: {_shapes(shapes)}.")
    elif key is not None:
        raise ValueError(f"{file} has a single array without a name: leave out --key.")
    try:
        rows = content if isinstance(content, list | tuple) else [content]
        # torch has no other byte order than the machine's
        rows = [row.astype(row.dtype.newbyteorder("=")) if isinstance(row, np.ndarray) else row for row in rows]
        tensors = [torch.as_tensor(row).detach() for row in rows]
        embeddings = torch.stack(tensors) if isinstance(content, list | tuple) else tensors[0]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file} holds no embeddings but a {type(content).__name__}: {error}") from error
    if embeddings.ndim > 2 and sorted(embeddings.shape[1:])[-2] == 1:
        embeddings = embeddings.flatten(1)
    if embeddings.ndim != 2 or not embeddings.numel() or not embeddings.is_floating_point():
        kind = f"{tuple(embeddings.shape)} of {str(embeddings.dtype).removeprefix('torch.')}"
        raise ValueError(f"{file} has {kind}: embeddings are (N, identity_dim) floating point numbers.")
    lengths = embeddings.double().norm(dim=1)
    wrong = (~(lengths.isfinite() & (lengths > 0))).nonzero().flatten().tolist()
    if wrong:
        shown = ", ".join(map(str, wrong[:10])) + (", ..." if len(wrong) > 10 else "")
        raise ValueError(
            f"{len(wrong)} of {len(embeddings)} rows of {file} are zero or not finite: rows {shown}, counted from 0."
            " Take them out."
        )
    unit = (embeddings.double() / lengths[:, None]).float()
    bank = IdentityBank(unit, identity_encoder, names)
    first: dict[bytes, str] = {}
    duplicates = {}
    for name, row in zip(bank.names, unit.mul(1e4).round().short().numpy(), strict=True):
        original = first.setdefault(row.tobytes(), name)
        if original != name:
            duplicates[name] = original
    report = {"identities": len(bank), "dimension": unit.shape[1], "duplicates": duplicates}
    return bank, report | {"not of unit length": int(((lengths - 1).abs() > 1e-3).sum())}


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    shown = [f"`{name}` {shape}" for name, shape in list(shapes.items())[:10]]
    return ", ".join(shown) + (f" and {len(shapes) - 10} more" if len(shapes) > 10 else "")


def check_same_dimension(dimension: int, other: int) -> None:
    """
    Raises:
        ValueError: embeddings of the two cannot be compared.
    """
    if dimension != other:
        raise ValueError(f"embeddings of {dimension} and of {other} numbers cannot be compared: give one encoder's.")


def largest_cosines(embeddings: torch.Tensor, known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine to, and position of, the nearest known embedding, in blocks: the full matrix is never held.

    Args:
        embeddings (`torch.Tensor` of shape `(N, D)`): of unit length.
        known (`torch.Tensor` of shape `(M, D)`): of unit length; may be empty.

    Returns:
        Two tensors of shape `(N,)`: cosines (-1 without known embeddings) and positions.

    Raises:
        ValueError: the dimensions differ.
    """
    check_same_dimension(embeddings.shape[1], known.shape[1])
    cosines = embeddings.new_full((len(embeddings),), -1.0)
    positions = torch.zeros(len(embeddings), dtype=torch.long)
    for start in range(0, len(embeddings), CANDIDATE_ROWS):
        rows = slice(start, start + CANDIDATE_ROWS)
        for first in range(0, len(known), KNOWN_ROWS):
            values, nearest = (embeddings[rows] @ known[first : first + KNOWN_ROWS].T).max(dim=1)
            nearer = values > cosines[rows]
            cosines[rows] = torch.where(nearer, values, cosines[rows])
            positions[rows] = torch.where(nearer, nearest + first, positions[rows])
    return cosines, positions


class DistinctIdentities:
    """Keeps embeddings greedily, in the order that they come: one whose cosine to an excluded or to a kept embedding
    is `max_similarity` or more falls (Kim et al. 2023).

    Args:
        excluded (`torch.Tensor` of shape `(M, D)`): of unit length, as the training identities; may be empty.
        max_similarity (`float`): in (-1, 1].
        number (`int`, *optional*): stop at so many.
    """

    def __init__(self, excluded: torch.Tensor, max_similarity: float, number: int | None = None):
        self.excluded, self.max_similarity, self.number = excluded, max_similarity, number
        self.kept = excluded.new_empty(0, excluded.shape[1])
        self.report = {"candidates": 0, "kept": 0, "near an excluded identity": 0, "near a kept identity": 0}

    @property
    def complete(self) -> bool:
        return self.number is not None and len(self.kept) >= self.number

    def add(self, candidates: torch.Tensor) -> torch.Tensor:
        """Takes candidates `(N, D)` of unit length; returns which of them are kept, `(N,)`. Those that come after the
        last one wanted are not looked at."""
        taken = torch.zeros(len(candidates), dtype=torch.bool)
        for start in range(0, len(candidates), CANDIDATE_ROWS):
            rows = candidates[start : start + CANDIDATE_ROWS]
            near_excluded = largest_cosines(rows, self.excluded)[0] >= self.max_similarity
            near_kept = largest_cosines(rows, self.kept)[0] >= self.max_similarity
            near_each_other = rows @ rows.T >= self.max_similarity
            chosen: list[int] = []
            for i in range(len(rows)):
                if self.number is not None and len(self.kept) + len(chosen) >= self.number:
                    break
                self.report["candidates"] += 1
                if near_excluded[i]:
                    self.report["near an excluded identity"] += 1
                elif near_kept[i]:
                    self.report["near a kept identity"] += 1
                else:
                    chosen.append(i)
                    near_kept |= near_each_other[i]
            taken[[start + i for i in chosen]] = True
            self.kept = torch.cat([self.kept, rows[chosen]])
            self.report["kept"] = len(self.kept)
        return taken


def perturb_embeddings(
    embeddings: torch.Tensor, cosine_range: tuple[float, float], generators: Sequence[torch.Generator]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns embeddings away from themselves by a random angle in a random direction (IDperturb, CVPR 2026).

    Args:
        embeddings (`torch.Tensor` of shape `(N, D)`): of unit length.
        cosine_range: a, b of the cosine s ~ U[a, b] between an embedding and its perturbation, within [-1, 1].
        generators: one an embedding.

    Returns:
        The perturbed embeddings, `(N, D)`, of unit length, and their cosines to the given ones, `(N,)`.

    Raises:
        ValueError: not a range of cosines, or no embeddings.
    """
    if not len(embeddings):
        raise ValueError("the bank is empty: there is nothing to perturb.")
    low, high = cosine_range
    if not -1 <= low <= high <= 1:
        raise ValueError(f"a range of cosines goes from a to b with -1 <= a <= b <= 1, not from {low} to {high}.")
    cosines = torch.stack([low + (high - low) * torch.rand((), generator=each) for each in generators])
    directions = torch.stack([torch.randn(embeddings.shape[1], generator=each) for each in generators])
    # uniform among the directions at a right angle
    directions = F.normalize(directions - (directions * embeddings).sum(dim=1, keepdim=True) * embeddings)
    sines = (1 - cosines.square()).clamp(min=0).sqrt()
    return F.normalize(cosines[:, None] * embeddings + sines[:, None] * directions), cosines


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
    mean, centered = known.mean(dim=0), known - known.mean(dim=0)
    # a standard normal vector times the covariance's root has that covariance
    values, vectors = torch.linalg.eigh((centered.T @ centered).double() / (len(known) - 1))
    root = (vectors * values.clamp(min=0).sqrt()).T.float()
    generator = torch.Generator().manual_seed(seed)
    distinct = DistinctIdentities(known, max_similarity, number)
    for _ in range(MAX_ROUNDS):
        distinct.add(F.normalize(mean + torch.randn(number, len(root), generator=generator) @ root))
        if distinct.complete:
            return replace(bank, embeddings=distinct.kept, names=[])
    raise ValueError(
        f"only {len(distinct.kept)} of {number} identities with a cosine below {max_similarity} to each other and to"
        f" the bank were found in {MAX_ROUNDS * number} draws: allow a larger one."
    )


def make_identities(
    pipeline: "UIFacePipeline",
    encoder: "FaceEncoder",
    number: int,
    output: str | os.PathLike,
    exclude: Sequence[IdentityBank] = (),
    max_similarity: float = 0.3,
    max_candidates: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    **sampling: Any,
) -> dict[str, int]:
    """New identities from the model itself: faces of nobody in particular (the empty context), embedded, and kept when
    they are unlike every one kept before and every excluded one (UIFace's authors; DCFace, Kim et al. 2023).

    The candidates' embeddings are saved beside `output` as they come; the same call goes on after an interruption.

    Args:
        pipeline: makes the candidates; its progress bar is switched off.
        encoder: embeds them: the encoder that the pipeline was trained on.
        number: identities wanted.
        output: the bank's file, safetensors.
        exclude: banks of identities to keep away from, as those of the training.
        max_similarity (`float`, defaults to 0.3): cosine from which two identities are too near.
        max_candidates (`int`, *optional*): give up after so many; 20 times `number` if not given.
        seed (`int`, defaults to 0): candidate k depends on the pipeline, `sampling`, k and the seed only.
        batch_size (`int`, defaults to 16): faces per call.
        sampling: further arguments of the pipeline's call.

    Returns:
        The report: `candidates`, `kept`, `near an excluded identity`, `near a kept identity`, `no face`.

    Raises:
        ValueError: an encoder or a setting does not fit, before anything is written; or too few identities were found:
            the message has the report, and `output` holds what was found.
    """
    for name, value in {"number": number, "batch_size": batch_size, "max_candidates": max_candidates}.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` has to be positive but is {value}.")
    pipeline.check_sampling(**sampling)
    output = local_path(output)
    check_no_folder(output)
    check_same_encoder("the pipeline", projector_mark(pipeline.identity_projector), "the pack", encoder.encoder_mark)
    for bank in exclude:
        check_same_encoder("an excluded bank", bank.encoder_mark, "the pack", encoder.encoder_mark)
    excluded = _join(exclude, pipeline.identity_projector.config.identity_dim)
    distinct = DistinctIdentities(excluded, max_similarity, number)
    max_candidates = 20 * number if max_candidates is None else max_candidates
    folder = Path(f"{output}.candidates")
    settings = {"seed": seed, "batch_size": batch_size, "sampling": sampling}
    settings |= {"model": pipeline_fingerprint(pipeline), "noise": NOISE_VERSION}
    settings |= {"identity_encoder": encoder.name, "identity_encoder_fingerprint": encoder.fingerprint}
    check_settings(folder / "settings.json", settings, if_known=["identity_encoder_fingerprint"])
    pipeline.set_progress_bar_config(disable=True)
    faceless = 0
    with tqdm(total=number, desc="identities", unit="identity") as progress:
        for start in range(0, max_candidates, batch_size):
            file = folder / f"{start // batch_size:06d}.safetensors"
            if not file.exists():
                numbers = range(start, start + batch_size)
                generators = [image_generator(seed, "", number, stream=CANDIDATE) for number in numbers]
                pictures = pipeline(None, batch_size, generator=generators, **sampling).images
                found = [bool(encoder.detect(np.asarray(picture))) for picture in pictures]
                with complete_file(file) as beside:
                    save_file({"embeddings": encoder.embed_pictures(pictures), "found": torch.tensor(found)}, beside)
            candidates = read_safetensors(file, ("embeddings", "found"))
            faceless += int((~candidates["found"]).sum())
            distinct.add(candidates["embeddings"][candidates["found"]])
            progress.update(len(distinct.kept) - progress.n)
            progress.set_postfix({name: value for name, value in distinct.report.items() if name != "kept"})
            if distinct.complete:
                break
    report = {**distinct.report, "no face": faceless}
    IdentityBank(distinct.kept, encoder.name, identity_encoder_fingerprint=encoder.fingerprint).save(output)
    if not distinct.complete:
        raise ValueError(
            f"only {len(distinct.kept)} of {number} identities were found ({report}); they are in {output}. Allow more"
            " candidates or a larger similarity and run it again: candidates are not made twice."
        )
    return report


def _join(banks: Sequence[IdentityBank], dimension: int) -> torch.Tensor:
    """The embeddings of all banks, `(N, dimension)`, of unit length."""
    for bank in banks:
        check_same_dimension(bank.embeddings.shape[1], dimension)
    return torch.cat([torch.empty(0, dimension), *(F.normalize(bank.embeddings) for bank in banks)])


def keep_distinct(
    bank: IdentityBank, exclude: Sequence[IdentityBank] = (), max_similarity: float = 0.3, number: int | None = None
) -> tuple[IdentityBank, dict[str, int]]:
    """The identities of a bank, in its order, that are unlike each other and unlike the excluded ones; and the report
    of `DistinctIdentities`."""
    for other in exclude:
        check_same_encoder("the bank", bank.encoder_mark, "an excluded bank", other.encoder_mark)
    distinct = DistinctIdentities(_join(exclude, bank.embeddings.shape[1]), max_similarity, number)
    taken = distinct.add(F.normalize(bank.embeddings))
    return bank.take(taken.nonzero().flatten().tolist()), distinct.report


@dataclass
class BankReport:
    """
    Args:
        nearest_other (`torch.Tensor` of shape `(N,)`): cosine of each identity to the nearest other one of its bank.
        duplicates (`list[tuple[str, str, float]]`): names and cosine of identities nearer than 0.99.
        nearest_known (`torch.Tensor` of shape `(N,)`, *optional*): cosine to the nearest known identity.
        known_names (`list[str]`): the names of those.
    """

    nearest_other: torch.Tensor
    duplicates: list[tuple[str, str, float]]
    nearest_known: torch.Tensor | None
    known_names: list[str]


def inspect_bank(bank: IdentityBank, known: IdentityBank | None = None) -> BankReport:
    """How near the identities of a bank (two or more) are to each other, and to known ones, such as those of the
    training.

    Raises:
        ValueError: the two are of different encoders, or too small.
    """
    if len(bank) < 2 or (known is not None and not len(known)):
        raise ValueError(
            f"the bank has {len(bank)} identities: two are needed to compare."
            if len(bank) < 2
            else "the known bank is empty: there is nothing to compare with."
        )
    if known is not None:
        check_same_encoder("the bank", bank.encoder_mark, "the known one", known.encoder_mark)
    embeddings = F.normalize(bank.embeddings)
    numbers = {name: i for i, name in enumerate(dict.fromkeys(bank.names))}
    labels = torch.tensor([numbers[name] for name in bank.names])
    nearest, partners = [], []
    for start in range(0, len(embeddings), CANDIDATE_ROWS):
        similarity = embeddings[start : start + CANDIDATE_ROWS] @ embeddings.T
        similarity[labels[start : start + CANDIDATE_ROWS, None] == labels] = -1  # not to itself
        values, positions = similarity.max(dim=1)
        nearest += values.tolist()
        partners += positions.tolist()
    duplicates = [
        (bank.names[i], bank.names[j], cosine)
        for i, (j, cosine) in enumerate(zip(partners, nearest, strict=True))
        if cosine > 0.99 and (i < j or partners[j] != i)
    ]
    if known is None:
        return BankReport(torch.tensor(nearest), duplicates, None, [])
    cosines, positions = largest_cosines(embeddings, F.normalize(known.embeddings))
    return BankReport(torch.tensor(nearest), duplicates, cosines, [known.names[i] for i in positions.tolist()])


def text_histogram(cosines: torch.Tensor) -> list[str]:
    """A line for each bin that is not empty: its lower edge, a bar, and the count. Cosines below -0.2 are in the
    first bin."""
    counts, _ = np.histogram(cosines.clamp(BIN_EDGES[0], BIN_EDGES[-1]), BIN_EDGES)
    bars = ["#" * int(np.ceil(50 * count / counts.max())) for count in counts]
    rows = zip(BIN_EDGES, bars, counts, strict=False)
    return [f"{low:5.2f} {bar:50} {count}" for low, bar, count in rows if count]
