"""Pipelines and components on a loopback Hub; the clients are processes of their own, with empty caches."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import tiny_components
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from hub_server import HubServer
from huggingface_hub import DatasetCard, ModelCard

from uiface_diffusers import UIFacePipeline
from uiface_diffusers.hub import fill_card, write_remote_code

PRELUDE = """
import json, sys
import numpy as np
import torch

torch.set_num_threads(1)


def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    identity = np.eye(16, dtype=np.float32)[:2]
    generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return pipe(identity, num_inference_steps=4, generator=generator, output_type="np").images
"""


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path / "hub") as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pipeline")
    UIFacePipeline(**tiny_components()).save_pretrained(path)
    return path


def client(hub: HubServer, home: Path, script: str, *arguments, **environment: str) -> str:
    """Runs a script in a process with a cache of its own; returns what it prints."""
    env = {**hub.environment(home), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", PRELUDE + script, *map(str, arguments)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


PUSH = """
from uiface_diffusers import UIFacePipeline

pipe = UIFacePipeline.from_pretrained(sys.argv[1])
np.save(sys.argv[2], sample(pipe))
pipe.push_to_hub("tester/plain", private=True, card_metadata={"license": "apache-2.0"}, recipe="By hand.")
pipe.push_to_hub("tester/shim", remote_code=True, commit_message="with code")
pipe.push_to_hub("tester/plain", create_pr=True, variant="fp16")
"""
PULL = """
from uiface_diffusers import EmptyContext, IdentityProjector, UIFacePipeline, UIFaceUNet2DModel

pipe = UIFacePipeline.from_pretrained("tester/plain")
assert np.array_equal(sample(pipe), np.load(sys.argv[2]))
assert np.array_equal(sample(UIFacePipeline.from_pretrained("tester/shim")), np.load(sys.argv[2]))
variant = UIFacePipeline.from_pretrained("tester/plain", revision="refs/pr/1", variant="fp16")
assert np.array_equal(sample(variant), np.load(sys.argv[2]))
half = UIFacePipeline.from_pretrained("tester/plain", dtype=torch.float16, local_files_only=True)
assert half.unet.dtype == half.empty_context.dtype == torch.float16
local = UIFacePipeline.from_pretrained(sys.argv[1])
classes = {"empty_context": EmptyContext, "identity_projector": IdentityProjector, "unet": UIFaceUNet2DModel}
for name, model in classes.items():
    alone = model.from_pretrained("tester/plain", subfolder=name).state_dict()
    assert all(torch.equal(alone[key], value) for key, value in getattr(local, name).state_dict().items())
given = UIFacePipeline.from_pretrained("tester/plain", unet=local.unet, revision="refs/pr/1", variant="fp16")
assert given.unet is local.unet
"""
STOCK = """
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("tester/shim", trust_remote_code=True)
assert np.array_equal(sample(pipe), np.load(sys.argv[2]))
pipe.save_pretrained(sys.argv[1])
from uiface_diffusers import UIFacePipeline

# beside the files of code that stock diffusers fetched into this cache
assert np.array_equal(sample(UIFacePipeline.from_pretrained("tester/shim")), np.load(sys.argv[2]))
again = UIFacePipeline.from_pretrained(sys.argv[1])
again.push_to_hub("tester/again", remote_code=True)
last = DiffusionPipeline.from_pretrained("tester/again", trust_remote_code=True)
assert np.array_equal(sample(last), np.load(sys.argv[2]))
try:
    DiffusionPipeline.from_pretrained("tester/again", force_download=True)
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("code was executed unasked")
"""
DATASET = """
from huggingface_hub import ModelCard
from uiface_diffusers import IdentityBank, UIFacePipeline, generate_dataset

pipe = UIFacePipeline.from_pretrained(sys.argv[1])
bank = IdentityBank(torch.eye(16)[:2], "toy")
generate_dataset(pipe, bank, sys.argv[3], 2, push_to_hub="tester/faces", num_inference_steps=2)
ModelCard.load(sys.argv[4]).validate()
"""
LINEAGE = """
from uiface_diffusers import IdentityBank, UIFacePipeline, generate_dataset

