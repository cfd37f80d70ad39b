import math

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from uiface_diffusers import IResNetConfig, IResNetImageProcessor, IResNetModel
from uiface_diffusers.evaluation.recognizers import ModelRecognizer
from uiface_diffusers.models.margin_heads import AdaFaceHead, ArcFaceHead, CosFaceHead

TINY = {"layers": 18, "width": 4, "embedding_dim": 16, "image_size": 32}


def randomise(model: torch.nn.Module) -> None:
    """Every tensor its own values, so that no layer can stand in for another."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif tensor.ndim == 1:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.3)
        elif tensor.is_floating_point() and tensor.ndim:
            fan_in = tensor[0].numel()
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 / fan_in) ** 0.5)


@pytest.fixture(scope="module")
def ir50() -> IResNetModel:
    model = IResNetModel(IResNetConfig()).eval()
    randomise(model)
    return model


@pytest.fixture
def tiny() -> IResNetModel:
    torch.manual_seed(0)
    return IResNetModel(IResNetConfig(**TINY)).eval()


def insightface_names(depths: tuple[int, ...]) -> dict[str, None]:
    """The tensors of arcface_torch's `iresnet`."""
    batch_norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["conv1.weight", "prelu.weight", "fc.weight", "fc.bias"]
    names += [f"{layer}.{tensor}" for layer in ("bn1", "bn2", "features") for tensor in batch_norm]
    for stage, depth in enumerate(depths, 1):
        for block in range(depth):
            layers = [f"{layer}.{tensor}" for layer in ("bn1", "bn2", "bn3") for tensor in batch_norm]
            layers += ["conv1.weight", "conv2.weight", "prelu.weight"]
            if block == 0:
                layers += ["downsample.0.weight", *(f"downsample.1.{tensor}" for tensor in batch_norm)]
            names += [f"layer{stage}.{block}.{layer}" for layer in layers]
    return dict.fromkeys(names)


def functional_iresnet(tensors: dict[str, torch.Tensor], depths: tuple[int, ...], pixels: torch.Tensor):
    """The network by its tensors alone, in eval mode."""

    def norm(x, name):
        statistics = (tensors[f"{name}.running_mean"], tensors[f"{name}.running_var"])
        return F.batch_norm(x, *statistics, tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps=1e-5)

    x = F.conv2d(pixels, tensors["conv1.weight"], padding=1)
    x = F.prelu(norm(x, "bn1"), tensors["prelu.weight"])
    for stage, depth in enumerate(depths, 1):
        for block in range(depth):
            name = f"layer{stage}.{block}"
            stride = 2 if block == 0 else 1
            y = F.conv2d(norm(x, f"{name}.bn1"), tensors[f"{name}.conv1.weight"], padding=1)
            y = F.prelu(norm(y, f"{name}.bn2"), tensors[f"{name}.prelu.weight"])
            y = norm(F.conv2d(y, tensors[f"{name}.conv2.weight"], stride=stride, padding=1), f"{name}.bn3")
            if block == 0:
                x = norm(F.conv2d(x, tensors[f"{name}.downsample.0.weight"], stride=2), f"{name}.downsample.1")
            x = x + y
    x = norm(x, "bn2").flatten(1)
    return norm(x @ tensors["fc.weight"].T + tensors["fc.bias"], "features")


def test_ir50_is_insightfaces(ir50):
    tensors = ir50.state_dict()
    assert tensors.keys() == insightface_names((3, 4, 14, 3)).keys()
    assert tensors["fc.weight"].shape == (512, 512 * 7 * 7)
    assert round(sum(parameter.numel() for parameter in ir50.parameters()) / 1e6, 2) == 43.59
    pixels = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        ours = ir50(pixels).embeddings
        expected = functional_iresnet(tensors, (3, 4, 14, 3), pixels)
    assert ours.shape == (2, 512) and expected.abs().max() > 1
    assert torch.allclose(ours, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours.norm(dim=1), torch.ones(2), atol=0.1)  # not normalized


def test_initialization_is_arcface_torchs(tiny):
    state = IResNetModel(IResNetConfig(layers=18, width=16)).state_dict()
    assert abs(state["layer4.1.conv1.weight"].std() - 0.1) < 0.002
    bound = state["fc.weight"].shape[1] ** -0.5
    assert 0.99 * bound < state["fc.weight"].abs().max() <= bound
    assert (state["prelu.weight"] == 0.25).all() and (state["layer1.0.bn3.weight"] == 1).all()
    assert "features.weight" not in dict(tiny.named_parameters())


