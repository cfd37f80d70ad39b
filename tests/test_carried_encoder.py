"""The encoder that a pipeline can carry: its training, its form on disk, and who takes its embeddings."""

import json
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import accelerate
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, complaint, draw_person, run_script, write_toy_pack
from hub_server import HubServer

from uiface_diffusers import IdentityBank, IResNetConfig, IResNetModel, UIFacePipeline, cli
from uiface_diffusers.data import FaceCache, prepare_faces
from uiface_diffusers.encoders import CARRIED_FILES, IDENTITY_ENCODER, EncoderMark
from uiface_diffusers.evaluation.recognizers import load_recognizer
from uiface_diffusers.faces import CarriedEncoder, FaceEncoder, NoFaceError, UnusableFaceError
from uiface_diffusers.training.distillation import compare_copy, save_carried, vary

sys.path.insert(0, str(REPOSITORY / "training"))
import distill_encoder  # noqa: E402
import export_checkpoint  # noqa: E402

TINY = {"layers": 18, "width": 4, "image_size": 32}


def tiny_copy(seed: int = 0) -> IResNetModel:
    torch.manual_seed(seed)
    return IResNetModel(IResNetConfig(**TINY, embedding_dim=16)).eval()


def faces(number: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (number, 112, 112, 3), np.uint8))


@pytest.fixture
def folder(tiny_pipeline, tmp_path) -> Path:
    """A pipeline's folder that carries an encoder."""
    tiny_pipeline.save_pretrained(tmp_path / "model")
    save_carried(tiny_copy(), tmp_path / "model" / IDENTITY_ENCODER, EncoderMark("toy"), [])
    return tmp_path / "model"


@pytest.fixture
def carrying(folder) -> UIFacePipeline:
    pipe = UIFacePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def caches(toy_root, toy_photographs, tmp_path_factory) -> tuple[Path, Path]:
    """Of two halves of the people."""
    root, encoder = tmp_path_factory.mktemp("caches"), FaceEncoder("toy", str(toy_root), det_size=160)
    for name, people in (("seen", ("0", "1")), ("unseen", ("2", "3"))):
        identities = [f"person_{number}" for number in people]
        prepare_faces(toy_photographs, root / name, encoder, image_size=32, identities=identities)
    return root / "seen", root / "unseen"


def test_aligned_faces_need_no_pack(carrying):
    bank = carrying.embed_photographs(faces(3), aligned=True)
    assert bank.embeddings.shape == (3, 16) and torch.allclose(bank.embeddings.norm(dim=1), torch.ones(3))
    assert bank.identity_encoder == "toy-distilled" and len(bank.identity_encoder_fingerprint) == 12
    # what the network itself gives of the faces at its size
    model = tiny_copy()
    pixels = torch.from_numpy(np.stack(faces(3))).permute(0, 3, 1, 2).float() / 127.5 - 1
    pixels = F.interpolate(pixels, (32, 32), mode="bilinear", antialias=True)
    expected = F.normalize(model(pixels).embeddings.detach())
    assert (bank.embeddings * expected).sum(dim=1).min() > 0.9999  # half precision
    out = carrying(bank, num_inference_steps=2)
    plain = carrying(bank.embeddings, num_inference_steps=2)
    assert len(out.images) == 3 and len(plain.images) == 3


def test_it_embeds_where_the_pipeline_computes(carrying):
    """As after `enable_sequential_cpu_offload`, which needs an accelerator: the weights are on the meta device."""
    expected = carrying.embed_photographs(faces(1), aligned=True)
    for component in carrying.components.values():
        if isinstance(component, torch.nn.Module):
            accelerate.cpu_offload(component, torch.device("cpu"), offload_buffers=True)
    assert carrying.device.type == "meta"
    assert torch.equal(carrying.embed_photographs(faces(1), aligned=True).embeddings, expected.embeddings)


