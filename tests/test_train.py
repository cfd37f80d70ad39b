import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, TINY_UNET, tiny_autoencoder
from safetensors.torch import load_file

from uiface_diffusers import UIFacePipeline
from uiface_diffusers.data import prepare_faces
from uiface_diffusers.faces import FaceEncoder

TRAIN = REPOSITORY / "training" / "train.py"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, toy_root, toy_photographs):
    """Prepared faces, a first stage and a recipe of a tiny training."""
    root = tmp_path_factory.mktemp("train")
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


def command(workspace: Path, output: str, *options: str, launch: tuple[str, ...] = ()) -> list[str]:
    run = [sys.executable, *launch, str(TRAIN), "--config", str(workspace / "recipe.yaml")]
    return [*run, "--output_dir", str(workspace / output), *options]


def train(*args, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(command(*args, **kwargs), capture_output=True, text=True, env=environment())


def environment() -> dict[str, str]:
    # one thread: nothing is left to the order in which threads add
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted(folder.glob("*/*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_equal_parameters(a: Path, b: Path) -> None:
    first, second = parameters(a), parameters(b)
    assert first.keys() == second.keys() and len(first) > 50
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture(scope="module")
def uninterrupted(workspace) -> Path:
    result = train(workspace, "whole")
    assert result.returncode == 0, result.stderr
    return workspace / "whole"


def test_saves_a_pipeline(uninterrupted, workspace):
    pipe = UIFacePipeline.from_pretrained(uninterrupted)
    assert pipe.identity_projector.config.identity_encoder == "toy"
    assert pipe.unet.config.sample_size == 8
    pipe.set_progress_bar_config(disable=True)
    images = pipe(np.eye(16, dtype=np.float32)[:2], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3) and np.isfinite(images).all()
    # the three trained components have moved, the empty context too, and the first stage has not
    assert pipe.unet.conv_out.weight.abs().sum() > 0
    saved, given = parameters(uninterrupted), load_file(workspace / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[f"vae/{name}"], tensor) for name, tensor in given.items())
    assert [p.name for p in uninterrupted.iterdir() if p.suffix in (".bin", ".pt", ".pkl")] == []


def test_sigkill_and_resume_gives_the_same_parameters(uninterrupted, workspace):
    """Killed at a random step, before or after a checkpoint, perhaps while one is written."""
    process = subprocess.Popen(
        command(workspace, "killed"), stderr=subprocess.PIPE, env={**environment(), "TQDM_MININTERVAL": "0"}
    )
    kill_at = int(np.random.default_rng().integers(8, 45))
    seen = b""
    while f"| {kill_at}/60".encode() not in seen and process.poll() is None:
        seen += process.stderr.read1()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, seen.decode()
    checkpoints = sorted(int(p.name.split("-")[1]) for p in (workspace / "killed").glob("checkpoint-*"))
    assert checkpoints and not (workspace / "killed" / "model_index.json").exists()
    result = train(workspace, "killed", "--resume_from_checkpoint", "latest")
    assert result.returncode == 0, result.stderr
    assert f"| {checkpoints[-1]}/60" in result.stderr
    assert_equal_parameters(workspace / "killed", uninterrupted)


def test_workers_change_nothing(uninterrupted, workspace):
    result = train(workspace, "workers", "--dataloader_num_workers", "2")
    assert result.returncode == 0, result.stderr
    assert_equal_parameters(workspace / "workers", uninterrupted)


def test_another_seed_gives_other_parameters(uninterrupted, workspace):
    result = train(workspace, "seed", "--seed", "1", "--max_train_steps", "2")
    assert result.returncode == 0, result.stderr
    assert not torch.equal(
        parameters(workspace / "seed")["empty_context/embedding"],
        parameters(uninterrupted)["empty_context/embedding"],
    )


def test_two_processes_train_one_model(workspace):
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
    launch += ("--mixed_precision", "no", "--dynamo_backend", "no")
    options = ("--validation_steps", "4", "--validation_inference_steps", "2", "--max_train_steps", "6")
    options += ("--checkpointing_steps", "3")
    result = train(workspace, "two", *options, "--report_to", "tensorboard", launch=launch)
    assert result.returncode == 0, result.stderr
    folder = workspace / "two"
    assert sorted(p.name for p in folder.glob("checkpoint*")) == ["checkpoint-3", "checkpoint-6"]
    assert sorted(p.name for p in (folder / "validation").iterdir()) == ["step-0000004.png", "step-0000006.png"]
    assert len(list((folder / "logs").rglob("events.out.tfevents*"))) >= 1
    UIFacePipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--resume_from_checkpoint", "nowhere"), "nowhere does not exist"),
        (("--train_data", "nowhere"), "no cache of prepared faces"),
        (("--train_batch_size", "64"), "24 faces do not fill"),
    ],
)
def test_bad_input_is_named(workspace, options, message):
    result = train(workspace, "bad", *options)
    assert result.returncode != 0 and message in result.stderr


def test_unknown_options_in_a_recipe_are_refused(workspace):
    (workspace / "typo.yaml").write_text("learning_rat: 1\n")
    result = train(workspace, "typo", "--config", str(workspace / "typo.yaml"))
    assert result.returncode == 2 and "learning_rat" in result.stderr
