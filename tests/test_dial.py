"""`uiface calibrate` and the dial: the curve by hand, and a tiny model end to end."""

import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import complaint, tiny_components

from uiface_diffusers import IdentityBank, UIFacePipeline, cli
from uiface_diffusers.two_stage.dial import Dial, DialPoint, diversity_of_real_faces, monotone_curve


def point(cosine, diversity, boundary="adaptive", scale=2.0, cap=300, genuine=0.0):
    cap = None if boundary is None else cap
    return DialPoint(boundary, scale, cap, cosine, genuine, eer=0.1, diversity=diversity, rows_per_image=10.0)


# the second and the fifth are dominated, the sixth is a single stage within the two stages
GRID = [
    point(0.2, 0.8, scale=1.0, cap=100, genuine=0.1),
    point(0.1, 0.7),
    point(0.4, 0.6, scale=2.0, cap=300, genuine=0.3),
    point(0.5, 0.5, scale=2.0, cap=500, genuine=0.5),
    point(0.4, 0.55, cap=200),
    point(0.45, 0.58, boundary=None),
    point(0.6, 0.4, boundary=None, scale=3.0, genuine=0.6),
]


def dial(**changed) -> Dial:
    return Dial(**{"points": monotone_curve(GRID), "encoder": "toy", "encoder_fingerprint": None,
                   "num_inference_steps": 50, "diversity_measure": "intra_class_lpips", **changed})  # fmt: skip


def settings(scale, boundary, cap):
    return {"guidance_scale": pytest.approx(scale), "boundary": boundary, "latest_boundary": cap}


def test_curve_is_monotone_without_dominated_points():
    curve = monotone_curve(reversed(GRID))
    assert curve == (GRID[0], GRID[2], GRID[3], GRID[6])
    generator = np.random.default_rng(0)
    points = [point(*generator.uniform(size=2).tolist()) for _ in range(200)]
    curve = monotone_curve(points)
    for lower, upper in itertools.pairwise(curve):
        assert lower.identity_cosine < upper.identity_cosine and lower.diversity > upper.diversity
    for each in set(points) - set(curve):
        assert any(o.identity_cosine >= each.identity_cosine and o.diversity >= each.diversity for o in curve)


def test_settings_between_neighbors_by_hand():
    found = dial()
    assert found.settings(0.2) == settings(1.0, "adaptive", 100)
    assert found.settings(0.25) == settings(1.25, "adaptive", pytest.approx(150))
    assert found.settings(0.45) == settings(2.0, "adaptive", pytest.approx(400))
    # nothing between two stages and the single one: the nearer
    assert found.settings(0.54) == settings(2.0, "adaptive", 500)
    assert found.settings(0.56) == settings(3.0, None, None)
    assert found.settings(0.6) == settings(3.0, None, None)
    # diversity is the share of the way from most identity
    assert found.identity_cosine(0) == 0.6 and found.identity_cosine(1) == pytest.approx(0.2)
    assert found.identity_cosine(0.25) == pytest.approx(0.5)
    assert Dial.from_config(json.loads(json.dumps(found.to_config()))) == found


def test_real_faces_are_met_by_hand():
    curve = monotone_curve(GRID)
    # 0.4 lies halfway between the genuine cosines 0.3 and 0.5, at the identity cosine 0.45
    assert diversity_of_real_faces(curve, 0.4) == pytest.approx((0.6 - 0.45) / 0.4)
    assert diversity_of_real_faces(curve, 0.6) == pytest.approx(0)
    assert diversity_of_real_faces(curve, 0.9) == 0 and diversity_of_real_faces(curve, -1) == 1


