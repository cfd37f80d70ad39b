#!/usr/bin/env python
"""What data set generation promises, measured with a real checkpoint (the embedded one if none is named):

    python benchmarks/generation.py arrangements   the same images by batches of 1, 7, 16, two processes, shards
    python benchmarks/generation.py kills          SIGKILL at random moments and restart, against the first of those
    python benchmarks/generation.py overhead       everything beside the pipeline's calls, batches of 16
    python benchmarks/generation.py filter         200,000 candidate identities against 200,000 known ones
    python benchmarks/generation.py rates --device cuda --precision float32 bf16 --batch-sizes 16 256
                                                   images per second by precision, batch and format of the files

The first two leave their folders in `--work` and go on there. On a GPU, float32 is not rounded to TF32 in them.
"""

import argparse
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet
import torch
import torch.nn.functional as F
from machine import Table, add_device_arguments, median_seconds, peak_gib, use_precision

from uiface_diffusers import IdentityBank, UIFacePipeline, default_checkpoint, generate_dataset
from uiface_diffusers.data.image_folder import encode_image
from uiface_diffusers.identities import IDENTITIES, DistinctIdentities
from uiface_diffusers.seeds import image_generator


def generate_command(args: argparse.Namespace, output: Path, *options: str, processes: int = 1) -> list[str]:
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launch, "-m", "uiface_diffusers.cli", "generate", str(args.model), "--output", str(output)]
    command += ["--max-identities", str(args.identities), "--images-per-identity", str(args.images)]
    command += ["--identities", str(args.model / IDENTITIES), "--device", str(args.device)]
    return [*command, "--num-inference-steps", str(args.num_inference_steps), *options]


