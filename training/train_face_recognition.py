#!/usr/bin/env python
"""Trains a face recognizer on aligned faces: IResNet with a margin head. It is how a synthetic data set is judged.

    accelerate launch training/train_face_recognition.py --config training/configs/fr_ir50_arcface.yaml \\
        --train-data data --benchmarks path/to/bins --output-dir runs/recognizer

The training, with its options and its loop, is `uiface_diffusers/training/face_recognition.py`: `uiface bench` needs
it where only the package is installed. There, `accelerate launch -m uiface_diffusers.training.face_recognition` does
the same as this script.
"""

from uiface_diffusers.training.face_recognition import main, parse_args
from uiface_diffusers.training.options import run_script

__all__ = ["main", "parse_args"]

if __name__ == "__main__":
    run_script(main)