data = [{"name": "Faces", "license": "research only"}]
metadata = {"license": "cc-by-nc-4.0", "lineage": {"training_data": data}}
UIFacePipeline.from_pretrained(sys.argv[1]).push_to_hub("tester/model", card_metadata=metadata)
for name in ("tester/model", UIFacePipeline.download("tester/model")):
    pipe = UIFacePipeline.from_pretrained(name)
    bank = IdentityBank(torch.eye(16)[:2], "toy")
    output = f"{sys.argv[3]}-{len(name)}"
    generate_dataset(pipe, bank, output, 1, push_to_hub="tester/descended", num_inference_steps=1)
    assert "research only" in open(f"{output}/README.md").read()
"""


class Published(NamedTuple):
    """A Hub with pipelines and data sets that one client has pushed, and the pictures of the first pipeline."""

    hub: HubServer
    images: Path


@pytest.fixture(scope="module")
def published(folder, tmp_path_factory) -> Iterator[Published]:
    root = tmp_path_factory.mktemp("published")
    card = Path(__file__).parents[1] / "model_card.md"
    with HubServer(root / "hub") as hub:
        client(hub, root / "home", PUSH + DATASET + LINEAGE, folder, root / "images.npy", root / "faces", card)
        yield Published(hub, root / "images.npy")


def test_pushed_pulled_and_through_stock_diffusers(published, folder, tmp_path):
    hub, images = published
    assert hub.repositories["tester/plain"].private and not hub.repositories["tester/shim"].private
    plain = hub.files("tester/plain")
    assert not [name for name in plain if name.endswith((".py", ".bin", ".pkl", ".pt"))]
    assert sum(name.endswith(".py") for name in hub.files("tester/shim")) == 4
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in hub.files("tester/plain", "refs/pr/1")
    assert "unet/diffusion_pytorch_model.fp16.safetensors" not in plain
    card = ModelCard(hub.read("tester/plain", "README.md").decode())
    assert card.data.license == "apache-2.0" and card.data.library_name == "diffusers"
    assert "By hand." in card.text and "`toy`, 16-d" in card.text and 'from_pretrained("tester/plain")' in card.text

    client(hub, tmp_path / "home_b", PULL, folder, images)
    # only what is needed: no code, no second variant, no card
    cached = [path.name for path in (tmp_path / "home_b").rglob("*") if path.suffix in (".py", ".md")]
    assert cached == []
    client(hub, tmp_path / "home_c", STOCK, tmp_path / "saved", images)
    assert not list((tmp_path / "saved").rglob("*.py"))


FAILURES = """
import os
from uiface_diffusers import UIFacePipeline

messages = {}
for name, repo, options in json.loads(sys.argv[1]):
    try:
        UIFacePipeline.from_pretrained(repo, **options)
        messages[name] = "loaded"
    except (OSError, ValueError) as error:
        messages[name] = f"{type(error).__name__}: {error}"
print(json.dumps(messages))
"""


def test_what_fails_says_which_and_what_to_do(hub, folder, tmp_path):
    upload = """
from huggingface_hub import HfApi
for repo in ("tester/good", "tester/closed", "tester/empty"):
    HfApi().create_repo(repo)
for repo in ("tester/good", "tester/closed"):
    HfApi().upload_folder(repo_id=repo, folder_path=sys.argv[2])
