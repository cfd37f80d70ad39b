"""A short run of benchmarks/fuzz.py, and what its long ones found."""

import gzip
import importlib.util
import io
import os
import re
import shutil
import tokenize

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import REPOSITORY, complaint, tiny_components, write_toy_pack
from written_files import picture, write, write_records, write_tar

from uiface_diffusers import IdentityBank, UIFacePipeline, cli, generate_dataset
from uiface_diffusers.data import FaceCache, prepare_faces
from uiface_diffusers.data.sources import open_source
from uiface_diffusers.evaluation import load_recognizer
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.files import read_json, read_lines, read_torch, why_unreadable
from uiface_diffusers.generation import make_identities
from uiface_diffusers.identities import import_identities
from uiface_diffusers.models.face_recognition import IResNetConfig, IResNetImageProcessor, IResNetModel

spec = importlib.util.spec_from_file_location("fuzz", REPOSITORY / "benchmarks" / "fuzz.py")
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)


def test_forty_mutated_inputs(capsys):
    assert fuzz.run(list(range(40)), seed=2) == []
    assert "done" in capsys.readouterr().out


def test_the_fuzzer_sees_faults(tmp_path, monkeypatch):
    """Its own checks: innards, and files that are lost."""
    assert fuzz.complain("x has no rows.") is None
    for message in ("", "a\n\nb", "'NoneType' object has no attribute 'x'", "list index out of range"):
        assert fuzz.complain(message)
    write(tmp_path / "set", {"a/0.png": picture(1), "b/0.png": picture(2)})
    fuzz.check_source(str(tmp_path / "set"))
    given = fuzz.given_files
    monkeypatch.setattr(fuzz, "given_files", lambda path: given(path) + fuzz.Counter(["b/1.png"]))
    with pytest.raises(AssertionError, match="lost in silence: .*b/1.png"):
        fuzz.check_source(str(tmp_path / "set"))


def test_links_to_themselves_and_back(tmp_path):
    write(tmp_path / "set", {"anna/0.png": picture(1), "bert/0.png": picture(2)})
    (tmp_path / "set" / "anna" / "1.png").symlink_to("1.png")
    (tmp_path / "set" / "alone.png").symlink_to("alone.png")
    (tmp_path / "set" / "back").symlink_to("..")
    (tmp_path / "set" / "same").symlink_to(".")
    (tmp_path / "set" / "carl").symlink_to(tmp_path / "set" / "bert")
    source = open_source(tmp_path / "set")
    assert [photograph.file for photograph in source.photographs] == [
        "anna/0.png",
        "anna/1.png",
        "bert/0.png",
        "carl/0.png",
    ]
    with pytest.raises(OSError, match="1.png is a link to nothing"):
        source.read(source.photographs[1])
    assert source.stamp(source.photographs[1]) == "missing"
    back = "a link to a folder that holds this one"
    assert source.left_out == {"alone.png": "in no identity's folder", "back": back, "same": back}


def test_what_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "link.json").symlink_to("nowhere")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "folder.pt").mkdir()
    for read, name, message in (
        (read_json, "link.json", "is a link to nothing"),
        (read_lines, "loop.txt", "is a link to nothing"),
        (read_lines, "none.txt", "is missing"),
        (read_torch, "folder.pt", "is a folder, not a file"),
    ):
        with pytest.raises(ValueError, match=f"{name} {message}"):
            read(tmp_path / name)
    (tmp_path / "x").write_bytes(b"x" * 100)
    assert why_unreadable(tmp_path / "x", "first.\n\nsecond").endswith("of another kind: first")


