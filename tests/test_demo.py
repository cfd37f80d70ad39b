"""`uiface demo`: what its page shows, and the page itself in Chromium."""

import base64
import io
import os
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, Visit, draw_person

from uiface_diffusers import IdentityBank, cli
from uiface_diffusers.demo import ADAPTIVE, FIXED, SINGLE, Demo, color_map, sample_faces
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.seeds import image_generator

NAMES = ["anna", "<b>", "carla"]
SETTINGS = {"number": 3, "seed": 5, "steps": 4, "guidance_scale": 2.0, "timestep": 400, "injection": "both"}


@pytest.fixture(scope="module")
def bank() -> IdentityBank:
    embeddings = F.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))
    return IdentityBank(embeddings, "toy", NAMES)


def pictures(page: str, kind: str = "") -> list[np.ndarray]:
    sources = re.findall(f'<img class="{kind}" alt="[^"]*" src="data:image/png;base64,([^"]*)">', page)
    return [np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(source)))) for source in sources]


def test_faces_are_those_of_a_data_set(tiny_pipeline, bank):
    """Image n of an identity has the noise of `uiface generate`; the maps are what the boundary was found by."""
    steps = []
    options = {"num_inference_steps": 4, "boundary_threshold": 0.0, "latest_boundary": 300}
    sampled = sample_faces(tiny_pipeline, bank.take([1]), 3, 5, lambda *done: steps.append(done), **options)
    generators = [image_generator(5, "<b>", index) for index in range(3)]
    expected = tiny_pipeline(bank.take([1]), num_images_per_prompt=3, generator=generators, **options)
    for ours, theirs in zip(sampled.images, expected.images, strict=True):
        assert np.array_equal(ours, theirs)
    assert sampled.boundaries == expected.boundary_timesteps.tolist()
    assert steps == [(step, 4) for step in range(1, 5)]
    assert all(each.shape == (32, 32) and each.min() == 0 and each.max() == 1 for each in sampled.maps)
    single = sample_faces(tiny_pipeline, bank.take([1]), 1, 5, num_inference_steps=2, boundary=None)
    assert single.maps == [None]


@pytest.mark.parametrize(("boundary", "beside", "faces", "maps", "with_boundary"), [
    (ADAPTIVE, True, 6, 3, 3),
    (FIXED, False, 3, 0, 3),
    (SINGLE, True, 3, 0, 0),
])  # fmt: skip
def test_the_page_of_faces(tiny_pipeline, bank, boundary, beside, faces, maps, with_boundary):
    demo, shares = Demo(tiny_pipeline, bank), []
    settings = SETTINGS | {"boundary": boundary, "beside": beside, "with_maps": True}
    page = demo.make(demo.identity("<b>"), **settings, progress=lambda share, text: shares.append(share))
    assert len(pictures(page)) == faces and len(pictures(page, "map")) == maps
    assert "&lt;b&gt;: " in page and "<b>" not in page
    boundaries = re.findall(r"<br>boundary (\d+)</figcaption>", page)
    assert len(boundaries) == with_boundary and (boundary != FIXED or set(boundaries) == {"250"})
    assert shares == sorted(shares) and shares[-1] == 1
    if beside and boundary == ADAPTIVE:
        single = demo.make(demo.identity("<b>"), **settings | {"boundary": SINGLE})
        assert all(map(np.array_equal, pictures(page)[3:], pictures(single)))


def test_colors_of_attention():
    colors = np.asarray(color_map(np.linspace(0, 1, 32 * 32).reshape(32, 32)))
    assert (
        colors.shape == (32, 32, 3)
        and tuple(colors[0, 0]) == (12, 12, 40)
        and tuple(colors[-1, -1]) == (252, 255, 164)
    )


