import json
import sys

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, write_study_inputs
from test_train_face_recognition import write_benchmark

from uiface_diffusers import IdentityBank
from uiface_diffusers.data import FaceCache
from uiface_diffusers.evaluation import load_recognizer, verify_benchmarks

sys.path.insert(0, str(REPOSITORY / "training" / "studies"))
import ablation  # noqa: E402


@pytest.fixture(scope="module")
def options(tmp_path_factory, toy_photographs, backbone):
    """A pipeline, a bank, real faces and a benchmark, all tiny."""
    root = tmp_path_factory.mktemp("ablation")
    write_study_inputs(root, toy_photographs)
    embeddings = F.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
    IdentityBank(embeddings, "toy").save(root / "bank.safetensors")
    (root / "bins").mkdir()
    write_benchmark(root / "bins" / "toy.bin")
    paths = {"pipeline": "model", "identities": "bank.safetensors", "real": "cache", "benchmarks": "bins"}
    paths |= {"encoder_root": "packs", "work": "work"}
    argv = [word for name, path in paths.items() for word in (f"--{name}", str(root / path))]
    argv += ["--encoder", "toy", "--judge", "judge", "--lpips_backbone", str(backbone), "--epochs", "2"]
    argv += ["--num_identities", "3", "--images_per_identity", "4", "--num_inference_steps", "3", "--seeds", "5"]
    return [*argv, "--train_batch_size", "4", "--recognizer", '{"layers": 18, "width": 4, "embedding_dim": 16}']


def read(folder):
    return {path.name: np.asarray(PIL.Image.open(path)) for path in sorted(folder.glob("images/*/*.png"))}


def test_arms_share_noise_and_are_collected(options, tmp_path_factory, capsys):
    work = ablation.parse_args(options).work
    ablation.main([*options, "--arms", "single", "fixed", "real", "--pieces", "generate", "evaluate"])
    # the fixed boundary is the median of the adaptive ones
    settings = json.loads((work / "fixed" / "data" / "generation.json").read_text())["settings"]
    assert settings["sampling"]["boundary"] == ablation.median_boundary(work / "adaptive" / "data")
    assert settings["sampling"]["injection"] is None and settings["seed"] == 0
    # as many real faces, of the people that have the most
    real = [path.parent.name for path in (work / "real" / "data").glob("*/*.png")]
    names = FaceCache(ablation.parse_args(options).real[0]).embeddings().names
    assert len(real) == 12 and set(real) <= {f"cache-{name}" for name in names}

    ablation.main([*options, "--arms", "fixed", "--pieces", "train"])
    arms = json.loads((work / "ablation.json").read_text())["arms"]
    assert arms.keys() == {"single", "fixed", "real"}
    result = verify_benchmarks(load_recognizer(work / "fixed" / "recognizer-5"), work.parent / "bins")["toy"]
    assert arms["fixed"]["accuracies"] == [pytest.approx(result.accuracy)]
    report = json.loads((work / "single" / "evaluation" / "report.json").read_text())
    figures = {(f["name"], f["conditions"].get("recogniser")): f["value"] for f in report["figures"]}
    assert arms["single"] == {
        "LPIPS": figures["intra_class_lpips", None],
        "precision": figures["precision", None],
        "recall": figures["recall", None],
        "consistency": figures["consistency_others", "judge"],
        "EER": figures["eer", "judge"],
        "context": figures["context_cosine", "toy"],
    }
    assert "context" not in arms["real"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[-3].split()[0] == "single" and f"{result.accuracy:.4f}" in printed[-2]
    with pytest.raises(ValueError, match="other settings .epochs: 2 there, 3 now"):
        ablation.main([*options, "--epochs", "3"])
