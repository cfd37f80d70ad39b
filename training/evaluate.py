#!/usr/bin/env python
"""Measures trained pipelines: their first stage, and the faces that they sample in two stages.

    python training/evaluate.py runs/uiface/step-* --train_faces cache/devtrain cache/celeba \\
        --unseen_faces cache/devtest --encoder_root insightface --encoder edgeface --judge judge \\
        --lpips_backbone alexnet_features.safetensors --real celeba_bench/images lfw_devtest_112 \\
        --output runs/evaluation

- first stage: cosine of unseen people's faces to their reconstructions, LPIPS;
- identity: cosine of generated faces to the photograph of the person that they were conditioned on, and to the
  photographs of the others, for people of the training and unseen ones;
- verification: equal error rate of pairs of generated faces of the bank's identities (`identities.safetensors` of the
  pipeline, or else drawn from the training embeddings), at the same number of images per identity;
- faces found in all of these, and the nearest training face of generated and of unseen real faces;
- with `--real`, how real the faces look, by KID and the AUC of a classifier that tells them from real ones (0.5:
  cannot be told apart), on AlexNet's features and the judge's: of the empty context, of a single stage with guidance 1
  and 2, and of two stages, each against as many real faces. The row `real` is real faces of other people: the noise;
  `first stage` is those, encoded and decoded. Figures depend on the real faces and on the numbers of faces and
  identities: compare pipelines only where these are equal. KID is printed times 1,000; files and the curve have it as
  it is.

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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils import make_image_grid
from matplotlib.figure import Figure
from tqdm import tqdm

from uiface_diffusers import IdentityBank, UIFacePipeline, sample_identities
from uiface_diffusers.data.sources import describe_left_out, summarize_left_out
from uiface_diffusers.encoders import check_same_encoder
from uiface_diffusers.evaluation import (
    equal_error_rate,
    identity_consistency,
    load_lpips,
    reconstruction_quality,
)
from uiface_diffusers.evaluation.face_set import FaceSet, face_pixels, open_faces
from uiface_diffusers.evaluation.features import LpipsGridFeatures
from uiface_diffusers.evaluation.people import People
from uiface_diffusers.evaluation.realism import FOLDS, Realism, kernel_features, measure_realism, real_halves
from uiface_diffusers.evaluation.reconstruction import reconstruct
from uiface_diffusers.evaluation.separability import genuine_pairs, impostor_pairs, pair_cosines
from uiface_diffusers.faces import FaceEncoder, resize_aligned
from uiface_diffusers.files import write_json
from uiface_diffusers.fingerprint import pipeline_fingerprint
from uiface_diffusers.identities import IDENTITIES, bank_hash, largest_cosines
from uiface_diffusers.options import expand_home, real, whole
from uiface_diffusers.pictures import scale_to_unit_range, to_bytes
from uiface_diffusers.seeds import NOISE_VERSION, image_generator
from uiface_diffusers.training.options import run_script

LOOKS = "alexnet"  # the feature network of the curve's KID


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
        "--real",
        nargs="+",
        help="real aligned faces of nobody of the training, to measure how real generated ones look: folders of"
        " identities or of pictures, or other forms; equal parts are taken of several",
    )
    parser.add_argument(
        "--same_person", type=real(-1), default=0.5, help="cosine from which two faces are one person's"
    )
    parser.add_argument("--num_identities", type=whole(), default=100, help="of the training, unseen, and of the bank")
    parser.add_argument("--images_per_identity", type=whole(), default=4)
    parser.add_argument("--num_inference_steps", type=whole(), default=50)
    parser.add_argument("--guidance_scale", type=real(0), help="default: the model's")
    parser.add_argument("--batch_size", type=whole(), default=16)
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(expand_home(argv))
    if args.images_per_identity < 2:
        parser.error("--images_per_identity has to be 2 or more: pairs of one identity's faces are verified")
    if args.real and args.num_identities < FOLDS:
        parser.error(f"--num_identities has to be {FOLDS} or more with --real: the folds of a classifier test")
    return args


def sample(
    pipe: UIFacePipeline, identities: IdentityBank, args, title: str, empty: bool = False, **options: Any
) -> tuple[list[PIL.Image.Image], list[int]]:
    """`images_per_identity` pictures of each identity, those of an identity together, and their boundaries; of the
    `empty` context from the same noise. `options` are of the pipeline's call."""
    options = {"guidance_scale": args.guidance_scale, **options}
    images, boundaries = [], []
    numbers = [(i, n) for i in range(len(identities)) for n in range(args.images_per_identity)]
    for start in tqdm(range(0, len(numbers), args.batch_size), desc=title, unit="batch"):
        batch = numbers[start : start + args.batch_size]
        out = pipe(
            None if empty else identities.take([i for i, _ in batch]),
            num_images_per_prompt=len(batch) if empty else 1,
            num_inference_steps=args.num_inference_steps,
            **options,
            generator=[image_generator(args.seed, identities.names[i], n) for i, n in batch],
        )
        images += out.images
        boundaries += out.boundary_timesteps.tolist()
    return images, boundaries


