#!/usr/bin/env python
"""Measures trained pipelines: their first stage, and the faces that they sample in two stages.

    python training/evaluate.py runs/uiface/step-* --train_faces cache/devtrain cache/celeba \\
        --unseen_faces cache/devtest --encoder_root insightface --encoder edgeface --judge judge \\
        --lpips_backbone alexnet_features.safetensors --output runs/evaluation

- first stage: cosine of unseen people's faces to their reconstructions, LPIPS;
- identity: cosine of generated faces to the photograph of the person that they were conditioned on, and to the
  photographs of the others, for people of the training and unseen ones;
- verification: equal error rate of pairs of generated faces of the bank's identities (`identities.safetensors` of the
  pipeline, or else drawn from the training embeddings), at the same number of images an identity;
- faces found in all of these, and the nearest training face of generated and of unseen real faces.

"Unseen" people who look like one of the training (`--same_person`) are left out and named: LFW has people under two
names.

Writes into `--output/NAME` of each pipeline: `result.json` with the figures that it prints, `identity.png` (the
distributions), `faces.png` (64 faces of the bank) and `people.png` (photographs of unseen people and the faces
conditioned on them: not to be published). What is there already is not measured again. Of several pipelines that
training/train.py saved, it also prints the figures against samples seen, with what a doubling of the samples has
brought at the end, and draws them (`curve.png`).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils import make_image_grid
from matplotlib.figure import Figure
from tqdm import tqdm

from uiface_diffusers import IdentityBank, UIFacePipeline, sample_identities
from uiface_diffusers.encoders import check_same_encoder
from uiface_diffusers.evaluation import (
    equal_error_rate,
    identity_consistency,
    load_lpips,
    reconstruction_quality,
)
from uiface_diffusers.evaluation.people import People
from uiface_diffusers.evaluation.separability import genuine_pairs, impostor_pairs, pair_cosines
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.files import write_json
from uiface_diffusers.fingerprint import pipeline_fingerprint
from uiface_diffusers.generation import bank_hash
from uiface_diffusers.hub import IDENTITIES
from uiface_diffusers.identities import largest_cosines
from uiface_diffusers.options import expand_home, real, whole
from uiface_diffusers.seeds import NOISE_VERSION, image_generator
from uiface_diffusers.training_utils import run_script


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="+", help="folders or Hub repositories")
    parser.add_argument("--train_faces", nargs="+", required=True, help="caches that it was trained on")
    parser.add_argument("--unseen_faces", required=True, help="cache of other people")
    parser.add_argument("--encoder", required=True, help="model pack of the caches; its detector looks for faces")
    parser.add_argument("--judge", required=True, help="model pack that the training did not see")
    parser.add_argument("--encoder_root", default="~/.insightface")
    parser.add_argument("--lpips_backbone", help="AlexNet's convolutions; torchvision downloads them if not given")
    parser.add_argument(
        "--same_person", type=real(-1, 1), default=0.5, help="cosine from which two faces are one person's"
    )
    parser.add_argument("--num_identities", type=whole(), default=100, help="of the training, unseen, and of the bank")
    parser.add_argument("--images_per_identity", type=whole(), default=4)
    parser.add_argument("--num_inference_steps", type=whole(), default=50)
    parser.add_argument("--guidance_scale", type=real(0), help="default: the model's")
    parser.add_argument("--batch_size", type=whole(), default=16)
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args(expand_home(argv))


def sample(
    pipe: UIFacePipeline, identities: IdentityBank, args, title: str
) -> tuple[list[PIL.Image.Image], list[int]]:
    """`images_per_identity` pictures of each identity, those of an identity together, and their boundaries."""
    images, boundaries = [], []
    numbers = [(i, n) for i in range(len(identities)) for n in range(args.images_per_identity)]
    for start in tqdm(range(0, len(numbers), args.batch_size), desc=title, unit="batch"):
        batch = numbers[start : start + args.batch_size]
        out = pipe(
            identities.take([i for i, _ in batch]),
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=[image_generator(args.seed, identities.names[i], n) for i, n in batch],
        )
        images += out.images
        boundaries += out.boundary_timesteps.tolist()
    return images, boundaries


def pixels_of(pictures: list[PIL.Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)


def nearest_cosines(embeddings: torch.Tensor, known: torch.Tensor) -> dict[str, float]:
    nearest, _ = largest_cosines(embeddings, known)
    return {"mean": nearest.mean().item(), "p99": nearest.quantile(0.99).item(), "max": nearest.max().item()}


class Measurement:
    """What all pipelines have in common: people, photographs, recognisers.

    Raises:
        ValueError: a model pack is not the caches', or encoder and judge are one.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.encoder, self.judge = (
            FaceEncoder(name, args.encoder_root, det_size=160) for name in (args.encoder, args.judge)
        )
        self.train, unseen = People(args.train_faces), People([args.unseen_faces])
        for people in (self.train, unseen):
            folder, mark = str(people.caches[0].folder), people.bank.encoder_mark
            check_same_encoder(folder, mark, "the pack of --encoder", self.encoder.encoder_mark)
        if args.encoder == args.judge:
            raise ValueError(f"the judge has to be another recogniser than the encoder, but both are `{args.judge}`.")
        self.seen = unseen.near(self.train.bank, args.same_person)
        print(
            f"{len(self.seen)} unseen people have a face like one of the training (cosine >= {args.same_person}) and"
            f" are left out: {', '.join(self.seen)}"
        )
        chosen = {"training": (self.train, self.train.choose(args.num_identities))}
        chosen["unseen"] = (unseen, unseen.choose(args.num_identities, without=self.seen))
        self.photographs = {name: people.pictures(positions) for name, (people, positions) in chosen.items()}
        self.conditions = {name: people.bank.take(positions) for name, (people, positions) in chosen.items()}
        seen = set(self.seen)
        strangers = [i for i, name in enumerate(unseen.bank.names) if name not in seen]
        self.unseen_embeddings = unseen.bank.embeddings[strangers]
        self.recognizers = {pack.name: pack.to_torch() for pack in (self.encoder, self.judge)}
        self.perceptual = load_lpips("alex", args.lpips_backbone)

    def bank(self, pipeline: str) -> IdentityBank:
        """The identities to make."""
        file, number = Path(pipeline) / IDENTITIES, self.args.num_identities
        if not file.exists():
            return sample_identities(self.train.bank, number, seed=self.args.seed)
        bank = IdentityBank.load(file)
        if len(bank) < number:
            raise ValueError(f"{file} has {len(bank)} identities, {number} are asked for.")
        return bank.take(range(number))

    def measure(self, pipeline: str, command: dict[str, Any], output: Path) -> None:
        """Everything about one pipeline of a folder or repository; `result.json` is written last, with `command`: by
        which it is known again."""
        args, encoder, judge = self.args, self.encoder, self.judge
        started = time.monotonic()
        bank = self.bank(pipeline)
        pipe = UIFacePipeline.from_pretrained(pipeline).to("cuda" if torch.cuda.is_available() else "cpu")
        pipe.set_progress_bar_config(disable=True)
        result = {"command": command, "training": training_progress(pipeline), "left_out": self.seen}

        # 1. the first stage
        quality = reconstruction_quality(
            pipe.vae, pixels_of(self.photographs["unseen"]), self.perceptual, self.recognizers
        )
        result["first_stage"] = quality.figures
        print(f"first stage, {len(self.photographs['unseen'])} unseen faces: {describe(quality.figures)}")

        # 2. generated faces
        images, boundaries, found = {}, [], []
        for name, identities in {"bank": bank, **self.conditions}.items():
            images[name], reached = sample(pipe, identities, args, name)
            boundaries += reached
            found += [bool(encoder.detect(np.asarray(image))) for image in images[name]]
        result["faces_found"] = float(np.mean(found))
        result["boundary_quartiles"] = np.percentile(boundaries, [0, 25, 50, 75, 100]).tolist()
        print(f"faces found in {100 * result['faces_found']:.1f} % of {len(found)}")
        print(f"boundaries, quartiles: {result['boundary_quartiles']}")

        # 3. identity
        shape = (args.num_identities, args.images_per_identity)
        embeddings = {
            (pack.name, name): pack.embed_pictures(images[name]).unflatten(0, shape)
            for pack in (judge, encoder)
            for name in images
        }
        figure = Figure(figsize=(15, 4), layout="tight")
        axes = figure.subplots(1, 3)
        for axis, name in zip(axes, self.conditions, strict=False):
            for pack in (judge, encoder):
                references, generated = pack.embed_pictures(self.photographs[name]), embeddings[pack.name, name]
                figures = identity_consistency(generated, references)
                result[f"identity/{name}/{pack.name}"] = figures
                print(f"cosine to the photograph of {name} people, {pack.name}: {describe(figures)}")
                if pack is judge:
                    similarity = torch.einsum("nmd,kd->nmk", generated, references)
                    own = torch.eye(len(references), dtype=torch.bool)[:, None].expand_as(similarity)
                    draw_distributions(axis, similarity[own], similarity[~own], f"{name} people, {judge.name}")

        # 4. verification
        labels = np.arange(shape[0]).repeat(shape[1])
        for pack in (judge, encoder):
            of_bank = embeddings[pack.name, "bank"].flatten(0, 1)
            genuine, impostor = (pair_cosines(of_bank, pairs(labels)) for pairs in (genuine_pairs, impostor_pairs))
            figures = {
                "eer": equal_error_rate(genuine, impostor),
                "genuine": float(genuine.mean()),
                "impostor": float(impostor.mean()),
            }
            result[f"verification/{pack.name}"] = figures
            print(f"pairs of generated faces, {pack.name}: {describe(figures)}")
            if pack is judge:
                draw_distributions(axes[2], genuine, impostor, f"pairs of the bank's faces, {judge.name}")

        # 5. nearness to the training faces
        figures = {
            "generated": nearest_cosines(embeddings[encoder.name, "bank"].flatten(0, 1), self.train.bank.embeddings),
            "real": nearest_cosines(self.unseen_embeddings, self.train.bank.embeddings),
        }
        result["nearest_training_face"] = figures
        for name, values in figures.items():
            print(f"nearest training face of {name} faces, {encoder.name}: {describe(values)}")

        output.mkdir(parents=True, exist_ok=True)
        figure.savefig(output / "identity.png", dpi=80)
        # one face of each identity of the bank first
        order = [i * shape[1] + n for n in range(shape[1]) for i in range(shape[0])][:64]
        columns = min(8, len(order))
        rows = len(order) // columns
        grid = make_image_grid([images["bank"][i] for i in order[: columns * rows]], rows=rows, cols=columns)
        grid.save(output / "faces.png")
        cells = []
        for i in range(min(8, shape[0])):
            cells += [self.photographs["unseen"][i], *images["unseen"][i * shape[1] : (i + 1) * shape[1]]]
        make_image_grid(cells, rows=len(cells) // (shape[1] + 1), cols=shape[1] + 1).save(output / "people.png")
        result["minutes"] = (time.monotonic() - started) / 60
        write_json(output / "result.json", result)


def what_decides(pipeline: str, args: argparse.Namespace) -> dict[str, Any]:
    """What the result depends on: the command, the pipeline with its defaults, and its bank."""
    options = {name: str(value) for name, value in vars(args).items() if name not in ("pipelines", "output")}
    pipe, bank = UIFacePipeline.from_pretrained(pipeline), Path(pipeline) / IDENTITIES
    identities = bank_hash(IdentityBank.load(bank)) if bank.exists() else None
    defaults = pipe.default_sampling(args.num_inference_steps)
    options |= {"noise": NOISE_VERSION, "model": pipeline_fingerprint(pipe)}
    return options | {"defaults": defaults, "identities": identities}


def training_progress(pipeline: str) -> dict[str, float] | None:
    """Step, samples and hours that training/train.py noted beside a pipeline."""
    file = Path(pipeline) / "progress.json"
    return json.loads(file.read_text()) if file.exists() else None


def is_measured(output: Path, command: dict[str, Any]) -> bool:
    """Whether a result is there that this command would give again."""
    file = output / "result.json"
    return file.exists() and json.loads(file.read_text()).get("command") == command


def draw_curve(results: dict[int, dict], judge: str, output: Path) -> None:
    """Prints the figures against samples seen, and what the last doubling brought; saves them as a picture."""
    titles = ("training people", "unseen people", "others", "EER", "nearest training face")
    rows = []
    for samples, result in sorted(results.items()):
        people = [result[f"identity/{name}/{judge}"] for name in ("training", "unseen")]
        nearest = result["nearest_training_face"]["generated"]["mean"]
        others = max(figures["other"] for figures in people)
        eer = result[f"verification/{judge}"]["eer"]
        rows.append((samples, people[0]["own"], people[1]["own"], others, eer, nearest))
    print(f"{'samples':>10}" + "".join(f"{title:>23}" for title in titles) + f"   ({judge})")
    for samples, *values in rows:
        print(f"{samples:10,}" + "".join(f"{value:23.4f}" for value in values))
    samples, values = np.array([row[0] for row in rows]), np.array([row[1:] for row in rows])
    last = samples >= samples[-1] / 2
    if last.sum() > 1:
        for title, column in zip(titles, values[last].T, strict=True):
            slope = np.polyfit(np.log2(samples[last]), column, 1)[0]
            print(f"{title}: {slope:+.4f} a doubling of the samples, over the last {last.sum()} points")
    figure = Figure(figsize=(7, 4), layout="tight")
    axis = figure.subplots()
    for title, column in zip(titles, values.T, strict=True):
        axis.plot(samples, column, marker="o", label=title)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("samples seen")
    axis.set_ylabel(f"cosine or error rate, {judge}")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(output / "curve.png", dpi=100)


def describe(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items())


def draw_distributions(axis, genuine, impostor, title: str) -> None:
    bins = np.linspace(-0.4, 1, 57)
    axis.hist(np.asarray(impostor), bins, density=True, alpha=0.6, label="others")
    axis.hist(np.asarray(genuine), bins, density=True, alpha=0.6, label="own")
    axis.set_title(title)
    axis.set_xlabel("cosine")
    axis.legend()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    names = [Path(pipeline).resolve().name for pipeline in args.pipelines]
    if len(set(names)) < len(names):
        raise ValueError(f"two of the pipelines have one name, by which results are kept: {', '.join(sorted(names))}.")
    measurement, results = None, {}
    for name, pipeline in zip(names, args.pipelines, strict=True):
        output, command = args.output / name, what_decides(pipeline, args)
        if not is_measured(output, command):
            measurement = measurement or Measurement(args)
            print(f"{name}:")
            measurement.measure(pipeline, command, output)
        results[name] = json.loads((output / "result.json").read_text())
    of_samples = {}
    for name, result in results.items():
        if result["training"] is None:
            print(f"{name} has no progress.json, which says how many samples it has seen: it is not in the curve")
        else:  # of equal ones, the last
            of_samples[result["training"]["samples"]] = result
    if len(of_samples) > 1:
        draw_curve(of_samples, args.judge, args.output)


if __name__ == "__main__":
    run_script(main)
