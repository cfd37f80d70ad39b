"""Lists of pairs in the forms in which verification benchmarks are published."""

import unicodedata

import PIL.Image
import pytest

from uiface_diffusers import cli
from uiface_diffusers.data import make_benchmark, read_benchmark, read_pairs

A1, A2, B1, B2 = "Ann/Ann_0001", "Ann/Ann_0002", "Bob/Bob_0001", "Bob/Bob_0002"
SHORT = [(A1, A2, True), (A1, B1, False), (B1, B2, True), (B2, A2, False)]
PATHS = [tuple(f"{name}.jpg" for name in pair[:2]) + pair[2:] for pair in SHORT]

FORMS = {
    "RFW": ("Ann\t1\t2\nAnn\t1\tBob\t1\nBob\t1\t2\nBob\t2\tAnn\t2\n", SHORT),
    "Kaggle": ("name,imagenum1,imagenum2,\nAnn,1,2,\nAnn,1,Bob,1\nBob,1,2,\nBob,2,Ann,2\n", SHORT),
    "Kaggle's impostors": ("name,imagenum1,name,imagenum2\nAnn,1,Bob,1\nBob,2,Ann,2\n", [SHORT[1], SHORT[3]]),
    "names and numbers": (
        "name1;imagenum1;name2;imagenum2\nAnn;1;Ann;2\nAnn;1;Bob;1\nBob;1.0;Bob;2.0\nBob;2;Ann;2\n",
        SHORT,
    ),
    "CPLFW": ("a 1.jpg\t3\na 2.jpg\t3\na 1.jpg\t0\nb.jpg\t0\n", [("a 1.jpg", "a 2.jpg", 1), ("a 1.jpg", "b.jpg", 0)]),
}
for _name, _line in {
    "last": "{0} {1} {2}",
    "first": "{2} {0} {1}",
    "tabs": "{0}\t{1}\t{2}",
    "commas": "{0},{1},{2}",
}.items():
    FORMS[_name] = ("".join(_line.format(*pair[:2], int(pair[2])) + "\n" for pair in PATHS), PATHS)
for _name, _head in {"csv": "path1,path2,label", "img": "Img_1,Img_2,Is_Same", "index": ",p1,p2,label,note"}.items():
    _rows = [",".join((*pair[:2], "true" if pair[2] else "False")) for pair in PATHS]
    _rows = [f"{number},{row},x" if _name == "index" else row for number, row in enumerate(_rows)]
    FORMS[_name] = ("\n".join([_head, *_rows]), PATHS)


_numbers = [("0001", "0002", True), ("0003", "0004", False)]
FORMS["numbers, label last"] = ("0001 0002 1\n0003 0004 0\n", _numbers)
FORMS["numbers, label first"] = ("1\t0001\t0002\n0\t0003\t0004\n", _numbers)
FORMS["numbers of LFW's form"] = ("7 2 1\n8 3 1\n", [("7/7_0002", "7/7_0001", 1), ("8/8_0003", "8/8_0001", 1)])
for _name in ("Y", "Match", "Target"):
    FORMS[f"{_name}, a person"] = (
        f"{_name}\t1\t2\n{_name}\t1\tBob\t1\n",
        [(f"{_name}/{_name}_0001", f"{_name}/{_name}_0002", True), (f"{_name}/{_name}_0001", B1, False)],
    )
FORMS["a label in words"] = (
    "a.jpg,b.jpg,same\na.jpg,c.jpg,different\n",
    [("a.jpg", "b.jpg", 1), ("a.jpg", "c.jpg", 0)],
)
FORMS["commas and tabs"] = ("Doe, Ann/1.jpg\tb c.jpg\t1\n", [("Doe, Ann/1.jpg", "b c.jpg", True)])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_forms_of_lists(tmp_path, form, encoding):
    text, pairs = FORMS[form]
    (tmp_path / "pairs.txt").write_bytes(text.encode(encoding))
    assert read_pairs(tmp_path / "pairs.txt") == pairs


