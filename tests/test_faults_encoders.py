"""What people hit first with encoders, recognizers and banks: each is right, or an error that says what to do."""

import os
import shutil
import warnings

import numpy as np
import onnx
import onnxruntime
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import draw_person, write_toy_pack
from safetensors import safe_open
from safetensors.torch import save_file

from uiface_diffusers import IdentityBank, IdentityProjector, IResNetImageProcessor, default_checkpoint
from uiface_diffusers.data import FaceCache, prepare_faces
from uiface_diffusers.encoders import EncoderMark, check_same_encoder, common_encoder, projector_mark
from uiface_diffusers.evaluation import TorchvisionFeatures, load_lpips, load_recognizer, measure_leakage
from uiface_diffusers.faces import FaceEncoder, execution_providers, load_photograph
from uiface_diffusers.files import check_settings
from uiface_diffusers.fingerprint import model_fingerprint
from uiface_diffusers.generation import generate_dataset
from uiface_diffusers.identities import import_identities, inspect_bank, keep_distinct
from uiface_diffusers.models.face_recognition import IResNetConfig, IResNetModel
from uiface_diffusers.pictures import rgb_bytes

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1000\n"
ORIENTATION = 0x0112
PHOTOGRAPH = draw_person((0, 255, 0), ((90, 70, 44),))


@pytest.fixture(scope="module")
def encoder(toy_root):
    return FaceEncoder("toy", str(toy_root), det_size=160)


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory) -> FaceEncoder:
    """A pack of the right name with another recognizer's weights."""
    root = tmp_path_factory.mktemp("exchanged")
    write_toy_pack(root)
    write_toy_pack(root, "other")
    shutil.copy(root / "models" / "other" / "recognizer.onnx", root / "models" / "toy" / "recognizer.onnx")
    return FaceEncoder("toy", str(root), det_size=160)


def unit(number: int, dimension: int = 16, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(number, dimension, generator=torch.Generator().manual_seed(seed)))


def rotated(image: PIL.Image.Image, path) -> None:
    """As a phone held upright saves it: the pixels lie, the tag says how they stand."""
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = 6
    image.transpose(PIL.Image.Transpose.ROTATE_90).save(path, exif=exif)


def transparent(image: PIL.Image.Image, path) -> None:
    """What is gray in the photograph is transparent, over a color that nobody sees."""
    pixels = np.asarray(image.convert("RGBA")).copy()
    pixels[(pixels[..., :3] == 90).all(axis=2)] = (255, 0, 0, 0)
    PIL.Image.fromarray(pixels).save(path)


def on_white(image: PIL.Image.Image) -> np.ndarray:
    pixels = np.asarray(image).copy()
    pixels[(pixels == 90).all(axis=2)] = 255
    return pixels


def palette(image: PIL.Image.Image, path) -> None:
    quantized = image.quantize(8)
    gray = [i for i in range(8) if quantized.getpalette()[3 * i : 3 * i + 3] == [90, 90, 90]]
    quantized.save(path, transparency=gray[0])


