import io
import json
import os
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import complaint, draw_person, tiny_autoencoder, write_toy_pack
from killed import run_until_complete

from uiface_diffusers import cli
from uiface_diffusers.data import FaceCache, LatentSet, cache_latents, prepare_faces
from uiface_diffusers.faces import FaceEncoder, NoEmbeddingError, NoFaceError, align_face, load_photograph


@pytest.fixture(scope="module")
def encoder(toy_root):
    return FaceEncoder("toy", str(toy_root), det_size=160)


def test_detects_aligns_and_embeds(encoder):
    photograph = np.asarray(draw_person((0, 255, 0), ((90, 70, 44),)))
    (face,) = encoder.detect(photograph)
    assert np.abs((face.box[:2] + face.box[2:]) / 2 - [90, 70]).max() <= 8  # a cell of the detector
    aligned = align_face(photograph, face.landmarks)
    assert aligned.shape == (112, 112, 3) and aligned[72, 56, 0] > 200  # red where the template has the nose
    bank = encoder.embed([PIL.Image.fromarray(photograph)])
    assert bank.identity_encoder == "toy"
    assert bank.embeddings.shape == (1, 16)
    assert abs(bank.embeddings.norm().item() - 1) < 1e-6


def test_alignment_at_another_size_is_the_same_crop_resized():
    photograph = np.zeros((300, 300, 3), np.uint8)
    photograph[...] = np.linspace(0, 255, 300).astype(np.uint8)[None, :, None]
    landmarks = np.array([[110, 120], [180, 118], [146, 160], [118, 200], [176, 199]], np.float32)
    small = PIL.Image.fromarray(align_face(photograph, landmarks, 112))
    large = align_face(photograph, landmarks, 224)
    resized = np.asarray(PIL.Image.fromarray(large).resize((112, 112), PIL.Image.Resampling.BILINEAR))
    assert np.abs(resized.astype(int) - np.asarray(small)).max() <= 3


def test_which_of_several_faces(toy_root):
    encoder = FaceEncoder("toy", str(toy_root), det_size=320)
    photograph = np.asarray(draw_person((0, 0, 0), ((60, 60, 44), (230, 110, 44)), size=(320, 200)))
    faces = encoder.detect(photograph)
    assert len(faces) == 2
    # boxes of the toy detector are of one size: the nearer one to the center (160, 100) is the second disc
    central = encoder.select(faces, photograph.shape, "central")
    assert central.box[0] > 120
    faces[0].box[2] += 10
    assert encoder.select(faces, photograph.shape, "largest") is faces[0]
    with pytest.raises(ValueError, match="selection"):
        encoder.select(faces, photograph.shape, "nicest")


def test_no_photographs_is_an_error(encoder):
    with pytest.raises(ValueError, match="`photographs` is empty"):
        encoder.embed([])


def test_no_face_is_an_error_that_names_the_photograph(encoder):
    face, nothing = draw_person((0, 0, 0)), PIL.Image.new("RGB", (160, 160))
    with pytest.raises(NoFaceError, match="photograph 1"):
        encoder.embed([face, nothing])


@pytest.mark.parametrize(("removed", "message"), [("detector", "no detection"), ("recognizer", "no recognition")])
def test_incomplete_model_packs_are_named(tmp_path, removed, message):
    write_toy_pack(tmp_path, "half")
    (tmp_path / "models" / "half" / f"{removed}.onnx").unlink()
    with pytest.raises(ValueError, match=f"`half`.*{message}"):
        FaceEncoder("half", str(tmp_path))


def test_models_exported_for_one_face_embed_many(encoder, tmp_path):
    write_toy_pack(tmp_path, "toy", batch=1)
    faces = list(np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3)).astype(np.uint8))
    single = FaceEncoder("toy", str(tmp_path), det_size=160)
    assert np.allclose(single.embed_aligned(faces), encoder.embed_aligned(faces), atol=1e-6)


