"""The files with which stock diffusers loads a pipeline of this package, and what makes them needless here."""

import json
from pathlib import Path
from typing import Any

PACKAGE = "uiface_diffusers"
MODEL_INDEX = "model_index.json"
SHIM = '"""For stock diffusers with `trust_remote_code=True`: needs the package uiface-diffusers."""\n'


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
