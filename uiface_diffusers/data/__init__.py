from .benchmarks import Benchmark, make_benchmark, read_benchmark, read_pairs
from .face_cache import FaceCache, FaceCacheSource, prepare_faces
from .latent_cache import LatentSet, cache_latents

__all__ = [
    "Benchmark",
    "FaceCache",
    "FaceCacheSource",
    "LatentSet",
    "cache_latents",
    "make_benchmark",
    "prepare_faces",
    "read_benchmark",
    "read_pairs",
]
