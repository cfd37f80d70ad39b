import json
import re
import shutil
import statistics

import numpy as np
import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState
from killed import run_until_complete
from toy_faces import SIZE, write_benchmark, write_faces

from uiface_diffusers import cli
from uiface_diffusers.evaluation import load_recognizer, verify_benchmarks
from uiface_diffusers.training.bench import mean_text, name_sets, run_bench

SEEDS = (0, 3)


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch):
    for name, value in {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}.items():
        monkeypatch.setenv(name, value)
    # of a test before this one
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two sets, two benchmarks and a recipe, all tiny."""
    root = tmp_path_factory.mktemp("bench")
    write_faces(root / "few", identities=3, images=6)
    write_faces(root / "many", identities=6, images=4)
    (root / "bins").mkdir()
    for name, pairs in (("lfw", 20), ("calfw", 30)):
        write_benchmark(root / "bins" / f"{name}.bin", pairs)
    recipe = {"recognizer": {"layers": 18, "width": 4, "embedding_dim": 16, "image_size": SIZE, "dropout": 0.1}}
    recipe |= {"epochs": 2, "train-batch-size": 6, "checkpointing-steps": 2, "report-to": "none"}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def command(root, output: str, *options: str) -> list[str]:
    words = ["bench", str(root / "few"), f"large={root / 'many'}", "--recipe", str(root / "recipe.yaml")]
    words += ["--benchmarks", str(root / "bins"), "--seeds", *map(str, SEEDS), "--output", str(root / output)]
    return [*words, *options]


@pytest.fixture(scope="module")
def whole(root):
    """The table of an uninterrupted bench."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        cli.main(command(root, "whole"))
    return json.loads((root / "whole" / "bench.json").read_text())


def test_the_table_is_of_the_recognizers_in_the_folder(root, whole):
    assert list(whole["sets"]) == ["few", "large"] and whole["seeds"] == list(SEEDS)
    sizes = {name: (row["images"], row["identities"]) for name, row in whole["sets"].items()}
    assert sizes == {"few": (18, 3), "large": (24, 6)}
    text = (root / "whole" / "bench.md").read_text()
    for name, row in whole["sets"].items():
        assert list(row["accuracy"]) == list(row["learned"]) == ["0", "3"]
        for seed, accuracies in row["accuracy"].items():
            folder = root / "whole" / name / f"seed-{seed}"
            expected = {k: v.accuracy for k, v in verify_benchmarks(load_recognizer(folder), root / "bins").items()}
            expected["mean"] = np.mean(list(expected.values()))
            assert accuracies == pytest.approx(expected, abs=1e-9)
            assert row["learned"][seed] == json.loads((folder / "train_results.json").read_text())["accuracy"]
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} | {row['images']} of "))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for cell, benchmark in zip(cells[3:6], ("calfw", "lfw", "mean"), strict=True):
            values = [100 * row["accuracy"][seed][benchmark] for seed in ("0", "3")]
            assert cell == f"{np.mean(values):.2f} +- {np.std(values, ddof=1):.2f}"
    # the same as of the script: a recipe's options, the seed, one set
    options = whole["options"]
    assert (options["epochs"], options["train_batch_size"], options["erasing_probability"]) == (2, 6, 0.0)


def test_killed_twice_and_resumed_gives_the_same_table(root, whole):
    """Within the first training, and after the second was measured."""
    arguments = command(root, "killed")
    run_until_complete(arguments, "checkpoint-2")
    assert not list((root / "killed").glob("*/*/verification.json"))
    run_until_complete(arguments, "verification.json", 2)
    assert len(list((root / "killed").glob("*/*/verification.json"))) == 2
    times = {file: file.stat().st_mtime_ns for file in (root / "killed").glob("*/seed-0/*.safetensors")}
    assert len(times) == 2
    cli.main(arguments)
    for file in ("bench.json", "bench.md"):
        assert (root / "killed" / file).read_bytes() == (root / "whole" / file).read_bytes(), file
    assert times == {file: file.stat().st_mtime_ns for file in times}


