"""Sets of pictures as people have them: with hidden folders, odd names, broken indexes and missing lists. Whatever is
given is either taken or named."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from records import RecordWriter, image_record
from written_files import POINTER, picture, write, write_faces, write_records, write_tar

from uiface_diffusers import cli
from uiface_diffusers.data import FaceCache, convert_dataset
from uiface_diffusers.data.face_cache import FaceCacheSource, load_pictures
from uiface_diffusers.data.labeled_faces import LabeledFaces
from uiface_diffusers.data.recordio import RecordReader, picture_range
from uiface_diffusers.data.sources import open_source, unreadable_reason
from uiface_diffusers.faces import UnusableFaceError
from uiface_diffusers.files import complete_file, iterate_lines, read_lines
from uiface_diffusers.pictures import rgb_bytes


def identities(source) -> dict[str, int]:
    return dict(Counter(photograph.identity for photograph in source.photographs))


def files(source) -> list[str]:
    return [photograph.file for photograph in source.photographs]


# folders


def test_hidden_and_system_entries_are_counted(tmp_path):
    hidden = [".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/anna/._a.png", "anna/.hidden.png", "anna/Thumbs.db"]
    hidden += [".DS_Store", "bert/@eaDir/a.png/SYNOFILE_THUMB_M.png", "anna/.ipynb_checkpoints/a-checkpoint.png"]
    taken = ["anna/a.png", "anna/b.png", "bert/a.png"]
    source = open_source(write(tmp_path, {name: picture(1) for name in taken + hidden}))
    assert files(source) == taken and identities(source) == {"anna": 2, "bert": 1}
    assert source.left_out == dict.fromkeys(hidden, "hidden or system file")


def test_whatever_pillow_reads_is_read_and_the_rest_is_named(tmp_path):
    kinds = {"jfif": "jpeg", "jpe": "jpeg", "TIF": "tiff", "ppm": "ppm", "gif": "gif", "bmp": "bmp", "webp": "webp"}
    kinds |= {"avif": "avif", "jp2": "jpeg2000"}
    taken = {f"anna/{end}.{end}": picture(2, kind) for end, kind in kinds.items()}
    taken |= {"anna/session/x.png": picture(3), "anna/session/2/x.png": picture(4)}
    others = {"anna/notes.txt": "not an image by its suffix", "anna/film.mpg": "not an image by its suffix"}
    others |= {"list.txt": "in no identity's folder", "alone.png": "in no identity's folder"}
    source = open_source(write(tmp_path, {**taken, **dict.fromkeys(others, b"")}))
    assert set(files(source)) == taken.keys() and identities(source) == {"anna": len(taken)}
    assert source.left_out == others
    assert all(source.read(photograph).shape == (8, 8, 3) for photograph in source.photographs)


@pytest.mark.parametrize("folders", [("train", "test"), ("CASIA-WebFace",), ("0", "1"), ("train", "val", "extra")])
def test_folders_within_folders_are_parts_or_identities(tmp_path, folders):
    """PART/PERSON and PERSON/VIDEO look the same."""
    for folder in folders:
        write(tmp_path / "set" / folder, {"anna/a.png": picture(1), "bert/a.png": picture(2)})
    first = min(folders)
    message = f"such as {first}/anna. If that is PART/PERSON, give .*set/{first}. If it is PERSON/VIDEO, run `uiface"
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "set")
    assert identities(open_source(tmp_path / "set" / first)) == {"anna": 1, "bert": 1}
    # what the message advises
    arguments = ["convert", str(tmp_path / "set"), str(tmp_path / "flat"), "--format", "imagefolder"]
    with pytest.raises(SystemExit, match=message):
        cli.main(arguments)
    cli.main([*arguments, "--nested"])
    assert identities(open_source(tmp_path / "flat")) == dict.fromkeys(sorted(folders), 2)


def test_a_single_folder_within_each_is_no_question(tmp_path):
    write(tmp_path, {"anna/crops/a.png": picture(1), "bert/crops/a.png": picture(2)})
    assert identities(open_source(tmp_path)) == {"anna": 1, "bert": 1}
    write(tmp_path, {"anna/crops_2020/a.png": picture(3)})
    with pytest.raises(ValueError, match="such as anna/crops. If that is PART/PERSON, give .*/anna. "):
        open_source(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "anna").rename(tmp_path / "one" / "anna")
    with pytest.raises(ValueError, match="such as anna/crops"):
        open_source(tmp_path / "one")


def test_who_is_filtered_out_is_named(tmp_path):
    write(tmp_path, {"anna/a.png": b"", "anna/b.png": b"", "bert/a.png": b"", "carl/a.png": b"", "carl/b.png": b""})
    source = open_source(tmp_path, identities=["anna", "bert"], min_images=2)
    assert files(source) == ["anna/a.png", "anna/b.png"]
    assert source.left_out == {
        "carl/a.png": "of an identity that was not asked for",
        "carl/b.png": "of an identity that was not asked for",
        "bert/a.png": "of an identity with fewer than 2 photographs",
    }


def test_names_that_are_not_utf8(tmp_path, capsys):
    folder = os.fsencode(tmp_path) + b"/Jos\xe9"
    os.mkdir(folder)
    for name in (b"a.png", b"\xfc.png"):
        with open(folder + b"/" + name, "wb") as file:
            file.write(picture(5))
    write(tmp_path, {"anna/a.png": picture(6)})
    source = open_source(tmp_path)
    assert files(source) == ["Jos\\xe9/a.png", "Jos\\xe9/\\xfc.png", "anna/a.png"]
    assert identities(source) == {"Jos\\xe9": 2, "anna": 1}
    assert all(source.read(photograph).shape == (8, 8, 3) and source.stamp(photograph) != "missing"
               for photograph in source.photographs)  # fmt: skip
    pa.table({"file": files(source)})  # parquet takes the names
    for form in ("webdataset", "recordio", "imagefolder"):
        cli.main(["convert", str(tmp_path), f"{tmp_path}-{form}", "--format", form])
        assert identities(open_source(f"{tmp_path}-{form}")) == {"Jos_xe9": 2, "anna": 1}


def test_one_name_in_two_unicode_forms(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "José") for form in ("NFC", "NFD"))
    write(tmp_path, {f"{decomposed}/a.png": picture(1), "anna/a.png": picture(2)})
    source = open_source(tmp_path, identities=[composed])
    assert identities(source) == {decomposed: 1}
    write(tmp_path, {f"{composed}/b.png": picture(3)})
    assert len(identities(open_source(tmp_path))) == 2


def test_paths_are_taken_literally(tmp_path, monkeypatch):
    """A sibling that a pattern would match is another cache."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for number, run in enumerate(("run[2]", "run2", "run?", "run*", "{run}")):
        folder, image = tmp_path / run / "cache", picture(number)
        folder.mkdir(parents=True)
        row = {"image": {"bytes": image, "path": None}, "identity": run, "file": "a/b.png", "embedding": [1.0]}
        pq.write_table(pa.Table.from_pylist([row]), folder / "faces-00000.parquet")
        (folder / "prepare.json").write_text('{"settings": {"identity_encoder": "toy", "image_size": 8}}')
        (folder / "report.json").write_text('{"faces": 1}')
    for number, run in enumerate(("run[2]", "run2", "run?", "run*", "{run}")):
        cache = FaceCache(f"~/{run}/cache")
        assert cache.embeddings().names == [run] and next(cache.shard_images(cache.shards[0]))[0, 0, 0] == number
        source = open_source(tmp_path / run / "cache")
        assert isinstance(source, FaceCacheSource) and source.read(source.photographs[0])[0, 0, 0] == number
        assert load_pictures(cache.shards, decode=False)[0]["image"]["bytes"] == picture(number)


