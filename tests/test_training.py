"""What the training scripts share; the scripts themselves have test files of their own."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from conftest import REPOSITORY, tiny_autoencoder
from toy_faces import write_benchmark

from uiface_cli.options import with_hyphens
from uiface_diffusers.evaluation import load_lpips
from uiface_diffusers.evaluation.verification import read_benchmarks
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.training.denoising import DenoisingLoss, face_losses
from uiface_diffusers.training.means import RunningMeans
from uiface_diffusers.training.recognition import DecodedBenchmark, LastEpoch

sys.path.insert(0, str(REPOSITORY / "training"))
import train as denoiser_script  # noqa: E402
import train_autoencoder as autoencoder_script  # noqa: E402
import train_face_recognition as recognizer_script  # noqa: E402

SCRIPTS = (denoiser_script, autoencoder_script, recognizer_script)
VALUES = {"train_data": ["a_b", "c-d"], "output_dir": "out_put", "learning_rate": 0.5, "lr_scheduler": "cosine"}
VALUES |= {"channels_last": True, "dataloader_num_workers": 3}


def in_words(values: dict, spelled) -> list[str]:
    words = []
    for name, value in values.items():
        words.append(f"--{spelled(name)}")
        words += [] if value is True else map(str, value) if isinstance(value, list) else [str(value)]
    return words


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_hyphens_and_underscores_mean_the_same(script, tmp_path):
    """On the command line and in recipes; values keep theirs."""
    own = ["--autoencoder", '{"_class_name": "VQModel"}'] if script is autoencoder_script else []
    own += ["--vae", "vae_4"] if script is denoiser_script else []
    parsed = []
    for spelled in (str, lambda name: name.replace("_", "-")):
        parsed.append(script.parse_args(own + in_words(VALUES, spelled)))
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({spelled(name): value for name, value in VALUES.items()}))
        parsed.append(script.parse_args([*own, "--config", str(recipe)]))
        parsed[-1].config = None
    assert all(args == parsed[0] for args in parsed)
    assert {name: getattr(parsed[0], name) for name in VALUES} == VALUES | {"output_dir": Path("out_put")}
    off = script.parse_args([*own, *in_words(VALUES, str), "--no_channels_last"])
    assert not off.channels_last and vars(off) == vars(parsed[0]) | {"channels_last": False}


def test_an_option_that_a_recipe_has_twice_is_named(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("learning-rate: 1\nlearning_rate: 2\n")
    with pytest.raises(SystemExit):
        recognizer_script.parse_args(["--config", str(tmp_path / "recipe.yaml"), "--output-dir", "x"])
    assert "recipe.yaml has learning-rate twice" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text("learning-rat: 1\n")
    with pytest.raises(SystemExit):
        recognizer_script.parse_args(["--config", str(tmp_path / "recipe.yaml"), "--output-dir", "x"])
    assert "recipe.yaml has unknown options: learning-rat" in capsys.readouterr().err


def test_options_are_told_from_values():
    words = ["--a_b", "c_d", "--e_f=g_h", "-i_j", '{"k_l": 1}', "--", "--m_n"]
    assert with_hyphens(words) == ["--a-b", "c_d", "--e-f=g_h", "-i_j", '{"k_l": 1}', "--", "--m_n"]


def test_losses_on_faces_are_in_float32_within_autocast(toy_root, backbone, tmp_path):
    """To the same numbers as without: neither decoder nor LPIPS nor recognizer computes in bfloat16."""
    recognizer = FaceEncoder("toy", str(toy_root), det_size=160).to_torch()
    perceptual = load_lpips("alex", backbone)
    perceptual.spatial = True
    generator = torch.Generator().manual_seed(0)
    latents, clean = torch.randn(2, 3, 4, 32, 32, generator=generator)
    nothing = torch.zeros(3, dtype=torch.long)
    loss = DenoisingLoss(torch.zeros(3), nothing, nothing.bool(), latents, clean)
    identities = F.normalize(torch.randn(3, 16, generator=generator))
    faces = torch.rand(2, 3, 3, 64, 64, generator=generator) * 2 - 1
    options = ["--autoencoder", '{"_class_name": "VQModel"}', "--train-data", "x", "--output-dir", str(tmp_path)]
    args = autoencoder_script.parse_args([*options, "--identity-weight", "1", "--facial-features"])
    found = []
    for autocast in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            measured = face_losses(tiny_autoencoder(), recognizer, perceptual, loss, identities, 3)
            terms = autoencoder_script.reconstruction_terms(*faces, perceptual, recognizer, args)
        found.append([measured.cosines, measured.lpips, *terms.values()])
    for without, within in zip(*found, strict=True):
        assert within.dtype == torch.float32 and torch.equal(without, within)


def test_means_leave_out_what_is_not_finite():
    means, accelerator = RunningMeans(torch.device("cpu")), Accelerator(cpu=True)
    for losses in (torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([float("inf"), 5.0])):
        finite = means.count(losses)
        means.add_mean("all", losses, finite)
        means.add_mean("large", losses, finite & (losses > 2))
        means.add_mean("none", losses, finite & (losses > 9))
    assert means.take(accelerator) == ({"all": 3.0, "large": 4.0}, pytest.approx(3 / 5)) and means.taken == 5
    assert means.take(accelerator) == ({}, 0.0)


def test_the_last_epoch_goes_on_from_a_checkpoint():
    """Of the first version, too: sums of loss and right answers, numbers of finite losses and of all."""
    accelerator, state = Accelerator(cpu=True), {"sums": torch.tensor([6.0, 2.0, 4.0, 4.0]), "first": 7}
    last, other = LastEpoch(accelerator, 7), LastEpoch(accelerator, 8)
    for log in (last, other):
        log.load_state_dict(state)
        logits, labels = torch.eye(2), torch.tensor([0, 0])
        log.add(torch.tensor([4.0, 6.0]), logits, labels)
    saved = last.state_dict()
    assert saved["first"] == 7 and saved["sums"].tolist() == [16.0, 3.0, 6.0, 6.0]
    assert last.take(accelerator) == ({"loss": pytest.approx(16 / 6), "accuracy": 0.5}, 1.0)
    # of a training that was to end at another step
    assert other.take(accelerator) == ({"loss": 5.0, "accuracy": 0.5}, 1.0)


def test_a_benchmark_is_decoded_once(tmp_path):
    write_benchmark(tmp_path / "toy.bin")
    (read,) = read_benchmarks(tmp_path)
    benchmark = DecodedBenchmark(read.name, read.images, read.same)
    for position in range(4):
        face = benchmark.face(position)
        assert (face == read.face(position)).all()
        assert benchmark.face(position) is face