def test_embeddings_need_112_pixels(encoder):
    with pytest.raises(ValueError, match="128x128"):
        encoder.embed_aligned([np.zeros((128, 128, 3), np.uint8)])


def test_faces_without_embedding_are_named_or_skipped(tmp_path):
    write_toy_pack(tmp_path, "blind", needs_blue=True)
    encoder = FaceEncoder("blind", str(tmp_path), det_size=160)
    faces = [draw_person((0, 0, 200), size=(112, 112)), PIL.Image.new("RGB", (112, 112), (80, 90, 0))]
    with pytest.raises(NoEmbeddingError, match="`blind` gives no embedding of face 3: zero or not finite"):
        encoder.embed_pictures([*faces[:1] * 3, *faces[1:]], batch_size=2)
    for name, face in zip("abcd", [*faces, *faces], strict=True):
        (tmp_path / "faces" / name).mkdir(parents=True)
        face.save(tmp_path / "faces" / name / "0.png")
    report = prepare_faces(tmp_path / "faces", tmp_path / "cache", encoder, image_size=112, aligned=True)
    assert report["skipped"] == {"b/0.png": "no embedding", "d/0.png": "no embedding"}
    bank = FaceCache(tmp_path / "cache").embeddings()
    assert bank.names == ["a", "c"] and torch.equal(bank.embeddings, encoder.embed_pictures(faces[:1] * 2))


def test_photographs_are_turned_as_exif_says(tmp_path):
    image = PIL.Image.new("RGB", (20, 10))
    image.putpixel((0, 0), (255, 255, 255))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn by 270 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    assert load_photograph(tmp_path / "turned.png").shape == (20, 10, 3)


def bitmap(path) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.open(path).save(buffer, "bmp")
    return buffer.getvalue()