# RecordIO


def test_dcface_has_its_identities_in_a_list(tmp_path):
    write_records(tmp_path / "file.rec", [0] * 6)
    (tmp_path / "list.txt").write_text("".join(f"{key}\tperson_{key // 2}/{key}.jpg\n" for key in range(6)))
    source = open_source(tmp_path)
    assert identities(source) == {"person_0": 2, "person_1": 2, "person_2": 2}
    assert source.read(source.photographs[5])[0, 0, 0] == 5 and not source.left_out


def test_equal_labels_without_a_list_are_refused(tmp_path):
    path = write_records(tmp_path / "train.rec", [0] * 6)
    with pytest.raises(ValueError, match="all 6 pictures in .*train.rec have the label 0: .*train.lst or list.txt"):
        open_source(path)
    (tmp_path / "list.txt").write_text("0\ta/0.jpg\n1\ta/1.jpg\n")
    with pytest.raises(ValueError, match="list.txt has 2 lines for 6 pictures, 4 of which are not in it"):
        open_source(path)
    (tmp_path / "list.txt").write_text("".join(f"{key % 3}\ta/{key}.jpg\n" for key in range(6)))
    with pytest.raises(ValueError, match="list.txt has the key 0 twice, in line 1 and in line 4"):
        open_source(path)
    (tmp_path / "list.txt").write_text("once upon a time\n")
    with pytest.raises(ValueError, match="list.txt, line 1, is 'once upon a time'"):
        open_source(path)
    # one folder for all pictures, or equal labels in the list, too, say nothing of who is in them
    for line, message in (("images/{0}.jpg", "are all in images"), ("0\timages/{0}.jpg", "are all in images"),
                          ("0\t{0}.jpg", "have no folders of identities")):  # fmt: skip
        (tmp_path / "list.txt").write_text("".join(f"{key}\t{line.format(key)}\n" for key in range(6)))
        with pytest.raises(ValueError, match=f"all labels in .* are equal, and the paths in .*list.txt {message}"):
            open_source(path)


