import json
import shutil
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import REPOSITORY, draw_person, write_study_inputs

from uiface_diffusers import IdentityBank, UIFacePipeline
from uiface_diffusers.data import FaceCache, prepare_faces
from uiface_diffusers.evaluation import LpipsGridFeatures, kernel_distance, load_lpips, measure_realism
from uiface_diffusers.evaluation.face_set import FaceSet, face_pixels, open_faces
from uiface_diffusers.evaluation.realism import real_halves
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.seeds import image_generator

sys.path.insert(0, str(REPOSITORY / "training"))
import evaluate  # noqa: E402
import export_checkpoint  # noqa: E402


@pytest.fixture(scope="module")
def root(tmp_path_factory, toy_photographs):
    root = tmp_path_factory.mktemp("evaluation")
    write_study_inputs(root, toy_photographs)
    for step in (1, 4):
        folder = shutil.copytree(root / "model", root / f"step-{step}")
        IdentityBank(torch.eye(3, 16), "toy").save(folder / "identities.safetensors")
        (folder / "progress.json").write_text(json.dumps({"step": step, "samples": 1000 * step, "hours": step}))
    return root


def options(root, backbone, *changed):
    paths = {"train_faces": "cache", "unseen_faces": "unseen", "encoder_root": "packs", "output": "out"}
    argv = [word for name, path in paths.items() for word in (f"--{name}", str(root / path))]
    argv += ["--encoder", "toy", "--judge", "judge", "--lpips-backbone", str(backbone), "--same-person", "0.9999"]
    argv += ["--num-identities", "2", "--images-per-identity", "2", "--num-inference-steps", "3"]
    return [*argv, *changed]


def test_pipelines_are_measured_once_and_compared(root, backbone, capsys):
    pipelines = [str(root / "step-1"), str(root / "step-4")]
    evaluate.main([*pipelines, *options(root, backbone)])
    printed = capsys.readouterr().out
    assert "1 unseen people have a face like one of the training" in printed and "out: unseen/someone_else" in printed
    result = json.loads((root / "out" / "step-4" / "result.json").read_text())
    assert result["training"] == {"step": 4, "samples": 4000, "hours": 4}
    assert PIL.Image.open(root / "out" / "curve.png").size[0] > 100

    # the judge's cosine by hand: faces of the unseen people against their photographs
    cache = FaceCache(root / "unseen")
    names = cache.embeddings().names
    pipe = UIFacePipeline.from_pretrained(root / "step-4")
    pipe.set_progress_bar_config(disable=True)
    judge, cosines = FaceEncoder("judge", str(root / "packs"), det_size=160), []
    for name in ("person_x", "person_y"):
        position = names.index(name)
        generators = [image_generator(0, f"unseen/{name}", n) for n in range(2)]
        bank = cache.embeddings().take([position])
        faces = pipe(bank, 2, num_inference_steps=3, generator=generators).images
        photograph = judge.embed_pictures([PIL.Image.fromarray(cache.images([position])[0])])
        cosines += (judge.embed_pictures(faces) @ photograph.T).flatten().tolist()
    assert result["identity/unseen/judge"]["own"] == pytest.approx(np.mean(cosines), abs=1e-5)

    # pairs of the bank's faces, and the nearest training face, by hand
    faces = [
        pipe(
            torch.eye(3, 16)[[i]],
            2,
            num_inference_steps=3,
            generator=[image_generator(0, f"{i:06d}", n) for n in (0, 1)],
        )
        for i in range(2)
    ]
    judged = torch.cat([judge.embed_pictures(out.images) for out in faces])
    genuine, impostor = judged[[0, 2]] * judged[[1, 3]], judged[:2] @ judged[2:].T
    verified = result["verification/judge"]
    assert verified["genuine"] == pytest.approx(genuine.sum(dim=1).mean().item(), abs=1e-5)
    assert verified["impostor"] == pytest.approx(impostor.mean().item(), abs=1e-5)
    encoder = FaceEncoder("toy", str(root / "packs"), det_size=160)
    known = FaceCache(root / "cache").embeddings().embeddings
    near = torch.cat([encoder.embed_pictures(out.images) for out in faces]) @ known.T
    found = result["nearest_training_face"]["generated"]
    assert found["mean"] == pytest.approx(near.amax(dim=1).mean().item(), abs=1e-5)
    assert found["max"] == pytest.approx(near.max().item(), abs=1e-5)
    boundaries = [timestep for out in faces for timestep in out.boundary_timesteps.tolist()]
    quartiles = result["boundary_quartiles"]
    assert quartiles[0] <= min(boundaries) and max(boundaries) <= quartiles[-1]
    # one face of each identity first
    grid, size = np.asarray(PIL.Image.open(root / "out" / "step-4" / "faces.png")), faces[0].images[0].width
    shown = [grid[:, start : start + size].astype(int) for start in range(0, 4 * size, size)]
    expected = [np.asarray(faces[i].images[n], int) for n in range(2) for i in range(2)]
    assert all(abs(a - b).max() <= 1 for a, b in zip(shown, expected, strict=True))

    measured = (root / "out" / "step-1" / "result.json").read_bytes()
    evaluate.main([*pipelines, *options(root, backbone)])
    again = capsys.readouterr().out
    assert (root / "out" / "step-1" / "result.json").read_bytes() == measured and "faces found" not in again
    table = [line.split()[0] for line in again.splitlines()]
    assert table[:3] == ["samples", "1,000", "4,000"]
    # another bank, or other defaults: another result
    IdentityBank(-torch.eye(3, 16), "toy").save(root / "step-1" / "identities.safetensors")
    evaluate.main([*pipelines, *options(root, backbone)])
    printed = capsys.readouterr().out
    assert printed.count("faces found") == 1
    assert (root / "out" / "step-1" / "result.json").read_bytes() != measured


