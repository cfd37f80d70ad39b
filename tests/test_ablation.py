import io
import json
import pickle
import shutil
import statistics
import sys
from collections import Counter

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import REPOSITORY, draw_person, write_study_inputs
from killed import run_until_complete
from toy_faces import write_benchmark

from uiface_diffusers import IdentityBank, UIFacePipeline
from uiface_diffusers.data import prepare_faces
from uiface_diffusers.evaluation import load_recognizer, verify_benchmarks
from uiface_diffusers.evaluation.paired import pack_answers, unpack_answers
from uiface_diffusers.evaluation.people import People
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.fingerprint import model_fingerprint
from uiface_diffusers.loading import load_identity_flow
from uiface_diffusers.models import IdentityFlow

sys.path.insert(0, str(REPOSITORY / "training" / "studies"))
import ablation  # noqa: E402
import real_faces  # noqa: E402
import study_results  # noqa: E402

PEOPLE, IMAGES = 7, 5
# benchmark -> its pairs
TESTS = {"other": 10, "toy": 20}


@pytest.fixture(scope="module")
def root(tmp_path_factory, toy_photographs):
    """A pipeline, a bank, real faces (of one person in the benchmark, too) and a benchmark, all tiny."""
    root = tmp_path_factory.mktemp("ablation")
    write_study_inputs(root, toy_photographs)
    model = UIFacePipeline.from_pretrained(root / "model")
    UIFacePipeline(**model.components, guidance_scale=3.0).save_pretrained(root / "model")
    for person in range(PEOPLE):
        (root / "photographs" / f"p{person}").mkdir(parents=True)
        for index in range(IMAGES if person else IMAGES - 2):
            color = tuple(int(value) for value in np.random.default_rng(person).integers(0, 255, 3))
            draw_person(color, ((76 + index, 80, 44),)).save(root / "photographs" / f"p{person}" / f"{index}.png")
    encoder = FaceEncoder("toy", str(root / "packs"), det_size=160)
    prepare_faces(root / "photographs", root / "people", encoder, image_size=128)
    embeddings = F.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
    IdentityBank(embeddings, "toy").save(root / "bank.safetensors")
    (root / "bins").mkdir()
    for name, pairs in TESTS.items():
        write_benchmark(root / "bins" / f"{name}.bin", pairs)
        lines = [f"p{i % 5}/{i}.png p{i % 5 + i % 2}/{i + 100}.png {1 - i % 2}" for i in range(pairs)]
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    recipe = {"recognizer": {"layers": 18, "width": 4, "embedding_dim": 16}, "epochs": 1, "train_batch_size": 4}
    recipe |= {"validation_steps": 0, "report_to": "none"}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    exact, fast = {"num_inference_steps": 3}, {"num_inference_steps": 3, "reuse_empty_branch": 2}
    settings = {"exact": exact, "exact-single": exact | {"boundary": None}}
    settings |= {"fast": fast, "fast-single": fast | {"boundary": None}}
    (root / "settings.yaml").write_text(yaml.safe_dump(settings))
    IdentityFlow(16, width=8, num_blocks=1, identity_encoder="toy").save_pretrained(root / "flow")
    (root / "more.yaml").write_text("late: {boundary: 0, guidance_scale: 1.5}\n")
    return root


@pytest.fixture(scope="module")
def options(root, backbone):
    paths = {"pipeline": "model", "identities": "bank.safetensors", "real": "people", "benchmarks": "bins"}
    paths |= {"encoder_root": "packs", "work": "work", "recipe": "recipe.yaml", "settings": "settings.yaml"}
    argv = [word for name, path in paths.items() for word in (f"--{name}", str(root / path))]
    argv += ["--encoder", "toy", "--judge", "judge", "--lpips-backbone", str(backbone), "--same-person", "0.99999"]
    argv += ["--faces", "16", "--groups", "2", "--images-per-identity", "4", "--seeds", "5"]
    return [*argv, "--pairs", *(f"{name}={root / name}.txt" for name in TESTS)]