@pytest.mark.parametrize("listed", [False, True])
def test_a_record_file_of_one_identity(tmp_path, listed):
    """It is known from record 0 and the single record behind the pictures."""
    convert_dataset(
        write(tmp_path / "set", {f"anna/{n}.png": picture(n) for n in range(3)}), tmp_path / "rec", "recordio"
    )
    if not listed:
        (tmp_path / "rec" / "train.lst").unlink()
    assert identities(open_source(tmp_path / "rec")) == {"anna" if listed else "0000000": 3}


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("{key}\t{label}\t{person}/{key}.jpg\n", ["anna", "anna", "bert", "bert"]),  # im2rec
        ("1\t/raid/{person}/{key}.jpg\t{label}\n", ["anna", "anna", "bert", "bert"]),  # InsightFace
        ("{key}\t{label}.000000\t{key}.jpg\n", ["0000007", "0000007", "0000009", "0000009"]),
        ("{person}/{key}.jpg {label}\n", ["anna", "anna", "bert", "bert"]),
        ("{person}\\{key}.jpg\n", ["anna", "anna", "bert", "bert"]),
        ("{key}\t{label}\tcamera_1/{key}.jpg\n", ["0000007", "0000007", "0000009", "0000009"]),
    ],
)
@pytest.mark.parametrize("labeled", [False, True])
def test_forms_of_lists(tmp_path, line, names, labeled):
    people = [("anna", 7), ("anna", 7), ("bert", 9), ("bert", 9)]
    write_records(tmp_path / "train.rec", [label if labeled else 3 for _, label in people])
    lines = [line.format(key=key, person=person, label=label) for key, (person, label) in enumerate(people)]
    (tmp_path / "train.lst").write_text("".join(lines))
    source = open_source(tmp_path)
    assert [photograph.identity for photograph in source.photographs] == names


def test_a_key_twice_in_the_index_is_refused(tmp_path):
    path = write_records(tmp_path / "train.rec", [0, 0, 1, 1], keys=[0, 0, 0, 0])
    second = path.with_suffix(".idx").read_text().splitlines()[1].split()[1]
    with pytest.raises(ValueError, match=f"train.idx has key 0 twice, at byte 0 and at byte {second}"):
        open_source(path)
    path.with_suffix(".idx").unlink()  # what the message advises
    assert identities(open_source(path)) == {"0000000": 2, "0000001": 2}


@pytest.mark.parametrize("keys", [None, [9, 4, 2, 7]])
def test_an_index_is_rebuilt(tmp_path, keys):
    path = write_records(tmp_path / "train.rec", [0, 0, 1, 1], keys)
    expected = RecordReader(path).offsets
    path.with_suffix(".idx").unlink()
    assert RecordReader(path).offsets == expected
    write_faces(tmp_path / "other.rec", label_arrays=True)
    expected = RecordReader(tmp_path / "other.rec")
    (tmp_path / "other.idx").unlink()
    rebuilt = RecordReader(tmp_path / "other.rec")
    assert rebuilt.offsets == expected.offsets and rebuilt.image_keys() == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "other.idx").exists()


