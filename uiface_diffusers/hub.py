"""Pipelines on the Hub: what to download, the model card, and the files with which stock diffusers loads them."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_loading_utils import variant_compatible_siblings
from huggingface_hub import (
    ModelCard,
    ModelCardData,
    constants,
    get_cached_repo_tree,
    hf_hub_download,
    model_info,
    snapshot_download,
)

# its `HTTPError` is that of the HTTP library that it speaks by, failed connections included
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    EntryNotFoundError,
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .fingerprint import unwrapped
from .two_stage.schedulers import prediction_type

PACKAGE = "uiface_diffusers"
MODEL_INDEX = "model_index.json"
IDENTITIES = "identities.safetensors"
CARD_METADATA = {"library_name": "diffusers", "pipeline_tag": "unconditional-image-generation"}
CARD_TAGS = ["uiface", "face-recognition", "synthetic-data"]
SHIM = '"""For stock diffusers with `trust_remote_code=True`: needs `pip install uiface-diffusers`."""\n'


def download_pipeline(
    repo_id: str,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    token: str | bool | None = None,
    passed_components: tuple[str, ...] = (),
) -> str:
    """Downloads a pipeline's configurations and safetensors weights, and nothing else: no code, no pickles, no
    checkpoints.

    Args:
        repo_id: `"org/name"`.
        variant: of the weights, as in `diffusion_pytorch_model.fp16.safetensors`.
        passed_components: need no weights.

    Returns:
        The folder in the cache.

    Raises:
        OSError: the repository, its revision or the pipeline in it cannot be had; the message says why and what to do.
    """
    cache = {"revision": revision, "cache_dir": cache_dir, "token": token}
    unreachable: Exception | None = None
    if not local_files_only:
        try:
            names = [sibling.rfilename for sibling in model_info(repo_id, revision=revision, token=token).siblings]
            files = _files_to_download(repo_id, names, variant, passed_components, cache)
            return snapshot_download(repo_id, **cache, force_download=force_download, allow_patterns=files)
        except GatedRepoError as error:
            page = f"{constants.ENDPOINT}/{repo_id}"
            raise OSError(f"{repo_id} is gated: ask for access on {page} and log in by `hf auth login`.") from error
        except RepositoryNotFoundError as error:
            raise OSError(
                f"{repo_id} is neither a folder here nor a repository on {constants.ENDPOINT}: check the name or, if"
                " it is private, log in by `hf auth login`."
            ) from error
        except RevisionNotFoundError as error:
            raise OSError(f"{repo_id} has no revision {revision!r}: a branch, a tag or a commit's hash.") from error
        except (HTTPError, OfflineModeIsEnabled) as error:
            unreachable = error
    cache["local_files_only"] = True
    try:
        names = [file.path for file in get_cached_repo_tree(repo_id, revision=revision, cache_dir=cache_dir)]
        files = _files_to_download(repo_id, names, variant, passed_components, cache)
        return snapshot_download(repo_id, **cache, allow_patterns=files)
    except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError) as error:
        raise OSError(_not_cached(repo_id, unreachable)) from (unreachable or error)


def _not_cached(repo_id: str, unreachable: Exception | None) -> str:
    reason = "" if unreachable is None else f" and {constants.ENDPOINT} cannot be reached ({unreachable})"
    return f"{repo_id} is not in the local cache{reason}: download it once while online, or give a folder."


def _files_to_download(
    repo_id: str, names: list[str], variant: str | None, passed_components: tuple[str, ...], cache: dict
) -> list[str]:
    if MODEL_INDEX not in names:
        raise OSError(f"{repo_id} has no {MODEL_INDEX}: it holds no pipeline. Components load by their own class.")
    index = json.loads(Path(hf_hub_download(repo_id, MODEL_INDEX, **cache)).read_text())
    components = [name for name, value in index.items() if isinstance(value, list) and not name.startswith("_")]
    inside = [name for name in names if name.count("/") == 1 and name.split("/")[0] in components]
    weights, _ = variant_compatible_siblings(inside, variant=variant, ignore_patterns=["*.bin", "*.onnx", "*.pb"])
    weights = [name for name in weights if name.split("/")[0] not in passed_components]
    configs = [name for name in inside if name.endswith("config.json")]
    return [MODEL_INDEX, *configs, *sorted(weights), *({IDENTITIES} & set(names))]


def own_class_names(config: dict[str, Any], class_name: str) -> dict[str, Any]:
    """A `model_index.json` as if it had no files of code: the pipeline is `class_name`, and this package's components
    are its own classes, whatever files of their modules' names lie beside the weights."""
    config = {**config, "_class_name": class_name}
    for name, value in config.items():
        if isinstance(value, list | tuple) and isinstance(value[0], str) and value[0].startswith(f"{PACKAGE}."):
            config[name] = [f"{PACKAGE}.models", value[1]]
    return config


