"""Parquet, LMDB and zip: what others wrote is read, converted and read again; hostile and damaged files are named."""

import io
import json
import os
import pickle
import random
import shutil
import struct
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from written_files import FORMS, lmdb, msgpack, needs_lmdb, picture, write, write_records, write_tar

from uiface_diffusers import cli
from uiface_diffusers.data import convert_dataset
from uiface_diffusers.data.lmdb_file import iterate_records
from uiface_diffusers.data.sources import open_faces, open_source, source_fingerprint, summarize_left_out

# identity -> its pictures' files, of several kinds
PEOPLE = {
    "Anna Lee": [picture(1), picture(2, "jpeg"), picture(3, "webp")],
    "Bért": [picture(4), picture(5, size=200)],
    "Carl": [picture(6)],
}
EXPECTED = Counter((name, content) for name, contents in PEOPLE.items() for content in contents)
ROWS = [(name, content) for name, contents in PEOPLE.items() for content in contents]
LABELS = {name: label for label, name in enumerate(PEOPLE)}
NUMBERED = Counter((f"{LABELS[name]:07d}", content) for name, content in ROWS)


def contents(path: Path) -> Counter:
    source = open_source(path)
    return Counter((photograph.identity, source.content(photograph)) for photograph in source.photographs)


def left_out(path: Path) -> dict[str, int]:
    return {reason: entry["count"] for reason, entry in summarize_left_out(open_source(path).left_out).items()}


def write_parquet(path: Path, labels: list, images: list | None = None, column: str = "label", **options) -> Path:
    """By pyarrow alone, as `datasets` writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": content, "path": None} for _, content in ROWS] if images is None else images
    table = pa.table({"image": images, column: labels})
    names = options.pop("names", None)
    if names is not None:
        features = {"image": {"_type": "Image"}, column: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, **options)
    return path


def write_zip(path: Path, members: list[tuple[str | zipfile.ZipInfo, bytes]], method=zipfile.ZIP_DEFLATED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def write_lmdb(path: Path, records: dict[bytes, bytes], subdir: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), subdir=subdir, map_size=2**28) as environment, environment.begin(write=True) as writing:
        for key, value in records.items():
            writing.put(key, value)
    return path


def packed(dumps, values: list, keys=None, **more: int) -> dict[bytes, bytes]:
    """What imagelist2lmdb.py and folder2lmdb.py write: keys `0`, `1`, ... and their list."""
    keys = [str(number).encode() for number in range(len(values))] if keys is None else keys
    records = {key: dumps(value) for key, value in zip(keys, values, strict=True)}
    records |= {b"__keys__": dumps(keys), b"__len__": dumps(len(keys))}
    return records | {f"__{name}__".encode(): dumps(value) for name, value in more.items()}


def people_in(form: str, root: Path) -> tuple[Path, Counter]:
    """The same people in a form, by code that is not the package's; and who they are there."""
    if form == "parquet":
        for number, half in enumerate((ROWS[:4], ROWS[4:])):
            images = [{"bytes": content, "path": None} for _, content in half]
            labels = [LABELS[name] for name, _ in half]
            write_parquet(root / "data" / f"train-0000{number}-of-00002.parquet", labels, images, names=list(PEOPLE))
        return root, EXPECTED
    if form == "lmdb":
        write_lmdb(root / "set.lmdb", packed(msgpack.dumps, [(content, LABELS[name]) for name, content in ROWS]))
        return root / "set.lmdb", NUMBERED
    members = [(f"{name}/{number}.png", content) for number, (name, content) in enumerate(ROWS)]
    if form == "zip":
        return write_zip(root / "set.zip", [(f"set/{name}", content) for name, content in members]), EXPECTED
    if form == "webdataset":
        return write_tar(root / "0.tar", members), EXPECTED
    if form == "recordio":
        return write_records(root / "train.rec", [0, 0, 1, 2, 2, 2]), contents(root)
    return write(root, dict(members)), EXPECTED


