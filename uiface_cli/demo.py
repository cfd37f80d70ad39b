import argparse

from .options import device, path, whole
from .shared import (
    MODEL,
    Commands,
    add_command,
    add_detector_argument,
    add_encoder_arguments,
    face_encoder,
    model_encoder,
)


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "demo",
        run,
        help="make faces in the browser",
        description="Serves a page on this machine: choose or draw an identity, and see what seed, boundary, injection"
        " and guidance do, with the single stage beside two stages. Needs the extra `demo`. Nothing is sent elsewhere,"
        " and no photograph is kept.",
        examples="""
            # then open http://127.0.0.1:7860
            uiface demo

            # also from whole photographs: any pack finds the face, the encoder that the model carries embeds it
            uiface demo --detector buffalo_l

            # with the pack that the model was trained on
            uiface demo org/model --identities bank.safetensors --encoder edgeface --encoder-root packs
        """,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL)
    parser.add_argument("--identities", type=path, metavar="BANK", help="default: the model's identities.safetensors")
    text = "insightface model pack for photographs (default: the encoder that the model carries, if it carries one)"
    add_encoder_arguments(parser, default=None, help=text)
    add_detector_argument(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: %(default)s)"
    )
    parser.add_argument("--port", type=whole(), default=7860, help="default: %(default)s")
    parser.add_argument("--device", type=device, default="cpu", help="default: %(default)s")


def run(args: argparse.Namespace) -> None:
    from uiface_diffusers.demo import Demo, run_demo
    from uiface_diffusers.loading import load_pipeline, model_identities, pipeline_folder

    def load() -> Demo:
        folder = pipeline_folder(args.model)
        identities = model_identities(folder, args.identities)
        own = args.encoder is None
        encoder = model_encoder(args, folder) if own else face_encoder(args, device=args.device)
        return Demo(load_pipeline(folder).to(args.device), identities, encoder)

    run_demo(load, args.host, args.port, log=print)
