"""Seeds that depend on what is made and on nothing else."""

import hashlib

import numpy as np
import torch

# streams of random numbers of one image; candidates for new identities have no identity; what the perturbations of an
# identity's images have in common is drawn as for image 0; conditions have streams of their own from CONDITION on
NOISE, PERTURBATION, CANDIDATE, COMMON_PERTURBATION, LAYOUT, CONDITION = range(6)
# how an image's random numbers come from its seed; data sets and studies begun with another version are refused.
# 1: `torch.Generator().manual_seed`, which takes 32 bits of a seed only: images shared their noise
NOISE_VERSION = 2
# within the state of a generator of the CPU: the seed, and the 624 words of the Mersenne Twister, as 64-bit numbers
_SEED, _WORDS = slice(0, 8), slice(24, 24 + 8 * 624)


def mix_seed(*numbers: int) -> int:
    """One seed from several numbers, well mixed (numpy's SeedSequence)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def image_seed(seed: int, identity: str, index: int, attempt: int = 0, stream: int = NOISE) -> int:
    """The seed of choices about image `index` of an identity by its name. For noise, see `noise_seed`."""
    name = int.from_bytes(hashlib.sha256(identity.encode(errors="surrogatepass")).digest()[:8], "big")
    return int(np.random.SeedSequence((seed, name, index, attempt, stream)).generate_state(1, np.uint64)[0] >> 1)


def noise_seed(seed: int, identity: str, index: int, attempt: int = 0, stream: int = NOISE) -> int:
    """The seed of the noise of image `index` of an identity by its name: 63 bits, for `noise_generator`. Among a
    million images, two have the same one with a probability of 5e-8."""
    key = f"{seed}\0{index}\0{attempt}\0{stream}\0{identity}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def noise_generator(seed: int) -> torch.Generator:
    """A random generator on the CPU that uses all bits of its seed.

    `torch.Generator().manual_seed` uses 32 bits: among 100,000 seeds, about one pair has the same random numbers.
    Here the generator's whole state is drawn by a counter-based generator (Philox) whose key is the seed.

    Args:
        seed (`int`): from 0, below 2**63.
    """
    words = np.random.Philox(key=seed).random_raw(312).view(np.uint32).astype(np.uint64)
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    state.numpy()[_SEED] = np.array([seed], np.uint64).view(np.uint8)
    state.numpy()[_WORDS] = words.view(np.uint8)
    generator.set_state(state)
    return generator


def image_generator(seed: int, identity: str, index: int, attempt: int = 0, stream: int = NOISE) -> torch.Generator:
    """The random generator of image `index` of an identity by its name."""
    return noise_generator(noise_seed(seed, identity, index, attempt, stream))
