#!/usr/bin/env python
"""The paper's ablation at any scale: one pipeline, one bank, the same noise in every arm.

    python training/studies/ablation.py --identities bank.safetensors --real cache/devtrain cache/celeba \
        --benchmarks benchmarks --encoder edgeface --judge judge --encoder_root insightface \
        --lpips_backbone alexnet_features.safetensors --work runs/ablation

Every arm is generated (image n of an identity starts from the same noise in all of them) and measured as `uiface
evaluate` does, against `--real` faces; a small recogniser is trained on it from scratch with each of `--seeds`, and
verified on `--benchmarks`. `real` is an arm, too: as many real faces.

Each piece goes on where it was stopped, and what is finished is not done again: run the same command until the table
is full. `--arms` and `--pieces` name the ones to work at. Writes `ablation.json`, prints the table of what there is.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import PIL.Image
import pyarrow.parquet as pq
import torch

from uiface_diffusers import IdentityBank, UIFacePipeline, default_checkpoint, generate_dataset
from uiface_diffusers.data import FaceCache
from uiface_diffusers.evaluation import evaluate_dataset, load_lpips, load_recognizer, verify_benchmarks
from uiface_diffusers.faces import ALIGNED_SIZE, FaceEncoder
from uiface_diffusers.files import check_settings, write_json

TRAINER = Path(__file__).parents[1] / "train_face_recognition.py"
# arm -> arguments of `generate_dataset`; `fixed` has the median boundary of `adaptive`, so that only the choice for
# each sample differs
ARMS = {
    "single": {"boundary": None},
    "adaptive": {"injection": None},
    "fixed": {"injection": None},
    "adaptive_self": {"injection": "self"},
    "uiface": {},
    "uiface_idperturb": {"identity_perturbation": (0.6, 1.0)},
    "uiface_guided": {"guide_from_boundary": True},
    "real": None,
}
PIECES = ("generate", "evaluate", "train")
# figures of the table -> their names in report.json
FIGURES = {
    "LPIPS": "intra_class_lpips",
    "precision": "precision",
    "recall": "recall",
    "consistency": "consistency_others",
}
FIGURES |= {"EER": "eer", "context": "context_cosine"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default=str(default_checkpoint()), help="folder or Hub repository")
    parser.add_argument("--identities", type=Path, required=True, help="bank of synthetic identities")
    parser.add_argument(
        "--real", type=Path, nargs="+", required=True, help="caches of `uiface prepare`; the first one for recall"
    )
    parser.add_argument("--benchmarks", type=Path, required=True, help="InsightFace .bin files of other people")
    parser.add_argument("--encoder", required=True, help="model pack of the bank")
    parser.add_argument("--judge", required=True, help="model pack that the pipeline was not trained with")
    parser.add_argument("--encoder_root", default="~/.insightface")
    parser.add_argument("--lpips_backbone", help="AlexNet's convolutions; torchvision downloads them if not given")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--num_identities", type=int, default=200)
    parser.add_argument("--images_per_identity", type=int, default=20)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the recognisers")
    parser.add_argument("--recognizer", type=json.loads, default={"layers": 18, "width": 16}, help="as JSON")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--train_batch_size", type=int, default=128)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--pieces", nargs="+", choices=PIECES, default=PIECES)
    return parser.parse_args(argv)


def median_boundary(folder: Path) -> int:
    boundaries = pq.read_table(folder / "metadata.parquet", columns=["boundary_timestep"])
    return int(statistics.median_low(boundaries["boundary_timestep"].to_pylist()))


def export_real_faces(caches: list[Path], number: int, output: Path) -> None:
    """So many real faces, of the identities that have the most, as `IDENTITY/NNNNN.png`."""
    opened = [FaceCache(cache) for cache in caches]
    names = [[f"{cache.folder.name}-{name}" for name in cache.embeddings().names] for cache in opened]
    counts = Counter(name for of_cache in names for name in of_cache)
    taken, total = set(), 0
    for name, count in counts.most_common():
        if total < number:
            taken.add(name)
            total += count
    left = number
    for cache, of_cache in zip(opened, names, strict=True):
        positions = [position for position, name in enumerate(of_cache) if name in taken][:left]
        left -= len(positions)
        for position, face in zip(positions, cache.images(positions), strict=True):
            file = output / of_cache[position] / f"{position:05d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture = PIL.Image.fromarray(face).resize((ALIGNED_SIZE, ALIGNED_SIZE), PIL.Image.Resampling.BILINEAR)
            picture.save(file)


def generate(args: argparse.Namespace, arm: str) -> None:
    output = args.work / arm / "data"
    if arm == "real":
        if not output.exists():
            beside = output.with_name("data.part")
            shutil.rmtree(beside, ignore_errors=True)
            export_real_faces(args.real, args.num_identities * args.images_per_identity, beside)
            beside.rename(output)
        return
    arguments = dict(ARMS[arm])
    if arm == "fixed":
        generate(args, "adaptive")
        arguments["boundary"] = median_boundary(args.work / "adaptive" / "data")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bank = IdentityBank.load(args.identities)
    if len(bank) < args.num_identities:
        raise ValueError(f"{args.identities} has {len(bank)} identities, {args.num_identities} are asked for.")
    generate_dataset(
        UIFacePipeline.from_pretrained(args.pipeline).to(device),
        bank.take(range(args.num_identities)),
        output,
        args.images_per_identity,
        num_inference_steps=args.num_inference_steps,
        **arguments,
    )


def evaluate(args: argparse.Namespace, arm: str) -> None:
    bank = None if arm == "real" else IdentityBank.load(args.work / arm / "data" / "identities.safetensors")
    encoder, judge = (FaceEncoder(name, args.encoder_root, det_size=160) for name in (args.encoder, args.judge))
    evaluate_dataset(
        args.work / arm / "data",
        args.work / arm / "evaluation",
        encoder,
        judge=judge,
        identities=bank,
        # real faces would be compared with themselves
        real=None if arm == "real" else args.real[0],
        perceptual=load_lpips("alex", args.lpips_backbone),
        log=print,
    )


def train(args: argparse.Namespace, arm: str) -> None:
    for seed in args.seeds:
        folder = args.work / arm / f"recognizer-{seed}"
        if (folder / "verification.json").exists():
            continue
        options = {"train_data": args.work / arm / "data", "output_dir": folder, "seed": seed, "epochs": args.epochs}
        options |= {"recognizer": json.dumps(args.recognizer), "train_batch_size": args.train_batch_size}
        milestones = [args.epochs * part // 40 for part in (22, 28, 32)]  # the paper's, of 40 epochs
        command = [sys.executable, str(TRAINER), "--resume_from_checkpoint", "latest", "--checkpointing_steps", "200"]
        command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command += ["--lr_milestones", *map(str, milestones)]
        subprocess.run(command, check=True)
        results = verify_benchmarks(load_recognizer(folder), args.benchmarks)
        accuracies = {name: result.accuracy for name, result in results.items()}
        write_json(folder / "verification.json", accuracies)


def collect(args: argparse.Namespace) -> dict[str, dict]:
    """What there is of every arm: figures, and the mean accuracy over the benchmarks of every seed."""
    table = {}
    for arm in ARMS:
        row, report = {}, args.work / arm / "evaluation" / "report.json"
        if report.exists():
            for figure in json.loads(report.read_text())["figures"]:
                by = figure["conditions"].get("recogniser")
                for title, name in FIGURES.items():
                    # the judge's, but the cosine to the embedding, which is the encoder's
                    if figure["name"] == name and by in (None, args.encoder if title == "context" else args.judge):
                        row[title] = figure["value"]
        files = sorted((args.work / arm).glob("recognizer-*/verification.json"))
        accuracies = [statistics.mean(json.loads(file.read_text()).values()) for file in files]
        if accuracies:
            row["accuracies"] = accuracies
        if row:
            table[arm] = row
    return table


def print_table(table: dict[str, dict]) -> None:
    print("".join(f"{title:>18}" for title in ("arm", *FIGURES, "accuracy")))
    for arm, row in table.items():
        cells = [f"{row[title]:.4f}" if title in row else "-" for title in FIGURES]
        values = row.get("accuracies", [])
        spread = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.4f}{spread}" if values else "-")
        print("".join(f"{cell:>18}" for cell in (arm, *cells)))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    fixed = ("pipeline", "num_identities", "images_per_identity", "num_inference_steps", "recognizer", "epochs")
    settings = {name: getattr(args, name) for name in (*fixed, "train_batch_size", "encoder", "judge")}
    check_settings(args.work / "settings.json", settings)
    actions = {"generate": generate, "evaluate": evaluate, "train": train}
    for piece in PIECES:
        for arm in args.arms:
            if piece in args.pieces:
                actions[piece](args, arm)
    table = collect(args)
    write_json(args.work / "ablation.json", {"settings": settings, "arms": table})
    print_table(table)


if __name__ == "__main__":
    main()