def test_records_that_the_index_lacks_are_named(tmp_path):
    path = write_records(tmp_path / "train.rec", [0, 0, 1, 1])
    lines = path.with_suffix(".idx").read_text().splitlines(keepends=True)
    path.with_suffix(".idx").write_text(lines[0] + lines[2])
    source = open_source(path)
    places = [int(line.split()[1]) for line in (lines[1], lines[3])]
    assert files(source) == ["0", "2"]
    assert source.left_out == {f"byte {place}": "not in train.idx" for place in places}


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's count of read bytes")
@pytest.mark.parametrize("index", [True, False])
def test_records_are_walked_once(tmp_path, index):
    writer = RecordWriter(tmp_path / "train.rec")
    for key in range(50):
        label = [float(key % 5), 0.5] if key % 2 else float(key % 5)
        writer.write(key, image_record(label, key, b"" if key == 7 else bytes(300_000)))
    writer.close()
    if not index:
        (tmp_path / "train.idx").unlink()
    before = read_bytes()
    source = open_source(tmp_path / "train.rec")
    buffer = max(io.DEFAULT_BUFFER_SIZE, os.stat(tmp_path).st_blksize)
    assert read_bytes() - before < 1.5 * 50 * buffer
    assert {photo.file: photo.identity for photo in source.photographs} == {
        str(key): f"{key % 5:07d}" for key in range(50) if key != 7
    }
    assert source.left_out == {"key 7": "a record without a picture"}


def read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def test_a_cut_record_file_and_a_foreign_index(tmp_path):
    path = write_records(tmp_path / "train.rec", [0, 0, 1, 1])
    content, index = path.read_bytes(), path.with_suffix(".idx").read_text()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="ends at byte .* key 2 at byte .*cut short, or the index is of another"):
        open_source(path)
    path.write_bytes(content[:-12])
    with pytest.raises(OSError, match="is truncated: the file is cut short"):
        open_source(path)
    path.with_suffix(".idx").unlink()
    with pytest.raises(ValueError, match="cannot be read without train.idx.*truncated"):
        open_source(path)
    path.write_bytes(content)
    path.with_suffix(".idx").write_text(index + "9\t4\n")
    with pytest.raises(ValueError, match="key 9 at byte 4, which lies within another record"):
        open_source(path)
    path.with_suffix(".idx").write_text("")
    with pytest.raises(ValueError, match="train.idx is empty"):
        open_source(path)
    path.write_bytes(POINTER)
    with pytest.raises(ValueError, match="train.rec is a Git LFS pointer.*git lfs pull"):
        open_source(path)


def test_joined_record_files_are_refused(tmp_path):
    write_faces(tmp_path / "one.rec", False)
    (tmp_path / "train.rec").write_bytes(2 * (tmp_path / "one.rec").read_bytes())
    with pytest.raises(ValueError, match="has pictures behind the 6 that it announces, from key 11 on"):
        open_source(tmp_path / "train.rec")
    with pytest.raises(ValueError, match="has 2 .rec files, one.rec, two.rec: name one"):
        (tmp_path / "train.rec").rename(tmp_path / "two.rec")
        open_source(tmp_path)


@pytest.mark.parametrize("pictures", [5, 2**24 - 2, 2**24 - 1, 2**24, 2**24 + 1, 2**24 + 5, 2**25 + 3])
def test_record_0_is_a_float32(pictures):
    """Above 2^24 it cannot say every number of pictures; those that it rounds are found all the same."""
    keys, end = range(pictures + 4), float(np.float32(pictures + 1))
    assert picture_range(keys, end, lambda key: key <= pictures) == (pictures, pictures)
    whole = [*range(4), *range(5, 30)]
    assert picture_range(whole, 20.0, lambda key: True) == (19, 18)  # key 4 is missing


@pytest.mark.parametrize("label", [float("nan"), 0.5, -1, 2**24 + 2])
def test_labels_that_are_no_identities(tmp_path, label):
    path = write_records(tmp_path / "train.rec", [0, 1, label])
    with pytest.raises(ValueError, match="in the record of key 2: identities are whole numbers"):
        open_source(path)


# webdataset