@pytest.fixture(scope="module")
def work(options, root):
    """The folder of the study, with the faces of all arms."""
    given = ["--more-arms", str(root / "more.yaml"), "--identity-flow", str(root / "flow")]
    ablation.main([*options, *given, "--pieces", "generate"])
    return root / "work"


def test_arms_differ_in_what_they_say_only(root, work):
    begun = {}
    for arm in (*ablation.ARMS, *ablation.FLOWS, "late"):
        files = [work / "16" / arm / f"group-{number}" / "generation.json" for number in range(2)]
        begun[arm], other = (json.loads(file.read_text())["settings"] for file in files)
        assert begun[arm]["sampling"] == other["sampling"] and begun[arm]["identities"] != other["identities"]
    plain = begun["uiface"]
    assert plain["sampling"]["num_inference_steps"] == 3
    boundaries = study_results.boundaries_of(work / "16" / "adaptive" / f"group-{number}" for number in range(2))
    assert len(boundaries) == 16
    steps = sorted(set(boundaries))
    changed = {
        "single_guidance_1": {"boundary": None, "guidance_scale": 1.0},
        "single_guidance_2": {"boundary": None, "guidance_scale": 2.0},
        "single": {"boundary": None},
        "fixed_mean": {"injection": None, "boundary": min(steps, key=lambda t: abs(t - statistics.mean(boundaries)))},
        "fixed_median": {"injection": None, "boundary": statistics.median_low(boundaries)},
        "adaptive": {"injection": None},
        "adaptive_self": {"injection": "self"},
        "adaptive_cross": {"injection": "cross"},
        "uiface": {},
        "single_idperturb": {"boundary": None},
        "uiface_idperturb": {},
        "single_flow": {"boundary": None},
        "uiface_flow": {},
        "late": {"boundary": 0, "guidance_scale": 1.5},
    }
    assert changed.keys() == begun.keys()
    for arm, change in changed.items():
        expected = {**plain, "sampling": {**plain["sampling"], **change}}
        if "idperturb" in arm:
            expected["identity_perturbation"] = [0.6, 1.0]
        if "flow" in arm:
            expected["identity_flow"] = model_fingerprint(load_identity_flow(root / "flow"))
        assert begun[arm] == expected, arm

    # one row per arm, in a column the same noise: one person of each of two groups, four faces
    with PIL.Image.open(work / "results_16.jpg") as picture:
        drawn = np.asarray(picture.convert("RGB"), dtype=int)
    size = drawn.shape[0] // len(changed)
    assert drawn.shape == (len(changed) * size, 2 * 4 * size, 3)
    row = list(begun).index("fixed_mean")
    for column, (group, index) in enumerate((group, index) for group in range(2) for index in range(4)):
        person = min((work / "16" / "fixed_mean" / f"group-{group}" / "images").iterdir())
        face = np.asarray(PIL.Image.open(sorted(person.iterdir())[index]), dtype=int)
        cell = drawn[row * size : (row + 1) * size, column * size : (column + 1) * size]
        assert abs(cell - face).mean() < 2  # JPEG; 3 or more to other faces

    # real people: as many, with as many faces each; and faces of others
    folders = [work / "16" / "real" / f"group-{group}" for group in (0, 1)]
    names = [path.name for folder in folders for path in folder.iterdir()]
    assert len(set(names)) == 4 and "people-p0" not in names  # has fewer faces
    assert [len(list(person.iterdir())) for folder in folders for person in folder.iterdir()] == [4] * 4
    others = [path.parent.name for path in (work / "16" / "references").glob("*/*.png")]
    assert len(others) == 13 and not set(others) & set(names)


def test_people_with_fewer_faces_make_up_for_the_number():
    counts = Counter({"a": 9, "b": 3, "c": 2, "d": 4, "e": 1})
    assert real_faces.choose_people(counts, 2, 4) == {"a": 4, "d": 4}
    assert real_faces.choose_people(counts, 1, 4) == {"a": 4}
    assert real_faces.choose_people(counts, 3, 4) == {"a": 4, "d": 4, "b": 3, "c": 1}
    with pytest.raises(ValueError, match="^14 real faces, 4 of a person at most, .* 16 are needed"):
        real_faces.choose_people(counts, 4, 4)


