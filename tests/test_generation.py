import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import torchvision
import webdataset
from conftest import FIXTURES, TINY_UNET, complaint, tiny_components
from generated_sets import rows_of
from killed import run_until_complete
from written_files import write

from uiface_diffusers import (
    IdentityBank,
    UIFacePipeline,
    UIFaceUNet2DModel,
    cli,
    default_checkpoint,
    generate_dataset,
    sample_identities,
)
from uiface_diffusers.data.sources import open_source
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.fingerprint import pipeline_fingerprint
from uiface_diffusers.generation import default_batch_size
from uiface_diffusers.generation.plan import Part
from uiface_diffusers.generation.resume import locked
from uiface_diffusers.identities import DistinctIdentities, perturb_embeddings
from uiface_diffusers.seeds import image_generator, noise_generator

FAST = {"num_inference_steps": 3}


def bank(number: int = 3, encoder: str | None = "toy") -> IdentityBank:
    return IdentityBank(F.normalize(torch.randn(number, 16, generator=torch.Generator().manual_seed(0))), encoder)


def read(folder: Path) -> dict[str, np.ndarray]:
    return {f"{p.parent.name}/{p.name}": np.asarray(PIL.Image.open(p)) for p in sorted(folder.glob("images/*/*"))}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same_images(first: dict, second: dict) -> None:
    """At most one gray level apart, and that in at most 0.1 % of the values."""
    assert first.keys() == second.keys()
    for name in first:
        difference = np.abs(first[name].astype(int) - second[name])
        assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3, name


def test_a_face_depends_on_identity_number_and_seed_only(tiny_pipeline, tmp_path):
    options = {"images_per_identity": 5, "size": 16, **FAST}
    report = generate_dataset(tiny_pipeline, bank(), tmp_path / "a", seed=1, batch_size=4, **options)
    assert (report.made, report.planned, report.complete) == (15, 15, True)
    generate_dataset(tiny_pipeline, bank(), tmp_path / "b", seed=1, batch_size=7, **options)
    generate_dataset(tiny_pipeline, bank(), tmp_path / "c", seed=2, batch_size=7, **options)
    for position in (2, 0, 1):
        report = generate_dataset(
            tiny_pipeline, bank(), tmp_path / "d", seed=1, batch_size=2, shard=(position, 3), **options
        )
        assert report.complete == (position == 1)
    # a bank of fewer identities gives the same images of those
    generate_dataset(tiny_pipeline, bank().take([2]), tmp_path / "e", seed=1, **options)
    first, second, other, parts, part = (read(tmp_path / name) for name in "abcde")
    assert list(first) == [f"{i:06d}/{n:04d}.png" for i in range(3) for n in range(5)]
    assert_same_images(first, second)
    assert_same_images(first, parts)
    assert_same_images({name: image for name, image in first.items() if name in part}, part)
    assert all(np.abs(first[name].astype(int) - other[name]).max() > 1 for name in first)
    assert len({image.tobytes() for image in first.values()}) == 15
    assert [row["boundary_timestep"] for row in rows_of(tmp_path / "a")] == [
        row["boundary_timestep"] for row in rows_of(tmp_path / "d")
    ]
    preview = np.asarray(PIL.Image.open(tmp_path / "a" / "preview.png"))
    assert np.array_equal(preview[32:48, 48:64], first["000002/0003.png"])