def test_damaged_numbers_are_named(tmp_path):
    np.save(tmp_path / "a.npy", np.eye(3, 16))
    content = bytearray((tmp_path / "a.npy").read_bytes())
    content[70:72] = b"\x22\x5c"  # a header that Python's tokenizer does not end
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(Exception) as raw:
        np.load(tmp_path / "a.npy")
    assert isinstance(raw.value, tokenize.TokenError | ValueError | SyntaxError)
    with pytest.raises(ValueError, match="a.npy is damaged, cut short"):
        import_identities(tmp_path / "a.npy", "toy")
    torch.save({"a": io.BytesIO}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="holds more than tensors: not loaded. Unsupported") as error:
        read_torch(tmp_path / "b.pt")
    assert "weights_only" not in str(error.value)  # torch's advice would execute the file
    (tmp_path / "c.pt").write_bytes(b"PK\x03\x04" + bytes(range(256)))
    with pytest.raises(ValueError, match="c.pt is damaged"):
        read_torch(tmp_path / "c.pt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1e999\t0\ta/{key}.jpg\n", "1e999 is no key of a record"),
        ("{key}\t1e999\tx{key}.jpg\n", "label inf of key 0: identities are whole numbers"),
        ("{key}\t-{key}.5\tx{key}.jpg\n", "label -0.5 of key 0: identities are whole numbers"),
    ],
)
def test_numbers_of_lists_that_are_no_numbers(tmp_path, line, message):
    path = write_records(tmp_path / "train.rec", [0, 0, 0])
    lines = [line.format(key=key) for key in range(3)]
    (tmp_path / "list.txt").write_text(
        "".join(lines) if "e999" not in line else "".join([*lines[:2], "2\t1\tx.jpg\n"])
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        open_source(path)


def test_damaged_configurations_are_named(tmp_path):
    IResNetModel(IResNetConfig(layers=18, width=8, embedding_dim=16)).save_pretrained(tmp_path / "recognizer")
    IResNetImageProcessor().save_pretrained(tmp_path / "recognizer")
    file = tmp_path / "recognizer" / "preprocessor_config.json"
    file.write_text(file.read_text().replace('"IResNetImageProcessor"', "[]"))
    with pytest.raises(ValueError, match="recognizer is no recognizer that transformers knows, or a file of"):
        load_recognizer(os.fspath(tmp_path / "recognizer"))
    UIFacePipeline(**tiny_components()).save_pretrained(tmp_path / "model")
    IdentityBank(torch.eye(2, 16), "toy").save(tmp_path / "bank")
    file = tmp_path / "model" / "vae" / "config.json"
    file.write_text(file.read_text().replace('"out_channels": 3', '"out_channels": "x"'))
    with pytest.raises(SystemExit, match="model holds no pipeline, or a file of it is damaged .TypeError"):
        cli.main(["generate", str(tmp_path / "model"), "--identities", str(tmp_path / "bank")])
    torch.save({"x": torch.zeros(1)}, tmp_path / "unet.pt")
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert-original", "--unet", str(tmp_path / "unet.pt"), "--output", str(tmp_path / "out")])
    lines = ended.value.code.splitlines()  # hundreds of tensors are missing
    assert len(lines) == 11 and re.search(r"\.\.\. and \d{3} more lines", lines[-1])
    with pytest.raises(SystemExit, match="vae .--vq-model. is of the class AutoencoderTiny, not a VQ"):
        words = [
            "--unet",
            tmp_path / "unet.pt",
            "--vq-model",
            tmp_path / "model" / "vae",
            "--output",
            tmp_path / "out",
        ]
        cli.main(["convert-original", *map(str, words)])


def test_a_folder_in_the_place_of_a_file_is_told_before_the_work(tmp_path):
    (tmp_path / "out").mkdir()
    write_toy_pack(tmp_path)
    with pytest.raises(ValueError, match="out is a folder: name a file to write to"):
        make_identities(UIFacePipeline(**tiny_components()), FaceEncoder("toy", str(tmp_path)), 2, tmp_path / "out")
    with pytest.raises(SystemExit, match="out is a folder"):
        cli.main(["identities", "make", "--number", "2", "--output", str(tmp_path / "out"), "--encoder", "none"])
    with pytest.raises(ValueError, match="out is a folder"):
        IdentityBank(torch.eye(2, 16)).save(tmp_path / "out")
    IdentityBank(torch.eye(2, 16)).save(tmp_path / "new" / "deeper" / "bank")  # its folders are made
    with pytest.raises(ValueError, match="is no name of a model pack but a path"):
        FaceEncoder(str(tmp_path / "models" / "toy"))


def test_a_damaged_shard_is_named_once(tmp_path):
    shard = write_tar(tmp_path / "0.tar", [("a/0.png", picture(1))])
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(ValueError, match="^0.tar is no tar file: .*0.tar is damaged, cut short or of another kind: "):
        open_source(shard)


# situations that were tried by hand


def test_one_folder_for_two_commands(tmp_path, toy_root, toy_photographs, tiny_pipeline):
    """A cache does not become a data set, nor the other way round."""
    encoder = FaceEncoder("toy", str(toy_root), det_size=160)
    shutil.copytree(toy_photographs, tmp_path / "photos")
    with pytest.raises(ValueError, match="photos is a data set, not a cache of faces"):
        prepare_faces(tmp_path / "photos", tmp_path / "photos", encoder)
    assert len(list((tmp_path / "photos").iterdir())) == 4
    prepare_faces(tmp_path / "photos", tmp_path / "cache", encoder, image_size=16)
    bank = IdentityBank(torch.eye(2, 16), "toy")
    with pytest.raises(ValueError, match="cache is a cache of faces, not a data set"):
        generate_dataset(tiny_pipeline, bank, tmp_path / "cache", 1, num_inference_steps=1)
    generate_dataset(tiny_pipeline, bank, tmp_path / "made", 1, num_inference_steps=1, size=8)
    with pytest.raises(ValueError, match="made is a data set, not a cache"):
        prepare_faces(tmp_path / "photos", tmp_path / "made", encoder)
    # what lies beside them is named
    for folder, what in (("cache", "beside the cache"), ("made", "beside the generated images")):
        write(tmp_path / folder, {"anna/0.png": picture(1), ".hidden": b""})
        assert open_source(tmp_path / folder).left_out == {"anna": what, ".hidden": "hidden or system file"}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("report.json", "[]", "report.json is damaged: it has no `faces`"),
        ("report.json", '{"faces": "9"}', "report.json is damaged: it has no `faces`"),
        ("prepare.json", "[1]", "prepare.json is damaged: it has no `settings`"),
        ("prepare.json", '{"settings": {"identity_encoder": "toy"}}', "its settings have no `image_size`"),
        ("outliers.json", '{"dropped": 1}', "outliers.json is damaged: it has no `dropped`"),
    ],
)
def test_files_of_a_cache_of_another_form(tmp_path, toy_root, toy_photographs, file, content, message):
    encoder = FaceEncoder("toy", str(toy_root), det_size=160)
    prepare_faces(toy_photographs, tmp_path, encoder, image_size=16)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        if file == "outliers.json":
            prepare_faces(toy_photographs, tmp_path, encoder, image_size=16)
        FaceCache(tmp_path)


