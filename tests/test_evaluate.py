"""`uiface evaluate` and `uiface compare`, on a toy set in every form that sets are published in."""

import base64
import html.parser
import io
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import webdataset
from conftest import write_toy_pack
from records import RecordWriter, image_record
from slow_references import slow_share
from toy_sets import IMAGES, PEOPLE, face, figures, write_set

from uiface_diffusers import IdentityBank, cli
from uiface_diffusers.data import prepare_faces
from uiface_diffusers.data.image_folder import GENERATION, METADATA
from uiface_diffusers.data.sources import open_source
from uiface_diffusers.evaluation import compare_reports, evaluate_dataset, load_lpips, load_report, registry
from uiface_diffusers.evaluation.face_set import FaceSet, computed_once
from uiface_diffusers.evaluation.features import LpipsFeatures
from uiface_diffusers.evaluation.figures import Description, Question
from uiface_diffusers.evaluation.measure import Measure
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.identities import bank_hash


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """ROOT/set, ROOT/real of the same people, packs `toy` and `judge` that differ, and what the set follows."""
    root = tmp_path_factory.mktemp("evaluate")
    write_set(root / "set")
    write_set(root / "real", images=6, seed=1)
    for name in ("toy", "judge"):
        write_toy_pack(root / "packs", name)
    generator = torch.Generator().manual_seed(0)
    contexts = F.normalize(torch.randn(6, 16, generator=generator))
    IdentityBank(contexts, "toy", ["x", *reversed(PEOPLE), "y"]).save(root / "contexts.safetensors")
    real = F.normalize(torch.randn(9, 16, generator=generator))
    IdentityBank(real, "toy", [f"p{i // 3}" for i in range(9)]).save(root / "known.safetensors")
    return root


@pytest.fixture(scope="module")
def encoder(workspace):
    return FaceEncoder("toy", str(workspace / "packs"), det_size=160)


@pytest.fixture(scope="module")
def perceptual(backbone):
    return load_lpips("alex", backbone)


@pytest.fixture(scope="module")
def arguments(workspace, backbone) -> list[str]:
    pack = ["--encoder", "toy", "--encoder-root", str(workspace / "packs"), "--det-size", "160"]
    return ["evaluate", str(workspace / "set"), *pack, "--lpips-backbone", str(backbone)]


@pytest.fixture(scope="module")
def evaluated(workspace, arguments) -> Path:
    """The report of the set, with everything that can be asked for."""
    options = {
        "--judge": "judge",
        "--identities": workspace / "contexts.safetensors",
        "--against": workspace / "known.safetensors",
        "--real": workspace / "real",
        "--neighbors": "2",
        "--lpips-pairs": "6",
        "--output": workspace / "evaluated",
    }
    cli.main([*arguments, *itertools.chain.from_iterable((k, str(v)) for k, v in options.items()), "--same-people"])
    return workspace / "evaluated"


