"""What of a pipeline's repository is downloaded."""

import json
import os
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_loading_utils import variant_compatible_siblings
from huggingface_hub import constants, get_cached_repo_tree, hf_hub_download, model_info, snapshot_download

# its `HTTPError` is that of the HTTP library that it speaks by, failed connections included
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..encoders import CARRIED_FILES, IDENTITY_ENCODER
from ..identities import IDENTITIES
from .remote_code import MODEL_INDEX


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
    folder = None if cache_dir is None else Path(cache_dir)

    def snapshot(names: list[str], local: bool) -> str:
        """Of a repository of these files, from the Hub or from the cache."""
        if MODEL_INDEX not in names:
            raise OSError(f"{repo_id} has no {MODEL_INDEX}: it holds no pipeline. Components load by their own class.")
        index = hf_hub_download(
            repo_id, MODEL_INDEX, revision=revision, cache_dir=folder, token=token, local_files_only=local
        )
        return snapshot_download(
            repo_id,
            revision=revision,
            cache_dir=folder,
            token=token,
            force_download=force_download and not local,
            local_files_only=local,
            allow_patterns=_files_to_download(Path(index), names, variant, passed_components),
        )

    unreachable: Exception | None = None
    if not local_files_only:
        try:
            siblings = model_info(repo_id, revision=revision, token=token).siblings or []
            return snapshot([sibling.rfilename for sibling in siblings], local=False)
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
    try:
        tree = get_cached_repo_tree(repo_id, revision=revision, cache_dir=folder)
        return snapshot([file.path for file in tree], local=True)
    except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError) as error:
        raise OSError(_not_cached(repo_id, unreachable)) from (unreachable or error)


def _not_cached(repo_id: str, unreachable: Exception | None) -> str:
    reason = "" if unreachable is None else f" and {constants.ENDPOINT} cannot be reached ({unreachable})"
    return f"{repo_id} is not in the local cache{reason}: download it once while online, or give a folder."


def _files_to_download(
    index_file: Path, names: list[str], variant: str | None, passed_components: tuple[str, ...]
) -> list[str]:
    index = json.loads(index_file.read_text())
    components = [name for name, value in index.items() if isinstance(value, list) and not name.startswith("_")]
    inside = [name for name in names if name.count("/") == 1 and name.split("/")[0] in components]
    # its annotation is not what it returns
    found: Any = variant_compatible_siblings(inside, variant=variant, ignore_patterns=["*.bin", "*.onnx", "*.pb"])
    weights = [name for name in found[0] if name.split("/")[0] not in passed_components]
    configs = [name for name in inside if name.endswith("config.json")]
    # the encoder that a model can carry is no component; it has one form, whatever the variant
    beside = (IDENTITIES, *(f"{IDENTITY_ENCODER}/{name}" for name in CARRIED_FILES))
    return [MODEL_INDEX, *configs, *sorted(weights), *(name for name in beside if name in names)]