def environment(processes: int = 1) -> dict[str, str]:
    threads = str(max(1, os.cpu_count() // processes))
    # processes share one GPU, which accelerate would not let them
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": threads, "NVIDIA_TF32_OVERRIDE": "0"}


def run(command: list[str], processes: int = 1) -> None:
    subprocess.run(command, check=True, env=environment(processes))


def read_dataset(folder: Path) -> dict[str, tuple[np.ndarray, int]]:
    """File name -> pixels and boundary timestep."""
    rows = pyarrow.parquet.read_table(folder / "metadata.parquet").to_pylist()
    return {
        row["file_name"]: (np.array(PIL.Image.open(folder / row["file_name"])), row["boundary_timestep"])
        for row in rows
    }


def compare(name: str, expected: dict, found: dict) -> None:
    if expected.keys() != found.keys():
        print(f"{name:<24} other files: {sorted(expected.keys() ^ found.keys())[:5]}")
        return
    difference = np.stack([np.abs(expected[k][0].astype(int) - found[k][0]) for k in expected])
    boundaries = sum(expected[k][1] == found[k][1] for k in expected)
    print(
        f"{name:<24} {len(found)} files as expected; gray levels: largest difference {difference.max()},"
        f" {100 * (difference > 0).mean():.5f} % differ; boundaries equal in {boundaries}",
        flush=True,
    )


def arrangements(args: argparse.Namespace) -> None:
    run(generate_command(args, args.work / "batch-16", "--batch-size", "16"))
    expected = read_dataset(args.work / "batch-16")
    boundaries = sorted(boundary for _, boundary in expected.values())
    print(f"{len(expected)} images, boundaries from {boundaries[0]} to {boundaries[-1]}")
    for size in (1, 7):
        run(generate_command(args, args.work / f"batch-{size}", "--batch-size", str(size)))
        compare(f"batches of {size}", expected, read_dataset(args.work / f"batch-{size}"))
    run(generate_command(args, args.work / "processes", "--batch-size", "16", processes=2), processes=2)
    compare("two processes", expected, read_dataset(args.work / "processes"))
    for part in range(3):
        run(generate_command(args, args.work / "shards", "--batch-size", "16", "--shard", f"{part}/3"))
    compare("--shard 0/3, 1/3, 2/3", expected, read_dataset(args.work / "shards"))


def kills(args: argparse.Namespace) -> None:
    batch = ("--batch-size", str(args.batch_size))
    run(generate_command(args, args.work / f"batch-{args.batch_size}", *batch))
    output, moments = args.work / "killed", random.Random(args.seed)
    redone, made = [], {}
    images = lambda: {file: file.stat().st_mtime_ns for file in (output / "images").glob("*/*.png")}  # noqa: E731
    for _ in range(args.kills):
        process = subprocess.Popen(generate_command(args, output, *batch), env=environment())
        target = len(made) + moments.randint(1, args.identities * args.images // args.kills)
        while len(images()) < target and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.random() * args.kill_delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = images()
        redone.append(sum(now[file] != stamp for file, stamp in made.items()))
        made = now
        print(f"killed with {len(made)} images", flush=True)
    run(generate_command(args, output, *batch))
    redone.append(sum(images()[file] != stamp for file, stamp in made.items()))
    print(f"finished images that were written again, of each start: {redone}")
    whole = args.work / f"batch-{args.batch_size}"
    files = [sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in (whole, output)]
    same = [(whole / name).read_bytes() == (output / name).read_bytes() for name in files[0]]
    print(f"same files: {files[0] == files[1]}; of {len(same)}, {sum(same)} are equal byte for byte")
    compare("killed and resumed", read_dataset(whole), read_dataset(output))


def overhead(args: argparse.Namespace) -> None:
    """The same batches by a loop over the pipeline, which decodes and writes nothing, and by `generate_dataset`."""
    pipeline = UIFacePipeline.from_pretrained(args.model)
    pipeline.set_progress_bar_config(disable=True)
    bank = IdentityBank.load(args.model / IDENTITIES)
    bank = bank.take(range(args.identities))
    seconds = {"loop": [], "generate_dataset": []}
    keys = [(name, n) for name in bank.names for n in range(args.images)]
    for _ in range(args.rounds):
        started = time.perf_counter()
        for start in range(0, len(keys), 16):
            batch = keys[start : start + 16]
            pipeline(
                bank.take([bank.names.index(name) for name, _ in batch]),
                generator=[image_generator(args.seed, *key) for key in batch],
                num_inference_steps=args.num_inference_steps,
            )
        seconds["loop"].append(time.perf_counter() - started)
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            generate_dataset(
                pipeline,
                bank,
                folder,
                args.images,
                seed=args.seed,
                batch_size=16,
                num_inference_steps=args.num_inference_steps,
            )
            seconds["generate_dataset"].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(json.dumps(seconds))
    share = 1 - medians["loop"] / medians["generate_dataset"]
    print(
        f"{len(keys)} images: loop {medians['loop']:.1f} s, generate_dataset {medians['generate_dataset']:.1f} s:"
        f" {100 * share:.1f} % of its time are not the pipeline's"
    )


def measure_filter(args: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(args.seed)
    known, candidates = (F.normalize(torch.randn(args.filter_size, 512, generator=generator)) for _ in range(2))
    distinct = DistinctIdentities(known, max_similarity=0.3)
    started = time.perf_counter()
    distinct.add(candidates)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{distinct.report} in {seconds:.0f} s, peak memory of the process {peak:.2f} GiB")


def rates(args: argparse.Namespace) -> None:
    """`generate_dataset` by precision, batch and format, and what its writer could do alone."""
    table = Table(args)
    rng = np.random.default_rng(args.seed)
    picture = PIL.Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8))
    for image_format in args.formats:

        def write(image_format=image_format) -> None:
            for _ in range(64):
                encode_image(picture.resize((112, 112), PIL.Image.Resampling.BILINEAR), image_format)

        rate = 64 / median_seconds(write, 3)
        table.add(what="resizing and encoding alone, noise", format=image_format, **{"images/s": rate})
    bank = IdentityBank.load(args.model / IDENTITIES)
    for precision in args.precision:
        pipeline = UIFacePipeline.from_pretrained(args.model, dtype=use_precision(precision)).to(args.device)
        pipeline.set_progress_bar_config(disable=True)
        for batch_size in args.batch_sizes:

            def measure(image_format: str, pipeline=pipeline, batch_size=batch_size) -> dict:
                names = bank.take(range(min(args.identities, len(bank))))
                images = max(args.images, -(-4 * batch_size // len(names)))  # four batches or more
                pipeline(names.embeddings[:1].repeat(batch_size, 1), num_inference_steps=2)
                peak_gib()
                with tempfile.TemporaryDirectory() as folder:
                    started = time.perf_counter()
                    options = {"batch_size": batch_size, "image_format": image_format, "seed": args.seed}
                    options["num_inference_steps"] = args.num_inference_steps
                    report = generate_dataset(pipeline, names, folder, images, **options)
                    seconds = time.perf_counter() - started
                return {
                    "images": report.planned,
                    "images/s": report.images_per_second,
                    "images/s, whole call": report.planned / seconds,
                    "rows/image": report.unet_rows_per_image,
                    "GiB": peak_gib(),
                }

            for image_format in args.formats:
                row = {"precision": precision, "batch": batch_size, "format": image_format}
                table.measure(partial(measure, image_format), **row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = {"arrangements": arrangements, "kills": kills, "overhead": overhead, "filter": measure_filter}
    actions["rates"] = rates
    parser.add_argument("action", choices=actions)
    parser.add_argument("--model", type=Path, default=default_checkpoint())
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-generation"))
    parser.add_argument("--identities", type=int, default=40)
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--num-inference-steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3, help="of `overhead`")
    parser.add_argument("--batch-size", type=int, default=16, help="of `kills`")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--kill-delay", type=float, default=5.0, help="seconds, at most, after the image it waits for")
    parser.add_argument("--filter-size", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    add_device_arguments(parser)
    parser.add_argument("--formats", nargs="+", default=["jpeg", "png"], help="of `rates`")
    args = parser.parse_args()
    if args.action == "rates" and args.batch_sizes is None:
        parser.error("`rates` needs --batch-sizes")
    actions[args.action](args)


if __name__ == "__main__":
    main()
