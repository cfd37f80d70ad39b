"""Learned perturbation: the sphere, the flow, its training, and data sets that follow it."""

import math
import subprocess
import sys
import textwrap

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, complaint, draw_person, run_script
from generated_sets import rows_of
from hub_server import HubServer
from processes import Running
from safetensors.torch import load_file

from uiface_diffusers import IdentityBank, IdentityFlow, IdentityProjector, cli, generate_dataset, sample_identities
from uiface_diffusers.banks import perturb_identities
from uiface_diffusers.data import prepare_faces
from uiface_diffusers.evaluation.leakage import measure_leakage
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.fingerprint import model_fingerprint
from uiface_diffusers.identities import inspect_bank, keep_distinct, perturb_embeddings, safe_cosines
from uiface_diffusers.loading import load_identity_flow
from uiface_diffusers.models.identity_flow import path
from uiface_diffusers.seeds import COMMON_PERTURBATION, PERTURBATION, image_generator, noise_generator
from uiface_diffusers.sphere import cosines_and_directions, tangent, turn
from uiface_diffusers.training.identity_pairs import (
    PersonEmbeddings,
    compare_directions,
    fit_shared_noise,
    flow_losses,
    place_of,
)

SCRIPT = REPOSITORY / "training" / "train_identity_flow.py"
sys.path.insert(0, str(SCRIPT.parent))
import train_identity_flow as script  # noqa: E402

FAST = {"num_inference_steps": 2, "size": 8}
SMALL = {"identity_dim": 16, "width": 32, "num_blocks": 2}


def unit(number: int, dimension: int = 16, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(number, dimension, generator=torch.Generator().manual_seed(seed)))


def generators(number: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(number)]


def moved_flow(**options) -> IdentityFlow:
    """With weights that do something."""
    torch.manual_seed(0)
    flow = IdentityFlow(**SMALL | {"identity_encoder": "toy"} | options).eval()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return flow


def test_turned_and_measured():
    anchors, others = unit(500), unit(500, seed=1)
    cosines, directions = cosines_and_directions(anchors, others)
    assert torch.allclose(cosines, (anchors * others).sum(dim=1))
    assert (directions * anchors).sum(dim=1).abs().max() < 1e-5
    assert torch.allclose(directions.norm(dim=1), torch.ones(500), atol=1e-5)
    assert torch.allclose(turn(anchors, directions, cosines), others, atol=1e-5)
    same, nowhere = cosines_and_directions(anchors, anchors)
    assert torch.allclose(same, torch.ones(500), atol=1e-5) and nowhere.isfinite().all()


def test_the_path_is_a_quarter_circle():
    noise, data = torch.randn(2, 5, 16)
    for time, expected in ((0.0, noise), (1.0, data)):
        assert torch.allclose(path(torch.full((5,), time), noise, data)[0], expected, atol=1e-6)
    time = torch.linspace(0.1, 0.9, 5).double()
    noise, data = noise.double(), data.double()
    step = 1e-6
    difference = path(time + step, noise, data)[0] - path(time - step, noise, data)[0]
    assert torch.allclose(difference / (2 * step), path(time, noise, data)[1], atol=1e-7)


def test_an_untrained_flow_is_idperturb():
    embeddings = unit(50)
    flow = IdentityFlow(**SMALL)
    mine, cosines = perturb_embeddings(embeddings, (0.6, 0.9), generators(50), flow)
    other, expected = perturb_embeddings(embeddings, (0.6, 0.9), generators(50))
    assert torch.equal(cosines, expected) and torch.allclose(mine, other, atol=1e-6)
    anchors, others = unit(2000), unit(2000, seed=1)
    losses = flow_losses(flow, anchors, others, torch.rand(2000), torch.randn(2000, 16))
    assert abs(losses.mean() - (math.pi / 2) ** 2) < 0.1


