import json
import sys

import pytest
import torch
from conftest import REPOSITORY, write_study_inputs

sys.path.insert(0, str(REPOSITORY / "training" / "studies"))
import sampling_settings  # noqa: E402


@pytest.fixture(scope="module")
def options(tmp_path_factory, toy_photographs, backbone):
    root = tmp_path_factory.mktemp("settings")
    write_study_inputs(root, toy_photographs)
    argv = ["--pipeline", str(root / "model"), "--people", str(root / "cache"), "--encoder_root", str(root / "packs")]
    argv += ["--judge", "judge", "--lpips_backbone", str(backbone), "--num_people", "2", "--images_per_person", "3"]
    return [*argv, "--batch_size", "4", "--output", str(root / "out")]


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
        sampling_settings.main([str(file), *options, *output, "--num_people", "1"])


def test_too_few_people_or_faces_are_named(options, tmp_path):
    file, output = tmp_path / "settings.yaml", ["--output", str(tmp_path / "out")]
    file.write_text("exact:\n")
    with pytest.raises(ValueError, match="90 identities are asked for, .*cache has 4"):
        sampling_settings.main([str(file), *options, *output, "--num_people", "90"])
    output = ["--output", str(tmp_path / "other")]
    with pytest.raises(ValueError, match="faces: 400 are needed"):
        sampling_settings.main([str(file), *options, *output, "--images_per_person", "200"])
