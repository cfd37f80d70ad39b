#!/usr/bin/env python
"""Quality of a pipeline under several settings of its call: the same people, the same noise.

    python training/studies/sampling_settings.py training/studies/speed.yaml --people cache/devtrain \
        --encoder_root insightface --judge judge --lpips_backbone alexnet_features.safetensors --output runs/speed

The YAML file maps the name of a setting to arguments of the pipeline's call; `scheduler` names a diffusers scheduler,
`scheduler_options` what it takes beside the pipeline's own configuration. The first setting is what the others are
compared with. For each:

- rows: UNet rows per image; seconds per image, with decoding;
- boundary: mean timestep from which a face follows its identity; capped: share of the faces that do so at
  `latest_boundary`, as their attention has not come to rest before;
- judge: cosine of the faces to the photograph of the person that they were conditioned on, by a recognizer that the
  training has not seen; others: to the photographs of the others; EER: of pairs of the faces;
- LPIPS: between the images of one person (diversity);
- precision, recall: against as many real faces (Kynkaanniemi et al. 2019), features of the LPIPS backbone.

A setting whose figures are in the output folder is not computed again. Prints a table, writes `settings.json`.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import torch
import yaml
from tqdm import tqdm

from uiface_diffusers import UIFacePipeline, default_checkpoint
from uiface_diffusers.evaluation import (
    equal_error_rate,
    identity_consistency,
    improved_precision_recall,
    load_lpips,
)
from uiface_diffusers.evaluation.diversity import identity_pairs, mean_lpips
from uiface_diffusers.evaluation.features import LpipsFeatures
from uiface_diffusers.evaluation.people import People
from uiface_diffusers.evaluation.separability import genuine_pairs, impostor_pairs, pair_cosines
from uiface_diffusers.faces import FaceEncoder, resize_aligned
from uiface_diffusers.files import check_settings, write_json
from uiface_diffusers.fingerprint import pipeline_fingerprint
from uiface_diffusers.options import expand_home, whole
from uiface_diffusers.pictures import to_unit_range
from uiface_diffusers.seeds import NOISE_VERSION, image_generator
from uiface_diffusers.training.options import run_script

FIGURES = ("rows", "seconds", "boundary", "capped", "judge", "others", "EER", "LPIPS", "precision", "recall")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, help="YAML file")
    parser.add_argument("--pipeline", default=str(default_checkpoint()), help="folder or Hub repository")
    parser.add_argument("--people", type=Path, required=True, help="cache of `uiface prepare`: identities, real faces")
    parser.add_argument("--judge", required=True, help="model pack that the pipeline was not trained with")
    parser.add_argument("--encoder_root", default="~/.insightface")
    parser.add_argument("--lpips_backbone", help="AlexNet's convolutions; torchvision downloads them if not given")
    parser.add_argument("--num_people", type=whole(), default=100)
    parser.add_argument("--images_per_person", type=whole(), default=4)
    parser.add_argument("--batch_size", type=whole(), default=16)
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args(expand_home(argv))


class Conditions:
    """People spread evenly over a cache: one photograph each as condition; and real faces to compare with."""

    def __init__(self, args: argparse.Namespace):
        people = People([args.people])
        positions = people.choose(args.num_people)
        self.bank = people.bank.take(positions)
        self.photographs = people.pictures(positions)
        faces, number = len(people.bank), args.num_people * args.images_per_person
        if faces < number:
            raise ValueError(f"{args.people} has {faces} faces: {number} are needed to compare as many.")
        drawn = np.random.default_rng(args.seed).permutation(faces)[:number]
        self.real = to_pixels(people.pictures(sorted(drawn.tolist())))


def to_pixels(images: Sequence[PIL.Image.Image]) -> torch.Tensor:
    """`(N, 3, 112, 112)` in [-1, 1]."""
    aligned = np.stack([resize_aligned(np.asarray(image)) for image in images])
    return to_unit_range(torch.from_numpy(aligned).permute(0, 3, 1, 2))


def make_pipeline(args: argparse.Namespace, setting: dict) -> UIFacePipeline:
    """The pipeline, with the setting's scheduler."""
    pipe = UIFacePipeline.from_pretrained(args.pipeline).to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    name, options = setting.pop("scheduler", None), setting.pop("scheduler_options", {})
    if name is not None:
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    return pipe


def sample(
    args: argparse.Namespace, people: Conditions, setting: dict
) -> tuple[list[PIL.Image.Image], dict[str, float]]:
    """Images, those of a person together; rows and seconds per image, and where the boundaries were."""
    setting = dict(setting)
    pipe, rows, images, boundaries = make_pipeline(args, setting), [], [], []
    pipe.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    numbers = [(i, n) for i in range(args.num_people) for n in range(args.images_per_person)]
    started = time.perf_counter()
    for start in tqdm(range(0, len(numbers), args.batch_size), unit="batch", leave=False):
        batch = numbers[start : start + args.batch_size]
        embeddings = people.bank.take([i for i, _ in batch])
        generators = [image_generator(args.seed, people.bank.names[i], n) for i, n in batch]
        out = pipe(embeddings, generator=generators, **setting)
        images += out.images
        boundaries += out.boundary_timesteps.tolist()
    latest = setting.get("latest_boundary", pipe.config.latest_boundary)
    return images, {
        "rows": sum(rows) / len(numbers),
        "seconds": (time.perf_counter() - started) / len(numbers),
        "boundary": float(np.mean(boundaries)),
        "capped": float(np.mean(np.array(boundaries) <= latest)),
    }


def measure(
    args, people: Conditions, images: list[PIL.Image.Image], judge: FaceEncoder, perceptual
) -> dict[str, float]:
    shape = (args.num_people, args.images_per_person)
    generated, photographs = (judge.embed_pictures(faces) for faces in (images, people.photographs))
    identity = identity_consistency(generated.unflatten(0, shape), photographs)
    labels = np.arange(shape[0]).repeat(shape[1])
    cosines = [pair_cosines(generated, pairs(labels)) for pairs in (genuine_pairs, impostor_pairs)]
    pixels = to_pixels(images)
    pairs = identity_pairs("", args.images_per_person, None)
    lpips = [mean_lpips(of_person, pairs, perceptual) for of_person in pixels.unflatten(0, shape)]
    network = LpipsFeatures(perceptual)
    features = [torch.cat([network(part) for part in images.split(64)]) for images in (people.real, pixels)]
    precision, recall = improved_precision_recall(*features)
    figures = {"judge": identity["own"], "others": identity["other"], "EER": equal_error_rate(*cosines)}
    figures["LPIPS"] = float(np.mean(lpips))
    return figures | {"precision": precision, "recall": recall}


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
    people = judge = perceptual = None
    for name, setting in settings.items():
        if known.get(name, {}).get("setting") == setting:
            continue
        if people is None:
            people, judge = Conditions(args), FaceEncoder(args.judge, args.encoder_root)
            perceptual = load_lpips("alex", args.lpips_backbone)
        images, cost = sample(args, people, setting)
        known[name] = {"setting": setting, "figures": cost | measure(args, people, images, judge, perceptual)}
        write_json(file, known)
    print_table({name: known[name]["figures"] for name in settings})


if __name__ == "__main__":
    run_script(main)
