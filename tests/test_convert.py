"""`uiface convert`: the same pictures of the same people in another form."""

import os
import struct
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import webdataset
from filelock import FileLock
from records import MAGIC
from written_files import FORMS, POINTER, picture, write, write_faces, write_tar

from uiface_diffusers import cli
from uiface_diffusers.data import convert_dataset
from uiface_diffusers.data.convert import MARKER
from uiface_diffusers.data.recordio import RecordReader
from uiface_diffusers.data.sources import open_source, source_fingerprint
from uiface_diffusers.hub.lineage import read_header


def contents(path: Path) -> Counter:
    """How often each picture's bytes are there of each identity."""
    source = open_source(path)
    return Counter((photograph.identity, source.content(photograph)) for photograph in source.photographs)


@pytest.fixture
def people(tmp_path) -> Path:
    """Names with blanks and dots, pictures of several kinds, one nested, one cut by a record's magic number."""
    pictures = {"Anna Lee/J.R._0001.jpg": picture(1, "jpeg"), "Anna Lee/J.R._0002.jpg": picture(2, "jpeg")}
    pictures |= {"Anna Lee/a.png": picture(3), "Anna Lee/a.webp": picture(4, "webp"), "Bért/s/1.png": picture(5)}
    pictures |= {"Bért/2.png": picture(6) + MAGIC + MAGIC, "Carl/1.gif": picture(7, "gif"), "Carl/notes.txt": b""}
    return write(tmp_path / "people", pictures)


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("second", FORMS)
def test_nothing_changes_on_the_way(people, tmp_path, first, second):
    expected = contents(people)
    report = convert_dataset(people, tmp_path / "first", first)
    assert report == {
        "photographs": 7,
        "identities": 3,
        "left_out": {"not an image by its suffix": {"count": 1, "first": ["Carl/notes.txt"]}},
    }
    assert convert_dataset(tmp_path / "first", tmp_path / "second", second) == {**report, "left_out": {}}
    assert contents(tmp_path / "first") == contents(tmp_path / "second") == expected
    assert sorted(os.listdir(tmp_path)) == ["first", "people", "second"]


CARD = """---
license: cc-by-nc-4.0
size_categories: [n<1K]
configs: [{config_name: default, data_files: images/**}]
lineage:
  generator: {name: org/model, license: other}
  leakage_audit: {against: photos}
---
Mine.
"""


@pytest.mark.parametrize("form", FORMS)
def test_the_card_goes_along(people, tmp_path, form, capsys):
    (people / "README.md").write_text(CARD)
    cli.main(["convert", str(people), str(tmp_path / "first"), "--format", form])
    cli.main(["convert", str(tmp_path / "first"), str(tmp_path / "second"), "--format", "imagefolder"])
    assert "README" not in capsys.readouterr().out  # it is no picture that was lost
    header = read_header(tmp_path / "second" / "README.md")
    assert header.keys() == {"license", "lineage"} and header["license"] == "cc-by-nc-4.0"
    steps = header["lineage"].pop("derived_from")
    assert header["lineage"] == {
        "generator": {"name": "org/model", "license": "other"},
        "leakage_audit": {"against": "photos"},
    }
    assert [(step["name"], step["by"], step["images"], step["identities"]) for step in steps] == [
        ("people", f"uiface convert --format {form}", 7, 3),
        ("first", "uiface convert --format imagefolder", 7, 3),
    ]
    assert steps[0]["fingerprint"] == source_fingerprint(open_source(people))[:12]
    cli.main(["card", str(tmp_path / "second")])
    printed = capsys.readouterr().out
    assert "made from: {name: people, " in printed and "lineage.generator.name: org/model" in printed


