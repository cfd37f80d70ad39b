import argparse

from .options import path
from .shared import Commands, add_command, print_left_out


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "convert",
        run,
        help="write a data set in another form",
        description="Converts identity folders, RecordIO, webdataset shards, parquet files, LMDB and zip archives into"
        " each other. The pictures' files stay as they are, and identities keep their names. OUTPUT appears when it"
        " is complete.",
        examples="""
            # InsightFace's RecordIO to one folder per identity
            uiface convert faces_webface_112x112 webface --format imagefolder

            # a generated data set to RecordIO, for InsightFace's training
            uiface convert data data_recordio --format recordio

            # HSFace or VFace, in LMDB, to one folder per identity
            uiface convert hsface10k.lmdb hsface10k --format imagefolder

            # parquet files that the Hub's viewer shows
            uiface convert faces_webface_112x112 webface_parquet --format parquet
        """,
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=path,
        help="a folder, or a .rec, .tar, .parquet, .lmdb or .zip file",
    )
    parser.add_argument("output", metavar="OUTPUT", type=path, help="a new or empty folder")
    parser.add_argument(
        "--format",
        required=True,
        choices=("imagefolder", "recordio", "webdataset", "parquet", "lmdb", "zip"),
        help="the form of OUTPUT; lmdb needs the package lmdb",
    )
    parser.add_argument(
        "--nested",
        action="store_true",
        help="SOURCE is PERSON/VIDEO/*.jpg: each folder in it is one person, with the pictures of all folders within",
    )


def run(args: argparse.Namespace) -> None:
    from uiface_diffusers.data import convert_dataset

    report = convert_dataset(args.source, args.output, args.format, args.nested)
    print(f"{report['photographs']} pictures of {report['identities']} identities written to {args.output}")
    print_left_out(report["left_out"])