def test_directions_are_tangent_whatever_the_weights():
    flow, anchors = moved_flow(), unit(100)
    cosines, noise = torch.linspace(0.3, 0.95, 100), torch.randn(100, 16)
    directions = flow.directions(noise, anchors, cosines)
    assert (directions * anchors).sum(dim=1).abs().max() < 1e-5
    assert torch.allclose(directions.norm(dim=1), torch.ones(100), atol=1e-5)
    assert not torch.allclose(directions, F.normalize(tangent(noise, anchors)), atol=0.1)
    # also in training mode, where dropout would draw numbers
    assert torch.equal(flow.train().directions(noise, anchors, cosines), directions) and flow.training
    perturbed, drawn = perturb_embeddings(anchors, None, generators(100), moved_flow(cosine_quantiles=[0.2, 0.3, 0.9]))
    assert torch.allclose((perturbed * anchors).sum(dim=1), drawn, atol=1e-5)
    assert 0.2 <= drawn.min() and drawn.max() <= 0.9 and 0.3 < (drawn < 0.3).float().mean() < 0.7


def test_shared_noise_makes_directions_agree_and_nothing_else():
    """By as much as the share, of an untrained flow; each direction stays uniform."""
    flow, anchors = IdentityFlow(**SMALL, shared_noise=0.4), unit(1).repeat(4000, 1)
    common = [torch.Generator().manual_seed(10**6 + i // 2) for i in range(4000)]
    turned, _ = perturb_embeddings(anchors, (0.5, 0.5), generators(4000), flow, common)
    directions = cosines_and_directions(anchors, turned)[1]
    assert (directions[::2] * directions[1::2]).sum(dim=1).mean() == pytest.approx(0.4, abs=0.03)
    assert directions.mean(dim=0).norm() < 0.05
    assert torch.allclose(directions.T @ directions / 4000, tangent(torch.eye(16), anchors[:16]) / 15, atol=0.01)


def test_learns_a_known_distribution():
    """Directions about a mean that depends on the anchor, more narrowly at a larger cosine: the mean and the spread of
    both cosines, for anchors that were not trained on."""
    torch.manual_seed(0)
    turned = torch.linalg.qr(torch.randn(8, 8))[0]

    def draw(anchors: torch.Tensor, cosines: torch.Tensor) -> torch.Tensor:
        center = F.normalize(tangent(anchors @ turned, anchors))
        spread = torch.where(cosines > 0.7, 0.15, 0.6)[:, None]
        return F.normalize(center + spread * tangent(torch.randn_like(anchors), anchors))

    def cosines_of(number: int) -> torch.Tensor:
        return torch.where(torch.rand(number) < 0.5, 0.5, 0.9)

    flow = IdentityFlow(8, width=64, num_blocks=2, dropout=0.0)
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for _ in range(500):
        anchors = F.normalize(torch.randn(256, 8))
        cosines = cosines_of(256)
        others = turn(anchors, draw(anchors, cosines), cosines)
        loss = flow_losses(flow, anchors, others, torch.rand(256), torch.randn(256, 8)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    anchors = F.normalize(torch.randn(1000, 8))
    center = F.normalize(tangent(anchors @ turned, anchors))
    for cosine in (0.5, 0.9):
        cosines = torch.full((1000,), cosine)
        drawn, real = flow.directions(torch.randn(1000, 8), anchors, cosines), draw(anchors, cosines)
        mine, expected = ((each * center).sum(dim=1) for each in (drawn, real))
        assert abs(mine.mean() - expected.mean()) < 0.05, cosine
        assert abs(mine.std() - expected.std()) < 0.05, cosine


def test_what_is_saved_is_loaded_and_what_is_not_is_named(tmp_path):
    flow = moved_flow(cosine_quantiles=[0.1, 0.4, 0.9], identity_encoder_fingerprint="abc")
    flow.save_pretrained(tmp_path / "flow")
    loaded = load_identity_flow(tmp_path / "flow")
    assert loaded.encoder_mark == ("toy", "abc") and list(loaded.config.cosine_quantiles) == [0.1, 0.4, 0.9]
    arguments = (torch.ones(2, 16), unit(2), torch.full((2,), 0.5))
    assert torch.equal(loaded.directions(*arguments), flow.directions(*arguments))
    IdentityProjector(16, 32).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="no identity flow but holds IdentityProjector"):
        load_identity_flow(tmp_path / "other")
    with pytest.raises(OSError, match="nothing"):
        load_identity_flow(tmp_path / "nothing")
    weights = tmp_path / "flow" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load_identity_flow(tmp_path / "flow")
    with pytest.raises(ValueError, match="`shared_noise` has to be from 0 to 1"):
        IdentityFlow(shared_noise=1.5)
    for quantiles in ((0.5,), (0.9, 0.5), (0.5, 1.5), (0.5, float("nan"))):
        with pytest.raises(ValueError, match="ascending cosines"):
            IdentityFlow(cosine_quantiles=quantiles)


def test_a_flow_comes_from_the_hub(tmp_path):
    """Pushed and loaded by the real client in a process of its own; a repository that is not there is named."""
    program = """
        import sys
        from uiface_diffusers import IdentityFlow
        from uiface_diffusers.loading import load_identity_flow
        flow = IdentityFlow(16, 32, 1, cosine_quantiles=[0.2, 0.9], identity_encoder="toy")
        flow.push_to_hub("tester/flow")
        loaded = load_identity_flow("tester/flow")
        assert loaded.encoder_mark.name == "toy" and list(loaded.config.cosine_quantiles) == [0.2, 0.9]
        try:
            load_identity_flow("tester/nothing")
        except OSError as error:
            assert "tester/nothing" in str(error)
        else:
            sys.exit("a missing repository was loaded")
    """
    with HubServer(tmp_path / "hub") as hub:
        environment = {**hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        process = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True
        )
    assert process.returncode == 0, process.stderr


def test_a_neighbor_safe_identity_stays_nearest_to_itself():
    bank = IdentityBank(F.normalize(unit(40, 6) + 0.5), "toy")
    low = safe_cosines(bank)
    similarity = (bank.embeddings @ bank.embeddings.T - 2 * torch.eye(40)).amax(dim=1)
    assert torch.allclose(low, (similarity.acos() / 2).cos(), atol=1e-5)
    for seed in range(20):
        draws = [torch.Generator().manual_seed(100 * seed + i) for i in range(40)]
        turned, cosines = perturb_embeddings(bank.embeddings, torch.stack([low, low], dim=1), draws)
        assert torch.equal((turned @ bank.embeddings.T).argmax(dim=1), torch.arange(40)) and torch.equal(cosines, low)
    with pytest.raises(ValueError, match="two identities"):
        safe_cosines(bank.take([0]))


def test_images_follow_the_flow_and_can_be_made_again(tiny_pipeline, tmp_path):
    """By row alone; the flow is in the settings, and another one is refused."""
    bank, flow = IdentityBank(unit(3), "toy"), moved_flow(cosine_quantiles=[0.4, 0.5, 0.8], shared_noise=0.3)
    generate_dataset(tiny_pipeline, bank, tmp_path / "data", 2, identity_flow=flow, **FAST)
    rows = rows_of(tmp_path / "data")
    assert len({row["perturbation"] for row in rows}) == 6
    row = rows[3]
    generator = image_generator(0, row["identity"], row["index"], stream=PERTURBATION)
    common = image_generator(0, row["identity"], 0, stream=COMMON_PERTURBATION)
    embedding, cosine = perturb_embeddings(bank.embeddings[[1]], None, [generator], flow, [common])
    assert row["perturbation"] == pytest.approx(cosine.item())
    out = tiny_pipeline(embedding, generator=noise_generator(row["seed"]), num_inference_steps=2)
    expected = np.asarray(out.images[0].resize((8, 8), 2)).astype(int)
    assert np.abs(expected - np.asarray(PIL.Image.open(tmp_path / "data" / row["file_name"]))).max() <= 1
    assert "of real pairs, flow `" in (tmp_path / "data" / "README.md").read_text()
    generate_dataset(tiny_pipeline, bank, tmp_path / "again", 2, identity_flow=flow, batch_size=1, **FAST)
    again = [row["perturbation"] for row in rows_of(tmp_path / "again")]
    assert again == [row["perturbation"] for row in rows]
    other = moved_flow(cosine_quantiles=[0.4, 0.6])
    for given in (other, None):
        with pytest.raises(ValueError, match="begun with other settings .identity_flow: '"):
            generate_dataset(tiny_pipeline, bank, tmp_path / "data", 2, identity_flow=given, **FAST)


def test_without_a_flow_settings_are_as_before(tiny_pipeline, tmp_path):
    generate_dataset(tiny_pipeline, IdentityBank(unit(2), "toy"), tmp_path, 1, **FAST)
    assert "identity_flow" not in (tmp_path / "generation.json").read_text()


def test_neighbor_safe_data_set(tiny_pipeline, tmp_path):
    bank = IdentityBank(unit(3), "toy")
    generate_dataset(tiny_pipeline, bank, tmp_path, 4, identity_perturbation="auto", **FAST)
    low = dict(zip(bank.names, safe_cosines(bank).tolist(), strict=True))
    cosines = {row["identity"]: [] for row in rows_of(tmp_path)}
    for row in rows_of(tmp_path):
        cosines[row["identity"]].append(row["perturbation"])
    assert all(low[name] <= min(each) and max(each) <= 1 for name, each in cosines.items())
    assert '"identity_perturbation": "auto"' in (tmp_path / "generation.json").read_text()
    assert "| identity perturbation | auto |" in (tmp_path / "README.md").read_text()


def test_a_flow_of_another_encoder_is_refused(tiny_pipeline, tmp_path):
    bank = IdentityBank(unit(3), "toy")
    for flow, message in (
        (moved_flow(identity_encoder="other"), "the bank comes from encoder `toy`, the identity flow from .*`other`"),
        (moved_flow(identity_dim=8), "embeddings of 16 and of 8 numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            generate_dataset(tiny_pipeline, bank, tmp_path / "data", 1, identity_flow=flow, **FAST)
    assert not (tmp_path / "data").exists()


def test_an_embedding_per_image(tiny_pipeline, tmp_path):
    """Image n follows embedding n: the same as each of them alone; in our format and resumed."""
    embeddings = unit(6).view(2, 3, 16)
    bank = IdentityBank(embeddings, "toy", ["a", "b"])
    bank.save(tmp_path / "bank.safetensors")
    bank = IdentityBank.load(tmp_path / "bank.safetensors")
    assert bank.images == 3 and len(bank) == 2 and torch.equal(bank.embeddings, embeddings)
    generate_dataset(tiny_pipeline, bank, tmp_path / "data", 3, **FAST)
    assert generate_dataset(tiny_pipeline, bank, tmp_path / "data", 3, **FAST).made == 0
    assert IdentityBank.load(tmp_path / "data" / "identities.safetensors").images == 3
    pixels = {}
    for index in range(3):
        one = IdentityBank(embeddings[:, index], "toy", ["a", "b"])
        generate_dataset(tiny_pipeline, one, tmp_path / f"one-{index}", 3, **FAST)
        for name in "ab":
            pixels[name, index], mine = (
                np.asarray(PIL.Image.open(tmp_path / folder / "images" / name / f"{index:04d}.png")).astype(int)
                for folder in (f"one-{index}", "data")
            )
            assert np.abs(pixels[name, index] - mine).max() <= 1
    for options, message in (
        ({"images_per_identity": 4}, "embeddings for 3 images of each identity, 4 are asked for"),
        ({"images_per_identity": 3, "identity_perturbation": (0.5, 1)}, "one per image: a perturbation takes"),
        ({"images_per_identity": 3, "identity_flow": moved_flow()}, "one per image: a perturbation takes"),
    ):
        with pytest.raises(ValueError, match=message):
            generate_dataset(tiny_pipeline, bank, tmp_path / "new", **options, **FAST)
    assert not (tmp_path / "new").exists()


def test_embeddings_per_image_from_outside(tmp_path, capsys):
    """As `contexts.npy` with `identity_ids.npy`, or rows with repeated ids; and what does not fit."""
    embeddings = unit(6) * torch.arange(1, 7)[:, None]
    expected = F.normalize(embeddings)
    order = [0, 3, 1, 4, 5, 2]
    np.save(tmp_path / "contexts.npy", embeddings.view(2, 3, 16).numpy())
    np.save(tmp_path / "identity_ids.npy", np.array([7, 40]))
    np.save(tmp_path / "rows.npy", embeddings[order].numpy())
    np.save(tmp_path / "row_ids.npy", np.array([7, 40])[np.array(order) // 3])
    imported = ["identities", "import", "--encoder", "toy", "--output", str(tmp_path / "bank")]
    for file, ids, rows in (
        ("contexts.npy", "identity_ids.npy", [0, 1, 2, 3, 4, 5]),
        ("rows.npy", "row_ids.npy", [0, 1, 2, 3, 4, 5]),
        ("contexts.npy", None, [0, 1, 2, 3, 4, 5]),
    ):
        options = [] if ids is None else ["--identity-ids", str(tmp_path / ids)]
        cli.main([*imported, str(tmp_path / file), *options])
        assert "2 identities of `toy`, 16-d, 3 embeddings of each" in capsys.readouterr().out
        bank = IdentityBank.load(tmp_path / "bank")
        assert torch.allclose(bank.embeddings, expected[rows].view(2, 3, 16), atol=1e-6)
        assert bank.names == (["000000", "000001"] if ids is None else ["7", "40"])
    cli.main(["identities", "inspect", str(tmp_path / "bank"), "--against", str(tmp_path / "bank")])
    assert "2 identities of `toy`, 16-d, 3 embeddings of each" in capsys.readouterr().out
    np.save(tmp_path / "three.npy", np.arange(3))
    np.save(tmp_path / "twice.npy", np.zeros(2, int))
    np.save(tmp_path / "uneven.npy", np.array([1, 1, 1, 1, 2, 2]))
    np.save(tmp_path / "floats.npy", np.zeros(2))
    bad = embeddings.view(2, 3, 16).clone()
    bad[1, 2, 0] = float("nan")
    np.save(tmp_path / "bad.npy", bad.numpy())
    np.save(tmp_path / "four.npy", np.ones((2, 2, 3, 16), np.float32))
    for file, ids, message in (
        ("contexts.npy", "three.npy", "has 3 ids, "),
        ("contexts.npy", "twice.npy", "has the id 0 2 times"),
        ("rows.npy", "uneven.npy", "has 4 rows of 1 but 2 of 2"),
        ("contexts.npy", "floats.npy", "(2,) of float64: ids"),
        ("contexts.npy", "missing.npy", "missing.npy is missing"),
        ("bad.npy", "identity_ids.npy", "1 of 6 rows of"),
        ("four.npy", "identity_ids.npy", "(2, 2, 3, 16)"),
    ):
        said = " ".join(complaint(*imported, tmp_path / file, "--identity-ids", tmp_path / ids).split())
        assert message in said, said


def test_banks_with_an_embedding_per_image_elsewhere():
    """Compared image by image with others; refused where one per identity is needed."""
    embeddings = unit(6)
    bank = IdentityBank(embeddings.view(2, 3, 16), "toy", ["a", "b"])
    rows = bank.one_per_row()
    assert rows.names == list("aaabbb") and torch.equal(rows.embeddings, embeddings) and rows.one_per_row() is rows
    report = inspect_bank(bank, bank)
    assert torch.allclose(report.nearest_known, torch.ones(6)) and report.known_names == list("aaabbb")
    between = embeddings[:3] @ embeddings[3:].T
    assert torch.allclose(report.nearest_other, torch.cat([between.amax(dim=1), between.amax(dim=0)]), atol=1e-6)
    near = IdentityBank(embeddings[[5]], "toy", ["c"])
    kept, counts = keep_distinct(near, [bank], 0.9)
    assert len(kept) == 0 and counts["near an excluded identity"] == 1
    leakage = measure_leakage(near, bank)
    assert leakage.image_nearest.tolist() == [5] and leakage.impostor_pairs == 9
    assert len(sample_identities(bank, 2, max_similarity=0.99)) == 2
    for refused in (keep_distinct, safe_cosines, lambda bank: perturb_identities(bank, (0.5, 1.0))):
        with pytest.raises(ValueError, match="3 embeddings of each identity, one per image: .* takes banks with one"):
            refused(bank)
    broken = embeddings.view(2, 3, 16).clone()
    broken[1, 2] = 0
    with pytest.raises(ValueError, match="1 of 6 embeddings are zero .* that of `b` in row 1, image 2"):
        IdentityBank(broken, "toy", ["a", "b"])
    with pytest.raises(ValueError, match=r"not \(2, 0, 16\)"):
        IdentityBank(torch.zeros(2, 0, 16), "toy")


# training


@pytest.fixture(scope="module")
def cache(tmp_path_factory, toy_root):
    """30 people of 4 photographs, and one who is alone."""
    root = tmp_path_factory.mktemp("flow")
    generator = np.random.default_rng(0)
    for person in range(31):
        (root / "photos" / f"p{person}").mkdir(parents=True)
        color = tuple(int(value) for value in generator.integers(0, 255, 3))
        for index in range(4 if person < 30 else 1):
            x, y = (int(value) for value in generator.integers(70, 90, 2))
            draw_person(color, ((x, y, 44),)).save(root / "photos" / f"p{person}" / f"{index}.png")
    prepare_faces(root / "photos", root / "cache", FaceEncoder("toy", str(toy_root), det_size=160), image_size=112)
    return root / "cache"


def test_pairs_are_of_one_person_and_two_faces(cache):
    faces = PersonEmbeddings([cache])
    assert faces.people == 30 and faces.left_out["alone of their person"] == 1
    torch.manual_seed(0)
    positions = torch.arange(len(faces)).repeat(30)
    anchors, partners = faces.pairs(positions)
    person = faces.first[positions]
    index = {tuple(row.tolist()): place for place, row in enumerate(faces.embeddings)}
    partner = torch.tensor([index[tuple(row.tolist())] for row in partners])
    assert torch.equal(faces.first[partner], person) and (partner != positions).all()
    assert torch.equal(anchors, faces.embeddings[positions])
    # every other face of a person is drawn
    pairs = {(int(a), int(b)) for a, b in zip(positions, partner, strict=True)}
    assert len(pairs) == int((faces.count - 1).sum())
    # quantiles of all pairs, each person with the same weight: these have as many faces
    cosines = [float(faces.embeddings[a] @ faces.embeddings[b]) for a, b in pairs if a < b and faces.count[a] == 4]
    assert faces.cosine_quantiles(3)[0] == pytest.approx(min(cosines), abs=1e-4)
    assert faces.cosine_quantiles(3)[1] == pytest.approx(np.median(cosines), abs=0.02)
    flow = IdentityFlow(16)
    share = fit_shared_noise(flow, faces, 200)
    figures = compare_directions(flow, faces, 200)
    assert share == flow.config.shared_noise and figures["flow"] == pytest.approx(figures["real"], abs=0.02)
    held_out = PersonEmbeddings([cache], (0.0, 0.3))
    rest = PersonEmbeddings([cache], (0.3, 1.0))
    assert held_out.people + rest.people == 30 and 0 < held_out.people < 30
    assert 0 <= place_of("p0") < 1 and place_of("p0") != place_of("p1")


def options_of(cache, output, *options: str) -> list[str]:
    return [
        *("--train-data", str(cache), "--output-dir", str(output), "--train-batch-size", "16", "--report-to", "none"),
        *("--max-train-steps", "24", "--checkpointing-steps", "4", "--validation-steps", "12"),
        *("--flow", '{"width": 32, "num_blocks": 1}', "--validation-share", "0.3", *options),
    ]


def test_sigkill_and_resume_gives_the_same_flow(cache, tmp_path):
    result = run_script(script.main, options_of(cache, tmp_path / "whole"))
    assert result.returncode == 0, result.stderr
    assert "alone of their person': " in result.stderr
    flow = load_identity_flow(tmp_path / "whole")
    assert flow.config.identity_encoder == "toy" and flow.config.identity_encoder_fingerprint
    assert flow.config.identity_dim == 16 and len(flow.config.cosine_quantiles) == 65
    assert 0 < flow.config.shared_noise < 1
    assert (tmp_path / "whole" / "validation" / "step-0000024.json").exists()
    Running("train_identity_flow", options_of(cache, tmp_path / "killed")).kill_at("| 10/24")
    assert not (tmp_path / "killed" / "config.json").exists()
    result = run_script(script.main, options_of(cache, tmp_path / "killed", "--resume-from-checkpoint", "latest"))
    assert result.returncode == 0 and "resumed from" in result.stderr, result.stderr
    file = "diffusion_pytorch_model.safetensors"
    first, second = load_file(tmp_path / "whole" / file), load_file(tmp_path / "killed" / file)
    assert all(torch.equal(first[name], second[name]) for name in first)
    changed = options_of(cache, tmp_path / "killed", "--resume-from-checkpoint", "latest", "--validation-share", "0.2")
    result = run_script(script.main, changed)
    assert result.returncode == 1 and "validation_share: 0.3 then, 0.2 now" in result.stderr


def test_mistakes_in_training_are_named(cache, tmp_path):
    for options, message in (
        (["--flow", '{"widths": 2}'], "makes no model"),
        (["--flow", '{"cosine_quantiles": [0.9, 0.1]}'], "ascending cosines"),
        (["--train-data", str(tmp_path / "nothing")], "is no cache of prepared faces"),
        (["--train-batch-size", "4096"], "lower --train-batch-size"),
    ):
        result = run_script(script.main, options_of(cache, tmp_path / "out", *options))
        assert result.returncode == 1 and message in result.stderr, result.stderr


# command line


def test_generate_with_a_flow(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    IdentityBank(unit(2), "toy").save(tmp_path / "bank.safetensors")
    IdentityBank(unit(6).view(2, 3, 16), "toy").save(tmp_path / "images.safetensors")
    moved_flow().save_pretrained(tmp_path / "flow")
    generate = ["generate", str(tmp_path / "model"), "--num-inference-steps", "2", "--size", "8"]
    options = ["--identity-flow", str(tmp_path / "flow"), "--identity-perturbation", "auto"]
    given = ["--identities", str(tmp_path / "bank.safetensors"), "--images-per-identity", "2"]
    cli.main([*generate, *given, *options, "--output", str(tmp_path / "data")])
    cosines = [row["perturbation"] for row in rows_of(tmp_path / "data")]
    assert min(cosines) >= safe_cosines(IdentityBank(unit(2)))[0] and len(set(cosines)) == 4
    assert model_fingerprint(moved_flow()) in (tmp_path / "data" / "generation.json").read_text()
    # as many images as the bank has embeddings
    cli.main([*generate, "--identities", str(tmp_path / "images.safetensors"), "--output", str(tmp_path / "images")])
    assert [row["index"] for row in rows_of(tmp_path / "images")] == [0, 1, 2] * 2


def test_mistakes_on_the_command_line_are_named(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    IdentityBank(unit(3), "toy").save(tmp_path / "bank.safetensors")
    IdentityBank(unit(6).view(2, 3, 16), "toy").save(tmp_path / "images.safetensors")
    generate = ["generate", tmp_path / "model", "--output", tmp_path / "out", "--num-inference-steps", 2]
    given = [*generate, "--identities", tmp_path / "bank.safetensors"]
    assert "takes two cosines" in complaint(*given, "--identity-perturbation", "0.5")
    assert "takes two cosines" in complaint(*given, "--identity-perturbation", "auto", "0.5")
    assert "holds UIFaceUNet2DModel" in complaint(*given, "--identity-flow", tmp_path / "model" / "unet")
    given = [*generate, "--identities", tmp_path / "images.safetensors"]
    assert "embeddings for 3 images" in complaint(*given, "--images-per-identity", 4)
    perturb = ["identities", "perturb", tmp_path / "images.safetensors", "--output", tmp_path / "x"]
    assert "takes banks with one per identity" in complaint(*perturb)
    assert not (tmp_path / "out").exists()
