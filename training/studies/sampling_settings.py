#!/usr/bin/env python
"""Quality of a pipeline under several settings of its call: the same people, the same noise.

    python training/studies/sampling_settings.py training/studies/speed.yaml --people cache/devtrain \
        --encoder-root insightface --judge judge --lpips-backbone alexnet_features.safetensors --output runs/speed

The YAML file maps the name of each setting to arguments of the pipeline's call. `scheduler` names a diffusers
scheduler, and `scheduler_options` its options beside the pipeline's own configuration. All are compared with the first
setting. The figures of each:

- rows: UNet rows per image; seconds: per image, with decoding;
- boundary: mean timestep from which a face follows its identity; capped: share of the faces that do so only at
  `latest_boundary`, because their attention has not come to rest before;
- judge: cosine of the faces to the photograph that they were conditioned on, by a recognizer that the training has not
  seen; others: to the photographs of other people; EER: of pairs of the faces;
- LPIPS: between the images of one person (diversity);
- precision, recall: against as many real faces (Kynkaanniemi et al. 2019), on features of the LPIPS backbone.

A setting whose figures are in the output folder is not computed again. Prints a table and writes `settings.json`.
"""

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import PIL.Image
import torch
import yaml

from uiface_cli.options import expand_home, whole, with_hyphens
from uiface_diffusers import UIFacePipeline, default_checkpoint
from uiface_diffusers.evaluation import (
    equal_error_rate,
    identity_consistency,
    improved_precision_recall,
    load_lpips,
)
from uiface_diffusers.evaluation.diversity import identity_pairs, mean_lpips
from uiface_diffusers.evaluation.face_set import face_pixels
from uiface_diffusers.evaluation.features import LpipsFeatures
from uiface_diffusers.evaluation.people import People
from uiface_diffusers.evaluation.pipelines import sample_faces
from uiface_diffusers.evaluation.separability import grouped_cosines
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.files import check_settings, write_json
from uiface_diffusers.fingerprint import pipeline_fingerprint
from uiface_diffusers.seeds import NOISE_VERSION
from uiface_diffusers.training.options import run_script
from uiface_diffusers.two_stage.schedulers import scheduler_like

if TYPE_CHECKING:
    import lpips

FIGURES = ("rows", "seconds", "boundary", "capped", "judge", "others", "EER", "LPIPS", "precision", "recall")
# by how much two settings may differ and be as good: what 400 faces tell apart
EQUAL = {"judge": 0.02, "EER": 0.01, "LPIPS": 0.01, "precision": 0.05, "recall": 0.05}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, help="YAML file")
    parser.add_argument("--pipeline", default=str(default_checkpoint()), help="folder or Hub repository")
    parser.add_argument("--people", type=Path, required=True, help="cache of `uiface prepare`: identities, real faces")
    parser.add_argument("--judge", required=True, help="model pack that the pipeline was not trained with")
    parser.add_argument("--encoder-root", default="~/.insightface")
    parser.add_argument("--lpips-backbone", help="AlexNet's convolutions; torchvision downloads them if not given")
    parser.add_argument("--num-people", type=whole(), default=100)
    parser.add_argument("--images-per-person", type=whole(), default=4)
    parser.add_argument("--batch-size", type=whole(), default=16)
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args(with_hyphens(expand_home(argv)))


class Conditions:
    """People spread evenly over a cache, with one photograph each as the condition; and real faces to compare with."""

    def __init__(self, args: argparse.Namespace):
        people = People([args.people])
        self.bank, self.photographs = people.one_photograph_each(args.num_people)
        faces, number = len(people.bank), args.num_people * args.images_per_person
        if faces < number:
            raise ValueError(f"{args.people} has {faces} faces: {number} are needed to compare as many.")
        drawn = np.random.default_rng(args.seed).permutation(faces)[:number]
        self.real = face_pixels([np.asarray(picture) for picture in people.pictures(sorted(drawn.tolist()))])


def make_pipeline(args: argparse.Namespace, setting: dict[str, Any]) -> UIFacePipeline:
    """The pipeline, with the setting's scheduler."""
    pipe = UIFacePipeline.from_pretrained(args.pipeline).to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    name, options = setting.pop("scheduler", None), setting.pop("scheduler_options", {})
    if name is not None:
        pipe.scheduler = scheduler_like(getattr(diffusers, name), pipe.scheduler, **options)
    return pipe


