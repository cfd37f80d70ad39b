"""`uiface browse`: what the page holds, and, in Chromium, what it shows."""

import base64
import io
import json
import re
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Visit
from toy_sets import IMAGES, PEOPLE, face, write_set

from uiface_diffusers import IdentityBank, cli, generate_dataset
from uiface_diffusers.data.image_folder import GENERATION, METADATA, SCHEMA, ImageRow, pack_shard
from uiface_diffusers.gallery import write_gallery


def content_of(page: Path) -> dict:
    text = page.read_text()
    assert text.count("<script") == 2  # the data and the code
    return json.loads(re.search(r'<script id="data" type="application/json">(.*)</script>', text)[1])


def generated(root: Path, names=("anna", "berta", "carla"), images=4, sharded=False) -> Path:
    """As `generate_dataset` leaves it: image n of person p has the similarity p / 10 + n / 100."""
    rows, files = [], []
    for person, name in enumerate(names):
        for index in range(images):
            path = root / "images" / name / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            face(person, index).save(path)
            boundary = (-1, 900, 500, 700)[index % 4]
            similarity = round(person / 10 + index / 100, 3)
            rows.append(ImageRow(name, index, 2**60 + index, 0, boundary, None, similarity, path.stat().st_size))
            files.append(f"{name}/{index:04d}.png")
    if sharded:
        classes = [names.index(row.identity) for row in rows]
        pack_shard(root / "shards" / "000000.tar", root / "images", files, classes, rows)
        shutil.rmtree(root / "images")
    where = "shards/000000.tar" if sharded else "images"
    table = [{"file_name": f"{where}/{file}", **asdict(row)} for file, row in zip(files, rows, strict=True)]
    pq.write_table(pa.Table.from_pylist(table, SCHEMA), root / METADATA)
    (root / GENERATION).write_text("{}")
    return root


