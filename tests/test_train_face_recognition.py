import functools
import io
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from conftest import REPOSITORY
from hub_server import HubServer
from processes import Running, run_distributed
from records import RecordWriter, image_record
from safetensors.torch import load_file
from toy_faces import IDENTITIES, SIZE, toy_face, write_benchmark, write_faces
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel

from uiface_diffusers import IResNetConfig, IResNetModel
from uiface_diffusers.data import FaceCache, labeled_faces, prepare_faces
from uiface_diffusers.data.image_folder import ImageRow, pack_shard, write_metadata
from uiface_diffusers.data.labeled_faces import LabeledFaces, check_faces
from uiface_diffusers.evaluation import load_recognizer, verify_benchmarks
from uiface_diffusers.evaluation.recognizers import ModelRecognizer
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.training.datasets import Augmentation
from uiface_diffusers.training.order import NumberedBatches
from uiface_diffusers.training.recognition import image_processor
from uiface_diffusers.training.schedules import make_lr_scheduler, multi_step

SCRIPT = REPOSITORY / "training" / "train_face_recognition.py"
sys.path.insert(0, str(SCRIPT.parent))
import train_face_recognition as script  # noqa: E402


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """Faces and a recipe of a tiny training."""
    root = tmp_path_factory.mktemp("train_face_recognition")
    recipe = {
        "train_data": [str(write_faces(root / "faces"))],
        "recognizer": {"layers": 18, "width": 4, "embedding_dim": 16, "image_size": SIZE, "dropout": 0.1},
        "epochs": 3,
        "train_batch_size": 8,
        "lr_milestones": [2],
        "checkpointing_steps": 7,
        "report_to": "none",
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def options_of(workspace: Path, output: str, *options: str) -> list[str]:
    return ["--config", str(workspace / "recipe.yaml"), "--output-dir", str(workspace / output), *options]


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch):
    # one thread: nothing is left to the order in which threads add
    for name, value in {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}.items():
        monkeypatch.setenv(name, value)


