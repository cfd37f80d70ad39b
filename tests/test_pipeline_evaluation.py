import json
import shutil
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import REPOSITORY, write_study_inputs

from uiface_diffusers import IdentityBank, UIFacePipeline
from uiface_diffusers.data import FaceCache
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
    argv += ["--encoder", "toy", "--judge", "judge", "--lpips_backbone", str(backbone), "--same_person", "0.9999"]
    argv += ["--num_identities", "2", "--images_per_identity", "2", "--num_inference_steps", "3"]
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


def test_the_curve_tells_what_a_doubling_brought(tmp_path, capsys):
    def result(samples: int) -> dict:
        own = 0.1 * np.log2(samples / 1000)
        people = {f"identity/{name}/judge": {"own": own, "other": 0.01} for name in ("training", "unseen")}
        rest = {"nearest_training_face": {"generated": {"mean": 0.3}}, "verification/judge": {"eer": 0.5 - own}}
        return people | rest

    evaluate.draw_curve({samples: result(samples) for samples in (8000, 1000, 4000)}, "judge", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split() == ["8,000", "0.3000", "0.3000", "0.0100", "0.2000", "0.3000"]
    assert "training people: +0.1000 a doubling of the samples, over the last 2 points" in lines
    assert "EER: -0.1000 a doubling of the samples, over the last 2 points" in lines


def test_encoders_are_not_mixed(root, backbone):
    with pytest.raises(ValueError, match="cache is of the encoder `toy` .*, the pack of --encoder of `judge`"):
        evaluate.main([str(root / "step-1"), *options(root, backbone, "--encoder", "judge", "--judge", "toy")])
    with pytest.raises(ValueError, match="both are `toy`"):
        evaluate.main([str(root / "step-1"), *options(root, backbone, "--judge", "toy")])


def test_export(root, tmp_path, capsys):
    argv = [str(root / "step-4"), "--faces", str(root / "cache"), "--output", str(tmp_path / "shipped")]
    argv += ["--defaults", '{"latest_boundary": 700, "guidance_scale": 3.0}', "--max_similarity", "0.9"]
    directions = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    known = FaceCache(root / "cache").embeddings().embeddings
    IdentityBank(torch.cat([known[:1], directions]), "toy").save(tmp_path / "bank.safetensors")
    argv += ["--identities", str(tmp_path / "bank.safetensors")]
    export_checkpoint.main([*argv, "--num_identities", "5"])
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
        export_checkpoint.main([*argv, "--num_identities", "17"])
    IdentityBank(directions, "judge").save(tmp_path / "bank.safetensors")
    with pytest.raises(ValueError, match="`judge`"):
        export_checkpoint.main([*argv, "--num_identities", "5"])
