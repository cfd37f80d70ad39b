#!/usr/bin/env python
"""Images a second of a training step in several settings, side by side in one process.

    python benchmarks/training.py --encoder-root models              the recipe of the embedded checkpoint, in float32
    python benchmarks/training.py --settings float32 bf16 compile    without its identity loss
    python benchmarks/training.py --device cuda --precision bf16 --batch-sizes 64 512 1024 --decoded-samples 64
                                                                     a table of rates; with --encoder-root also with
                                                                     the identity loss, on 64 faces per batch
    python benchmarks/training.py --device cuda --batch-sizes 512 --recognizer '{"layers": 50}'
                                                                     of the recognizer instead, with ArcFace

A step is `training/train.py`'s: forward, backward, clipping, fused AdamW, EMA, on cached latents. The first setting is
what the others are compared with. `first stage` keeps the first stage of the identity loss in channels_last. The
arithmetic of the step over the rate of a matrix product says how far float32 is from what the machine can do. Random
latents and identities. Prints a table, and JSON with the machine.
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from machine import (
    Roofline,
    Table,
    add_device_arguments,
    describe_device,
    describe_machine,
    peak_gib,
    synchronize,
    use_precision,
)
from torch.utils.flop_counter import FlopCounterMode

from uiface_diffusers import (
    EmptyContext,
    IdentityProjector,
    IResNetConfig,
    IResNetModel,
    UIFacePipeline,
    UIFaceUNet2DModel,
    default_checkpoint,
)
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.models.margin_heads import ArcFaceHead
from uiface_diffusers.training.denoising import ConditionalDenoiser, denoising_loss, face_losses
from uiface_diffusers.training.recognition import FaceClassifier

SETTINGS = ("float32", "first stage", "channels_last", "bf16", "compile")


class Step:
    """The training step in one setting, with weights, optimizer and EMA of its own."""

    def __init__(
        self,
        args: argparse.Namespace,
        batch_size: int,
        precision: str = "float32",
        compiled: bool = False,
        denoiser_format: torch.memory_format = torch.contiguous_format,
        vae_format: torch.memory_format = torch.contiguous_format,
        decoded_samples: int = 0,
    ):
        pipe = UIFacePipeline.from_pretrained(args.model, dtype=torch.float32)
        self.device, self.decoded_samples = args.device, decoded_samples
        self.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.vae = pipe.vae.requires_grad_(False).to(self.device, memory_format=vae_format)
        parts = (pipe.unet, pipe.identity_projector, pipe.empty_context)
        identity_dim = pipe.identity_projector.config.identity_dim
        if args.unet is not None:
            shape = {name: pipe.unet.config[name] for name in ("sample_size", "in_channels", "out_channels")}
            unet = UIFaceUNet2DModel(**shape | args.unet)
            context_dim = unet.config.cross_attention_dim
            parts = (unet, IdentityProjector(identity_dim, context_dim), EmptyContext(context_dim))
        self.denoiser = ConditionalDenoiser(*parts).train().requires_grad_(True)
        self.denoiser.to(self.device, memory_format=denoiser_format)
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        self.recognizer = None
        if decoded_samples:
            encoder = FaceEncoder(pipe.identity_projector.config.identity_encoder, args.encoder_root, det_size=160)
            self.recognizer = encoder.to_torch().to(self.device)
        self.model = torch.compile(self.denoiser) if compiled else self.denoiser
        self.parameters = list(self.denoiser.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=True)
        self.ema = EMAModel(self.parameters, decay=0.9999, use_ema_warmup=True, power=0.75, foreach=True)
        side, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
        generator = torch.Generator().manual_seed(args.seed)
        self.latents = torch.randn(batch_size, 2, channels, side, side, generator=generator).to(self.device)
        self.embeds = F.normalize(torch.randn(batch_size, identity_dim, generator=generator)).to(self.device)

    def __call__(self) -> None:
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            loss = denoising_loss(self.model, self.scheduler, self.latents, self.embeds, 0.2, None)
        objective = loss.losses.mean()
        if self.recognizer is not None:
            faces = face_losses(self.vae, self.recognizer, None, loss, self.embeds, self.decoded_samples)
            objective = objective + 0.3 * (1 - faces.cosines).mean()
        objective.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.parameters)


class RecognizerStep:
    """The step of `training/train_face_recognition.py`: ArcFace on 10,000 identities, SGD."""

    def __init__(self, args: argparse.Namespace, batch_size: int, precision: str, compiled: bool = False):
        self.device = args.device
        self.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        recognizer = IResNetModel(IResNetConfig(**args.recognizer))
        config = recognizer.config
        self.classifier = FaceClassifier(recognizer, ArcFaceHead(config.embedding_dim, 10_000)).train()
        self.classifier.to(self.device, memory_format=torch.channels_last)
        self.denoiser = self.classifier
        self.model = torch.compile(self.classifier) if compiled else self.classifier
        self.optimizer = torch.optim.SGD(self.classifier.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
        generator = torch.Generator().manual_seed(args.seed)
        pixels = torch.randn(batch_size, 3, config.image_size, config.image_size, generator=generator)
        self.pixels = pixels.to(self.device, memory_format=torch.channels_last)
        self.labels = torch.randint(10_000, (batch_size,), generator=generator).to(self.device)

    def __call__(self) -> None:
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            logits = self.model(self.pixels, self.labels)
        F.cross_entropy(logits.float(), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def step_of(setting: str, args: argparse.Namespace) -> Step:
    """The step in one of `SETTINGS`."""
    formats = {}
    if setting in ("first stage", "channels_last"):
        formats["vae_format"] = torch.channels_last
    if setting == "channels_last":
        formats["denoiser_format"] = torch.channels_last
    decoded = args.decoded_samples if args.encoder_root is not None else 0
    precision = "bf16" if setting == "bf16" else "float32"
    return Step(args, args.batch_size, precision, setting == "compile", **formats, decoded_samples=decoded)


def rates(args: argparse.Namespace) -> None:
    """Images per second over precisions, batches, with and without the identity loss, compiled and not."""
    machine = describe_device(args.device, args.precision)
    print(json.dumps(machine), flush=True)
    table = Table(args, machine=machine)

    def measure(make, precision: str, batch_size: int, compiled: bool) -> dict:
        step = make()
        step()
        counted, step.model = step.model, step.denoiser  # a compiled model's operators cannot be counted
        with Roofline(machine, precision) as roofline:
            step()
        step.model = counted
        peak_gib()
        synchronize()
        started = time.perf_counter()
        for _ in range(3):
            step()  # compiles
        synchronize()
        warm_up = time.perf_counter() - started
        launching, started = 0.0, time.perf_counter()
        for _ in range(args.rounds):
            before = time.perf_counter()
            step()
            launching += time.perf_counter() - before
        synchronize()
        seconds = (time.perf_counter() - started) / args.rounds
        return {
            "images/s": batch_size / seconds,
            "ms": 1e3 * seconds,
            "launching, ms": 1e3 * launching / args.rounds,
            "share of the roofline": roofline.seconds / seconds,
            "share of matmul": roofline.flops / seconds / roofline.flops_per_second,
            "GFLOP/image": roofline.flops / batch_size / 1e9,
            "warm-up, s": warm_up if compiled else None,
            "GiB": peak_gib(),
        }

    decoded_samples = [0] if args.encoder_root is None or args.recognizer else [0, args.decoded_samples]
    for precision in args.precision:
        use_precision(precision)
        for batch_size in args.batch_sizes:
            for compiled in (False, True) if args.compile else (False,):
                for decoded in decoded_samples:
                    torch.manual_seed(args.seed)
                    row = {"model": args.recognizer or args.unet or Path(args.model).name, "precision": precision}
                    row |= {"batch": batch_size, "compiled": compiled, "decoded": decoded}

                    def make(precision=precision, batch_size=batch_size, compiled=compiled, decoded=decoded):
                        if args.recognizer is not None:
                            return RecognizerStep(args, batch_size, precision, compiled)
                        layout = torch.channels_last if args.channels_last else torch.contiguous_format
                        formats = {"denoiser_format": layout, "vae_format": torch.channels_last}
                        return Step(args, batch_size, precision, compiled, **formats, decoded_samples=decoded)

                    table.measure(
                        lambda make=make, of=(precision, batch_size, compiled): measure(make, *of),
                        **row,
                    )
                    torch._dynamo.reset()


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
    parser.add_argument("--unet", type=json.loads, help="UIFaceUNet2DModel options as JSON: random weights instead")
    add_device_arguments(parser)
    parser.add_argument("--compile", action="store_true", help="of the table of rates: compiled, too")
    parser.add_argument("--channels-last", action="store_true", help="of the table of rates: the denoiser")
    parser.add_argument("--recognizer", type=json.loads, help="of the table of rates: IResNetConfig options as JSON")
    args = parser.parse_args()
    if args.batch_sizes is not None:
        rates(args)
        return
    steps = {setting: step_of(setting, args) for setting in args.settings}
    torch.manual_seed(args.seed)
    for step in steps.values():
        step()  # compiles, makes the optimizer's state
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
    print(json.dumps(result, default=str))


if __name__ == "__main__":
    main()