def test_other_settings_are_refused_by_name(root, whole, tmp_path, capsys):
    before = {file: file.stat().st_mtime_ns for file in (root / "whole").rglob("*") if file.is_file()}

    def refused(arguments: list[str]) -> str:
        with pytest.raises(SystemExit) as error:
            cli.main(arguments)
        return f"{error.value}{capsys.readouterr().err}"

    recipe = yaml.safe_load((root / "recipe.yaml").read_text())
    changes = {
        "learning-rate": (0.2, "learning_rate: 0.1 there, 0.2 now"),
        "photometric-probability": (0.5, "photometric_probability: 0.0 there, 0.5 now"),
        "max-train-hours": (1, "has max-train-hours: tables of two machines would differ"),
        "push-to-hub": (True, "has push-to-hub: recognizers are not uploaded"),
        "epoch": (3, "has unknown options: epoch"),
        "train-data-weights": ([1, 2], "--train-data-weights has 2 numbers for 1 data sets"),
    }
    for name, (value, message) in changes.items():
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {name: value}))
        assert message in refused(command(root, "whole", "--recipe", str(tmp_path / "recipe.yaml")))
    for text, message in (("epochs: [", "cannot be read: while parsing"), ("epochs: x", "--epochs: 'x' is")):
        (tmp_path / "recipe.yaml").write_text(text)
        error = refused(command(root, "whole", "--recipe", str(tmp_path / "recipe.yaml")))
        assert re.search(f"uiface bench: .*the recipe .*recipe.yaml cannot be used: .*{message}", error), error
        assert "usage" not in error and "\n" not in error.strip()
    shutil.copytree(root / "bins", tmp_path / "bins")
    write_benchmark(tmp_path / "bins" / "lfw.bin", 22)
    assert "benchmark lfw: " in refused(command(root, "whole", "--benchmarks", str(tmp_path / "bins")))
    shutil.copytree(root / "few", tmp_path / "few")
    next((tmp_path / "few" / "person_0").iterdir()).unlink()
    other = [str(tmp_path / "few") if word == str(root / "few") else word for word in command(root, "whole")]
    assert "few was begun with other settings (data set: " in refused(other)
    both = [*command(root, "whole")[:1], str(tmp_path / "few"), *command(root, "whole")[1:]]
    assert "two data sets have the name few" in refused(both)
    assert "unrecognized arguments: --reel" in refused(command(root, "whole", "--evaluate", "--reel x"))
    assert "begun with other settings" not in refused(command(root, "whole", "--benchmarks", str(tmp_path / "none")))
    assert before == {file: file.stat().st_mtime_ns for file in before}

    # what the weights do not depend on may change
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"logging-steps": 7, "dataloader-num-workers": 1}))
    cli.main(command(root, "whole", "--recipe", str(tmp_path / "recipe.yaml")))
    assert json.loads((root / "whole" / "bench.json").read_text()) == whole


def test_a_training_that_fails_is_named_and_the_others_go_on(root, whole, tmp_path):
    shutil.copytree(root / "few", tmp_path / "broken")
    (tmp_path / "broken" / "person_1" / "0002.png").write_bytes(b"no picture")
    sets = [tmp_path / "broken", f"large={root / 'many'}"]
    with pytest.raises(RuntimeError, match=r"1 trainings failed, the others are in .*\n.*person_1/0002.png"):
        run_bench(sets, root / "recipe.yaml", root / "bins", tmp_path / "bench", seeds=[3])
    table = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert table["sets"]["broken"]["accuracy"] == {}
    assert table["sets"]["large"]["accuracy"] == {"3": whole["sets"]["large"]["accuracy"]["3"]}
    assert "| broken | 18 of 3 | 0 of 1 | - | - | - | - |" in (tmp_path / "bench" / "bench.md").read_text()


def test_more_processes_are_refused(root, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="the bench trains in one process"):
        run_bench([root / "few"], root / "recipe.yaml", root / "bins", tmp_path)


def test_reports_of_the_sets_are_in_the_table(root, whole, toy_root, backbone, tmp_path):
    """Computed by options of `uiface evaluate`; and read from then on."""
    shutil.copytree(root / "whole", tmp_path / "bench")
    write = command(root, "whole")
    write[write.index("--output") + 1] = str(tmp_path / "bench")
    cli.main([*write, "--evaluate", f"--encoder toy --encoder-root {toy_root} --lpips_backbone {backbone}"])
    table = json.loads((tmp_path / "bench" / "bench.json").read_text())
    text = (tmp_path / "bench" / "bench.md").read_text()
    for name in ("few", "large"):
        report = json.loads((tmp_path / "bench" / name / "evaluation" / "report.json").read_text())
        assert table["sets"][name].pop("evaluation")["figures"] == report["figures"] != []
        lpips = next(each for each in report["figures"] if each["name"] == "intra_class_lpips")
        line = next(line for line in text.splitlines() if lpips["label"] in line)
        assert f"{lpips['value']:.4f}" in line
    assert table == whole
    cli.main(write)
    assert (tmp_path / "bench" / "bench.md").read_text() == text


def test_names_of_sets(tmp_path):
    (tmp_path / "a=b").mkdir()
    (tmp_path / "casia").mkdir()
    (tmp_path / "casia" / "train.rec").touch()
    named = name_sets([tmp_path / "a=b", tmp_path / "casia" / "train.rec", f"x={tmp_path / 'casia'}"])
    assert list(named) == ["a=b", "casia", "x"] and named["x"] == tmp_path / "casia"
    for word in ("a/b=c", "..=c", "=c"):
        with pytest.raises(ValueError, match="cannot be the name of a folder of results"):
            name_sets([word])


def test_means_and_deviations():
    values = [0.5, 0.75, 0.625]
    assert mean_text(values) == f"0.6250 +- {statistics.stdev(values):.4f}"
    assert (mean_text([0.5], 100, 2), mean_text([])) == ("50.00", "-")


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"recipe\.yaml is missing: the recipe is a YAML file"):
        run_bench([tmp_path], tmp_path / "recipe.yaml", tmp_path, tmp_path / "bench")