def test_prepare_reports_what_it_skips(encoder, toy_photographs, tmp_path):
    source = tmp_path / "source"
    for person in ("a", "b"):
        (source / person).mkdir(parents=True)
        for index in range(2):
            photograph = PIL.Image.open(toy_photographs / "person_0" / f"{index}.png")
            photograph.save(source / person / f"{index}.png")
    PIL.Image.new("RGB", (160, 160)).save(source / "a" / "nobody.png")
    (source / "b" / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (source / "b" / "cut.png").write_bytes((source / "b" / "0.png").read_bytes()[:300])
    (source / "b" / "notes.txt").write_text("not a picture")
    PIL.Image.new("RGB", (1, 700)).save(source / "b" / "thin.png")
    damaged = bytearray(bitmap(source / "b" / "0.png"))
    damaged[18:26] = b"\xff\xff\x0f\x00\xff\xff\x0f\x00"  # width and height: a decompression bomb
    (source / "b" / "damaged.bmp").write_bytes(damaged)

    report = prepare_faces(source, tmp_path / "cache", encoder, image_size=64)
    assert report["faces"] == 4 and report["photographs"] == 9 and report["identities"] == 2
    assert report["skipped"].pop("b/thin.png") == "a picture of 1x700 cannot be searched for faces"
    unreadable = {"b/broken.jpg": "unreadable", "b/cut.png": "unreadable"}
    unreadable["b/damaged.bmp"] = "over Pillow's limit of 178956970 pixels"
    notes = {"not an image by its suffix": {"count": 1, "first": ["b/notes.txt"]}}
    assert report["left_out"] == notes == json.loads((tmp_path / "cache" / "report.json").read_text())["left_out"]
    assert report["skipped"] == {"a/nobody.png": "no face", **unreadable}
    cache = FaceCache(tmp_path / "cache")
    bank = cache.embeddings()
    images = [image for shard in cache.shards for image in cache.shard_images(shard)]
    assert len(cache) == len(images) == len(bank) == 4
    assert images[0].shape == (64, 64, 3) and cache.identity_encoder == "toy"
    assert bank.names == ["a", "a", "b", "b"]
    # an embedding is that of the 112x112 crop of the same photograph
    expected = encoder.embed([load_photograph(source / "a" / "0.png")]).embeddings[0]
    assert torch.equal(bank.embeddings[0], expected)


def test_prepare_reports_what_looks_wrong(encoder, tmp_path):
    """A stranger among four faces of one person, the same pixels in two files, a photograph of two people."""
    source = tmp_path / "source"
    for person, color in (("blue", (0, 0, 255)), ("green", (0, 255, 0))):
        (source / person).mkdir(parents=True)
        for index in range(4):
            draw_person(color, ((80 + index, 80, 44),)).save(source / person / f"{index}.png")
    stranger = PIL.Image.new("RGB", (160, 160), (0, 200, 0))
    stranger.paste(draw_person((255, 255, 255)).crop((30, 30, 130, 130)), (30, 30))
    stranger.save(source / "blue" / "stranger.png")
    shutil.copy(source / "green" / "0.png", source / "green" / "same.png")
    arguments = {"image_size": 32, "outlier_threshold": 0.98}
    report = prepare_faces(source, tmp_path / "kept", encoder, **arguments)
    assert report["duplicates"] == {"green/same.png": "green/0.png"}
    bank = FaceCache(tmp_path / "kept").embeddings()
    blue = bank.embeddings[[name == "blue" for name in bank.names]].numpy()
    median = np.median(blue, axis=0)
    cosines = blue @ median / np.linalg.norm(median)
    assert cosines.argmin() == 4 and cosines[4] < 0.98 < cosines[:4].min()
    assert report["outliers"].keys() == {"blue/stranger.png"} and report["faces"] == 10
    assert abs(report["outliers"]["blue/stranger.png"] - cosines[4]) < 1e-4

    # another threshold, and at last without them: nothing is embedded again
    prepare_faces(source, tmp_path / "dropped", encoder, image_size=32)
    (shard,) = FaceCache(tmp_path / "dropped").shards
    written = shard.stat().st_mtime_ns
    again = prepare_faces(source, tmp_path / "dropped", encoder, **arguments)
    assert again == report and shard.stat().st_mtime_ns == written
    cache_latents(FaceCache(tmp_path / "dropped"), tiny_autoencoder())
    dropped = prepare_faces(source, tmp_path / "dropped", encoder, drop_outliers=True, **arguments)
    assert dropped["faces"] == 9 and dropped["outliers"] == report["outliers"]
    assert dropped["skipped"]["blue/stranger.png"].startswith("outlier: cosine 0.")
    assert dropped["reasons"] == {"outlier": 1}
    assert "blue/stranger.png" not in FaceCache(tmp_path / "dropped").embeddings().names
    # a second call finds the medians of all faces again, not of those that are left
    assert prepare_faces(source, tmp_path / "dropped", encoder, drop_outliers=True, **arguments) == dropped
    # latents of before are made anew
    assert len(LatentSet(cache_latents(FaceCache(tmp_path / "dropped"), tiny_autoencoder()))) == 9
    with pytest.raises(ValueError, match="was left without its outliers below 0.98: choose another folder"):
        prepare_faces(source, tmp_path / "dropped", encoder, **arguments)


def test_a_cache_that_is_not_whole_is_named(encoder, toy_photographs, tmp_path):
    report = prepare_faces(toy_photographs, tmp_path / "cache", encoder, image_size=16)
    (shard,) = FaceCache(tmp_path / "cache").shards
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"has 0 faces, its report.json says {report['faces']}: files are missing"):
        FaceCache(tmp_path / "cache")


def test_changed_photographs_are_another_source(encoder, toy_photographs, tmp_path):
    source = shutil.copytree(toy_photographs, tmp_path / "source")
    prepare_faces(source, tmp_path / "cache", encoder, image_size=16)
    draw_person((1, 2, 3), size=(200, 200)).save(source / "person_0" / "0.png")
    with pytest.raises(ValueError, match=r"begun with other settings \(files: "):
        prepare_faces(source, tmp_path / "cache", encoder, image_size=16)