def rows_of(page: str) -> dict[str, list[str]]:
    """Rows of the tables in order, by their first cells."""
    rows: dict[str, list[str]] = {}
    for line in page.splitlines():
        if line.startswith("| "):
            first, *cells = line.strip("| ").split(" | ")
            rows.setdefault(first, []).append(cells)
    return rows


def test_figures_and_accuracies_are_collected(options, root, work, capsys, tmp_path):
    chosen = ["--arms", "single", "fixed_mean", "real", "real_and_single"]
    ablation.main([*options, *chosen, "--pieces", "generate", "evaluate"])
    ablation.main([*options, "--arms", "fixed_mean", "real_and_single", "--pieces", "generate", "train"])
    saved = json.loads((work / "results.json").read_text())
    arms = saved["sizes"]["16"]
    assert "late" in saved["arms"]  # this command has not given it
    recognizer = work / "16" / "fixed_mean" / "recognizer-5"
    results = verify_benchmarks(load_recognizer(recognizer), root / "bins")
    found = arms["fixed_mean"]["recognizers"]["5"]
    assert found["accuracy"] == pytest.approx({name: results[name].accuracy for name in TESTS})
    for name, pairs in TESTS.items():
        answers = unpack_answers(found["answers"][name], pairs)
        assert answers.tolist() == results[name].right.tolist()
        assert answers.mean() == pytest.approx(results[name].accuracy)
    assert found["learned"] == json.loads((recognizer / "train_results.json").read_text())["accuracy"]
    assert "recognizers" not in arms["single"]
    # 32 faces of both arms, one epoch in batches of four
    trained = json.loads((work / "16" / "real_and_single" / "recognizer-5" / "train_results.json").read_text())
    assert trained["step"] == 8 and arms["real_and_single"].keys() == {"recognizers"}
    for group in range(2):
        report = json.loads((work / "16" / "single" / f"evaluation-group-{group}" / "report.json").read_text())
        figures = {(f["name"], f["conditions"].get("recognizer")): f["value"] for f in report["figures"]}
        assert figures["genuine_mean", "judge"] != figures["genuine_mean", "toy"]
        expected = {
            "intra_class_lpips": figures["intra_class_lpips", None],
            "recall": figures["recall", None],
            "eer by judge": figures["eer", "judge"],
            "genuine_low by judge": figures["genuine_low", "judge"],
            "context_cosine by toy": figures["context_cosine", "toy"],
            "images": 8,
            "identities": 2,
            "capped": 0,
            "boundary": UIFacePipeline.from_pretrained(root / "model").scheduler.config.num_train_timesteps * 2 // 3,
        }
        found = {figure: values[f"group-{group}"] for figure, values in arms["single"]["figures"].items()}
        assert found == pytest.approx(found | expected)
    assert "recall" in arms["real"]["figures"] and "context_cosine by toy" not in arms["real"]["figures"]
    printed = capsys.readouterr().out
    page = (work / "results.md").read_text()
    assert printed.endswith(page)
    rows = rows_of(page)
    both = [100 * results[name].accuracy for name in TESTS]
    cells = [f"{value:.2f}" for value in (*both, statistics.mean(both))]
    assert rows["fixed_mean"][0][:2] == ["16", "4"] and rows["fixed_mean"][0][4:7] == cells

    # the table is enough: with the faces gone, what is finished is not made again
    again = ["--work", str(tmp_path / "work"), "--results", str(work / "results.md"), "--arms", "fixed_mean"]
    ablation.main([*options, *again])
    assert capsys.readouterr().out.endswith(page)
    made = {path.name for path in (tmp_path / "work" / "16").iterdir()}
    assert made == {"real", "references"}
    with pytest.raises(ValueError, match="other settings .images_per_identity: "):
        changed = ["--images-per-identity", "2", "--faces", "8"]
        ablation.main([*options, *again, "--work", str(tmp_path / "new"), *changed])


