import io
import os
import pickle
import struct

import numpy as np
import PIL.Image
import pytest
from conftest import draw_person

from uiface_diffusers import cli
from uiface_diffusers.data import Benchmark, make_benchmark, read_benchmark, read_benchmarks, read_pairs
from uiface_diffusers.data.benchmarks import KINDS, STAND_INS
from uiface_diffusers.evaluation import verify_benchmarks
from uiface_diffusers.faces import FaceEncoder, align_face, load_photograph


@pytest.fixture(scope="module")
def encoder(toy_root):
    return FaceEncoder("toy", str(toy_root), det_size=160)


def png(value: int, size=(112, 112)) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size, (value, 0, 255 - value)).save(buffer, "png")
    return buffer.getvalue()


IMAGES, SAME = [png(value) for value in range(4)], [True, False]


def write(path, content, protocol=pickle.HIGHEST_PROTOCOL):
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("outer", [tuple, list])
def test_pickles_of_python_3(tmp_path, protocol, outer):
    benchmark = read_benchmark(write(tmp_path / "lfw.bin", outer([IMAGES, SAME]), protocol))
    assert benchmark.images == IMAGES and benchmark.same.tolist() == SAME
    assert benchmark.same.dtype == bool and benchmark.name == "lfw" and len(benchmark) == 2
    assert np.array_equal(benchmark.face(3), np.broadcast_to((3, 0, 252), (112, 112, 3)))


@pytest.mark.parametrize("protocol", [1, 2])
def test_pickles_of_python_2(tmp_path, protocol):
    """As Python 2's cPickle writes them: its strings are BINSTRING or, below 256 bytes, SHORT_BINSTRING; its booleans
    are the opcodes of protocol 2, or `I01`."""
    short = png(1, (1, 1))
    assert len(short) < 256 < len(IMAGES[0])
    strings = [b"T" + struct.pack("<i", len(IMAGES[0])) + IMAGES[0] + b"q\x02"]
    strings += [b"U" + bytes([len(short)]) + short + b"q\x03", b"h\x03", b"h\x02"]
    true, false = (b"\x88", b"\x89") if protocol == 2 else (b"I01\n", b"I00\n")
    content = b"]q\x01(" + b"".join(strings) + b"e]q\x04(" + true + false + b"e"
    content = b"\x80\x02" + content + b"\x86q\x05." if protocol == 2 else b"(" + content + b"tq\x05."
    assert pickle.loads(content, encoding="bytes") == ([IMAGES[0], short, short, IMAGES[0]], SAME)  # well formed
    benchmark = read_benchmark(write(tmp_path / "old.bin", content))
    assert benchmark.images == [IMAGES[0], short, short, IMAGES[0]] and benchmark.same.tolist() == SAME


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("labels", [np.array(SAME), [np.bool_(same) for same in SAME], np.array(SAME, int)])
def test_numpy_arrays_in_the_place_of_bytes_and_booleans(tmp_path, protocol, shape, labels):
    """`cv2.imencode` gives arrays, of one column in older versions."""
    images = [np.frombuffer(image, np.uint8).reshape(shape).copy() for image in IMAGES]
    content = pickle.dumps((images, labels), protocol)
    benchmark = read_benchmark(write(tmp_path / "new.bin", content))
    assert benchmark.images == IMAGES and benchmark.same.tolist() == SAME
    if protocol == 2:  # names without a length: those of numpy 1
        assert b"numpy._core.multiarray" in content
        old = read_benchmark(write(tmp_path / "old.bin", content.replace(b"numpy._core.", b"numpy.core.")))
        assert old.images == IMAGES and old.same.tolist() == SAME


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("place", ["whole", "image", "label"])
def test_hostile_pickles_execute_nothing(tmp_path, protocol, place):
    command = Call(os.system, f"touch {tmp_path / 'executed'}")
    content = {"whole": command, "image": ([command, *IMAGES[1:]], SAME), "label": (IMAGES, [command, False])}[place]
    with pytest.raises(ValueError, match=r"hostile.bin.*`posix.system`.*not executed.*\(\[bytes, ...\], \[bool"):
        read_benchmark(write(tmp_path / "hostile.bin", content, protocol))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("function", [eval, getattr, bytes, bytearray, pickle.loads, np.load, np.frombuffer])
