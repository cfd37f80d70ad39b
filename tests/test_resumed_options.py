"""A training that is resumed with another option than it began with would be a mixture of two: it is refused."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, TINY_UNET, Outcome, run_script, tiny_components, write_toy_pack
from tiny_training import write_workspace
from toy_faces import write_faces

from uiface_diffusers import UIFacePipeline

sys.path.insert(0, str(REPOSITORY / "training"))
import train  # noqa: E402
import train_autoencoder  # noqa: E402
import train_face_recognition  # noqa: E402
import train_identity_flow  # noqa: E402

SCRIPTS = {each.__name__: each for each in (train, train_autoencoder, train_face_recognition, train_identity_flow)}
SHARED = ("--max-train-steps", "1", "--train-batch-size", "4", "--validation-steps", "0", "--report-to", "none")
# what every training may change, and none of it touches what is learned
INDIFFERENT = (
    "--max-train-steps",
    "2",
    "--max-train-hours",
    "9",
    "--checkpointing-steps",
    "1",
    "--logging-steps",
    "1",
)
INDIFFERENT += ("--checkpoints-total-limit", "5", "--validation-steps", "9", "--dataloader-num-workers", "1")
INDIFFERENT += ("--channels-last",)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, toy_root, toy_photographs) -> Path:
    root = write_workspace(tmp_path_factory.mktemp("resumed_options"), toy_root, toy_photographs)
    write_faces(root / "faces", identities=3, images=3)
    UIFacePipeline(**tiny_components()).save_pretrained(root / "start")
    return root


def beginning(name: str, workspace: Path) -> list[str]:
    """Options of a tiny training of each script."""
    cache = ("--train-data", str(workspace / "cache"))
    unet = {name: value for name, value in TINY_UNET.items() if name not in ("in_channels", "out_channels")}
    blocks = {"encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8]}
    blocks |= {"num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1], "_class_name": "AutoencoderTiny"}
    network = {"layers": 18, "width": 4, "embedding_dim": 16, "image_size": 32}
    return {
        "train": [*cache, "--vae", str(workspace / "vae"), "--unet", json.dumps(unet)],
        "train_autoencoder": [*cache, "--autoencoder", json.dumps(blocks), "--lpips-weight", "0"],
        "train_face_recognition": ["--train-data", str(workspace / "faces"), "--recognizer", json.dumps(network)],
        "train_identity_flow": [*cache, "--flow", '{"width": 32, "num_blocks": 1}'],
    }[name] + [*SHARED]


@pytest.fixture(scope="module")
def begun(workspace) -> Callable[..., list[str]]:
    """The options of a script, of whose training there is a checkpoint."""
    done = {}

    def options(name: str) -> list[str]:
        if name not in done:
            done[name] = [*beginning(name, workspace), "--output-dir", str(workspace / name)]
            result = run_script(SCRIPTS[name].main, done[name])
            assert result.returncode == 0, result.stderr
        return done[name]

    return options


def resume(name: str, options: list[str], *changed: str) -> Outcome:
    return run_script(SCRIPTS[name].main, [*options, "--resume-from-checkpoint", "latest", *changed])


SHARED_CHANGES = {
    "--seed 3": "seed: 0 then, 3 now",
    "--train-batch-size 5": "train_batch_size: 4 then, 5 now",
    "--max-grad-norm 5": "max_grad_norm: None then, 5.0 now",
    "--mixed-precision bf16": "mixed_precision: no then, bf16 now",
    "--learning-rate 0.5": "then, 0.5 now",
}
CHANGES = {
    "train": {
        "--snr-gamma 5": "snr_gamma: None then, 5.0 now",
        "--empty-probability 0.5": "empty_probability: 0.2 then, 0.5 now",
        "--context-dropout 0": "context_dropout: 0.25 then, 0.0 now",
        "--timestep-sampling logit_normal": "timestep_sampling: uniform then, logit_normal now",
        "--prediction-type v_prediction --lpips-weight 1": "lpips_weight: 0.0 then, 1.0 now",
        "--prediction-type v_prediction --identity-weight 1 --encoder-root packs": "identity_weight: 0.0 then, 1.0",
        "--decoded-samples 4 --decoded-noise low": "decoded_samples: 8 then, 4 now; decoded_noise: any then, low now",
        "--ema-decay 0.5": "ema_decay: 0.9999 then, 0.5 now",
        "--gradient-accumulation-steps 2": "gradient_accumulation_steps: 1 then, 2 now",
        "--train-data-shares 1": "train_data_shares: None then, [1.0] now",
    },
    "train_autoencoder": {
        "--lpips-weight 0.5": "lpips_weight: 0.0 then, 0.5 now",
        "--lpips-network vgg": "lpips_network: alex then, vgg now",
        "--identity-weight 1": "identity_weight: 0.0 then, 1.0 now",
        "--regularization-weight 1": "regularization_weight: 0.001 then, 1.0 now",
        "--scale-equivariance-probability 0.5": "scale_equivariance_probability: 0.0 then, 0.5 now",
        "--latent-noise 0.1": "latent_noise: 0.0 then, 0.1 now",
        "--facial-features": "facial_features: False then, True now",
        "--adversarial-weight 1 --adversarial-start 7": "adversarial_start: 0 then, 7 now",
    },
    "train_face_recognition": {
        "--margin 0.4": "margin: None then, 0.4 now",
        "--scale 32": "scale: 64.0 then, 32.0 now",
        "--min-images-per-identity 2": "min_images_per_identity: 1 then, 2 now",
        "--max-backbone-grad-norm 5": "max_backbone_grad_norm: None then, 5.0 now",
        "--crop-scale 0.5 1": "crop_scale: [0.2, 1.0] then, [0.5, 1.0] now",
        "--momentum 0.5": "momentum: 0.9 then, 0.5 now",
        "--lr-milestones 3": "lr_milestones: [22, 28, 32] then, [3] now",
    },
    "train_identity_flow": {
        "--weight-decay 0.5": "weight_decay: 0.01 then, 0.5 now",
        "--validation-share 0.2": "validation_share: 0.1 then, 0.2 now",
        '--flow {"width":64}': '{"width": 32, "num_blocks": 1} then, {"width": 64} now',
        "--ema-decay 0.5": "ema_decay: 0.999 then, 0.5 now",
    },
}


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [(name, *each) for name, changes in CHANGES.items() for each in (SHARED_CHANGES | changes).items()],
)
def test_a_changed_option_is_refused(begun, name, changed, message):
    result = resume(name, begun(name), *changed.split())
    assert result.returncode == 1 and message in result.stderr.replace("'", '"'), result.stderr
    assert "go on with the earlier ones, or begin in another --output-dir" in result.stderr


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_what_is_not_learned_from_may_change(begun, name):
    own = {"train": ("--gradient-checkpointing", "--snapshot-steps", "2", "--lr-warmup-steps", "3")}
    own |= {"train_autoencoder": ("--validation-faces", "3"), "train_identity_flow": ("--validation-faces", "9")}
    own |= {"train_face_recognition": ("--epochs", "9", "--checked-faces", "2", "--license", "mit")}
    result = resume(name, begun(name), *INDIFFERENT, *own[name])
    assert result.returncode == 0 and "resumed from" in result.stderr, result.stderr
    assert "is not checked" not in result.stderr


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_a_checkpoint_that_does_not_say_is_gone_on_from(begun, workspace, name, caplog):
    """Of an earlier version: it says less."""
    options = [*begun(name), "--output-dir", str(workspace / f"{name}_earlier")]
    assert run_script(SCRIPTS[name].main, options).returncode == 0
    file = workspace / f"{name}_earlier" / "checkpoint-1" / "training.json"
    state = json.loads(file.read_text())
    del state["fixed"]["max_grad_norm"], state["fixed"]["mixed_precision"]
    file.write_text(json.dumps(state))
    with caplog.at_level(logging.WARNING):
        result = resume(name, options, "--max-train-steps", "2", "--max-grad-norm", "5")
    assert result.returncode == 0 and "resumed from" in result.stderr, result.stderr
    assert "does not say its max_grad_norm, mixed_precision: whether they are the same is not checked" in caplog.text
    assert (file.parents[1] / "checkpoint-2").exists()


def test_what_paths_lead_to_is_compared(workspace, toy_root):
    """Not the paths: a moved model is the same."""
    start, moved, vae = workspace / "start", workspace / "moved", workspace / "autoencoder"
    cache = ("--train-data", str(workspace / "cache"))
    options = {
        "train": [*cache, *SHARED, "--output-dir", str(workspace / "from"), "--init-from"],
        "train_autoencoder": [*cache, *SHARED, "--output-dir", str(vae), "--init-from"],
    }
    judge = ["--lpips-weight", "0", "--identity-weight", "1", "--identity-encoder", "toy", "--encoder-root"]
    judged = {"train": [], "train_autoencoder": [*judge, str(toy_root)]}
    for name, folder in (("train", start), ("train_autoencoder", start / "vae")):
        result = run_script(SCRIPTS[name].main, [*options[name], str(folder), *judged[name]])
        assert result.returncode == 0, result.stderr
    start.rename(moved)
    more = ("--max-train-steps", "2")
    for name, folder in (("train", moved), ("train_autoencoder", moved / "vae")):
        result = resume(name, [*options[name], str(folder), *judged[name]], *more)
        assert result.returncode == 0 and "resumed from" in result.stderr, result.stderr
    write_toy_pack(workspace, dim=8)
    result = resume("train_autoencoder", [*options["train_autoencoder"], str(moved / "vae"), *judge, str(workspace)])
    assert result.returncode == 1 and "identity_encoder: " in result.stderr, result.stderr
    components = tiny_components()
    torch.nn.init.zeros_(components["empty_context"].embedding)
    UIFacePipeline(**components).save_pretrained(workspace / "changed")
    result = resume("train", [*options["train"], str(workspace / "changed")])
    assert result.returncode == 1 and "init_from: " in result.stderr, result.stderr