def test_people_of_the_benchmarks_are_left_out(options, root, capsys, tmp_path):
    """A person whose face is in the benchmark is neither in the arm nor among the references."""
    shutil.copytree(root / "bins", tmp_path / "bins")
    images, same = pickle.loads((tmp_path / "bins" / "toy.bin").read_bytes())
    people = People([root / "people"])
    buffer = io.BytesIO()
    (face,) = people.pictures([people.bank.names.index("people/p3")])
    face.resize((112, 112), PIL.Image.Resampling.BILINEAR).save(buffer, "png")
    images[7] = buffer.getvalue()
    (tmp_path / "bins" / "toy.bin").write_bytes(pickle.dumps((images, same)))
    argv = [*options, "--benchmarks", str(tmp_path / "bins"), "--work", str(tmp_path / "work"), "--arms", "real"]
    encoder = FaceEncoder("toy", str(root / "packs"), det_size=160)
    # toy faces are much alike: as near as this one is to its own photograph, to nobody else's
    cosines = people.bank.embeddings @ encoder.embed_pictures([face])[0]
    threshold = max(cosines[[name == "people/p3" for name in people.bank.names]]).item()
    assert threshold > max(cosines[[name != "people/p3" for name in people.bank.names]])
    ablation.main([*argv, "--pieces", "generate", "--same-person", str(threshold - 1e-6)])
    assert "1 real people look like one of the benchmarks and are left out: ['people/p3']" in capsys.readouterr().out
    written = {path.parent.name for path in (tmp_path / "work").rglob("*.png")}
    assert len(written) > 4 and "people-p3" not in written
    with pytest.raises(
        ValueError, match="^0 real faces, 4 of a person at most, .* not in the benchmarks, 16 are needed"
    ):
        ablation.main([*argv, "--work", str(tmp_path / "none"), "--arms", "single", "--same-person", "-1"])
    assert not (tmp_path / "none" / "16" / "single").exists()


def test_the_page_compares_arms_and_names_what_predicts(options, root, capsys):
    """Of answers and figures that are given."""
    args = ablation.parse_args([*options, "--seeds", "0", "1", "2"])
    args.tests, args.people = ablation.read_tests(args)
    accuracies = {"single": 0.5, "single_guidance_2": 0.6, "uiface": 0.7, "adaptive": 0.7, "real": 0.9, "late": 0.4}
    arms = {}
    for arm, accuracy in accuracies.items():
        right = {name: np.arange(pairs) % 10 < 10 * accuracy for name, pairs in TESTS.items()}
        of_seed = {"accuracy": {name: float(each.mean()) for name, each in right.items()}}
        of_seed["answers"] = {name: pack_answers(each) for name, each in right.items()}
        figures = {"eer by judge": {"group-0": accuracy, "group-1": accuracy}, "recall": {"group-0": -accuracy}}
        if arm != "real":
            figures["context_cosine by toy"] = {"group-0": accuracy if arm != "late" else 1.0}
        arms[arm] = {"figures": figures | {"images": {"group-0": 8}}, "recognizers": dict.fromkeys("012", of_seed)}
    del arms["single"]["recognizers"]["2"]  # not finished
    settings = {"pipeline": "p", "sampling": {}, "judge": "judge", "groups": 2}
    page = "\n".join(study_results.study_page(args, {"settings": settings, "sizes": {"16": arms}}, {16: "a.jpg"}))
    rows = rows_of(page)
    differences = {first.partition(" (")[0]: cells for first, (cells, *_) in rows.items() if " - " in first}
    best = "the best of two stages, the best of one"
    assert any(first.endswith(f" - single_guidance_2 ({best})") for first in rows)
    # equal answers: no width; others: the value inside its interval
    assert differences["uiface - adaptive"] == ["+0.00 [+0.00, +0.00]"] * 3
    assert "real - single_guidance_2" not in differences and "uiface - single" not in differences
    for cells, value in ((differences["uiface - real"], -20), (differences["late - single_guidance_2"], -20)):
        for cell in cells:
            difference, low, high = (float(word.strip("[],")) for word in cell.split())
            assert difference == value and low < value < high
    assert rows["eer by judge"] == [["+1.00", "5", "+1.00", "4"]]
    assert rows["recall"] == [["-1.00", "5", "-1.00", "4"]]
    # ranks 2, 3.5, 3.5, 1 of the accuracies; 1, 2.5, 2.5, 4 of the cosines
    assert rows["context_cosine by toy"] == [["-0.33", "4", "-0.33", "4"]]
    assert "Not finished: single_guidance_1, single, fixed_mean" in page and "](a.jpg)" in page


