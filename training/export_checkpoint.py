#!/usr/bin/env python
"""Makes a checkpoint to ship of a trained pipeline: half precision, safetensors, and a bank of synthetic identities.

    uiface identities make runs/uiface --number 200 --exclude cache/devtrain cache/celeba --encoder edgeface \\
        --output bank.safetensors
    python training/export_checkpoint.py runs/uiface --faces cache/devtrain cache/celeba \\
        --identities bank.safetensors --defaults '{"latest_boundary": 700}' \\
        --output uiface_diffusers/checkpoints/uiface-lfw-128

None of the identities is nearer than `--max-similarity` to a training face or to another one; without `--identities`
they are drawn from the distribution of the training embeddings. `--defaults` are the saved
pipeline's defaults for the arguments of its call. `--identity-encoder runs/encoder` adds what
`training/distill_encoder.py` saved: a copy of the encoder that the training's faces were embedded by.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from uiface_cli.options import expand_home, json_object, real, whole, with_hyphens
from uiface_diffusers import IdentityBank, UIFacePipeline, sample_identities
from uiface_diffusers.encoders import CARRIED_FILES, IDENTITY_ENCODER, check_same_encoder, projector_mark
from uiface_diffusers.evaluation.people import People
from uiface_diffusers.faces import teacher_mark
from uiface_diffusers.files import write_json
from uiface_diffusers.identities import IDENTITIES, keep_distinct, largest_cosines
from uiface_diffusers.training.options import run_script


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="a pipeline that training/train.py saved")
    parser.add_argument("--faces", nargs="+", required=True, help="caches that it was trained on")
    parser.add_argument("--identities", type=Path, help="bank of `uiface identities make`")
    parser.add_argument("--identity-encoder", type=Path, help="copy of the encoder, of training/distill_encoder.py")
    parser.add_argument("--num-identities", type=whole(), default=200)
    parser.add_argument("--max-similarity", type=real(-1, 1), default=0.3)
    parser.add_argument("--defaults", type=json_object, default={}, help="arguments of the pipeline's call, as JSON")
    parser.add_argument("--seed", type=whole(0), default=0, help="of identities that are drawn")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args(with_hyphens(expand_home(argv)))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    known = People(args.faces).bank
    pipeline = UIFacePipeline.from_pretrained(args.pipeline)
    faces = " ".join(args.faces)
    check_same_encoder(faces, known.encoder_mark, args.pipeline, projector_mark(pipeline.identity_projector))
    if args.identity_encoder is not None:
        teacher = teacher_mark(args.identity_encoder)
        check_same_encoder(f"{args.identity_encoder} is a copy, which", teacher, faces, known.encoder_mark)
    pipeline = UIFacePipeline(**pipeline.components, **(pipeline.default_sampling() | args.defaults))
    if args.identities is None:
        identities = sample_identities(known, args.num_identities, args.max_similarity, args.seed)
    else:
        identities, report = keep_distinct(
            IdentityBank.load(args.identities), [known], args.max_similarity, args.num_identities
        )
        if len(identities) < args.num_identities:
            raise ValueError(f"{args.identities} gives fewer than {args.num_identities} identities: {report}.")
    pipeline.to(torch.float16).save_pretrained(args.output)
    for file in args.output.rglob("*.json"):  # a path on the machine that trained it
        content = json.loads(file.read_text())
        if content.pop("_name_or_path", None) is not None:
            write_json(file, content)
    progress = Path(args.pipeline) / "progress.json"
    if progress.exists():
        shutil.copy(progress, args.output)
    identities.save(args.output / IDENTITIES)
    if args.identity_encoder is not None:
        (args.output / IDENTITY_ENCODER).mkdir(exist_ok=True)
        for name in CARRIED_FILES:
            shutil.copyfile(args.identity_encoder / name, args.output / IDENTITY_ENCODER / name)
    size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    nearest = largest_cosines(identities.embeddings, known.embeddings)[0].max().item()
    print(f"{args.output}: {size / 2**20:.1f} MiB, {len(identities)} identities; nearest training face {nearest:.3f}")


if __name__ == "__main__":
    run_script(main)