def test_every_figure_by_hand(evaluated, workspace, encoder, perceptual):
    report = load_report(evaluated)
    assert report["dataset"]["summary"] == "20 images of 4 identities, 5 of each"
    assert report["settings"]["judge"] == "judge" and report["settings"]["seed"] == 0
    assert figures(report, "toy")["eer"] != figures(report, "judge")["eer"]
    assert {"torch", "lpips", "uiface-diffusers"} <= report["versions"].keys()
    assert all(each["meaning"] and "conditions" in each for each in report["figures"])
    found = figures(report, "toy")
    pictures = {n: [face(p, i) for i in range(IMAGES)] for p, n in enumerate(PEOPLE)}
    embeddings = {name: encoder.embed_pictures(of_name).double() for name, of_name in pictures.items()}
    pairs = [(a, b) for a in PEOPLE for b in PEOPLE]
    genuine = [float(x @ y) for of in embeddings.values() for x, y in itertools.combinations(of, 2)]
    impostor = [float(x @ y) for a, b in pairs if a < b for x in embeddings[a] for y in embeddings[b]]
    assert found["genuine_mean"] == pytest.approx(np.mean(genuine), abs=1e-6)
    assert found["impostor_mean"] == pytest.approx(np.mean(impostor), abs=1e-6)
    assert found["impostors_above"] == pytest.approx(np.mean([value > 0.3 for value in impostor]), abs=1e-6)
    spread = np.var(genuine) + np.var(impostor)
    # single precision
    assert found["fdr"] == pytest.approx((np.mean(genuine) - np.mean(impostor)) ** 2 / spread, rel=1e-4)
    centers = {name: F.normalize(of_name.mean(dim=0), dim=0) for name, of_name in embeddings.items()}
    kept = []
    for center in centers.values():
        if all(center @ other < 0.3 for other in kept):
            kept.append(center)
    assert found["uniqueness"] == pytest.approx(len(kept) / 4, abs=1e-6)
    near = [[float(x @ centers[name]) > 0.3 for x in of_name] for name, of_name in embeddings.items()]
    assert found["consistency"] == pytest.approx(np.mean(near), abs=1e-6)

    contexts = IdentityBank.load(workspace / "contexts.safetensors")
    known = dict(zip(contexts.names, contexts.embeddings.double(), strict=True))
    own = [float(x @ known[name]) for name, of_name in embeddings.items() for x in of_name]
    best = [max(float(x @ each) for each in known.values()) for of_name in embeddings.values() for x in of_name]
    assert found["context_cosine"] == pytest.approx(np.mean(own), abs=1e-6)
    nearest = np.mean([abs(a - b) < 1e-9 for a, b in zip(own, best, strict=True)])
    assert found["context_nearest"] == pytest.approx(nearest, abs=1e-6)
    real = IdentityBank.load(workspace / "known.safetensors").embeddings.double()
    largest = max(float(x @ y) for of_name in embeddings.values() for x in of_name for y in real)
    assert found["leakage_largest"] == pytest.approx(largest, abs=1e-6)
    assert found["leakage_images"] is not None and found["leakage_strangers"] is not None

    def pixels(of):
        return torch.from_numpy(np.stack([np.asarray(each) for each in of])).permute(0, 3, 1, 2) / 127.5 - 1

    details = [each["detail"] for each in report["figures"] if each["name"] == "intra_class_lpips"]
    assert details == ["Of 24 pairs of 4 identities."]
    network = LpipsFeatures(perceptual)
    ours = {name: network(pixels(of_name)).numpy() for name, of_name in pictures.items()}
    theirs = {n: network(pixels([face(p, i, seed=1) for i in range(6)])).numpy() for p, n in enumerate(PEOPLE)}
    all_ours, all_theirs = (np.concatenate(list(each.values())) for each in (ours, theirs))
    # as many of the 24 real ones
    all_theirs = all_theirs[np.sort(np.random.default_rng(0).choice(24, 20, replace=False))]
    assert found["precision"] == pytest.approx(slow_share(all_ours, all_theirs, 2), abs=1e-6)
    assert found["recall"] == pytest.approx(slow_share(all_theirs, all_ours, 2), abs=1e-6)
    within = [(slow_share(ours[n], theirs[n], 2), slow_share(theirs[n], ours[n], 2)) for n in PEOPLE]
    expected = np.mean(within, axis=0)
    assert (found["class_precision"], found["class_recall"]) == pytest.approx(expected, abs=1e-6)


def test_lpips_of_all_pairs(workspace, encoder, perceptual, tmp_path):
    report = evaluate_dataset(workspace / "set", tmp_path, encoder, perceptual=perceptual, lpips_pairs=None)
    means = []
    for person in range(len(PEOPLE)):
        images = [np.asarray(face(person, index)) for index in range(IMAGES)]
        images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
        pairs = itertools.combinations(range(IMAGES), 2)
        means.append(np.mean([float(perceptual(images[i : i + 1], images[j : j + 1])) for i, j in pairs]))
    assert figures(report)["intra_class_lpips"] == pytest.approx(np.mean(means), abs=1e-6)
    assert not {"precision", "context_cosine", "leakage_images"} & figures(report, "toy").keys()


