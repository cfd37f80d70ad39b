import argparse
import json

from .options import path, whole
from .shared import Commands, add_command


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "convert-original",
        run,
        help="convert the published UIFace weights to a pipeline",
        description="Converts the published checkpoint, with CompVis' VQ-f4 first stage or a diffusers VQModel, to a"
        " pipeline's folder.",
        examples="""
            uiface convert-original --unet uiface.pt --vq-encoder encoder.pt --vq-decoder decoder.pt \\
                --identity-encoder elasticface --output uiface
        """,
    )
    parser.add_argument("--unet", type=path, required=True, metavar="FILE", help="the denoiser")
    parser.add_argument("--vq-encoder", type=path, metavar="FILE", help="first stage: encoder and quant_conv")
    parser.add_argument("--vq-decoder", type=path, metavar="FILE", help="first stage: decoder and quantization")
    parser.add_argument(
        "--vq-model", metavar="MODEL", help="first stage, instead of the two files: a diffusers VQModel"
    )
    parser.add_argument(
        "--model-config",
        type=path,
        metavar="FILE",
        help="JSON of the reference's options (default: those of the published weights)",
    )
    parser.add_argument(
        "--sample-size",
        type=whole(),
        default=32,
        metavar="PIXELS",
        help="height and width of the latents (default: %(default)s)",
    )
    parser.add_argument(
        "--identity-encoder",
        metavar="NAME",
        help="the recognizer whose embeddings the weights belong to, for example elasticface",
    )
    parser.add_argument("--output", type=path, required=True, metavar="FOLDER", help="folder of the pipeline")


def run(args: argparse.Namespace) -> None:
    from uiface_diffusers.convert_original import convert_original

    config = None
    if args.model_config is not None:
        try:
            config = json.loads(args.model_config.read_text())
        except ValueError as error:
            raise ValueError(f"--model-config {args.model_config} is no JSON file: {error}") from error
    convert_original(
        args.unet,
        args.output,
        vq_encoder=args.vq_encoder,
        vq_decoder=args.vq_decoder,
        vq_model=args.vq_model,
        model_config=config,
        sample_size=args.sample_size,
        identity_encoder=args.identity_encoder,
    )
    print(f"pipeline saved to {args.output}")
