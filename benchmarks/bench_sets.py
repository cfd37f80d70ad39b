#!/usr/bin/env python
"""Runs `uiface bench` on real and generated sets, kills it twice, and compares it with uninterrupted trainings.

    uiface make-benchmark --pairs lfw/pairsDevTest.txt --images lfw/images --output benchmarks/lfw_devtest.bin
    OMP_NUM_THREADS=2 python benchmarks/bench_sets.py celeba=celeba_112 lfw=cache/devtrain --benchmarks bins \
        --work runs/bench

The generated sets are of the embedded checkpoint: the same people and noise, in two stages and in a single one. The
bench is killed by SIGKILL within its first training, at the first checkpoint, and within the second set's training
with the second seed, at the second checkpoint. Then it goes on to the end. These two trainings are done again without
a kill, with `--whole` the whole bench: weights, accuracies and rows have to be the same. Run the same command to
continue; half an hour on two idle cores, without `--whole`.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from killed import run_until_complete

FAST = ("--scheduler", "UniPCMultistepScheduler", "--num-inference-steps", "10")
GENERATED = {"two_stages": ("--reuse-empty-branch", "2"), "single_stage": ("--boundary", "none")}
# of a training, byte for byte
COMPARED = ("model.safetensors", "train_results.json", "verification.json")


def uiface(*words: str) -> None:
    """Runs a command in a process of its own."""
    subprocess.run([sys.executable, "-m", "uiface_diffusers.cli", *words], check=True)


def generate(args: argparse.Namespace) -> list[str]:
    """The generated sets, as the bench takes them."""
    size = ("--max-identities", str(args.identities), "--images-per-identity", str(args.images))
    for name, options in GENERATED.items():
        uiface("generate", *size, *FAST, *options, "--output", str(args.work / name))
    return [f"{name}={args.work / name}" for name in GENERATED]


def bench_words(args: argparse.Namespace, sets: list[str], seeds: list[int], output: str) -> list[str]:
    words = ["bench", *sets, "--recipe", str(args.recipe), "--benchmarks", str(args.benchmarks)]
    return [*words, "--seeds", *map(str, seeds), "--output", str(args.work / output)]


def run_killed(args: argparse.Namespace, sets: list[str]) -> None:
    """The bench to its end, with two kills on the way that are not done again by a second call."""
    words, steps = bench_words(args, sets, args.seeds, "bench"), yaml.safe_load(args.recipe.read_text())
    every = steps["checkpointing-steps"]
    # the training that was killed first has its first checkpoint already, and none of the others
    kills = ((f"checkpoint-{every}", 1), (f"checkpoint-{2 * every}", len(sets) + 2))
    for place, (checkpoint, number) in enumerate(kills, start=1):
        done = args.work / f"killed-{place}"
        if not done.exists():
            run_until_complete(words, checkpoint, number)
            done.touch()
            print(f"killed when {checkpoint} was complete for the {number}. time", flush=True)
    uiface(*words)


def compare(args: argparse.Namespace, sets: list[str]) -> list[str]:
    """What differs from uninterrupted trainings."""
    output, trainings = "uninterrupted", [(sets[0], args.seeds[0]), (sets[1], args.seeds[1])]
    different = []
    if args.whole:
        uiface(*bench_words(args, sets, args.seeds, output))
        trainings = [(each, seed) for each in sets for seed in args.seeds]
        files = [args.work / folder / "bench.json" for folder in ("bench", output)]
        different += ["bench.json"] if files[0].read_bytes() != files[1].read_bytes() else []
    table = json.loads((args.work / "bench" / "bench.json").read_text())["sets"]
    for each, seed in trainings:
        if not args.whole:
            uiface(*bench_words(args, [each], [seed], output))
        name = each.partition("=")[0]
        row = json.loads((args.work / output / "bench.json").read_text())["sets"][name]
        folders = [args.work / folder / name / f"seed-{seed}" for folder in ("bench", output)]
        for file in COMPARED:
            if len({(folder / file).read_bytes() for folder in folders}) > 1:
                different.append(f"{name}/seed-{seed}/{file}")
        if any(table[name][key][str(seed)] != row[key][str(seed)] for key in ("accuracy", "learned")):
            different.append(f"the row of {name}, seed {seed}")
        print(f"{name} with seed {seed}: compared with the uninterrupted training", flush=True)
    return different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="NAME=PATH", help="real sets of aligned faces")
    parser.add_argument("--benchmarks", type=Path, required=True, help="folder of .bin files")
    parser.add_argument("--work", type=Path, required=True, help="folder of the generated sets and the benches")
    parser.add_argument("--recipe", type=Path, default=ROOT / "training" / "configs" / "fr_quick.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--identities", type=int, default=150, help="of the generated sets (default: %(default)s)")
    parser.add_argument("--images", type=int, default=10, help="of each of them (default: %(default)s)")
    parser.add_argument("--whole", action="store_true", help="do the whole bench without a kill, too")
    args = parser.parse_args()
    if len(args.seeds) < 2:
        parser.error("--seeds needs two seeds: the second kill is within the second one")
    args.work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    sets = [*args.sets, *generate(args)]
    print(f"sets generated after {time.monotonic() - started:.0f} s", flush=True)
    run_killed(args, sets)
    print(f"bench complete after {time.monotonic() - started:.0f} s", flush=True)
    different = compare(args, sets)
    print((args.work / "bench" / "bench.md").read_text())
    print(f"equal to the uninterrupted: {'no: ' + ', '.join(different) if different else 'yes'}")
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
