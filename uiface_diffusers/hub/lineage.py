"""Where a data set comes from, in the YAML header of its card, under `lineage`: the generator with its training data
and license, the encoder with its license, the identities, the leakage audit.

The Hub makes a data set's Croissant description itself, from the card's license and the files it finds. It has no
field for any of this, and a second description beside it would go stale. So the lineage is in the header only.

    lineage:
      generator: {name, fingerprint, license, license_name, license_link, training_data}
      encoder: {name, fingerprint, license}
      identities: {number, fingerprint, source}
      leakage_audit: {against, embeddings, encoder, encoder_fingerprint, images, thresholds}
      derived_from: [{name, fingerprint, images, identities, by}, ...]

`derived_from` is of a set that was converted or cleaned, one entry per step, with what `uiface clean` took out.

A model's card has `lineage` with `training_data` (a list of names, or of mappings with `name` and `license`),
`encoder` and `identities`; its license is the card's own. What is not known is left out: `missing_lineage` names it.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HTTPError

from ..encoders import EncoderMark
from ..files import CARD, brief, complete_file, local_path, read_json, read_lines, warn_once
from .card import load_card, without_unknown

# in the embedded checkpoint's folder: the header of its card, which is not in the package
HEADER = "card.json"
# of a card's header: about the files of this one set
OF_FILES = ("configs", "dataset_info", "size_categories")
DERIVED = "derived_from"
LICENSE_FIELDS = ("license", "license_name", "license_link")
# what a card should say -> what is meant, and an example
FIELDS = {
    "license": ("under which the data set may be used, of the Hub's list", "cc-by-nc-4.0"),
    "lineage.generator.name": ("the model that made the images", "org/model"),
    "lineage.generator.fingerprint": ("of its weights; `uiface generate` writes it", "0123456789ab"),
    "lineage.generator.license": ("of the model; its card's `license`", "other"),
    "lineage.generator.training_data": (
        "what the model was trained on; its card's `lineage.training_data` or `datasets`",
        "[{name: CASIA-WebFace, license: non-commercial research only}]",
    ),
    "lineage.encoder.name": ("the recognizer that the identities come from", "buffalo_l"),
    "lineage.encoder.license": ("of its weights", "non-commercial research only"),
    "lineage.identities.source": (
        "where the identities come from: made by a model, photographs of people, random directions",
        "made by org/model, unlike its training's people",
    ),
    "lineage.leakage_audit": (
        "whether people of the training data are shown; `uiface audit DATASET --against CACHE` writes it",
        "{against: cache/photos}",
    ),
}


def read_card(card: str | os.PathLike) -> tuple[dict[str, Any], str]:
    """The YAML header of a card's file, and the text below; both are empty if there is no file.

    Raises:
        ValueError: the header is no YAML, or not a mapping.
    """
    path = local_path(card)
    content = "\n".join([*read_lines(path), ""]) if path.is_file() else ""
    found = re.match(r"\s*---[ \t]*\n(.*?)\n---[ \t]*\n", content, re.DOTALL)
    if found is None:
        return {}, content
    try:
        header = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        reason = brief(" ".join(str(error).split()))  # it says the line
        raise ValueError(f"the header of {path}, between the lines ---, is no YAML: {reason}.") from error
    if not isinstance(header, dict | None):
        raise ValueError(f"the header of {path}, between the lines ---, has to be names with values.")
    return header or {}, content[found.end() :]


def read_header(card: str | os.PathLike) -> dict[str, Any]:
    """The YAML header of a card's file, as `read_card`."""
    return read_card(card)[0]


def card_text(header: Mapping[str, Any], text: str) -> str:
    """A card of a header and what follows it."""
    return f"---\n{yaml.safe_dump(dict(header), sort_keys=False, allow_unicode=True, width=10_000)}---\n{text}"


def derived_header(dataset: str | os.PathLike, step: Mapping[str, Any], same_images: bool) -> dict[str, Any]:
    """The header of the card of a set that is made of another one: what that one's card says of its origin and
    license, and the step from it. What describes its files is left out.

    Args:
        dataset: folder, whose card is read if it has one, or a file, which has none.
        step: what was done, with `name` and `fingerprint` of the other set.
        same_images: otherwise an audit of the other set says nothing of the new one.

    Raises:
        ValueError: see `read_card`.
    """
    path = local_path(dataset)
    header = read_header(path / CARD) if path.is_dir() else {}
    lineage = {**_mapping(header.get("lineage"))}
    if not same_images:
        lineage.pop("leakage_audit", None)
    before = lineage.get(DERIVED)
    lineage[DERIVED] = [*(before if isinstance(before, list) else []), dict(step)]
    return {name: value for name, value in header.items() if name not in OF_FILES} | {"lineage": lineage}


def _mapping(value: Any) -> dict[str, Any]:
    """What people wrote into a header where names with values belong; empty if it is something else."""
    return value if isinstance(value, dict) else {}