def pixels_of(pictures: list[PIL.Image.Image] | list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)


class RealFaces:
    """Real faces to compare generated ones with, and as many others.

    Args:
        folders: their sets.
        number: of faces to compare; with several sets fewer by less than their number.
        cache: a folder that remembers which sets were read through.

    Raises:
        ValueError: a picture cannot be used, or there are too few.
    """

    def __init__(self, folders: list[str], number: int, cache: Path, perceptual: torch.nn.Module, judge: FaceEncoder):
        sets = []
        for folder in folders:
            faces = FaceSet(open_faces(folder))
            if faces.source.left_out:
                summary = describe_left_out(summarize_left_out(faces.source.left_out))
                print(f"left out of {folder}: {'; '.join(summary)}")
            unusable = faces.check(cache)
            if unusable:
                file, reason = next(iter(unusable.items()))
                raise ValueError(
                    f"{len(unusable)} of {len(faces)} pictures in {folder} cannot be used, such as {file}: {reason}."
                )
            sets.append(faces)
        self.half, self.others = real_halves(sets, number)
        if len(self.half) < number // len(sets) * len(sets):
            raise ValueError(
                f"{number} generated faces are compared with as many real ones, and these with as many others: of"
                f" {', '.join(folders)} there are {len(self.half)} and {len(self.others)}. Ask for fewer by"
                " --num_identities or --images_per_identity, or give more real faces."
            )
        self.grid, self.judge = LpipsGridFeatures(perceptual), judge
        self._features: dict[int, dict[str, torch.Tensor]] = {}

    @staticmethod
    def pictures(faces: FaceSet, size: int) -> list[np.ndarray]:
        """RGB bytes at the size of a pipeline's pictures: both sides are resized to 112 from there. KID would see the
        difference: real faces of 112 pixels have 430 / 1000 to others that went through 128 and back."""
        return [resize_aligned(faces.source.read(photograph), size) for photograph in faces.photographs]

    def features_of(self, pictures: list[PIL.Image.Image] | list[np.ndarray]) -> dict[str, torch.Tensor]:
        """Network -> features `(N, D)` of square faces."""
        faces = [resize_aligned(np.asarray(picture)) for picture in pictures]
        grid = torch.cat([self.grid(pixels) for pixels in face_pixels(faces).split(64)])
        judged = self.judge.embed_pictures([PIL.Image.fromarray(face) for face in faces])
        return {self.grid.network: grid, self.judge.name: kernel_features(judged)}

    def measure(self, pictures: list[PIL.Image.Image] | list[np.ndarray], people: Sequence) -> dict[str, Realism]:
        """Network -> how far square faces of `people` are from the real ones at their size."""
        size = np.asarray(pictures[0]).shape[0]
        if size not in self._features:
            self._features[size] = self.features_of(self.pictures(self.half, size))
        return {
            name: measure_realism(self._features[size][name], features, self.half.names, people)
            for name, features in self.features_of(pictures).items()
        }


