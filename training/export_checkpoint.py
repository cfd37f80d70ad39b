#!/usr/bin/env python
"""Makes a checkpoint to ship of a trained pipeline: half precision, safetensors, and a bank of synthetic identities.

    python training/export_checkpoint.py runs/uiface-lfw-128 --faces cache/devtrain cache/celeba \\
        --output uiface_diffusers/checkpoints/uiface-lfw-128

The identities are drawn from the distribution of the training embeddings; none is nearer than `--max_similarity` to a
training face or to another one.
"""

import argparse
from pathlib import Path

import torch

from uiface_diffusers import IdentityBank, UIFacePipeline, sample_identities
from uiface_diffusers.data import FaceCache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="a pipeline that training/train.py saved")
    parser.add_argument("--faces", nargs="+", required=True, help="caches that it was trained on")
    parser.add_argument("--num_identities", type=int, default=200)
    parser.add_argument("--max_similarity", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    banks = [FaceCache(folder).embeddings() for folder in args.faces]
    known = IdentityBank(torch.cat([bank.embeddings for bank in banks]), banks[0].identity_encoder)
    identities = sample_identities(known, args.num_identities, args.max_similarity, args.seed)
    pipeline = UIFacePipeline.from_pretrained(args.pipeline).to(torch.float16)
    pipeline.save_pretrained(args.output)
    identities.save(args.output / "identities.safetensors")
    size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    nearest = (identities.embeddings @ known.embeddings.T).max().item()
    print(f"{args.output}: {size / 2**20:.1f} MiB, {len(identities)} identities; nearest training face {nearest:.3f}")


if __name__ == "__main__":
    main()
