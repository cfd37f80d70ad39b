import argparse

from .options import path
from .shared import Commands, add_command


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "make-pack",
        run,
        help="make a model pack of a recognizer and a detector",
        description="Makes a folder that --encoder takes of two ONNX files, and checks that both work. The recognizer"
        " embeds aligned 112x112 RGB faces; the detector is of the SCRFD or RetinaFace kind, with five landmarks.",
        examples="""
            # then: --encoder edgeface, in every command
            uiface make-pack --recognizer edgeface_xs.onnx --detector scrfd_2.5g_bnkps.onnx \\
                --output ~/.insightface/models/edgeface
        """,
    )
    parser.add_argument("--recognizer", type=path, required=True, metavar="FILE", help="ONNX model")
    parser.add_argument("--detector", type=path, required=True, metavar="FILE", help="ONNX model")
    parser.add_argument("--output", type=path, required=True, metavar="FOLDER", help="the pack, ROOT/models/NAME")


def run(args: argparse.Namespace) -> None:
    from uiface_diffusers.faces import make_pack

    report = make_pack(args.recognizer, args.detector, args.output)
    faces = "any number of faces" if report.batch is None else f"{report.batch} faces"
    print(f"model pack `{report.name}` saved to {args.output}: --encoder {report.name} --encoder-root {report.root}")
    print(f"  embeddings of {report.dimension} numbers, {faces} per call, weights {report.fingerprint}")
    print(f"  pixels of 0..255 are taken as (pixel - {report.mean:g}) / {report.std:g}: check that it learned so")
    for name, digest in report.sha256.items():
        print(f"  sha256 {digest} {name}")