def write_remote_code(folder: Path) -> None:
    """Makes a saved pipeline one that `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` loads: stock
    diffusers asks for a file of code for the pipeline and every component of another package. Each is an import."""
    index = json.loads((folder / MODEL_INDEX).read_text())
    class_name = index["_class_name"]
    (folder / "pipeline.py").write_text(f"{SHIM}\nfrom {PACKAGE} import {class_name}  # noqa: F401\n")
    index["_class_name"] = ["pipeline", class_name]
    for name, value in index.items():
        if isinstance(value, list) and isinstance(value[0], str) and value[0].startswith(f"{PACKAGE}."):
            shim = f"{SHIM}\nfrom {value[0]} import {value[1]}  # noqa: F401\n"
            (folder / name / f"{value[0]}.py").write_text(shim)
    (folder / MODEL_INDEX).write_text(json.dumps(index, indent=2) + "\n")


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
        metadata: of the card, as `license`, `datasets`, `base_model`.
        recipe: how it was trained, in Markdown.
    """
    if card is None:
        head = ModelCardData(**CARD_METADATA).to_yaml()
        card = ModelCard(f"---\n{head}\n---\n\n# {repo_id.split('/')[-1]}\n")
        card.text += f"\n{BEGIN.format(digest=_digest(''))}\n{END}\n"
    for name, value in {**CARD_METADATA, **metadata}.items():
        if card.data.get(name) is None and value is not None:
            card.data[name] = value
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *CARD_TAGS]))
    found = WRITTEN.search(card.text)
    if found and _digest(found[2]) == found[1]:
        section = _card_section(pipeline, repo_id, card.data, recipe)
        card.text = card.text.replace(found[0], f"{BEGIN.format(digest=_digest(section))}\n{section}{END}")
    return card


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _card_section(pipeline, repo_id: str, metadata: ModelCardData, recipe: str | None) -> str:
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
face recognition data, of [uiface-diffusers](https://pypi.org/project/uiface-diffusers).

| | |
|---|---|
| license | {metadata.get("license") or "not stated"} |
| training data | {metadata.get("datasets") or "not stated"} |
| identity encoder | `{encoder}`, {projector.config.identity_dim}-d unit embeddings |
| first stage | {type(vae).__name__}, latents of {latents} |
| denoiser | {type(unet).__name__}, {prediction_type(pipeline.scheduler)} prediction |
| parameters | {parts} |

```python
import torch
from uiface_diffusers import UIFacePipeline  # pip install uiface-diffusers

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


def _modules(pipeline) -> dict[str, torch.nn.Module]:
    return {name: value for name, value in pipeline.components.items() if isinstance(value, torch.nn.Module)}


def load_card(repo_id: str, token: str | bool | None = None) -> ModelCard | None:
    """The model card of a repository, or `None` if it has none yet."""
    try:
        return ModelCard.load(repo_id, token=token)
    except EntryNotFoundError:
        return None