def test_a_card_that_is_no_yaml_is_named_before_the_work(people, tmp_path):
    (people / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(SystemExit, match="the header of .*README.md, between the lines ---, is no YAML"):
        cli.main(["convert", str(people), str(tmp_path / "first"), "--format", "zip"])
    assert sorted(os.listdir(tmp_path)) == ["people"]


def test_insightface_reads_the_records(people, tmp_path):
    """Record 0, keys from 1 on, one float label each, and the identities' ranges behind them."""
    convert_dataset(people, tmp_path / "set", "recordio")
    reader = RecordReader(tmp_path / "set" / "train.rec")
    first = reader.read_image(0)
    assert first.labels.tolist() == [8.0, 11.0] and first.content == b"" and reader.keys == list(range(11))
    assert reader.image_keys() == list(range(1, 8))
    assert [reader.read_image(key).labels.tolist() for key in range(1, 8)] == [[0], [0], [0], [0], [1], [1], [2]]
    assert [reader.read_image(key).labels.tolist() for key in (8, 9, 10)] == [[1, 5], [5, 7], [7, 8]]
    assert all(struct.unpack_from("<I", reader.read(key))[0] == 0 for key in range(1, 8))  # a number, no array
    (tmp_path / "set" / "train.idx").unlink()
    assert RecordReader(tmp_path / "set" / "train.rec").image_keys() == [1, 2, 3, 4, 5, 6, 7]


def test_webdataset_reads_the_shards(people, tmp_path):
    convert_dataset(people, tmp_path / "set", "webdataset")
    samples = list(webdataset.WebDataset(str(tmp_path / "set" / "000000.tar"), shardshuffle=False))
    pictures = [
        next(value for name, value in sample.items() if name[0] != "_" and name != "cls") for sample in samples
    ]
    assert len(samples) == 7 and all("cls" in sample and len(sample) == 5 for sample in samples)
    people = ["Anna Lee", "Bért", "Carl"]
    found = Counter((people[int(sample["cls"])], data) for sample, data in zip(samples, pictures, strict=True))
    assert found == contents(tmp_path / "set")


def test_labels_of_records_are_kept(tmp_path):
    write_faces(tmp_path / "train.rec", label_arrays=False)
    cli.main(["convert", str(tmp_path / "train.rec"), str(tmp_path / "folders"), "--format", "imagefolder"])
    assert sorted(os.listdir(tmp_path / "folders")) == ["0000000", "0000001", "0000002", "README.md"]
    assert os.listdir(tmp_path / "folders" / "0000002") != [] and contents(tmp_path / "folders").total() == 6
    for name in ("0000000", "0000001"):
        (tmp_path / "folders" / name).rename(tmp_path / "folders" / f"{int(name) + 10:07d}")
    convert_dataset(tmp_path / "folders", tmp_path / "set", "recordio")
    reader = RecordReader(tmp_path / "set" / "train.rec")
    assert sorted({reader.read_image(key).labels[0] for key in reader.image_keys()}) == [2, 10, 11]


@pytest.mark.parametrize("form", FORMS)
def test_files_of_one_name_stay_apart(tmp_path, form):
    shards = [[("a/1.png", picture(1)), ("a/1.cls", b"3")], [("b/1.png", picture(2)), ("b/1.cls", b"3")]]
    shards.append([("c/1.png", picture(3)), ("c/1.cls", b"4"), ("c/1.jpg", picture(4, "jpeg"))])
    for number, members in enumerate(shards):
        write_tar(tmp_path / "tar" / f"{number}.tar", members)
    expected = contents(tmp_path / "tar")
    assert {identity for identity, _ in expected} == {"3", "4"}
    convert_dataset(tmp_path / "tar", tmp_path / form, form)
    assert contents(tmp_path / form) == expected


def test_all_or_nothing(people, tmp_path, monkeypatch):
    output = tmp_path / "set"
    opened = tarfile.open

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(tarfile, "open", fail)
    with pytest.raises(KeyboardInterrupt):
        convert_dataset(people, output, "webdataset")
    monkeypatch.setattr(tarfile, "open", opened)
    assert sorted(os.listdir(tmp_path)) == ["people"]
    # what a kill leaves is replaced, what is somebody's is not
    write(tmp_path / "set.part", {MARKER: b"", "anna/half.png": b""})
    output.mkdir()
    convert_dataset(people, output, "imagefolder")
    assert (
        sorted(os.listdir(output)) == ["Anna Lee", "Bért", "Carl", "README.md"]
        and not (tmp_path / "set.part").exists()
    )
    for given, message in ((output, "set is not empty"), (people / "within", "lies within")):
        with pytest.raises(ValueError, match=message):
            convert_dataset(people, given, "imagefolder")
    write(tmp_path / "new.part", {"mine.txt": b""})
    with pytest.raises(SystemExit, match="uiface convert: .*new.part is in the way"):
        cli.main(["convert", str(people), str(tmp_path / "new"), "--format", "imagefolder"])
    assert (tmp_path / "new.part" / "mine.txt").exists()


def test_outputs_that_are_links_or_cannot_be_replaced(people, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "current").mkdir()
    convert_dataset(people, tmp_path / "link", "webdataset")
    assert contents(tmp_path / "link") == contents(people) and (tmp_path / "link").is_symlink()
    monkeypatch.chdir(tmp_path / "current")
    for output in (".", tmp_path / "current", "/", "../there/../current"):
        with pytest.raises(ValueError, match="is the current folder or a mount point, .*: choose a new folder in it"):
            convert_dataset(people, output, "imagefolder")
    convert_dataset(people, "set", "imagefolder")
    assert os.listdir(tmp_path / "current") == ["set"]
    assert sorted(os.listdir(tmp_path)) == ["current", "link", "people", "there"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that can be killed")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_part_is_replaceable_until_it_was_checked(people, tmp_path):
    """A kill while the pictures that were written are read again."""
    process = os.fork()
    if not process:
        try:
            reads_part = lambda event, args: event == "os.scandir" and str(args[0]).endswith(".part")  # noqa: E731
            sys.addaudithook(lambda event, args: reads_part(event, args) and os._exit(9))
            convert_dataset(people, tmp_path / "set", "imagefolder")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    assert (tmp_path / "set.part" / "Carl" / "1.gif").exists() and not (tmp_path / "set").exists()
    convert_dataset(people, tmp_path / "set", "imagefolder")
    assert contents(tmp_path / "set") == contents(people)
    assert sorted(os.listdir(tmp_path)) == ["people", "set"]


def test_two_conversions_into_one_folder(people, tmp_path):
    write(tmp_path / "set.part", {MARKER: b"", "anna/half.png": b""})
    with FileLock(tmp_path / "set.part.lock"):
        with pytest.raises(SystemExit, match="uiface convert: another conversion writes to .*set: wait for it"):
            cli.main(["convert", str(people), str(tmp_path / "set"), "--format", "recordio"])
        assert (tmp_path / "set.part" / "anna" / "half.png").exists()
    convert_dataset(people, tmp_path / "set", "recordio")
    assert sorted(os.listdir(tmp_path)) == ["people", "set"]


def test_what_cannot_be_converted_is_named(tmp_path, capsys):
    write(tmp_path / "set", {"anna/a.png": picture(1), "bert/b.png": POINTER})
    (tmp_path / "set" / "bert" / "gone.png").symlink_to("nowhere")
    cli.main(["convert", str(tmp_path / "set"), str(tmp_path / "out"), "--format", "imagefolder"])
    assert "2 pictures of 2 identities" in capsys.readouterr().out.replace("\r", "")
    assert (tmp_path / "out" / "bert" / "b.png").read_bytes() == POINTER  # a file like any other
    members = [(f"{name}.png", picture(1)) for name in "ab"] + [("a.cls", b"x" * 300), ("b.cls", b".b")]
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(ValueError, match="cannot be a folder's: longer than 255 bytes"):
        convert_dataset(tmp_path / "0.tar", tmp_path / "long", "imagefolder")
    assert not (tmp_path / "long.part").exists()