"""
    hub.gated.add("tester/closed")
    cases = [
        ("missing", "tester/nothing", {}),
        ("gated", "tester/closed", {}),
        ("revision", "tester/good", {"revision": "v9"}),
        ("no pipeline", "tester/empty", {}),
        ("variant", "tester/good", {"variant": "fp16"}),
        ("not cached", "tester/good", {"local_files_only": True}),
        ("good", "tester/good", {}),
        ("cached", "tester/good", {"local_files_only": True}),
    ]
    messages = json.loads(client(hub, tmp_path / "home", upload + FAILURES, json.dumps(cases), folder))
    assert messages["missing"].startswith("OSError: tester/nothing is neither a folder here nor a repository")
    assert "tester/closed is gated: ask for access" in messages["gated"]
    assert "tester/good has no revision 'v9'" in messages["revision"]
    assert "tester/empty has no model_index.json" in messages["no pipeline"]
    assert "`variant=fp16`" in messages["variant"]
    assert "tester/good is not in the local cache: download it once" in messages["not cached"]
    assert messages["good"] == messages["cached"] == "loaded"

    hub.close()
    cases = [("cached", "tester/good", {}), ("not cached", "tester/other", {})]
    arguments = (hub, tmp_path / "home", FAILURES, json.dumps(cases))
    messages = json.loads(client(*arguments, HF_HUB_OFFLINE="1"))
    assert messages["cached"] == "loaded"
    assert "tester/other is not in the local cache and" in messages["not cached"]
    assert "cannot be reached" in messages["not cached"]


CHANGES = """
from uiface_diffusers import UIFacePipeline

for amount in sys.stdin:
    pipe = UIFacePipeline.from_pretrained(sys.argv[1])
    with torch.no_grad():
        pipe.empty_context.embedding.add_(int(amount))
    try:
        pipe.push_to_hub("tester/model", commit_message=f"by {amount}")
        print(json.dumps("pushed"), flush=True)
    except Exception as error:
        print(json.dumps(f"{type(error).__name__} {error}"), flush=True)
"""


def test_an_interrupted_upload_loses_nothing(hub, folder, tmp_path):
    """Four pushes of a client that is told how much the empty context has changed."""
    original = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    env = {**hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PRELUDE + CHANGES, str(folder)]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as pushing:

        def push(amount: int) -> str:
            pushing.stdin.write(f"{amount}\n")
            pushing.stdin.flush()
            return json.loads(pushing.stdout.readline())

        assert [push(0), push(1)] == ["pushed", "pushed"]
        first = hub.read("tester/model", "empty_context/diffusion_pytorch_model.safetensors")
        hub.fail_uploads = 1
        assert "Error while uploading" in push(2)
        assert hub.read("tester/model", "empty_context/diffusion_pytorch_model.safetensors") == first
        assert {path: path.read_bytes() for path in folder.rglob("*.safetensors")} == original
        assert push(2) == "pushed"
        assert hub.read("tester/model", "empty_context/diffusion_pytorch_model.safetensors") != first


def test_a_data_set_is_pushed_with_its_card(published):
    hub = published.hub
    files = set(hub.files("datasets/tester/faces"))
    assert {"images/000001/0001.png", "metadata.parquet", "generation.json", "preview.png", "README.md"} <= files
    assert not [name for name in files if name.endswith((".part", ".lock", ".jsonl"))]
    pushed = DatasetCard(hub.read("datasets/tester/faces", "README.md").decode())
    assert pushed.data.size_categories == ["n<1K"] and "face-recognition" in pushed.data.tags
    assert "| identities | 2 |" in pushed.text


def test_the_lineage_goes_from_the_models_card_to_the_data_sets(published):
    card = DatasetCard(published.hub.read("datasets/tester/descended", "README.md").decode())
    lineage = card.data.to_dict()["lineage"]
    generator = lineage["generator"]
    assert (generator["name"], generator["license"]) == ("tester/model", "cc-by-nc-4.0")
    assert generator["training_data"] == [{"name": "Faces", "license": "research only"}]
    assert lineage["encoder"]["name"] == "toy"


def test_the_embedded_checkpoint_has_a_card():
    card = ModelCard.load(Path(__file__).parents[1] / "model_card.md")
    assert card.data.library_name == "diffusers" and card.data.license == "other" and "uiface" in card.data.tags


def test_a_card_keeps_what_people_wrote():
    pipe = UIFacePipeline(**tiny_components())
    card = fill_card(None, pipe, "org/name", {"license": "mit"}, "Ten steps.")
    assert "| license | mit |" in card.text and "Ten steps." in card.text
    # the written section is renewed, words around it stay, and so do data
    edited = ModelCard(card.content.replace("# name", "# name\n\nMy own words.").replace("mit\n", "gpl-3.0\n", 1))
    renewed = fill_card(edited, pipe, "org/name", {"license": "mit", "datasets": ["lfw"]}, "Twenty steps.")
    assert "My own words." in renewed.text and "Twenty steps." in renewed.text and "Ten steps." not in renewed.text
    assert renewed.data.license == "gpl-3.0" and renewed.data.datasets == ["lfw"]
    assert "| license | gpl-3.0 |" in renewed.text
    # a section that a person has changed is that person's
    changed = ModelCard(card.content.replace("Ten steps.", "Ten steps, and luck."))
    kept = fill_card(changed, pipe, "org/name", {}, "Twenty steps.")
    assert kept.text == changed.text
    # as is a card without one
    own = ModelCard("---\nlibrary_name: other\ntags:\n- mine\n---\n\n# All mine\n")
    filled = fill_card(own, pipe, "org/name", {"license": "mit"}, "Ten steps.")
    assert filled.text.strip() == "# All mine"
    assert filled.data.library_name == "other" and filled.data.tags[0] == "mine" and filled.data.license == "mit"


def test_code_beside_the_weights_is_not_executed(folder, tmp_path):
    """A folder with the files for stock diffusers loads by our class without them, also when they are hostile."""
    pipe = UIFacePipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "saved")
    write_remote_code(tmp_path / "saved")
    codes = sorted((tmp_path / "saved").rglob("*.py"))
    assert len(codes) == 4
    for code in codes:
        code.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n" + code.read_text())
    again = UIFacePipeline.from_pretrained(tmp_path / "saved")
    assert not (tmp_path / "executed").exists()
    again.save_pretrained(tmp_path / "again")
    assert not list((tmp_path / "again").rglob("*.py"))
    UIFacePipeline.from_pretrained(tmp_path / "again")


@pytest.fixture
def stock_folder(tmp_path) -> Path:
    """What a stock text-to-image pipeline leaves of itself, without the text."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=48,
        attention_head_dim=2,
    )
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 16), norm_num_groups=4)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1"}
    for name, module in (("unet", unet), ("vae", vae), ("scheduler", scheduler)):
        module.save_pretrained(tmp_path / "stock" / name)
        index[name] = ["diffusers", type(module).__name__]
    (tmp_path / "stock" / "model_index.json").write_text(json.dumps(index))
    return tmp_path / "stock"