def test_keys_with_dots(tmp_path):
    members = [("J.R._0001.jpg", picture(1, "jpeg")), ("J.R._0001.cls", b"0")]
    members += [("J.K._0001.jpg", picture(2, "jpeg")), ("J.K._0001.cls", b"1")]
    members += [("x/0001.left.png", picture(3)), ("x/0001.right.png", picture(4)), ("x/0001.cls", b"2")]
    members += [("./y/0002.png", picture(5)), ("y/0002.jpg", picture(6, "jpeg")), ("y/0002.json", b"{}")]
    source = open_source(write_tar(tmp_path / "0.tar", members))
    assert identities(source) == {"0": 1, "1": 1, "2": 2, "y": 2}
    assert [source.read(photograph)[0, 0, 2] // 5 for photograph in source.photographs][2:5] == [50, 50, 50]
    assert not source.left_out  # the class and JSON files are of pictures' samples


def test_what_shards_hold_beside_pictures_is_named(tmp_path):
    members = [("anna/a.png", picture(1)), ("anna/._a.png", b"mac"), ("__MACOSX/anna/a.png", b"mac")]
    members += [("notes.txt", b"text"), ("anna/a.png", picture(2)), ("bert/a.TIF", picture(3, "tiff"))]
    write_tar(tmp_path / "set" / "0.tar", members)
    with tarfile.open(tmp_path / "set" / "0.tar", "a") as tar:
        for name, kind, target in (("carl/a.png", tarfile.LNKTYPE, "bert/a.TIF"), ("l.png", tarfile.SYMTYPE, "x.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    write(tmp_path / "set", {"._0.tar": b"mac", "dora/notes.txt": b""})
    source = open_source(tmp_path / "set")
    assert identities(source) == {"anna": 1, "bert": 1, "carl": 1}
    assert [int(source.read(photograph)[0, 0, 0]) for photograph in source.photographs] == [2, 3, 3]
    assert source.left_out == {
        "0.tar:anna/._a.png": "hidden or system file",
        "0.tar:__MACOSX/anna/a.png": "hidden or system file",
        "0.tar:notes.txt": "not an image by its suffix",
        "0.tar:anna/a.png (earlier)": "replaced by a later file of the same name",
        "0.tar:l.png": "a link or a special file",
        "._0.tar": "hidden or system file",
        "dora": "beside the tar shards",
    }


def test_members_of_one_name_are_all_named(tmp_path):
    members = [(name, content) for value in range(3) for name, content in (
        ("anna/a.png", picture(value)), ("anna/a.cls", b"%d" % value), ("notes.txt", b""))]  # fmt: skip
    source = open_source(write_tar(tmp_path / "0.tar", [*members, ("lonely.cls", b"1")]))
    assert files(source) == ["0.tar:anna/a.png"] and source.read(source.photographs[0])[0, 0, 0] == 2
    replaced = "replaced by a later file of the same name"
    assert source.left_out == {
        "0.tar:anna/a.png (earlier)": replaced,
        "0.tar:anna/a.png (earlier) (2)": replaced,
        "0.tar:anna/a.cls (earlier)": replaced,
        "0.tar:anna/a.cls (earlier) (2)": replaced,
        "0.tar:notes.txt": "not an image by its suffix",
        "0.tar:notes.txt (2)": "not an image by its suffix",
        "0.tar:notes.txt (3)": "not an image by its suffix",
        "0.tar:lonely.cls": "a class file without a picture",
    }


@pytest.mark.parametrize(("module", "program"), [(gzip, "gunzip"), (bz2, "bunzip2"), (lzma, "unxz")])
def test_a_compressed_shard_is_named(tmp_path, module, program):
    shard = write_tar(tmp_path / "0.tar", [("anna/a.png", picture(1))])
    shard.write_bytes(module.compress(shard.read_bytes()))
    with pytest.raises(ValueError, match=f"0.tar is compressed: unpack it with {program} "):
        open_source(tmp_path)


@pytest.mark.parametrize("beside", ["lfw.zip", "lfw.tgz", "lfw.tar.gz"])
def test_an_archive_beside_what_was_unpacked_is_left_out(tmp_path, beside):
    write(tmp_path, {"anna/a.png": picture(1), "bert/a.png": picture(2), beside: b"an archive"})
    source = open_source(tmp_path)
    assert identities(source) == {"anna": 1, "bert": 1}
    assert source.left_out == {beside: "in no identity's folder"}


@pytest.mark.parametrize("beside", ["stray.tar", "stray.rec"])
def test_a_stray_file_beside_identities_is_refused(tmp_path, beside):
    write(tmp_path, {"anna/a.png": picture(1), "bert/a.png": picture(2)})
    if beside == "stray.tar":
        write_tar(tmp_path / beside, [("carl/a.png", picture(3))])
    else:
        write_records(tmp_path / beside, [4, 5])
    with pytest.raises(
        ValueError, match=f"has {beside}, and pictures in folders, such as anna/a.png: .* Give .*{beside}"
    ):
        open_source(tmp_path)
    assert len(identities(open_source(tmp_path / beside))) == (1 if beside == "stray.tar" else 2)
    (tmp_path / beside).unlink()
    assert identities(open_source(tmp_path)) == {"anna": 1, "bert": 1}


def test_broken_shards_and_classes(tmp_path):
    shard = write_tar(tmp_path / "0.tar", [("a.png", picture(1)), ("a.cls", b"Jos\xe9")])
    with pytest.raises(ValueError, match="a.cls of .*0.tar is not a class file in UTF-8"):
        open_source(shard)
    for content, advice in ((POINTER, "git lfs pull"), (b"", "empty: copy it again"), (b"x" * 800, "damaged")):
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=f"0.tar is no tar file: .*0.tar is .*{advice}"):
            open_source(tmp_path)


def test_a_shard_that_ends_too_early(tmp_path):
    """Python reads no further than a damaged header, without a word."""
    shard = write_tar(tmp_path / "0.tar", [(f"anna/{number}.png", picture(number)) for number in range(4)])
    content = shard.read_bytes()
    shard.write_bytes(content[: 4 * 1024])
    source = open_source(shard)
    assert len(files(source)) == 4 and source.left_out == {"0.tar": "without a tar file's end: it may be cut short"}
    for broken in (content[:1024] + b"x" + content[1025:], content[:1500], 2 * content):
        shard.write_bytes(broken)
        with pytest.raises(ValueError, match="0.tar (goes on behind its end at byte|is damaged, cut short)"):
            open_source(shard)


# text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_lists_in_unicode(tmp_path, encoding):
    path = tmp_path / "list.txt"
    path.write_bytes("José\r\nAn\u2028na\n\n".encode(encoding))
    assert read_lines(path) == list(iterate_lines(path)) == ["José", "An\u2028na", ""]
    index = write_records(tmp_path / "train.rec", [0, 1]).with_suffix(".idx")
    index.write_bytes(index.read_text().encode(encoding))
    assert identities(open_source(tmp_path / "train.rec")) == {"0000000": 1, "0000001": 1}


def test_other_encodings_are_named(tmp_path):
    path = tmp_path / "list.txt"
    for read in (read_lines, lambda path: list(iterate_lines(path))):
        path.write_bytes("Anna\nJosé\n".encode("latin-1"))
        with pytest.raises(ValueError, match="list.txt, line 2, is not UTF-8 .byte 0xe9.*iconv"):
            read(path)
        path.write_bytes("Anna\n".encode("utf-16-le"))
        with pytest.raises(ValueError, match="list.txt, line 1, is not UTF-8"):
            read(path)
    with pytest.raises(SystemExit, match="list.txt, line 1, is not UTF-8"):
        cli.main(["prepare", str(tmp_path), "--output", str(tmp_path / "cache"), "--identities", str(path)])


def test_long_names(tmp_path):
    for name in ("a" * 255, "ä" * 127):
        with complete_file(tmp_path / name) as beside:
            beside.write_text("whole")
        assert (tmp_path / name).read_text() == "whole"
    assert len(os.listdir(tmp_path)) == 2


# pictures that cannot be read


def bomb() -> bytes:
    content = bytearray(picture(1, "bmp"))
    content[18:26] = b"\xff\xff\x0f\x00\xff\xff\x0f\x00"  # width and height
    return bytes(content)


def test_reasons_of_unreadable_pictures(tmp_path):
    source = open_source(write(tmp_path, {"a/0.png": POINTER, "a/1.bmp": bomb(), "a/2.png": picture(1)[:40]}))
    reasons = []
    for photograph in source.photographs:
        with pytest.raises(OSError) as error:
            source.read(photograph)
        reasons.append(unreadable_reason(source, photograph, error.value))
    limit = f"over Pillow's limit of {2 * PIL.Image.MAX_IMAGE_PIXELS} pixels"
    assert reasons == ["a Git LFS pointer (run `git lfs pull`)", limit, "unreadable"]
    with pytest.raises(FileNotFoundError):  # not of the picture
        unreadable_reason(source, source.photographs[0], FileNotFoundError(2, "gone"))


@pytest.mark.parametrize(("content", "advice"), [(POINTER, "git lfs pull"), (b"PAR1", "cut short"), (b"", "empty")])
def test_broken_shards_of_a_cache_are_named(tmp_path, content, advice):
    (tmp_path / "prepare.json").write_text('{"settings": {"identity_encoder": "toy", "image_size": 8}}')
    (tmp_path / "report.json").write_text('{"faces": 1}')
    (tmp_path / "faces-00000.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=f"faces-00000.parquet is .*{advice}"):
        FaceCache(tmp_path)
    (tmp_path / "report.json").write_bytes(POINTER)
    with pytest.raises(ValueError, match="report.json is a Git LFS pointer|faces-00000.parquet is"):
        FaceCache(tmp_path)


def test_gray_pictures_are_trained_on(tmp_path, caplog):
    pictures = {f"{person}/{index}.png": picture(40 * index, size=32) for person in "ab" for index in range(3)}
    gray = io.BytesIO()
    PIL.Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32)).save(gray, "png")
    write(tmp_path, {**pictures, "a/0.png": gray.getvalue(), "b/notes.txt": b"", "c/.hidden.png": b""})
    faces = LabeledFaces([tmp_path], 32)
    assert np.array_equal(faces.face(0), np.repeat(np.arange(1024, dtype=np.uint8).reshape(32, 32, 1), 3, axis=2))
    assert f"left out of {tmp_path}: 1 not an image by its suffix: b/notes.txt" in caplog.text
    assert f"left out of {tmp_path}: 1 hidden or system file: c/.hidden.png" in caplog.text
    with pytest.raises(UnusableFaceError, match="Git LFS pointer"):
        write(tmp_path, {"a/0.png": POINTER})
        faces.face(0)


def test_integers_of_32_bits_that_are_bytes_stay_bytes():
    values = np.arange(256, dtype=np.int32).reshape(16, 16)
    picture = PIL.Image.fromarray(values)
    assert picture.mode == "I" and np.array_equal(rgb_bytes(picture)[..., 0], values)
    assert np.array_equal(rgb_bytes(PIL.Image.fromarray(values * 257))[..., 0], values)
    dark = PIL.Image.fromarray(values.astype(np.uint16))  # 16 bits by its mode
    assert dark.mode == "I;16" and rgb_bytes(dark).max() == 1
    for beyond in (values - 1, values * 1000):
        with pytest.raises(ValueError, match="beyond 16 bits"):
            rgb_bytes(PIL.Image.fromarray(beyond))


def test_a_set_whose_pictures_were_exchanged_has_another_fingerprint(tmp_path):
    pictures = {f"{person}/{index}.png": picture(40 * index, size=32) for person in "ab" for index in range(3)}
    fingerprint = LabeledFaces([write(tmp_path, pictures)], 32).fingerprint
    assert len(fingerprint) == 12 and fingerprint == LabeledFaces([tmp_path], 32).fingerprint
    write(tmp_path, {"a/0.png": picture(0, "bmp", size=32)})
    assert fingerprint != LabeledFaces([tmp_path], 32).fingerprint


def test_the_report_of_prepare_names_what_it_left_out(toy_root, toy_photographs, tmp_path, capsys):
    for file in toy_photographs.glob("person_[01]/*.png"):
        write(tmp_path / "photos", {f"{file.parent.name}/{file.name}": file.read_bytes()})
    write(tmp_path / "photos", {f"person_0/{index:02d}.txt": b"" for index in range(12)} | {".DS_Store": b""})
    arguments = ["--encoder", "toy", "--encoder-root", str(toy_root), "--det-size", "160", "--image-size", "64"]
    cli.main(["prepare", str(tmp_path / "photos"), "--output", str(tmp_path / "cache"), *arguments])
    report = json.loads((tmp_path / "cache" / "report.json").read_text())
    assert report["left_out"] == {
        "not an image by its suffix": {"count": 12, "first": [f"person_0/{index:02d}.txt" for index in range(10)]},
        "hidden or system file": {"count": 1, "first": [".DS_Store"]},
    }
    assert "left out 12 not an image by its suffix: person_0/00.txt, " in capsys.readouterr().out
    fingerprint = FaceCache(tmp_path / "cache").fingerprint
    (tmp_path / "cache").rename(tmp_path / "moved")
    assert FaceCache(tmp_path / "moved").fingerprint == fingerprint