def test_looks(root, backbone, tmp_path, capsys):
    """KID and the classifier test of all ways to sample, against real faces in folders."""
    for number in range(12):
        folder = tmp_path / ("photographs", "strangers")[number % 2] / f"person_{number}"
        folder.mkdir(parents=True)
        draw_person((20 * number, 255 - 20 * number, 77), ((80, 80, 44),)).save(folder / "0.png")
    encoder = FaceEncoder("toy", str(root / "packs"), det_size=160)
    prepare_faces(tmp_path / "photographs", tmp_path / "known", encoder, image_size=112)
    prepare_faces(tmp_path / "strangers", tmp_path / "unknown", encoder, image_size=112)
    generator = np.random.default_rng(0)
    (tmp_path / "flat").mkdir()
    for number in range(20):  # of one person each in one set, two of each in the other
        face = PIL.Image.fromarray(generator.integers(0, 255, (112, 112, 3), np.uint8))
        face.save(tmp_path / "flat" / f"{number:02d}.png")
        (tmp_path / "folders" / f"{number // 2:02d}").mkdir(parents=True, exist_ok=True)
        face.rotate(90).save(tmp_path / "folders" / f"{number // 2:02d}" / f"{number}.png")
    (tmp_path / "flat" / "README").touch()
    pipeline = shutil.copytree(root / "model", tmp_path / "step-7")
    (pipeline / "progress.json").write_text(json.dumps({"step": 7, "samples": 7000, "hours": 7}))
    IdentityBank(torch.eye(6, 16), "toy", [f"{number:06d}" for number in range(6)]).save(
        pipeline / "identities.safetensors"
    )
    real = ["--real", str(tmp_path / "flat"), str(tmp_path / "folders")]
    argv = [str(pipeline), *options(root, backbone, "--num-identities", "5", "--same-person", "1.1")]
    argv += ["--train-faces", str(tmp_path / "known"), "--unseen-faces", str(tmp_path / "unknown")]
    argv += ["--output", str(tmp_path / "out")]
    evaluate.main([*argv, *real])
    printed = capsys.readouterr().out
    assert "left out of" in printed and "README" in printed
    assert "looks, 10 faces of 5 identities against 10 real ones of 10 people:" in printed
    looks = json.loads((tmp_path / "out" / "step-7" / "result.json").read_text())["realism"]
    arms = ["real", "first stage", "empty context", "single stage, guidance 1", "single stage, guidance 2"]
    figures = {f"{name}/{network}" for name in ("kid", "kid_std", "c2st") for network in ("alexnet", "judge")}
    assert [arm for arm in looks if isinstance(looks[arm], dict)] == [*arms, "two stages"]
    assert all(looks[arm].keys() == figures for arm in [*arms, "two stages"])

    # the empty context by hand: the noise is that of the identities' faces
    pipe = UIFacePipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    generators = [image_generator(0, f"{number:06d}", n) for number in range(5) for n in range(2)]
    faces = pipe(None, num_images_per_prompt=10, num_inference_steps=3, generator=generators).images
    network = LpipsGridFeatures(load_lpips("alex", backbone))
    half, others = real_halves([FaceSet(open_faces(path)) for path in real[1:]], 10)
    # by way of the pipeline's size
    size, bilinear = faces[0].size, PIL.Image.Resampling.BILINEAR
    pictures = [[np.asarray(each.read(n).resize(size, bilinear)) for n in range(10)] for each in (half, others)]
    features = [network(face_pixels(each)) for each in pictures]
    generated = network(face_pixels([np.asarray(face) for face in faces]))
    expected = measure_realism(features[0], generated, half.names)
    assert looks["empty context"]["kid/alexnet"] == pytest.approx(expected.kid, rel=1e-3)
    assert looks["real"]["kid/alexnet"] == pytest.approx(kernel_distance(*features)[0], rel=1e-3, abs=1e-6)
    assert looks["empty context"] != looks["two stages"]

    evaluate.main([*argv, *real])
    assert "looks" not in capsys.readouterr().out  # measured already
    with pytest.raises(ValueError, match="40 generated faces .* there are 20 and 20"):
        evaluate.main([*argv, *real, "--images-per-identity", "8"])
    for option, value in (("--num-identities", "4"), ("--images-per-identity", "1")):
        with pytest.raises(SystemExit):
            evaluate.main([*argv, *real, option, value])
        assert f"{option} has to be" in capsys.readouterr().err
    PIL.Image.new("RGB", (112, 90)).save(tmp_path / "flat" / "99.png")
    with pytest.raises(ValueError, match="1 of 21 pictures in .*flat cannot be used, such as 99.png: not aligned"):
        evaluate.main([*argv, *real, "--seed", "1"])