def test_wrong_dials_are_refused():
    with pytest.raises(ValueError, match="nothing to choose between"):
        monotone_curve([point(0.5, 0.5), point(0.4, 0.4)])
    with pytest.raises(ValueError, match="rise in `identity_cosine`"):
        dial(points=(GRID[2], GRID[0]))
    with pytest.raises(ValueError, match="from 0.2 to 0.6, which is what the model's curve reaches, but is 0.7"):
        dial().settings(0.7)
    for value in (-0.1, 1.1, float("nan"), "most", True):
        with pytest.raises(ValueError, match="`diversity` has to be a number from 0 to 1"):
            dial().identity_cosine(value)
    with pytest.raises(ValueError, match="no recommended diversity"):
        dial().identity_cosine("recommended")
    with pytest.raises(ValueError, match="damaged"):
        UIFacePipeline(**tiny_components(), dial={"points": [{"guidance": 1}]})


def calls(pipe, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    embeds = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    return pipe(embeds, num_inference_steps=4, generator=generators, output_type="np", **options).images


@pytest.fixture
def dialed_pipeline():
    pipe = UIFacePipeline(**tiny_components(), dial=dial(recommended_diversity=0.4).to_config())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_call_is_the_call_with_the_settings_that_it_reports(dialed_pipeline):
    pipe, seen = dialed_pipeline, []
    for asked in ({"diversity": 0.0}, {"diversity": 0.7}, {"identity_cosine": 0.45}, {"diversity": "recommended"}):
        reported = pipe.with_dial(asked)
        assert set(reported) == {"guidance_scale", "boundary", "latest_boundary"}
        seen.append(calls(pipe, **asked))
        assert np.array_equal(seen[-1], calls(pipe, **reported))
    assert not np.array_equal(seen[0], seen[1])
    assert np.array_equal(calls(pipe), calls(UIFacePipeline.from_pipe(pipe, dial=None)))


def test_dial_is_kept_and_its_absence_costs_nothing(dialed_pipeline, tiny_pipeline, tmp_path):
    expected = calls(dialed_pipeline, diversity=0.7)
    dialed_pipeline.save_pretrained(tmp_path / "with")
    loaded = UIFacePipeline.from_pretrained(tmp_path / "with")
    assert np.array_equal(calls(loaded, diversity=0.7), expected)
    assert np.array_equal(calls(UIFacePipeline.from_pipe(loaded), diversity=0.7), expected)
    tiny_pipeline.save_pretrained(tmp_path / "without")
    assert "dial" not in json.loads((tmp_path / "without" / "model_index.json").read_text())
    assert UIFacePipeline.from_pretrained(tmp_path / "without").config.dial is None


def test_wrong_calls_are_refused(dialed_pipeline, tiny_pipeline):
    with pytest.raises(ValueError, match="run `uiface calibrate MODEL --encoder PACK` first"):
        calls(tiny_pipeline, diversity=0.5)
    with pytest.raises(ValueError, match="`diversity` decides what `identity_cosine` would"):
        calls(dialed_pipeline, diversity=0.5, identity_cosine=0.4)
    for name, value in {
        "boundary": 500,
        "guidance_scale": 2.0,
        "latest_boundary": 1,
        "boundary_threshold": 0.1,
    }.items():
        with pytest.raises(ValueError, match=f"`diversity` decides what `{name}` would"):
            calls(dialed_pipeline, diversity=0.5, **{name: value})
    with pytest.raises(ValueError, match="`boundary` would"):  # said, though it is the default
        dialed_pipeline.check_sampling(diversity=0.5, boundary="adaptive")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """MODEL with a bank, and REAL of three people."""
    root = tmp_path_factory.mktemp("dial")
    UIFacePipeline(**tiny_components()).save_pretrained(root / "model")
    embeds = F.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))
    IdentityBank(embeds, "toy").save(root / "model" / "identities.safetensors")
    generator = np.random.default_rng(0)
    for person, index in itertools.product(range(3), range(2)):
        file = root / "real" / f"person_{person}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(generator.integers(0, 256, (112, 112, 3), dtype=np.uint8)).save(file)
    return root


def arguments(root, toy_root, *more):
    argv = ["calibrate", root / "model", "--encoder", "toy", "--encoder-root", toy_root, "--det-size", 160]
    argv += ["--work", root / "work", "--identities", 3, "--num-inference-steps", 3]
    argv += ["--latest-boundaries", 100, 600, "--guidance-scales", 1.5, 4]
    return list(map(str, [*argv, *more]))