@pytest.mark.parametrize("counters", [True, False])
def test_insightface_weights_come_in(tiny, counters):
    randomise(tiny)
    given = {k: v.clone() for k, v in tiny.state_dict().items() if counters or "num_batches" not in k}
    model = IResNetModel.from_insightface_state_dict(given, image_size=32)
    assert (model.config.layers, model.config.width, model.config.embedding_dim) == (18, 4, 16)
    pixels = torch.rand(2, 3, 32, 32)
    assert not model.training and torch.equal(model(pixels).embeddings, tiny(pixels).embeddings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("layer2.1.bn3.running_var"), "`layer2.1.bn3.running_var` is missing"),
        (lambda tensors: tensors.pop("conv1.weight"), "`conv1.weight` is missing"),
        (lambda tensors: tensors.update(kernel=torch.zeros(16, 5)), "`kernel` is unknown"),
        (lambda tensors: tensors.update({"prelu.weight": torch.zeros(1)}), r"`prelu.weight` is of shape \(1,\)"),
        (lambda tensors: tensors.update({"layer1.2.bn1.weight": torch.zeros(4)}), r"\(3, 2, 2, 2\) blocks"),
    ],
)
def test_other_weights_are_named(tiny, change, message):
    tensors = dict(tiny.state_dict())
    change(tensors)
    with pytest.raises(ValueError, match=message):
        IResNetModel.from_insightface_state_dict(tensors, image_size=32)
    with pytest.raises(ValueError, match=r"`fc.weight` is of shape \(16, 128\), not \(16, 1568\)"):
        IResNetModel.from_insightface_state_dict(tiny.state_dict(), image_size=112)


def test_saves_and_loads_by_the_auto_classes(tiny, tmp_path):
    randomise(tiny)
    tiny.save_pretrained(tmp_path)
    IResNetImageProcessor({"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert isinstance(AutoConfig.from_pretrained(tmp_path), IResNetConfig)
    model, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, IResNetModel) and not any(info.values())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in tiny.state_dict().items())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == []
    assert "features.weight" not in dict(model.named_parameters())
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, IResNetImageProcessor) and processor.size == {"height": 32, "width": 32}
    faces = list(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))
    embeddings = model(**processor(faces, return_tensors="pt")).embeddings
    assert embeddings.shape == (3, 16)
    # and by the call of evaluation
    recognizer = ModelRecognizer(model.train(), processor, "tiny")
    ours = recognizer(np.stack(faces))
    assert model.training and ours.dtype == np.float32
    assert np.allclose(ours, embeddings.detach().numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="uint8"):
        recognizer(np.stack(faces) / 255)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(torch.zeros(1, 3, 32, 32)).embeddings.dtype == torch.bfloat16


def test_image_processor():
    processor = IResNetImageProcessor()
    face = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    pixels = processor([face, PIL.Image.fromarray(face)], return_tensors="pt").pixel_values
    assert pixels.shape == (2, 3, 112, 112) and pixels.dtype == torch.float32
    expected = (face.transpose(2, 0, 1) / 255 - 0.5) / 0.5
    assert np.allclose(pixels[0].numpy(), expected, atol=1e-6) and torch.equal(pixels[0], pixels[1])
    # resized as Pillow resizes, up to its rounding to bytes
    large = PIL.Image.fromarray(face).resize((250, 200), PIL.Image.Resampling.BICUBIC)
    resized = (processor(large, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0) + 1) * 127.5
    pillow = np.asarray(large.resize((112, 112), PIL.Image.Resampling.BILINEAR), np.float32)
    assert np.abs(resized - pillow).max() < 1.5
    with pytest.raises(ValueError, match="float64"):
        processor([face / 255.0])
    gray = processor(face[:, :, 0], return_tensors="pt").pixel_values
    assert np.allclose(gray[0].numpy(), np.repeat(expected[:1], 3, axis=0), atol=1e-6)
    with pytest.raises(ValueError, match=r"\(112, 112, 2\)"):
        processor([face[:, :, :2]])


def test_wrong_input_is_named(tiny):
    with pytest.raises(ValueError, match=r"\(N, 3, 32, 32\) but are \(1, 3, 112, 112\)"):
        tiny(torch.zeros(1, 3, 112, 112))
    with pytest.raises(ValueError, match="`layers` has to be one of .* but is 20"):
        IResNetConfig(layers=20)
    assert isinstance(tiny(torch.zeros(1, 3, 32, 32), return_dict=False), tuple)


def test_the_embedding_keeps_its_precision_within_autocast(tiny):
    pixels = torch.rand(4, 3, 32, 32) * 2 - 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        embeddings = tiny(pixels).embeddings
    assert embeddings.dtype == torch.float32
    assert not torch.equal(embeddings, embeddings.bfloat16().float())


def arcface(theta: float, length: float) -> float:
    return math.cos(theta + 0.5) if theta <= math.pi - 0.5 else math.cos(theta) - 0.5 * math.sin(0.5)


def cosface(theta: float, length: float) -> float:
    return math.cos(theta) - 0.35


def adaface(mean: float, deviation: float):
    def logit(theta: float, length: float) -> float:
        z = min(max(0.333 * (min(max(length, 1e-3), 100) - mean) / (deviation + 1e-3), -1), 1)
        angular, additive = -0.4 * z, 0.4 * z + 0.4
        return math.cos(min(max(theta + angular, 1e-3), math.pi - 1e-3)) - additive

    return logit


