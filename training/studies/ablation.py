#!/usr/bin/env python
"""The paper's ablation at any scale, from a pipeline to a page: one bank, the same noise in every arm.

    python training/studies/ablation.py --identities bank.safetensors --real cache/devtrain cache/celeba \
        --benchmarks bins --pairs lfw_devtest=lfw/pairsDevTest.txt celeba_bench=celeba_bench/pairs.txt \
        --encoder edgeface --judge judge --encoder-root insightface --lpips-backbone alexnet_features.safetensors \
        --faces 4000 20000 --fast --work runs/ablation --results docs/results.md

`--faces` are the sizes of an arm, each a study of its own. Every arm is generated, measured as `uiface evaluate` does,
and learned from: a small recognizer is trained from scratch with each of `--seeds` and verified on every test of
`--benchmarks`, which `uiface make-benchmark` made of the lists `--pairs`. These say who is on a pair.

Image n of an identity starts from the same noise in all arms. The identities are split into `--groups`, which are
measured separately: the spread of a set's figure is that over the groups. Accuracies are compared pair by pair, with
95 % intervals by a bootstrap over people and seeds. The arm `real` has as many faces of real people, who look like
nobody of the tests; `real_and_...` are trained on these and the faces of another arm. Precision, recall, KID and the
classifier test compare with real faces of yet other people. `--identity-flow` adds two arms, `--more-arms` others: a
YAML file of names and arguments of `generate_dataset`, such as `late: {boundary: 300, guidance_scale: 1.5}`.

With `--fast`, `fast.yaml` is measured first by sampling_settings.py; if its `fast` is not as good as its `exact`, the
study ends there.

Run the same command until the page is full: each piece goes on where it was stopped, and what is finished is not done
again. `--arms` and `--pieces` select a part of the work. Page, figures (JSON) and faces of all arms (JPEG) are written
to `--results` after every piece, and the page is printed at the end. Only these files have to last: an arm whose
figures are in them is not made again when `--work` is gone.
"""

import argparse
import copy
import inspect
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import sampling_settings
import yaml
from real_faces import write_real_faces
from study_results import boundaries_of, groups_of, is_finished, saved_arms, saved_results, write_results

from uiface_cli.options import expand_home, real, whole, with_hyphens
from uiface_diffusers import IdentityBank, default_checkpoint, generate_dataset
from uiface_diffusers.data.benchmarks import Benchmark, read_benchmarks
from uiface_diffusers.data.pairs import read_pairs
from uiface_diffusers.evaluation import evaluate_dataset, load_lpips
from uiface_diffusers.evaluation.paired import pair_people
from uiface_diffusers.evaluation.people import People
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.files import check_settings, read_json, write_json
from uiface_diffusers.fingerprint import files_fingerprint, model_fingerprint, pipeline_fingerprint
from uiface_diffusers.identities import bank_hash
from uiface_diffusers.loading import load_identity_flow
from uiface_diffusers.seeds import NOISE_VERSION
from uiface_diffusers.training.bench import (
    TrainingFailed,
    benchmark_fingerprint,
    recipe_settings,
    train_and_verify,
)
from uiface_diffusers.training.options import run_script

