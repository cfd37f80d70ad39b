import numpy as np
import pytest
import torch
from conftest import tiny_autoencoder
from diffusers import AutoencoderKL, VQModel

from uiface_diffusers.data import FaceCache, LatentSet, cache_latents, prepare_faces
from uiface_diffusers.data.latent_cache import model_fingerprint
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.latents import encode_images
from uiface_diffusers.pictures import from_unit_range, scale_to_unit_range, to_bytes, to_unit_range


@pytest.fixture
def faces(toy_root, toy_photographs, tmp_path) -> FaceCache:
    encoder = FaceEncoder("toy", str(toy_root), det_size=160)
    prepare_faces(toy_photographs, tmp_path / "cache", encoder, image_size=16)
    return FaceCache(tmp_path / "cache")


def first_stage(kind: str):
    torch.manual_seed(0)
    options = {"latent_channels": 4, "norm_num_groups": 4, "block_out_channels": (8,)}
    return {
        "tiny": tiny_autoencoder,
        "kl": lambda: AutoencoderKL(**options, scaling_factor=0.5).eval(),
        "vq": lambda: VQModel(**options, scaling_factor=1.0).eval(),
    }[kind]()


@pytest.mark.parametrize("kind", ["tiny", "kl", "vq"])
def test_latents_of_both_flips(faces, kind):
    vae = first_stage(kind)
    stored = LatentSet(cache_latents(faces, vae, batch_size=7))
    latents = stored.__getitems__(list(range(len(stored))))
    images = np.stack(list(faces.shard_images(faces.shards[0])))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    assert latents.shape[:3] == (24, 2, 4) and latents.dtype == torch.float16
    if kind == "kl":  # sampled: each flip by noise of its own, about its own mean and by its own deviation
        with torch.no_grad():
            flips = [vae.encode(flip).latent_dist for flip in (pixels, pixels.flip(-1))]
        noise = [(latents[:, i] / 0.5 - flip.mean) / flip.std for i, flip in enumerate(flips)]
        for each in noise:
            assert abs(each.mean()) < 0.03 and abs(each.std() - 1) < 0.03
        for other in (noise[1], noise[1].flip(-1)):
            assert abs((noise[0] * other).mean()) < 0.03
    else:
        with torch.no_grad():
            expected = torch.stack([encode_images(vae, flip) for flip in (pixels, pixels.flip(-1))], 1)
        assert (latents - expected).abs().max() < 2e-3 * expected.abs().max()


def test_latents_are_made_once_a_first_stage(faces, tmp_path):
    vae = tiny_autoencoder()
    (file,) = cache_latents(faces, vae)
    written = file.stat().st_mtime_ns
    # the same first stage from anywhere
    vae.save_pretrained(tmp_path / "vae")
    same = type(vae).from_pretrained(tmp_path / "vae").eval()
    assert cache_latents(faces, same) == [file] and file.stat().st_mtime_ns == written
    with torch.no_grad():
        next(same.parameters()).add_(1e-3)
    assert model_fingerprint(same) != model_fingerprint(vae)
    assert cache_latents(faces, same) != [file]


def test_an_unfinished_cache_is_named(faces, tmp_path):
    (faces.folder / "report.json").unlink()
    with pytest.raises(ValueError, match="cache is not finished: run `uiface prepare`"):
        FaceCache(faces.folder)
    with pytest.raises(ValueError, match="is no cache of prepared faces"):
        FaceCache(tmp_path)


def test_bytes_and_the_unit_range():
    """All bytes there and back; in the values' own type where a model computes in half precision."""
    pixels = torch.arange(256, dtype=torch.uint8)
    unit = to_unit_range(pixels)
    assert unit.dtype == torch.float32 and (unit.min(), unit.max()) == (-1, 1)
    assert torch.equal(unit, torch.from_numpy(np.arange(256, dtype=np.float32) / np.float32(127.5) - 1))
    assert torch.equal(to_bytes(unit), pixels) and to_unit_range(unit) is unit
    assert (from_unit_range(unit) - pixels).abs().max() < 1e-4
    assert to_bytes(torch.tensor([-1.2, 1.2, 0.0])).tolist() == [0, 255, 128]
    half = pixels.bfloat16()
    assert torch.equal(scale_to_unit_range(half), half / 127.5 - 1) and scale_to_unit_range(half).dtype == half.dtype