def test_an_image_can_be_made_again_from_its_row(tiny_pipeline, tmp_path):
    """By the pipeline alone: seed, perturbed embedding, boundary and file."""
    options = {"identity_perturbation": (0.6, 0.9), "size": 12, "guidance_scale": 3.0, **FAST}
    generate_dataset(tiny_pipeline, bank(), tmp_path, 2, **options)
    rows = rows_of(tmp_path)
    assert [(row["identity"], row["index"]) for row in rows] == [(f"{i:06d}", n) for i in range(3) for n in range(2)]
    for position in (0, 5):
        row = rows[position]
        generator = image_generator(0, row["identity"], row["index"], stream=1)
        embedding, cosine = perturb_embeddings(bank().embeddings[[position // 2]], (0.6, 0.9), [generator])
        assert row["perturbation"] == pytest.approx(cosine.item()) and 0.6 <= cosine <= 0.9
        out = tiny_pipeline(embedding, generator=noise_generator(row["seed"]), guidance_scale=3.0, **FAST)
        assert out.boundary_timesteps.item() == row["boundary_timestep"]
        expected = out.images[0].resize((12, 12), PIL.Image.Resampling.BILINEAR)
        saved = PIL.Image.open(tmp_path / row["file_name"])
        assert np.abs(np.asarray(expected).astype(int) - np.asarray(saved)).max() <= 1
        assert (tmp_path / row["file_name"]).stat().st_size == row["size"]


def test_what_is_there_is_not_made_again(tiny_pipeline, tmp_path):
    options = {"size": 16, **FAST}
    generate_dataset(tiny_pipeline, bank(), tmp_path, 3, **options)
    before = contents(tmp_path)
    assert generate_dataset(tiny_pipeline, bank(), tmp_path, 3, **options).made == 0
    # missing, cut short, of another kind
    (tmp_path / "images" / "000001" / "0000.png").unlink()
    cut = tmp_path / "images" / "000001" / "0001.png"
    cut.write_bytes(cut.read_bytes()[:-5])
    damaged = tmp_path / "images" / "000002" / "0002.png"
    damaged.write_bytes(b"0" * len(damaged.read_bytes()))
    assert generate_dataset(tiny_pipeline, bank(), tmp_path, 3, **options).made == 3
    after = contents(tmp_path)
    assert after.keys() == before.keys() and not [name for name in after if name.endswith((".part", ".lock"))]
    assert_same_images(*({n: np.asarray(PIL.Image.open(io.BytesIO(c))) for n, c in x.items() if n.endswith("png")}
                         for x in (before, after)))  # fmt: skip


@pytest.mark.parametrize(
    ("output_format", "kills"), [("imagefolder", (1, 7, 10)), ("webdataset", (9,)), ("parquet", (9,))]
)
def test_killed_again_and_again_the_folder_is_the_same(tmp_path, output_format, kills):
    """SIGKILL after some more images: in the first batch, within a later one, after a resume; then the run goes on."""
    pipe = UIFacePipeline(**tiny_components())
    pipe.save_pretrained(tmp_path / "model")
    bank(4).save(tmp_path / "bank.safetensors")
    options = ["--images-per-identity", "15", "--batch-size", "4", "--size", "16", "--num-inference-steps", "6"]
    options += ["--identities", str(tmp_path / "bank.safetensors"), "--output-format", output_format]
    command = ["generate", str(tmp_path / "model"), *options, "--output"]
    whole, killed, made = tmp_path / "whole", tmp_path / "killed", []
    cli.main([*command, str(whole)])
    for images in kills:
        before = {path: path.stat().st_mtime_ns for path in killed.glob("images/*/*.png")}
        run_until_complete([*command, str(killed)], ".png", images)
        after = {path: path.stat().st_mtime_ns for path in killed.glob("images/*/*.png")}
        # again: those only whose row was not written, of the batch in flight
        made.append(sum(after.get(path) != time for path, time in before.items()))
    cli.main([*command, str(killed)])
    assert max(made) <= 4 and set(contents(killed)) == set(contents(whole))
    if output_format == "imagefolder":
        assert_same_images(read(killed), read(whole))
        assert contents(killed)["generation.json"] == contents(whole)["generation.json"]
    rows, expected = rows_of(killed), rows_of(whole)
    assert [{**row, "size": 0} for row in rows] == [{**row, "size": 0} for row in expected]


def test_a_folder_of_the_first_version_goes_on(tiny_pipeline, tmp_path):
    """Part 0 of 2, made before the settings were an object: nothing of it is made again, and it stays as it was."""
    options = {"identity_perturbation": (0.8, 1), "guidance_scale": 3, "size": 8, **FAST}
    shutil.copytree(FIXTURES / "begun_data_set", tmp_path / "begun")
    file = tmp_path / "begun" / "generation.json"
    text = file.read_text()
    model = json.loads(text)["settings"]["model"]
    text = text.replace(model, pipeline_fingerprint(tiny_pipeline))  # other releases of torch may draw other weights
    file.write_text(text)
    before = contents(tmp_path / "begun")
    report = generate_dataset(tiny_pipeline, bank(), tmp_path / "begun", 3, shard=(1, 2), **options)
    assert (report.made, report.complete) == (4, True)
    after = contents(tmp_path / "begun")
    assert [name for name in before if after.get(name) != before[name]] == ["journal/0-of-2.jsonl"]
    # of a folder that is begun now: the same text, but for the versions of the libraries
    generate_dataset(tiny_pipeline, bank(), tmp_path / "whole", 3, **options)
    whole = (tmp_path / "whole" / "generation.json").read_text()
    assert whole.split('"versions"')[0] == text.split('"versions"')[0]
    new = {name: image for name, image in read(tmp_path / "begun").items() if f"images/{name}" not in before}
    assert_same_images(new, {name: image for name, image in read(tmp_path / "whole").items() if name in new})
    assert [row["seed"] for row in rows_of(tmp_path / "begun")] == [row["seed"] for row in rows_of(tmp_path / "whole")]


def test_two_processes_share_the_work(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    bank(4).save(tmp_path / "bank.safetensors")
    generate_dataset(tiny_pipeline, bank(4), tmp_path / "one", 5, batch_size=3, size=16, **FAST)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "uiface_diffusers.cli", "generate", str(tmp_path / "model"), "--device", "cpu"]
    command += ["--identities", str(tmp_path / "bank.safetensors"), "--output", str(tmp_path / "two"), "--size", "16"]
    command += ["--images-per-identity", "5", "--batch-size", "4", "--num-inference-steps", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert {line.split(" of ")[0] for line in result.stdout.splitlines() if "made here" in line} == {"10"}
    assert_same_images(read(tmp_path / "one"), read(tmp_path / "two"))
    assert len(rows_of(tmp_path / "two")) == 20


def test_parts_of_other_batch_sizes_complete_each_other(tiny_pipeline, tmp_path):
    """The default depends on the device, and so may differ between the machines of a job array."""
    options = {"images_per_identity": 5, "size": 16, **FAST}
    first = generate_dataset(tiny_pipeline, bank(), tmp_path, shard=(0, 2), batch_size=2, **options)
    second = generate_dataset(tiny_pipeline, bank(), tmp_path, shard=(1, 2), **options)
    assert (first.made, first.complete, second.made, second.complete) == (8, False, 7, True)


def test_the_default_batch_suits_the_device(tiny_pipeline):
    assert default_batch_size(tiny_pipeline) == 16
    sizes = {}
    for side in (8, 16, 32, (32, 64), 64, 256):
        unet = UIFaceUNet2DModel(**TINY_UNET | {"sample_size": side}).to("meta")
        sizes[side] = default_batch_size(UIFacePipeline(**tiny_pipeline.components | {"unet": unet}))
    assert sizes == {8: 1024, 16: 1024, 32: 256, (32, 64): 128, 64: 64, 256: 16}


def test_readers_of_the_field_read_it(tiny_pipeline, tmp_path):
    options = {"images_per_identity": 4, "size": 16, **FAST}
    generate_dataset(tiny_pipeline, bank(), tmp_path / "folder", image_format="jpeg", **options)
    generate_dataset(tiny_pipeline, bank(), tmp_path / "shards", output_format="webdataset", **options)

    rows = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "folder" / "images"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(rows) == 12 and rows.features["label"].names == ["000000", "000001", "000002"]
    # as the card says, from the Hub or from the folder: with the metadata
    rows = datasets.load_dataset(str(tmp_path / "folder"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 12 and rows[5]["identity"] == "000001" and rows[5]["image"].size == (16, 16)
    folder = torchvision.datasets.ImageFolder(tmp_path / "folder" / "images")
    assert len(folder) == 12 and [label for _, label in folder.samples] == [0] * 4 + [1] * 4 + [2] * 4
    assert (tmp_path / "folder" / rows_of(tmp_path / "folder")[0]["file_name"]).exists()

    samples = list(
        webdataset.WebDataset(str(tmp_path / "shards" / "shards" / "000000.tar"), shardshuffle=False).decode("pil")
    )
    assert len(samples) == 12 and [sample["cls"] for sample in samples] == [0] * 4 + [1] * 4 + [2] * 4
    assert samples[5]["json"]["identity"] == "000001" and samples[5]["png"].size == (16, 16)
    assert not (tmp_path / "shards" / "images").exists()
    # our own reader, as a source of photographs
    source = open_source(tmp_path / "shards" / "shards")
    names = ["000000"] * 4 + ["000001"] * 4 + ["000002"] * 4
    assert [photograph.identity for photograph in source.photographs] == names


def test_shards_by_parts_that_do_not_know_each_other(tiny_pipeline, tmp_path):
    """2,300 images in three shards: two parts; what a kill has left beside a shard is cleared away."""
    options = {"images_per_identity": 230, "batch_size": 100, "size": 8, "output_format": "webdataset"}
    options["num_inference_steps"] = 1
    first = generate_dataset(tiny_pipeline, bank(10), tmp_path, shard=(0, 2), **options)
    assert (first.made, first.complete) == (1300, False) and not (tmp_path / "metadata.parquet").exists()
    (tmp_path / "images" / "000000").mkdir(parents=True, exist_ok=True)
    (tmp_path / "images" / "000000" / "0001.png").write_bytes(b"left after packing")
    (tmp_path / "images" / "000000" / "0000.png.123.part").write_bytes(b"cut short")
    second = generate_dataset(tiny_pipeline, bank(10), tmp_path, shard=(1, 2), **options)
    assert (second.made, second.complete) == (1000, True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md", "generation.json", "identities.safetensors", "metadata.parquet", "preview.png", "shards"
    ]  # fmt: skip
    keys = []
    for shard, row in zip(sorted((tmp_path / "shards").iterdir()), (1000, 1000, 300), strict=True):
        with tarfile.open(shard) as tar:
            names = [name for name in tar.getnames() if name.endswith(".png")]
        assert len(names) == row
        keys += [f"shards/{shard.name}/{name}" for name in names]
    assert keys == [row["file_name"] for row in rows_of(tmp_path)]
    assert generate_dataset(tiny_pipeline, bank(10), tmp_path, shard=(1, 2), **options).made == 0


def test_parquet_shards_with_their_rows(tiny_pipeline, tmp_path):
    """What the Hub's viewer and `datasets` show, by the card and without it; made in parts, resumed after a kill, and
    read by our own commands. 1,150 images in two shards."""
    options = {"images_per_identity": 115, "batch_size": 100, "size": 8, "num_inference_steps": 1}
    folder = tmp_path / "set"
    generate_dataset(tiny_pipeline, bank(10), tmp_path / "images", **options)
    options["output_format"] = "parquet"
    first = generate_dataset(tiny_pipeline, bank(10), folder, shard=(0, 2), **options)
    assert (first.made, first.complete) == (1000, False)
    # a kill while a shard was written, and after it
    write(folder, {"data/train-00001-of.123.part": b"half", "images/000000/0001.png": b"left after packing"})
    second = generate_dataset(tiny_pipeline, bank(10), folder, shard=(1, 2), **options)
    assert (second.made, second.complete) == (150, True)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "data", "generation.json", "identities.safetensors", "metadata.parquet", "preview.png"
    ]  # fmt: skip
    shards = sorted((folder / "data").iterdir())
    assert [shard.name for shard in shards] == [f"train-0000{number}-of-00002.parquet" for number in range(2)]
    tables = [pq.ParquetFile(shard) for shard in shards]
    assert [table.metadata.num_rows for table in tables] == [1000, 150] and tables[0].metadata.num_row_groups == 10
    rows = [row for table in tables for row in table.read().to_pylist()]
    expected = {str(p.relative_to(tmp_path / "images" / "images")): p.read_bytes()
                for p in sorted((tmp_path / "images" / "images").glob("*/*"))}  # fmt: skip
    assert_same_images({name: np.asarray(PIL.Image.open(io.BytesIO(content))) for name, content in expected.items()},
                       {row["image"]["path"]: np.asarray(PIL.Image.open(io.BytesIO(row["image"]["bytes"])))
                        for row in rows})  # fmt: skip
    names = [row.pop("image")["path"] for row in rows]
    listed = rows_of(folder)
    assert names == list(expected)
    assert [row.pop("file_name") for row in listed] == [
        f"data/{shards[number // 1000].name}/{name}" for number, name in enumerate(names)
    ]
    assert rows == listed
    for given in (folder, folder / "data"):
        loaded = datasets.load_dataset(str(given), split="train", cache_dir=str(tmp_path / "cache"))
        assert len(loaded) == 1150 and loaded[120]["image"].size == (8, 8) and loaded[120]["identity"] == "000001"
        source = open_source(given)
        assert source.left_out == {} and len(source.photographs) == 1150
        assert {photograph.identity for photograph in source.photographs} == set(bank(10).names)
    assert generate_dataset(tiny_pipeline, bank(10), folder, shard=(1, 2), **options).made == 0
    cli.main(["convert", str(folder), str(tmp_path / "folders"), "--format", "imagefolder"])
    converted = {str(p.relative_to(tmp_path / "folders")) for p in (tmp_path / "folders").glob("*/*")}
    assert converted == set(names)
    shards[1].unlink()
    with pytest.raises(ValueError, match="set has 1000 images, its metadata.parquet says 1150: it is not whole"):
        open_source(folder)


def test_images_below_the_similarity_are_made_again(tiny_pipeline, toy_root, tmp_path):
    """Against attempts made by hand: the first that is similar enough, or else the best."""
    encoder = FaceEncoder("toy", str(toy_root), det_size=160)
    options = {"size": 16, "encoder": encoder, "max_attempts": 3, "batch_size": 4, **FAST}
    similarities = np.zeros((3, 4, 3))
    for attempt in range(3):
        for i, name in enumerate(bank().names):
            for n in range(4):
                generator = image_generator(0, name, n, attempt)
                picture = tiny_pipeline(bank().embeddings[[i]], generator=generator, **FAST).images
                similarities[i, n, attempt] = (encoder.embed_pictures(picture) @ bank().embeddings[i]).item()
    threshold = float(np.quantile(similarities, 0.6))
    generate_dataset(tiny_pipeline, bank(), tmp_path, 4, min_similarity=threshold, **options)
    expected = []
    for values in similarities.reshape(12, 3):
        good = np.flatnonzero(values >= threshold)
        expected.append(int(good[0]) if len(good) else int(values.argmax()))
    rows = rows_of(tmp_path)
    assert len(set(expected)) == 3 and [row["attempt"] for row in rows] == expected
    chosen = np.take_along_axis(similarities.reshape(12, 3), np.array(expected)[:, None], axis=1)[:, 0]
    assert np.allclose([row["similarity"] for row in rows], chosen, atol=1e-3)


def test_mistakes_are_named_before_anything_is_lost(tiny_pipeline, toy_root, tmp_path):
    options = {"size": 16, **FAST}
    generate_dataset(tiny_pipeline, bank(), tmp_path / "set", 2, **options)
    before = contents(tmp_path / "set")
    with pytest.raises(ValueError, match="other settings .seed: 0 there, 5 now"):
        generate_dataset(tiny_pipeline, bank(), tmp_path / "set", 2, seed=5, **options)
    with pytest.raises(ValueError, match="other settings .identities"):
        generate_dataset(tiny_pipeline, bank().take([2, 1, 0]), tmp_path / "set", 2, **options)
    weights = {name: tensor.clone() for name, tensor in tiny_pipeline.unet.state_dict().items()}
    with torch.no_grad():
        tiny_pipeline.unet.conv_out.bias.add_(1)
    with pytest.raises(ValueError, match="other settings .model"):
        generate_dataset(tiny_pipeline, bank(), tmp_path / "set", 2, **options)
    tiny_pipeline.unet.load_state_dict(weights)
    (tmp_path / "set" / "metadata.parquet").write_bytes(before["metadata.parquet"][:200])
    with pytest.raises(ValueError, match="metadata.parquet is damaged: restore it, or delete it"):
        generate_dataset(tiny_pipeline, bank(), tmp_path / "set", 2, **options)
    (tmp_path / "set" / "metadata.parquet").write_bytes(before["metadata.parquet"])
    assert contents(tmp_path / "set") == before

    encoder = FaceEncoder("toy", str(toy_root), det_size=160)
    wrong = [
        ({"shard": (3, 3)}, "`shard` is .i, n."),
        ({"image_format": "gif"}, "`image_format` has to be one of"),
        ({"images_per_identity": 0}, "`images_per_identity` has to be positive"),
        ({"min_similarity": 0.5}, "`min_similarity` needs an `encoder`"),
        ({"guidance": 2.0}, "no argument 'guidance'"),
        ({"latents": None}, "no argument 'latents'"),
        ({"identity_perturbation": (0.9, 0.6)}, "range of cosines"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            generate_dataset(tiny_pipeline, bank(), tmp_path / "new", **arguments)
    with pytest.raises(ValueError, match="bank comes from encoder `other`"):
        generate_dataset(tiny_pipeline, bank(3, "other"), tmp_path / "new", encoder=encoder)
    with pytest.raises(ValueError, match="empty"):
        generate_dataset(tiny_pipeline, bank(0), tmp_path / "new")
    for names in (["a", "../b", "c"], ["a", "b", "a"], ["a", "é" * 128, "c"]):
        with pytest.raises(ValueError, match="cannot be a folder|have one name|longer than 255 bytes"):
            generate_dataset(tiny_pipeline, IdentityBank(bank().embeddings, "toy", names), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_two_runs_into_one_folder_by_mistake(tiny_pipeline, tmp_path):
    with locked(tmp_path, Part(0, 1)):
        with pytest.raises(RuntimeError, match="another process is generating .*0-of-1"):
            generate_dataset(tiny_pipeline, bank(), tmp_path, 1, **FAST)
        with pytest.raises(RuntimeError, match="another process"):
            generate_dataset(tiny_pipeline, bank(), tmp_path, 1, shard=(1, 2), **FAST)
    assert generate_dataset(tiny_pipeline, bank(), tmp_path, 1, **FAST).complete


def test_a_full_disk_loses_nothing(tiny_pipeline, tmp_path):
    """A tmpfs of 300 KiB, where the kernel lets us make one; later it is read-only."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a tmpfs")
    try:
        options = {"size": 64, "batch_size": 4, **FAST}
        with pytest.raises(OSError, match=r"No space left.* images or more of 60 are complete: make room"):
            generate_dataset(tiny_pipeline, bank(), disk, 20, **options)
        complete = {path: path.read_bytes() for path in disk.glob("images/*/*.png")}
        assert complete and not list(disk.rglob("*.part"))
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert generate_dataset(tiny_pipeline, bank(), disk, 20, **options).complete
        assert len(list(disk.glob("images/*/*.png"))) == 60
        kept = sum(path.read_bytes() == content for path, content in complete.items())
        assert kept >= len(complete) - 4

        whole = contents(disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for output in (disk, disk / "new"):
            with pytest.raises(OSError, match=f"Read-only file system: '{disk}"):
                generate_dataset(tiny_pipeline, bank(), output, 20, **options)
        assert contents(disk) == whole
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_perturbed_embeddings_have_the_angle_that_was_drawn():
    embeddings = F.normalize(torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)))
    generators = [torch.Generator().manual_seed(i) for i in range(2000)]
    perturbed, cosines = perturb_embeddings(embeddings, (0.6, 1.0), generators)
    assert torch.allclose((perturbed * embeddings).sum(dim=1), cosines, atol=1e-5)
    assert torch.allclose(perturbed.norm(dim=1), torch.ones(2000), atol=1e-5)
    assert cosines.min() >= 0.6 and abs(cosines.mean() - 0.8) < 0.01 and abs(cosines.var() - 0.4**2 / 12) < 1e-3
    # no direction is preferred: what is left after the projection has mean zero
    rest = perturbed - cosines[:, None] * embeddings
    assert rest.mean(dim=0).norm() < 0.03
    same, _ = perturb_embeddings(embeddings[:3], (1.0, 1.0), generators[:3])
    assert torch.allclose(same, embeddings[:3], atol=1e-5)


def test_distinct_identities_by_brute_force():
    """Several blocks of candidates, near ones planted within a block, across blocks, and beside excluded ones."""
    generator = torch.Generator().manual_seed(0)
    candidates = F.normalize(torch.randn(2500, 12, generator=generator))
    excluded = F.normalize(torch.randn(300, 12, generator=generator))
    distinct = DistinctIdentities(excluded, 0.7)
    taken = distinct.add(candidates[:700]).tolist() + distinct.add(candidates[700:]).tolist()
    kept, expected, reasons = [], [], {"excluded": 0, "kept": 0}
    for candidate in candidates.numpy():
        near = (excluded.numpy() @ candidate).max() >= 0.7
        similar = bool(kept) and max(float(other @ candidate) for other in kept) >= 0.7
        expected.append(not near and not similar)
        reasons["excluded"] += near
        reasons["kept"] += similar and not near
        if expected[-1]:
            kept.append(candidate)
    assert taken == expected and 50 < len(kept) < 2000
    assert distinct.report == {
        "candidates": 2500,
        "kept": len(kept),
        "near an excluded identity": reasons["excluded"],
        "near a kept identity": reasons["kept"],
    }
    few = DistinctIdentities(excluded, 0.7, number=20)
    assert few.add(candidates).sum() == 20 and few.complete and torch.equal(few.kept, distinct.kept[:20])


def test_sampled_identities_are_new_and_distributed_as_the_known(tmp_path):
    """Against brute force; a distribution that fills 60 of 512 dimensions, about a mean."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(60, 512, generator=generator)
    known = F.normalize(torch.randn(800, 60, generator=generator) @ basis + 2 * torch.randn(512, generator=generator))
    new = sample_identities(IdentityBank(known, "toy"), 40, max_similarity=0.45, seed=3)
    assert new.identity_encoder == "toy" and len(new) == 40
    assert torch.allclose(new.embeddings.norm(dim=1), torch.ones(40), atol=1e-5)
    assert (new.embeddings @ known.T).max() < 0.45
    assert (new.embeddings @ new.embeddings.T - torch.eye(40)).max() < 0.45
    # within the span of the known embeddings, and on their side of the origin
    directions = torch.linalg.svd(known, full_matrices=False)[2][:61]
    assert (new.embeddings @ directions.T).norm(dim=1).min() > 0.999
    assert (new.embeddings @ known.mean(dim=0)).mean() > 0.5 * known.mean(dim=0).square().sum()
    assert torch.equal(sample_identities(IdentityBank(known), 40, 0.45, 3).embeddings, new.embeddings)
    assert not torch.equal(sample_identities(IdentityBank(known), 40, 0.45, 4).embeddings, new.embeddings)


def test_identities_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=r"only \d+ of 50 identities"):
        sample_identities(IdentityBank(torch.eye(3)), 50)
    with pytest.raises(ValueError, match="the bank has 1"):
        sample_identities(bank(1), 5)


def test_the_embedded_checkpoint_makes_faces_at_once(tmp_path, monkeypatch, capfd):
    """The first command, with fewer steps and faces."""
    options = ["--num-inference-steps", "4", "--images-per-identity", "2", "--max-identities", "2"]
    monkeypatch.chdir(tmp_path)
    cli.main(["generate", "--output", "faces", *options])
    images = read(tmp_path / "faces")
    assert len(images) == 4 and all(image.shape == (112, 112, 3) for image in images.values())
    assert "4/4" in capfd.readouterr().err and (tmp_path / "faces" / "preview.png").exists()


def test_the_embedded_checkpoint_is_what_it_says():
    files = [path for path in default_checkpoint().rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= 64e6
    pipe = UIFacePipeline.from_pretrained(default_checkpoint())
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float32}
    identities = IdentityBank.load(default_checkpoint() / "identities.safetensors")
    assert len(identities) == 200 and identities.identity_encoder == pipe.identity_projector.config.identity_encoder
    assert (identities.embeddings @ identities.embeddings.T - torch.eye(200)).max() < 0.3


def test_generate_names_the_problem(tmp_path):
    assert "no.safetensors is missing" in complaint("generate", "--identities", tmp_path / "no.safetensors")
