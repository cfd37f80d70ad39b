"""The options of a recognizer's recipe: augmentation, SE blocks, sampled classes, clipping, weighted sets."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from conftest import REPOSITORY
from processes import Running, run_distributed
from safetensors.torch import load_file
from torchvision.transforms import v2
from toy_faces import SIZE, toy_face, write_faces
from transformers import AutoConfig

from uiface_diffusers import IResNetConfig, IResNetModel
from uiface_diffusers.models.face_recognition import SqueezeExcitation
from uiface_diffusers.models.margin_heads import MARGIN_HEADS
from uiface_diffusers.seeds import mix_seed
from uiface_diffusers.training import face_recognition
from uiface_diffusers.training.datasets import AUGMENTATION, Augmentation, CropInPlace, Erasing, LowResolution
from uiface_diffusers.training.order import NumberedBatches, set_weights
from uiface_diffusers.training.recognition import CLASSES, sample_classes

TINY = {"layers": 18, "width": 4, "embedding_dim": 16, "image_size": SIZE}
ADAFACE = {"crop_in_place": True, "low_resolution_probability": 0.2, "photometric_probability": 0.2}


def a_face(index: int = 0) -> torch.Tensor:
    return torch.tensor(np.asarray(toy_face(0, index))).permute(2, 0, 1)


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch):
    # one thread: nothing is left to the order in which threads add
    for name, value in {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> list[str]:
    """Two sets of eight people, whose names are the same."""
    root = tmp_path_factory.mktemp("sets")
    return [str(write_faces(root / name, images=images)) for name, images in (("real", 4), ("synthetic", 8))]


def options_of(sets: list[str], output: Path, *options: str) -> list[str]:
    words = ["--train-data", *sets, "--recognizer", json.dumps(TINY), "--train-batch-size", "8", "--report-to", "none"]
    return [*words, "--output-dir", str(output), *options]


def train(sets: list[str], output: Path, *options: str) -> dict[str, torch.Tensor]:
    """The weights of network and head."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    face_recognition.main(options_of(sets, output, *options))
    return weights_of(output)


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    newest = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return load_file(newest / "model.safetensors")


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_without_the_options_faces_are_what_they_were():
    """The same random numbers for flip and crop as before there were other changes, and as with them."""
    crop = v2.RandomResizedCrop(SIZE, scale=(0.2, 1.0), antialias=True)
    before = v2.Compose([v2.RandomHorizontalFlip(0.5), v2.RandomApply([crop], 0.2)])
    augment = Augmentation(7, SIZE, 0.5, 0.2, (0.2, 1.0))
    erase = Augmentation(7, SIZE, 0.5, 0.2, (0.2, 1.0), erasing_probability=1.0)
    for number in range(200):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_seed(7, number, AUGMENTATION))
            expected = before(a_face())
        assert torch.equal(augment(a_face(), number), expected)
        changed = (erase(a_face(), number) != expected).any(dim=0)
        assert changed.float().mean() < 0.45  # what is not erased


def test_each_change_is_as_frequent_as_asked_and_depends_on_its_number_alone():
    options = {"low_resolution_probability": 0.3, "photometric_probability": 0.3, "erasing_probability": 0.3}
    for name, probability in options.items():
        augment = Augmentation(0, SIZE, 0, 0, (0.2, 1.0), **{name: probability})
        faces = [augment(a_face(), number) for number in range(500)]
        assert all(face.shape == (3, SIZE, SIZE) and face.dtype == torch.uint8 for face in faces)
        # four standard deviations; a face of full size and an empty change look alike
        changed = sum(not torch.equal(face, a_face()) for face in faces)
        assert abs(changed - 150) < 41, name
        torch.manual_seed(3)
        assert all(torch.equal(augment(a_face(), number), faces[number]) for number in (3, 141, 499))


def test_a_crop_in_place_keeps_the_place():
    areas = []
    for number in range(200):
        torch.manual_seed(number)
        face = a_face(number).clamp(min=1)
        kept = CropInPlace((0.2, 1.0))(face)
        mask = (kept > 0).all(dim=0)
        assert torch.equal(kept, face * mask)
        rows, columns = mask.any(dim=1).sum(), mask.any(dim=0).sum()
        assert mask.sum() == rows * columns and 0.7 < rows / columns < 1.5
        areas.append(mask.float().mean().item())
    assert 0.17 < min(areas) < 0.3 and max(areas) > 0.8