def test_links_to_nothing_are_reported(encoder, toy_photographs, tmp_path):
    source = shutil.copytree(toy_photographs, tmp_path / "source")
    (source / "person_0" / "9.png").symlink_to(tmp_path / "nothing.png")
    (source / "person_0" / "folder.png").mkdir()
    report = prepare_faces(source, tmp_path / "cache", encoder, image_size=16)
    assert report["skipped"] == {"person_0/9.png": "unreadable"} and report["photographs"] == 25


def test_pictures_of_any_mode_are_read_as_people_see_them(tmp_path):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(4, axis=0)
    PIL.Image.fromarray(ramp).save(tmp_path / "16-bit.png")
    expected = np.arange(256, dtype=np.uint8)[None, :, None].repeat(4, axis=0).repeat(3, axis=2)
    assert np.array_equal(load_photograph(tmp_path / "16-bit.png"), expected)
    PIL.Image.fromarray(expected[:, :, 0]).save(tmp_path / "gray.png")
    assert np.array_equal(load_photograph(tmp_path / "gray.png"), expected)
    red = PIL.Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    red.putpixel((0, 0), (0, 255, 0, 0))  # a color that nobody sees
    red.save(tmp_path / "transparent.png")
    seen = load_photograph(tmp_path / "transparent.png")
    assert seen[0, 0].tolist() == [255] * 3 and seen[1, 1].tolist() == [255, 0, 0]
    red.convert("RGB").convert("CMYK").save(tmp_path / "print.tif")
    assert np.abs(load_photograph(tmp_path / "print.tif")[1, 1].astype(int) - [255, 0, 0]).max() <= 1


def test_prepare_counts_photographs_of_several_people(toy_root, tmp_path):
    (tmp_path / "source" / "a").mkdir(parents=True)
    discs = ((60, 60, 44), (230, 110, 44))
    draw_person((0, 0, 0), discs, size=(320, 200)).save(tmp_path / "source" / "a" / "two.png")
    draw_person((0, 0, 0), discs[:1], size=(320, 200)).save(tmp_path / "source" / "a" / "one.png")
    encoder = FaceEncoder("toy", str(toy_root), det_size=320)
    report = prepare_faces(tmp_path / "source", tmp_path / "cache", encoder, image_size=32)
    assert report["faces"] == 2 and report["several_faces"] == {"a/two.png": 2}


@pytest.mark.parametrize("batch", ["n", 1])
def test_recognition_models_translate_to_torch(tmp_path, batch):
    """The same embeddings, and the gradient that differences give."""
    write_toy_pack(tmp_path, "pack", batch=batch)
    encoder = FaceEncoder("pack", str(tmp_path), det_size=160)
    recognizer = encoder.to_torch()
    faces = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3)).astype(np.uint8)
    pixels = torch.from_numpy(faces).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.allclose(recognizer(pixels), torch.from_numpy(encoder.embed_aligned(list(faces))), atol=1e-5)

    target, direction = recognizer(pixels[1:]).detach(), torch.randn(2, 3, 112, 112)
    moving = pixels[:2].clone().requires_grad_()
    (recognizer(moving) * target).sum().backward()
    step = 1e-2
    ahead, behind = ((recognizer(pixels[:2] + sign * step * direction) * target).sum() for sign in (1, -1))
    assert abs((moving.grad * direction).sum() - (ahead - behind) / (2 * step)) < 2e-3


def test_edgeface_translates_to_torch(assets):
    encoder = FaceEncoder("edgeface", str(assets / "insightface"), det_size=160)
    faces = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3)).astype(np.uint8)
    pixels = (torch.from_numpy(faces).permute(0, 3, 1, 2).float() / 127.5 - 1).requires_grad_()
    embeddings = encoder.to_torch()(pixels)
    assert torch.allclose(embeddings, torch.from_numpy(encoder.embed_aligned(list(faces))), atol=1e-4)
    embeddings.sum().backward()
    assert pixels.grad.abs().amax(dim=(1, 2, 3)).min() > 0