def test_whole_photographs_need_a_detector(carrying, toy_root, tmp_path):
    draw_person((10, 200, 90)).save(tmp_path / "photograph.png")
    with pytest.raises(ValueError, match=r"does not find them in photographs.*FaceEncoder\(\"buffalo_l\"\).*download"):
        carrying.embed_photographs(tmp_path / "photograph.png")
    with pytest.raises(UnusableFaceError, match="photograph 0: not aligned: 160x100 is not square"):
        carrying.embed_photographs(draw_person((10, 200, 90), size=(160, 100)), aligned=True)
    # any pack's: its recognizer has no say
    write_toy_pack(tmp_path, "judge")
    for name, root in (("toy", toy_root), ("judge", tmp_path)):
        detector = FaceEncoder(name, str(root), det_size=160)
        found = carrying.embed_photographs(tmp_path / "photograph.png", detector=detector)
        carried = CarriedEncoder(carrying.carried_encoder())
        aligned = detector._align(np.asarray(draw_person((10, 200, 90))), "largest")
        assert torch.equal(found.embeddings, torch.from_numpy(carried.embed_aligned([aligned])))
    with pytest.raises(NoFaceError, match="no face found in photograph 0"):
        carrying.embed_photographs(np.zeros((160, 160, 3), np.uint8), detector=detector)


def test_only_the_pipeline_that_carries_it_takes_its_embeddings(carrying, folder, tiny_pipeline, tmp_path):
    bank = carrying.embed_photographs(faces(1), aligned=True)
    carrying.prepare_identity_embeds(bank)
    UIFacePipeline.from_pipe(carrying).prepare_identity_embeds(bank)
    carrying.save_pretrained(tmp_path / "copy")
    assert sorted(file.name for file in (tmp_path / "copy" / IDENTITY_ENCODER).iterdir()) == sorted(CARRIED_FILES)
    UIFacePipeline.from_pretrained(tmp_path / "copy").prepare_identity_embeds(bank)
    # the same model without it, as before
    assert tiny_pipeline.carried_encoder() is None
    with pytest.raises(ValueError, match=r"`toy-distilled` \(weights \w+\), this pipeline from encoder `toy`"):
        tiny_pipeline.prepare_identity_embeds(bank)
    with pytest.raises(ValueError, match="carries no encoder .*`FaceEncoder.embed`.*encoder `toy`"):
        tiny_pipeline.embed_photographs(faces(1), aligned=True)
    # another copy of the same teacher is another encoder
    save_carried(tiny_copy(seed=1), tmp_path / "copy" / IDENTITY_ENCODER, EncoderMark("toy"), [])
    with pytest.raises(ValueError, match="`toy-distilled`"):
        UIFacePipeline.from_pretrained(tmp_path / "copy").prepare_identity_embeds(bank)
    # nor does the folder speak for a projector of another space
    carrying.identity_projector.register_to_config(identity_encoder="another")
    with pytest.raises(ValueError, match="encoder `toy`, this pipeline from encoder `another`"):
        carrying.prepare_identity_embeds(bank)


def test_a_checkpoint_is_exported_with_it(caches, carrying, tmp_path, capsys):
    save_carried(tiny_copy(), tmp_path / "copy", EncoderMark("toy", FaceCache(caches[0]).encoder_mark.fingerprint), [])
    (tmp_path / "copy" / "checkpoint").mkdir()  # of its training: not taken
    argv = [carrying.config["_name_or_path"], "--faces", caches[0], "--num-identities", "2", "--max-similarity", "1"]
    argv = [str(word) for word in [*argv, "--output", tmp_path / "shipped"]]
    export_checkpoint.main([*argv, "--identity-encoder", str(tmp_path / "copy")])
    assert sorted(each.name for each in (tmp_path / "shipped" / IDENTITY_ENCODER).iterdir()) == sorted(CARRIED_FILES)
    pipe = UIFacePipeline.from_pretrained(tmp_path / "shipped")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of weights that cannot be compared, too
        pipe.prepare_identity_embeds(pipe.embed_photographs(faces(1), aligned=True))
    save_carried(tiny_copy(), tmp_path / "copy", EncoderMark("another"), [])
    with pytest.raises(
        ValueError, match="copy is a copy, which comes from encoder `another`, .*seen from encoder `toy`"
    ):
        export_checkpoint.main([*argv, "--identity-encoder", str(tmp_path / "copy")])


