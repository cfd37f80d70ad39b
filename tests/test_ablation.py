import io
import json
import pickle
import statistics
import sys

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import REPOSITORY, draw_person, write_study_inputs
from toy_faces import write_benchmark

from uiface_diffusers import IdentityBank, UIFacePipeline
from uiface_diffusers.data import prepare_faces
from uiface_diffusers.evaluation import load_recognizer, verify_benchmarks
from uiface_diffusers.evaluation.people import People
from uiface_diffusers.faces import FaceEncoder

sys.path.insert(0, str(REPOSITORY / "training" / "studies"))
import ablation  # noqa: E402

PEOPLE, IMAGES = 7, 5


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
    write_benchmark(root / "bins" / "toy.bin")
    recipe = {"recognizer": {"layers": 18, "width": 4, "embedding_dim": 16}, "epochs": 2, "train_batch_size": 4}
    recipe |= {"validation_steps": 0, "report_to": "none"}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


@pytest.fixture(scope="module")
def options(root, backbone):
    paths = {"pipeline": "model", "identities": "bank.safetensors", "real": "people", "benchmarks": "bins"}
    paths |= {"encoder_root": "packs", "work": "work", "recipe": "recipe.yaml"}
    argv = [word for name, path in paths.items() for word in (f"--{name}", str(root / path))]
    argv += ["--encoder", "toy", "--judge", "judge", "--lpips-backbone", str(backbone), "--same-person", "0.99999"]
    argv += ["--num-identities", "4", "--groups", "2", "--images-per-identity", "4", "--num-inference-steps", "3"]
    return [*argv, "--seeds", "5"]


@pytest.fixture(scope="module")
def work(options, root):
    """The folder of the study, with the faces of all arms."""
    ablation.main([*options, "--pieces", "generate"])
    return root / "work"


def test_arms_differ_in_what_they_say_only(work):
    begun = {}
    for arm in set(ablation.ARMS) - {"real"}:
        files = [work / arm / f"group-{number}" / "generation.json" for number in range(2)]
        begun[arm], other = (json.loads(file.read_text())["settings"] for file in files)
        assert begun[arm]["sampling"] == other["sampling"] and begun[arm]["identities"] != other["identities"]
    plain = begun["uiface"]
    boundaries = ablation.boundaries_of(work / "adaptive" / f"group-{number}" for number in range(2))
    changed = {
        "uiface": {},
        "single": {"boundary": None},
        "single_guidance_2": {"boundary": None, "guidance_scale": 2.0},
        "adaptive": {"injection": None},
        "early": {"injection": None, "boundary": 840},
        "fixed": {"injection": None, "boundary": statistics.median_low(boundaries)},
        "adaptive_self": {"injection": "self"},
        "uiface_idperturb": {},
        "uiface_guided": {"guide_from_boundary": True},
        # of 50 steps, in 3
        "uiface_paper": {"guidance_scale": 2.0, "latest_boundary": 500, "boundary_threshold": pytest.approx(0.1)},
    }
    assert changed.keys() == begun.keys() and len(boundaries) == 16
    for arm, change in changed.items():
        expected = {**plain, "sampling": {**plain["sampling"], **change}}
        if arm == "uiface_idperturb":
            expected["identity_perturbation"] = [0.6, 1.0]
        assert begun[arm] == expected, arm

    # one row per arm, in a column the same noise: one person of each of two groups, four faces
    with PIL.Image.open(work / "ablation.jpg") as picture:
        drawn = np.asarray(picture.convert("RGB"), dtype=int)
    size = drawn.shape[0] // len(changed)
    assert drawn.shape == (len(changed) * size, 2 * 4 * size, 3)
    row = [arm for arm in ablation.ARMS if arm in changed].index("fixed")
    for column, (group, index) in enumerate((group, index) for group in range(2) for index in range(4)):
        person = min((work / "fixed" / f"group-{group}" / "images").iterdir())
        face = np.asarray(PIL.Image.open(sorted(person.iterdir())[index]), dtype=int)
        cell = drawn[row * size : (row + 1) * size, column * size : (column + 1) * size]
        assert abs(cell - face).mean() < 2  # JPEG; 3 or more to other faces

    # real people: as many, with as many faces each; and faces of others
    names = [path.name for group in (0, 1) for path in (work / "real" / f"group-{group}").iterdir()]
    assert len(set(names)) == 4 and "people-p0" not in names  # has fewer faces
    counts = [len(list((work / "real" / f"group-{group}" / name).iterdir())) for group in (0, 1) for name in names
              if (work / "real" / f"group-{group}" / name).exists()]  # fmt: skip
    assert counts == [4] * 4
    others = [path.parent.name for path in (work / "references").glob("*/*.png")]
    assert len(others) == 8 and not set(others) & set(names)


