"""A tiny training of the denoiser, for the tests of training/train.py."""

import sys
from pathlib import Path

import torch
import yaml
from conftest import REPOSITORY, TINY_UNET, Outcome, run_script, tiny_autoencoder

from uiface_diffusers.data import prepare_faces
from uiface_diffusers.faces import FaceEncoder

TRAIN = REPOSITORY / "training" / "train.py"
sys.path.insert(0, str(TRAIN.parent))
import train as train_script  # noqa: E402


def write_workspace(root: Path, toy_root: Path, toy_photographs: Path) -> Path:
    """Prepared faces, a first stage and a recipe."""
    encoder = FaceEncoder("toy", str(toy_root), det_size=160)
    prepare_faces(toy_photographs, root / "cache", encoder, image_size=16)
    tiny_autoencoder().save_pretrained(root / "vae")
    unet = {k: v for k, v in TINY_UNET.items() if k not in ("in_channels", "out_channels", "sample_size")}
    recipe = {
        "train_data": [str(root / "cache")],
        "vae": str(root / "vae"),
        "unet": {k: list(v) if isinstance(v, tuple) else v for k, v in unet.items()},
        "train_batch_size": 4,
        "max_train_steps": 60,
        "learning_rate": 1e-3,
        "checkpointing_steps": 7,
        "validation_steps": 0,
        "report_to": "none",
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def options_of(workspace: Path, output: str, *options: str) -> list[str]:
    return ["--config", str(workspace / "recipe.yaml"), "--output-dir", str(workspace / output), *options]


def train(workspace: Path, output: str, *options: str) -> Outcome:
    return run_script(train_script.main, options_of(workspace, output, *options))


class Oracle(torch.nn.Module):
    """Knows the noise and sees what it is asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.asked = answer, None

    def forward(self, noisy, timesteps, identity_embeds, is_empty):
        self.asked = {"noisy": noisy, "timesteps": timesteps, "embeds": identity_embeds, "is_empty": is_empty}
        return self.answer(noisy, timesteps)