def test_compressed_shards_and_links_to_records(tmp_path):
    shard = write_tar(tmp_path / "0.tar", [("a/0.png", picture(1))])
    write(tmp_path, {"gz/0.tar.gz": gzip.compress(shard.read_bytes()), "named/0.tar": gzip.compress(b"x" * 600)})
    for path in ("gz", "gz/0.tar.gz"):
        with pytest.raises(ValueError, match="0.tar.gz is compressed: .*Unpack it"):
            open_source(tmp_path / path)
    with pytest.raises(ValueError, match="compressed: unpack it with gunzip"):
        open_source(tmp_path / "named")
    write_records(tmp_path / "records" / "train.rec", [0, 0, 0])
    (tmp_path / "records" / "list.txt").write_text("0\tanna/0.jpg\n1\tanna/1.jpg\n2\tbert/0.jpg\n")
    (tmp_path / "link.rec").symlink_to("records/train.rec")
    names = [photograph.identity for photograph in open_source(tmp_path / "link.rec").photographs]
    assert names == ["anna", "anna", "bert"]


def test_folders_without_identities(tmp_path):
    write(tmp_path / "set", {"anna/0.png": picture(1)})
    (tmp_path / "set" / "nobody").mkdir()
    assert open_source(tmp_path / "set").left_out == {"nobody": "an empty folder"}
    with pytest.raises(ValueError, match=f"pictures of one identity. Then give {tmp_path / 'set'}"):
        open_source(tmp_path / "set" / "anna")
    with pytest.raises(ValueError, match="a path is empty"):
        open_source("")
    with pytest.raises(SystemExit):
        cli.main(["prepare", "", "--output", str(tmp_path / "x")])


def test_pictures_of_cameras_with_two_lenses(tmp_path):
    images = [PIL.Image.new("RGB", (8, 8), (value, 0, 0)) for value in (200, 10)]
    (tmp_path / "anna").mkdir()
    images[0].save(tmp_path / "anna" / "0.mpo", save_all=True, append_images=images[1:])
    source = open_source(tmp_path)
    assert abs(int(source.read(source.photographs[0])[0, 0, 0]) - 200) < 4 and not source.left_out


def test_banks_without_rows(tmp_path, toy_root):
    empty, bank = IdentityBank(torch.empty(0, 16)), IdentityBank(torch.eye(3, 16))
    empty.save(tmp_path / "empty")
    bank.save(tmp_path / "bank")
    inspect = ["identities", "inspect"]
    assert "the known bank is empty" in complaint(*inspect, tmp_path / "bank", "--against", tmp_path / "empty")
    assert "0 identities: two are needed" in complaint(*inspect, tmp_path / "empty")
    message = complaint("identities", "perturb", tmp_path / "empty", "--output", tmp_path / "x")
    assert "the bank is empty" in message
    (tmp_path / "names.txt").write_text("\n\n")
    words = ["--output", tmp_path / "cache", "--encoder-root", toy_root, "--identities", tmp_path / "names.txt"]
    assert "names.txt names no identities" in complaint("prepare", tmp_path, *words)
