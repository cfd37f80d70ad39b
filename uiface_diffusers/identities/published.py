"""Embeddings that others published, as a bank."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import local_path, read_safetensors, read_torch, why_unreadable
from .bank import IdentityBank, without_direction


def import_identities(
    file: str | os.PathLike,
    identity_encoder: str,
    key: str | None = None,
    identity_ids: str | os.PathLike | None = None,
) -> tuple[IdentityBank, dict[str, Any]]:
    """A bank of embeddings that others published: one identity per row, in the file's order.

    Args:
        file: `.npy`, `.npz`, `.pt` (or `.pth`, of nothing but tensors) or `.safetensors`: `(N, identity_dim)` floating
            point numbers of any length; or a name and a vector for each identity; or `(N, images, identity_dim)`, an
            embedding for each image of an identity.
        identity_encoder (`str`): the face recognition model that made them.
        key (`str`, *optional*): which of several arrays.
        identity_ids (*optional*): the names: `.npy` of N integers or strings, such as the `identity_ids.npy` beside a
            `contexts.npy`. Of `(N, identity_dim)` embeddings, rows of one id are the images of one identity, in their
            order.

    Returns:
        The bank, of unit length, and a report: `identities`, `dimension`, `not of unit length` (how many were not) and
        `duplicates` (name -> the first one with the same direction, to four digits; they are kept).

    Raises:
        ValueError: the file is damaged, has several arrays and no `key`, or rows are zero or not finite; the message
            has their numbers, from 0. Or the ids do not fit the embeddings.
    """
    file = local_path(file)
    names, content = _chosen_array(file, _read_arrays(file), key)
    embeddings = _as_embeddings(file, content)
    lengths = embeddings.double().norm(dim=-1)
    wrong = without_direction(lengths.flatten())
    if wrong:
        shown = ", ".join(map(str, wrong[:10])) + (", ..." if len(wrong) > 10 else "")
        of = f"{file}" if embeddings.ndim == 2 else f"{file}, {tuple(embeddings.shape)} as rows of numbers,"
        raise ValueError(
            f"{len(wrong)} of {lengths.numel()} rows of {of} are zero or not finite: rows {shown}, counted from 0."
            " Take them out."
        )
    embeddings = (embeddings.double() / lengths[..., None]).float()
    if identity_ids is not None:
        names, embeddings = _by_identity(file, embeddings, identity_ids)
    bank = IdentityBank(embeddings, identity_encoder, names)
    report = {"identities": len(bank), "dimension": bank.embeddings.shape[-1], "duplicates": _duplicates(bank)}
    return bank, report | {"not of unit length": int(((lengths - 1).abs() > 1e-3).sum())}


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


def _chosen_array(file: Path, content: Any, key: str | None) -> tuple[list[str], Any]:
    """The names of the identities, if the file has them, and its array or vectors."""
    if not isinstance(content, Mapping):
        if key is not None:
            raise ValueError(f"{file} has a single array without a name: leave out --key.")
        return [], content
    arrays = {str(name): value for name, value in content.items()}
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in arrays.items()}
    if key is not None and key not in shapes:
        raise ValueError(f"{file} has no `{key}`; its arrays (--key) are {_shapes(shapes)}.")
    if key is not None or len(shapes) == 1:
        return [], arrays[next(iter(shapes)) if key is None else key]
    if len(set(shapes.values())) == 1 and len(next(iter(shapes.values()))) == 1:
        return list(arrays), list(arrays.values())
    raise ValueError(f"{file} has several arrays, choose one by --key: {_shapes(shapes)}.")


def _as_embeddings(file: Path, content: Any) -> torch.Tensor:
    """`(N, identity_dim)` floating point numbers of an array, or of a list of vectors."""
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
    if embeddings.ndim not in (2, 3) or not embeddings.numel() or not embeddings.is_floating_point():
        kind = f"{tuple(embeddings.shape)} of {str(embeddings.dtype).removeprefix('torch.')}"
        raise ValueError(
            f"{file} has {kind}: embeddings are (N, identity_dim) floating point numbers, or (N, images,"
            " identity_dim)."
        )
    return embeddings


def _by_identity(
    file: Path, embeddings: torch.Tensor, identity_ids: str | os.PathLike
) -> tuple[list[str], torch.Tensor]:
    """Names and embeddings of the identities that a file of ids tells apart."""
    beside = local_path(identity_ids)
    ids = _read_arrays(beside)
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iuU":
        kind = f"{ids.shape} of {ids.dtype}" if isinstance(ids, np.ndarray) else f"a {type(ids).__name__}"
        raise ValueError(f"{beside} holds {kind}: ids of identities are N integers or strings in .npy.")
    if len(ids) != len(embeddings):
        raise ValueError(f"{beside} has {len(ids)} ids, {file} has {len(embeddings)} rows: one id per row is needed.")
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(ids.tolist()):
        rows.setdefault(str(name), []).append(row)
    counts = {name: len(each) for name, each in rows.items()}
    if max(counts.values()) == 1:
        return list(rows), embeddings
    most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    if embeddings.ndim == 3:
        raise ValueError(
            f"{beside} has the id {most} {counts[most]} times: {file} has all images of an id in one row."
        )
    if counts[most] != counts[least]:
        raise ValueError(
            f"{beside} has {counts[most]} rows of {most} but {counts[least]} of {least}: a bank has as many embeddings"
            " of every identity. Leave some out."
        )
    return list(rows), embeddings[torch.tensor(list(rows.values()))]


def _duplicates(bank: IdentityBank) -> dict[str, str]:
    """Name -> the first one with the same direction, to four digits."""
    bank = bank.one_per_row()
    first: dict[bytes, str] = {}
    found: dict[str, str] = {}
    for name, row in zip(bank.names, bank.embeddings.mul(1e4).round().short().numpy(), strict=True):
        original = first.setdefault(row.tobytes(), name)
        if original != name:
            found.setdefault(name, original)
    return found


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    shown = [f"`{name}` {shape}" for name, shape in list(shapes.items())[:10]]
    return ", ".join(shown) + (f" and {len(shapes) - 10} more" if len(shapes) > 10 else "")
