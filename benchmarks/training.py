#!/usr/bin/env python
"""Images a second of a training step in several settings, side by side in one process.

    python benchmarks/training.py --encoder-root models              the recipe of the embedded checkpoint, in float32
    python benchmarks/training.py --settings float32 bf16 compile    without its identity loss

A step is `training/train.py`'s: forward, backward, clipping, fused AdamW, EMA, on cached latents. The first setting is
what the others are compared with. `first stage` keeps the first stage of the identity loss in channels_last. The
arithmetic of the step over the rate of a matrix product says how far float32 is from what the machine can do. Random
latents and identities. Prints a table, and JSON with the machine.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from machine import describe_machine
from torch.utils.flop_counter import FlopCounterMode

from uiface_diffusers import UIFacePipeline, default_checkpoint
from uiface_diffusers.faces import FaceEncoder

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from train import ConditionalDenoiser, denoising_loss, face_losses  # noqa: E402

SETTINGS = ("float32", "first stage", "channels_last", "bf16", "compile")


class Step:
    """The training step in one setting, with weights, optimiser and EMA of its own."""

    def __init__(self, setting: str, args: argparse.Namespace):
        pipe = UIFacePipeline.from_pretrained(args.model, dtype=torch.float32)
        self.setting, self.args, self.vae = setting, args, pipe.vae.requires_grad_(False)
        self.denoiser = ConditionalDenoiser(pipe.unet, pipe.identity_projector, pipe.empty_context)
        self.denoiser.train().requires_grad_(True)
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        self.recognizer = None
        if args.encoder_root is not None:
            encoder = FaceEncoder(pipe.identity_projector.config.identity_encoder, args.encoder_root, det_size=160)
            self.recognizer = encoder.to_torch()
        if setting == "first stage":
            self.vae.to(memory_format=torch.channels_last)
        if setting == "channels_last":
            self.denoiser.to(memory_format=torch.channels_last)
            self.vae.to(memory_format=torch.channels_last)
        self.model = torch.compile(self.denoiser) if setting == "compile" else self.denoiser
        self.parameters = list(self.denoiser.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=True)
        self.ema = EMAModel(self.parameters, decay=0.9999, use_ema_warmup=True, power=0.75, foreach=True)
        side, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
        generator = torch.Generator().manual_seed(args.seed)
        self.latents = torch.randn(args.batch_size, 2, channels, side, side, generator=generator)
        identity_dim = pipe.identity_projector.config.identity_dim
        self.embeds = F.normalize(torch.randn(args.batch_size, identity_dim, generator=generator))

    def __call__(self) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.setting == "bf16"):
            loss = denoising_loss(self.model, self.scheduler, self.latents, self.embeds, 0.2, None)
        objective = loss.losses.mean()
        if self.recognizer is not None:
            faces = face_losses(self.vae, self.recognizer, None, loss, self.embeds, self.args.decoded_samples)
            objective = objective + 0.3 * (1 - faces.cosines).mean()
        objective.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.parameters)


def page_faults() -> int:
    """Of this process so far: memory that glibc gave back to the kernel and took again costs one every 4 KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(default_checkpoint()))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["float32", "first stage"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--encoder-root", help="folder with models/PACK of the checkpoint's encoder: identity loss")
    parser.add_argument("--decoded-samples", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    steps = {setting: Step(setting, args) for setting in args.settings}
    torch.manual_seed(args.seed)
    for step in steps.values():
        step()  # compiles, makes the optimiser's state
        step()
    with FlopCounterMode(display=False) as counter:
        steps[args.settings[0]]()
    seconds, faults = {setting: [] for setting in steps}, {setting: [] for setting in steps}
    for _ in range(args.rounds):
        for setting, step in steps.items():
            before, started = page_faults(), time.perf_counter()
            step()
            seconds[setting].append(time.perf_counter() - started)
            faults[setting].append(page_faults() - before)
    machine = describe_machine()
    medians = {setting: statistics.median(values) for setting, values in seconds.items()}
    first = medians[args.settings[0]]
    for setting, median in medians.items():
        rate = args.batch_size / median
        print(
            f"{setting:>14}: {median:6.3f} s a step, {rate:6.1f} images/s, {first / median:5.2f} x {args.settings[0]},"
            f" {statistics.median(faults[setting]):.0f} page faults"
        )
    gflop = counter.get_total_flops() / 1e9
    floor = gflop / machine["matmul GFLOP/s"]["float32"]
    print(f"arithmetic: {gflop:.0f} GFLOP a step, {floor:.3f} s at the rate of a float32 matrix product")
    result = {"settings": vars(args), "machine": machine, "seconds": seconds, "faults": faults}
    result |= {"GFLOP": gflop, "floor": floor}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