def test_prepared_faces_load_with_datasets(encoder, toy_photographs, tmp_path):
    from datasets import load_dataset

    prepare_faces(toy_photographs, tmp_path / "cache", encoder, image_size=64)
    files = [str(path) for path in FaceCache(tmp_path / "cache").shards]
    rows = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "arrow"))
    assert len(rows) == 24 and rows[0]["image"].size == (64, 64) and rows[23]["identity"] == "person_3"


def test_aligned_faces_are_not_detected_again(encoder, tmp_path):
    source = tmp_path / "source" / "a"
    source.mkdir(parents=True)
    PIL.Image.new("RGB", (112, 112), (0, 0, 255)).save(source / "blue.png")
    PIL.Image.new("RGB", (160, 112)).save(source / "wide.png")
    PIL.Image.new("RGB", (96, 96)).save(source / "small.png")
    report = prepare_faces(source.parent, tmp_path / "cache", encoder, image_size=128, aligned=True)
    assert report["faces"] == 1
    assert report["skipped"]["a/wide.png"] == "not aligned: 160x112 is not square"
    assert "112x112" in report["skipped"]["a/small.png"]


def test_prepare_goes_on_after_sigkill(toy_root, tmp_path):
    """Several shards of real work, killed twice: within the first shard, and after it was finished."""
    source = tmp_path / "source"
    for person in range(4):
        (source / f"p{person}").mkdir(parents=True)
        draw_person((person * 60, 0, 200)).save(source / f"p{person}" / "0000.png")
        for index in range(1, 270):
            os.link(source / f"p{person}" / "0000.png", source / f"p{person}" / f"{index:04d}.png")
    arguments = ["--encoder", "toy", "--encoder-root", str(toy_root), "--det-size", "160", "--image-size", "32"]
    command = ["prepare", str(source), *arguments, "--output"]
    first = tmp_path / "killed" / "faces-00000.parquet"
    for complete in ("prepare.json", first.name):
        run_until_complete([*command, str(tmp_path / "killed")], complete)
    assert not (tmp_path / "killed" / "report.json").exists()
    with pytest.raises(ValueError, match="not finished"):
        FaceCache(tmp_path / "killed")
    written = first.stat().st_mtime_ns
    for folder in ("killed", "whole"):
        cli.main([*command, str(tmp_path / folder)])
    assert first.stat().st_mtime_ns == written  # nothing twice
    killed, whole = FaceCache(tmp_path / "killed"), FaceCache(tmp_path / "whole")
    assert len(killed) == len(whole) == 1080 and killed.embeddings().names == whole.embeddings().names
    assert torch.equal(killed.embeddings().embeddings, whole.embeddings().embeddings)
    for file in ("faces-00000.parquet", "faces-00001.parquet", "prepare.json", "report.json"):
        assert (killed.folder / file).read_bytes() == (whole.folder / file).read_bytes()


def test_other_settings_in_a_begun_cache_are_refused(encoder, toy_photographs, tmp_path):
    prepare_faces(toy_photographs, tmp_path / "cache", encoder, image_size=64)
    with pytest.raises(ValueError, match="image_size: 64 there, 96 now"):
        prepare_faces(toy_photographs, tmp_path / "cache", encoder, image_size=96)


@pytest.mark.parametrize("missing", ["folder", "photographs", "identity"])
def test_nothing_to_prepare_is_an_error(encoder, tmp_path, missing):
    (tmp_path / "empty").mkdir()
    source = tmp_path / ("nowhere" if missing == "folder" else "empty")
    identities = ["nobody"] if missing == "identity" else None
    with pytest.raises(ValueError, match="no photographs"):
        prepare_faces(source, tmp_path / "cache", encoder, identities=identities)
    assert not (tmp_path / "cache").exists()


