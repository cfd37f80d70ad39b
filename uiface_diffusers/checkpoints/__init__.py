"""The embedded checkpoint: package data, so that an installed wheel has it."""

from pathlib import Path


def default_checkpoint() -> Path:
    """Folder of the embedded pipeline (128x128, trained on LFW's DevTrain people and CelebA; see model_card.md), for
    `UIFacePipeline.from_pretrained`. `identities.safetensors` in it is a bank of synthetic identities."""
    return Path(__file__).parent / "uiface-lfw-128"