def reconstructions_of(pipe: UIFacePipeline, pictures: list[np.ndarray]) -> list[np.ndarray]:
    """Faces of the pipeline's size through its first stage, as RGB bytes."""
    found = []
    for start in range(0, len(pictures), 32):
        pixels = pixels_of(pictures[start : start + 32]).to(pipe.vae.device, pipe.vae.dtype)
        result = reconstruct(pipe.vae, scale_to_unit_range(pixels)).float().cpu()
        found += list(to_bytes(result).permute(0, 2, 3, 1).numpy())
    return found


def nearest_cosines(embeddings: torch.Tensor, known: torch.Tensor) -> dict[str, float]:
    nearest, _ = largest_cosines(embeddings, known)
    return {"mean": nearest.mean().item(), "p99": nearest.quantile(0.99).item(), "max": nearest.max().item()}


class Measurement:
    """What all pipelines have in common: people, photographs, recognizers.

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
            raise ValueError(f"the judge has to be another recognizer than the encoder, but both are `{args.judge}`.")
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
        self.real = None
        if args.real:
            number = args.num_identities * args.images_per_identity
            self.real = RealFaces(args.real, number, args.output / "cache", self.perceptual, self.judge)

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

        # 6. looks
        if self.real is not None:
            result["realism"] = self.measure_looks(pipe, bank, images["bank"])

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

    def measure_looks(
        self, pipe: UIFacePipeline, bank: IdentityBank, two_stages: list[PIL.Image.Image]
    ) -> dict[str, Any]:
        """How real faces of each way to sample look; those of two stages are there already."""
        args, real = self.args, self.real
        people = np.arange(len(bank)).repeat(args.images_per_identity).tolist()
        found = {
            "faces": len(people),
            "identities": len(bank),
            "real_faces": len(real.half),
            "real_identities": len(real.half.identities),
        }
        print(
            f"looks, {len(people)} faces of {len(bank)} identities against {len(real.half)} real ones of"
            f" {len(real.half.identities)} people:"
        )

        def measure(title: str, pictures: Sequence, names: Sequence) -> None:
            found[title] = {}
            for network, looks in real.measure(pictures, names).items():
                found[title] |= {f"{name}/{network}": value for name, value in asdict(looks).items()}
                kid, spread = 1000 * looks.kid, 1000 * looks.kid_std
                line = f"{title:25s} {network:10s} KID x 1000 {kid:8.1f} +- {spread:6.1f}   AUC {looks.c2st:.3f}"
                print(line, flush=True)

        others = real.pictures(real.others, two_stages[0].width)
        measure("real", others, real.others.names)
        measure("first stage", reconstructions_of(pipe, others), real.others.names)
        # every face is of nobody in particular
        measure("empty context", sample(pipe, bank, args, "empty context", empty=True)[0], range(len(people)))
        for scale in (1.0, 2.0):
            title = f"single stage, guidance {scale:g}"
            single, _ = sample(pipe, bank, args, title, boundary=None, guidance_scale=scale)
            measure(title, single, people)
        measure("two stages", two_stages, people)
        return found


def what_decides(pipeline: str, args: argparse.Namespace) -> dict[str, Any]:
    """What the result depends on: the command, the pipeline with its defaults, and its bank."""
    options = {name: str(value) for name, value in vars(args).items() if name not in ("pipelines", "output")}
    if args.real is None:  # a result that was measured before there was this option
        del options["real"]
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
    titles = ["training people", "unseen people", "others", "EER", "nearest training face"]
    looks = ("empty context", "two stages") if all("realism" in result for result in results.values()) else ()
    titles += [f"KID, {arm}" for arm in looks]
    rows = []
    for samples, result in sorted(results.items()):
        people = [result[f"identity/{name}/{judge}"] for name in ("training", "unseen")]
        nearest = result["nearest_training_face"]["generated"]["mean"]
        others = max(figures["other"] for figures in people)
        eer = result[f"verification/{judge}"]["eer"]
        kid = [result["realism"][arm][f"kid/{LOOKS}"] for arm in looks]
        rows.append((samples, people[0]["own"], people[1]["own"], others, eer, nearest, *kid))
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
    axis.set_ylabel(f"cosine or error rate, {judge}" + (f"; KID, {LOOKS}" if looks else ""))
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