def test_fast_settings_are_measured_first(options, root, tmp_path, capsys):
    options = [*options, "--fast", "--work", str(tmp_path / "work"), "--arms", "single", "--pieces", "generate"]
    settings = yaml.safe_load((root / "settings.yaml").read_text())
    ablation.main(options)
    saved = json.loads((tmp_path / "work" / "results.json").read_text())
    assert saved["sampling"].keys() == settings.keys()
    begun = json.loads((tmp_path / "work" / "16" / "single" / "group-0" / "generation.json").read_text())
    assert begun["settings"]["sampling"]["reuse_empty_branch"] == 2
    assert "| fast | " in (tmp_path / "work" / "results.md").read_text()
    # not as good: no arm is begun
    settings["fast"] = {"num_inference_steps": 1}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    work = tmp_path / "other"
    with pytest.raises(ValueError, match="--fast is not as good as exact .*LPIPS of fast: "):
        ablation.main([*options, "--settings", str(tmp_path / "settings.yaml"), "--work", str(work)])
    assert not (work / "16").exists()


def test_killed_and_resumed_is_as_uninterrupted(options, tmp_path):
    options = [*options, "--arms", "single"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ablation.main([*options, "--work", str(whole)])
    for renamed in ("report.json", "answers.json"):
        run_until_complete([*options, "--work", str(killed)], renamed, run=ablation.main)
    ablation.main([*options, "--work", str(killed)])
    for name in ("results.json", "results.md"):
        assert (killed / name).read_text() == (whole / name).read_text()


def test_wrong_lists_and_arms_are_named(options, root, tmp_path, capsys):
    begin = len(options) - len(TESTS)
    with pytest.raises(ValueError, match="has other, toy, --pairs other: give the list of each"):
        ablation.main([*options[:begin], options[begin], "--work", str(tmp_path)])
    wrong = [f"{name}={root / 'toy.txt'}" for name in TESTS]
    with pytest.raises(ValueError, match="toy.txt is not the list of pairs that other was made of"):
        ablation.main([*options[:begin], *wrong, "--work", str(tmp_path)])
    (tmp_path / "more.yaml").write_text("dial: {divertisy: 0.5}\n")
    with pytest.raises(ValueError, match="no argument 'divertisy'"):
        ablation.main([*options, "--more-arms", str(tmp_path / "more.yaml"), "--work", str(tmp_path)])
    for words, complaint in (
        (["--arms", "fixed"], "--arms: fixed is none of single_guidance_1"),
        (["--faces", "18"], "--faces 18 cannot be split into 2 equal groups"),
    ):
        with pytest.raises(SystemExit):
            ablation.parse_args([*options, *words])
        assert complaint in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["more.yaml"]


def test_another_study_in_the_folder_is_refused(options, root, work, tmp_path):
    before = {file: file.stat().st_mtime_ns for file in work.rglob("*") if file.is_file()}
    recipe = tmp_path / "other.yaml"
    recipe.write_text((root / "recipe.yaml").read_text() + "momentum: 0.8\n")
    with pytest.raises(ValueError, match="other settings .recipe: "):
        ablation.main([*options, "--recipe", str(recipe)])
    components = UIFacePipeline.from_pretrained(root / "model").components
    UIFacePipeline(**components, latest_boundary=300).save_pretrained(tmp_path / "changed")
    with pytest.raises(ValueError, match="other settings .defaults: "):
        ablation.main([*options, "--pipeline", str(tmp_path / "changed")])
    assert {file: file.stat().st_mtime_ns for file in work.rglob("*") if file.is_file()} == before
