"""Landmarks, head poses and edges of photographs in prepared caches."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
from conftest import TOY_POINTS, draw_person, write_toy_pack

from uiface_diffusers import cli
from uiface_diffusers.data import FaceCache, prepare_faces
from uiface_diffusers.faces import (
    FRONTAL_NOSE,
    FaceEncoder,
    align_face,
    alignment_matrix,
    head_pose,
    load_photograph,
    out_of_frame,
)

FRONTAL = np.array([[40, 50], [72, 50], [56, 50 + 40 * FRONTAL_NOSE], [44, 90], [68, 90]])
# ArcFace's (Deng et al. 2019)
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
POSE_COLUMNS = ["landmarks", "yaw", "pitch", "out_of_frame"]


def write_earlier_version(cache: Path) -> None:
    """Makes a cache one of before there were poses."""
    for shard in cache.glob("faces-*.parquet"):
        pq.write_table(pq.read_table(shard).drop_columns(POSE_COLUMNS), shard)
    settings = json.loads((cache / "prepare.json").read_text())
    del settings["settings"]["min_in_frame"]
    (cache / "prepare.json").write_text(json.dumps(settings))


def column(cache: Path, name: str) -> list:
    return [value for shard in FaceCache(cache).shards for value in pq.read_table(shard)[name].to_pylist()]


@pytest.fixture(scope="module")
def encoder(toy_root) -> FaceEncoder:
    return FaceEncoder("toy", str(toy_root), det_size=160)


def test_a_frontal_face_has_no_yaw_and_pitch():
    assert np.allclose(head_pose(FRONTAL), 0)
    yaw, pitch = head_pose(TEMPLATE)
    assert abs(yaw) < 1e-5 and pitch == pytest.approx(0.495 - FRONTAL_NOSE, abs=1e-3)


def test_pose_is_measured_on_the_face_itself():
    """A nose that is 8 pixels to the right of the middle, of 32 between the eyes, and 4 of 40 lower; under any roll,
    size and place, and mirrored."""
    face = FRONTAL.copy()
    face[2] += [8, 4]
    assert np.allclose(head_pose(face), [0.25, 0.1])
    for angle, scale, shift in ((0.4, 3, 100), (-0.7, 0.2, -3)):
        turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        assert np.allclose(head_pose(face @ turn.T + shift), [0.25, 0.1])
    assert np.allclose(head_pose((face * [-1, 1])[[1, 0, 2, 4, 3]]), [-0.25, 0.1])
    assert np.isnan(head_pose(np.ones((5, 2)))).all()


@pytest.mark.parametrize("degrees", [-40, 15, 30])
def test_pose_is_the_tangent_of_the_head_s_angle(degrees):
    """A head in three dimensions, in parallel projection: its nose is half the eyes' distance before their plane."""
    angle, depth = math.radians(degrees), np.array([0, 0, 16, 0, 0])
    x, y = (FRONTAL - [56, 70]).T
    turned = np.stack([x * math.cos(angle) + depth * math.sin(angle), y], axis=1)
    assert np.allclose(head_pose(turned), [0.5 * math.tan(angle), 0])
    nodding = np.stack([x, y * math.cos(angle) + depth * math.sin(angle)], axis=1)
    assert np.allclose(head_pose(nodding), [0, 0.4 * math.tan(angle)])


def test_out_of_frame_is_the_black_share_of_the_aligned_face():
    white = np.full((200, 240, 3), 255, np.uint8)
    for offset in ((60, 40), (-10, 30), (150, 100), (-45, -45), (300, 0)):
        landmarks = 1.4 * (TEMPLATE @ np.array([[0.96, -0.28], [0.28, 0.96]])) + offset
        black = (align_face(white, landmarks)[:, :, 0] < 127.5).mean()
        assert out_of_frame(landmarks, white.shape) == pytest.approx(black, abs=2e-3)
    assert out_of_frame(TEMPLATE, (112, 112)) == 0


