#!/usr/bin/env python
"""The paper's ablation at any scale: one pipeline, one bank, the same noise in every arm.

    python training/studies/ablation.py --identities bank.safetensors --real cache/devtrain cache/celeba \
        --benchmarks bins --encoder edgeface --judge judge --encoder-root insightface \
        --lpips-backbone alexnet_features.safetensors --work runs/ablation

Every arm is generated and then measured as `uiface evaluate` does. Image n of an identity starts from the same noise
in all arms. The identities are split into `--groups`, which are measured separately: the spread of a figure is that
over the groups, and two arms are compared group by group. A small recognizer is trained from scratch on all groups
together, with each of `--seeds`, and verified on `--benchmarks`. The arm `real` has as many real people with as many
faces each, who look like nobody of the benchmarks. Precision and recall compare with real faces of yet other
people. These two sets are written first, so that what is missing is named before the long work.

Arms are made one after the other. Run the same command until the table is full: each arm goes on where it was stopped,
and what is finished is not done again. `--arms` and `--pieces` select a part of the work. The table is written to
`--results` after every piece; at the end it is printed, and some faces of all arms are drawn beside it. Only that
small file has to last: an arm whose figures are in it is not made again when `--work` is gone.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import torch
from diffusers.utils import make_image_grid

from uiface_cli.options import expand_home, real, whole, with_hyphens
from uiface_diffusers import IdentityBank, UIFacePipeline, default_checkpoint, generate_dataset
from uiface_diffusers.data.benchmarks import read_benchmarks
from uiface_diffusers.evaluation import evaluate_dataset, load_lpips
from uiface_diffusers.evaluation.people import People
from uiface_diffusers.faces import ALIGNED_SIZE, FaceEncoder, load_photograph
from uiface_diffusers.files import check_settings, complete_file, write_json
from uiface_diffusers.fingerprint import pipeline_fingerprint
from uiface_diffusers.identities import bank_hash
from uiface_diffusers.seeds import NOISE_VERSION
from uiface_diffusers.training.bench import TrainingFailed, mean_text, train_and_verify
from uiface_diffusers.training.options import run_script

TRAINING = Path(__file__).parents[1]
# arm -> arguments of `generate_dataset`; `fixed` has the median boundary of `adaptive`, so that only the choice for
# each sample differs, `early` is halfway from it to one stage; a pipeline's own guidance was chosen for two stages, so
# one stage has the paper's, too, beside two stages with all settings of the paper
ARMS: dict[str, dict[str, Any] | None] = {
    "single": {"boundary": None},
    "single_guidance_2": {"boundary": None, "guidance_scale": 2.0},
    "adaptive": {"injection": None},
    "early": {"injection": None, "boundary": 840},
    "fixed": {"injection": None},
    "adaptive_self": {"injection": "self"},
    "uiface": {},
    "uiface_idperturb": {"identity_perturbation": (0.6, 1.0)},
    "uiface_guided": {"guide_from_boundary": True},
    "uiface_paper": {"guidance_scale": 2.0, "latest_boundary": 500},  # and `PAPER_THRESHOLD`
    "real": None,
}
PAPER_THRESHOLD = 0.006  # in 50 steps
ONE_STAGE = ("single", "single_guidance_2")  # what the others are compared with
PIECES = ("generate", "evaluate", "train")
# figures of the table -> their names in report.json
FIGURES = {
    "LPIPS": "intra_class_lpips",
    "precision": "precision",
    "recall": "recall",
    "consistency": "consistency_others",
}
FIGURES |= {"EER": "eer", "context": "context_cosine"}
# of the table: share of the faces that follow their identity only from `latest_boundary`, and from which timestep on
BOUNDARIES = ("capped", "boundary")
REFERENCES = "references"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default=str(default_checkpoint()), help="folder or Hub repository")
    parser.add_argument("--identities", type=Path, required=True, help="bank of synthetic identities")
    parser.add_argument("--real", type=Path, nargs="+", required=True, help="caches of `uiface prepare`")
    parser.add_argument("--benchmarks", type=Path, required=True, help="InsightFace .bin files of other people")
    parser.add_argument("--encoder", required=True, help="model pack of the bank")
    parser.add_argument("--judge", required=True, help="model pack that the pipeline was not trained with")
    parser.add_argument("--encoder-root", default="~/.insightface")
    parser.add_argument("--lpips-backbone", help="AlexNet's convolutions; torchvision downloads them if not given")
    parser.add_argument("--work", type=Path, required=True, help="folder of the faces, reports and recognizers")
    parser.add_argument("--results", type=Path, help="the table, JSON (default: ablation.json in --work)")
    parser.add_argument("--num-identities", type=whole(), default=200)
    parser.add_argument("--groups", type=whole(), default=5, help="of identities, for the spread")
    parser.add_argument("--images-per-identity", type=whole(), default=20)
    parser.add_argument("--num-inference-steps", type=whole(), default=25)
    parser.add_argument("--seeds", type=whole(0), nargs="+", default=[0, 1, 2], help="of the recognizers")
    parser.add_argument("--recipe", type=Path, default=TRAINING / "configs" / "fr_study.yaml", help="of them")
    parser.add_argument(
        "--same-person",
        type=real(-1, 1),
        default=0.5,
        help="cosine to a benchmark's face from which a real person is left out",
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--pieces", nargs="+", choices=PIECES, default=PIECES)
    args = parser.parse_args(with_hyphens(expand_home(argv)))
    if args.num_identities % args.groups:
        parser.error(f"--num-identities {args.num_identities} cannot be split into {args.groups} equal groups")
    args.results = args.results or args.work / "ablation.json"
    return args


def groups_of(args: argparse.Namespace, arm: str) -> list[Path]:
    """The arm's data sets, one per group of identities."""
    return [args.work / arm / f"group-{number}" for number in range(args.groups)]