def test_model_is_calibrated_saved_and_generates_with_its_dial(root, toy_root, backbone, tmp_path, capsys):
    output = tmp_path / "dialed"
    more = ["--real", root / "real", "--lpips-backbone", backbone, "--output", output]
    cli.main(arguments(root, toy_root, *more))
    printed = capsys.readouterr().out
    assert "6/6" in printed and "from most diverse to most identity" in printed
    assert "--diversity" in printed
    pipe = UIFacePipeline.from_pretrained(output)
    found = Dial.from_config(pipe.config.dial)
    assert found.diversity_measure == "intra_class_lpips" and found.encoder == "toy"
    assert 0 <= found.recommended_diversity <= 1 and -1 <= found.real_genuine_cosine <= 1
    assert all(each.rows_per_image > 0 for each in found.points)
    assert (output / "identities.safetensors").exists()

    # again: nothing is sampled
    times = {file: file.stat().st_mtime_ns for file in (root / "work").rglob("*.png")}
    shutil.rmtree(output)
    cli.main(arguments(root, toy_root, *more))
    assert times == {file: file.stat().st_mtime_ns for file in (root / "work").rglob("*.png")}
    assert Dial.from_config(UIFacePipeline.from_pretrained(output).config.dial) == found

    # a data set records what the dial became, and goes on
    data = ["generate", str(output), "--output", str(tmp_path / "data"), "--num-inference-steps", "3"]
    data += ["--images-per-identity", "2", "--max-identities", "2", "--diversity", "0.3"]
    cli.main(data)
    written = json.loads((tmp_path / "data" / "generation.json").read_text())
    became = pipe.with_dial({"diversity": 0.3})
    assert written["dial"] == {"diversity": 0.3}
    assert {name: written["settings"]["sampling"][name] for name in became} | {"latest_boundary": None} == became | {
        "latest_boundary": None
    }
    assert "diversity" not in written["settings"]["sampling"]
    images = sorted((tmp_path / "data" / "images").rglob("*.png"))
    before = [file.read_bytes() for file in images]
    images[0].unlink()
    cli.main(data)
    assert [file.read_bytes() for file in images] == before
    assert "other settings" in complaint(*data[:-1], "0.9")
    assert "`diversity` decides what `boundary` would" in complaint(*data, "--boundary", "adaptive")


def test_calibration_in_place_without_perceptual_weights(root, toy_root, tmp_path):
    model = shutil.copytree(root / "model", tmp_path / "model")
    argv = arguments(root, toy_root, "--work", tmp_path / "work")
    argv[1] = str(model)
    cli.main(argv)
    found = Dial.from_config(UIFacePipeline.from_pretrained(model).config.dial)
    assert found.diversity_measure == "genuine_distance" and found.recommended_diversity is None
    assert all(each.diversity == pytest.approx(1 - each.genuine_cosine) for each in found.points)
    assert replace(found) == found


def test_bad_input_is_refused_before_long_work(root, toy_root, tmp_path):
    def refused(*more):
        return complaint(*arguments(root, toy_root, "--work", tmp_path / "work", *more))

    assert "the bank has 3 identities, --identities asks for 4" in refused("--identities", 4)
    assert "exists: name a new folder" in refused("--output", root / "model")
    IdentityBank(torch.eye(3, 16), "other").save(tmp_path / "bank.safetensors")
    assert "use one model pack for both" in refused("--bank", tmp_path / "bank.safetensors")
    PIL.Image.new("RGB", (112, 112)).save(tmp_path / "one.png")
    (tmp_path / "one" / "person").mkdir(parents=True)
    shutil.move(tmp_path / "one.png", tmp_path / "one" / "person")
    assert "faces of two or more people" in refused("--real", tmp_path / "one")
    assert not list((tmp_path / "work").rglob("images"))
    assert "into: name one for a copy by --output" in complaint("calibrate", "--encoder", "toy")