def test_starts_from_a_stock_unet(stock_folder, tmp_path):
    pipe = UIFacePipeline.from_unet(stock_folder, identity_dim=16, num_tokens=4, identity_encoder="toy")
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.identity_projector.config.context_dim == pipe.empty_context.config.context_dim == 48
    pipe.save_pretrained(tmp_path / "saved")
    again = UIFacePipeline.from_pretrained(tmp_path / "saved")
    images = []
    for each in (pipe, again):
        each.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        out = each(np.eye(16, dtype=np.float32)[0], num_inference_steps=3, generator=generator, output_type="np")
        images.append(out.images)
    assert np.isfinite(images[0]).all() and np.array_equal(*images)


def test_a_unet_that_needs_more_than_a_context_is_named(stock_folder):
    config = json.loads((stock_folder / "unet" / "config.json").read_text())
    config |= {"class_embed_type": "timestep"}
    UNet2DConditionModel.from_config(config).save_pretrained(stock_folder / "unet")
    with pytest.raises(ValueError, match="needs more than a context .class_embed_type"):
        UIFacePipeline.from_unet(stock_folder, identity_dim=16)


def test_no_call_trusts_remote_code():
    """Transformers' classes, which ask the user unless they are told `False`, always are; no other call has it."""
    root, told = Path(__file__).parents[1], 0
    for path in [*(root / "uiface_diffusers").rglob("*.py"), *(root / "training").rglob("*.py")]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "transformers"]
        asking = {f"{alias.asname or alias.name}.from_pretrained" for node in imports for alias in node.names}
        for call in (node for node in nodes if isinstance(node, ast.Call)):
            values = [ast.unparse(word.value) for word in call.keywords if word.arg == "trust_remote_code"]
            asks = ast.unparse(call.func) in asking
            assert values == ["False"] * (asks or len(values)), f"{path}:{call.lineno}"
            told += asks
    assert told >= 2