def test_nothing_else_is_called(tmp_path, function):
    with pytest.raises(ValueError, match=f"`.*{function.__name__}`"):
        read_benchmark(write(tmp_path / "hostile.bin", ([Call(function, b"1"), *IMAGES[1:]], SAME), 4))


def test_what_stands_in_cannot_be_changed_by_a_pickle(tmp_path):
    """BUILD sets attributes of whatever lies on the stack."""
    before = {key: dict(vars(value)) for key, value in STAND_INS.items()}
    for module, name in STAND_INS:
        for state in (b"}(X\x04\x00\x00\x00codeK\x01u", b"N}(X\x0c\x00\x00\x00__defaults__)u\x86"):
            content = f"\x80\x02c{module}\n{name}\n".encode("latin1") + state + b"b."
            with pytest.raises(ValueError, match="cannot be read"):
                read_benchmark(write(tmp_path / "hostile.bin", content))
    assert {key: dict(vars(value)) for key, value in STAND_INS.items()} == before
    images = [np.frombuffer(image, np.uint8) for image in IMAGES]
    assert read_benchmark(write(tmp_path / "good.bin", (images, np.array(SAME)))).images == IMAGES


def test_truncated_files_are_named(tmp_path):
    whole = pickle.dumps((IMAGES, SAME))
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        with pytest.raises(ValueError, match="cut.bin cannot be read as a benchmark"):
            read_benchmark(write(tmp_path / "cut.bin", whole[:length]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no pickle", "cannot be read as a benchmark"),
        ((IMAGES[:3], SAME), "3 images and 2 labels"),
        ((IMAGES, [*SAME, True]), "4 images and 3 labels"),
        (([], []), "0 images and 0 labels"),
        ((IMAGES, [0.5] * 4, SAME), "not a list of images and a list of labels"),
        ((IMAGES[0], SAME), "images are bytes, not a list"),
        ((["text", *IMAGES[1:]], SAME), "an image is str, not bytes"),
        (([np.zeros(4, np.float32), *IMAGES[1:]], SAME), "numpy data of type 'f4'"),
        ((np.array([1, "x", None, 3], object), SAME), "numpy data of type 'O8'"),
        ((IMAGES, True), "labels are bool, not a list"),
        ((IMAGES, [2, 0]), "a label is 2, neither true nor false"),
        ((IMAGES, ["same", "other"]), "a label is 'same'"),
    ],
)
def test_what_is_no_benchmark_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=f"wrong.bin.*{message}"):
        read_benchmark(write(tmp_path / "wrong.bin", content))


def test_images_are_brought_to_112(tmp_path):
    images = [png(9, (224, 224)), png(9, (112, 160)), b"no picture", IMAGES[0][:60]]
    benchmark = read_benchmark(write(tmp_path / "sizes.bin", (images, SAME)))
    assert benchmark.face(0).shape == (112, 112, 3) and (benchmark.face(0) == (9, 0, 246)).all()
    with pytest.raises(ValueError, match="image 1 of benchmark `sizes`.*112x160 is not square"):
        benchmark.face(1)
    for position in (2, 3):
        with pytest.raises(ValueError, match=f"image {position} of benchmark `sizes`"):
            benchmark.face(position)


def test_another_kind_is_a_function_and_a_line(tmp_path, monkeypatch):
    """A kind is found by its suffix, in a folder and by name, beside InsightFace's."""

    def read_archive(path):
        with np.load(path) as arrays:
            return Benchmark(path.stem, [array.tobytes() for array in arrays["images"]], arrays["same"])

    same = [True, False] * 5
    faces = [png(value) for value in range(20)]
    write(tmp_path / "a.bin", (faces, same))
    length = max(map(len, faces))
    images = np.stack([np.frombuffer(face.ljust(length, b"\0"), np.uint8) for face in faces])
    np.savez(tmp_path / "b.npz", images=images, same=np.array(same))
    assert [each.name for each in read_benchmarks(tmp_path)] == ["a"]
    monkeypatch.setitem(KINDS, ".npz", read_archive)
    first, second = read_benchmarks(tmp_path)
    assert (first.name, second.name) == ("a", "b") and np.array_equal(first.same, second.same)
    assert all(np.array_equal(first.face(place), second.face(place)) for place in range(20))
    assert np.array_equal(read_benchmark(tmp_path / "b.npz").face(3), first.face(3))
    (tmp_path / "b.npz").rename(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="two benchmarks of one name, a.bin, a.npz: rename one"):
        read_benchmarks(tmp_path)