def test_identities(tiny_pipeline, bank, toy_root, tmp_path):
    encoder = FaceEncoder("toy", str(toy_root), det_size=160)
    demo = Demo(tiny_pipeline, bank, encoder)
    assert {demo.draw() for _ in range(100)} == set(NAMES)
    assert torch.equal(demo.identity("carla").embeddings[0], bank.embeddings[2])
    with pytest.raises(ValueError, match="the bank has no identity 'x': its 3 begin with anna"):
        demo.identity("x")
    draw_person((10, 200, 90)).save(tmp_path / "photograph.png")
    embedding = encoder.embed(tmp_path / "photograph.png").embeddings
    assert torch.equal(demo.embed(tmp_path / "photograph.png", aligned=False).embeddings, embedding)
    PIL.Image.new("RGB", (112, 112), "gray").save(tmp_path / "aligned.png")
    assert demo.embed(tmp_path / "aligned.png", aligned=True).names == ["photograph"]
    with pytest.raises(ValueError, match="no face found"):
        demo.embed(tmp_path / "aligned.png", aligned=False)
    with pytest.raises(ValueError, match="the bank comes from encoder `another`"):
        Demo(tiny_pipeline, IdentityBank(bank.embeddings, "another"))


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match=r"needs Gradio: pip install .uiface-diffusers\[demo\]"):
        cli.main(["demo"])


def test_a_port_is_a_port():
    with pytest.raises(SystemExit, match="a port is a number from 1 to 65535, not 70000"):
        cli.main(["demo", "--port", "70000"])


@pytest.fixture
def served(tiny_pipeline, bank, toy_root, tmp_path):
    """The address of a demo of its own process, and the folder of its temporary files."""
    pytest.importorskip("gradio", reason="needs gradio")
    tiny_pipeline.save_pretrained(tmp_path / "model")
    bank.save(tmp_path / "model" / "identities.safetensors")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "temporary").mkdir()
    command = [
        sys.executable,
        "-u",
        "-m",
        "uiface_diffusers.cli",
        "demo",
        str(tmp_path / "model"),
        "--port",
        str(port),
    ]
    command += ["--encoder", "toy", "--encoder-root", str(toy_root), "--det-size", "160"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary"), "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        line = process.stdout.readline()
        assert line == f"open http://127.0.0.1:{port}/ in a browser; Ctrl-C ends the demo\n"
        yield f"http://127.0.0.1:{port}/", tmp_path / "temporary"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert not list((tmp_path / "temporary").iterdir())


def test_a_click_makes_faces_in_the_browser(browser, served, tmp_path):
    address, temporary = served
    visit = Visit(browser, address)
    page = visit.page
    page.get_by_label("Steps").first.fill("5")
    page.get_by_label("Attention maps").check()
    page.get_by_role("button", name="Make faces").click()
    page.locator("#faces figure").nth(15).wait_for(timeout=60_000)
    # eight faces of two stages with their maps, eight of the single stage
    assert page.locator("#faces figure").count() == 16 and page.locator("#faces img.map").count() == 8
    assert page.get_by_text("anna: two stages").is_visible()
    assert page.locator("#faces figcaption").first.inner_text().startswith("face 0\nboundary ")
    widths = page.locator("#faces img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert set(widths) == {16, 128}

    # a photograph is followed, and not kept; another visitor's upload is left alone
    (folder,) = temporary.iterdir()
    other = folder / "other.png"
    other.write_bytes(b"of somebody else")
    draw_person((10, 200, 90)).save(tmp_path / "photograph.png")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "photograph.png")
    page.get_by_text("Faces follow the photograph").wait_for(timeout=30_000)
    assert [file for file in temporary.rglob("*") if file.is_file()] == [other]
    page.get_by_label("Single stage beside").uncheck()
    page.get_by_role("button", name="Make faces").click()
    page.locator(".uiface-title", has_text="photograph: two stages").wait_for(timeout=60_000)
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    # the demo ends also while it computes
    page.get_by_label("Steps").first.fill("100")
    page.get_by_role("button", name="Make faces").click()
    page.locator("#faces", has_text="two stages - ").wait_for(timeout=30_000)
    page.close()
    # nothing is asked for elsewhere
    assert not visit.problems
