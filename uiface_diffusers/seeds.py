"""Seeds that depend on what is made and on nothing else."""

import hashlib

import numpy as np
import torch

# streams of random numbers of one image
NOISE, PERTURBATION = range(2)


def mix_seed(*numbers: int) -> int:
    """One seed from several numbers, well mixed (numpy's SeedSequence)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def image_seed(seed: int, identity: str, index: int, attempt: int = 0, stream: int = NOISE) -> int:
    """The seed of image `index` of an identity by its name."""
    name = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big")
    return int(np.random.SeedSequence((seed, name, index, attempt, stream)).generate_state(1, np.uint64)[0] >> 1)


def image_generator(seed: int, identity: str, index: int, attempt: int = 0, stream: int = NOISE) -> torch.Generator:
    """The random generator of image `index` of an identity by its name."""
    return torch.Generator().manual_seed(image_seed(seed, identity, index, attempt, stream))