def test_loading_does_not_touch_it(folder):
    """The pipeline's components and its loading are what they were; a damaged encoder is named when it is used."""
    (folder / IDENTITY_ENCODER / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    pipe = UIFacePipeline.from_pretrained(folder)
    assert IDENTITY_ENCODER not in pipe.components
    assert IDENTITY_ENCODER not in json.loads((folder / "model_index.json").read_text())
    with pytest.raises(ValueError, match="model.safetensors.*LFS"):
        pipe.embed_photographs(faces(1), aligned=True)
    config = folder / IDENTITY_ENCODER / "config.json"
    config.write_text(json.dumps({"layers": 18}))
    with pytest.raises(ValueError, match="config.json has no `approximates`"):
        pipe.embed_photographs(faces(1), aligned=True)


def test_it_comes_from_the_hub(folder, tmp_path):
    program = """
        import sys
        import numpy as np
        from uiface_diffusers import UIFacePipeline
        ours = UIFacePipeline.from_pretrained(sys.argv[1])
        ours.push_to_hub("tester/model")
        pipe, faces = UIFacePipeline.from_pretrained("tester/model"), np.zeros((112, 112, 3), np.uint8)
        bank = pipe.embed_photographs(faces, aligned=True)
        assert bank.encoder_mark == ours.embed_photographs(faces, aligned=True).encoder_mark
        pipe.prepare_identity_embeds(bank)
        ours.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="tester/saved")
        assert UIFacePipeline.from_pretrained("tester/saved").carried_encoder() is not None
    """
    with HubServer(tmp_path / "hub") as hub:
        environment = {**hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        process = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), folder, tmp_path / "saved"],
            env=environment,
            capture_output=True,
            text=True,
        )
    assert process.returncode == 0, process.stderr


def test_commands(folder, toy_root, tmp_path, capsys):
    images = tmp_path / "photographs"
    for number, color in enumerate(((10, 200, 90), (200, 10, 90), (10, 20, 230))):
        (images / f"person_{number}").mkdir(parents=True)
        draw_person(color).save(images / f"person_{number}" / "0.png")
    command = ["identities", "make", folder, "--from-images", images, "--number", "3", "--max-similarity", "1"]
    command += ["--output", tmp_path / "bank.safetensors", "--encoder", "model"]
    assert "does not find them in photographs" in complaint(*command)
    cli.main([str(word) for word in [*command, "--aligned"]])
    bank = IdentityBank.load(tmp_path / "bank.safetensors")
    assert bank.identity_encoder == "toy-distilled" and len(bank) == 3
    detector = ["--detector", "toy", "--encoder-root", toy_root, "--det-size", "160"]
    cli.main([str(word) for word in [*command, *detector]])
    found = IdentityBank.load(tmp_path / "bank.safetensors")
    assert found.encoder_mark == bank.encoder_mark and not torch.equal(found.embeddings, bank.embeddings)
    # the model makes faces of them; a pack cannot measure them
    generate = ["generate", folder, "--identities", tmp_path / "bank.safetensors", "--images-per-identity", "1"]
    generate += ["--num-inference-steps", "2", "--output", tmp_path / "set"]
    cli.main([str(word) for word in generate])
    assert len(list((tmp_path / "set").glob("*/*.png"))) == 3
    pack = ["--encoder", "toy", "--encoder-root", toy_root]
    assert "`toy-distilled`" in complaint(*generate[:-1], tmp_path / "other", *pack)
    assert "--encoder model is for --from-images" in complaint(
        "identities", "make", folder, "--number", "1", "--output", tmp_path / "x.safetensors", "--encoder", "model"
    )
    # a detector is not dropped in silence, nor is the encoder
    has_its_own = "--detector is for the encoder that a model carries: the pack toy has its own"
    assert has_its_own in complaint(*command[:-2], *pack, *detector)
    prepare_faces(images, tmp_path / "cache", FaceEncoder("toy", str(toy_root), det_size=160), image_size=32)
    of_cache = [tmp_path / "cache" if word == images else word for word in command]
    assert "is a cache, which has embeddings" in complaint(*of_cache)
    assert "is a cache, which has embeddings" in complaint(*of_cache[:-2], *detector)
    for file in (folder / IDENTITY_ENCODER).iterdir():
        file.unlink()
    assert "carries no encoder" in complaint(*command)
    assert "--detector is for the encoder that a model carries" in complaint(*command, *detector)