def train(workspace: Path, output: str, *options: str) -> Path:
    """In this process: starting another one takes longer than the training."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    script.main(options_of(workspace, output, *options))
    return workspace / output


def last_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return load_file(newest / "model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(workspace) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return train(workspace, "whole")


def test_saves_a_recognizer_for_the_auto_classes(uninterrupted):
    files = sorted(path.name for path in uninterrupted.iterdir() if path.is_file())
    assert files == ["config.json", "model.safetensors", "preprocessor_config.json", "train_results.json"]
    model, info = AutoModel.from_pretrained(uninterrupted, output_loading_info=True)
    assert isinstance(model, IResNetModel) and not any(info.values())
    faces = [np.asarray(toy_face(0, index)) for index in range(3)]
    inputs = AutoImageProcessor.from_pretrained(uninterrupted)(faces, return_tensors="pt")
    assert np.allclose(
        model(**inputs).embeddings.detach(), load_recognizer(uninterrupted, device="cpu")(np.stack(faces)), atol=1e-5
    )
    # the head's weights are in the checkpoints only
    saved = load_file(uninterrupted / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    checkpoint = last_checkpoint(uninterrupted)
    assert checkpoint["head.weight"].shape == (IDENTITIES, 16)
    assert all(torch.equal(checkpoint[f"recognizer.{name}"], tensor) for name, tensor in saved.items())
    # 3 epochs of 96 faces in batches of 8; the limit of checkpoints is 2
    assert sorted(path.name for path in uninterrupted.glob("checkpoint*")) == ["checkpoint-35", "checkpoint-36"]


def test_learns_to_tell_people_apart(workspace):
    """On pictures that were not trained on: every genuine pair's cosine against every impostor pair's."""

    def separation(model: IResNetModel) -> float:
        faces = np.stack([np.asarray(toy_face(i, 100 + j)) for i in range(IDENTITIES) for j in range(4)])
        embeddings = ModelRecognizer(model, image_processor(model.config), "toy")(faces)
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        same = np.kron(np.eye(IDENTITIES), np.ones((4, 4))).astype(bool)
        pairs = np.triu(np.ones_like(same), 1)
        cosines = embeddings @ embeddings.T
        return float((cosines[same & pairs][:, None] > cosines[~same & pairs]).mean())

    options = ("--train-batch-size", "32", "--max-train-steps", "80", "--lr-milestones", "20")
    trained = separation(AutoModel.from_pretrained(train(workspace, "learned", *options)))
    torch.manual_seed(0)
    fresh = separation(IResNetModel(IResNetConfig(layers=18, width=4, embedding_dim=16, image_size=SIZE)))
    assert trained > 0.97 and fresh < 0.8, (trained, fresh)


def test_sigkill_and_resume_gives_the_same_parameters(uninterrupted, workspace):
    """With two workers, killed between two checkpoints; an uninterrupted run without workers has the same weights."""
    options = ("--dataloader-num-workers", "2")
    Running("train_face_recognition", options_of(workspace, "killed", *options)).kill_at("| 17/36")
    folder = workspace / "killed"
    assert list(folder.glob("checkpoint-*")) and not (folder / "config.json").exists()
    train(workspace, "killed", *options, "--resume-from-checkpoint", "latest")
    ours, theirs = last_checkpoint(folder), last_checkpoint(uninterrupted)
    assert ours.keys() == theirs.keys() and len(ours) > 100
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []


def test_the_last_epoch_is_known_after_a_resume(uninterrupted, workspace):
    """From its end, when a run was killed before it wrote what was learned, and from within."""
    expected = json.loads((uninterrupted / "train_results.json").read_text())
    folder = workspace / "ended"
    shutil.copytree(uninterrupted, folder)
    for step in (36, 35):
        (folder / "train_results.json").unlink()
        train(workspace, "ended", "--resume-from-checkpoint", str(folder / f"checkpoint-{step}"))
        results = json.loads((folder / "train_results.json").read_text())
        assert results == pytest.approx(expected, rel=1e-5), step
        shutil.rmtree(folder / "checkpoint-36")


def test_two_processes_train_as_two_batches(workspace):
    """The same faces, augmented the same way, in two processes or one after the other: equal steps up to rounding.
    Batch norm's running statistics differ: the main process has seen half of the faces."""
    options = ("--train-batch-size", "4", "--max-train-steps", "3")
    options += ("--recognizer", f'{{"layers": 18, "width": 4, "embedding_dim": 16, "image_size": {SIZE}}}')
    written = run_distributed("train_face_recognition", options_of(workspace, "two", *options))
    assert written.count("recognizer saved") == 1 and written.count("96 checked") == 1
    two = last_checkpoint(workspace / "two")
    one = last_checkpoint(train(workspace, "one", *options, "--gradient-accumulation-steps", "2"))
    torch.manual_seed(0)
    fresh = IResNetModel(IResNetConfig(layers=18, width=4, embedding_dim=16, image_size=SIZE))
    for name, parameter in fresh.named_parameters():
        a, b = (state[f"recognizer.{name}"] for state in (one, two))
        moved = (a - parameter.detach()).norm()
        assert (a - b).norm() < 1e-2 * moved + 1e-6, name
    assert torch.allclose(one["head.weight"], two["head.weight"], atol=1e-4)
    results = [json.loads((workspace / name / "train_results.json").read_text()) for name in ("one", "two")]
    assert results[0] == pytest.approx(results[1], rel=1e-3)
    # the sums of both are in the checkpoint, and counted once
    (workspace / "two" / "train_results.json").unlink()
    again = options_of(workspace, "two", *options, "--resume-from-checkpoint", "latest")
    run_distributed("train_face_recognition", again)
    assert json.loads((workspace / "two" / "train_results.json").read_text()) == pytest.approx(results[1], rel=1e-5)


