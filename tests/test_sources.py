import tarfile

import numpy as np
import PIL.Image
import pytest
import webdataset
from conftest import draw_person
from records import MAGIC, RecordWriter, image_record
from written_files import write_faces

from uiface_diffusers.data import FaceCache, prepare_faces
from uiface_diffusers.data.recordio import RecordReader
from uiface_diffusers.data.sources import open_source
from uiface_diffusers.faces import FaceEncoder


def test_recordio_gives_back_ten_thousand_records(tmp_path):
    generator = np.random.default_rng(0)
    writer, written = RecordWriter(tmp_path / "train.rec"), {}
    for key in range(1, 10_001):
        content = generator.bytes(int(generator.integers(0, 200)))
        if key % 7 == 0:  # the magic number within the data, aligned or not, several times
            content = content[: int(generator.integers(0, 40))] + MAGIC + content + MAGIC + MAGIC
        label = (
            float(generator.integers(0, 500)) if key % 2 else [float(v) for v in generator.integers(0, 500, key % 5)]
        )
        written[key] = (label, content)
        writer.write(key, image_record(label, key, content))
    writer.close()
    reader = RecordReader(tmp_path / "train.rec")
    assert reader.keys == reader.image_keys() == list(range(1, 10_001))
    for key in generator.permutation(reader.keys).tolist():
        record, (label, content) = reader.read_image(key), written[key]
        # an empty array is the form with one label
        expected = label if isinstance(label, list) and label else [label if isinstance(label, float) else 0.0]
        assert (record.labels.tolist(), record.id, record.content) == (expected, key, content)


@pytest.mark.parametrize("label_arrays", [False, True])
def test_prepares_recordio(toy_root, tmp_path, label_arrays):
    (tmp_path / "set").mkdir()
    faces = write_faces(tmp_path / "set" / "train.rec", label_arrays, broken=True)
    encoder = FaceEncoder("toy", str(toy_root), det_size=160)
    report = prepare_faces(tmp_path / "set", tmp_path / "cache", encoder, image_size=112, aligned=True)
    assert report["skipped"] == {"2": "unreadable"} and report["identities"] == 3
    cache = FaceCache(tmp_path / "cache")
    assert cache.embeddings().names == ["0000000", "0000001", "0000001", "0000002", "0000002"]
    pictures = list(cache.shard_images(cache.shards[0]))
    assert all(np.array_equal(a, b) for a, b in zip(pictures, faces[:1] + faces[2:], strict=True))


def test_damaged_recordio_is_named(tmp_path):
    write_faces(tmp_path / "train.rec", False)
    content = (tmp_path / "train.rec").read_bytes()
    reader = RecordReader(tmp_path / "train.rec")
    (tmp_path / "train.rec").write_bytes(content[: reader.offsets[5] + 20])
    with pytest.raises(OSError, match="key 5 is truncated"):
        RecordReader(tmp_path / "train.rec").read(5)
    with pytest.raises(OSError, match="no record at the place of key 6"):
        RecordReader(tmp_path / "train.rec").read(6)
    index = (tmp_path / "train.idx").read_text().splitlines(keepends=True)
    (tmp_path / "train.idx").write_text("".join(index[:3]))
    (tmp_path / "train.rec").write_bytes(content)
    source = open_source(tmp_path / "train.rec")  # some pictures were removed from the index
    assert [photograph.file for photograph in source.photographs] == ["1", "2"]
    assert source.left_out == {f"byte {reader.offsets[key]}": "not in train.idx" for key in (3, 4, 5, 6)}
    (tmp_path / "train.idx").write_text("0 0\n1 three\n")
    with pytest.raises(ValueError, match="train.idx is no index"):
        RecordReader(tmp_path / "train.rec")
    (tmp_path / "train.rec").unlink()
    with pytest.raises(ValueError, match="train.rec is missing"):
        RecordReader(tmp_path / "train.rec")


@pytest.mark.parametrize("form", ["cls", "folder"])
def test_prepares_webdataset_shards(toy_root, tmp_path, form):
    """Written by the webdataset package: identities by class file, or by the folder in the key."""
    faces = []
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{shard:05d}.tar")) as writer:
            for i in range(3):
                faces.append(draw_person((i * 60, shard * 90, 200), ((56, 56, 44),), size=(112, 112)))
                key = f"{shard}{i}" if form == "cls" else f"person_{i}/{shard}"
                sample = {"__key__": key, "png": faces[-1]}
                writer.write(sample | ({"cls": i} if form == "cls" else {}))
    encoder = FaceEncoder("toy", str(toy_root), det_size=160)
    prepare_faces(tmp_path, tmp_path / "cache", encoder, image_size=112, aligned=True)
    cache = FaceCache(tmp_path / "cache")
    expected = ["0", "1", "2"] if form == "cls" else ["person_0", "person_1", "person_2"]
    assert cache.embeddings().names == 2 * expected
    pictures = list(cache.shard_images(cache.shards[0]))
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(pictures, faces, strict=True))


def test_a_webdataset_sample_without_identity_is_named(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        writer.write({"__key__": "lonely", "png": PIL.Image.new("RGB", (112, 112))})
    with pytest.raises(ValueError, match="sample lonely of .*0.tar has neither"):
        open_source(tmp_path)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:  # a folder is no class file
        folder = tarfile.TarInfo("lonely.cls")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    with pytest.raises(ValueError, match="has no photographs"):
        open_source(tmp_path)
    (tmp_path / "0.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(ValueError, match="no tar file: .*0.tar is damaged"):
        open_source(tmp_path)