def sample(
    args: argparse.Namespace, people: Conditions, setting: dict[str, Any]
) -> tuple[list[PIL.Image.Image], dict[str, float]]:
    """Images, those of a person together; rows and seconds per image, and where the boundaries were."""
    options, rows = dict(setting), list[int]()
    pipe = make_pipeline(args, options)
    pipe.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    started = time.perf_counter()
    images, reached = sample_faces(pipe, people.bank, args.images_per_person, args.batch_size, args.seed, **options)
    latest = options.get("latest_boundary", pipe.config.latest_boundary)
    return images, {
        "rows": sum(rows) / len(images),
        "seconds": (time.perf_counter() - started) / len(images),
        "boundary": float(np.mean(reached)),
        "capped": float(np.mean(np.array(reached) <= latest)),
    }


def measure(
    args: argparse.Namespace,
    people: Conditions,
    images: list[PIL.Image.Image],
    judge: FaceEncoder,
    perceptual: "lpips.LPIPS",
) -> dict[str, float]:
    shape = (args.num_people, args.images_per_person)
    generated = judge.embed_pictures(images).unflatten(0, shape)
    identity = identity_consistency(generated, judge.embed_pictures(people.photographs))
    pixels = face_pixels([np.asarray(image) for image in images])
    pairs = identity_pairs("", args.images_per_person, None)
    network = LpipsFeatures(perceptual)
    theirs, ours = (torch.cat([network(part) for part in faces.split(64)]) for faces in (people.real, pixels))
    precision, recall = improved_precision_recall(theirs, ours)
    return {
        "judge": identity["own"],
        "others": identity["other"],
        "EER": equal_error_rate(*grouped_cosines(generated)),
        "LPIPS": float(np.mean([mean_lpips(faces, pairs, perceptual) for faces in pixels.unflatten(0, shape)])),
        "precision": precision,
        "recall": recall,
    }


def differing(table: dict[str, dict[str, float]], first: str, second: str) -> list[str]:
    """In which figures two settings are not equally good, for a message."""
    return [
        f"{figure} of {first}: {table[first][figure]:.4f}, of {second} {table[second][figure]:.4f}"
        for figure, most in EQUAL.items()
        if abs(table[first][figure] - table[second][figure]) > most
    ]


def print_table(table: dict[str, dict[str, float]]) -> None:
    width = max(map(len, table))
    first = next(iter(table.values()))
    print(f"{'setting':{width}}" + "".join(f"{name:>18}" for name in FIGURES))
    for setting, row in table.items():
        cells = []
        for name in FIGURES:
            change = f" ({100 * (row[name] / first[name] - 1):+.1f} %)" if first[name] else ""
            cells.append(f"{row[name]:.4f}{change}")
        print(f"{setting:{width}}" + "".join(f"{cell:>18}" for cell in cells))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    settings = {name: setting or {} for name, setting in yaml.safe_load(args.settings.read_text()).items()}
    args.output.mkdir(parents=True, exist_ok=True)
    fixed = ("people", "judge", "lpips_backbone", "num_people", "images_per_person", "batch_size", "seed")
    pipe = UIFacePipeline.from_pretrained(args.pipeline)
    model = {"model": pipeline_fingerprint(pipe), "defaults": pipe.default_sampling(), "noise": NOISE_VERSION}
    check_settings(args.output / "study.json", {name: str(getattr(args, name)) for name in fixed} | model)
    file = args.output / "settings.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    missing = {name: setting for name, setting in settings.items() if known.get(name, {}).get("setting") != setting}
    if missing:
        people, judge = Conditions(args), FaceEncoder(args.judge, args.encoder_root)
        perceptual = load_lpips("alex", args.lpips_backbone)
    for name, setting in missing.items():
        images, cost = sample(args, people, setting)
        known[name] = {"setting": setting, "figures": cost | measure(args, people, images, judge, perceptual)}
        write_json(file, known)
    print_table({name: known[name]["figures"] for name in settings})


if __name__ == "__main__":
    run_script(main)