def test_options_train_and_save(workspace):
    options = ("--mixed-precision", "bf16", "--channels-last", "--head", "adaface", "--max-grad-norm", "5")
    options += ("--lr-warmup-steps", "2", "--max-train-steps", "2", "--checked-faces", "10")
    folder = train(workspace, "options", *options)
    assert all(tensor.isfinite().all() for tensor in last_checkpoint(folder).values())
    assert "head.deviation" in last_checkpoint(folder)
    AutoModel.from_pretrained(folder)
    stopped = train(workspace, "stopped", "--max-train-hours", "0", "--head", "cosface", "--lr-scheduler", "cosine")
    assert [path.name for path in stopped.glob("checkpoint*")] == ["checkpoint-1"]
    with pytest.raises(ValueError, match="train_batch_size: 8 then, 16 now"):
        train(workspace, "stopped", "--train-batch-size", "16", "--resume-from-checkpoint", "latest")
    # what the optimizer's saved state would overrule without a word
    with pytest.raises(ValueError, match=r"head: cosface then, adaface now; learning_rate: 0.1 then, 0.01 now"):
        changed = ("--head", "adaface", "--learning-rate", "0.01")
        train(workspace, "stopped", *changed, "--resume-from-checkpoint", "latest")
    with pytest.raises(ValueError, match="lr_warmup_steps: 0 then, 5 now"):
        changed = ("--head", "cosface", "--lr-scheduler", "cosine", "--lr-warmup-steps", "5")
        train(workspace, "stopped", *changed, "--resume-from-checkpoint", "latest")


def test_a_resume_with_other_pictures_of_the_same_names_is_refused(workspace):
    data = workspace / "own_faces"
    shutil.copytree(workspace / "faces", data)
    train(workspace, "pictures", "--train-data", str(data), "--max-train-steps", "1")
    resume = ("--resume-from-checkpoint", "latest", "--max-train-steps", "2", "--train-data")
    # a moved folder is the same
    train(workspace, "pictures", *resume, str(data.rename(workspace / "moved_faces")))
    picture = min((workspace / "moved_faces").glob("*/*.png"))
    PIL.Image.fromarray(np.asarray(PIL.Image.open(picture))[::-1] // 2).save(picture)
    with pytest.raises(ValueError, match="train_data: .* then, .* now"):
        train(workspace, "pictures", *resume, str(workspace / "moved_faces"))


def test_a_schedule_that_is_bent_by_more_steps_is_warned_of(workspace, caplog):
    """The learning rate of cosine and linear depends on the last step; that of the others does not."""
    for schedule in ("linear", "multi_step"):
        folder, options = f"bent_{schedule}", ("--lr-scheduler", schedule)
        train(workspace, folder, *options, "--max-train-steps", "1")
        caplog.clear()
        train(workspace, folder, *options, "--max-train-steps", "2", "--resume-from-checkpoint", "latest")
        assert ("max_train_steps: 1 then, 2 now" in caplog.text) == (schedule == "linear")
    caplog.clear()
    train(
        workspace,
        "bent_linear",
        "--lr-scheduler",
        "linear",
        "--max-train-steps",
        "2",
        "--resume-from-checkpoint",
        "latest",
    )
    assert "max_train_steps" not in caplog.text


def test_benchmarks_and_log(workspace, tmp_path):
    """The accuracies in the log are those of the saved recognizer, as `uiface verify` measures it."""
    bins = tmp_path / "bins"
    bins.mkdir()
    for name, pairs in (("lfw", 20), ("calfw", 30)):
        write_benchmark(bins / f"{name}.bin", pairs)
    data = write_faces(tmp_path / "faces", identities=2, images=2, size=112)
    options = ("--train-data", str(data), "--train-batch-size", "4", "--max-train-steps", "3", "--logging-steps", "1")
    options += ("--report-to", "tensorboard", "--benchmarks", str(bins), "--validation-steps", "2")
    options += ("--recognizer", '{"layers": 18, "width": 4, "embedding_dim": 16}')
    folder = train(workspace, "benchmarks", *options)
    results = verify_benchmarks(load_recognizer(folder), bins)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs" / "train_face_recognition"))
    events.Reload()
    assert {"loss", "accuracy", "images/s", "lr", "epoch"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("accuracy/mean")] == [2, 3]
    for name, result in results.items():
        assert events.Scalars(f"accuracy/{name}")[-1].value == pytest.approx(result.accuracy)
    mean = (results["lfw"].accuracy + results["calfw"].accuracy) / 2
    assert events.Scalars("accuracy/mean")[-1].value == pytest.approx(mean)
    # a kill between the last checkpoint and its validation
    accuracies = json.loads((folder / "accuracies.json").read_text())
    (folder / "accuracies.json").write_text(json.dumps({"2": accuracies["2"]}))
    train(workspace, "benchmarks", *options, "--resume-from-checkpoint", "latest")
    assert json.loads((folder / "accuracies.json").read_text()) == accuracies
    with pytest.raises(ValueError, match="benchmarks have faces of 112 pixels, the recognizer takes 32"):
        train(workspace, "small", "--benchmarks", str(bins))
    # what could not be measured is named before the first step
    for content, message in ((b"damaged", "z.bin cannot be read"), (None, "`z` has 0 genuine and 2 impostor pairs")):
        if content is None:
            write_benchmark(bins / "z.bin", pairs=2)
            images, _ = pickle.loads((bins / "z.bin").read_bytes())
            content = pickle.dumps((images, [False, False]))
        (bins / "z.bin").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            train(workspace, "damaged", *options)
    assert not list((workspace / "damaged").glob("checkpoint*"))


def test_what_was_learned_is_said(workspace, caplog):
    """Loss and accuracy of the last epoch's 12 steps, whatever is logged and saved in between; and a recipe by which
    nothing is learned is no silent result."""
    options = ("--logging-steps", "1", "--report-to", "tensorboard", "--learning-rate", "0.02", "--margin", "0")
    folder = train(workspace, "learned_is_said", *options)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs" / "train_face_recognition"))
    events.Reload()
    results = json.loads((folder / "train_results.json").read_text())
    assert results["step"] == 36
    for name in ("loss", "accuracy"):
        steps = [event.value for event in events.Scalars(name)[-12:]]
        assert results[name] == pytest.approx(sum(steps) / 12, rel=1e-5)
    assert results["accuracy"] > 0.05 and "hardly any" not in caplog.text

    train(workspace, "unlearned", "--learning-rate", "1e-9")
    assert "hardly any of its 8 identities apart" in caplog.text and "--max-grad-norm" in caplog.text
    # a run that is stopped before its end has no result
    stopped = train(workspace, "early", "--learning-rate", "1e-9", "--max-train-hours", "0")
    assert not (stopped / "train_results.json").exists()


def test_a_loss_that_is_not_finite_is_never_saved(workspace):
    """Whatever the precision: batch norm's averages would keep it."""
    for precision in ("no", "bf16"):
        folder = f"diverged_{precision}"
        options = ("--learning-rate", "1e30", "--mixed-precision", precision, "--checkpointing-steps", "1")
        with pytest.raises(RuntimeError, match="the loss is not finite at step"):
            train(workspace, folder, *options)
        for checkpoint in (workspace / folder).glob("checkpoint-*"):
            assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())