def test_the_curve_tells_what_a_doubling_brought(tmp_path, capsys):
    def result(samples: int) -> dict:
        own = 0.1 * np.log2(samples / 1000)
        people = {f"identity/{name}/judge": {"own": own, "other": 0.01} for name in ("training", "unseen")}
        rest = {"realism": {arm: {"kid/alexnet": 1.5 - own} for arm in ("empty context", "two stages")}}
        rest |= {"nearest_training_face": {"generated": {"mean": 0.3}}, "verification/judge": {"eer": 0.5 - own}}
        return people | rest

    evaluate.draw_curve({samples: result(samples) for samples in (8000, 1000, 4000)}, "judge", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split() == ["8,000", "0.3000", "0.3000", "0.0100", "0.2000", "0.3000", "1.2000", "1.2000"]
    assert "training people: +0.1000 a doubling of the samples, over the last 2 points" in lines
    assert "EER: -0.1000 a doubling of the samples, over the last 2 points" in lines
    assert "KID, two stages: -0.1000 a doubling of the samples, over the last 2 points" in lines


def test_encoders_are_not_mixed(root, backbone):
    with pytest.raises(ValueError, match="cache comes from encoder `toy` .*, the pack of --encoder from .* `judge`"):
        evaluate.main([str(root / "step-1"), *options(root, backbone, "--encoder", "judge", "--judge", "toy")])
    with pytest.raises(ValueError, match="both are `toy`"):
        evaluate.main([str(root / "step-1"), *options(root, backbone, "--judge", "toy")])


def test_export(root, tmp_path, capsys):
    argv = [str(root / "step-4"), "--faces", str(root / "cache"), "--output", str(tmp_path / "shipped")]
    argv += ["--defaults", '{"latest_boundary": 700, "guidance_scale": 3.0}', "--max-similarity", "0.9"]
    directions = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    known = FaceCache(root / "cache").embeddings().embeddings
    IdentityBank(torch.cat([known[:1], directions]), "toy").save(tmp_path / "bank.safetensors")
    argv += ["--identities", str(tmp_path / "bank.safetensors")]
    export_checkpoint.main([*argv, "--num-identities", "5"])
    assert "5 identities" in capsys.readouterr().out
    bank = IdentityBank.load(tmp_path / "shipped" / "identities.safetensors")
    assert bank.names == [f"{n:06d}" for n in range(1, 6)]  # the training's own is left out
    pipe = UIFacePipeline.from_pretrained(tmp_path / "shipped")
    assert pipe.default_sampling() | {"latest_boundary": 700, "guidance_scale": 3.0} == pipe.default_sampling()
    assert pipe.default_sampling()["boundary_threshold"] == 0.006
    for file in (tmp_path / "shipped").rglob("*.json"):
        assert str(root) not in file.read_text()
    assert json.loads((tmp_path / "shipped" / "progress.json").read_text())["samples"] == 4000
    with pytest.raises(ValueError, match="gives fewer than 17 identities: "):
        export_checkpoint.main([*argv, "--num-identities", "17"])
    IdentityBank(directions, "judge").save(tmp_path / "bank.safetensors")
    with pytest.raises(ValueError, match="`judge`"):
        export_checkpoint.main([*argv, "--num-identities", "5"])