def test_figures_and_accuracies_are_collected(options, root, work, capsys, tmp_path):
    ablation.main([*options, "--arms", "single", "fixed", "real", "--pieces", "generate", "evaluate"])
    ablation.main([*options, "--arms", "fixed", "--pieces", "generate", "train"])
    arms = json.loads((work / "ablation.json").read_text())["arms"]
    result = verify_benchmarks(load_recognizer(work / "fixed" / "recognizer-5"), root / "bins")["toy"]
    assert arms["fixed"]["accuracy"] == {"recognizer-5": pytest.approx(result.accuracy)}
    learned = json.loads((work / "fixed" / "recognizer-5" / "train_results.json").read_text())["accuracy"]
    assert arms["fixed"]["learned"] == {"recognizer-5": learned}
    assert "accuracy" not in arms["single"]
    for group in range(2):
        report = json.loads((work / "single" / f"evaluation-group-{group}" / "report.json").read_text())
        figures = {(f["name"], f["conditions"].get("recognizer")): f["value"] for f in report["figures"]}
        assert figures["genuine_mean", "judge"] != figures["genuine_mean", "toy"]
        expected = {
            "LPIPS": figures["intra_class_lpips", None],
            "precision": figures["precision", None],
            "recall": figures["recall", None],
            "consistency": figures["consistency_others", "judge"],
            "EER": figures["eer", "judge"],
            "context": figures["context_cosine", "toy"],
            "capped": 0,
            "boundary": UIFacePipeline.from_pretrained(root / "model").scheduler.config.num_train_timesteps * 2 // 3,
        }
        found = {title: values[f"group-{group}"] for title, values in arms["single"].items()}
        assert found == pytest.approx(expected)
    assert "recall" in arms["real"] and "context" not in arms["real"]
    printed = capsys.readouterr().out
    assert "fixed - single" in printed and f"{result.accuracy:.4f}" in printed

    # the table is enough: with the faces gone, what is finished is not made again
    again = ["--work", str(tmp_path / "work"), "--results", str(work / "ablation.json"), "--arms", "fixed"]
    ablation.main([*options, *again])
    assert capsys.readouterr().out.endswith(printed[printed.rindex("\narm ") + 1 :])
    assert not (tmp_path / "work" / "fixed").exists() and not (tmp_path / "work" / "adaptive").exists()
    with pytest.raises(ValueError, match="other settings .images_per_identity: "):
        ablation.main([*options, *again, "--work", str(tmp_path / "new"), "--images-per-identity", "3"])


def test_people_of_the_benchmarks_are_left_out(options, root, capsys, tmp_path):
    """A person whose face is in the benchmark is neither in the arm nor among the references."""
    (tmp_path / "bins").mkdir()
    write_benchmark(tmp_path / "bins" / "toy.bin")
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
    with pytest.raises(ValueError, match="have 0 people with 4 faces or more who are not in the benchmarks"):
        ablation.main([*argv, "--work", str(tmp_path / "none"), "--arms", "single", "--same-person", "-1"])
    assert not (tmp_path / "none" / "single").exists()


def test_the_table_compares_group_by_group(capsys):
    table = {
        "single": {"LPIPS": {"a": 0.1, "b": 0.3}, "accuracy": {"0": 0.6, "1": 0.7, "2": 0.8}},
        "adaptive": {"LPIPS": {"a": 0.2, "b": 0.4}, "capped": {"a": 1.0, "b": 0.97}},
        "uiface": {"LPIPS": {"a": 0.2, "b": 0.5}, "accuracy": {"1": 0.75, "2": 0.85, "3": 0.1}},
        "single_guidance_2": {"LPIPS": {"a": 0.0, "b": 0.3}},
    }
    ablation.print_table(table)
    lines = {line[:36].strip(): line[36:] for line in capsys.readouterr().out.splitlines()}
    cells = [lines["uiface - single"][start : start + 22].strip() for start in range(0, 220, 22)]
    assert cells[2] == "0.1500 +- 0.0707" and cells[-1] == "0.0500 +- 0.0000"
    assert lines["uiface - single_guidance_2"].split() == ["-"] * 2 + "0.2000 +- 0.0000".split() + ["-"] * 7
    assert "single_guidance_2 - single" in lines
    assert any(line.startswith("Nearly no boundary") for line in lines) and "0.2000 +- 0.1414" in lines["single"]


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
