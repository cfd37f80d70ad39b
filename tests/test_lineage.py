"""Where a data set comes from: from the model's card to the data set's, and what people write there."""

import json

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import REPOSITORY, complaint, tiny_components
from huggingface_hub import DatasetCard, ModelCard

from uiface_diffusers import IdentityBank, UIFacePipeline, cli, default_checkpoint, generate_dataset
from uiface_diffusers.data import prepare_faces
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.hub import fill_card
from uiface_diffusers.hub.lineage import missing_lineage, model_name, read_header

MODEL_CARD = """---
license: other
license_name: research-only
lineage:
  training_data:
  - name: Faces
    license: research only
  - name: More faces
  encoder:
    name: toy
    license: mit
  identities:
    source: made by hand
---

# A model
"""


@pytest.fixture
def pipeline(tmp_path) -> UIFacePipeline:
    """Loaded from a folder with a card and a bank."""
    UIFacePipeline(**tiny_components()).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text(MODEL_CARD)
    bank().save(tmp_path / "model" / "identities.safetensors")
    return UIFacePipeline.from_pretrained(tmp_path / "model")


def bank() -> IdentityBank:
    return IdentityBank(F.normalize(torch.eye(16)[:3] + 0.1), "toy")


def generate(pipeline, output, identities=None) -> dict:
    identities = bank().take([0, 1]) if identities is None else identities
    generate_dataset(pipeline, identities, output, 1, num_inference_steps=1)
    return read_header(output / "README.md")


def test_the_models_card_comes_into_the_data_sets(pipeline, tmp_path):
    header = generate(pipeline, tmp_path / "set")
    settings = json.loads((tmp_path / "set" / "generation.json").read_text())["settings"]
    assert header["lineage"] == {
        "generator": {
            "name": "model",
            "fingerprint": settings["model"],
            "license": "other",
            "license_name": "research-only",
            "training_data": [{"name": "Faces", "license": "research only"}, {"name": "More faces"}],
        },
        "encoder": {"name": "toy", "license": "mit"},
        "identities": {"number": 2, "fingerprint": settings["identities"], "source": "made by hand"},
    }
    # as the Hub's client reads it
    card = DatasetCard.load(tmp_path / "set" / "README.md")
    assert card.data.to_dict()["lineage"] == header["lineage"]
    assert card.data.configs == [{"config_name": "default", "data_files": ["images/**", "metadata.parquet"]}]
    assert "license" not in header  # the data set's own is its maker's to choose
    # of other identities nobody said where they come from
    other = IdentityBank(F.normalize(torch.eye(16)[3:5]), "buffalo_l")
    pipeline.identity_projector.register_to_config(identity_encoder="buffalo_l")
    lineage = generate(pipeline, tmp_path / "other", other)["lineage"]
    assert "source" not in lineage["identities"]
    assert lineage["encoder"] == {"name": "buffalo_l", "license": "non-commercial research only"}


def test_the_command_says_what_is_missing_and_what_is_filled_in_stays(pipeline, tmp_path, capsys):
    output = tmp_path / "set"
    generate(pipeline, output)
    cli.main(["card", str(output)])
    printed = capsys.readouterr().out
    assert "  lineage.generator.license: other\n" in printed and "  lineage.encoder.license: mit\n" in printed
    missing = printed.partition("missing:\n")[2]
    assert [line.split(":")[0].strip() for line in missing.splitlines()[:-1]] == [
        "license", "lineage.leakage_audit", "lineage.generator.training_data[1].license"
    ]  # fmt: skip
    assert "uiface audit DATASET --against CACHE" in missing
    card = output / "README.md"
    filled = card.read_text().replace("---\n", "---\nlicense: cc-by-4.0\nmine: [1, 2]\n", 1)
    filled = filled.replace("- name: More faces\n", "- name: More faces\n      license: mit\n")
    card.write_text(filled.replace("lineage:\n", "lineage:\n  leakage_audit: {against: photos}\n"))
    assert missing_lineage(read_header(card)) == []
    # the card is made anew when an image was lost
    next((output / "images").rglob("*.png")).unlink()
    header = generate(pipeline, output)
    assert header["license"] == "cc-by-4.0" and header["mine"] == [1, 2] and missing_lineage(header) == []
    cli.main(["card", str(output)])
    assert "nothing is missing" in capsys.readouterr().out