STUDIES = Path(__file__).parent
PERTURBED = {"identity_perturbation": (0.6, 1.0)}
# arm -> arguments of `generate_dataset`; `FIXED` have their boundary of `adaptive`, so that only the choice for each
# sample differs
ARMS: dict[str, dict[str, Any]] = {
    "single_guidance_1": {"boundary": None, "guidance_scale": 1.0},
    "single_guidance_2": {"boundary": None, "guidance_scale": 2.0},
    "single": {"boundary": None},
    "fixed_mean": {"injection": None},
    "fixed_median": {"injection": None},
    "adaptive": {"injection": None},
    "adaptive_self": {"injection": "self"},
    "adaptive_cross": {"injection": "cross"},
    "uiface": {},
    "single_idperturb": {"boundary": None, **PERTURBED},
    "uiface_idperturb": PERTURBED,
}
FIXED = ("fixed_mean", "fixed_median")
# with --identity-flow, which takes the place of the name
FLOWS: dict[str, dict[str, Any]] = {"single_flow": {"boundary": None}, "uiface_flow": {}}
# trained on the arm `real` and another one
MIXED = {"real_and_single": "single", "real_and_uiface": "uiface"}
PIECES = ("generate", "evaluate", "train")
REFERENCES = "references"
# of --settings: what has to be as good as what
AS_GOOD = {"fast": "exact", "fast-single": "exact-single"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default=str(default_checkpoint()), help="folder or Hub repository")
    parser.add_argument("--identities", type=Path, required=True, help="bank of synthetic identities")
    parser.add_argument("--real", type=Path, nargs="+", required=True, help="caches of `uiface prepare`")
    parser.add_argument("--benchmarks", type=Path, required=True, help="InsightFace .bin files of other people")
    parser.add_argument("--pairs", nargs="+", required=True, metavar="NAME=FILE", help="the list of each benchmark")
    parser.add_argument("--encoder", required=True, help="model pack of the bank")
    parser.add_argument("--judge", required=True, help="model pack that the pipeline was not trained with")
    parser.add_argument("--encoder-root", default="~/.insightface")
    parser.add_argument("--lpips-backbone", help="AlexNet's convolutions; torchvision downloads them if not given")
    parser.add_argument("--work", type=Path, required=True, help="folder of the faces, reports and recognizers")
    parser.add_argument("--results", type=Path, help="the page, .md (default: results.md in --work)")
    parser.add_argument("--faces", type=whole(), nargs="+", default=[4000], help="of an arm; several: several studies")
    parser.add_argument("--images-per-identity", type=whole(), default=20)
    parser.add_argument("--groups", type=whole(), default=5, help="of identities, for the spread")
    parser.add_argument("--fast", action="store_true", help="generate by `fast` of --settings, and measure it first")
    parser.add_argument("--settings", type=Path, default=STUDIES / "fast.yaml", help="YAML file of `exact` and `fast`")
    parser.add_argument("--seeds", type=whole(0), nargs="+", default=[0, 1, 2], help="of the recognizers")
    recipe = STUDIES.parent / "configs" / "fr_study.yaml"
    parser.add_argument("--recipe", type=Path, default=recipe, help="of them")
    text = "in real_and_...: how often a real face is drawn, relative to a generated one"
    parser.add_argument("--real-weight", type=real(0), default=1.0, help=text)
    text = "cosine to a benchmark's face from which a real person is left out"
    parser.add_argument("--same-person", type=real(-1, 1), default=0.5, help=text)
    parser.add_argument("--identity-flow", help="folder or Hub repository, for the arms single_flow and uiface_flow")
    parser.add_argument("--more-arms", type=Path, help="YAML file: name -> arguments of `generate_dataset`")
    parser.add_argument("--arms", nargs="+", help="only these (default: all)")
    parser.add_argument("--pieces", nargs="+", choices=PIECES, default=PIECES)
    args = parser.parse_args(with_hyphens(expand_home(argv)))
    args.results = args.results or args.work / "results.md"
    for faces in args.faces:
        if faces % (args.images_per_identity * args.groups):
            parser.error(
                f"--faces {faces} cannot be split into {args.groups} equal groups of identities with"
                f" {args.images_per_identity} images each"
            )
    args.generated = {name: dict(arm) for name, arm in (ARMS | (FLOWS if args.identity_flow else {})).items()}
    more = yaml.safe_load(args.more_arms.read_text()) if args.more_arms else {}
    if not isinstance(more, dict) or any(not isinstance(arm, dict | None) for arm in more.values()):
        parser.error(f"--more-arms {args.more_arms} has to map names of arms to arguments of `generate_dataset`")
    taken = sorted(more.keys() & {*args.generated, *MIXED, "real", REFERENCES})
    if taken:
        parser.error(f"--more-arms {args.more_arms} has {taken[0]}, which is an arm already: choose another name")
    args.generated |= {name: arm or {} for name, arm in more.items()}
    known = [*args.generated, "real", *MIXED]
    unknown = sorted(set(args.arms or ()) - set(known))
    if unknown:
        parser.error(f"--arms: {unknown[0]} is none of {', '.join(known)}")
    args.all_arms, args.arms, args.mixed = known, args.arms or known, MIXED
    return args


