import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from .options import device, path, real, whole
from .shared import MODEL, Commands, add_command, add_encoder_arguments, face_encoder

if TYPE_CHECKING:
    from uiface_diffusers.two_stage.dial import Dial

# of `uiface_diffusers.evaluation.calibration.calibrate`; a test compares
GUIDANCE_SCALES = (1.5, 3.0)
LATEST_BOUNDARIES = (100, 300, 500, 700)


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "calibrate",
        run,
        help="measure a model's trade-off of diversity and identity, for --diversity of generate",
        description="Samples a few identities on a grid of guidance and latest boundary, and with the single stage,"
        " measures how like their identities and how varied the images are, and writes the curve into the model's"
        " model_index.json. Run the same command again to continue.",
        examples="""
            # into a copy of the embedded checkpoint, with real faces for a recommended value
            uiface calibrate --encoder buffalo_l --real cache/photos --output runs/calibrated

            # into the model's own folder, with LPIPS as the measure of diversity
            uiface calibrate runs/uiface --encoder buffalo_l --lpips-backbone alexnet.safetensors
        """,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL)
    add_encoder_arguments(parser)
    parser.add_argument(
        "--output", type=path, metavar="FOLDER", help="a copy of the model with its curve (default: MODEL's folder)"
    )
    parser.add_argument(
        "--work", type=path, metavar="FOLDER", help="of images and figures (default: calibration/NAME of the model)"
    )
    parser.add_argument("--bank", type=path, metavar="BANK", help="default: the model's identities.safetensors")
    parser.add_argument(
        "--identities", type=whole(2), default=40, metavar="NUMBER", help="how many (default: %(default)s)"
    )
    parser.add_argument(
        "--images-per-identity", type=whole(2), default=2, metavar="NUMBER", help="default: %(default)s"
    )
    parser.add_argument(
        "--num-inference-steps", type=whole(), default=50, metavar="NUMBER", help="default: %(default)s"
    )
    parser.add_argument(
        "--guidance-scales",
        type=real(low=0),
        nargs="+",
        default=GUIDANCE_SCALES,
        metavar="SCALE",
        help=f"default: {' '.join(map(str, GUIDANCE_SCALES))}",
    )
    parser.add_argument(
        "--latest-boundaries",
        type=whole(0),
        nargs="+",
        default=LATEST_BOUNDARIES,
        metavar="TIMESTEP",
        help=f"default: {' '.join(map(str, LATEST_BOUNDARIES))}",
    )
    parser.add_argument(
        "--real",
        type=path,
        metavar="FACES",
        help="aligned real faces, several of a person: a data set in any of the forms. Where images of one identity"
        " are as alike as these is --diversity recommended",
    )
    parser.add_argument(
        "--lpips-backbone",
        type=path,
        metavar="FILE",
        help="safetensors of AlexNet's convolutions: diversity is LPIPS (default: 1 - cosine of two images by the"
        " encoder)",
    )
    parser.add_argument("--seed", type=whole(0), default=0, help="default: %(default)s")
    parser.add_argument("--batch-size", type=whole(), metavar="NUMBER", help="faces per call of the pipeline")
    parser.add_argument("--device", type=device, default="cpu", help="of the model (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    if args.output is None and (args.model is None or not Path(args.model).is_dir()):
        raise ValueError("the model is no folder of yours to write into: name one for a copy by --output.")
    if args.output is not None and args.output.exists():
        raise ValueError(f"{args.output} exists: name a new folder for the copy, or calibrate that one itself.")
    from uiface_diffusers.evaluation import load_lpips
    from uiface_diffusers.evaluation.calibration import calibrate, describe, save_dial
    from uiface_diffusers.loading import load_pipeline, model_identities, pipeline_folder

    folder = pipeline_folder(args.model)
    bank = model_identities(folder, args.bank)
    if len(bank) < args.identities:
        raise ValueError(f"the bank has {len(bank)} identities, --identities asks for {args.identities}.")
    perceptual = None if args.lpips_backbone is None else load_lpips("alex", args.lpips_backbone)
    dial = calibrate(
        load_pipeline(folder).to(args.device),
        bank.take(range(args.identities)),
        face_encoder(args, device=args.device),
        args.work or Path("calibration") / folder.resolve().name,
        guidance_scales=args.guidance_scales,
        latest_boundaries=args.latest_boundaries,
        images_per_identity=args.images_per_identity,
        num_inference_steps=args.num_inference_steps,
        seed=args.seed,
        batch_size=args.batch_size,
        perceptual=perceptual,
        real=args.real,
        log=lambda line: print(line, flush=True),
    )
    if args.output is None:
        save_dial(folder, dial)
    else:
        _copy_with(dial, folder, args.output)
    print("the curve, from most diverse to most identity:")
    for point in dial.points:
        print(f"  {describe(point)}")
    if dial.recommended_diversity is not None:
        print(f"as varied as real faces: --diversity {dial.recommended_diversity:.2f}, or recommended")
    print(f"written to {(args.output or folder) / 'model_index.json'}")


def _copy_with(dial: "Dial", folder: Path, output: Path) -> None:
    """A copy of a model with its dial, under its name when it is complete: what is there is not written to again."""
    from uiface_diffusers.evaluation.calibration import save_dial

    beside = output.with_name(f".{output.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(folder, beside)
    save_dial(beside, dial)
    beside.rename(output)