def note_audit(card: Path, audit: Mapping[str, Any]) -> None:
    """Writes an audit's result into the header of a card that is there, in place of an earlier one. What else it says
    stays, and the text."""
    header, text = read_card(card)
    header["lineage"] = {**_mapping(header.get("lineage")), "leakage_audit": dict(audit)}
    with complete_file(card) as beside:
        beside.write_text(card_text(header, text), encoding="utf-8")


def model_name(folder: str | os.PathLike) -> str:
    """The Hub's name of a pipeline, also of a folder in the Hub's cache; the folder's own name otherwise."""
    cached = re.search(r"models--(.+?)--(.+?)/snapshots/", f"{Path(folder).as_posix()}/")
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return Path(folder).resolve().name if Path(folder).is_dir() else os.fspath(folder)


def model_header(model: str | os.PathLike | None) -> dict[str, Any]:
    """The header of a model's card: in its folder or, of a model of the Hub, there. Empty, with a warning, where the
    card cannot be had.

    Args:
        model: folder or Hub repository; `None` of a pipeline that was not loaded.
    """
    if model is None:
        return {}
    if (Path(model) / CARD).is_file():
        return read_header(Path(model) / CARD)
    if (Path(model) / HEADER).is_file():
        return dict(read_json(Path(model) / HEADER))
    name = model_name(model)
    if Path(model).is_dir() and "/" not in name:
        return {}
    try:
        card, reason = load_card(name), "there is none, or the Hub cannot be reached"
    except (HTTPError, OSError, ValueError) as error:
        card, reason = None, brief(error)
    if card is None:
        warn_once(f"the card of {name} is not to be had ({reason}): its license and training data are not known.")
        return {}
    return card.data.to_dict()


def lineage_of(
    model: str | os.PathLike | None,
    fingerprint: str,
    encoder: EncoderMark,
    identities: Mapping[str, Any],
) -> dict[str, Any]:
    """The lineage of a data set, as far as the model's card and the settings tell it.

    Args:
        model: folder or Hub repository of the pipeline.
        fingerprint: of the pipeline.
        encoder: of the identities.
        identities: `number`, `fingerprint` and, where it is known, `source` of the bank.
    """
    header = model_header(model)
    of_model = _mapping(header.get("lineage"))
    of_encoder = _mapping(of_model.get("encoder"))
    # another encoder's license is not this one's
    same = of_encoder.get("name") in (None, encoder.name)
    return without_unknown(
        {
            "generator": {
                "name": None if model is None else model_name(model),
                "fingerprint": fingerprint,
                **{name: header.get(name) for name in LICENSE_FIELDS},
                "training_data": of_model.get("training_data") or header.get("datasets"),
            },
            "encoder": {
                "name": encoder.name,
                "fingerprint": encoder.fingerprint,
                "license": (of_encoder.get("license") if same else None) or encoder.license,
            },
            "identities": identities,
        }
    )


def _value(header: Mapping[str, Any], field: str) -> Any:
    value: Any = header
    for name in field.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def known_lineage(header: Mapping[str, Any]) -> dict[str, Any]:
    """Field -> value, of those `FIELDS` that a card's header has."""
    values = {field: _value(header, field) for field in FIELDS}
    return {field: value for field, value in values.items() if value not in (None, "", [], {})}


def missing_lineage(header: Mapping[str, Any]) -> list[str]:
    """The `FIELDS` that a card's header lacks, and the parts of the training data without a license."""
    known = known_lineage(header)
    missing = [field for field in FIELDS if field not in known]
    data = known.get("lineage.generator.training_data")
    for position, each in enumerate(data if isinstance(data, Sequence) and not isinstance(data, str) else []):
        if not isinstance(each, Mapping) or not each.get("license"):
            missing.append(f"lineage.generator.training_data[{position}].license")
    return missing


def describe_lineage(dataset: str | os.PathLike) -> list[str]:
    """Lines about the card of a data set: what is known of its origin, what is missing, and how to fill it.

    Args:
        dataset: its folder, or the card's file.

    Raises:
        ValueError: there is no such folder or file, or the card's header is no YAML.
    """
    path = local_path(dataset)
    if not path.exists():
        raise ValueError(f"{path} is missing: name the folder of a data set.")
    card = path / CARD if path.is_dir() else path
    header = read_header(card)
    known, missing = known_lineage(header), missing_lineage(header)
    lines = [
        f"known, in {card}:" if known or _value(header, f"lineage.{DERIVED}") else f"{card} says nothing of the origin"
    ]
    lines += [f"  {field}: {_in_one_line(value)}" for field, value in known.items()]
    lines += [f"  made from: {_in_one_line(step)}" for step in _value(header, f"lineage.{DERIVED}") or []]
    if not missing:
        return [*lines, "nothing is missing"]
    lines.append("missing:")
    for field in missing:
        meaning, example = FIELDS.get(field, ("under which these data may be used", "non-commercial research only"))
        lines.append(f"  {field}: {meaning}; for example `{example}`")
    lines.append(
        f"Fill it in the header of {card}, between the lines ---; `lineage.encoder.license` is `license` under"
        " `encoder` under `lineage`. It stays there when the card is made anew."
    )
    return lines


def _in_one_line(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    return text.removesuffix("...\n").strip()