def test_a_set_in_parquet_is_filtered(tmp_path, tiny_pipeline):
    bank = IdentityBank(torch.eye(16)[:2], "toy", ["anna", "berta"])
    data = tmp_path / "data"
    generate_dataset(tiny_pipeline, bank, data, images_per_identity=2, output_format="parquet", num_inference_steps=2)
    write_gallery(data, tmp_path / "page.html")
    content, rows = content_of(tmp_path / "page.html"), pq.read_table(data / METADATA).to_pylist()
    assert content["identities"] == [["anna", 2], ["berta", 2]]
    assert content["seeds"] == [str(row["seed"]) for row in rows]
    (boundary,) = content["columns"]
    assert boundary["values"] == [row["boundary_timestep"] for row in rows]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_generated_set(tmp_path, capsys, sharded):
    data = generated(tmp_path / "data", sharded=sharded)
    (data / "notes.txt").write_text("")
    cli.main(["browse", str(data), "--output", str(tmp_path / "page.html"), "--thumbnail", "48"])
    printed = capsys.readouterr().out
    assert printed.startswith("12 images of 3 identities\nleft out: 1 beside the generated images: notes.txt\n")
    content = content_of(tmp_path / "page.html")
    assert content["identities"] == [["anna", 4], ["berta", 4], ["carla", 4]]
    columns = {column["name"]: column["values"] for column in content["columns"]}
    # a column without any value is none
    assert columns.keys() == {"similarity", "boundary"}
    assert columns["similarity"] == pytest.approx([p / 10 + n / 100 for p in range(3) for n in range(4)])
    assert columns["boundary"] == [-1, 900, 500, 700] * 3
    assert content["seeds"][:2] == [str(2**60), str(2**60 + 1)]
    assert content["files"][5] == ("000000.tar:berta/0001.png" if sharded else "berta/0001.png")
    pictures = [PIL.Image.open(io.BytesIO(base64.b64decode(each))) for each in content["thumbnails"]]
    assert {picture.size for picture in pictures} == {(48, 48)}
    expected = np.asarray(face(1, 1).resize((48, 48), PIL.Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(np.asarray(pictures[5].convert("RGB")) - expected).mean() < 8


def test_any_other_set(tmp_path):
    """Identity folders with hostile names, a picture that is not square, and one that cannot be read."""
    root = write_set(tmp_path / "set", PEOPLE)
    PIL.Image.new("RGB", (200, 100)).save(root / "dora" / "wide.png")
    (root / "dora" / "broken.png").write_bytes(b"nothing")
    lines = []
    assert write_gallery(root, tmp_path / "page.html", log=lines.append) == {"images": 21, "identities": 4}
    assert lines == ["21 images of 4 identities", "left out: 1 unreadable: dora/broken.png"]
    content = content_of(tmp_path / "page.html")
    assert {name for name, _ in content["identities"]} == set(PEOPLE) and not content["columns"]
    assert content["left_out"] == ["1 unreadable: dora/broken.png"] and content["seeds"] is None
    wide = content["thumbnails"][content["files"].index("dora/wide.png")]
    assert PIL.Image.open(io.BytesIO(base64.b64decode(wide))).size == (80, 40)


def test_of_a_large_set_whole_identities_are_drawn(tmp_path):
    root, lines = write_set(tmp_path / "set", [f"p{i}" for i in range(8)]), []
    write_gallery(root, tmp_path / "page.html", max_images=3 * IMAGES + 1, log=lines.append)
    assert lines == ["15 images of 3 identities, drawn from 40 of 8"]
    content = content_of(tmp_path / "page.html")
    assert content["identities"] == sorted(content["identities"]) and content["summary"] == f"{lines[0]}."


def test_what_cannot_be_shown(tmp_path):
    (tmp_path / "set" / "anna").mkdir(parents=True)
    (tmp_path / "set" / "anna" / "0.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="none of the pictures in .* can be read: unreadable"):
        write_gallery(tmp_path / "set", tmp_path / "page.html")
    with pytest.raises(SystemExit, match="is a folder: name a file"):
        cli.main(["browse", str(tmp_path / "set"), "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="does not exist"):
        cli.main(["browse", str(tmp_path / "none"), "--output", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()


def names_shown(page) -> list[str]:
    return page.locator(".line.first b").all_text_contents()


def test_filters_and_orders_in_the_browser(browser, tmp_path):
    write_gallery(generated(tmp_path / "data"), tmp_path / "page.html")
    visit = Visit(browser, (tmp_path / "page.html").as_uri())
    page = visit.page
    assert page.title() == "data" and names_shown(page) == ["anna", "berta", "carla"]
    assert page.locator("#count").text_content() == "12 of 12 images, 3 of 3 identities"
    page.get_by_label("similarity from").fill("0.1")
    page.get_by_label("boundary to").fill("600")
    assert names_shown(page) == ["berta", "carla"]
    shown = page.locator(".cell img").evaluate_all("images => images.map(image => image.alt)")
    assert shown == [f"{name}/{index:04d}.png" for name in ("berta", "carla") for index in (0, 2)]
    page.get_by_role("button", name="Reset").click()
    page.get_by_label("Sort by").select_option(label="similarity, high first")
    assert names_shown(page) == ["carla", "berta", "anna"]
    assert page.locator(".cell span").first.text_content() == "0.230"
    page.get_by_label("Identity").fill("ANN")
    assert names_shown(page) == ["anna"]
    page.locator(".cell").first.click()
    table = page.locator("dialog table").inner_text()
    assert "anna/0003.png" in table and str(2**60 + 3) in table and "700" in table
    page.keyboard.press("ArrowRight")
    assert "anna/0002.png" in page.locator("dialog table").inner_text()
    # every picture is one
    assert page.locator("img").evaluate_all("images => images.every(image => image.naturalWidth === 80)")
    page.close()
    assert not visit.problems


def test_hostile_names_in_the_browser(browser, tmp_path):
    root = write_set(tmp_path / "<b>set", (*PEOPLE, "</script><script>alert(1)<"), images=1)
    write_gallery(root, tmp_path / "page.html")
    visit = Visit(browser, (tmp_path / "page.html").as_uri(), width=390, height=800)
    dialogs = []
    visit.page.on("dialog", lambda dialog: dialogs.append(dialog))
    assert PEOPLE[0] in names_shown(visit.page) and visit.page.locator("h1").text_content() == "<b>set"
    visit.page.locator(".cell").first.click()
    # nothing is wider than a telephone
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
    visit.page.close()
    assert not dialogs and not visit.problems


def test_ten_thousand_images_in_the_browser(browser, tmp_path):
    """Only what is in sight is in the document, so that scrolling and filtering take no time."""
    pixels = np.random.default_rng(0).integers(0, 255, (8, 6, 6, 3), np.uint8)
    encoded = []
    for each in pixels:
        buffer = io.BytesIO()
        PIL.Image.fromarray(each).save(buffer, "png")
        encoded.append(buffer.getvalue())
    for person in range(500):
        folder = tmp_path / "set" / f"{person:03d}"
        folder.mkdir(parents=True)
        for index in range(20):
            (folder / f"{index:02d}.png").write_bytes(encoded[(person + index) % 8])
    write_gallery(tmp_path / "set", tmp_path / "page.html")
    visit = Visit(browser, (tmp_path / "page.html").as_uri())
    page = visit.page
    assert page.locator("#count").text_content() == "10,000 of 10,000 images, 500 of 500 identities"
    assert page.locator(".cell").count() < 600
    started = time.monotonic()
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    page.get_by_text("499", exact=True).wait_for()
    page.get_by_label("Identity").fill("25")
    page.get_by_text("425", exact=True).wait_for()
    assert time.monotonic() - started < 5
    assert page.locator(".cell").count() < 600
    page.close()
    assert not visit.problems
