#!/usr/bin/env python
"""Measures trained pipelines: their first stage, and the faces that they sample in two stages.

    python training/evaluate.py runs/uiface/step-* --train-faces cache/devtrain cache/celeba \\
        --unseen-faces cache/devtest --encoder-root insightface --encoder edgeface --judge judge \\
        --lpips-backbone alexnet_features.safetensors --real celeba_bench/images lfw_devtest_112 \\
        --output runs/evaluation

- first stage: cosine and LPIPS of unseen people's faces to their reconstructions;
- identity: cosine of generated faces to the photograph of the person that they were conditioned on, and to the
  photographs of other people, for people of the training and for unseen ones;
- verification: equal error rate of pairs of generated faces. Their identities are those of the pipeline's bank
  (`identities.safetensors`), or drawn from the training embeddings if it has none;
- share of generated images with a face; nearest training face of generated and of unseen real faces;
- with `--real`, how real the faces look: KID, and the AUC of a classifier that separates them from real ones (0.5:
  cannot be told apart), on features of AlexNet and of the judge. Measured are the empty context, a single stage with
  guidance 1 and 2, and two stages, each against as many real faces. The row `real` shows other real people, which is
  the noise level; `first stage` shows the same faces encoded and decoded. Figures depend on the real faces and on the
  numbers of faces and identities: compare pipelines only where these are equal. KID is printed times 1,000, but not in
  files and the curve.

"Unseen" people who look like one of the training (`--same-person`) are left out and named: LFW has people under two
names.

For each pipeline, `--output/NAME` has `result.json` with the printed figures, `identity.png` (the distributions),
`faces.png` (64 faces of the bank) and `people.png` (photographs of unseen people and the faces conditioned on them:
not to be published). A pipeline with a result is not measured again. For several pipelines of training/train.py, the
figures are also printed against the samples seen and drawn (`curve.png`), with what the last doubling of samples has
changed.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from uiface_cli.options import expand_home, real, whole, with_hyphens
from uiface_diffusers import IdentityBank, UIFacePipeline, sample_identities
from uiface_diffusers.evaluation import load_lpips
from uiface_diffusers.evaluation.people import People
from uiface_diffusers.evaluation.pipelines import PipelineEvaluation, PipelineSettings
from uiface_diffusers.evaluation.realism import FOLDS
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.files import write_json
from uiface_diffusers.fingerprint import pipeline_fingerprint
from uiface_diffusers.identities import IDENTITIES, bank_hash
from uiface_diffusers.seeds import NOISE_VERSION
from uiface_diffusers.training.options import run_script

LOOKS = "alexnet"  # the feature network of the curve's KID


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="+", help="folders or Hub repositories")
    parser.add_argument("--train-faces", nargs="+", required=True, help="caches that it was trained on")
    parser.add_argument("--unseen-faces", required=True, help="cache of other people")
    parser.add_argument("--encoder", required=True, help="model pack of the caches; its detector looks for faces")
    parser.add_argument("--judge", required=True, help="model pack that the training did not see")
    parser.add_argument("--encoder-root", default="~/.insightface")
    parser.add_argument("--lpips-backbone", help="AlexNet's convolutions; torchvision downloads them if not given")
    parser.add_argument(
        "--real",
        nargs="+",
        help="real aligned faces of nobody of the training, to measure how real generated ones look: folders of"
        " identities or of pictures, or other forms; equal parts are taken of several",
    )
    parser.add_argument(
        "--same-person", type=real(-1), default=0.5, help="cosine from which two faces are one person's"
    )
    parser.add_argument("--num-identities", type=whole(), default=100, help="of the training, unseen, and of the bank")
    parser.add_argument("--images-per-identity", type=whole(), default=4)
    parser.add_argument("--num-inference-steps", type=whole(), default=50)
    parser.add_argument("--guidance-scale", type=real(0), help="default: the model's")
    parser.add_argument("--batch-size", type=whole(), default=16)
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(with_hyphens(expand_home(argv)))
    if args.images_per_identity < 2:
        parser.error("--images-per-identity has to be 2 or more: pairs of one identity's faces are verified")
    if args.real and args.num_identities < FOLDS:
        parser.error(f"--num-identities has to be {FOLDS} or more with --real: the folds of a classifier test")
    return args


def load_evaluation(args: argparse.Namespace) -> PipelineEvaluation:
    """What all pipelines have in common: people, photographs, recognizers.

    Raises:
        ValueError: a model pack is not the caches', or encoder and judge are one.
    """
    encoder, judge = (FaceEncoder(name, args.encoder_root, det_size=160) for name in (args.encoder, args.judge))
    settings = PipelineSettings(**{name: getattr(args, name) for name in PipelineSettings.__dataclass_fields__})
    return PipelineEvaluation(
        People(args.train_faces),
        People([args.unseen_faces]),
        encoder,
        judge,
        load_lpips("alex", args.lpips_backbone),
        settings,
        real=args.real or (),
        cache=args.output / "cache",
        log=partial(print, flush=True),
    )


def identities_of(pipeline: str, train: IdentityBank, number: int, seed: int) -> IdentityBank:
    """The pipeline's own identities, or else drawn from the training embeddings."""
    file = Path(pipeline) / IDENTITIES
    if not file.exists():
        return sample_identities(train, number, seed=seed)
    bank = IdentityBank.load(file)
    if len(bank) < number:
        raise ValueError(f"{file} has {len(bank)} identities, {number} are asked for.")
    return bank.take(range(number))


def measure(evaluation: PipelineEvaluation, pipeline: str, command: dict[str, Any], output: Path) -> None:
    """Everything about one pipeline of a folder or repository; `result.json` is written last, with the `command` that
    it belongs to."""
    bank = identities_of(pipeline, evaluation.train.bank, evaluation.settings.num_identities, evaluation.settings.seed)
    pipe = UIFacePipeline.from_pretrained(pipeline).to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    result = {"command": command, "training": training_progress(pipeline)}
    write_json(output / "result.json", result | evaluation.measure(pipe, bank, output))


def what_decides(pipeline: str, args: argparse.Namespace) -> dict[str, Any]:
    """What the result depends on: the command, the pipeline with its defaults, and its bank."""
    options: dict[str, Any] = {
        name: str(value) for name, value in vars(args).items() if name not in ("pipelines", "output")
    }
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
    seen, columns = np.array([row[0] for row in rows]), np.array([row[1:] for row in rows]).T
    last = seen >= seen[-1] / 2
    if last.sum() > 1:
        for title, column in zip(titles, columns[:, last], strict=True):
            slope = np.polyfit(np.log2(seen[last]), column, 1)[0]
            print(f"{title}: {slope:+.4f} a doubling of the samples, over the last {last.sum()} points")
    figure = Figure(figsize=(7, 4), layout="tight")
    axis = figure.subplots()
    for title, column in zip(titles, columns, strict=True):
        axis.plot(seen, column, marker="o", label=title)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("samples seen")
    axis.set_ylabel(f"cosine or error rate, {judge}" + (f"; KID, {LOOKS}" if looks else ""))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(output / "curve.png", dpi=100)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    names = [Path(pipeline).resolve().name for pipeline in args.pipelines]
    if len(set(names)) < len(names):
        raise ValueError(f"two of the pipelines have one name, by which results are kept: {', '.join(sorted(names))}.")
    evaluation, results = None, {}
    for name, pipeline in zip(names, args.pipelines, strict=True):
        output, command = args.output / name, what_decides(pipeline, args)
        if not is_measured(output, command):
            evaluation = evaluation or load_evaluation(args)
            print(f"{name}:")
            measure(evaluation, pipeline, command, output)
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