def test_training(caches, tmp_path, capsys):
    seen, unseen = caches
    options = ["--train-data", str(seen), "--validation-data", str(unseen), "--output-dir", str(tmp_path / "out")]
    options += ["--recognizer", json.dumps(TINY), "--train-batch-size", "4", "--max-train-steps", "30"]
    options += ["--report-to", "none", "--validation-steps", "30", "--license", "research only"]
    outcome = run_script(distill_encoder.main, options)
    assert outcome.returncode == 0, outcome.stderr
    assert "unseen: faces 12, cosine " in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["approximates"]["name"] == "toy" and config["approximates"]["fingerprint"]
    assert [each["name"] for each in config["training_data"]] == ["seen"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| unseen | 12 |" in card and "License: research only" in card and "- seen: 12 faces" in card
    # the figures are those of the saved weights
    encoder, cache = CarriedEncoder(tmp_path / "out"), FaceCache(unseen)
    pictures = [image for shard in cache.shards for image in cache.shard_images(shard)]
    copies = encoder.embed_pictures([PIL.Image.fromarray(picture) for picture in pictures])
    assert compare_copy(copies, F.normalize(cache.embeddings().embeddings)) == config["measured"]["unseen"]
    # it has learned: nearer than an untrained one
    save_carried(tiny_copy(), tmp_path / "untrained", EncoderMark("toy"), [], [str(unseen)])
    untrained = json.loads((tmp_path / "untrained" / "config.json").read_text())["measured"]["unseen"]
    assert config["measured"]["unseen"]["cosine"] > untrained["cosine"] + 0.2
    # known to transformers, too
    assert np.allclose(load_recognizer(tmp_path / "out")(faces(2)), encoder(faces(2)), atol=1e-5)

    # a network that was trained elsewhere
    finished = [*options[:4], "--output-dir", str(tmp_path / "again"), "--finished", str(tmp_path / "out")]
    assert run_script(distill_encoder.main, finished).returncode == 0
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["measured"] == config["measured"] and again["license"] is None
    # its embeddings have to be as wide as the teacher's, also where nothing is measured
    IResNetModel(IResNetConfig(**TINY, embedding_dim=6)).save_pretrained(tmp_path / "narrow")
    unmeasured = [*options[:2], "--output-dir", str(tmp_path / "n"), "--report-to", "none", "--max-train-steps", "1"]
    for given in (["--finished", str(tmp_path / "narrow")], ["--recognizer", json.dumps(TINY | {"embedding_dim": 6})]):
        wrong = run_script(distill_encoder.main, [*unmeasured, *given])
        assert wrong.returncode == 1 and "the copy's embedding_dim is 6, that of" in wrong.stderr
        assert not (tmp_path / "n" / "config.json").exists()
    wrong = run_script(distill_encoder.main, [*finished, "--validation-data", str(seen)])
    assert "is of the training data: name caches of other people" in wrong.stderr
    # before the first step
    wrong = run_script(
        distill_encoder.main,
        [*options[:2], "--validation-data", str(seen), *options[4:5], str(tmp_path / "w"), *options[6:]],
    )
    assert "is of the training data: name caches of other people" in wrong.stderr
    assert not list((tmp_path / "w").glob("checkpoint-*"))


def test_matrices_are_kept_in_half_precision(tmp_path):
    save_carried(tiny_copy(), tmp_path / "copy", EncoderMark("toy", "0" * 12), [])
    numbers = sum(parameter.numel() for parameter in tiny_copy().parameters())
    assert (tmp_path / "copy" / "model.safetensors").stat().st_size < 2.5 * numbers + 30_000
    encoder = CarriedEncoder(tmp_path / "copy")
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.float32}
    assert encoder.approximates == EncoderMark("toy", "0" * 12)


def test_copies_are_compared():
    embeddings = F.normalize(torch.randn(200, 16, generator=torch.Generator().manual_seed(0)))
    assert compare_copy(embeddings, embeddings) == {"faces": 200, "cosine": 1.0, "cosine_p5": 1.0, "rank1": 1.0}
    copies = embeddings.clone()
    copies[:20] = embeddings[20:40]
    figures = compare_copy(copies, embeddings)
    assert figures["rank1"] == 0.9 and figures["cosine_p5"] < 0.5 < figures["cosine"]


def test_varied_faces():
    torch.manual_seed(0)
    face = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    varied = vary(face.repeat(500, 1, 1, 1))
    assert varied.shape == (500, 3, 16, 16) and varied.min() >= -1 and varied.max() <= 1
    assert len({tuple(each.flatten()[:8].tolist()) for each in varied}) > 400
    # about the face, mirrored as often as not; rows near the edge come from the other one
    inner = slice(2, -2)
    assert torch.allclose(varied.mean(dim=0)[:, inner], face.mean(dim=(0, 3))[:, inner, None], atol=0.08)