class Page(html.parser.HTMLParser):
    """Tags are closed in order; keeps their attributes and the text."""

    VOID = ("br", "img", "meta")

    def __init__(self, content: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(content)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_no_other_file(evaluated):
    content = (evaluated / "report.html").read_text()
    page = Page(content)
    plain = "html head meta title style body h1 h2 p br table tr th td small details summary div figure figcaption img"
    assert {tag for tag, _ in page.tags} <= set(plain.split())
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 6 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?:|url\(|@import|<script|onerror=alert\(1\)>[^,&]*<", content)
    # the folder's name is text, also in the pictures' captions
    assert PEOPLE[0] in page.text and PEOPLE[0] not in content
    pictures = [PIL.Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in sources]
    assert pictures[0].size == (IMAGES * 112, 4 * 112)
    grid = np.asarray(pictures[0])
    shown = [grid[:112, 112 * column : 112 * (column + 1)] for column in range(IMAGES)]
    rows = {name: np.asarray(face(person, 0)) for person, name in enumerate(PEOPLE)}
    assert any(np.array_equal(shown[0], each) for each in rows.values())


QUESTIONS = [question.text for question in Question if question != Question.OTHER]


def test_the_page_answers_questions(evaluated):
    """Pictures first, then the questions with the recognizers as columns and real faces' values beside; details and
    settings are folded."""
    content = (evaluated / "report.html").read_text()
    places = [content.index("<img alt"), *(content.index(f"<h2>{text}</h2>") for text in QUESTIONS)]
    assert places == sorted(places) and content.rindex("<img alt") < places[1] and "Other figures" not in content
    sections = dict(zip(QUESTIONS, re.split("<h2>", content)[1:], strict=False))
    shown = {text: section.partition("<details>")[0] for text, section in sections.items()}
    assert "weights" not in "".join(shown.values()) and "weights" in sections[QUESTIONS[0]]
    one_person, distinct, diverse, real, leak = shown.values()
    for section in (one_person, distinct):
        assert re.findall(r'<th class="value">(.*?)</th>', section) == ["toy", "judge"]
    report, row = load_report(evaluated), re.search(r"<tr><th>Equal error rate</th>(.*?)</tr>", distinct)[1]
    percent = [f"{100 * figures(report, name)['eer']:.2f} %" for name in ("toy", "judge")]
    assert re.findall(r">([^<]+)</td>", row) == percent
    assert "Improved recall" in diverse and "Improved precision" in real
    # with both false accept rates, the strangers beside the set
    expected = r'<th>Images near a real face<small>(.*?)</small></th><td class="value">(.*?)<small>(.*?)</small>'
    rows = re.findall(expected, leak)
    assert [rate for rate, _, _ in rows] == ["FAR 0.001", "FAR 0.0001"] and "near another person" not in leak
    strangers = [each["value"] for each in report["figures"] if each["name"] == "leakage_strangers"]
    assert [text for _, _, text in rows] == [f"real faces {100 * value:.2f} %" for value in strangers]
    assert content.count("<details>") == 6 and content.rstrip().endswith("</details>\n</body>\n</html>")


def test_the_terminal_answers_questions(workspace, evaluated, encoder, perceptual, tmp_path):
    """One line per question, in the order of the page; without what it needs, a question says so."""
    lines, given = [], {"perceptual": perceptual, "lpips_pairs": 6}
    evaluate_dataset(workspace / "set", tmp_path, encoder, log=lines.append, **given)
    summary, *answers = lines
    assert summary == "20 images of 4 identities, 5 of each"
    assert [line.partition("?")[0] + "?" for line in answers] == QUESTIONS
    eer = figures(load_report(evaluated), "toy")["eer"]
    assert f"Equal error rate: {100 * eer:.2f} % by toy" in answers[1]
    assert answers[3].endswith("Not measured: it needs real faces (--real).")


def test_every_figure_has_a_question():
    described = [each for measure in registry.MEASURES for each in measure.figures.values()]
    assert all(each.question != Question.OTHER for each in described)
    names = {name for measure in registry.MEASURES for name in measure.figures}
    assert {each.real for each in described} - {""} <= names
    assert {each.question for each in described if each.headline} == {*Question} - {Question.OTHER}


def test_nothing_is_computed_twice(evaluated, workspace, encoder, perceptual, monkeypatch):
    """The same call again gives the same report; new measures of the same faces take their embeddings."""
    before = (evaluated / "report.json").read_text()

    def refuse(*args):
        raise AssertionError("computed again")

    judge = FaceEncoder("judge", str(workspace / "packs"), det_size=160)
    monkeypatch.setattr(FaceEncoder, "__call__", refuse)
    monkeypatch.setattr(type(perceptual), "forward", refuse)
    monkeypatch.setattr(LpipsFeatures, "forward", refuse)
    given = {
        "judge": judge,
        "identities": IdentityBank.load(workspace / "contexts.safetensors"),
        "against": IdentityBank.load(workspace / "known.safetensors"),
        "real": workspace / "real",
        "perceptual": perceptual,
    }
    options = {"same_people": True, "neighbors": 2, "lpips_pairs": 6}
    evaluate_dataset(workspace / "set", evaluated, encoder, **given, **options)
    assert (evaluated / "report.json").read_text() == before
    shutil.copytree(evaluated / "cache", workspace / "other" / "cache")
    options["neighbors"] = 3
    report = evaluate_dataset(workspace / "set", workspace / "other", encoder, **given, **options)
    assert {each["conditions"].get("k") for each in report["figures"]} == {None, 3}
    # a changed picture is another set
    shutil.copytree(workspace / "set", workspace / "changed")
    face(3, 9).convert("L").save(workspace / "changed" / "dora" / "0000.png")
    with pytest.raises(AssertionError, match="computed again"):
        evaluate_dataset(workspace / "changed", workspace / "other" / "changed", encoder, perceptual=perceptual)


def test_an_interrupted_computation_goes_on(tmp_path):
    computed = []

    def compute(rows: range, stop: int | None = None) -> torch.Tensor:
        if stop is not None and rows.stop > stop:
            raise KeyboardInterrupt
        computed.extend(rows)
        return torch.tensor(rows)[:, None].float()

    size = {"batch_size": 3, "batches_a_file": 2}
    with pytest.raises(KeyboardInterrupt):
        computed_once(tmp_path / "rows", 20, lambda rows: compute(rows, stop=15), "rows", **size)
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == ["000000.safetensors", "000001.safetensors"]
    del computed[12:]
    rows = computed_once(tmp_path / "rows", 20, compute, "rows", **size)
    assert computed == rows.flatten().tolist() == list(range(20))


def test_every_form_gives_the_same_faces(workspace, tmp_path, encoder):
    """Identity folders, both forms of `uiface generate`, webdataset, RecordIO, and a cache of `uiface prepare`."""
    expected = [np.asarray(face(person, index)) for person in range(4) for index in range(IMAGES)]
    labels = torch.arange(4).repeat_interleave(IMAGES)
    shutil.copytree(workspace / "set", tmp_path / "generated" / "images")
    (tmp_path / "packed" / "shards").mkdir(parents=True)
    (tmp_path / "tar").mkdir()
    (tmp_path / "rec").mkdir()
    shards = webdataset.TarWriter(str(tmp_path / "packed" / "shards" / "000000.tar"))
    tar = webdataset.TarWriter(str(tmp_path / "tar" / "0.tar"))
    records = RecordWriter(tmp_path / "rec" / "train.rec")
    for number, (person, index) in enumerate(itertools.product(range(4), range(IMAGES))):
        picture = io.BytesIO()
        face(person, index).save(picture, "png")
        sample = {"png": picture.getvalue(), "cls": person}
        shards.write({"__key__": f"{PEOPLE[person]}/{index:04d}", **sample})
        tar.write({"__key__": f"{number:06d}", **sample})
        records.write(number + 1, image_record(float(person), number + 1, picture.getvalue()))
    for writer in (shards, tar, records):
        writer.close()
    prepare_faces(workspace / "set", tmp_path / "cache", encoder, image_size=112, aligned=True)
    names = {"generated": PEOPLE, "packed": PEOPLE, "tar": ("0", "1", "2", "3"), "cache": PEOPLE}
    for form in ("generated", "packed"):
        (tmp_path / form / GENERATION).write_text("{}")
        with pytest.raises(ValueError, match="is an unfinished data set"):
            open_source(tmp_path / form)
        (tmp_path / form / METADATA).touch()
        with pytest.raises(ValueError, match="metadata.parquet is empty"):
            open_source(tmp_path / form)
        pq.write_table(pa.table({"index": range(20)}), tmp_path / form / METADATA)
    names["rec"] = ("0000000", "0000001", "0000002", "0000003")
    for form, people in names.items():
        faces = FaceSet(open_source(tmp_path / form))
        assert tuple(faces.identities) == people, form
        assert torch.equal(faces.labels, labels), form
        assert all(np.array_equal(np.asarray(faces.read(i)), each) for i, each in enumerate(expected)), form
        assert faces.check(tmp_path) == {}
        assert faces.key == FaceSet(open_source(tmp_path / form)).key


def unusable(root: Path) -> None:
    content = (root / "carla" / "0002.png").read_bytes()
    (root / "carla" / "0002.png").write_bytes(content[:2000])
    PIL.Image.new("RGB", (112, 90)).save(root / "dora" / "0001.png")


def test_what_cannot_be_evaluated_is_named_first(workspace, encoder, perceptual, tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("long work")

    judge = FaceEncoder("judge", str(workspace / "packs"), det_size=160)
    monkeypatch.setattr(FaceEncoder, "__call__", refuse)
    monkeypatch.setattr(type(perceptual), "forward", refuse)
    write_set(tmp_path / "one", people=["anna"])
    write_set(tmp_path / "single", images=1)
    write_set(tmp_path / "strangers", people=["e", "f"])
    write_set(tmp_path / "damaged")
    unusable(tmp_path / "damaged")
    shutil.copytree(workspace / "set", tmp_path / "generated" / "images")
    settings = {"identities": bank_hash(IdentityBank(torch.eye(4, 16), "toy", PEOPLE)), "number_of_identities": 4}
    (tmp_path / "generated" / "generation.json").write_text(json.dumps({"settings": settings}))
    pq.write_table(pa.table({"index": range(20)}), tmp_path / "generated" / METADATA)
    wrong = IdentityBank(-torch.eye(4, 16), "toy", PEOPLE)
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "report.json").write_text('{"faces": 3}')
    directions = torch.eye(6, 16)
    foreign, few = IdentityBank(directions, "elastic", list("abcdef")), IdentityBank(directions, "toy")
    real = workspace / "real"
    cases = [
        ("one", {}, "has 1 identity"),
        ("single", {}, "a single image of each identity"),
        ("nowhere", {}, "nowhere has no photographs"),
        ("damaged", {}, "2 of 20 pictures in .*damaged cannot be used, such as carla/0002.png: unreadable"),
        ("set", {"real": tmp_path / "damaged"}, "2 of 20 pictures in .*damaged cannot"),
        ("set", {"against": foreign}, "a bank comes from encoder `elastic`, this evaluation .by `toy`. from .* `toy`"),
        ("set", {"against": IdentityBank(directions, "toy", ["a"] * 6)}, "`against` has a single identity"),
        ("set", {"identities": foreign, "judge": judge}, "by `toy`, `judge`"),
        ("set", {"identities": few}, "lacks 4 of the data set's, such as `<img"),
        ("generated", {"identities": wrong}, "generation.json says that the faces follow another bank"),
        ("set", {"judge": encoder}, "both are `toy`"),
        ("set", {"same_people": True}, "about real faces"),
        ("set", {"same_people": True, "real": tmp_path / "strangers"}, "no identity has more than 3 images under"),
        ("set", {"real": real, "neighbors": 20}, "sets of 20 images are too small for 20 neighbors"),
        ("set", {"real": real, "max_images": 3}, "sets of 3 images"),
        ("set", {"identities": IdentityBank(directions, "toy", [*PEOPLE, "x", "x"])}, "several embeddings of `x`"),
        ("set", {"max_pairs": 0}, "`max_pairs` has to be positive"),
        ("set", {"features": "vgg"}, "`features` has to be"),
        ("set", {"output": tmp_path / "prepared"}, "no report of `uiface evaluate`"),
    ]
    for dataset, options, message in cases:
        dataset = workspace / dataset if dataset == "set" else tmp_path / dataset
        options = {"output": tmp_path / "output", "perceptual": perceptual, **options}
        with pytest.raises(ValueError, match=message):
            evaluate_dataset(dataset, encoder=encoder, **options)
    assert not (tmp_path / "output" / "report.json").exists()
    with pytest.raises(AssertionError, match="long work"):  # its own, within a larger one
        own = IdentityBank(torch.eye(6, 16), "toy", [*PEOPLE, "x", "y"])
        evaluate_dataset(tmp_path / "generated", tmp_path / "output", encoder, identities=own, perceptual=perceptual)
    monkeypatch.setattr(FaceEncoder, "__call__", lambda self, faces: np.ones((len(faces), 16), np.float32))
    with pytest.raises(ValueError, match="a bank of 8 dimensions is not of `toy`, which gives 16"):
        options = {"against": IdentityBank(torch.eye(8)), "perceptual": perceptual}
        evaluate_dataset(workspace / "set", tmp_path / "output", encoder, **options)


def test_a_face_of_which_a_network_makes_nothing_is_named(workspace, encoder, perceptual, tmp_path):
    write_toy_pack(tmp_path / "packs", "blind", needs_blue=True)
    write_set(tmp_path / "set")
    picture = np.array(PIL.Image.open(tmp_path / "set" / "dora" / "0001.png"))
    picture[..., 2] = 0
    PIL.Image.fromarray(picture).save(tmp_path / "set" / "dora" / "0001.png")
    blind = FaceEncoder("blind", str(tmp_path / "packs"), det_size=160)
    with pytest.raises(ValueError, match="`blind` gives no embedding of dora/0001.png"):
        evaluate_dataset(tmp_path / "set", tmp_path / "output", blind, perceptual=perceptual)

    class Overflowing(torch.nn.Module):
        name = "overflowing"

        def forward(self, pixels):
            return pixels.mean(dim=(2, 3)) / (pixels[:, 2:].amax(dim=(2, 3)) + 1)

    options = {"real": workspace / "real", "features": Overflowing(), "perceptual": perceptual, "neighbors": 2}
    with pytest.raises(ValueError, match=r"features of dora/0001.png by overflowing are not finite"):
        evaluate_dataset(tmp_path / "set", tmp_path / "output", encoder, **options)


def test_unusable_pictures_can_be_left_out(workspace, arguments, tmp_path, capsys):
    write_set(tmp_path / "set")
    unusable(tmp_path / "set")
    (tmp_path / "set" / ".DS_Store").touch()
    arguments = ["evaluate", str(tmp_path / "set"), *arguments[2:], "--output", str(tmp_path / "output")]
    with pytest.raises(SystemExit, match=r"uiface evaluate: 2 of 20 pictures.*--skip-unusable"):
        cli.main(arguments)
    cli.main([*arguments, "--skip-unusable", "--features", "encoder", "--real", str(workspace / "real")])
    assert "18 images of 4 identities, 4 to 5 of each; 2 pictures were left out" in capsys.readouterr().out
    report = load_report(tmp_path / "output")
    reasons = {"carla/0002.png": "unreadable", "dora/0001.png": "not aligned: 112x90 is not square"}
    assert report["left_out"] == reasons
    assert {each["conditions"].get("features") for each in report["figures"]} == {None, "toy"}
    assert report["notes"][0] == f"Left out of {tmp_path / 'set'}: 1 hidden or system file: .DS_Store."
    assert len(report["notes"]) == 3 and "--same-people" in report["notes"][2]
    with pytest.raises(SystemExit, match="has the report of .*choose another folder"):
        cli.main(["evaluate", str(workspace / "set"), *arguments[2:]])


def test_comparison(evaluated, workspace, tmp_path, capsys):
    """Equal conditions in one row, different ones in two and with a note."""
    other = load_report(evaluated)
    other["dataset"]["name"] = "other <set>"
    for each in other["figures"]:
        each["value"] = 0.5
        if "k" in each["conditions"]:
            each["conditions"]["k"] = 5
    other["figures"] = [each for each in other["figures"] if each["conditions"].get("recognizer") != "judge"]
    (tmp_path / "other.json").write_text(json.dumps(other))
    cli.main(["compare", str(evaluated), str(tmp_path / "other.json"), "--output", str(tmp_path / "comparison")])
    printed = capsys.readouterr().out
    head = next(line for line in printed.splitlines() if line.startswith("figure"))
    assert head.split()[1:] == ["set", "other", "<set>"]

    def rows(label: str) -> list[tuple[tuple[str, str], str]]:
        """Values and conditions of a figure's rows."""
        lines = [re.match(r"(.*) (\[\d+\])  +(.*?)  +(.*)", line) for line in printed.splitlines()]
        notes = dict(line.split(" ", 1) for line in printed.splitlines() if re.match(r"\[\d+\] ", line))
        return [(line.groups()[2:], notes[line[2]]) for line in lines if line and line[1] == label]

    recall = rows("Improved recall")
    assert len(recall) == 2 and "k 2, " in recall[0][1] and "k 5, " in recall[1][1]
    assert recall[0][0][1] == "-" and recall[1][0][1] == "50.00 %"
    errors = rows("Equal error rate")
    weights = [FaceEncoder(name, str(workspace / "packs"), det_size=160).fingerprint for name in ("toy", "judge")]
    assert [conditions for _, conditions in errors] == [
        f"recognizer toy, weights {weights[0]}",
        f"recognizer judge, weights {weights[1]}",
    ]
    assert [values[1] for values, _ in errors] == ["50.00 %", "-"]
    ((values, _),) = rows("Intra-class LPIPS")
    assert values[1] == "0.5000"
    notes = [line for line in printed.splitlines() if line.startswith("Measured with different conditions")]
    assert len(notes) == 2 and "Intra-class LPIPS" not in "".join(notes)
    assert any("Equal error rate, FMR100," in note and "recognizer: toy | judge" in note for note in notes)
    assert any("Improved recall" in note and note.endswith("(k: 2 | 5).") for note in notes)
    # the questions are lines of their own, in their order
    assert [line for line in printed.splitlines() if line in QUESTIONS] == QUESTIONS
    page = Page((tmp_path / "comparison" / "comparison.html").read_text())
    assert "other <set>" in page.text and "recognizer judge" in page.text
    content = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert content["sets"] == ["set", "other <set>"] and len(content["rows"][0]) == 2
    assert compare_reports([load_report(evaluated)] * 2).sets == ["set [1]", "set [2]"]


class Brightness(Measure):
    """A measure that the package does not have."""

    needs = ("against",)
    figures = {"brightness": Description("Mean brightness", "%", "Of all pixels.")}

    def check(self):
        if self.settings.seed == 13:
            raise ValueError("no brightness on Fridays")

    def measure(self):
        pixels = self.inputs.faces.pixels(range(len(self.inputs.faces)))
        self.add({"brightness": (pixels.mean().item() + 1) / 2}, {"pixels": pixels.numel()}, "By hand.", network="eye")
        self.pictures.append(("A gray picture", PIL.Image.new("L", (3, 2), 128)))
        self.notes.append("It was bright.")


def test_a_measure_is_one_class(workspace, encoder, perceptual, tmp_path, monkeypatch):
    """Registered, it is in the report, the page and comparisons, also of those who do not know it."""
    with monkeypatch.context() as patch:
        patch.setattr(registry, "MEASURES", registry.MEASURES[3:4])
        registry.MEASURES.insert(0, Brightness)
        given = {"against": IdentityBank.load(workspace / "known.safetensors"), "perceptual": perceptual}
        report = evaluate_dataset(workspace / "set", tmp_path / "with", encoder, **given)
        with pytest.raises(ValueError, match="no brightness"):
            evaluate_dataset(workspace / "set", tmp_path / "other", encoder, **given, seed=13)
        without = evaluate_dataset(workspace / "set", tmp_path / "without", encoder, perceptual=perceptual)
    assert [each["name"] for each in report["figures"]] == ["brightness/eye", "intra_class_lpips"]
    assert [each["name"] for each in without["figures"]] == ["intra_class_lpips"] and not without["notes"]
    faces = [np.asarray(face(person, index)) for person in range(len(PEOPLE)) for index in range(IMAGES)]
    figure = report["figures"][0]
    assert figure["value"] == pytest.approx(np.mean(faces) / 255, abs=1e-6)
    assert (figure["label"], figure["detail"], report["notes"]) == (
        "Mean brightness by eye",
        "By hand.",
        ["It was bright."],
    )
    page = Page((tmp_path / "with" / "report.html").read_text())
    assert "A gray picture" in page.text and "Of all pixels. By hand." in page.text
    lines = compare_reports([load_report(tmp_path / "with"), without]).lines()
    row = next(line for line in lines if line.startswith("Mean brightness by eye"))
    assert row.split()[-3:] == [f"{100 * figure['value']:.2f}", "%", "-"]


def test_reports_that_cannot_be_compared(evaluated, tmp_path):
    with pytest.raises(SystemExit, match="report.json is missing"):
        cli.main(["compare", str(evaluated), str(tmp_path)])
    for content in ("{", "[]", '{"faces": 3}', '{"figures": [{"name": "x", "value": 1, "conditions": {}}]}'):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(SystemExit, match="is no report of `uiface evaluate`"):
            cli.main(["compare", str(evaluated), str(tmp_path)])
    with pytest.raises(SystemExit, match="two reports or more, not 1"):
        cli.main(["compare", str(evaluated)])