VIEW_2 = "2\t1\nAnn_Lee\t1\t12\nAnn_Lee\t2\tBob\t1\nBob\t1\t2\nBob\t3\tAnn_Lee\t3\n"
VIEW_1 = "2\nAnn_Lee\t1\t12\nBob\t1\t2\nAnn_Lee\t2\tBob\t1\nBob\t3\tAnn_Lee\t3\n"
PAIRS = [
    ("Ann_Lee/Ann_Lee_0001", "Ann_Lee/Ann_Lee_0012", True),
    ("Ann_Lee/Ann_Lee_0002", "Bob/Bob_0001", False),
    ("Bob/Bob_0001", "Bob/Bob_0002", True),
    ("Bob/Bob_0003", "Ann_Lee/Ann_Lee_0003", False),
]


@pytest.mark.parametrize("text", [VIEW_2, VIEW_1, VIEW_2.replace("\t", " "), VIEW_2.replace("\n", "\r\n\r\n")])
def test_lists_of_pairs(tmp_path, text):
    """View 2 in its order; View 1, without folds, so that the kinds alternate."""
    (tmp_path / "pairs.txt").write_text(text)
    assert read_pairs(tmp_path / "pairs.txt") == PAIRS


def test_names_may_have_blanks(tmp_path):
    (tmp_path / "pairs.txt").write_text(VIEW_2.replace("Ann_Lee", "Ann Lee"))
    assert read_pairs(tmp_path / "pairs.txt")[1].first == "Ann Lee/Ann Lee_0002"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no pairs"),
        ("once upon a time\nthere were pairs\n", "does not start with FOLDS and PAIRS"),
        (VIEW_2.rsplit("\n", 2)[0], "2 genuine and 1 impostor pairs, 2 of each are counted"),
        (VIEW_2 + "Bob\t1\t3\n", "3 genuine and 2 impostor"),
        (VIEW_2.replace("Bob\t1\t2", "Bob\t1"), "neither NAME I J nor"),
        (VIEW_2.replace("Bob\t1\t2", "Bob\tone\t2"), r"the line 'Bob\\tone\\t2'"),
    ],
)
def test_damaged_lists_of_pairs_are_named(tmp_path, text, message):
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(ValueError, match=f"pairs.txt.*{message}"):
        read_pairs(tmp_path / "pairs.txt")


@pytest.fixture
def photographs(tmp_path):
    """ROOT/NAME/NAME_0001 of two people, in several formats."""
    root = tmp_path / "photographs"
    files = ["Ann_Lee_0001.png", "Ann_Lee_0002.PNG", "Ann_Lee_0003.bmp", "Ann_Lee_0012.jpeg"]
    for index, file in enumerate([*files, "Bob_0001.png", "Bob_0002.png", "Bob_0003.png"]):
        folder = root / file.rsplit("_", 1)[0]
        folder.mkdir(parents=True, exist_ok=True)
        draw_person((0, 255, 0) if "Ann" in file else (0, 0, 255), ((80 + 2 * index, 78, 44),)).save(folder / file)
        (folder / file).with_suffix(".txt").write_text("not a picture")
    (tmp_path / "pairs.txt").write_text(VIEW_2)
    return root


def test_benchmarks_are_made_of_aligned_faces(encoder, photographs, tmp_path):
    output = tmp_path / "made" / "toy.bin"
    report = make_benchmark(tmp_path / "pairs.txt", photographs, output, encoder)
    assert report == {"pairs": 4, "photographs": 7, "several_faces": 0, "without_face": []}
    assert os.listdir(output.parent) == ["toy.bin"]
    benchmark = read_benchmark(output)
    images, same = pickle.loads(output.read_bytes())  # the field's readers take it too
    assert images == benchmark.images and same == [True, False, True, False] == benchmark.same.tolist()
    assert all(image.startswith(b"\x89PNG") for image in images) and images[3] is images[4]
    for position, name in enumerate(name for pair in PAIRS for name in pair[:2]):
        (file,) = (file for file in photographs.glob(f"{name}.*") if file.suffix != ".txt")
        photograph = load_photograph(file)
        expected = align_face(photograph, encoder.detect(photograph)[0].landmarks)
        assert np.array_equal(benchmark.face(position), expected)