def test_caches_of_photographs_are_trained_on(workspace, toy_root, toy_photographs, tmp_path):
    """Faces of `uiface prepare` at another size are resized."""
    encoder = FaceEncoder("toy", str(toy_root), det_size=160)
    prepare_faces(toy_photographs, tmp_path / "cache", encoder, image_size=128)
    faces = LabeledFaces([tmp_path / "cache"])
    assert len(faces) == 24 and faces.num_identities == 4
    (shard,) = FaceCache(tmp_path / "cache").shards
    first = next(FaceCache(tmp_path / "cache").shard_images(shard))
    resized = PIL.Image.fromarray(first).resize((112, 112), PIL.Image.Resampling.BILINEAR)
    assert np.array_equal(faces.face(0), np.asarray(resized))
    assert check_faces(faces)["uniform"] == 0


def test_pushes_and_survives_a_failed_upload(workspace, tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        hub.fail_uploads = 1
        options = ("--push-to-hub", "--hub-model-id", "tester/recognizer", "--hub-private", "--license", "mit")
        options += ("--max-train-steps", "2", "--checkpointing-steps", "1")
        command = [sys.executable, str(SCRIPT), *options_of(workspace, "pushed", *options)]
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        assert "tester/recognizer was not pushed to the Hub; the training goes on." in result.stderr
        files = hub.files("tester/recognizer")
        assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= set(files)
        assert hub.repositories["tester/recognizer"].private
        pushed = hub.read("tester/recognizer", "model.safetensors")
        assert pushed == (workspace / "pushed" / "model.safetensors").read_bytes()
        card = hub.read("tester/recognizer", "README.md").decode()
        assert "license: mit" in card and "head: arcface" in card and str(workspace) not in card


def test_recipe_is_the_papers():
    recipe = REPOSITORY / "training" / "configs" / "fr_ir50_arcface.yaml"
    args = script.parse_args(["--config", str(recipe), "--train-data", "data", "--output-dir", "out"])
    assert (args.recognizer, args.head, args.margin, args.scale) == ({"layers": 50}, "arcface", 0.5, 64)
    assert (args.epochs, args.train_batch_size, args.learning_rate) == (40, 512, 0.1)
    assert (args.momentum, args.weight_decay) == (0.9, 5e-4)
    assert (args.flip_probability, args.crop_probability, args.crop_scale) == (0.5, 0.2, [0.2, 1.0])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    schedule = make_lr_scheduler(args, optimizer, batches_per_epoch=10)
    rates = []
    for _ in range(400):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [0.1] * 220 + [0.01] * 60 + [0.001] * 40 + [0.0001] * 80
    assert np.allclose(rates, expected, rtol=1e-9)


def test_warm_up_and_accumulation():
    factors = [multi_step(step, [6], 0.1, warmup_steps=4) for step in range(8)]
    assert np.allclose(factors, [0.25, 0.5, 0.75, 1, 1, 1, 0.1, 0.1])
    argv = ["--train-data", "x", "--output-dir", "y", "--lr-milestones", "3", "--gradient-accumulation-steps", "2"]
    args = script.parse_args([*argv, "--learning-rate", "1"])
    schedule = make_lr_scheduler(args, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), 5)
    assert [schedule.lr_lambdas[0](step) for step in (6, 7)] == [1, 0.1]  # 15 batches are 7 steps and a half