def test_prepare_keeps_landmarks_and_poses(tmp_path):
    """The nose of the pack's faces is 1.5 to the right of the middle, the eyes 4 apart; 2.4 of 4 below them."""
    points = [(-2, -2), (2, -2), (1.5, 0.4), (-1.6, 2), (1.6, 2)]
    write_toy_pack(tmp_path, points=points)
    encoder = FaceEncoder("toy", str(tmp_path), det_size=160)
    for person in ("a", "b"):
        (tmp_path / "source" / person).mkdir(parents=True)
        for x in (70, 80):
            draw_person((0, 0, 255), ((x, 80, 44),)).save(tmp_path / "source" / person / f"{x}.png")
    report = prepare_faces(tmp_path / "source", tmp_path / "cache", encoder, image_size=32)
    assert report["poses_known"] == report["side_views"] == 4
    assert report["in_frame_below"] == {"0.9": 0, "0.7": 0, "0.5": 0}
    poses = FaceCache(tmp_path / "cache").poses()
    assert poses.shape == (4, 2) and poses.dtype == np.float32
    assert np.allclose(poses, [1.5 / 4, 2.4 / 4 - FRONTAL_NOSE], atol=1e-6)
    photograph = load_photograph(tmp_path / "source" / "a" / "70.png")
    matrix = alignment_matrix(encoder.detect(photograph)[0].landmarks)
    stored = np.array(column(tmp_path / "cache", "landmarks")[0]).reshape(5, 2)
    # the same face in the template: where the aligned picture has it
    assert np.allclose(stored, encoder.detect(photograph)[0].landmarks @ matrix[:, :2].T + matrix[:, 2], atol=1e-4)
    assert np.allclose(head_pose(stored), poses[0], atol=1e-5)
    assert np.abs(stored.mean(axis=0) - TEMPLATE.mean(axis=0)).max() < 1e-3  # least squares: equal centers


def test_min_in_frame_skips_and_names(tmp_path, capsys):
    """Points so wide apart that the template of a disc near the edge is partly outside of the photograph."""
    write_toy_pack(tmp_path, points=1.4 * np.array(TOY_POINTS))
    encoder = FaceEncoder("toy", str(tmp_path), det_size=160)
    (tmp_path / "source" / "a").mkdir(parents=True)
    for x in (44, 56, 80):
        draw_person((0, 0, 255), ((x, 80, 44),)).save(tmp_path / "source" / "a" / f"{x}.png")
    expected = {}
    for x in (44, 56, 80):
        photograph = load_photograph(tmp_path / "source" / "a" / f"{x}.png")
        white = np.full_like(photograph, 255)
        expected[x] = (align_face(white, encoder.detect(photograph)[0].landmarks)[:, :, 0] > 127).mean()
    assert 0.7 < expected[44] < 0.85 < 0.9 < expected[56] < 0.95 < expected[80]
    report = prepare_faces(tmp_path / "source", tmp_path / "all", encoder, image_size=16)
    assert report["in_frame_below"] == {"0.9": 1, "0.7": 0, "0.5": 0}
    outside = column(tmp_path / "all", "out_of_frame")
    assert np.allclose(outside, [1 - share for share in expected.values()], atol=0.01)

    arguments = ["--encoder", "toy", "--encoder-root", str(tmp_path), "--det-size", "160", "--image-size", "16"]
    arguments += ["--output", str(tmp_path / "cut"), "--min-in-frame", "0.85"]
    cli.main(["prepare", str(tmp_path / "source"), *arguments])
    printed = capsys.readouterr().out
    assert "skipped 1: out of frame" in printed and "0 of 2 look sideways (|yaw| > 0.25)" in printed
    report = json.loads((tmp_path / "cut" / "report.json").read_text())
    assert report["skipped"] == {
        "a/44.png": f"out of frame: {1 - outside[0]:.3f} of the template is within the photograph"
    }
    assert report["reasons"] == {"out of frame": 1} and column(tmp_path / "cut", "file") == ["a/56.png", "a/80.png"]
    with pytest.raises(ValueError, match="min_in_frame: 0.85 there, 0.5 now"):
        prepare_faces(tmp_path / "source", tmp_path / "cut", encoder, image_size=16, min_in_frame=0.5)


def test_aligned_pictures_have_no_pose(encoder, tmp_path):
    (tmp_path / "source" / "a").mkdir(parents=True)
    PIL.Image.new("RGB", (112, 112), (0, 0, 255)).save(tmp_path / "source" / "a" / "0.png")
    report = prepare_faces(tmp_path / "source", tmp_path / "cache", encoder, image_size=16, aligned=True)
    assert report["poses_known"] == report["side_views"] == 0
    assert np.isnan(FaceCache(tmp_path / "cache").poses()).all()
    assert all(column(tmp_path / "cache", name) == [None] for name in POSE_COLUMNS)
    with pytest.raises(ValueError, match="`min_in_frame` .* needs photographs"):
        prepare_faces(tmp_path / "source", tmp_path / "other", encoder, aligned=True, min_in_frame=0.5)
    with pytest.raises(ValueError, match="`min_in_frame` is a share from 0 to 1, not 70"):
        prepare_faces(tmp_path / "source", tmp_path / "other", encoder, min_in_frame=70)


