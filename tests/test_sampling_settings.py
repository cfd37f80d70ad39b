import itertools
import json
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import REPOSITORY, write_study_inputs

from uiface_diffusers import UIFacePipeline
from uiface_diffusers.data import FaceCache
from uiface_diffusers.evaluation import equal_error_rate, load_lpips
from uiface_diffusers.evaluation.face_set import face_pixels
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.seeds import image_generator

sys.path.insert(0, str(REPOSITORY / "training" / "studies"))
import sampling_settings  # noqa: E402


@pytest.fixture(scope="module")
def options(tmp_path_factory, toy_photographs, backbone):
    root = tmp_path_factory.mktemp("settings")
    write_study_inputs(root, toy_photographs)
    argv = ["--pipeline", str(root / "model"), "--people", str(root / "cache"), "--encoder-root", str(root / "packs")]
    argv += ["--judge", "judge", "--lpips-backbone", str(backbone), "--num-people", "2", "--images-per-person", "3"]
    return [*argv, "--batch-size", "4", "--output", str(root / "out")]


def by_hand(options) -> dict[str, float]:
    """The judge's and LPIPS' figures of `exact`, face by face."""
    args = sampling_settings.parse_args(["settings.yaml", *options])
    pipe, cache = UIFacePipeline.from_pretrained(args.pipeline), FaceCache(args.people)
    judge, perceptual = FaceEncoder("judge", args.encoder_root), load_lpips("alex", args.lpips_backbone)
    bank = cache.embeddings()
    first = [bank.names.index(name) for name in sorted(set(bank.names))]
    people = [first[i * len(first) // args.num_people] for i in range(args.num_people)]
    faces, photographs = [], [PIL.Image.fromarray(face) for face in cache.images(people)]
    for person in people:
        generators = [image_generator(0, f"cache/{bank.names[person]}", n) for n in range(args.images_per_person)]
        out = pipe(bank.take([person]), len(generators), 4, boundary=500, generator=generators)
        faces.append(out.images)
    known, made = judge.embed_pictures(photographs), [judge.embed_pictures(of_person) for of_person in faces]
    pairs = list(itertools.combinations(range(args.images_per_person), 2))
    genuine = [float(each[i] @ each[j]) for each in made for i, j in pairs]
    pixels = [face_pixels([np.asarray(face) for face in of_person]) for of_person in faces]
    distances = [float(perceptual(each[i : i + 1], each[j : j + 1])) for each in pixels for i, j in pairs]
    return {
        "judge": np.mean([(made[i] @ known[i]).mean() for i in range(2)]),
        "others": np.mean([(made[i] @ known[1 - i]).mean() for i in range(2)]),
        "EER": equal_error_rate(np.array(genuine), (made[0] @ made[1].T).flatten().numpy()),
        "LPIPS": np.mean(distances),
    }


def test_settings_are_measured_once_beside_the_first(options, tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    first = "exact: {num_inference_steps: 4, boundary: 500}\nagain: {num_inference_steps: 4, boundary: 500}\n"
    file.write_text(first)
    sampling_settings.main([str(file), *options])
    output = sampling_settings.parse_args([str(file), *options]).output
    measured = json.loads((output / "settings.json").read_text())
    exact = measured["exact"]["figures"]
    # of the steps at 750, 500, 250, 0 three are at or below the boundary, with two rows each
    assert exact["rows"] == 7
    assert (exact["boundary"], exact["capped"]) == (500, 1)
    assert exact == pytest.approx(exact | by_hand(options))
    same = {name: value for name, value in exact.items() if name != "seconds"}
    assert same == {name: value for name, value in measured["again"]["figures"].items() if name != "seconds"}

    torch.manual_seed(0)
    file.write_text(first + "dpm: {num_inference_steps: 3, scheduler: DPMSolverMultistepScheduler, boundary: null}\n")
    sampling_settings.main([str(file), *options])
    later = json.loads((output / "settings.json").read_text())
    assert later["exact"] == measured["exact"]  # with its seconds: not measured again
    assert later["dpm"]["figures"]["rows"] == 6
    table = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split()[0] for line in table] == ["setting", "exact", "again", "dpm"]
    assert "(+0.0 %)" in table[1]


def test_a_folder_of_another_study_is_refused(options, tmp_path):
    file, output = tmp_path / "settings.yaml", ["--output", str(tmp_path / "out")]
    file.write_text("exact: {num_inference_steps: 2}\n")
    sampling_settings.main([str(file), *options, *output])
    with pytest.raises(ValueError, match="num_people"):
        sampling_settings.main([str(file), *options, *output, "--num-people", "1"])


def test_too_few_people_or_faces_are_named(options, tmp_path):
    file, output = tmp_path / "settings.yaml", ["--output", str(tmp_path / "out")]
    file.write_text("exact:\n")
    with pytest.raises(ValueError, match="90 identities are asked for, .*cache has 4"):
        sampling_settings.main([str(file), *options, *output, "--num-people", "90"])
    output = ["--output", str(tmp_path / "other")]
    with pytest.raises(ValueError, match="faces: 400 are needed"):
        sampling_settings.main([str(file), *options, *output, "--images-per-person", "200"])