def test_augmentation_depends_on_its_number_alone():
    augment = Augmentation(0, SIZE, flip_probability=0.5, crop_probability=0.2, crop_scale=(0.2, 1.0))
    face = torch.tensor(np.asarray(toy_face(0, 0))).permute(2, 0, 1)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = [augment(face, number) for number in range(1000)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first[7], augment(face, 7)) and first[7].dtype == torch.uint8
    kinds = Counter()
    for picture in first:
        kind = "same" if torch.equal(picture, face) else "flipped" if torch.equal(picture, face.flip(-1)) else "crop"
        kinds[kind] += 1
    # flipped or not 0.4 each, cropped 0.2: four standard deviations
    assert abs(kinds["same"] - 400) < 62 and abs(kinds["flipped"] - 400) < 62 and abs(kinds["crop"] - 200) < 51
    other = Augmentation(1, SIZE, 0.5, 0.2, (0.2, 1.0))
    assert sum(torch.equal(a, other(face, number)) for number, a in enumerate(first[:100])) < 60
    # a crop keeps at least a fifth of the area: a gradient's range shrinks to no less
    ramp = torch.arange(SIZE).mul(8).byte().expand(3, SIZE, SIZE)
    crops = [augment(ramp, number)[0, 0].float() for number in range(300)]
    slopes = torch.stack([(row[-1] - row[0]).abs() / (8 * (SIZE - 1)) for row in crops])
    assert slopes.min() > math.sqrt(0.2 * 3 / 4) - 0.1 and slopes.min() < 0.7


def test_faces_are_numbered_alike_for_any_number_of_processes():
    def numbers(world_size: int, batch_size: int, steps: int, start: int = 0) -> dict[int, int]:
        numbered = {}
        for rank in range(world_size):
            batches = iter(NumberedBatches(40, batch_size, 0, rank, world_size, start=start))
            numbered |= {number: index for _ in range(steps) for index, number in next(batches)}
        return numbered

    one = numbers(1, 8, steps=10)
    assert one == numbers(2, 4, steps=10) and sorted(one) == list(range(80))
    assert numbers(1, 8, steps=3, start=7) == {number: one[number] for number in range(56, 80)}