def boundaries_of(folders: Iterable[Path]) -> list[int]:
    """The timesteps from which the faces of data sets follow their identity."""
    tables = [pq.read_table(folder / "metadata.parquet", columns=["boundary_timestep"]) for folder in folders]
    return [timestep for table in tables for timestep in table["boundary_timestep"].to_pylist()]


def write_faces(people: People, positions: Sequence[int], output: Path) -> None:
    """Real faces as `IDENTITY/NNNNN.png`; the folder is whole or not there at all."""
    beside = output.with_name(f"{output.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    for position, picture in zip(positions, people.pictures(positions), strict=True):
        file = beside / people.bank.names[position].replace("/", "-") / f"{position:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.resize((ALIGNED_SIZE, ALIGNED_SIZE), PIL.Image.Resampling.BILINEAR).save(file)
    beside.rename(output)


def write_real_faces(args: argparse.Namespace) -> None:
    """The arm `real`, and the faces of other people that precision and recall compare with: as many as in a group."""
    folders = [*groups_of(args, "real"), args.work / REFERENCES]
    if all(folder.exists() for folder in folders):
        return
    people = People(args.real)
    encoder = FaceEncoder(args.encoder, args.encoder_root, det_size=160)
    faces = [
        PIL.Image.fromarray(benchmark.face(position))
        for benchmark in read_benchmarks(args.benchmarks)
        for position in range(len(benchmark.images))
    ]
    tested = IdentityBank(encoder.embed_pictures(faces), encoder.name, [], encoder.fingerprint)
    left_out = set(people.near(tested, args.same_person))
    print(f"{len(left_out)} real people look like one of the benchmarks and are left out: {sorted(left_out)}")

    counts = Counter(name for name in people.bank.names if name not in left_out)
    names = sorted(name for name, count in counts.items() if count >= args.images_per_identity)
    if len(names) < args.num_identities:
        raise ValueError(
            f"{args.real} have {len(names)} people with {args.images_per_identity} faces or more who are not in the"
            f" benchmarks: take fewer than {args.num_identities} --num-identities, or fewer images of each."
        )
    chosen = [names[i * len(names) // args.num_identities] for i in range(args.num_identities)]
    positions: dict[str, list[int]] = {name: [] for name in chosen}
    others: list[int] = []
    for position, name in enumerate(people.bank.names):
        if name not in positions:
            others += [] if name in left_out else [position]
        elif len(positions[name]) < args.images_per_identity:
            positions[name].append(position)
    size = args.num_identities // args.groups
    number = size * args.images_per_identity
    if len(others) < number:
        raise ValueError(f"{args.real} have {len(others)} faces of other people: {number} are needed to compare with.")
    for group, folder in enumerate(folders[:-1]):
        shutil.rmtree(folder, ignore_errors=True)
        write_faces(people, [p for name in chosen[group * size : (group + 1) * size] for p in positions[name]], folder)
    drawn = np.random.default_rng(0).permutation(len(others))[:number]
    shutil.rmtree(folders[-1], ignore_errors=True)
    write_faces(people, [others[i] for i in sorted(drawn)], folders[-1])


def generate(args: argparse.Namespace, arm: str) -> None:
    if arm == "real":
        return  # written before everything else
    arguments = dict(ARMS[arm] or {})
    if arm == "fixed":
        generate(args, "adaptive")
        arguments["boundary"] = int(statistics.median_low(boundaries_of(groups_of(args, "adaptive"))))
    if arm == "uiface_paper":
        arguments["boundary_threshold"] = PAPER_THRESHOLD * 50 / args.num_inference_steps
    bank = IdentityBank.load(args.identities)
    if len(bank) < args.num_identities:
        raise ValueError(f"{args.identities} has {len(bank)} identities, {args.num_identities} are asked for.")
    pipe = UIFacePipeline.from_pretrained(args.pipeline).to("cuda" if torch.cuda.is_available() else "cpu")
    size = args.num_identities // args.groups
    for group, output in enumerate(groups_of(args, arm)):
        generate_dataset(
            pipe,
            bank.take(range(group * size, (group + 1) * size)),
            output,
            args.images_per_identity,
            num_inference_steps=args.num_inference_steps,
            **arguments,
        )


def evaluate(args: argparse.Namespace, arm: str) -> None:
    encoder, judge = (FaceEncoder(name, args.encoder_root, det_size=160) for name in (args.encoder, args.judge))
    perceptual = load_lpips("alex", args.lpips_backbone)
    for folder in groups_of(args, arm):
        evaluate_dataset(
            folder,
            folder.with_name(f"evaluation-{folder.name}"),
            encoder,
            judge=judge,
            identities=None if arm == "real" else IdentityBank.load(folder / "identities.safetensors"),
            real=args.work / REFERENCES,
            perceptual=perceptual,
        )


def saved_results(args: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """The table in `--results`, as `collect` makes it."""
    return json.loads(args.results.read_text()).get("arms", {})


def train(args: argparse.Namespace, arm: str) -> None:
    saved = saved_results(args).get(arm, {}).get("accuracy", {})
    for seed in args.seeds:
        folder = args.work / arm / f"recognizer-{seed}"
        if folder.name in saved:
            continue
        train_and_verify(args.recipe, groups_of(args, arm), folder, seed, args.benchmarks)


def figures_of(args: argparse.Namespace, report: dict) -> dict[str, float]:
    """The table's figures of one group."""
    found = {}
    for figure in report["figures"]:
        by = figure["conditions"].get("recognizer")
        for title, name in FIGURES.items():
            # the judge's, but the cosine to the embedding, which is the encoder's
            if figure["name"] == name and by in (None, args.encoder if title == "context" else args.judge):
                found[title] = figure["value"]
    return found


def collect(args: argparse.Namespace, default_latest: int) -> dict[str, dict[str, dict[str, float]]]:
    """What `--results` and `--work` have: arm -> figure -> its value by group; by seed, the mean accuracy over the
    benchmarks and the share of its own faces that the recognizer has learned."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    saved = saved_results(args)
    for arm in ARMS:
        row = saved.get(arm, {})
        latest_boundary = (ARMS[arm] or {}).get("latest_boundary", default_latest)
        for folder in groups_of(args, arm):
            report = folder.with_name(f"evaluation-{folder.name}") / "report.json"
            found = figures_of(args, json.loads(report.read_text())) if report.exists() else {}
            if (folder / "metadata.parquet").exists():
                boundaries = np.array(boundaries_of([folder]))
                found["capped"] = float((boundaries <= latest_boundary).mean())
                found["boundary"] = float(boundaries.mean())
            for title, value in found.items():
                row.setdefault(title, {})[folder.name] = value
        for file in (args.work / arm).glob("recognizer-*/verification.json"):
            accuracy = statistics.mean(json.loads(file.read_text()).values())
            row.setdefault("accuracy", {})[file.parent.name] = accuracy
            learned = file.with_name("train_results.json")
            if learned.exists():  # not if the recipe ends a training by the clock
                row.setdefault("learned", {})[file.parent.name] = json.loads(learned.read_text())["accuracy"]
        if row:
            table[arm] = row
    return table


def is_finished(args: argparse.Namespace, arm: str) -> bool:
    """Whether `--results` has all figures of an arm."""
    row = saved_results(args).get(arm, {})
    evaluated = all(folder.name in row.get("LPIPS", {}) for folder in groups_of(args, arm))
    return evaluated and all(f"recognizer-{seed}" in row.get("accuracy", {}) for seed in args.seeds)


def print_table(table: dict[str, dict[str, dict[str, float]]]) -> None:
    """Mean and deviation of every figure; then the differences to one stage, group by group and seed by seed."""
    columns = (*BOUNDARIES, *FIGURES, "learned", "accuracy")

    def print_row(name: str, cells: Iterable[str]) -> None:
        print(f"{name:<36}" + "".join(f"{cell:>22}" for cell in cells))

    print_row("arm", columns)
    for arm, row in table.items():
        print_row(arm, [mean_text(row.get(title, {}).values()) for title in columns])
    for base in ONE_STAGE:
        for arm, row in table.items():
            if base not in table or arm in (base, "single", "real"):
                continue
            cells = []
            for title in columns:
                ours, theirs = row.get(title, {}), table[base].get(title, {})
                cells.append(mean_text([ours[key] - theirs[key] for key in ours if key in theirs]))
            print_row(f"{arm} - {base}", cells)
    adaptive = table.get("adaptive", {}).get("capped")
    if adaptive and statistics.mean(adaptive.values()) > 0.95:
        print(
            "Nearly no boundary is found before `latest_boundary`: `fixed` is `adaptive`, and `uiface_guided` is"
            " `uiface`. Search another `boundary_threshold` by training/studies/sampling_settings.py."
        )


def write_picture(args: argparse.Namespace) -> None:
    """Faces of one person of two groups each, one row per arm and a column the same noise, as JPEG beside `--results`.
    Not before all arms are generated."""
    arms = [arm for arm in ARMS if arm != "real"]
    groups = {arm: [folder / "images" for folder in groups_of(args, arm)[:2]] for arm in arms}
    if not all((images.parent / "preview.png").exists() for folders in groups.values() for images in folders):
        return
    cells = []
    for folders in groups.values():
        for images in folders:
            first = sorted(images.iterdir())[0]
            cells += [PIL.Image.fromarray(load_photograph(file)) for file in sorted(first.iterdir())[:5]]
    grid = make_image_grid(cells, rows=len(arms), cols=len(cells) // len(arms))
    with complete_file(args.results.with_suffix(".jpg")) as beside:
        grid.save(beside, "jpeg", quality=90)


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    fixed = (
        "num_identities",
        "groups",
        "images_per_identity",
        "num_inference_steps",
        "encoder",
        "judge",
        "same_person",
    )
    pipe = UIFacePipeline.from_pretrained(args.pipeline)
    settings = {name: getattr(args, name) for name in fixed}
    # what the figures come from: another checkpoint at the same place is another study
    settings |= {"pipeline": pipeline_fingerprint(pipe), "defaults": pipe.default_sampling(), "noise": NOISE_VERSION}
    settings |= {"identities": bank_hash(IdentityBank.load(args.identities)), "recipe": args.recipe.read_text()}
    settings["real"] = {str(cache): file_hash(cache / "report.json") for cache in args.real}
    benchmarks = [args.benchmarks] if args.benchmarks.is_file() else sorted(args.benchmarks.glob("*.bin"))
    settings["benchmarks"] = {file.name: file_hash(file) for file in benchmarks}
    for file in (args.work / "settings.json", args.results):
        check_settings(file, settings)
    write_real_faces(args)
    latest = settings["defaults"]["latest_boundary"]
    actions, failed = {"generate": generate, "evaluate": evaluate, "train": train}, []
    for arm in args.arms:
        if is_finished(args, arm):
            continue
        for piece in PIECES:
            if piece not in args.pieces:
                continue
            try:
                actions[piece](args, arm)
            except TrainingFailed as error:  # one arm's training; the others go on
                failed.append(f"{arm}: {error}")
            write_json(args.results, {"settings": settings, "arms": collect(args, latest)})
    print_table(collect(args, latest))
    write_picture(args)
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    run_script(main)