@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("first", FORMS)
def test_a_set_of_others_is_read_converted_and_read_again(tmp_path, first, second):
    path, expected = people_in(first, tmp_path / "theirs")
    assert contents(path) == expected and left_out(path) == {}
    report = convert_dataset(path, tmp_path / "ours", second)
    assert report == {"photographs": 6, "identities": 3, "left_out": {}}
    assert contents(tmp_path / "ours") == expected
    assert sorted(os.listdir(tmp_path)) == ["ours", "theirs"]


def test_parquet_is_what_datasets_reads(tmp_path):
    datasets = pytest.importorskip("datasets")
    source, _ = people_in("imagefolder", tmp_path / "people")
    cli.main(["convert", str(source), str(tmp_path / "set"), "--format", "parquet"])
    assert os.listdir(tmp_path / "set" / "data") == ["train-00000-of-00001.parquet"]
    rows = datasets.load_dataset(str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(rows.features["image"], datasets.Image) and rows[0]["image"].size == (8, 8)
    undecoded = rows.cast_column("image", datasets.Image(decode=False))
    assert Counter((row["identity"], row["image"]["bytes"]) for row in undecoded) == EXPECTED
    assert rows["label"] == [LABELS[name] for name in rows["identity"]]
    # and what `datasets` writes is read, with the names of its labels and its pictures
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(PEOPLE))})
    made = {
        "image": [{"bytes": content, "path": f"{number}.png"} for number, (_, content) in enumerate(ROWS)],
        "label": [LABELS[name] for name, _ in ROWS],
    }
    datasets.Dataset.from_dict(made, features).to_parquet(tmp_path / "theirs.parquet")
    assert contents(tmp_path / "theirs.parquet") == EXPECTED
    convert_dataset(tmp_path / "theirs.parquet", tmp_path / "folders", "imagefolder")
    assert sorted(os.listdir(tmp_path / "folders" / "Anna Lee")) == ["0.png", "1.jpg", "2.webp"]


def test_parquet_columns_of_several_kinds(tmp_path):
    names, label_numbers = [name for name, _ in ROWS], [LABELS[name] for name, _ in ROWS]
    write_parquet(tmp_path / "text.parquet", names, column="identity")
    write_parquet(tmp_path / "coded.parquet", pa.array(names).dictionary_encode(), column="person")
    write_parquet(tmp_path / "bytes.parquet", names, [content for _, content in ROWS], column="class")
    write_parquet(tmp_path / "large.parquet", pa.array(names, pa.large_string()))
    for file in ("text", "coded", "bytes", "large"):
        assert contents(tmp_path / f"{file}.parquet") == EXPECTED
    write_parquet(tmp_path / "number.parquet", pa.array(label_numbers, pa.uint16()), column="cls")
    assert contents(tmp_path / "number.parquet") == NUMBERED
    # a column of another name that `datasets` says has classes, pictures of another name
    write_parquet(tmp_path / "other.parquet", label_numbers, column="who", names=list(PEOPLE))
    table = pq.read_table(tmp_path / "other.parquet")
    renamed = table.rename_columns(["face", "who"]).replace_schema_metadata(table.schema.metadata)
    pq.write_table(renamed, tmp_path / "other.parquet")
    assert contents(tmp_path / "other.parquet") == EXPECTED


def test_rows_without_a_picture_or_an_identity_are_counted(tmp_path, capsys):
    images = [{"bytes": content, "path": "a.png"} for _, content in ROWS]
    images[1] = {"bytes": None, "path": "/home/somebody/a.png"}
    images[2] = None
    write_parquet(tmp_path / "a.parquet", [0, 0, 0, None, -1, 7], images, names=list(PEOPLE))
    assert left_out(tmp_path / "a.parquet") == {"without an identity": 2, "a label without a name": 1}
    report = convert_dataset(tmp_path / "a.parquet", tmp_path / "out", "imagefolder")
    assert report["photographs"] == 1 and report["left_out"]["unreadable"]["count"] == 2
    # other splits, and what lies beside
    for split in ("train", "test"):
        write_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet", [1] * 6)
    write(tmp_path / "hub", {"README.md": b"a card", "data/notes.txt": b""})
    assert contents(tmp_path / "hub").total() == 6
    expected = {"data/notes.txt", "data/test-00000-of-00001.parquet"}  # the card is not lost
    assert set(open_source(tmp_path / "hub").left_out) == expected