@pytest.mark.parametrize("name", ["arcface", "cosface", "adaface"])
def test_heads_against_brute_force(name):
    """Own logits by the arccosine of each pair in float64, over all angles; the others are plain cosines."""
    torch.manual_seed(0)
    head = {"arcface": ArcFaceHead, "cosface": CosFaceHead, "adaface": AdaFaceHead}[name](8, 5).eval()
    angles = torch.linspace(0.01, math.pi - 0.01, 200, dtype=torch.float64)
    labels = torch.arange(200) % 5
    centers = F.normalize(head.weight.detach().double())[labels]
    across = torch.randn(200, 8, dtype=torch.float64)
    across = F.normalize(across - (across * centers).sum(1, keepdim=True) * centers)
    lengths = torch.rand(200, 1, dtype=torch.float64) * 150
    embeddings = (lengths * (angles.cos()[:, None] * centers + angles.sin()[:, None] * across)).float()
    if name == "adaface":
        head.mean.fill_(60.0)
        head.deviation.fill_(12.0)
    own = {"arcface": arcface, "cosface": cosface, "adaface": adaface(60.0, 12.0)}[name]

    logits = head(embeddings, labels).double()
    assert head(embeddings, labels).dtype == torch.float32
    weights = head.weight.detach().double().numpy()
    for row in range(200):
        vector = embeddings[row].double().numpy()
        for column in range(5):
            cosine = vector @ weights[column] / np.linalg.norm(vector) / np.linalg.norm(weights[column])
            expected = own(math.acos(cosine), np.linalg.norm(vector)) if column == labels[row] else cosine
            assert abs(logits[row, column] - 64 * expected) < 2e-3, (row, column)
    if name != "adaface":  # the lengths of the embeddings do not matter, and the own logit falls all the way
        assert torch.allclose(head(embeddings * 3, labels).double(), logits, atol=1e-3)
        assert (logits[torch.arange(200), labels].diff() < 0).all()


def test_adaface_follows_the_lengths():
    """Running mean and deviation as the published code updates them, before they are used; not in eval mode."""
    torch.manual_seed(0)
    head = AdaFaceHead(8, 5, t_alpha=0.1)
    embeddings, labels = torch.randn(64, 8) * torch.linspace(0.01, 60, 64)[:, None], torch.arange(64) % 5
    lengths = embeddings.double().norm(dim=1).clamp(1e-3, 100)
    mean, deviation = 20.0, 100.0
    for _ in range(3):
        logits = head(embeddings, labels)
        mean = 0.1 * lengths.mean().item() + 0.9 * mean
        deviation = 0.1 * lengths.std().item() + 0.9 * deviation
    assert head.mean.item() == pytest.approx(mean, rel=1e-5)
    assert head.deviation.item() == pytest.approx(deviation, rel=1e-5)
    cosine = F.cosine_similarity(embeddings[40].double(), head.weight[labels[40]].double(), dim=0).item()
    expected = 64 * adaface(mean, deviation)(math.acos(cosine), lengths[40].item())
    assert logits[40, labels[40]].item() == pytest.approx(expected, abs=1e-3)
    head.eval()(embeddings, labels)
    head.train()(embeddings[:1], labels[:1])  # one face has no deviation
    assert head.mean.item() == pytest.approx(mean, rel=1e-5)
    assert {"mean", "deviation"} <= head.state_dict().keys()


@pytest.mark.parametrize("head_class", [ArcFaceHead, CosFaceHead, AdaFaceHead])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_finite_at_both_ends(head_class, dtype):
    """Cosines of exactly +-1 to the own identity, an embedding of zero; then steps at the recipe's learning rate."""
    torch.manual_seed(0)
    head = head_class(8, 4)
    # axes: their products are exact
    head.weight.data = torch.eye(8)[:4] * 0.25
    embeddings = torch.stack([head.weight[0] * 8, -head.weight[1] * 8, torch.zeros(8), head.weight[3] * 1e-6])
    embeddings = embeddings.detach().to(dtype).requires_grad_()
    labels = torch.arange(4)
    optimizer = torch.optim.SGD([head.weight], lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(5):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = head(embeddings * 1, labels)
            assert logits.dtype == torch.float32 and logits.isfinite().all()
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        assert head.weight.grad.isfinite().all() and embeddings.grad.isfinite().all()
        optimizer.step()
        optimizer.zero_grad()
    assert head.weight.isfinite().all()


@pytest.mark.parametrize("head_class", [ArcFaceHead, CosFaceHead, AdaFaceHead])
def test_gradients_are_those_of_finite_differences(head_class):
    """Away from the ends; in float64 by the function that the head applies to cosines."""
    head = head_class(8, 4).eval()
    cosine = torch.linspace(-0.99, 0.99, 31, dtype=torch.float64)[:, None].requires_grad_()
    lengths = torch.full((31, 1), 25.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda c: head.apply_margin(c, lengths), cosine)