@pytest.fixture(scope="module")
def forms(tmp_path_factory) -> dict[str, Path]:
    """The same six faces of three people in every form in which peers publish them."""
    root = tmp_path_factory.mktemp("forms")
    faces = {(i, j): toy_face(i, j) for i in range(3) for j in range(2)}
    names = {key: f"person_{key[0]}/{key[1]:04d}.png" for key in faces}
    rows = [ImageRow(f"person_{i}", j, 0, 0, -1, None, None, 0) for i, j in faces]
    for generated in ("folder", "generated", "generated_shards", "shards"):
        images = root / generated if generated == "folder" else root / generated / "images"
        for key, name in names.items():
            (images / name).parent.mkdir(parents=True, exist_ok=True)
            faces[key].save(images / name)
    for generated in ("generated_shards", "shards"):
        output = root / generated
        for number in range(3):
            part = [key for key in faces if key[0] == number]
            classes = [number] * len(part)
            shard = output / "shards" / f"{number:06d}.tar"
            pack_shard(shard, output / "images", [names[key] for key in part], classes, rows[:2])
    for generated in ("generated", "generated_shards"):
        (root / generated / "generation.json").write_text("{}")
        write_metadata(root / generated, rows, list(names.values()))
    writer = RecordWriter(root / "train.rec")
    writer.write(0, image_record([7.0, 10.0], 0, b""))
    for key, ((i, _), face) in enumerate(faces.items(), start=1):
        content = io.BytesIO()
        face.save(content, "png")
        writer.write(key, image_record(float(i), key, content.getvalue()))
    writer.close()
    forms = {name: root / name for name in ("folder", "generated", "generated_shards")}
    return forms | {"shards": root / "shards" / "shards", "recordio": root / "train.rec"}


@pytest.mark.parametrize("form", ["folder", "generated", "generated_shards", "shards", "recordio"])
def test_every_form_gives_the_same_faces(forms, form):
    # as workers get it that are not forked
    faces = pickle.loads(pickle.dumps(LabeledFaces([forms[form]], SIZE)))
    pixels, labels = faces.__getitems__([(index, 0) for index in range(6)])
    assert labels.tolist() == [0, 0, 1, 1, 2, 2] and faces.num_identities == 3
    expected = np.stack([np.asarray(toy_face(i, j)) for i in range(3) for j in range(2)])
    assert np.array_equal(pixels.permute(0, 2, 3, 1), expected)


def test_several_data_sets_have_different_people(forms):
    faces = LabeledFaces([forms["folder"], forms["recordio"]], SIZE)
    assert faces.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert faces.name(7).endswith("train.rec: 2") and faces.name(2).endswith("folder: person_1/0000.png")
    report = check_faces(faces, num_workers=1)
    assert report == {"faces": 12, "identities": 6, "single": 0, "checked": 12, "uniform": 0}
    with pytest.raises(ValueError, match="folder is given twice"):
        LabeledFaces([forms["folder"], forms["folder"] / "."], SIZE)
    for form, part in (("generated", "images"), ("generated_shards", "shards")):
        with pytest.raises(ValueError, match=f"{form} is given twice"):
            LabeledFaces([forms[form], forms["folder"], forms[form] / part], SIZE)


@pytest.mark.parametrize("form", ["generated", "generated_shards"])
def test_a_generated_set_that_lost_files_is_refused(forms, form, tmp_path):
    shutil.copytree(forms[form], tmp_path / "set")
    lost = next((tmp_path / "set").glob("*/*/*.png"), None) or next((tmp_path / "set" / "shards").iterdir())
    lost.unlink()
    with pytest.raises(ValueError, match="set has [45] images, its metadata.parquet says 6: it is not whole"):
        LabeledFaces([tmp_path / "set"], SIZE)


def test_the_flawed_file_is_named_without_progress_bars(tmp_path, monkeypatch):
    data = write_faces(tmp_path / "faces", identities=10, images=10)
    (data / "person_9" / "0004.png").write_bytes(b"no picture")
    monkeypatch.setattr(labeled_faces, "tqdm", functools.partial(tqdm, disable=True))  # as by TQDM_DISABLE=1
    with pytest.raises(ValueError, match="1 of 100 faces.*1 unreadable, as .*person_9/0004.png"):
        check_faces(LabeledFaces([data], SIZE))