KINDS = {
    "exif": (rotated, lambda image: np.asarray(image)),
    "transparent": (transparent, on_white),
    "palette": (palette, on_white),
    "cmyk": (lambda image, path: image.convert("CMYK").save(path, "tiff"), lambda image: np.asarray(image)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_embed_sees_a_picture_as_people_do(encoder, tmp_path, kind):
    write, see = KINDS[kind]
    path = tmp_path / "picture.png"
    write(PHOTOGRAPH, path)
    expected = see(PHOTOGRAPH)
    assert np.abs(rgb_bytes(path).astype(int) - expected).max() <= 1
    assert np.array_equal(load_photograph(path), rgb_bytes(path))
    truth = encoder.embed([expected]).embeddings
    picture = PIL.Image.open(path)
    for given in ([picture], picture, [str(path)], path):
        assert F.cosine_similarity(encoder.embed(given).embeddings, truth).item() > 0.9999
    assert torch.allclose(encoder.embed_pictures([picture]), encoder.embed_pictures([rgb_bytes(path)]))
    processor = IResNetImageProcessor()
    pixels = [processor(each, return_tensors="pt").pixel_values for each in (picture, expected, path)]
    assert all(torch.allclose(each, pixels[1], atol=0.02) for each in pixels)


def test_sixteen_bit_gray_is_scaled(encoder):
    gray = np.random.default_rng(0).integers(0, 256, (112, 112)).astype(np.uint8)
    wide = PIL.Image.fromarray(gray.astype(np.uint16) * 257)
    assert wide.mode.startswith("I")
    expected = gray[..., None].repeat(3, axis=2)
    for picture in (wide, PIL.Image.fromarray(gray), gray, gray[..., None], gray.astype(np.uint16) * 257):
        assert np.array_equal(rgb_bytes(picture), expected)
    assert torch.equal(encoder.embed_pictures([wide]), encoder.embed_pictures([expected]))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_every_mode_of_pillow_becomes_rgb(mode):
    image = PIL.Image.new("RGB", (6, 4), (255, 255, 255))
    for step in {"La": ("LA", "La"), "PA": ("P", "PA"), "RGBa": ("RGBA", "RGBa")}.get(mode, (mode,)):
        image = image.convert(step)
    pixels = rgb_bytes(image)
    assert pixels.shape == (4, 6, 3) and pixels.dtype == np.uint8 and pixels.min() >= 254


def test_pictures_without_a_range_are_refused(encoder):
    face = np.zeros((112, 112, 3))
    with pytest.raises(ValueError, match="photograph 0: .*uint8 in 0..255 or uint16 .* float64"):
        encoder.embed([face])
    with pytest.raises(ValueError, match="uint8 in 0..255, this one is float64"):
        encoder([face])
    with pytest.raises(ValueError, match=r"\(3, 112, 112\)"):
        rgb_bytes(np.zeros((3, 112, 112), np.uint8))
    with pytest.raises(ValueError, match="floating point"):
        rgb_bytes(PIL.Image.new("F", (4, 4)))
    with pytest.raises(ValueError, match="70000 are beyond 16 bits"):
        rgb_bytes(PIL.Image.fromarray(np.full((4, 4), 70000, np.int32)))


def test_the_fingerprint_goes_where_the_name_goes(encoder, toy_photographs, tiny_pipeline, tmp_path):
    mark = EncoderMark("toy", encoder.fingerprint)
    assert encoder.embed([PHOTOGRAPH]).encoder_mark == mark
    prepare_faces(toy_photographs, tmp_path / "cache", encoder, image_size=16)
    cache = FaceCache(tmp_path / "cache")
    assert cache.encoder_mark == cache.embeddings().encoder_mark == mark
    bank = cache.embeddings()
    bank.take([0, 6]).save(tmp_path / "bank.safetensors")
    assert IdentityBank.load(tmp_path / "bank.safetensors").encoder_mark == mark
    projector = IdentityProjector(16, 32, identity_encoder="toy", identity_encoder_fingerprint=encoder.fingerprint)
    projector.save_pretrained(tmp_path / "projector")
    assert projector_mark(IdentityProjector.from_pretrained(tmp_path / "projector")) == mark
    # images do not depend on it: data sets of earlier versions go on
    torch.manual_seed(0)
    earlier, now = IdentityProjector(16, 32), IdentityProjector(16, 32)
    now.load_state_dict(earlier.state_dict())
    now.register_to_config(identity_encoder_fingerprint=encoder.fingerprint)
    assert model_fingerprint(earlier) == model_fingerprint(now)
    identities = IdentityBank(bank.embeddings[[0, 6]], *mark[:1], ["a", "b"], mark.fingerprint)
    generate_dataset(tiny_pipeline, identities, tmp_path / "data", 1, encoder=encoder, num_inference_steps=1)
    settings = (tmp_path / "data" / "generation.json").read_text()
    assert settings.count(encoder.fingerprint) == 2
    assert IdentityBank.load(tmp_path / "data" / "identities.safetensors").encoder_mark == mark


def test_other_weights_under_the_right_name_are_refused(encoder, exchanged, tiny_pipeline, tmp_path):
    """Wherever names are compared; the error has both fingerprints."""
    both = f"{encoder.fingerprint}.*{exchanged.fingerprint}|{exchanged.fingerprint}.*{encoder.fingerprint}"
    assert encoder.fingerprint != exchanged.fingerprint
    bank = IdentityBank(unit(2), "toy", ["a", "b"], encoder.fingerprint)
    foreign = IdentityBank(unit(2, seed=1), "toy", ["a", "b"], exchanged.fingerprint)
    calls = [
        lambda: generate_dataset(tiny_pipeline, bank, tmp_path / "data", encoder=exchanged),
        lambda: keep_distinct(bank, [foreign]),
        lambda: inspect_bank(bank, foreign),
        lambda: measure_leakage(bank, foreign),
        lambda: common_encoder({"a": EncoderMark("toy"), "b": bank.encoder_mark, "c": foreign.encoder_mark}),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=both) as error:
            call()
        assert "use one model pack for both" in str(error.value)
    assert not (tmp_path / "data").exists()
    tiny_pipeline.identity_projector.register_to_config(identity_encoder_fingerprint=encoder.fingerprint)
    tiny_pipeline.prepare_identity_embeds(bank)
    with pytest.raises(ValueError, match=both):
        tiny_pipeline.prepare_identity_embeds(foreign)


def test_fingerprints_decide_and_names_only_without_them():
    def check(mark: tuple, wanted: tuple) -> None:
        check_same_encoder("the bank", EncoderMark(*mark), "the pipeline", EncoderMark(*wanted))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # one recognizer in two packs; nothing that both say
        for mark, wanted in (
            (("w600k", "aaa"), ("buffalo_l", "aaa")), ((None, "aaa"), ("x", "aaa")), ((None, "aaa"), ("x", None)),
            ((None, "aaa"), (None, None)), ((None, None), ("x", None)), (("x", None), ("x", None)),
        ):  # fmt: skip
            check(mark, wanted)
            check(wanted, mark)
        refused = [((None, "aaa"), ("x", "bbb")), (("x", "aaa"), ("x", "bbb")), ((None, "aaa"), (None, "bbb"))]
        for mark, wanted in [*refused, (("x", "aaa"), ("y", None)), (("x", None), ("y", None))]:
            for pair in ((mark, wanted), (wanted, mark)):
                with pytest.raises(ValueError, match="use one model pack for both"):
                    check(*pair)
    message = r"^the bank comes from an unnamed encoder \(weights aaa\), the pipeline from encoder `x` \(weights bbb\)"
    with pytest.raises(ValueError, match=message):
        check(*refused[0])


def test_the_common_encoder_is_the_one_that_says_most():
    def common(*marks: tuple) -> EncoderMark:
        return common_encoder({f"cache {i}": EncoderMark(*mark) for i, mark in enumerate(marks)})

    assert common((None, None), ("x", None)) == ("x", None)
    assert common((None, None), (None, "aaa"), ("x", None)) == (None, "aaa")
    assert common((None, "aaa"), ("w600k", "aaa"), ("buffalo_l", "aaa")) == ("w600k", "aaa")
    # the second says nothing that differs from the others
    with pytest.raises(ValueError, match="cache 2 comes from encoder `y`, cache 0 from encoder `x`"):
        common(("x", None), (None, None), ("y", None))
    with pytest.raises(ValueError, match="cache 2 .* cache 0"):
        common((None, "aaa"), ("x", None), ("x", "bbb"))


@pytest.mark.parametrize("part", ["recognizer", "detector"])
def test_a_pack_exchanged_within_prepare_is_refused(tmp_path, toy_photographs, part):
    write_toy_pack(tmp_path, "toy")
    write_toy_pack(tmp_path, "other")
    first = FaceEncoder("toy", str(tmp_path), det_size=160)
    prepare_faces(toy_photographs, tmp_path / "cache", first, image_size=16)
    (tmp_path / "cache" / "report.json").unlink()
    file = tmp_path / "models" / "toy" / f"{part}.onnx"
    model = onnx.load(tmp_path / "models" / "other" / f"{part}.onnx")
    model.producer_name = "another"
    onnx.save(model, file)
    now = FaceEncoder("toy", str(tmp_path), det_size=160)
    name = "fingerprint" if part == "recognizer" else "detector_fingerprint"
    with pytest.raises(ValueError, match=f"{getattr(first, name)}' there, '{getattr(now, name)}' now"):
        prepare_faces(toy_photographs, tmp_path / "cache", now, image_size=16)


def test_files_without_a_fingerprint_are_warned_of_once(encoder, toy_photographs, tmp_path):
    prepare_faces(toy_photographs, tmp_path / "cache", encoder, image_size=16)
    file = tmp_path / "cache" / "prepare.json"
    text = file.read_text()
    file.write_text(text.replace("identity_encoder_fingerprint", "something").replace("detector_", "any_"))
    check = {"identity_encoder_fingerprint": encoder.fingerprint, "identity_encoder": "toy"}
    known = ["identity_encoder_fingerprint"]
    (tmp_path / "settings.json").write_text('{"settings": {"identity_encoder": "toy"}}')
    with pytest.warns(UserWarning, match="settings.json does not say `identity_encoder_fingerprint`"):
        check_settings(tmp_path / "settings.json", check, if_known=known)
    assert FaceCache(tmp_path / "cache").encoder_mark == EncoderMark("toy")
    earlier, mark = EncoderMark("once"), EncoderMark("once", "0123")
    with pytest.warns(UserWarning, match="the bank comes from encoder `once` but does not name its weights"):
        check_same_encoder("the bank", earlier, "the pack", mark)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_same_encoder("the bank", earlier, "the pack", mark)
        check_settings(tmp_path / "settings.json", check, if_known=known)
        # nothing that could be compared
        check_same_encoder("the bank", EncoderMark("two"), "the pipeline", EncoderMark("two"))


def test_the_embedded_checkpoint_loads_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bank = IdentityBank.load(default_checkpoint() / "identities.safetensors")
        projector = IdentityProjector.from_pretrained(default_checkpoint(), subfolder="identity_projector")
        check_same_encoder("the bank", bank.encoder_mark, "the pipeline", projector_mark(projector))
    assert bank.encoder_mark == EncoderMark("edgeface")


def test_weights_beside_the_model_are_in_the_fingerprint(tmp_path):
    write_toy_pack(tmp_path)
    file = tmp_path / "models" / "toy" / "recognizer.onnx"
    model = onnx.load(file)
    onnx.save(model, file, save_as_external_data=True, location="recognizer.onnx.data", size_threshold=0)
    before = FaceEncoder("toy", str(tmp_path), det_size=160).fingerprint
    data = file.with_name("recognizer.onnx.data")
    content = bytearray(data.read_bytes())
    content[:4] = np.float32(0.5).tobytes()
    data.write_bytes(content)
    assert FaceEncoder("toy", str(tmp_path), det_size=160).fingerprint != before


DAMAGES = {
    "empty": (lambda content: b"", "is empty"),
    "pointer": (lambda content: LFS_POINTER, "is a Git LFS pointer, .* `git lfs pull`"),
    "cut": (lambda content: content[: len(content) // 2], "is damaged, cut short"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_models_are_named(tmp_path, damage):
    write_toy_pack(tmp_path)
    file = tmp_path / "models" / "toy" / "recognizer.onnx"
    change, message = DAMAGES[damage]
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=f"`toy`.*no recognition model; .*recognizer.onnx {message}"):
        FaceEncoder("toy", str(tmp_path))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_that_is_not_needed_breaks_nothing(encoder, tmp_path, damage):
    write_toy_pack(tmp_path)
    folder = tmp_path / "models" / "toy"
    (folder / "attributes.onnx").write_bytes(DAMAGES[damage][0]((folder / "recognizer.onnx").read_bytes()))
    (folder / "._detector.onnx").write_bytes(b"of a Mac")
    with pytest.warns(UserWarning, match=r"is used without a file: .*attributes\.onnx " + DAMAGES[damage][1]):
        found = FaceEncoder("toy", str(tmp_path), det_size=160)
    assert found.encoder_mark == encoder.encoder_mark
    assert torch.equal(found.embed([PHOTOGRAPH]).embeddings, encoder.embed([PHOTOGRAPH]).embeddings)


def test_a_pack_one_folder_too_deep_is_told(tmp_path):
    write_toy_pack(tmp_path, "toy/toy")
    with pytest.raises(ValueError, match="`toy` .*one folder too deep: its files are in .*models/toy/toy"):
        FaceEncoder("toy", str(tmp_path))


def test_roots_are_taken_literally(encoder, exchanged, tmp_path, monkeypatch):
    """Glob characters, `~`, and a folder of the pack's name where one works."""
    write_toy_pack(tmp_path / "run[2]")
    (tmp_path / "run2" / "models").mkdir(parents=True)
    shutil.copytree(os.path.dirname(exchanged.recognizer.model_file), tmp_path / "run2" / "models" / "toy")
    assert FaceEncoder("toy", tmp_path / "run[2]").fingerprint == encoder.fingerprint
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "run2" / "models")
    assert FaceEncoder("toy", "~/run[2]").fingerprint == encoder.fingerprint


def test_execution_providers(toy_root):
    cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    assert execution_providers(["cuda", "CPU", cpu.lower()], [cuda, cpu]) == [cuda, cpu, cpu]
    assert execution_providers(None) is None
    devices = torch.cuda.device_count() or 8
    assert execution_providers(["cuda", "cpu"], [cuda, cpu], 3) == [(cuda, {"device_id": str(3 % devices)}), cpu]
    assert execution_providers(None, [cuda, cpu], 1) == [(cuda, {"device_id": str(1 % devices)}), cpu]
    assert execution_providers(None, [cpu], 1) is None
    # torch's device, as `--device` names it
    assert execution_providers(None, [cuda, cpu], 1, "cuda:5") == [(cuda, {"device_id": "5"}), cpu]
    assert execution_providers(["cuda"], [cuda, cpu], device=torch.device("cuda", 2)) == [(cuda, {"device_id": "2"})]
    assert execution_providers(None, [cuda, cpu], 3, "cuda:0") == [(cuda, {"device_id": "0"}), cpu]
    assert execution_providers(None, [cuda, cpu], 0, "cuda:0") is None
    assert execution_providers(None, [cuda, cpu], 1, "cpu") == [cpu]
    assert execution_providers(["cuda"], [cuda, cpu], device="cpu") == [cuda]
    with pytest.raises(ValueError, match=r"`cuda` \(--providers\) is not available: onnxruntime has cpu here"):
        execution_providers(["cuda"], [cpu])
    assert FaceEncoder("toy", str(toy_root), providers=["cpu"]).recognizer.session.get_providers() == [cpu]
    if cuda not in onnxruntime.get_available_providers():
        with pytest.raises(ValueError, match="`cuda`.* is not available"):
            FaceEncoder("toy", str(toy_root), providers=["cuda"])


@pytest.mark.parametrize("size", [300, 0, -32])
def test_detector_sizes_are_multiples_of_32(toy_root, size):
    with pytest.raises(ValueError, match=f"multiple of 32, such as 320 or 640, but is {size}"):
        FaceEncoder("toy", str(toy_root), det_size=size)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_safetensors_are_named(tmp_path, damage):
    IdentityBank(unit(3), "toy").save(tmp_path / "bank.safetensors")
    content = (tmp_path / "bank.safetensors").read_bytes()
    change, message = DAMAGES[damage]
    (tmp_path / "bank.safetensors").write_bytes(change(content))
    for read in (
        IdentityBank.load,
        lambda file: load_lpips("alex", file),
        lambda file: TorchvisionFeatures("vgg16", file),
    ):
        with pytest.raises(ValueError, match=f"bank.safetensors {message}"):
            read(tmp_path / "bank.safetensors")
    IResNetModel(IResNetConfig(layers=18, width=8, embedding_dim=16, image_size=32)).save_pretrained(
        tmp_path / "model"
    )
    IResNetImageProcessor().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=f"model.safetensors {message}"):
        load_recognizer(tmp_path / "model")


def test_lpips_backbones_say_what_to_do(tmp_path, monkeypatch):
    torch.save({"features.0.weight": torch.zeros(2)}, tmp_path / "alexnet.pth")
    with pytest.raises(ValueError, match=r"--lpips-backbone.*alexnet.pth is a zip archive or a pickle.*save_file"):
        load_lpips("alex", tmp_path / "alexnet.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"`alex` cannot be downloaded .*give its file by --lpips-backbone"):
        load_lpips("alex")


def test_published_embeddings_become_a_bank(tmp_path):
    """Each form gives the same unit vectors; what was not of unit length and what is there twice is counted."""
    embeddings = unit(6) * torch.arange(1, 7)[:, None]
    embeddings[4] = 3 * embeddings[1]
    expected = F.normalize(embeddings)
    np.save(tmp_path / "plain.npy", embeddings.numpy())
    np.save(tmp_path / "big-endian.npy", embeddings.numpy().astype(">f8"))
    np.savez(tmp_path / "several.npz", labels=np.arange(6), contexts=embeddings.numpy())
    np.savez(tmp_path / "single.npz", embeddings.numpy())
    torch.save(embeddings, tmp_path / "tensor.pt")
    torch.save(list(embeddings.unbind()), tmp_path / "list.pt")
    torch.save({"labels": torch.arange(6), "contexts": embeddings[:, None]}, tmp_path / "several.pth")
    torch.save({f"person {i}": row for i, row in enumerate(embeddings)}, tmp_path / "named.pt")
    save_file({"embeddings": embeddings}, tmp_path / "bank.safetensors")
    for file in sorted(tmp_path.iterdir()):
        bank, report = import_identities(file, "elasticface", "contexts" if file.stem == "several" else None)
        assert torch.allclose(bank.embeddings, expected, atol=1e-6), file
        assert bank.identity_encoder == "elasticface" and torch.allclose(bank.embeddings.norm(dim=1), torch.ones(6))
        assert (report["identities"], report["dimension"], report["not of unit length"]) == (6, 16, 5)
        assert report["duplicates"] == {bank.names[4]: bank.names[1]}
        assert bank.names[1] == ("person 1" if file.stem == "named" else "000001")


class Executed:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_files_that_hold_no_embeddings_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = unit(20)
    bad[3], bad[7, 2], bad[11, 0] = 0, float("nan"), float("inf")
    np.save("bad.npy", bad.numpy())
    np.save("objects.npy", np.array([Executed()], dtype=object), allow_pickle=True)
    np.savez("objects.npz", np.array([Executed()], dtype=object), allow_pickle=True)
    torch.save([Executed()], "objects.pt")
    np.save("labels.npy", np.arange(12).reshape(3, 4))
    np.save("cube.npy", np.zeros((3, 4, 5), np.float32))
    np.savez("several.npz", a=np.zeros((2, 3)), b=np.zeros(3))
    np.save("good.npy", unit(3).numpy())
    for name, content in (
        ("empty.npy", b""),
        ("pointer.npy", LFS_POINTER),
        ("cut.npy", open("good.npy", "rb").read()[:150]),
    ):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "list.csv").write_text("1,2\n")
    cases = [
        ("bad.npy", None, r"3 of 20 rows of bad.npy are zero or not finite: rows 3, 7, 11, counted from 0"),
        ("objects.npy", None, "pickled Python objects, which are not executed"),
        ("objects.npz", None, "pickled Python objects, which are not executed"),
        ("objects.pt", None, "objects.pt is damaged, or holds more than tensors"),
        ("labels.npy", None, r"\(3, 4\) of int64: embeddings are \(N, identity_dim\) floating point"),
        ("cube.npy", None, r"\(3, 4, 5\)"),
        ("several.npz", None, r"choose one by --key: `a` \(2, 3\), `b` \(3,\)"),
        ("several.npz", "c", r"no `c`; its arrays \(--key\) are `a`"),
        ("good.npy", "a", "leave out --key"),
        ("empty.npy", None, "empty.npy is empty"),
        ("pointer.npy", None, "pointer.npy is a Git LFS pointer"),
        ("cut.npy", None, "cut.npy is damaged, cut short"),
        ("missing.npy", None, "missing.npy is missing"),
        ("list.csv", None, "list.csv is no file of embeddings: .npy, .npz, .pt"),
    ]
    for file, key, message in cases:
        with pytest.raises(ValueError, match=message):
            import_identities(file, "elasticface", key)
    assert not (tmp_path / "executed").exists()


def test_banks_of_earlier_versions_are_read(tmp_path):
    save_file({"embeddings": unit(2)}, tmp_path / "bank.safetensors", metadata={"identity_encoder": "toy"})
    assert IdentityBank.load(tmp_path / "bank.safetensors").encoder_mark == EncoderMark("toy")
    IdentityBank(unit(2), "toy").save(tmp_path / "unmarked.safetensors")
    with safe_open(tmp_path / "unmarked.safetensors", framework="pt") as file:
        assert "identity_encoder_fingerprint" not in file.metadata()