def test_low_resolution_leaves_as_many_pixels():
    """A face of noise has as many different values afterwards as the smallest interpolation leaves it."""
    noise = torch.randint(256, (3, 100, 100), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    deviations = []
    for number in range(100):
        torch.manual_seed(number)
        face = LowResolution()(noise)
        assert face.shape == noise.shape and face.dtype == torch.uint8
        deviations.append((face[:, :, 1:].float() - face[:, :, :-1].float()).abs().mean().item())
    full = (noise[:, :, 1:].float() - noise[:, :, :-1].float()).abs().mean()
    assert min(deviations) < 0.15 * full and max(deviations) > 0.6 * full


def test_erasing_is_a_rectangle_of_noise():
    areas, ratios = [], []
    for number in range(300):
        torch.manual_seed(number)
        face = torch.full((3, 100, 100), 7, dtype=torch.uint8)
        erased = Erasing()(face)
        assert (face == 7).all()  # the given one stays
        rows, columns = ((erased != 7).any(dim=0).any(dim=axis).nonzero() for axis in (1, 0))
        height, width = (int(each.max() - each.min()) + 1 for each in (rows, columns))
        inside = erased[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].float()
        assert abs(inside.mean() - 127.5) < 25 and inside.std() > 60
        areas.append(height * width / 1e4)
        ratios.append(height / width)
    assert 0.015 < min(areas) < 0.05 and 0.35 < max(areas) < 0.42
    assert 0.27 < min(ratios) < 0.4 and 2.5 < max(ratios) < 3.7


def test_squeeze_excitation_is_the_ir_se_networks():
    """After the block's last batch norm; a saved model of before has none."""
    torch.manual_seed(0)
    plain, model = IResNetModel(IResNetConfig(**TINY)), IResNetModel(IResNetConfig(**TINY, use_se=True)).eval()
    added = model.state_dict().keys() - plain.state_dict().keys()
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert added == {f"{block}.se.{layer}.weight" for block in blocks for layer in ("fc1", "fc2")}
    assert plain.state_dict().keys() < model.state_dict().keys()

    se = SqueezeExcitation(48)
    assert se.fc1.weight.shape == (3, 48, 1, 1) and se.fc2.weight.shape == (48, 3, 1, 1)
    x = torch.randn(2, 48, 5, 5)
    hidden = (x.mean(dim=(2, 3)) @ se.fc1.weight[:, :, 0, 0].T).clamp(min=0)
    expected = x / (1 + (-hidden @ se.fc2.weight[:, :, 0, 0].T).exp())[:, :, None, None]
    assert torch.allclose(se(x), expected, atol=1e-6)

    block = model.layer2[1]
    x = torch.randn(2, 8, 6, 6)
    residual = block.bn3(block.conv2(block.prelu(block.bn2(block.conv1(block.bn1(x))))))
    assert torch.allclose(block(x), x + block.se(residual), atol=1e-6)
    assert not torch.allclose(block(x), x + residual, atol=1e-3)
    again = IResNetModel.from_insightface_state_dict(model.state_dict(), image_size=SIZE)
    pixels = torch.rand(2, 3, SIZE, SIZE)
    assert again.config.use_se and torch.equal(again(pixels).embeddings, model(pixels).embeddings)


def test_a_configuration_of_before_loads(tmp_path):
    IResNetModel(IResNetConfig(**TINY)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["use_se"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(tmp_path).use_se is False
    model, info = IResNetModel.from_pretrained(tmp_path, output_loading_info=True)
    assert model.layer1[0].se is None and not any(info.values())


def test_sampled_classes_have_all_of_the_batch_and_others_at_random():
    labels, counts = torch.tensor([3, 17, 3, 99]), Counter()
    for seed in range(400):
        classes = sample_classes(labels, 100, 20, seed)
        assert classes.tolist() == sorted(set(classes.tolist())) and len(classes) == 20
        counts.update(classes.tolist())
        assert torch.equal(classes, sample_classes(labels, 100, 20, seed))
    assert counts[3] == counts[17] == counts[99] == 400
    others = [counts[number] for number in range(100) if number not in (3, 17, 99)]
    # 17 of 97 each time: five standard deviations
    assert abs(np.array(others) - 400 * 17 / 97).max() < 5 * (400 * 17 / 97 * 80 / 97) ** 0.5


@pytest.mark.parametrize("name", MARGIN_HEADS)
def test_a_sampled_head_is_the_exact_one_without_the_other_identities(name):
    torch.manual_seed(0)
    head = MARGIN_HEADS[name](8, 30).eval()
    embeddings, labels = torch.randn(6, 8), torch.tensor([4, 29, 4, 0, 11, 7])
    classes = sample_classes(labels, 30, 12, 1)
    own = torch.searchsorted(classes, labels)
    assert torch.equal(classes[own], labels)
    sampled = head(embeddings, own, classes)
    assert torch.allclose(sampled, head(embeddings, labels)[:, classes], atol=1e-5)
    F.cross_entropy(sampled, own).backward()
    rows = head.weight.grad.abs().sum(dim=1) > 0
    assert rows.nonzero()[:, 0].tolist() == classes.tolist()
    everyone = head(embeddings, labels, torch.arange(30))
    assert torch.equal(everyone, head(embeddings, labels))


def test_weights_of_sets_are_how_often_their_faces_are_drawn():
    weights = set_weights([40, 10, 30], [1.0, 0.5, 2.0])
    batches, counts = iter(NumberedBatches(80, 8, 0, weights=weights)), np.zeros(80)
    for _ in range(2000):
        for index, _ in next(batches):
            counts[index] += 1
    rates = np.array([counts[:40].mean(), counts[40:50].mean(), counts[50:].mean()])
    assert np.allclose(rates / rates[0], [1, 0.5, 2], rtol=0.05)
    # a resumed run draws what it has not drawn yet
    batches, later = (iter(NumberedBatches(80, 8, 0, weights=weights, start=start)) for start in (0, 23))
    for _ in range(23):
        next(batches)
    assert [next(batches) for _ in range(30)] == [next(later) for _ in range(30)]
    assert set_weights([40, 10], None) is None and set_weights([40, 10], [0.5, 0.5]) is None
    with pytest.raises(ValueError, match="--train-data-weights can draw from 16777216 faces"):
        set_weights([2**24, 1], [1, 2])


def test_neutral_values_change_nothing(sets, tmp_path):
    """Equal weights, all classes, a bound that no gradient reaches."""
    plain = train(sets, tmp_path / "plain", "--max-train-steps", "4")
    assert plain["head.weight"].shape == (16, 16)  # people of the same name in two sets are two
    neutral = ("--train-data-weights", "2", "2", "--class-sample-rate", "1", "--max-backbone-grad-norm", "1e9")
    assert equal(plain, train(sets, tmp_path / "neutral", "--max-train-steps", "4", *neutral))
    weighted = train(sets, tmp_path / "weighted", "--max-train-steps", "4", "--train-data-weights", "1", "0.5")
    assert not equal(plain, weighted)


def test_the_networks_gradient_is_clipped_and_the_heads_is_not(sets, tmp_path):
    """One step of plain gradient descent, with and without."""
    options = ("--max-train-steps", "1", "--momentum", "0", "--weight-decay", "0", "--learning-rate", "0.1")
    free = train(sets, tmp_path / "free", *options)
    bound = train(sets, tmp_path / "bound", *options, "--max-backbone-grad-norm", "5")
    torch.manual_seed(0)
    fresh = dict(IResNetModel(IResNetConfig(**TINY)).named_parameters())

    def step(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        moved = [(weights[f"recognizer.{name}"].double() - fresh[name].double()).flatten() for name in fresh]
        return torch.cat(moved).detach() / 0.1

    assert step(free).norm() > 6
    assert step(bound).norm().item() == pytest.approx(5, rel=1e-3)
    assert F.cosine_similarity(step(free), step(bound), dim=0) > 0.9999
    assert torch.equal(free["head.weight"], bound["head.weight"])


EVERYTHING = ("--train-data-weights", "1", "0.5", "--class-sample-rate", "0.6", "--max-backbone-grad-norm", "5")
EVERYTHING += ("--head", "adaface", "--crop-in-place", "--low-resolution-probability", "0.2")
EVERYTHING += ("--photometric-probability", "0.2", "--erasing-probability", "0.5", "--epochs", "2")
EVERYTHING += ("--recognizer", json.dumps(TINY | {"use_se": True}), "--checkpointing-steps", "5")


def test_all_of_it_killed_and_resumed_gives_the_same_weights(sets, tmp_path):
    Running("train_face_recognition", options_of(sets, tmp_path / "killed", *EVERYTHING)).kill_at("| 13/24")
    assert sorted(path.name for path in (tmp_path / "killed").glob("checkpoint-*")) == [
        "checkpoint-10",
        "checkpoint-5",
    ]
    resumed = train(sets, tmp_path / "killed", *EVERYTHING, "--resume-from-checkpoint", "latest")
    assert equal(resumed, train(sets, tmp_path / "whole", *EVERYTHING))
    for option, message in (
        (("--train-data-weights", "1", "0.6"), "train_data_weights: .1.0, 0.5. then, .1.0, 0.6. now"),
        (("--class-sample-rate", "0.5"), "class_sample_rate: 0.6 then, 0.5 now"),
        (("--erasing-probability", "0.4"), "erasing_probability: 0.5 then, 0.4 now"),
    ):
        with pytest.raises(ValueError, match=message):
            train(sets, tmp_path / "whole", *EVERYTHING, *option, "--resume-from-checkpoint", "latest")


def test_processes_sample_the_same_classes(tmp_path):
    """One step of plain gradient descent moves the centers of these alone: those of both processes' faces, and others
    up to a quarter of 24."""
    data = [str(write_faces(tmp_path / "faces", identities=24, images=2))]
    options = ("--max-train-steps", "1", "--momentum", "0", "--weight-decay", "0", "--train-batch-size", "2")
    options += ("--class-sample-rate", "0.25")
    run_distributed("train_face_recognition", options_of(data, tmp_path / "two", *options))
    torch.manual_seed(0)
    IResNetModel(IResNetConfig(**TINY))
    fresh = MARGIN_HEADS["arcface"](16, 24).weight
    moved = (weights_of(tmp_path / "two")["head.weight"] - fresh).abs().sum(dim=1) > 0
    drawn = [index for rank in range(2) for index, _ in next(iter(NumberedBatches(48, 2, 0, rank, 2)))]
    labels = torch.tensor(drawn) // 2
    assert moved.nonzero()[:, 0].tolist() == sample_classes(labels, 24, 6, mix_seed(0, 0, CLASSES)).tolist()


def test_the_adaface_recipe_is_its_authors():
    recipe = REPOSITORY / "training" / "configs" / "fr_ir50_adaface.yaml"
    args = face_recognition.parse_args(["--config", str(recipe), "--train-data", "data", "--output-dir", "out"])
    assert (args.recognizer, args.head, args.margin, args.scale) == ({"layers": 50}, "adaface", 0.4, 64)
    assert (args.epochs, args.lr_milestones, args.learning_rate) == (26, [12, 20, 24], 0.1)
    assert {name: getattr(args, name) for name in ADAFACE} == ADAFACE and args.crop_probability == 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--train-data-weights", "1"), "--train-data-weights has 1 numbers for 2 data sets"),
        (("--train-data-weights", "1", "0"), "--train-data-weights has a 0: leave that data set out"),
        (("--class-sample-rate", "0"), "--class-sample-rate is 0"),
        (("--class-sample-rate", "1.5"), "'1.5' is not a number from 0 to 1"),
        (("--max-grad-norm", "1", "--max-backbone-grad-norm", "1"), "network and head together"),
        (("--recognizer", '{"use_sf": true}'), "--recognizer has unknown options: use_sf"),
    ],
)
def test_wrong_options_are_named(capsys, options, message):
    with pytest.raises(SystemExit):
        face_recognition.parse_args(["--train-data", "a", "b", "--output-dir", "c", *options])
    assert message in capsys.readouterr().err