def test_hostile_data_is_named(workspace, tmp_path):
    """Before the first step, all kinds at once, with their numbers and an example."""
    data = write_faces(tmp_path / "faces", identities=3, images=4)
    toy_face(0, 0).convert("L").save(data / "person_0" / "0000.png")
    toy_face(0, 1).convert("RGBA").save(data / "person_0" / "0001.png")
    toy_face(0, 2, size=40).save(data / "person_0" / "0002.png")
    content = (data / "person_1" / "0000.png").read_bytes()
    (data / "person_1" / "0000.png").write_bytes(content[: len(content) // 2])
    (data / "person_1" / "0001.png").write_bytes(b"no picture")
    (data / "person_1" / "0002.png").write_bytes(b"")
    PIL.Image.new("RGB", (SIZE, SIZE)).save(data / "person_2" / "0000.png")
    PIL.Image.new("RGB", (SIZE, SIZE), (255, 0, 0)).save(data / "person_2" / "0001.png")
    with pytest.raises(ValueError) as error:
        train(workspace, "hostile", "--train-data", str(data))
    message = str(error.value)
    assert "6 of 12 faces cannot be trained on" in message
    assert f"3 unreadable, as {data}: person_1/0000.png" in message
    assert f"2 of one color, as {data}: person_2/0000.png" in message
    assert f"1 40x40, not {SIZE}x{SIZE}, as {data}: person_0/0002.png" in message
    assert "person_0/0000.png" not in message and "person_0/0001.png" not in message  # gray and RGBA are converted
    assert not list((workspace / "hostile").glob("*"))
    # what is not checked is named when it is met
    faces = LabeledFaces([data], SIZE)
    with pytest.raises(ValueError, match="person_0/0002.png is 40x40, not 32x32"):
        faces.__getitems__([(2, 0)])


def test_too_few_people_and_single_faces(tmp_path, caplog, workspace):
    data = write_faces(tmp_path / "faces", identities=3, images=4)
    for index in (1, 2, 3):
        (data / "person_2" / f"{index:04d}.png").unlink()
    assert check_faces(LabeledFaces([data], SIZE))["single"] == 1
    assert LabeledFaces([data], SIZE, min_images=2).num_identities == 2
    with caplog.at_level("INFO"):
        train(workspace, "single", "--train-data", str(data), "--max-train-steps", "1")
    assert "1 of 3 identities have a single face" in caplog.text
    with pytest.raises(ValueError, match="4 faces of one identity, two are needed"):
        LabeledFaces([write_faces(tmp_path / "alone", identities=1, images=4)], SIZE)
    # among many faces a few of one color are reported, no more
    for index in range(4, 120):
        toy_face(0, index).save(data / "person_0" / f"{index:04d}.png")
    PIL.Image.new("RGB", (SIZE, SIZE)).save(data / "person_0" / "0000.png")
    assert check_faces(LabeledFaces([data], SIZE))["uniform"] == 1


def test_unfinished_generation_is_refused(forms, tmp_path):
    (tmp_path / "generation.json").write_text("{}")
    write_faces(tmp_path / "images", identities=2, images=2)
    with pytest.raises(ValueError, match="unfinished data set: go on with `uiface generate`"):
        LabeledFaces([tmp_path], SIZE)
    assert len(LabeledFaces([tmp_path / "images"], SIZE)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--recognizer", '{"layer": 18}'), "--recognizer has unknown options: layer"),
        (("--train-batch-size", "1"), "--train-batch-size has to be 2 at least"),
        (("--epochs", "0"), "--epochs: '0' is not a whole number from 1 on"),
        (("--head", "softmax"), "argument --head"),
    ],
)
def test_wrong_options_are_named(workspace, capsys, options, message):
    with pytest.raises(SystemExit):
        script.parse_args(options_of(workspace, "wrong", *options))
    assert message in capsys.readouterr().err
