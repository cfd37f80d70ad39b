"""insightface's model packs: where they are, how onnxruntime runs them, and which weights they hold."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from insightface.app import FaceAnalysis
from insightface.model_zoo import get_model
from insightface.utils import ensure_available

from ..files import local_path, warn_once, why_unreadable
from ..fingerprint import files_fingerprint

PROVIDER = "ExecutionProvider"
# execution providers that take a `device_id`
GPU_PROVIDERS = tuple(f"{name}{PROVIDER}" for name in ("CUDA", "Tensorrt", "ROCM", "MIGraphX"))


def execution_providers(
    providers: Sequence[str] | None,
    available: Sequence[str] | None = None,
    local_rank: int = 0,
    device: torch.device | str | None = None,
) -> list | None:
    """onnxruntime's execution providers by their names.

    Args:
        providers: onnxruntime's names (`"CUDAExecutionProvider"`) or short ones (`"cuda"`, `"cpu"`, `"tensorrt"`,
            `"coreml"`), in any case.
        available: what onnxruntime can run here; asked of it if not given.
        local_rank (`int`, defaults to 0): this process of a machine. Each process takes a GPU of its own.
        device (`torch.device` or `str`, *optional*): torch's device. The number of a GPU (`cuda:1`) goes before the
            rank; on `cpu`, no GPU is taken unless `providers` name one.

    Returns:
        Names, those of a GPU with its number; `None` for insightface's choice.

    Raises:
        ValueError: a provider is not available.
    """
    available = onnxruntime.get_available_providers() if available is None else available
    devices, device = torch.cuda.device_count(), None if device is None else torch.device(device)
    # a launcher may show every process all GPUs, or its own only
    number = local_rank % devices if devices else local_rank
    if device is not None and device.type == "cuda" and device.index is not None:
        number = device.index
    is_first = not local_rank and not number
    if providers is None:
        cuda, cpu = f"CUDA{PROVIDER}", f"CPU{PROVIDER}"
        if device is not None and device.type == "cpu":
            return [cpu]
        if is_first or cuda not in available:
            return None
        providers = [cuda, cpu]
    by_short_name = {name.lower().removesuffix(PROVIDER.lower()): name for name in available}
    chosen = []
    for provider in providers:
        name = by_short_name.get(provider.lower().removesuffix(PROVIDER.lower()))
        if name is None:
            raise ValueError(
                f"the execution provider `{provider}` (--providers) is not available: onnxruntime has"
                f" {', '.join(by_short_name)} here. CUDA and TensorRT come with the package onnxruntime-gpu."
            )
        chosen.append((name, {"device_id": str(number)}) if name in GPU_PROVIDERS and not is_first else name)
    return chosen


def pack_folder(name: str, root: str | os.PathLike) -> Path:
    """The folder of a model pack, downloaded if it is not there."""
    root = local_path(root)
    if Path(name).name != name:  # embeddings are marked with it
        raise ValueError(
            f"`{name}` is no name of a model pack but a path: give the folder that holds models/PACK as `root`"
            " (--encoder-root)."
        )
    folder = root / "models" / name
    if not folder.exists():
        try:
            ensure_available("models", name, root=str(root))
        except Exception as error:  # connections and archives fail in many ways
            raise ValueError(
                f"model pack `{name}` is not in {root / 'models'} and cannot be downloaded: {error}. Copy its"
                " folder there, or make one of two ONNX files by `uiface make-pack`."
            ) from error
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, not the folder of a model pack: unzip it.")
    return folder


def load_pack(folder: Path, providers: list | None, threads: int | None = None) -> dict[str, Any]:
    """The first detection model and the first recognition model of a folder, by their tasks. Other files need not be
    sound.

    Raises:
        ValueError: one of the two is not there, or cannot be read.
    """
    pack, wanted = f"`{folder.name}` in {folder.parent}", ("detection", "recognition")
    models: dict[str, Any] = {}
    unread: list[str] = []
    onnxruntime.set_default_logger_severity(3)
    options: dict[str, Any] = {"providers": providers}
    if threads is not None:
        options["sess_options"] = onnxruntime.SessionOptions()
        options["sess_options"].intra_op_num_threads = threads
    if (folder / "manifest.json").is_file():  # insightface reads by it what the files are for
        try:
            models = FaceAnalysis(name=str(folder), allowed_modules=list(wanted), **options).models
        except Exception as error:
            raise ValueError(f"model pack {pack} cannot be loaded: {error}") from error
    else:
        files = sorted(file for file in folder.iterdir() if file.suffix == ".onnx" and file.name[0] != ".")
        deeper = sorted(folder.glob("*/*.onnx"))
        if not files and deeper:
            inner = deeper[0].parent
            raise ValueError(
                f"model pack {pack} was unzipped one folder too deep: its files are in {inner}. Move them up:"
                f" mv {inner}/* {folder}"
            )
        for file in files:
            if all(task in models for task in wanted):
                break
            try:
                model = get_model(str(file), **options)
            except Exception as error:  # onnxruntime's errors have no common class
                unread.append(why_unreadable(file, error))
            else:
                if model is not None and model.taskname in wanted:
                    models.setdefault(model.taskname, model)
    for task in wanted:
        if task not in models:
            raise ValueError("; ".join([f"model pack {pack} has no {task} model", *unread]) + ".")
    for reason in unread:
        warn_once(f"model pack {pack} is used without a file: {reason}.")
    return models


def file_fingerprint(file: str | os.PathLike) -> str:
    """Twelve hexadecimal digits of an ONNX model: of its file and, if they are elsewhere, of its weights' files."""
    return files_fingerprint(file, *weights_beside(file))


def weights_beside(file: str | os.PathLike) -> list[Path]:
    """The files in which an ONNX model keeps weights outside its own."""
    model = onnx.load(file, load_external_data=False)
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
    return [Path(file).parent / name for name in sorted({each.value for each in entries if each.key == "location"})]
