"""`uiface make-pack`: two ONNX files become a pack that `FaceEncoder` takes, or an error says which file is wrong."""

import contextlib
import hashlib
import io
import shutil

import numpy as np
import onnx
import PIL.Image
import pytest
from conftest import complaint, draw_person, write_toy_pack
from onnx import TensorProto, helper, numpy_helper

from uiface_diffusers import cli
from uiface_diffusers.faces import FaceEncoder, make_pack


@pytest.fixture
def files(toy_root, tmp_path):
    for name in ("recognizer", "detector"):
        shutil.copy(toy_root / "models" / "toy" / f"{name}.onnx", tmp_path / f"my_{name}.onnx")
    return tmp_path / "my_recognizer.onnx", tmp_path / "my_detector.onnx"


def test_the_pack_embeds_as_its_files_do(files, toy_root, tmp_path):
    recognizer, detector = files
    written = io.StringIO()
    output = tmp_path / "root" / "models" / "mine"
    with contextlib.redirect_stdout(written):
        cli.main(["make-pack", "--recognizer", str(recognizer), "--detector", str(detector), "--output", str(output)])
    assert sorted(file.name for file in output.iterdir()) == ["detector.onnx", "recognizer.onnx"]
    assert [file.name for file in output.parent.iterdir()] == ["mine"]
    mine = FaceEncoder("mine", tmp_path / "root", det_size=160)
    toy = FaceEncoder("toy", toy_root, det_size=160)
    person = draw_person((0, 200, 90))
    ours, theirs = mine.embed(person), toy.embed(person)
    assert np.array_equal(ours.embeddings, theirs.embeddings)
    assert ours.encoder_mark.name == "mine" and mine.fingerprint == toy.fingerprint
    assert mine.fingerprint in written.getvalue()
    assert f"sha256 {hashlib.sha256(recognizer.read_bytes()).hexdigest()} recognizer.onnx" in written.getvalue()
    assert "(pixel - 127.5) / 127.5" in written.getvalue() and "of 16 numbers" in written.getvalue()


def test_weights_in_files_of_their_own_come_along(files, tmp_path):
    recognizer, detector = files
    model = onnx.load(recognizer)
    onnx.save(model, tmp_path / "large.onnx", save_as_external_data=True, location="large.weights", size_threshold=0)
    report = make_pack(tmp_path / "large.onnx", detector, tmp_path / "models" / "large")
    plain = make_pack(recognizer, detector, tmp_path / "models" / "plain")
    assert (tmp_path / "models" / "large" / "large.weights").is_file()
    assert report.fingerprint != plain.fingerprint and report.dimension == plain.dimension == 16
    face = np.asarray(PIL.Image.new("RGB", (112, 112), (200, 30, 60)))
    embeddings = [FaceEncoder(name, tmp_path).embed_aligned([face]) for name in ("large", "plain")]
    assert np.array_equal(*embeddings)
    (tmp_path / "large.weights").unlink()
    with pytest.raises(ValueError, match="keeps its weights in .*large.weights, which is missing"):
        make_pack(tmp_path / "large.onnx", detector, tmp_path / "models" / "again")


def test_one_face_per_call_is_reported(tmp_path):
    write_toy_pack(tmp_path, batch=1)
    pack = tmp_path / "models" / "toy"
    assert make_pack(pack / "recognizer.onnx", pack / "detector.onnx", tmp_path / "models" / "one").batch == 1


def blind_recognizer(path):
    """A model of a recognizer's form whose embeddings do not depend on the face."""
    nodes = [
        helper.make_node("ReduceMean", ["face"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        helper.make_node("Reshape", ["nothing", "column"], ["one"]),
        helper.make_node("Add", ["one", "bias"], ["embedding"]),
    ]
    constants = [
        numpy_helper.from_array(np.float32(0), "zero"),
        numpy_helper.from_array(np.array([-1, 1]), "column"),
        numpy_helper.from_array(np.ones((1, 16), np.float32), "bias"),
    ]
    face = helper.make_tensor_value_info("face", TensorProto.FLOAT, ["n", 3, 112, 112])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", 16])
    graph = helper.make_graph(nodes, "blind", [face], [embedding], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, d: r.write_bytes(d.read_bytes()), "has no recognition model"),
        (lambda r, d: d.write_bytes(r.read_bytes()), "has no detection model"),
        (
            lambda r, d: r.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
            "the recognizer is no ONNX model",
        ),
        (lambda r, d: d.unlink(), "the detector is no ONNX model: .*my_detector.onnx is missing"),
        (lambda r, d: blind_recognizer(r), "does not look at the faces"),
    ],
    ids=["recognizer", "detector", "pointer", "missing", "blind"],
)
def test_a_wrong_file_is_named_and_leaves_nothing(change, message, files, tmp_path):
    change(*files)
    with pytest.raises(ValueError, match=message):
        make_pack(*files, tmp_path / "models" / "mine")
    assert not list(tmp_path.glob("models/*"))


def test_the_folder_is_one_that_packs_are_found_in(files, tmp_path):
    arguments = ("make-pack", "--recognizer", files[0], "--detector", files[1], "--output")
    assert "is not in a folder `models`" in complaint(*arguments, tmp_path / "mine")
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "w600k_r50.onnx").touch()
    assert "is there already" in complaint(*arguments, tmp_path / "models" / "mine")