def test_no_face_at_all_is_an_error(encoder, tmp_path):
    (tmp_path / "source" / "a").mkdir(parents=True)
    PIL.Image.new("RGB", (160, 160)).save(tmp_path / "source" / "a" / "0.png")
    with pytest.raises(ValueError, match="none of 1 photographs gave a face: {'no face': 1}"):
        prepare_faces(tmp_path / "source", tmp_path / "cache", encoder)


def test_an_unknown_selection_is_an_error(encoder, toy_photographs, tmp_path):
    with pytest.raises(ValueError, match="`face`.*'nicest'"):
        prepare_faces(toy_photographs, tmp_path / "cache", encoder, face="nicest")


def test_a_shard_without_faces_is_passed_over(encoder, tmp_path):
    """1,000 photographs and one more without a face: its shard is empty."""
    source = tmp_path / "source" / "a"
    source.mkdir(parents=True)
    draw_person((0, 0, 255)).save(source / "0000.png")
    for index in range(1, 1000):
        os.link(source / "0000.png", source / f"{index:04d}.png")
    PIL.Image.new("RGB", (160, 160)).save(source / "nobody.png")
    prepare_faces(source.parent, tmp_path / "cache", encoder, image_size=16)
    cache = FaceCache(tmp_path / "cache")
    assert len(cache) == len(cache.embeddings()) == 1000
    latents = LatentSet(cache_latents(cache, tiny_autoencoder()))
    assert len(latents) == 1000 and latents.shape == (2, 4, 8, 8)


@pytest.mark.parametrize("count", ["", "2\n"])
def test_lists_of_identities_may_be_numbers(toy_root, toy_photographs, tmp_path, capsys, count):
    source = tmp_path / "source"
    for number in range(3):
        shutil.copytree(toy_photographs / f"person_{number}", source / f"{number:07d}")
    (tmp_path / "people.txt").write_text(count + "0000000\t6\n0000002\t6\n")
    arguments = ["--encoder", "toy", "--encoder-root", str(toy_root), "--det-size", "160", "--image-size", "16"]
    arguments += ["--identities", str(tmp_path / "people.txt"), "--output", str(tmp_path / "cache")]
    cli.main(["prepare", str(source), *arguments])
    assert "12 faces of 2 identities from 12 photographs" in capsys.readouterr().out


def test_command_line_names_the_problem(toy_root, tmp_path):
    arguments = ["--encoder", "toy", "--encoder-root", str(toy_root), "--output", str(tmp_path / "cache")]
    assert "nowhere has no photographs" in complaint("prepare", tmp_path / "nowhere", *arguments)


def test_real_photographs(assets, tmp_path):
    """Genuine pairs of LFW are alike to EdgeFace, impostors are not: the alignment feeds the recognizer as it
    should."""
    encoder = FaceEncoder("edgeface", str(assets / "insightface"), det_size=320)
    people = ["Aaron_Peirsol", "Abdullah_Gul", "Al_Gore", "Alejandro_Toledo"]
    (tmp_path / "people.txt").write_text("\n".join(people))
    source = tmp_path / "source"
    for name in people:
        (source / name).mkdir(parents=True)
        for file in sorted((assets / "lfw" / "images" / name).iterdir())[:4]:
            (source / name / file.name).symlink_to(file)
    report = prepare_faces(source, tmp_path / "cache", encoder, face="central")
    assert report["skipped"] == {} and json.loads((tmp_path / "cache" / "report.json").read_text()) == report
    bank = FaceCache(tmp_path / "cache").embeddings()
    similarity = bank.embeddings @ bank.embeddings.T
    labels = np.array(bank.names)
    same = torch.from_numpy(labels[:, None] == labels[None])
    genuine = similarity[same & ~torch.eye(len(labels), dtype=torch.bool)]
    assert genuine.mean() > 0.5 and similarity[~same].mean() < 0.15