def test_several_faces_and_none(toy_root, photographs, tmp_path):
    """The face next to the center; and a pair is not left out for want of one."""
    bob = photographs / "Bob"
    for file in photographs.glob("*/*.[!t]*"):
        draw_person((0, 0, 0), ((150, 100, 44),), size=(320, 200)).save(file)
    draw_person((0, 0, 0), ((60, 60, 44), (230, 110, 44)), size=(320, 200)).save(bob / "Bob_0001.png")
    stripes = PIL.Image.fromarray(np.tile(np.arange(160, dtype=np.uint8)[:, None], (120, 1, 3)))
    stripes.save(bob / "Bob_0002.png")
    encoder = FaceEncoder("toy", str(toy_root), det_size=320)
    report = make_benchmark(tmp_path / "pairs.txt", photographs, tmp_path / "toy.bin", encoder)
    assert report == {"pairs": 4, "photographs": 7, "several_faces": 1, "without_face": ["Bob/Bob_0002"]}
    benchmark = read_benchmark(tmp_path / "toy.bin")
    photograph = load_photograph(bob / "Bob_0001.png")
    (central,) = (face for face in encoder.detect(photograph) if face.box[0] > 120)
    assert np.array_equal(benchmark.face(3), align_face(photograph, central.landmarks))
    expected = stripes.crop((20, 0, 140, 120)).resize((112, 112), PIL.Image.Resampling.BILINEAR)
    assert np.array_equal(benchmark.face(5), np.asarray(expected))


def test_photographs_that_cannot_be_used_are_named(encoder, photographs, tmp_path):
    arguments = tmp_path / "pairs.txt", photographs, tmp_path / "toy.bin"
    with pytest.raises(ValueError, match="Ann_Lee_0001.png cannot be used: not aligned: 160x120"):
        draw_person((0, 0, 0), size=(160, 120)).save(photographs / "Ann_Lee" / "Ann_Lee_0001.png")
        make_benchmark(*arguments, None)
    (photographs / "Bob" / "Bob_0003.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="Bob_0003.png cannot be used"):
        make_benchmark(*arguments, encoder)
    (photographs / "Bob" / "Bob_0003.png").unlink()
    with pytest.raises(ValueError, match="1 of 7 photographs are not in .*, such as Bob/Bob_0003.jpg"):
        make_benchmark(*arguments, encoder)
    assert not (tmp_path / "toy.bin").exists()


def test_aligned_photographs_are_taken_as_they_are(tmp_path, capsys):
    (tmp_path / "pairs.txt").write_text(VIEW_2)
    faces = {}
    for index, name in enumerate(sorted({name for pair in PAIRS for name in pair[:2]})):
        faces[name] = np.random.default_rng(index).integers(0, 256, (112, 112, 3), np.uint8)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(faces[name]).save(tmp_path / f"{name}.png")
    arguments = ["--pairs", str(tmp_path / "pairs.txt"), "--images", str(tmp_path)]
    cli.main(["make-benchmark", *arguments, "--aligned", "--output", str(tmp_path / "toy.bin")])
    assert "4 pairs of 7 photographs" in capsys.readouterr().out
    benchmark = read_benchmark(tmp_path / "toy.bin")
    for position, name in enumerate(name for pair in PAIRS for name in pair[:2]):
        assert np.array_equal(benchmark.face(position), faces[name])


def test_real_photographs(assets, tmp_path):
    """A pair of each kind of each of LFW's folds; and the benchmark of the list is that of the folder."""
    lines = (assets / "lfw" / "pairs.txt").read_text().splitlines()
    assert len(read_pairs(assets / "lfw" / "pairs.txt")) == 6000
    picked = [lines[1 + 600 * fold + 300 * kind] for fold in range(10) for kind in range(2)]
    (tmp_path / "pairs.txt").write_text("\n".join(["10\t1", *picked]))
    encoder = FaceEncoder("edgeface", str(assets / "insightface"), det_size=160)
    report = make_benchmark(tmp_path / "pairs.txt", assets / "lfw" / "images", tmp_path / "lfw.bin", encoder)
    assert report["pairs"] == 20 and report["photographs"] > 35 and not report["without_face"]
    result = verify_benchmarks(encoder, tmp_path / "lfw.bin")["lfw"]
    assert result.genuine.min() > result.impostor.max() and result.accuracy >= 0.9