def read_tests(args: argparse.Namespace) -> tuple[list[Benchmark], dict[str, np.ndarray]]:
    """The benchmarks, and by their names who is on each pair.

    Raises:
        ValueError: a benchmark has no list, or another one.
    """
    benchmarks = read_benchmarks(args.benchmarks)
    lists = {name: file for name, _, file in (word.partition("=") for word in args.pairs)}
    names = {benchmark.name for benchmark in benchmarks}
    if lists.keys() != names:
        raise ValueError(
            f"{args.benchmarks} has {', '.join(sorted(names))}, --pairs {', '.join(sorted(lists))}: give the list of"
            " each as NAME=FILE."
        )
    people = {}
    for benchmark in benchmarks:
        pairs = read_pairs(lists[benchmark.name])
        if [pair.same for pair in pairs] != benchmark.same.tolist():
            raise ValueError(f"{lists[benchmark.name]} is not the list of pairs that {benchmark.name} was made of.")
        people[benchmark.name] = pair_people(pairs)
    return benchmarks, people


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of all arms, and the scheduler."""
    settings = yaml.safe_load(args.settings.read_text())
    missing = [name for name in (*AS_GOOD, *AS_GOOD.values()) if name not in settings]
    if missing:
        raise ValueError(f"{args.settings} has no setting `{missing[0]}`.")
    return dict(settings["fast" if args.fast else "exact"] or {})


def check_fast(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measures `fast` beside `exact`, once.

    Returns:
        The figures of each setting.

    Raises:
        ValueError: they are not as good.
    """
    output, people = args.work / "settings", People(args.real[:1]).bank
    number = min(100, len(set(people.names)), len(people) // 4)
    words = {"pipeline": args.pipeline, "people": args.real[0], "judge": args.judge, "encoder-root": args.encoder_root}
    words |= {"num-people": number, "output": output}
    words |= {"lpips-backbone": args.lpips_backbone} if args.lpips_backbone else {}
    sampling_settings.main([str(args.settings), *(str(part) for k, v in words.items() for part in (f"--{k}", v))])
    figures = {name: row["figures"] for name, row in read_json(output / "settings.json").items()}
    wrong = [text for fast, exact in AS_GOOD.items() for text in sampling_settings.differing(figures, fast, exact)]
    if wrong:
        raise ValueError(f"--fast is not as good as exact ({'; '.join(wrong)}): leave it out, or change --settings.")
    return figures


def generate(args: argparse.Namespace, arm: str) -> None:
    if arm == "real":
        return  # written before everything else
    if arm in MIXED:
        return generate(args, MIXED[arm])
    pipe = sampling_settings.make_pipeline(args, setting := sampling_of(args))
    arguments = setting | args.generated[arm]
    if arm in FIXED:
        generate(args, "adaptive")
        boundaries = boundaries_of(groups_of(args, "adaptive"))
        pipe.scheduler.set_timesteps(setting["num_inference_steps"])
        wanted = statistics.mean(boundaries) if arm == "fixed_mean" else statistics.median(boundaries)
        # a step of the sampler: any other number is the next lower step
        arguments["boundary"] = min((int(t) for t in pipe.scheduler.timesteps), key=lambda t: abs(t - wanted))
    if arm in FLOWS:
        arguments["identity_flow"] = load_identity_flow(args.identity_flow)
    bank, size = IdentityBank.load(args.identities), args.num_identities // args.groups
    for group, output in enumerate(groups_of(args, arm)):
        identities = bank.take(range(group * size, (group + 1) * size))
        generate_dataset(pipe, identities, output, args.images_per_identity, **arguments)


def evaluate(args: argparse.Namespace, arm: str) -> None:
    if arm in MIXED:
        return  # its parts are measured
    encoder, judge = (FaceEncoder(name, args.encoder_root, det_size=160) for name in (args.encoder, args.judge))
    perceptual = load_lpips("alex", args.lpips_backbone)
    for folder in groups_of(args, arm):
        evaluate_dataset(
            folder,
            folder.with_name(f"evaluation-{folder.name}"),
            encoder,
            judge=judge,
            identities=None if arm == "real" else IdentityBank.load(folder / "identities.safetensors"),
            real=args.folder / REFERENCES,
            perceptual=perceptual,
        )


def train(args: argparse.Namespace, arm: str) -> None:
    parts = ("real", MIXED[arm]) if arm in MIXED else (arm,)
    sets = [folder for part in parts for folder in groups_of(args, part)]
    weights = [args.real_weight if part == "real" else 1.0 for part in parts for _ in range(args.groups)]
    trained = saved_arms(args).get(arm, {}).get("recognizers", {})
    for seed in args.seeds:
        if str(seed) not in trained:
            folder = args.folder / arm / f"recognizer-{seed}"
            train_and_verify(args.recipe, sets, folder, seed, args.tests, weights if arm in MIXED else None)


def begin(args: argparse.Namespace) -> None:
    """Checks all that is given before the long work, and refuses to go on with another study's figures."""
    fixed = ("groups", "images_per_identity", "encoder", "judge", "same_person", "real_weight")
    settings: dict[str, Any] = {name: getattr(args, name) for name in fixed}
    setting = sampling_of(args)
    settings["sampling"] = dict(setting)
    pipe = sampling_settings.make_pipeline(args, setting)
    bank = IdentityBank.load(args.identities)
    # what the figures come from: another checkpoint at the same place is another study
    settings |= {"pipeline": pipeline_fingerprint(pipe), "defaults": pipe.default_sampling(), "noise": NOISE_VERSION}
    settings |= {"identities": bank_hash(bank), "recipe": recipe_settings(args.recipe, args.work)}
    settings["real"] = {str(cache): files_fingerprint(cache / "report.json") for cache in args.real}
    args.tests, args.people = read_tests(args)
    settings["benchmarks"] = {each.name: benchmark_fingerprint(each) for each in args.tests}
    needed = max(args.faces) // args.images_per_identity
    if len(bank) < needed:
        raise ValueError(f"{args.identities} has {len(bank)} identities, {needed} are asked for.")
    embeds = pipe.prepare_identity_embeds(bank.one_per_row())
    own = inspect.signature(generate_dataset).parameters
    for arguments in args.generated.values():
        pipe.check_sampling(embeds, **{k: v for k, v in (setting | arguments).items() if k not in own})
    args.latest_boundary = settings["defaults"]["latest_boundary"]
    given = json.loads(json.dumps(args.generated))
    for arm in FLOWS if args.identity_flow else ():
        given[arm]["identity_flow"] = model_fingerprint(load_identity_flow(args.identity_flow))
    for file in (args.work / "settings.json", args.results.with_suffix(".json")):
        check_settings(file, settings)
    saved = saved_results(args)
    for arm, arguments in saved.get("arms", {}).items():
        if given.get(arm, arguments) != arguments:
            raise ValueError(f"{args.results} has the arm {arm} with {arguments}: choose other --results and --work.")
    measured = {"sampling": check_fast(args)} if args.fast and "sampling" not in saved else {}
    write_json(args.results.with_suffix(".json"), saved | {"arms": saved.get("arms", {}) | given} | measured)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    begin(args)
    studies, failed = [], []
    for size in args.faces:
        study = copy.copy(args)
        study.size, study.folder = size, args.work / str(size)
        study.num_identities = size // args.images_per_identity
        studies.append(study)
        write_real_faces(study, groups_of(study, "real"), study.folder / REFERENCES)
    actions = {"generate": generate, "evaluate": evaluate, "train": train}
    for study in studies:
        for arm in args.arms:
            if is_finished(study, arm):
                continue
            for piece in [piece for piece in PIECES if piece in args.pieces]:
                try:
                    actions[piece](study, arm)
                except TrainingFailed as error:  # one arm's training; the others go on
                    failed.append(f"{arm}: {error}")
                write_results(args, studies)
    print(write_results(args, studies))
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    run_script(main)