def test_a_card_that_cannot_be_read_is_named_before_the_work(pipeline, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ValueError, match="the header of .*README.md, between the lines ---, is no YAML"):
        generate(pipeline, tmp_path / "set")
    assert not (tmp_path / "set" / "images").exists()
    assert "is no YAML" in complaint("card", tmp_path / "set")
    assert "is missing: name the folder of a data set" in complaint("card", tmp_path / "nowhere")
    (tmp_path / "plain").mkdir()
    cli.main(["card", str(tmp_path / "plain")])


def test_the_audit_is_noted_in_the_card(pipeline, toy_root, toy_photographs, tmp_path, capsys):
    encoder = FaceEncoder("toy", str(toy_root), det_size=160)
    prepare_faces(toy_photographs, tmp_path / "photos", encoder, image_size=112)
    output = tmp_path / "set"
    before = generate(pipeline, output)
    text = (output / "README.md").read_text().partition("\n---\n")[2]
    pack = ["--encoder", "toy", "--encoder-root", str(toy_root), "--det-size", "160"]
    audit = ["audit", str(output), "--against", str(tmp_path / "photos"), "--plot", str(tmp_path / "a.png"), *pack]
    cli.main(audit)
    assert f"noted in {output / 'README.md'}" in capsys.readouterr().out
    after = read_header(output / "README.md")
    found = after["lineage"].pop("leakage_audit")
    assert after == before and (output / "README.md").read_text().partition("\n---\n")[2] == text
    assert (found["against"], found["embeddings"], found["images"]) == ("photos", 24, 2)
    assert found["encoder"] == "toy" and found["encoder_fingerprint"] == encoder.fingerprint
    assert [each["false_accept_rate"] for each in found["thresholds"]] == [1e-3, 1e-4]
    # a set that was not generated has a card of its own
    (tmp_path / "faces" / "a").mkdir(parents=True)
    next((output / "images").rglob("*.png")).rename(tmp_path / "faces" / "a" / "0.png")
    (tmp_path / "faces" / "README.md").write_text("mine")
    cli.main([*audit[:1], str(tmp_path / "faces"), *audit[2:]])
    assert (tmp_path / "faces" / "README.md").read_text() == "mine"


def test_the_embedded_checkpoint_knows_its_lineage(tmp_path):
    header = json.loads((default_checkpoint() / "card.json").read_text())
    assert header == read_header(REPOSITORY / "model_card.md")
    assert ModelCard.load(REPOSITORY / "model_card.md").data.to_dict()["lineage"] == header["lineage"]
    data = {each["name"]: each["license"] for each in header["lineage"]["training_data"]}
    assert all(data.values()) and len(data) == 2
    own = IdentityBank.load(default_checkpoint() / "identities.safetensors")
    assert header["lineage"]["encoder"]["name"] == own.identity_encoder


def test_a_models_card_does_not_keep_what_is_outdated():
    """People's words stay; the encoder and the data of another training do not."""
    pipe = UIFacePipeline(**tiny_components())
    data = [{"name": "a", "faces": 3, "fingerprint": "1"}, {"name": "b", "faces": 4, "fingerprint": "2"}]
    card = fill_card(None, pipe, "org/name", {"lineage": {"training_data": data}}, None)
    assert card.data.lineage == {"training_data": data, "encoder": {"name": "toy"}}
    assert "| training data | a, b |" in card.text
    header = card.data.to_dict()
    header["lineage"]["training_data"][1]["license"] = "mit"
    header["lineage"]["training_data"].append({"name": "by hand"})
    header["lineage"]["encoder"] = {"name": "other", "license": "gpl"}
    edited = ModelCard(f"---\n{yaml.safe_dump(header)}---\n{card.text}")
    new = [{"name": "b", "faces": 4, "fingerprint": "2"}, {"name": "c", "faces": 5, "fingerprint": "3"}]
    lineage = fill_card(edited, pipe, "org/name", {"lineage": {"training_data": new}}, None).data.lineage
    assert lineage == {
        "training_data": [new[0] | {"license": "mit"}, new[1], {"name": "by hand"}],
        "encoder": {"name": "toy"},
    }


def test_names_of_models(tmp_path):
    snapshot = tmp_path / "models--org--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    assert model_name(snapshot) == "org/a--b" and model_name("org/name") == "org/name"
    (tmp_path / "runs").mkdir()
    assert model_name(tmp_path / "runs") == "runs"