def test_parquet_reads_any_row_with_bounded_memory(tmp_path):
    """2,000 pictures of 50 kB in one group of rows, in any order: a few of them are in memory at a time."""
    generator = np.random.default_rng(0)
    images = [{"bytes": generator.bytes(50_000), "path": None} for _ in range(2000)]
    labels, options = [row // 20 for row in range(2000)], {"row_group_size": 2000, "write_batch_size": 16}
    write_parquet(tmp_path / "a.parquet", labels, images, **options)
    wanted = [image["bytes"] for image in images]
    before = pa.total_allocated_bytes()
    source = open_source(tmp_path / "a.parquet")
    most = 0
    for row in [*range(0, 2000, 7), 1999, 3, 1500, 1501, 40]:
        assert source.content(source.photographs[row]) == wanted[row]
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 20_000_000
    again = pickle.loads(pickle.dumps(source))
    assert again.content(again.photographs[5]) == wanted[5]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"picture": [b"1"], "label": [1]},
            r"a.parquet has no column `image` of pictures' files .*picture \(binary\)",
        ),
        ({"image": [{"bytes": b"1"}], "text": ["a"]}, "no column that says whose pictures these are, such as `identi"),
        ({"image": [{"bytes": b"1"}], "label": [1.5]}, "column `label` of .* is double: identities are whole numbers"),
        ({"image": [{"bytes": b"1"}], "label": [[1]]}, "column `label` of .* is list"),
    ],
)
def test_parquet_without_the_columns_is_named(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    for path in (tmp_path / "a.parquet", tmp_path):
        with pytest.raises(ValueError, match=message):
            open_source(path)


def test_damaged_and_mixed_parquet_is_named(tmp_path):
    write_parquet(tmp_path / "mixed" / "a.parquet", [0] * 6)
    write_parquet(tmp_path / "mixed" / "b.parquet", ["anna"] * 6)
    with pytest.raises(ValueError, match="`label` of a.parquet and `label` of b.parquet are of different types"):
        open_source(tmp_path / "mixed")
    write_parquet(tmp_path / "mixed" / "b.parquet", [0] * 6, names=["anna"])
    with pytest.raises(ValueError, match="have different names of labels"):
        open_source(tmp_path / "mixed")
    write_parquet(tmp_path / "twice.parquet", [0, 1] * 3, names=["anna", "anna"])
    with pytest.raises(ValueError, match="two labels of one name"):
        open_source(tmp_path / "twice.parquet")
    cut = write_parquet(tmp_path / "cut.parquet", [0] * 6)
    cut.write_bytes(cut.read_bytes()[:-30])
    for path in (cut, tmp_path / "mixed"):
        with pytest.raises(ValueError, match="no parquet file: .*cut.parquet is damaged, cut short|different"):
            open_source(path)
    (tmp_path / "mixed" / "b.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="b.parquet is a Git LFS pointer"):
        open_source(tmp_path / "mixed")
    for split in ("val", "test"):
        write_parquet(tmp_path / "hub" / f"{split}-00000-of-00001.parquet", [1] * 6)
    with pytest.raises(ValueError, match="parquet files of several splits, test-.*, val-.*: give the file or folder"):
        open_source(tmp_path / "hub")
    broken = write_parquet(tmp_path / "broken.parquet", [0] * 6, compression="none", use_dictionary=False)
    source, content = open_source(broken), bytearray(broken.read_bytes())
    place = content.index(ROWS[3][1]) - 4  # the length of a picture
    content[place : place + 4] = b"\xff\xff\xff\x7f"
    broken.write_bytes(content)
    with pytest.raises(OSError, match="row 3 of .*broken.parquet cannot be read"):
        source.content(source.photographs[3])


def test_a_table_beside_folders_of_pictures_is_no_set(tmp_path):
    write(tmp_path, {"anna/a.png": picture()})
    pq.write_table(pa.table({"file": ["anna/a.png"]}), tmp_path / "list.parquet")
    assert set(open_source(tmp_path).left_out) == {"list.parquet"}
    write_parquet(tmp_path / "a.parquet", [0] * 6)
    with pytest.raises(ValueError, match="a.parquet, and pictures in folders, such as anna/a.png: only one"):
        open_source(tmp_path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("top", ["", "set/", "a/b/"])
def test_zip_as_people_pack_it(tmp_path, method, top):
    """With one folder around or without, what systems add, folders of their own entries, members of one name."""
    members = [(f"{top}{name}/{number}.png", content) for number, (name, content) in enumerate(ROWS)]
    extra = [(f"{top}Carl/", b""), (f"__MACOSX/{top}Carl/._5.png", b"x"), (f"{top}Carl/notes.txt", b"x")]
    if top == "a/b/":  # two folders around: what is directly in the first may be a part of the set
        with pytest.raises(ValueError, match="no pictures directly in its folders.*PART/PERSON, unpack it and give b"):
            open_source(write_zip(tmp_path / "set.zip", members, method))
        return
    with pytest.warns(UserWarning, match="Duplicate name"):
        write_zip(tmp_path / "set.zip", [(members[0][0], b"earlier"), *members, *extra], method)
    for path in (tmp_path / "set.zip", tmp_path):
        assert contents(path) == EXPECTED
        assert left_out(path) == {
            "hidden or system file": 1,
            "not an image by its suffix": 1,
            "replaced by a later file of the same name": 1,
        }


def test_a_zip_is_read_as_the_folder_that_it_unpacks_to(tmp_path):
    """Pictures at two depths: a person with a folder, or a folder of people with a preview."""
    person = [("anna/1.png", picture(1)), ("anna/video/2.png", picture(2))]
    for each in (write_zip(tmp_path / "person.zip", person), write(tmp_path / "person", dict(person))):
        assert contents(each) == {("anna", picture(1)): 1, ("anna", picture(2)): 1}
    set_ = [("set/preview.png", picture(0)), ("set/anna/1.png", picture(1)), ("set/bert/1.png", picture(2))]
    people = {("anna", picture(1)): 1, ("bert", picture(2)): 1}
    archive = write_zip(tmp_path / "set.zip", set_)
    assert contents(archive) == people and left_out(archive) == {"in no identity's folder": 1}
    folder = write(tmp_path / "around", dict(set_))
    message = "one folder, set, with pictures in it and in 2 folders within, such as set/anna. .*, give .*around/set. "
    with pytest.raises(ValueError, match=message):
        open_source(folder)
    assert contents(folder / "set") == people and left_out(folder / "set") == {"in no identity's folder": 1}
    # what the message advises for the other case, of either
    for each in (archive, folder):
        words = ["convert", str(each), str(tmp_path / f"{each.name}-flat"), "--format", "imagefolder", "--nested"]
        cli.main(words)
        assert Counter(name for name, _ in contents(Path(words[2])).elements()) == {"set": 3}


@pytest.mark.parametrize("form", FORMS)
def test_a_preview_beside_a_set_is_not_the_set(tmp_path, form):
    faces = write(tmp_path / "faces", {f"{name}/{number}.png": picture(number) for name in "ab" for number in (1, 2)})
    convert_dataset(faces, tmp_path / "set", form)
    for file in (tmp_path / "set").rglob("*.parquet"):
        file.rename(tmp_path / "set" / "train.parquet")
    shutil.rmtree(tmp_path / "set" / "data", ignore_errors=True)
    (tmp_path / "set" / "preview.png").write_bytes(picture(9))
    source = open_faces(tmp_path / "set")
    assert len(source.photographs) == 4 and list(source.left_out) == ["preview.png"]


def test_a_table_beside_pictures_is_no_set(tmp_path):
    write(tmp_path, {"0.png": picture(1), "1.png": picture(2)})
    pq.write_table(pa.table({"file": ["0.png"]}), tmp_path / "list.parquet")
    source = open_faces(tmp_path)
    assert len(source.photographs) == 2 and list(source.left_out) == ["list.parquet"]


def test_zip_of_videos_and_of_several_archives(tmp_path):
    videos = [(f"{person}/{video}/{video}.png", picture(video)) for person in "ab" for video in (1, 2)]
    with pytest.raises(ValueError, match="--format imagefolder --nested"):
        open_source(write_zip(tmp_path / "videos.zip", videos))
    arguments = ["convert", str(tmp_path / "videos.zip"), str(tmp_path / "flat"), "--format", "imagefolder"]
    cli.main([*arguments, "--nested"])
    assert Counter(name for name, _ in contents(tmp_path / "flat").elements()) == {"a": 2, "b": 2}
    write_zip(tmp_path / "parts" / "0.zip", [("0/a.png", picture(1))])
    write_zip(tmp_path / "parts" / "1.zip", [("1/a.png", picture(2))])
    assert contents(tmp_path / "parts") == {("0", picture(1)): 1, ("1", picture(2)): 1}
    write_zip(tmp_path / "parts" / "2.zip", [("1/b.png", picture(3))])
    with pytest.raises(ValueError, match="1.zip and 2.zip both have an identity '1': it may be two people"):
        open_source(tmp_path / "parts")


@pytest.mark.parametrize("name", ["../a.png", "set/../../a.png", "/etc/a.png", "C:\\a\\b.png", "..\\a\\b.png"])
def test_names_that_lead_out_of_a_zip_are_refused(tmp_path, name):
    write_zip(tmp_path / "set.zip", [("anna/a.png", picture()), (zipfile.ZipInfo(name), picture())])
    with pytest.raises(SystemExit, match="set.zip has a member '.*', which leads out of its folder: a hostile"):
        cli.main(["convert", str(tmp_path / "set.zip"), str(tmp_path / "out"), "--format", "imagefolder"])
    assert os.listdir(tmp_path) == ["set.zip"]


def test_links_bombs_and_damage_in_a_zip(tmp_path):
    link = zipfile.ZipInfo("anna/link.png")
    link.external_attr = 0o120777 << 16
    bomb = write_zip(tmp_path / "set.zip", [("anna/a.png", picture()), (link, b"/etc/passwd"), ("anna/b.png", b"0")])
    content = bytearray(bomb.read_bytes())
    place = content.rindex(b"anna/b.png") - 46  # of the last entry of the directory: it says 4 GB
    struct.pack_into("<I", content, place + 24, 2**32 - 2)
    bomb.write_bytes(content)
    assert left_out(bomb) == {"a link or a special file": 1, f"of more than {2**28} bytes": 1}
    # more than it says: no more than that is unpacked
    members = [("anna/a.png", bytes(10**7)), ("anna/b.png", picture())]
    small = bytearray(write_zip(tmp_path / "small.zip", members).read_bytes())
    struct.pack_into("<I", small, small.rindex(b"anna/a.png") - 46 + 24, 100)
    (tmp_path / "small.zip").write_bytes(small)
    source = open_source(tmp_path / "small.zip")
    with pytest.raises(OSError, match="anna/a.png is damaged"):
        source.content(source.photographs[0])
    assert source.content(source.photographs[1]) == picture()
    # members within each other
    overlapping = bytearray(write_zip(tmp_path / "overlapping.zip", [(f"anna/{n}.png", picture()) for n in "ab"],
                                      zipfile.ZIP_STORED).read_bytes())  # fmt: skip
    struct.pack_into("<I", overlapping, overlapping.rindex(b"anna/b.png") - 46 + 20, 10**6)
    (tmp_path / "overlapping.zip").write_bytes(overlapping)
    with pytest.raises(ValueError, match="overlapping.zip has members that lie within each other"):
        open_source(tmp_path / "overlapping.zip")
    # a picture's own bytes, and the end of the file
    damaged = bytearray(write_zip(tmp_path / "damaged.zip", members, zipfile.ZIP_STORED).read_bytes())
    damaged[damaged.index(picture()) + 20] ^= 1
    (tmp_path / "damaged.zip").write_bytes(damaged)
    report = convert_dataset(tmp_path / "damaged.zip", tmp_path / "out", "imagefolder")
    assert report["photographs"] == 1 and report["left_out"] == {
        "unreadable": {"count": 1, "first": ["damaged.zip:anna/b.png"]}
    }
    (tmp_path / "damaged.zip").write_bytes(damaged[:-40])
    with pytest.raises(ValueError, match="no zip archive: .*damaged.zip is damaged or cut short"):
        open_source(tmp_path / "damaged.zip")
    with pytest.raises(ValueError, match="no zip archive: .*empty.zip is empty"):
        open_source(write(tmp_path, {"empty.zip": b""}) / "empty.zip")


@needs_lmdb
@pytest.mark.parametrize("subdir", [False, True])
@pytest.mark.parametrize("form", ["msgpack", "old msgpack", "feature", "landmarks", "pickle 0", "pickle 4", "numpy"])
def test_lmdb_as_others_write_it(tmp_path, subdir, form):
    """imagelist2lmdb.py of SOTA-Face-Recognition-Train-and-Test, prepare_training_set.py of Vec2Face and Vec2Face+,
    and folder2lmdb.py with pickles."""
    values: list = [(content, LABELS[name]) for name, content in ROWS]
    feature = io.BytesIO()
    np.save(feature, np.arange(512, dtype=np.float32))

    def dumps(value):
        if form.startswith("pickle"):
            return pickle.dumps(value, int(form[-1]))
        return pickle.dumps(value) if form == "numpy" else msgpack.dumps(value, use_bin_type=form != "old msgpack")

    if form in ("feature", "landmarks"):
        values = [(content, feature.getvalue(), label) for content, label in values]
    if form == "landmarks":
        values = [(*value, picture(9)) for value in values]
    if form == "numpy":
        values = [(np.frombuffer(content, np.uint8), np.int64(label)) for content, label in values]
    path = write_lmdb(tmp_path / "set.lmdb", packed(dumps, values, classnum=3), subdir)
    for each in (path, tmp_path):
        assert contents(each) == NUMBERED and left_out(each) == {}
    source = open_source(path)
    assert [photograph.file for photograph in source.photographs] == [str(number) for number in range(6)]
    again = pickle.loads(pickle.dumps(source))
    assert again.content(again.photographs[3]) == ROWS[3][1]


@needs_lmdb
def test_lmdb_pages_of_all_kinds(tmp_path):
    """Keys of several lengths, values within a page and of many pages, records that were deleted and written again."""
    generator = random.Random(0)
    records: dict[bytes, bytes] = {}
    environment = lmdb.open(str(tmp_path / "set.lmdb"), subdir=False, map_size=2**28)
    for _ in range(3):
        with environment.begin(write=True) as writing:
            for _ in range(1000):
                key = generator.randbytes(generator.choice([1, 8, 200, 511]))
                value = generator.randbytes(generator.choice([0, 1, 50, 2000, 4080, 5000, 30_000]))
                records[key] = value
                writing.put(key, value)
            for key in generator.sample(sorted(records), 300):
                del records[key]
                writing.delete(key)
    environment.close()
    content = (tmp_path / "set.lmdb").read_bytes()
    found = [
        (each.key, content[each.offset : each.offset + each.size]) for each in iterate_records(tmp_path / "set.lmdb")
    ]
    assert found == sorted(records.items())
    write_lmdb(tmp_path / "empty.lmdb", {})
    assert list(iterate_records(tmp_path / "empty.lmdb")) == []
    with pytest.raises(ValueError, match="empty.lmdb has no photographs"):
        open_source(tmp_path / "empty.lmdb")


@needs_lmdb
def test_the_loaders_of_the_field_read_our_lmdb(tmp_path):
    source, _ = people_in("imagefolder", tmp_path / "people")
    cli.main(["convert", str(source), str(tmp_path / "set"), "--format", "lmdb"])
    assert sorted(os.listdir(tmp_path / "set")) == ["README.md", "train.lmdb"]
    environment = lmdb.open(str(tmp_path / "set" / "train.lmdb"), subdir=False, readonly=True, lock=False)
    with environment.begin() as reading:
        length, keys, classes = (msgpack.loads(reading.get(key)) for key in (b"__len__", b"__keys__", b"__classnum__"))
        values = [msgpack.loads(reading.get(key)) for key in keys]
    environment.close()
    assert (length, classes, keys) == (6, 3, [str(number).encode() for number in range(6)])
    assert Counter((content, label) for content, label in values) == Counter(
        (content, LABELS[name]) for name, content in ROWS
    )


class Call:
    def __init__(self, function, argument):
        self.reduced = function, (argument,)

    def __reduce__(self):
        return self.reduced


@needs_lmdb
@pytest.mark.parametrize("place", ["keys", "len", "value", "label"])
def test_hostile_pickles_in_lmdb_execute_nothing(tmp_path, place):
    command = Call(os.system, f"touch {tmp_path / 'executed'}")
    records = packed(pickle.dumps, [(picture(1), 0), (picture(2), 1)])
    key = {"keys": b"__keys__", "len": b"__len__"}.get(place, b"1")
    records[key] = pickle.dumps((picture(2), command) if place == "label" else command)
    path = write_lmdb(tmp_path / "set.lmdb", records)
    with pytest.raises(ValueError, match=r"set.lmdb, key .*`posix.system`.*not executed"):
        open_source(path)
    assert not (tmp_path / "executed").exists()


@needs_lmdb
def test_what_is_wrong_in_lmdb_is_counted_or_named(tmp_path):
    def opened(name: str, records: dict[bytes, bytes]):
        return open_source(write_lmdb(tmp_path / f"{name}.lmdb", records))

    values = [(picture(1), 0), (picture(2), -1), ("text", 1), (picture(3), 1)]
    records = packed(pickle.dumps, values) | {b"3": b"damaged", b"7": pickle.dumps(values[0])}
    records[b"__keys__"] = pickle.dumps([b"0", b"1", b"2", b"3", b"5"])
    records[b"__len__"] = pickle.dumps(5)
    assert opened("counted", records).left_out == {
        "1": "without a label",
        "2": "a record that is no picture and label (an image is str, not bytes)",
        "3": "a record that is no picture and label (neither MessagePack nor a pickle of plain data)",
        "5": "in __keys__, but without a record",
        "7": "a record that is not in __keys__",
    }
    # no list of keys: in the order of their numbers
    values = [(picture(number), number) for number in range(12)]
    source = opened("unlisted", {str(n).encode(): msgpack.dumps(value) for n, value in enumerate(values)})
    assert [photograph.identity for photograph in source.photographs] == [f"{number:07d}" for number in range(12)]
    named = opened("text", packed(msgpack.dumps, [(picture(1), "anna"), (picture(2), "bert/carl")]))
    assert [photograph.identity for photograph in named.photographs] == ["anna", "bert/carl"]
    convert_dataset(tmp_path / "text.lmdb", tmp_path / "folders", "imagefolder")
    assert sorted(os.listdir(tmp_path / "folders")) == ["README.md", "anna", "bert_carl"]
    wrong = {
        "mixed": (packed(pickle.dumps, [(picture(1), 0), (picture(2), "0")]), "labels in .* are numbers and text"),
        "shorter": (packed(msgpack.dumps, values) | {b"__len__": msgpack.dumps(13)}, "has 12 keys, .*__len__ says 13"),
        "twice": (packed(msgpack.dumps, values) | {b"__keys__": msgpack.dumps([b"0"] * 12)}, "has a key twice"),
        "no_list": (packed(pickle.dumps, values) | {b"__keys__": pickle.dumps({b"0": 1})}, "is dict, not a list"),
        "float": (packed(msgpack.dumps, [(picture(1), 0.5)]), "its label is float, neither a whole number nor text"),
        "same": (packed(msgpack.dumps, [(picture(1), "a/b"), (picture(2), "a_b")]), None),
    }
    for name, (content, message) in wrong.items():
        if message is not None:
            with pytest.raises(ValueError, match=message):
                opened(name, content)
        else:
            opened(name, content)
            with pytest.raises(ValueError, match="two identities would share the folder 'a_b'"):
                convert_dataset(tmp_path / f"{name}.lmdb", tmp_path / "out", "zip")
    with pytest.raises(ValueError, match="has .* LMDB sets, .*, whose labels count their own people: name one"):
        open_source(tmp_path)


@needs_lmdb
def test_damaged_lmdb_is_an_error_at_any_place(tmp_path):
    """Cut short at each page, and with any byte changed: nothing but `ValueError`, or the same labels as before."""
    values = [(picture(number % 250, size=60), number // 3) for number in range(300)]
    path = write_lmdb(tmp_path / "whole.lmdb", packed(msgpack.dumps, values))
    content, generator = path.read_bytes(), random.Random(0)
    damaged = tmp_path / "damaged.lmdb"
    for end in [*range(0, len(content), 4096 * 5), 100, len(content) - 4096]:
        damaged.write_bytes(content[:end])
        with pytest.raises(ValueError, match="no LMDB file: .*damaged.lmdb is (empty|damaged, cut short)"):
            open_source(damaged)
    refused = 0
    for _ in range(60):
        changed = bytearray(content)
        for _ in range(20):
            page = generator.randrange(len(content) // 4096)
            changed[page * 4096 + generator.randrange(64)] = generator.randrange(256)
        damaged.write_bytes(changed)
        try:
            source = open_source(damaged)
            for photograph in source.photographs:
                source.content(photograph)
        except (ValueError, OSError):
            refused += 1
    assert refused > 30


@pytest.mark.skipif(lmdb is not None, reason="the package lmdb is there")
def test_writing_lmdb_says_what_it_needs(tmp_path):
    write(tmp_path / "people", {"anna/a.png": picture()})
    with pytest.raises(SystemExit, match="uiface convert: writing LMDB needs the package `lmdb`: pip install"):
        cli.main(["convert", str(tmp_path / "people"), str(tmp_path / "out"), "--format", "lmdb"])
    assert os.listdir(tmp_path) == ["people"]


@pytest.mark.parametrize("form", [param for param in FORMS if param.values[0] in ("parquet", "lmdb", "zip")])
def test_other_contents_are_another_fingerprint(tmp_path, form):
    path, _ = people_in(form, tmp_path / "set")
    before = source_fingerprint(open_source(path))
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    assert source_fingerprint(open_source(tmp_path / "copy" / path.relative_to(tmp_path / "set"))) == before
    changed = picture(7, size=31)
    shutil.rmtree(tmp_path / "set")
    original, ROWS[2] = ROWS[2], (ROWS[2][0], changed)
    try:
        people_in(form, tmp_path / "set")
    finally:
        ROWS[2] = original
    assert source_fingerprint(open_source(path)) != before


def test_a_hundred_thousand_rows_are_indexed_without_their_pictures(tmp_path):
    """An index of 100,000 rows of 2 kB: far less memory than the 200 MB of the pictures."""
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())])
    generator = np.random.default_rng(0)
    with pq.ParquetWriter(tmp_path / "a.parquet", schema, compression="none") as writer:
        for start in range(0, 100_000, 10_000):
            data = generator.bytes(10_000 * 2000)
            images = [{"bytes": data[n * 2000 : (n + 1) * 2000], "path": None} for n in range(10_000)]
            rows = {"image": images, "label": [(start + n) // 20 for n in range(10_000)]}
            writer.write_table(pa.table(rows, schema))
    del data, images, rows
    most = pa.default_memory_pool().max_memory() if sys.platform == "linux" else 0
    before = pa.total_allocated_bytes()
    source = open_source(tmp_path / "a.parquet")
    assert len(source.photographs) == 100_000 and len(source.content(source.photographs[77_777])) == 2000
    assert pa.total_allocated_bytes() - before < 10_000_000 and pa.default_memory_pool().max_memory() == most