def test_caches_of_an_earlier_version_are_read(encoder, toy_photographs, tmp_path):
    report = prepare_faces(toy_photographs, tmp_path / "cache", encoder, image_size=16)
    shutil.copytree(tmp_path / "cache", tmp_path / "earlier")
    write_earlier_version(tmp_path / "earlier")
    cache = FaceCache(tmp_path / "earlier")
    poses = cache.poses()
    assert poses.shape == (24, 2) and np.isnan(poses).all() and len(cache.embeddings()) == 24
    (shard,) = cache.shards
    written = shard.stat().st_mtime_ns
    again = prepare_faces(toy_photographs, tmp_path / "earlier", encoder, image_size=16)
    assert again == {**report, "poses_known": 0} and shard.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="min_in_frame: None there, 0.5 now"):
        prepare_faces(toy_photographs, tmp_path / "earlier", encoder, image_size=16, min_in_frame=0.5)


def test_shards_of_two_versions_are_not_mixed(encoder, tmp_path):
    (tmp_path / "source" / "a").mkdir(parents=True)
    draw_person((0, 0, 255)).resize((112, 112)).save(tmp_path / "source" / "a" / "0000.png")
    for index in range(1, 1001):
        (tmp_path / "source" / "a" / f"{index:04d}.png").hardlink_to(tmp_path / "source" / "a" / "0000.png")
    arguments = {"image_size": 16, "aligned": True, "threads": 2}
    prepare_faces(tmp_path / "source", tmp_path / "cache", encoder, **arguments)
    write_earlier_version(tmp_path / "cache")
    (tmp_path / "cache" / "faces-00001.parquet").unlink()
    with pytest.raises(ValueError, match="faces-00000.parquet is of an earlier version.* 1 of 2 shards are missing"):
        prepare_faces(tmp_path / "source", tmp_path / "cache", encoder, **arguments)
    (tmp_path / "cache" / "faces-00000.parquet").unlink()
    assert prepare_faces(tmp_path / "source", tmp_path / "cache", encoder, **arguments)["faces"] == 1001


def test_threads_do_not_change_the_cache(toy_root, toy_photographs, encoder, tmp_path):
    source = shutil.copytree(toy_photographs, tmp_path / "source")
    PIL.Image.new("RGB", (160, 160)).save(source / "person_1" / "nobody.png")
    (source / "person_2" / "broken.png").write_bytes(b"no picture")
    prepare_faces(source, tmp_path / "one", encoder, image_size=32)
    single = FaceEncoder("toy", str(toy_root), det_size=160, threads=1)
    report = prepare_faces(source, tmp_path / "three", single, image_size=32, threads=3)
    assert report["skipped"] == {"person_1/nobody.png": "no face", "person_2/broken.png": "unreadable"}
    for file in ("faces-00000.parquet", "prepare.json", "report.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "three" / file).read_bytes()


def test_landmarks_of_real_photographs(assets, tmp_path):
    """Detected again in the aligned picture, the landmarks are where the cache says."""
    encoder = FaceEncoder("edgeface", str(assets / "insightface"), det_size=320)
    for name in ("Aaron_Peirsol", "Al_Gore"):
        (tmp_path / "source" / name).mkdir(parents=True)
        for file in sorted((assets / "lfw" / "images" / name).iterdir())[:4]:
            (tmp_path / "source" / name / file.name).symlink_to(file)
    prepare_faces(tmp_path / "source", tmp_path / "cache", encoder, image_size=112, face="central")
    cache, close = FaceCache(tmp_path / "cache"), FaceEncoder("edgeface", str(assets / "insightface"), det_size=160)
    stored = np.array(column(cache.folder, "landmarks")).reshape(-1, 5, 2)
    for picture, landmarks in zip(cache.images(range(len(cache))), stored, strict=True):
        padded = np.pad(picture, ((24, 24), (24, 24), (0, 0)))
        found = close.select(close.detect(padded), padded.shape, "central").landmarks - 24
        assert np.abs(found - landmarks).max() < 4
