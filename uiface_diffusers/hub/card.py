"""The model card of a pipeline."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError

from ..encoders import projector_mark
from ..fingerprint import unwrapped
from ..two_stage.schedulers import prediction_type

CARD_METADATA: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "unconditional-image-generation"}
CARD_TAGS = ["uiface", "face-recognition", "synthetic-data"]
# what is between the two is written by `fill_card`, and again as long as nobody has changed it
BEGIN, END = (
    "<!-- uiface-diffusers {digest}: written by push_to_hub; text outside stays -->",
    "<!-- uiface-diffusers end -->",
)
WRITTEN = re.compile(r"<!-- uiface-diffusers (\w+): [^>]*-->\n(.*?)<!-- uiface-diffusers end -->", re.DOTALL)


def fill_card(
    card: ModelCard | None, pipeline: DiffusionPipeline, repo_id: str, metadata: Mapping[str, Any], recipe: str | None
) -> ModelCard:
    """The model card of a pipeline: what it is, how to load it, how it was trained.

    Args:
        card: what the repository has already. Its metadata and text stay; only what is missing is added, and a section
            that an earlier push wrote is written anew if nobody has changed it.
        metadata: of the card, as `license`, `datasets`, `base_model`, and `lineage` with `training_data`.
        recipe: how it was trained, in Markdown.
    """
    if card is None:
        head = ModelCardData(**CARD_METADATA).to_yaml()
        card = ModelCard(f"---\n{head}\n---\n\n# {repo_id.split('/')[-1]}\n")
        card.text += f"\n{BEGIN.format(digest=_digest(''))}\n{END}\n"
    assert isinstance(card.data, ModelCardData)  # `ModelCard` is annotated as any card
    own = _without_outdated(card.data.to_dict(), pipeline, metadata)
    known = merge(metadata, {**CARD_METADATA, "lineage": {"encoder": _encoder(pipeline)}})
    for name, value in merge(own, without_unknown(known)).items():
        card.data[name] = value
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *CARD_TAGS]))
    found = WRITTEN.search(card.text)
    if found and _digest(found[2]) == found[1]:
        section = _card_section(pipeline, repo_id, card.data, recipe)
        card.text = card.text.replace(found[0], f"{BEGIN.format(digest=_digest(section))}\n{section}{END}")
    return card


def _encoder(pipeline: DiffusionPipeline) -> dict[str, str | None]:
    mark = projector_mark(unwrapped(pipeline.identity_projector))
    return {"name": mark.name, "fingerprint": mark.fingerprint, "license": mark.license}


def _without_outdated(
    header: Mapping[str, Any], pipeline: DiffusionPipeline, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """A card's metadata without an encoder that is not this pipeline's, and with the training data that are given in
    place of those of an earlier training, which have a fingerprint. What people wrote of either stays."""
    lineage = {**header["lineage"]} if isinstance(header.get("lineage"), Mapping) else {}
    encoder, ours = lineage.get("encoder"), _encoder(pipeline)
    marks = ("name", "fingerprint")
    if isinstance(encoder, Mapping) and any(encoder.get(mark) not in (None, ours[mark]) for mark in marks):
        del lineage["encoder"]
    kept, new = lineage.get("training_data"), (metadata.get("lineage") or {}).get("training_data")
    if isinstance(kept, list) and new:
        written = {each["fingerprint"]: each for each in kept if isinstance(each, Mapping) and each.get("fingerprint")}
        by_people = [each for each in kept if each not in written.values()]
        lineage["training_data"] = [merge(written.get(each["fingerprint"], {}), each) for each in new] + by_people
    return {**header, "lineage": lineage}


def save_card(folder: Path, pipeline: DiffusionPipeline, card_metadata: Mapping[str, Any], recipe: str | None) -> None:
    """Writes the model card of a pipeline's folder, or fills the one that is there, as `fill_card`."""
    file = folder / "README.md"
    there = ModelCard.load(file) if file.exists() else None
    fill_card(there, pipeline, folder.resolve().name, card_metadata, recipe).save(file)


def merge(kept: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Two headers as one, key by key and in mappings within: what `kept` says stays."""
    merged = {**kept}
    for name, value in new.items():
        own = kept.get(name)
        if isinstance(own, Mapping) and isinstance(value, Mapping):
            merged[name] = merge(own, value)
        elif own in (None, "", [], {}):
            merged[name] = value
    return merged


def without_unknown(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata without what is not known: `None`, and what is empty, in mappings within, too."""
    cleaned = {
        name: without_unknown(value) if isinstance(value, Mapping) else value for name, value in metadata.items()
    }
    return {name: value for name, value in cleaned.items() if value not in (None, "", [], {})}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _card_section(pipeline: DiffusionPipeline, repo_id: str, metadata: ModelCardData, recipe: str | None) -> str:
    projector, unet, vae = (unwrapped(part) for part in (pipeline.identity_projector, pipeline.unet, pipeline.vae))
    size = unet.config.sample_size
    latents = (
        f"{unet.config.in_channels}x{size}x{size}" if isinstance(size, int) else f"{unet.config.in_channels}x{size}"
    )
    millions = {name: sum(p.numel() for p in module.parameters()) / 1e6 for name, module in _modules(pipeline).items()}
    parts = ", ".join(f"{name} {value:.1f}M" for name, value in millions.items())
    encoder = projector.config.identity_encoder or "not stated"
    return f"""
A [UIFace](https://arxiv.org/abs/2502.19803) pipeline (two-stage, identity-conditioned latent diffusion) for synthetic
face recognition data, of the Python package `uiface-diffusers`.

| | |
|---|---|
| license | {metadata.get("license") or "not stated"} |
| training data | {_training_data(metadata)} |
| identity encoder | `{encoder}`, {projector.config.identity_dim}-d unit embeddings |
| first stage | {type(vae).__name__}, latents of {latents} |
| denoiser | {type(unet).__name__}, {prediction_type(pipeline.scheduler)} prediction |
| parameters | {parts} |

```python
import torch
from uiface_diffusers import UIFacePipeline

pipe = UIFacePipeline.from_pretrained("{repo_id}")
embedding = torch.randn({projector.config.identity_dim})  # better: an embedding by `{encoder}`
pipe(embedding, generator=torch.Generator().manual_seed(0)).images[0].save("face.png")
```

## Training

{recipe or "Not stated."}

## Use

Training and testing face recognition with synthetic people. Not for imitating, identifying or tracking real people: an
embedding of a real person gives pictures that resemble them.
"""


def _training_data(metadata: ModelCardData) -> str:
    data = (metadata.get("lineage") or {}).get("training_data") or metadata.get("datasets") or "not stated"
    each = [data] if isinstance(data, str | dict) else data
    names = [one.get("name", "unnamed") if isinstance(one, dict) else str(one) for one in each]
    return ", ".join(names)


def _modules(pipeline: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    return {name: value for name, value in pipeline.components.items() if isinstance(value, torch.nn.Module)}


def load_card(repo_id: str, token: str | bool | None = None) -> ModelCard | None:
    """The model card of a repository, or `None` if it has none yet."""
    try:
        # it hands the token on to `hf_hub_download`, which takes a `bool`, too
        return ModelCard.load(repo_id, token=token)  # type: ignore[arg-type]
    except EntryNotFoundError:
        return None