def test_folds_are_brought_together(tmp_path, recwarn):
    rows = [f"a{fold}.jpg,b{number}.jpg,{number},{fold}" for number in (0, 1) for fold in range(1, 11)]
    (tmp_path / "pairs.csv").write_text("\n".join(["path1,path2,label,fold", *rows]))
    pairs = read_pairs(tmp_path / "pairs.csv")
    assert [pair.first for pair in pairs] == [f"a{fold}.jpg" for fold in range(1, 11) for _ in range(2)]
    assert [pair.same for pair in pairs] == 10 * [False, True] and not recwarn
    (tmp_path / "pairs.csv").write_text("\n".join(["path1,path2,label,fold", *rows[:-1]]))
    with pytest.warns(UserWarning, match="has 10 folds of 1 to 2 pairs. Verification takes 10 consecutive equal"):
        read_pairs(tmp_path / "pairs.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Doe, Ann/1.jpg b.jpg 1\n", "not FILE FLAG; separate the words by tabs if names have blanks or commas"),
        ("Doe, Ann 1 2\nDoe, Ann 1 Bob 1\n", "not FILE FLAG; separate the words by tabs"),
        ("a.jpg b.jpg 1\nDoe, Ann.jpg b.jpg 0\n", "not PATH PATH 0/1: separate the words by tabs"),
        ("path1,path2,label\nDoe, Ann.jpg,b.jpg,1\n", "more columns than the header: put names with ',' in quotes"),
        ("\n", "has no pairs"),
        ("path1,path2,label\n", "has no pairs"),
        (
            "a.jpg b.jpg 1\na.jpg b.jpg 2\n",
            "the line 'a.jpg b.jpg 2': '2' says neither same .1. nor different .0. .line 2",
        ),
        ("a.jpg b.jpg 1\na b.jpg c.jpg 1\n", "separate the words by tabs"),
        ("path1,path2,label\na.jpg,b.jpg\n", "columns are missing .line 2"),
        ("path1,path2,label\na.jpg,,1\n", "a path is missing .line 2"),
        ("path1,path2,distance\na.jpg,b.jpg,1\n", "not all columns"),
        ("a.jpg 1\nb.jpg 0\n", "lines 1 and 2: the flags of a pair are equal"),
        ("a.jpg 1\nb.jpg 1\na.jpg 0\n", "3 lines: two are needed"),
        ("one two three four five\n", "of no other known form"),
    ],
)
def test_damaged_lists_are_named(tmp_path, text, message):
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(ValueError, match=f"pairs.txt.*{message}"):
        read_pairs(tmp_path / "pairs.txt")


def test_too_few_pairs_are_told_before_the_work(tmp_path):
    """No recognizer and no picture is there yet."""
    pairs = tmp_path / "pairs.txt"
    for lines, message in (
        (4 * ["a.png b.png 1", "a.png c.png 0"], "4 genuine and 4"),
        (11 * ["a b 1"], "11 genuine"),
    ):
        pairs.write_text("\n".join(lines))
        with pytest.raises(SystemExit, match=f"{message}.* impostor pairs: 10 pairs are needed, of both kinds"):
            cli.main(["verify", "nobody", "--pairs", str(pairs), "--images", str(tmp_path / "nowhere")])
        with pytest.warns(UserWarning, match="cannot be measured"), pytest.raises(ValueError, match="are not in"):
            make_benchmark(pairs, tmp_path / "nowhere", tmp_path / "x.bin", None)


def test_photographs_of_a_list_are_found(tmp_path):
    """With suffix or without, in another normal form, in any folder."""
    images, name = tmp_path / "images", "José"
    (images / "x" / unicodedata.normalize("NFD", name)).mkdir(parents=True)
    files = [images / "x" / unicodedata.normalize("NFD", name) / "1.tif", images / "flat.png", images / "flat.2.PPM"]
    for number, file in enumerate(files):
        PIL.Image.new("RGB", (112, 112), (number, 0, 0)).save(file)
    composed = unicodedata.normalize("NFC", name)
    lines = [f"x/{composed}/1\tflat\t0", f"x/{composed}/1.tif\tflat.2\t0", f"x\\{composed}\\1.tif\tflat.png\t0"]
    lines += [f"{files[0]}\tflat.2.PPM\t1"]
    (tmp_path / "pairs.txt").write_text("\n".join(lines), encoding="utf-8")
    with pytest.warns(UserWarning, match="1 genuine and 3 impostor"):
        make_benchmark(tmp_path / "pairs.txt", images, tmp_path / "x.bin", None)
    benchmark = read_benchmark(tmp_path / "x.bin")
    assert [benchmark.face(position)[0, 0, 0] for position in range(8)] == [0, 1, 0, 2, 0, 1, 0, 2]
    (images / "y").mkdir()
    upwards = [f"../x/{composed}/1\tflat.png\t0", f"../y/../x/{composed}/1.tif\t../../images/flat.2\t1"]
    (tmp_path / "up.txt").write_text("\n".join(upwards), encoding="utf-8")
    with pytest.warns(UserWarning, match="1 genuine and 1 impostor"), pytest.raises(ValueError, match="1 of 4"):
        make_benchmark(tmp_path / "up.txt", images / "y", tmp_path / "up.bin", None)
    (tmp_path / "up.txt").write_text("\n".join(upwards).replace("\tflat", "\t../flat"), encoding="utf-8")
    with pytest.warns(UserWarning, match="1 genuine and 1 impostor"):
        make_benchmark(tmp_path / "up.txt", images / "y", tmp_path / "up.bin", None)
    benchmark = read_benchmark(tmp_path / "up.bin")
    assert [benchmark.face(position)[0, 0, 0] for position in range(4)] == [0, 1, 0, 2]
    PIL.Image.new("RGB", (112, 112)).save(images / "flat.jpg")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="flat of the list could be flat.jpg and flat.png"):
        make_benchmark(tmp_path / "pairs.txt", images, tmp_path / "x.bin", None)
    (images / "flat.jpg").unlink()
    (images / "flat.png").unlink()
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="photographs are not in .*the list's paths have to"),
    ):
        make_benchmark(tmp_path / "pairs.txt", images, tmp_path / "x.bin", None)


def test_a_benchmark_that_is_a_pointer_is_named(tmp_path):
    (tmp_path / "lfw.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n")
    with pytest.raises(ValueError, match="lfw.bin cannot be read as a benchmark: .*git lfs pull"):
        read_benchmark(tmp_path / "lfw.bin")
